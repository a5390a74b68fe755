"""kernels/fp8_linear.py: products against fp64 of the operands as FP8 has them (by the emulation), recording, accumulation."""
import pytest
import torch
from kernel_truth import DEVICE, draw, each_dtype, same_bits

from kernels import fp8_linear as module
from kernels.backend import MissingBackend, choose
from kernels.fp8 import quantise
from kernels.fp8_linear import fp8_linear, fp8_linear_reference, product
from kernels.fp8_reference import dequantise_reference, quantise_reference
from kernels.fp8_scaling import E4M3, Fp8Recipe, scale_of

RECIPES = {
    "current": Fp8Recipe(), "e4m3": Fp8Recipe(format="e4m3"), "powers": Fp8Recipe(power_of_2=True), "blockwise": Fp8Recipe("blockwise"),
    "delayed": Fp8Recipe("delayed"),
}
SCALES = torch.tensor([90.0, 300.0, 9000.0], device=DEVICE)
each_recipe = pytest.mark.parametrize("recipe", RECIPES)
each_product = pytest.mark.parametrize("backend", [
    pytest.param("scaled_mm", marks=pytest.mark.skipif(choose("fp8_linear", device=DEVICE).backend != "scaled_mm", reason="not here")),
    "emulation"])


def seen(x: torch.Tensor, dtype: torch.dtype, scaling: str, scale: torch.Tensor | None, power_of_2: bool) -> torch.Tensor:
    """fp64: x as FP8 has it, by the emulation."""
    scale = None if scale is None else scale.cpu()
    data, inverse, _ = quantise_reference(x.cpu(), dtype=dtype, scaling=scaling, scale=scale, power_of_2=power_of_2)
    return dequantise_reference(data, inverse, dtype=dtype, scaling=scaling)


def close(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    """found = a b^T up to fp32 sums of any order and the rounding of the result."""
    exact, size = a @ b.t(), a.abs() @ b.abs().t()
    # fp32: the sum (contracted size + 2 scales) times half a unit in the last place; then the rounding of the result itself.
    allowed = size * (a.shape[1] + 4) * 2.0**-24 + exact.abs() * torch.finfo(found.dtype).eps / 2 + torch.finfo(found.dtype).tiny
    error = (found.cpu().double() - exact).abs()
    assert bool((error <= allowed).all()), f"{what}: {float((error / allowed).max()):.2f} of what is allowed"


def check(m: int, k: int, n: int, recipe: Fp8Recipe, dtype: torch.dtype, backend: str, out_dtype: torch.dtype | None = None) -> None:
    x = draw(m, k, dtype=dtype, seed=m).requires_grad_()
    w = (draw(n, k, dtype=dtype, seed=n) * 0.1).requires_grad_()
    scales = SCALES if recipe.kind == "delayed" else None
    y = fp8_linear(x, w, recipe=recipe, scales=scales, out_dtype=out_dtype, backend=backend)
    dy = (draw(m, n, dtype=y.dtype, seed=m + n) * 0.01)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (out_dtype or dtype, dtype, dtype)
    s = [None] * 3 if scales is None else list(scales)
    rows, square = ("1x128", "128x128") if recipe.blocks else ("tensor", "tensor")
    p, x, w = recipe.power_of_2, x.detach(), w.detach()
    close(y, seen(x, E4M3, rows, s[0], p), seen(w, E4M3, square, s[1], p), "y")
    close(dx, seen(dy, recipe.backward, rows, s[2], p), seen(w.t(), E4M3, square, s[1], p), "dx")
    close(dw, seen(dy.t(), recipe.backward, rows, s[2], p), seen(x.t(), E4M3, rows, s[0], p), "dw")


@each_recipe
@each_dtype
@each_product
def test_products_are_those_of_the_operands_that_fp8_has(recipe, dtype, backend):
    backend = "auto" if recipe == "blockwise" and backend == "scaled_mm" else backend
    check(48, 160, 32, RECIPES[recipe], dtype, backend)


@each_recipe
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 127), (127, 2, 3), (3, 129, 128), (128, 127, 129), (129, 1021, 2), (5, 16, 1021)])
def test_sizes_that_fit_nothing(recipe, size):
    check(*size, RECIPES[recipe], torch.float32, "auto")


def test_fp32_out_of_bf16():
    check(16, 64, 48, Fp8Recipe(), torch.bfloat16, "auto", torch.float32)


@pytest.mark.parametrize("kind", ["current", "blockwise"])
def test_distance_from_the_linear_layer_is_that_of_the_format(kind):
    """Two independent roundings, of root mean square 0.0265 (e4m3) or 0.053 (e5m2) each: 0.0375 forward, 0.059 backward."""
    x, w, dy = (draw(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate([(256, 512), (384, 512), (256, 384)]))

    def results(function):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = function(*leaves)
        return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    ours, theirs = results(lambda *a: fp8_linear(*a, recipe=Fp8Recipe(kind))), results(fp8_linear_reference)
    far = [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs)]
    assert far == [pytest.approx(0.0375, rel=0.06), pytest.approx(0.059, rel=0.06), pytest.approx(0.059, rel=0.06)]


@pytest.mark.parametrize("kind", ["current", "blockwise"])
def test_twice_the_input_is_twice_the_output(kind):
    """Scales follow by powers of two exactly, so the bits do not change."""
    x, w = draw(32, 256, dtype=torch.float32, seed=1), draw(64, 256, dtype=torch.float32, seed=2)
    assert torch.equal(fp8_linear(4 * x, w / 2, recipe=Fp8Recipe(kind)), 2 * fp8_linear(x, w, recipe=Fp8Recipe(kind)))


@each_recipe
def test_same_bits_no_grad_and_frozen_weights(recipe):
    recipe = RECIPES[recipe]
    scales = SCALES if recipe.kind == "delayed" else None
    x, w, dy = (draw(*shape, dtype=torch.bfloat16, seed=i) for i, shape in enumerate([(48, 160), (32, 160), (48, 32)]))
    same_bits(lambda x, w: fp8_linear(x, w, recipe=recipe, scales=scales), [x, w], [dy])
    with torch.no_grad():
        plain = fp8_linear(x, w.clone().requires_grad_(), recipe=recipe, scales=scales)
    assert not plain.requires_grad
    x.requires_grad_()
    y = fp8_linear(x, w, recipe=recipe, scales=scales)
    assert torch.equal(y, plain)
    (dx,) = torch.autograd.grad(y, x, dy)
    w.requires_grad_()
    assert torch.equal(dx, torch.autograd.grad(fp8_linear(x, w, recipe=recipe, scales=scales), x, dy)[0])
    dw = torch.autograd.grad(fp8_linear(x.detach(), w, recipe=recipe, scales=scales), w, dy)[0]
    assert torch.equal(dw, torch.autograd.grad(fp8_linear(x, w, recipe=recipe, scales=scales), w, dy)[0])


@each_recipe
def test_three_dimensions_and_expanded_gradients(recipe):
    x, w = draw(3, 4, 32, dtype=torch.float32, seed=3).requires_grad_(), draw(16, 32, dtype=torch.float32, seed=4).requires_grad_()
    y = fp8_linear(x, w, recipe=RECIPES[recipe])
    assert y.shape == (3, 4, 16)
    y.sum().backward()  # one expanded number
    ones = torch.autograd.grad(fp8_linear(x, w, recipe=RECIPES[recipe]), (x, w), torch.ones(3, 4, 16, device=DEVICE))
    assert torch.equal(x.grad, ones[0]) and torch.equal(w.grad, ones[1])


@each_recipe
@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
def test_no_rows(recipe, shape):
    x, w = torch.empty(shape, device=DEVICE, requires_grad=True), draw(16, 32, dtype=torch.float32, seed=5).requires_grad_()
    fp8_linear(x, w, recipe=RECIPES[recipe]).sum().backward()
    assert x.grad.shape == shape and not w.grad.any()


def test_amaxes_are_recorded_once_however_often_the_forward_runs():
    record = torch.zeros(3, device=DEVICE)
    x, w, dy = draw(8, 32, dtype=torch.float32, seed=6), draw(16, 32, dtype=torch.float32, seed=7), draw(8, 16, dtype=torch.float32, seed=8)
    x.requires_grad_(), w.requires_grad_()
    recipe = RECIPES["delayed"]

    def layer(x):
        return fp8_linear(x, w, recipe=recipe, scales=SCALES, record=record)

    expected = torch.autograd.grad(layer(x), (x, w), dy)
    truth = torch.stack([t.detach().abs().max() for t in (x, w, dy)])
    assert torch.equal(record, truth)
    record.zero_()
    found = torch.autograd.grad(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False), (x, w), dy)
    assert torch.equal(record, truth) and all(torch.equal(a, b) for a, b in zip(found, expected))
    torch.autograd.grad(layer(x / 2), w, dy / 2)
    assert torch.equal(record, truth)
    torch.autograd.grad(layer(x * 2), w, dy * 3)
    assert torch.equal(record, truth * torch.tensor([2.0, 1.0, 3.0], device=DEVICE))
    current = fp8_linear(x, w, scales=scale_of(truth, E4M3))
    assert torch.equal(current, fp8_linear(x, w)), "the scales of this tensor are current scaling"


@each_recipe
def test_gradients_are_added_to_the_main_gradient(recipe, monkeypatch):
    recipe = RECIPES[recipe]
    scales = SCALES if recipe.kind == "delayed" else None
    x, w, dy = (draw(*shape, dtype=torch.bfloat16, seed=i) for i, shape in enumerate([(48, 160), (290, 160), (48, 290)]))
    w.requires_grad_()
    start = draw(290, 160, dtype=torch.float32, seed=9)
    with_fp32 = w.detach().float().requires_grad_()
    (dw,) = torch.autograd.grad(fp8_linear(x.float(), with_fp32, recipe=recipe, scales=scales), with_fp32, dy.float())
    for held in (module.HELD, 1):  # at once, and 128 rows at a time
        monkeypatch.setattr(module, "HELD", held)
        main_grad = start.clone()
        for _ in range(2):
            fp8_linear(x, w, recipe=recipe, scales=scales, main_grad=main_grad).backward(dy)
        assert w.grad is None
        torch.testing.assert_close(main_grad, start + dw + dw, rtol=1e-6, atol=1e-5)
    w.grad_added_to_main_grad = False
    fp8_linear(x, w, recipe=recipe, scales=scales, main_grad=main_grad).backward(dy)
    assert w.grad_added_to_main_grad is True and w.grad.shape == w.shape
    w.grad, w.zero_out_wgrad = None, True
    fp8_linear(x, w, recipe=recipe, scales=scales, main_grad=main_grad).backward(dy)
    assert not w.grad.any()


@each_recipe
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_overflow_shows(recipe, bad):
    record = torch.zeros(3, device=DEVICE)
    x, w = draw(4, 32, dtype=torch.float32, seed=10), draw(16, 32, dtype=torch.float32, seed=11).requires_grad_()
    x[1, 2] = bad
    kind = RECIPES[recipe]
    y = fp8_linear(x, w, recipe=kind, scales=SCALES if kind.kind == "delayed" else None, record=record)
    assert bool(y[1].isnan().all()) and bool(y[0].isfinite().all())
    assert kind.blocks or not bool(record[0].isfinite())
    (dw,) = torch.autograd.grad(y, w, torch.ones_like(y))
    assert bool(dw[:, 2].isnan().all())


@each_recipe
def test_backward_keeps_a_byte_an_element_of_x_and_nothing_of_the_weight(recipe):
    recipe = RECIPES[recipe]
    x, w = draw(128, 256, dtype=torch.bfloat16, seed=17), draw(512, 256, dtype=torch.bfloat16, seed=18).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8_linear(x, w, recipe=recipe, scales=SCALES if recipe.kind == "delayed" else None)
    bytes_ = sum(t.untyped_storage().nbytes() for t in kept if t.data_ptr() != w.data_ptr())
    assert x.numel() <= bytes_ <= x.numel() * (1 + 4 / 128) + 100


@pytest.mark.parametrize("backend", ["auto", "emulation"])
def test_autocast_changes_nothing(backend):
    x, w = torch.randn(64, 32, device=DEVICE), torch.randn(16, 32, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = fp8_linear(x, w, backend=backend)
    assert torch.equal(found, fp8_linear(x, w, backend=backend))


class ThreeRanks:
    """Of a process group: what the checks ask."""

    group_name = "three"

    def size(self) -> int:
        return 3


def test_bad_input_is_named():
    x, w = torch.randn(4, 32), torch.randn(16, 32)
    for error, match, call in (
        (TypeError, "x is float64", lambda: fp8_linear(x.double(), w)),
        (TypeError, "weight is bfloat16", lambda: fp8_linear(x, w.bfloat16())),
        (TypeError, "recipe is a str", lambda: fp8_linear(x, w, recipe="current")),
        (ValueError, "weight has shape", lambda: fp8_linear(x, w[:, :16])),
        (ValueError, "weight is strided", lambda: fp8_linear(x, torch.randn(32, 16).t())),
        (ValueError, "weight is on meta", lambda: fp8_linear(x, w.to("meta"))),
        (ValueError, "scales has shape", lambda: fp8_linear(x, w, scales=torch.ones(2))),
        (ValueError, "the recipe is blockwise", lambda: fp8_linear(x, w, recipe=Fp8Recipe("blockwise"), scales=torch.ones(3))),
        (TypeError, "record is bfloat16", lambda: fp8_linear(x, w, record=torch.zeros(3, dtype=torch.bfloat16))),
        (TypeError, "main_grad is bfloat16", lambda: fp8_linear(x, w, main_grad=torch.zeros(16, 32, dtype=torch.bfloat16))),
        (ValueError, "main_grad has shape", lambda: fp8_linear(x, w, main_grad=torch.zeros(32, 16))),
        (ValueError, "x has 4 rows, the group 3 ranks", lambda: fp8_linear(x, w, group=ThreeRanks(), split=True)),
        (TypeError, "out_dtype is torch.int8", lambda: fp8_linear(x, w, out_dtype=torch.int8)),
        (ValueError, "last dimension of x is strided", lambda: fp8_linear(torch.randn(32, 4).t(), w)),
        (MissingBackend, "unknown here; there are: ", lambda: fp8_linear(x, w, backend="cudnn")),
    ):
        with pytest.raises(error, match=match):
            call()
    if DEVICE == "cpu":
        with pytest.raises(MissingBackend, match="not blocks"):
            fp8_linear(x, w, recipe=Fp8Recipe("blockwise"), backend="scaled_mm")
        assert choose("fp8_linear_blockwise", device="cpu").backend == "emulation"


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests run it there")
def test_operands_of_blocks_have_the_layout_that_cublas_asks_for(monkeypatch):
    """Shapes and strides that ATen's ScaledBlas.cpp tests for; the product itself needs an H100."""
    a = quantise(draw(130, 300, dtype=torch.float32, seed=12), scaling="1x128")
    b = quantise(draw(200, 300, dtype=torch.float32, seed=13), scaling="128x128")
    c = quantise(draw(200, 300, dtype=torch.float32, seed=13), scaling="1x128")
    calls = []

    def fake(x, y, *, scale_a, scale_b, out_dtype, use_fast_accum):
        calls.append((x, y.t(), scale_a, scale_b.t()))
        return torch.zeros(x.shape[0], y.shape[1], dtype=out_dtype)

    monkeypatch.setattr(module, "serving", lambda *_: "scaled_mm")
    monkeypatch.setattr(torch, "_scaled_mm", fake)
    for other in (b, c):
        assert product(a.data, a.scale_inverse, other.data, other.scale_inverse, out_dtype=torch.float32).shape == (130, 200)
    for x, y, scale_x, scale_y in calls:
        assert x.shape == (256, 384) and y.shape == (256, 384) and x.is_contiguous() and y.is_contiguous()
        assert scale_x.shape == (256, 3) and scale_x.stride() == (1, 256)
        assert (scale_y.shape, scale_y.stride()) in (((2, 3), (4, 1)), ((256, 3), (1, 256)))
        assert torch.equal(scale_x[:130], a.scale_inverse)


@each_recipe
def test_registered_as_torch_wants_it(recipe):
    recipe = RECIPES[recipe]
    x, w = draw(5, 32, dtype=torch.float32, seed=14).requires_grad_(), draw(16, 32, dtype=torch.float32, seed=15).requires_grad_()
    scales = SCALES if recipe.kind == "delayed" else None
    ops = torch.ops.kernels
    given = recipe.backward, recipe.blocks, recipe.power_of_2, ""
    torch.library.opcheck(ops.fp8_linear.default, (x, w, scales, None, None, *given, True, 1, 0, torch.float32, "auto"))
    x, w, dy = x.detach(), w.detach(), draw(5, 16, dtype=torch.float32, seed=16)
    _, x_t, x_scales, weight_figures = ops.fp8_linear(x, w, scales, None, None, *given, True, 1, 0, torch.float32, "auto")
    call = dy, w, weight_figures[1:2].clone(), None, *given, True, True, torch.float32, "auto"
    torch.library.opcheck(ops.fp8_linear_dx.default, call)
    _, dy_t, dy_scales = ops.fp8_linear_dx(*call)
    x_inverse, dy_inverse = (x_scales, dy_scales) if recipe.blocks else (x_scales[2:].clone(), dy_scales[2:].clone())
    torch.library.opcheck(ops.fp8_linear_dw.default, (dy_t, dy_inverse, x_t, x_inverse, recipe.backward, torch.float32, "auto"))
    main_grad = torch.zeros(16, 32, device=DEVICE)
    torch.library.opcheck(ops.fp8_linear_dw_add.default, (main_grad, dy_t, dy_inverse, x_t, x_inverse, recipe.backward, "auto"))
    torch.library.opcheck(ops.fp8_record.default, (torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)))

    def both(function):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = function(*leaves)
        return (y, *torch.autograd.grad(y, leaves, dy))

    def layer(x, w):
        return fp8_linear(x, w, recipe=recipe, scales=scales)

    for a, b in zip(both(torch.compile(layer, fullgraph=True, backend="aot_eager")), both(layer)):
        assert torch.equal(a, b)
