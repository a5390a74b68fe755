"""kernels/linear_cross_entropy.py as a registered op: main gradients, opcheck, torch.compile, and what it refuses."""
import pytest
import torch
from kernel_truth import DEVICE, each_backend
from test_linear_cross_entropy import problem, reference

from kernels.backend import MissingBackend
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sum
from kernels.linear_cross_entropy_loops import Head, empty_state, finish, plan


@each_backend
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_takes_the_gradient(dtype, recompute, backend):
    (hidden, weight, _), target, _ = problem(9, 60, dtype)
    weights = torch.ones(9, device=DEVICE)
    hidden.requires_grad_(), weight.requires_grad_()
    options = {"recompute": recompute, "backend": backend, "chunk": (4, 32)}
    exact = reference(target)(hidden.detach().double(), wide := weight.detach().double().requires_grad_()).loss.sum()
    (expected,) = torch.autograd.grad(3 * exact, wide)
    main_grad = torch.ones(60, 16, device=DEVICE)
    for hooks in (False, True):
        if hooks:
            weight.grad_added_to_main_grad = False
        before = main_grad.clone()
        total, _ = linear_cross_entropy_sum(hidden, weight, target, weights, main_grad=main_grad, **options)
        (3 * total).backward()
        torch.testing.assert_close((main_grad - before).double(), expected, rtol=0, atol=(1e-5 if dtype == torch.float32 else 5e-2))
        assert hidden.grad is not None and (weight.grad is not None) == hooks
    assert weight.grad_added_to_main_grad is True and weight.grad.shape == weight.shape and weight.grad.dtype == dtype


def test_gradients_made_once_are_given_once():
    (hidden, weight, _), target, _ = problem(5, 30)
    total, _ = linear_cross_entropy_sum(hidden.requires_grad_(), weight, target, torch.ones(5, device=DEVICE), recompute=False)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="recompute=True"):
        total.backward()


@each_backend
def test_registered_as_torch_wants_it(backend):
    (hidden, weight, bias), target, _ = problem(5, 20)
    ops = torch.ops.kernels
    settings = [18, "", 0.9, 0.1, 1e-3, -100, 4, 16, True, backend]
    wanted = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    torch.library.opcheck(ops.linear_cross_entropy.default, (*wanted, target % 18, None, *settings))
    per_token = [torch.rand(5, device=DEVICE) for _ in range(4)]
    for main_grad in (None, torch.zeros(20, 16, device=DEVICE)):
        torch.library.opcheck(ops.linear_cross_entropy_backward.default, (
            hidden, weight, bias, target % 18, main_grad, *per_token[:3], per_token[3], None, per_token[0], [True] * 3, *settings))
    # its gradients leave once, and opcheck's autograd test asks twice
    torch.library.opcheck(ops.linear_cross_entropy_sum.default, (hidden, weight, bias, target % 18, None, per_token[0], [True] * 3, *settings))


@each_backend
def test_compiled_is_eager(backend):
    tensors, target, douts = problem(9, 50)
    weights = torch.ones(9, device=DEVICE)
    for x in tensors:
        x.requires_grad_()

    def both(h, w, b, recompute):
        total, loss = linear_cross_entropy_sum(h, w, target, weights, bias=b, label_smoothing=0.1, recompute=recompute, backend=backend)
        return 2 * total, loss, *linear_cross_entropy(h, w, target, bias=b, temperature=0.8, backend=backend)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for recompute in (False, True):
        expected, found = both(*tensors, recompute), compiled(*tensors, recompute)
        torch.testing.assert_close(found, expected)
        outputs = [0, 2, 3, 4]
        grads = [torch.autograd.grad([x[i] for i in outputs], tensors, [torch.ones_like(x[0]), *douts]) for x in (expected, found)]
        torch.testing.assert_close(grads[1], grads[0])


def test_bad_input_is_named():
    hidden, weight, target = torch.randn(4, 8), torch.randn(10, 8), torch.arange(4)

    def refused(error, match, h=hidden, w=weight, t=target, **options):
        with pytest.raises(error, match=match):
            linear_cross_entropy(h, w, t, **options)
        with pytest.raises(error, match=match):
            linear_cross_entropy_sum(h, w, t, torch.ones(t.shape), recompute=False, **options)

    refused(TypeError, "hidden is int64", h=torch.ones(4, 8, dtype=torch.int64))
    refused(TypeError, "weight is bfloat16; it must be float32", w=weight.bfloat16())
    refused(TypeError, "target is int32", t=target.int())
    refused(TypeError, "bias is bfloat16", bias=torch.ones(10).bfloat16())
    refused(TypeError, "main_grad is bfloat16; it must be float32", main_grad=torch.ones(10, 8).bfloat16())
    refused(TypeError, "group is a str", group="tp")
    refused(ValueError, "weight has shape", w=weight[:, :4].contiguous())
    refused(ValueError, "last dimension of weight is strided", w=torch.randn(8, 10).t())
    refused(ValueError, "last dimension of hidden is strided", h=torch.randn(8, 4).t())
    refused(ValueError, "weight has shape", w=weight[None])
    refused(ValueError, "target has shape", t=target[:3])
    refused(ValueError, "bias has shape", bias=torch.ones(9))
    refused(ValueError, "main_grad has shape", main_grad=torch.ones(9, 8))
    refused(ValueError, "weight is on meta", w=weight.to("meta"))
    refused(ValueError, "target is on meta", t=target.to("meta"))
    refused(ValueError, "vocab_size is 11, but group has 1 ranks with 10 rows", vocab_size=11)
    refused(ValueError, "temperature is 0", temperature=0)
    refused(ValueError, "label_smoothing is 1.5", label_smoothing=1.5)
    refused(ValueError, "z_loss is -1", z_loss=-1)
    refused(ValueError, "chunk is", chunk=(0, 8))
    for wrong in (10, 9, -1):
        refused(ValueError, rf"target has {wrong}; it must be in 0 .. 8, or -100", t=torch.tensor([0, 1, wrong, 2]), vocab_size=9)
    with pytest.raises(MissingBackend, match="unknown here; there are: "):
        linear_cross_entropy(hidden, weight, target, backend="liger")
    with pytest.raises(TypeError, match="token_weights is int64"):
        linear_cross_entropy_sum(hidden, weight, target, torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="token_weights requires a gradient"):
        linear_cross_entropy_sum(hidden, weight, target, torch.ones(4, requires_grad=True))


def test_where_nobody_looks_a_wrong_target_is_nan():
    """On a GPU the targets are not read back: what is no word becomes NaN, in the results and in the gradients."""
    head = Head(9, "", 1.0, 0.1, 1e-3, -100, 0, 0, False)
    state, target = empty_state(4, torch.device("cpu")), torch.tensor([1, 9, -1, -100])
    state[0], state[1] = 0.0, 2.0
    loss, logprob, entropy, top, log_sum = finish(state, target, head)
    assert loss.isnan().tolist() == logprob.isnan().tolist() == [False, True, True, False] and loss[3] == 0
    factors = plan(target, top, log_sum, entropy, torch.ones(4), None, None, head)[2:]
    assert factors.isnan().any(0).tolist() == [False, True, True, False] and (factors[:, 3] == 0).all()


def test_a_second_derivative_is_refused():
    """The gradients that the forward pass made are constants: what is differentiated through them would be wrong."""
    (hidden, weight, _), target, _ = problem(9, 60, torch.float32)
    hidden.requires_grad_()
    factor = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    total, _ = linear_cross_entropy_sum(hidden, weight, target, torch.ones(9, device=DEVICE), recompute=False)
    (gradient,) = torch.autograd.grad(total * factor, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
