"""What the checks of all ops say, where a wrong argument would otherwise end in an error from within, or in a wrong number."""
import pytest
import torch

from kernels.adamw import adamw_
from kernels.bias_gelu import bias_gelu
from kernels.checks import check_integer, rows_of
from kernels.grad_norm import clip_
from kernels.layer_norm import layer_norm, layer_norm_reference
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sum
from kernels.rms_norm import rms_norm


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (2, 3, 0), (2, 0, 8), (0,), (5,)])
def test_rows_keep_their_count(shape):
    rows = rows_of("op", "x", torch.empty(shape))
    count = 1
    for n in shape[:-1]:
        count *= n
    assert rows.shape == (count, shape[-1])


@pytest.mark.parametrize("call", [lambda x: rms_norm(x, torch.ones(1)), lambda x: layer_norm(x, torch.ones(1), torch.ones(1)),
                                  lambda x: bias_gelu(x, torch.ones(1)), bias_gelu])
def test_a_scalar_has_no_rows(call):
    with pytest.raises(ValueError, match="x is a scalar; it needs at least one dimension"):
        call(torch.tensor(1.0))


def test_the_norm_is_a_tensor():
    with pytest.raises(TypeError, match="clip_: norm is 3.0; it must be a tensor"):
        clip_([torch.ones(3)], 1.0, norm=3.0)


def test_integers_are_integers():
    for value in (0, -100, True, 2**40):
        check_integer("op", "n", value)
    for value in (2.0, "2", None, torch.tensor(2)):
        with pytest.raises(TypeError, match="op: n is .*; it must be an integer"):
            check_integer("op", "n", value)
    hidden, weight, target = torch.randn(6, 8), torch.randn(20, 8), torch.arange(6)
    for name, settings in (("vocab_size", {"vocab_size": 19.5}), ("vocab_size", {"vocab_size": 20.0}), ("ignore_index", {"ignore_index": 1.5}),
                           (r"chunk\[0\]", {"chunk": (2.5, 3)}), (r"chunk\[1\]", {"chunk": (2, 3.0)})):
        for call in (linear_cross_entropy, lambda h, w, t, **s: linear_cross_entropy_sum(h, w, t, torch.ones(6), recompute=False, **s)):
            with pytest.raises(TypeError, match=f"linear_cross_entropy: {name} is .*; it must be an integer"):
                call(hidden, weight, target, **settings)
    tensors = [[torch.ones(4)] for _ in range(4)]
    with pytest.raises(TypeError, match="adamw_: step is 1.5; it must be an integer"):
        adamw_(*tensors, step=1.5, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)


def test_a_head_without_hidden_size():
    with pytest.raises(ValueError, match=r"hidden has shape \(6, 0\); its last dimension must not be empty"):
        linear_cross_entropy(torch.zeros(6, 0), torch.zeros(20, 0), torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_second_derivatives_of_norms_are_refused(norm, registered):
    """Their backward takes statistics of x for constants: a second derivative through it would be a wrong number."""
    x, weight = torch.randn(4, 16).requires_grad_(), torch.rand(16).requires_grad_()
    if registered:
        op = getattr(torch.ops.kernels, norm)
        y = op(x, None, weight, *(() if norm == "rms_norm" else (None,)), 1e-5, False, "torch")[0]
    else:
        y = {"rms_norm": rms_norm, "layer_norm": layer_norm}[norm](x, weight, backend="torch")
    for wanted in (x, weight):
        (grad,) = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice|no autograd formula"):
            grad.square().sum().backward()
    assert x.grad is None and weight.grad is None


def test_second_derivatives_of_a_wide_fp32_layer_norm_are_right():
    """There torch's own kernels serve, which have one."""
    x, weight = torch.randn(4, 1024).requires_grad_(), torch.rand(1024).requires_grad_()
    found = []
    for function in (layer_norm, layer_norm_reference):
        (grad,) = torch.autograd.grad(function(x, weight).square().sum(), weight, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), (x, weight)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)
