"""kernels/fp8.py: Triton (interpreted on CPU), torch and the fp64 emulation agree bit for bit, on values that are chosen to be hard to
round."""
import pytest
import torch
from kernel_truth import DEVICE, SIZES, draw, each_backend, each_dtype

from kernels.backend import MissingBackend
from kernels.fp8 import amax_of, dequantise, quantise
from kernels.fp8_reference import codes, dequantise_reference, quantise_reference, round_to_codes
from kernels.fp8_scaling import E4M3, E5M2, LARGEST, LARGEST_SCALE, Fp8Recipe, history_amax, push_amax, scale_of

each_format = pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=["e4m3", "e5m2"])
each_scaling = pytest.mark.parametrize("scaling", ["tensor", "1x128", "128x128"])


def bits(data: torch.Tensor) -> torch.Tensor:
    """uint8 codes; the sign of NaN is nobody's business."""
    raw = data.cpu().view(torch.uint8)
    return torch.where(data.cpu().float().isnan(), 0x7F, raw).to(torch.uint8)


def assert_exact(x: torch.Tensor, fp8: torch.dtype, scaling: str, backend: str, **options) -> None:
    """Data, scales, amax and the transpose are those of the emulation."""
    found = quantise(x, dtype=fp8, scaling=scaling, transpose=True, backend=backend, **options)
    plain = x.cpu()
    data, inverse, amax = quantise_reference(plain, dtype=fp8, scaling=scaling, **options)
    assert found.data.dtype == fp8 and torch.equal(bits(found.data), data)
    assert torch.equal(found.scale_inverse.cpu(), inverse) and found.scale_inverse.dtype == torch.float32
    if scaling == "tensor":
        torch.testing.assert_close(found.amax.cpu(), amax, rtol=0, atol=0, equal_nan=True)
    data_t, inverse_t, _ = quantise_reference(plain.t(), dtype=fp8, scaling=scaling, **options)
    assert torch.equal(bits(found.data_t), data_t) and torch.equal(found.scale_inverse_t.cpu(), inverse_t)


def hard(fp8: torch.dtype, width: int = 128) -> torch.Tensor:
    """fp32 [rows, width]: every code, the middles between neighbours and what lies beside them, both signs; zeros, subnormals, overflow."""
    values = codes(fp8)[:128].float()
    values = values[~values.isnan()]
    middles = (values[1:] + values[:-1]) / 2
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    largest = LARGEST[fp8]
    beyond = torch.tensor([largest * f for f in (1.0, 1.02, 1.04, 1.07, 2.0, 1e30)] + [3e38, 1e-38, 1e-45, 2.0**-10, 2.0**-17, 2.0**-18])
    every = torch.cat((values, middles, torch.nextafter(middles, up), torch.nextafter(middles, down), beyond))
    every = torch.cat((every, -every))
    return torch.nn.functional.pad(every, (0, -every.numel() % width)).view(-1, width).to(DEVICE)


@each_format
def test_the_emulation_rounds_as_torch_does_where_torch_is_right(fp8):
    x = hard(fp8).cpu()
    drawn = draw(64, 128, dtype=torch.float32, seed=1).cpu()
    x = torch.cat((x, 30 * drawn, 2.0 ** (12 * drawn)))
    x = x.clamp(-LARGEST[fp8], LARGEST[fp8])
    assert torch.equal(round_to_codes(x, torch.isfinite(x), fp8), x.to(fp8).view(torch.uint8))
    values = codes(fp8)
    assert torch.equal(values[~values.isnan()].float(), torch.arange(256).to(torch.uint8).view(fp8)[~values.isnan()].float())
    assert torch.equal(dequantise_reference(bits(x.to(fp8)), torch.ones(1), dtype=fp8).float(), x.to(fp8).float())


@each_backend
@each_format
def test_every_code_and_every_tie_to_the_bit(fp8, backend):
    """Scale 1: the values are rounded as they are."""
    assert_exact(hard(fp8), fp8, "tensor", backend, scale=torch.ones(1, device=DEVICE))
    assert_exact(hard(fp8), fp8, "tensor", backend, scale=torch.full((1,), 0.37, device=DEVICE))


@each_backend
@each_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_every_16_bit_number(scale, dtype, fp8, backend):
    x = torch.arange(-32768, 32768).to(torch.int16).view(dtype).view(512, 128).to(DEVICE)
    assert_exact(x, fp8, "tensor", backend, scale=torch.full((1,), scale, device=DEVICE))


@each_backend
@each_dtype
@each_scaling
@pytest.mark.parametrize("width", SIZES)
def test_equal_to_the_emulation(width, scaling, dtype, backend):
    fp8 = E5M2 if width % 2 else E4M3
    assert_exact(draw(3, width, dtype=dtype, seed=width, scale=7.0), fp8, scaling, backend)


@each_backend
@each_format
@each_scaling
def test_rows_that_are_not_a_multiple_of_128(scaling, fp8, backend):
    x = draw(131, 130, dtype=torch.bfloat16, seed=3) * torch.logspace(-6, 6, 131, device=DEVICE)[:, None].bfloat16()
    assert_exact(x, fp8, scaling, backend)
    assert_exact(x, fp8, scaling, backend, power_of_2=True)


@each_backend
@each_scaling
def test_zeros_have_scale_1_and_tiny_values_a_finite_one(scaling, backend):
    x = draw(3, 300, dtype=torch.float32, seed=4)
    x[1] = 0
    x[2, 128:256] = 0
    assert_exact(x, E4M3, scaling, backend)
    zero = quantise(torch.zeros(2, 5, device=DEVICE), scaling=scaling, backend=backend)
    assert not zero.data.float().any() and bool((zero.scale_inverse == 1).all())
    tiny = torch.full((2, 5), 1e-37, device=DEVICE)
    assert_exact(tiny, E5M2, scaling, backend)
    assert float(quantise(tiny, scaling=scaling, backend=backend).scale_inverse.flatten()[0]) == 1 / LARGEST_SCALE


@each_backend
@each_format
@each_scaling
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_becomes_nan_and_shows_in_the_amax(bad, scaling, fp8, backend):
    x = draw(130, 140, dtype=torch.float32, seed=5)
    x[1, 2] = bad
    assert_exact(x, fp8, scaling, backend)
    found = quantise(x, dtype=fp8, scaling=scaling, backend=backend)
    values = dequantise(found.data, found.scale_inverse)
    assert bool(values[1, 2].isnan()) and int(values.isnan().sum()) == 1
    if scaling == "tensor":
        assert not bool(found.amax.isfinite())
        assert not bool(amax_of(x, backend=backend).isfinite())
    assert_exact(x.half(), fp8, scaling, backend)
    x[0, 0], x[1, 2] = torch.nan, torch.inf
    assert bool(amax_of(x, backend=backend).isnan())


@each_backend
@each_format
def test_errors_of_rounding_are_those_of_the_format(fp8, backend):
    """Relative error of normal numbers at most 2^-4 / (1 + 2^-4) = 1/17 (e4m3), 1/9 (e5m2); its root mean square is a known number."""
    x = draw(256, 256, dtype=torch.float32, seed=6)
    found = quantise(x, dtype=fp8, backend=backend)
    error = (dequantise(found.data, found.scale_inverse) - x).abs() / x.abs()
    smallest = {E4M3: 2.0**-6, E5M2: 2.0**-14}[fp8] * float(found.scale_inverse)
    assert float(error[x.abs() > smallest].max()) <= {E4M3: 1 / 17, E5M2: 1 / 9}[fp8] * 1.0001
    mean_square = float(((dequantise(found.data, found.scale_inverse) - x).double().square().sum() / x.double().square().sum()).sqrt())
    assert mean_square == pytest.approx({E4M3: 0.0265, E5M2: 0.053}[fp8], rel=0.05)


@each_backend
def test_a_given_scale_saturates_and_the_amax_is_still_that_of_the_tensor(backend):
    x = draw(3, 500, dtype=torch.bfloat16, seed=7)
    scale = torch.full((1,), 1000.0, device=DEVICE)
    found = quantise(x, scale=scale, backend=backend)
    assert float(found.data.float().abs().max()) == 448.0
    assert torch.equal(found.amax, x.float().abs().max().reshape(1)) and torch.equal(found.amax, amax_of(x, backend=backend))
    only = quantise(x, scale=scale, backend=backend, transpose="only")
    assert only.data is None and torch.equal(bits(only.data_t), bits(found.data).t())


@each_backend
@each_scaling
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 8)])
def test_nothing_in_nothing_out(shape, scaling, backend):
    found = quantise(torch.empty(shape, device=DEVICE), scaling=scaling, transpose=True, backend=backend)
    assert found.data.shape == shape and found.data_t.numel() == 0
    assert scaling != "tensor" or float(found.amax) == 0


@each_backend
@each_scaling
def test_strided_rows_and_three_dimensions(scaling, backend):
    whole = draw(6, 2, 160, dtype=torch.float32, seed=8)
    found = quantise(whole[:, 0], scaling=scaling, transpose=True, backend=backend)
    dense = quantise(whole[:, 0].contiguous(), scaling=scaling, transpose=True, backend=backend)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found[:4:2], dense[:4:2]))
    assert torch.equal(found.scale_inverse, dense.scale_inverse)
    assert quantise(whole, scaling=scaling, backend=backend).data.shape == whole.shape
    again = quantise(whole[:, 0], scaling=scaling, transpose=True, backend=backend)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found[:4:2], again[:4:2]))


def test_scales():
    amax = torch.tensor([448.0, 224.0, 3.0, 0.0, torch.inf, torch.nan, 1e-40])
    scale = scale_of(amax, E4M3)
    assert scale.tolist()[:2] == [1.0, 2.0] and scale.tolist()[3:6] == [1.0] * 3 and float(scale[6]) == LARGEST_SCALE
    assert torch.equal(scale_of(amax[:3], E4M3, margin=3), scale[:3] / 8)
    assert scale_of(amax[2:3], E4M3, power_of_2=True).tolist() == [128.0]


def test_history():
    recipe, history = Fp8Recipe("delayed", history=3), torch.zeros(3, 2)
    assert history_amax(history, recipe).tolist() == [0.0, 0.0]
    for amax in ([1.0, 5.0], [4.0, 2.0], [3.0, torch.inf], [2.0, 1.0]):
        push_amax(history, torch.tensor(amax))
    assert history.tolist() == [[2.0, 1.0], [3.0, 2.0], [4.0, 2.0]]
    assert history_amax(history, recipe).tolist() == [4.0, 2.0]
    assert history_amax(history, Fp8Recipe("delayed", history=3, algorithm="most_recent")).tolist() == [2.0, 1.0]
    push_amax(history, torch.tensor([torch.nan, 0.5]))
    assert history.tolist() == [[2.0, 0.5], [2.0, 1.0], [3.0, 2.0]]


def test_bad_input_is_named():
    x = torch.randn(4, 8)
    with pytest.raises(TypeError, match="x is float64"):
        quantise(x.double())
    with pytest.raises(TypeError, match="dtype is torch.int8"):
        quantise(x, dtype=torch.int8)
    with pytest.raises(ValueError, match="scaling is '1x64'"):
        quantise(x, scaling="1x64")
    with pytest.raises(ValueError, match="transpose is 'yes'"):
        quantise(x, transpose="yes")
    with pytest.raises(ValueError, match="blocks take their scales from x"):
        quantise(x, scaling="1x128", scale=torch.ones(1))
    with pytest.raises(ValueError, match="scale has shape"):
        quantise(x, scale=torch.ones(2))
    with pytest.raises(TypeError, match="scale is bfloat16"):
        quantise(x, scale=torch.ones(1, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="scale is on meta"):
        quantise(x, scale=torch.ones(1, device="meta"))
    with pytest.raises(ValueError, match="last dimension of x is strided"):
        quantise(x.t())
    with pytest.raises(ValueError, match="do not collapse"):
        quantise(torch.randn(4, 6, 8).transpose(0, 1))
    with pytest.raises(MissingBackend, match="unknown here; there are: "):
        quantise(x, backend="cudnn")
    for key, value in (("kind", "mx"), ("format", "e5m2"), ("algorithm", "min"), ("history", 0), ("margin", -1)):
        with pytest.raises(ValueError, match=f"{key} is "):
            Fp8Recipe(**{key: value})


@each_backend
@each_scaling
def test_registered_as_torch_wants_it(scaling, backend):
    x = draw(3, 16, dtype=torch.float32, seed=9)
    torch.library.opcheck(torch.ops.kernels.fp8_quantise.default, (x, None, E4M3, scaling, True, True, False, backend))
    torch.library.opcheck(torch.ops.kernels.fp8_amax.default, (x, backend))
    compiled = torch.compile(lambda x: quantise(x, scaling=scaling, transpose=True, backend=backend), fullgraph=True, backend="aot_eager")
    found, expected = compiled(x), quantise(x, scaling=scaling, transpose=True, backend=backend)
    assert torch.equal(bits(found.data), bits(expected.data)) and torch.equal(found.scale_inverse_t, expected.scale_inverse_t)
