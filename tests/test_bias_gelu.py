"""kernels/bias_gelu.py against fp64, on CPU through Triton's interpreter and in torch; on a GPU where there is one."""
import pytest
import torch
from kernel_truth import DEVICE, SIZES, draw, each_backend, each_dtype, judge, same_bits

from kernels import jit, tiles
from kernels.backend import MissingBackend
from kernels.bias_gelu import bias_gelu, bias_gelu_reference

each_kind = pytest.mark.parametrize("approximate", ("none", "tanh"))
NAMES = ("y", "dx", "dbias")


def inputs(*shape: int, dtype: torch.dtype, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """([x, bias], [dy])."""
    return [draw(*shape, dtype=dtype, seed=seed), draw(shape[-1], dtype=dtype, seed=seed + 1)], [draw(*shape, dtype=dtype, seed=seed + 2)]


@each_backend
@each_dtype
@each_kind
@pytest.mark.parametrize("width", SIZES)
def test_error_is_at_most_twice_that_of_pytorch(width, approximate, dtype, backend):
    rows = 5 if width > 3 else 67  # of a handful of numbers PyTorch's error is luck, not a measure
    tensors, dys = inputs(rows, width, dtype=dtype, seed=width)

    def reference(x, bias):
        return bias_gelu_reference(x, bias, approximate)

    judge(lambda x, b: bias_gelu(x, b, approximate=approximate, backend=backend), reference, tensors, dys, names=NAMES)
    judge(lambda x: bias_gelu(x, approximate=approximate, backend=backend), lambda x: bias_gelu_reference(x, None, approximate), tensors[:1], dys,
          names=NAMES[:2])
    if backend == "torch":  # outside torch.compile the public function takes PyTorch's own path on CPU
        kind = "gelu_tanh" if approximate == "tanh" else "gelu"
        judge(lambda x, b: torch.ops.kernels.bias_gelu(x, b, kind, backend), reference, tensors, dys, names=NAMES)


@each_backend
@each_dtype
@pytest.mark.parametrize("rows", (1, 2, 3, 31, 32, 33, 127, 128, 129, 257))
def test_the_gradient_of_the_bias_sums_all_rows(rows, dtype, backend):
    tensors, dys = inputs(rows, 8, dtype=dtype, seed=rows)
    judge(lambda x, b: bias_gelu(x, b, backend=backend), bias_gelu_reference, tensors, dys, names=NAMES)


@each_backend
def test_both_group_sizes_of_the_column_sums(backend, monkeypatch):
    tensors, dys = inputs(300, 300, dtype=torch.bfloat16)
    small, large = tiles.column_sums(300, 300), tiles.column_sums(8192, 8192)
    assert small != large
    for choice in (small, large):
        monkeypatch.setattr(tiles, "column_sums", lambda rows, width, choice=choice: dict(choice))
        judge(lambda x, b: bias_gelu(x, b, backend=backend), bias_gelu_reference, tensors, dys, names=NAMES)


@each_backend
def test_a_bias_gradient_of_many_rows_is_not_summed_in_bf16(backend):
    x = torch.full((600, 4), 8.0, dtype=torch.bfloat16, device=DEVICE)
    bias = torch.zeros(4, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    bias_gelu(x, bias, backend=backend).backward(torch.ones_like(x))
    assert torch.equal(bias.grad, torch.full_like(bias, 600.0))  # in bf16 the sum would stay at 256


@each_backend
@each_kind
@each_dtype
def test_extreme_values_stay_right(dtype, approximate, backend):
    x = torch.tensor([[-6e4, 6e4, -88.0, 88.0, -12.0, 12.0, -4.0, 4.0, -0.0, 0.0, 6e-5, -6e-5]], device=DEVICE, dtype=dtype)
    judge(lambda x: bias_gelu(x, approximate=approximate, backend=backend), lambda x: bias_gelu_reference(x, None, approximate), [x],
          [torch.ones(1, 12, device=DEVICE)])


@each_backend
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 8)])
def test_nothing_in_nothing_out(shape, backend):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    bias = torch.ones(shape[-1], device=DEVICE, requires_grad=True)
    bias_gelu(x, bias, backend=backend).sum().backward()
    assert x.grad.shape == shape and torch.equal(bias.grad, torch.zeros_like(bias))


@each_backend
def test_rows_may_be_strided_and_dy_may_be_anything(backend):
    (x, bias), _ = inputs(6, 2, 16, dtype=torch.float32)
    dy = draw(16, 6, dtype=torch.float32, seed=2).t()
    judge(lambda x, b: bias_gelu(x[:, 0], b, backend=backend), lambda x, b: bias_gelu_reference(x[:, 0], b), [x, bias], [dy])
    wide = draw(6, 21, dtype=torch.float32, seed=3)  # a slice that starts off any 16-byte boundary
    judge(lambda x, b: bias_gelu(x[:, 3:19], b, backend=backend), lambda x, b: bias_gelu_reference(x[:, 3:19], b), [wide, bias], [dy])
    x, bias = x.requires_grad_(), bias.requires_grad_()
    found = torch.autograd.grad(bias_gelu(x, bias, backend=backend).sum(), (x, bias))  # dy is one expanded number
    expected = torch.autograd.grad(bias_gelu_reference(x, bias).sum(), (x, bias))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)


@each_backend
def test_leading_dimensions_and_a_bias_alone(backend):
    tensors, dys = inputs(2, 3, 5, 8, dtype=torch.float32)
    judge(lambda x, b: bias_gelu(x, b, backend=backend), bias_gelu_reference, tensors, dys)
    judge(lambda b: bias_gelu(tensors[0], b, backend=backend), lambda b: bias_gelu_reference(tensors[0].to(b.dtype), b), tensors[1:], dys)
    x = tensors[0][0, 0, 0]
    judge(lambda x, b: bias_gelu(x, b, backend=backend), bias_gelu_reference, [x, tensors[1]], [dys[0][0, 0, 0]])


@each_backend
def test_results_may_be_changed_in_place(backend):
    (x, bias), _ = inputs(4, 16, dtype=torch.float32)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    bias_gelu(x, bias, backend=backend).mul_(3).sum().backward()
    dx, dbias = torch.autograd.grad(3 * bias_gelu_reference(x, bias).sum(), (x, bias))
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(bias.grad, dbias)


def test_bad_input_is_named():
    x, bias = torch.randn(4, 8), torch.randn(8)
    for match, error, call in (
        ("last dimension of x is strided", ValueError, lambda: bias_gelu(torch.randn(8, 4).t(), bias)),
        ("do not collapse", ValueError, lambda: bias_gelu(torch.randn(4, 6, 8).transpose(0, 1), bias)),
        ("x is int64", TypeError, lambda: bias_gelu(x.long(), bias)),
        ("bias is bfloat16", TypeError, lambda: bias_gelu(x, bias.bfloat16())),
        ("bias has shape", ValueError, lambda: bias_gelu(x, bias[:7])),
        ("bias has shape", ValueError, lambda: bias_gelu(x, bias.view(1, 8))),
        ("bias is on meta", ValueError, lambda: bias_gelu(x, bias.to("meta"))),
        ("bias is strided", ValueError, lambda: bias_gelu(x, torch.randn(16)[::2])),
        ("scalar", ValueError, lambda: bias_gelu(torch.tensor(1.0))),
        ("approximate is 'quick'", ValueError, lambda: bias_gelu(x, bias, approximate="quick")),
        ("unknown here; there are: ", MissingBackend, lambda: bias_gelu(x, bias, backend="cudnn")),
    ):
        with pytest.raises(error, match=match):
            call()


@each_backend
@each_kind
def test_same_bits_and_no_grad(approximate, backend):
    tensors, dys = inputs(70, 129, dtype=torch.bfloat16)
    same_bits(lambda x, b: bias_gelu(x, b, approximate=approximate, backend=backend), tensors, dys)
    with torch.no_grad():
        assert not bias_gelu(tensors[0].requires_grad_(), tensors[1], backend=backend).requires_grad


@each_backend
def test_shifting_x_is_shifting_the_bias(backend):
    x, bias = torch.arange(-4.0, 4.0, device=DEVICE).view(1, 8), torch.full((8,), 0.5, device=DEVICE)
    assert torch.equal(bias_gelu(x, bias, backend=backend), bias_gelu(x + 1, bias - 1, backend=backend))
    y = bias_gelu(x, backend=backend)
    torch.testing.assert_close(y - bias_gelu(-x, backend=backend), x)  # gelu(x) - gelu(-x) = x


@pytest.mark.skipif(jit.MISSING is not None, reason=str(jit.MISSING))
def test_groups_of_rows_fit_the_grid(monkeypatch):
    """They lie on its second axis, which ends at 65,535 programs: 8.4 million rows in groups of 128, 2.1 million narrow ones in groups of 32."""
    for rows in (1, 2**11, 2**13, 65_535 * 32, 65_535 * 32 + 1, 65_535 * 128, 65_535 * 128 + 1, 2**31 - 1):
        for width in (1, 4, 4096):
            choice = tiles.column_sums(rows, width)
            assert -(-rows // choice["GROUP"]) <= 65_535 and choice["GROUP"] % choice["ROWS"] == 0
    assert [tiles.column_sums(rows, 4096)["GROUP"] for rows in (2048, 8192, 65_535 * 128, 65_535 * 128 + 1)] == [32, 128, 128, 256]
    monkeypatch.setattr(tiles, "column_sums", lambda rows, width: {"GROUP": 256, "ROWS": 8, "BLOCK": 256, "num_warps": 4})
    tensors, dys = inputs(260, 37, dtype=torch.float32)  # two such groups
    judge(lambda x, b: bias_gelu(x, b, backend="triton"), bias_gelu_reference, tensors, dys)


@each_backend
@each_kind
def test_registered_as_torch_wants_it(approximate, backend):
    (x, bias), (dy,) = inputs(3, 16, dtype=torch.float32)
    kind = "gelu_tanh" if approximate == "tanh" else "gelu"
    torch.library.opcheck(torch.ops.kernels.bias_gelu_backward.default, (dy, x, bias, kind, backend))
    torch.library.opcheck(torch.ops.kernels.bias_gelu_backward.default, (dy, x, None, kind, backend))
    x, bias = x.requires_grad_(), bias.requires_grad_()
    torch.library.opcheck(torch.ops.kernels.bias_gelu.default, (x, bias, kind, backend))
    torch.library.opcheck(torch.ops.kernels.bias_gelu.default, (x, None, kind, backend))
    compiled = torch.compile(lambda x, b: bias_gelu(x, b, approximate=approximate, backend=backend), fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, bias), bias_gelu(x, bias, approximate=approximate, backend=backend)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.pow(2).sum(), (x, bias)), torch.autograd.grad(expected.pow(2).sum(), (x, bias)))
