"""kernels/linear_cross_entropy.py against fp64 and against torch's own losses, on CPU through Triton's interpreter and in torch."""
import pytest
import torch
import torch.nn.functional as F
from kernel_truth import DEVICE, SIZES, draw, each_backend, each_dtype, judge, same_bits

from kernels.backend import MissingBackend
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, linear_cross_entropy_sum
from kernels.linear_cross_entropy_loops import Head, empty_state, finish, plan

EVERYTHING = {"temperature": 0.7, "label_smoothing": 0.1, "z_loss": 1e-2}
SETTINGS = ({}, {"temperature": 1.3}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"vocab_size": 90}, {**EVERYTHING, "vocab_size": 90})
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(s) or "plain")
NAMES = ("loss", "logprob", "entropy", "d hidden", "d weight", "d bias")


def problem(tokens: int, words: int, dtype=torch.float32, width: int = 16, ids: int | None = None):
    """hidden, weight, bias, targets with one ignored, and an incoming gradient for each result."""
    target = torch.randint(0, ids or words, (tokens,), generator=torch.Generator().manual_seed(words)).to(DEVICE)
    if tokens > 2:
        target[1] = -100
    tensors = [draw(tokens, width, dtype=dtype, seed=1), draw(words, width, dtype=dtype, seed=2, scale=0.5), draw(words, dtype=dtype, seed=3)]
    return tensors, target, [draw(tokens, dtype=torch.float32, seed=4 + i) for i in range(3)]


def scores(target, **options):
    return lambda h, w, b=None: linear_cross_entropy(h, w, target, bias=b, **options)


def reference(target, **options):
    return lambda h, w, b=None: linear_cross_entropy_reference(h, w, target, b, **options)


def summed(target, weights, **options):
    """The loss of each token, with the gradient of the sum: one number is no fair judge of rounding, a row of them is."""
    def run(h, w, b=None):
        total, loss = linear_cross_entropy_sum(h, w, target, weights, bias=b, **options)
        return loss + (total - total.detach())
    return run


def summed_reference(target, weights, **options):
    def run(h, w, b=None):
        loss = linear_cross_entropy_reference(h, w, target, b, **options).loss
        total = (loss * weights).sum()
        return loss.detach() + (total - total.detach())
    return run


def once(tokens: int) -> torch.Tensor:
    """Incoming gradient of `summed`: the sum gets 0.5."""
    return torch.full((tokens,), 0.5 / tokens, device=DEVICE)


@each_backend
@each_dtype
@pytest.mark.parametrize("words", SIZES)
def test_error_is_at_most_twice_that_of_pytorch(words, dtype, backend):
    tensors, target, douts = problem(48, words, dtype, width=32)
    tensors.pop()  # one number a word: at two words no row to judge rounding by
    judge(scores(target, backend=backend), reference(target), tensors, douts, names=NAMES[:5])
    weights = torch.rand(48, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    for recompute in (False, True):
        judge(summed(target, weights, backend=backend, recompute=recompute), summed_reference(target, weights), tensors, [once(48)],
              names=("loss", *NAMES[3:5]))


@each_backend
@each_dtype
@each_setting
def test_every_setting(setting, dtype, backend):
    tensors, target, douts = problem(48, 129, dtype, width=32, ids=90)
    for chunk in (None, (40, 50)):
        judge(scores(target, backend=backend, chunk=chunk, **setting), reference(target, **setting), tensors, douts, names=NAMES)
    weights = torch.rand(48, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    for recompute in (False, True):
        judge(summed(target, weights, backend=backend, chunk=(40, 50), recompute=recompute, **setting),
              summed_reference(target, weights, **setting), tensors, [once(48)], names=("loss", *NAMES[3:]))


@each_backend
@pytest.mark.parametrize("tokens", (1, 2, 3, 127, 129))
def test_any_number_of_tokens(tokens, backend):
    (hidden, weight, _), target, douts = problem(tokens, 33, width=64)
    judge(scores(target, backend=backend, chunk=(64, 20)), reference(target), [hidden, weight], douts)


@each_backend
def test_alone_each_result_has_its_gradient(backend):
    tensors, target, douts = problem(48, 200, width=32)
    for i in range(3):
        judge(lambda h, w, b: scores(target, backend=backend)(h, w, b)[i], lambda h, w, b: reference(target)(h, w, b)[i], tensors, [douts[i]])


@each_backend
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_torchs_cross_entropy(smoothing, backend):
    (hidden, weight, _), target, _ = problem(12, 130)
    for ignore in (-100, 7):
        target[2:5] = ignore
        ours = linear_cross_entropy(hidden, weight, target, label_smoothing=smoothing, ignore_index=ignore, backend=backend)
        expected = F.cross_entropy(hidden @ weight.t(), target, label_smoothing=smoothing, ignore_index=ignore, reduction="none")
        torch.testing.assert_close(ours.loss, expected)
        assert all((x[target == ignore] == 0).all() for x in ours)
        target[target == ignore] = 1
    distribution = torch.distributions.Categorical(logits=hidden @ weight.t() / 0.5)
    ours = linear_cross_entropy(hidden, weight, target, temperature=0.5, backend=backend)
    torch.testing.assert_close(ours.logprob, distribution.log_prob(target))
    torch.testing.assert_close(ours.entropy, distribution.entropy())


@each_backend
def test_padded_words_do_not_exist(backend):
    """Semantics of megatron_ext/models/loss.py: what stands in the padding changes nothing and gets no gradient."""
    from megatron_ext.models.loss import vocab_parallel_cross_entropy

    class OneRank:
        size, rank = staticmethod(lambda: 1), staticmethod(lambda: 0)

    (hidden, weight, _), target, _ = problem(7, 128, ids=100)
    target[1] = 3
    weight[100:] = float("nan")
    hidden.requires_grad_(), weight.requires_grad_()
    plain = vocab_parallel_cross_entropy(hidden @ weight.t(), target, vocab_size=100, group=OneRank())
    (expected,) = torch.autograd.grad(vocab_parallel_cross_entropy(hidden @ weight[:100].t(), target, vocab_size=100, group=OneRank()).sum(), hidden)
    for recompute in (True, False):
        total, loss = linear_cross_entropy_sum(hidden, weight, target, torch.ones(7, device=DEVICE), vocab_size=100, recompute=recompute, backend=backend)
        torch.testing.assert_close(loss, plain.detach())
        dhidden, dweight = torch.autograd.grad(total, (hidden, weight))
        torch.testing.assert_close(dhidden, expected)
        assert (dweight[100:] == 0).all() and dweight[:100].isfinite().all()


@each_backend
def test_gradients_of_the_logits_add_up_to_nothing(backend):
    """A column of ones in the head turns hidden's gradient there into the sum over words: adding to all logits changes no probability."""
    (hidden, weight, _), target, douts = problem(9, 300)
    weight[:, 0] = 1
    hidden.requires_grad_()
    for i, found in enumerate(linear_cross_entropy(hidden, weight, target, temperature=0.8, label_smoothing=0.2, backend=backend)):
        (grad,) = torch.autograd.grad(found, hidden, douts[i], retain_graph=True)
        assert grad[:, 0].abs().max() < 1e-6 * max(1, grad.abs().max()), i
        assert (grad[1] == 0).all()  # ignored


@each_backend
def test_the_tile_is_a_matter_of_memory_alone(backend):
    tensors, target, douts = problem(13, 150)
    for x in tensors:
        x.requires_grad_()
    whole = linear_cross_entropy(*tensors[:2], target, bias=tensors[2], **EVERYTHING, backend=backend)
    grads = torch.autograd.grad(whole, tensors, douts)
    for chunk in ((1, 150), (13, 1 if backend == "torch" else 16), (5, 64), (100, 1000)):
        tiled = linear_cross_entropy(*tensors[:2], target, bias=tensors[2], chunk=chunk, **EVERYTHING, backend=backend)
        torch.testing.assert_close(tuple(tiled), tuple(whole))
        torch.testing.assert_close(torch.autograd.grad(tiled, tensors, douts), grads)


@each_backend
def test_extreme_logits(backend):
    hidden, weight = torch.tensor([[1e4, 1.0], [-1e4, 0.0], [0.0, 0.0]], device=DEVICE), torch.eye(2, device=DEVICE)
    target = torch.tensor([0, 1, 0], device=DEVICE)
    judge(scores(target, backend=backend, chunk=(2, 1)), reference(target), [hidden, weight], [torch.ones(3, device=DEVICE)] * 3)


@each_backend
def test_shapes_strides_and_nothing(backend):
    (hidden, weight, _), target, douts = problem(48, 40)
    grid = target.view(4, 12).t()  # as megatron-core hands over its labels
    found = linear_cross_entropy(hidden.view(12, 4, 16), weight, grid, backend=backend)
    torch.testing.assert_close(found.loss, reference(grid)(hidden.view(12, 4, 16), weight).loss)
    judge(lambda h, w: scores(target, backend=backend)(h[:, :16], w[::2]), lambda h, w: reference(target)(h[:, :16], w[::2]),
          [draw(48, 24, dtype=torch.float32, seed=1), draw(80, 16, dtype=torch.float32, seed=2)], douts)
    hidden, weight = hidden[:0].clone().requires_grad_(), weight.clone().requires_grad_()
    for recompute in (False, True):
        hidden.grad = weight.grad = None
        total, loss = linear_cross_entropy_sum(hidden, weight, target[:0], torch.ones(0, device=DEVICE), recompute=recompute, backend=backend)
        total.backward()
        assert total == 0 and loss.shape == (0,) and hidden.grad.shape == (0, 16) and (weight.grad == 0).all()


@each_backend
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_takes_the_gradient(dtype, recompute, backend):
    (hidden, weight, _), target, _ = problem(9, 60, dtype)
    weights = torch.ones(9, device=DEVICE)
    hidden.requires_grad_(), weight.requires_grad_()
    options = dict(recompute=recompute, backend=backend, chunk=(4, 32))
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


@each_backend
def test_what_needs_no_gradient_gets_none(backend):
    (hidden, weight, bias), target, _ = problem(5, 30)
    weights = torch.ones(5, device=DEVICE)
    for wanted in (0, 1, 2):
        tensors = [x.clone().requires_grad_(i == wanted) for i, x in enumerate((hidden, weight, bias))]
        all_wanted = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        reference(target)(*all_wanted).loss.sum().backward()
        for recompute in (False, True):
            total, _ = linear_cross_entropy_sum(*tensors[:2], target, weights, bias=tensors[2], recompute=recompute, backend=backend)
            (grad,) = torch.autograd.grad(total, tensors[wanted])
            torch.testing.assert_close(grad, all_wanted[wanted].grad)
    with torch.no_grad():
        total, loss = linear_cross_entropy_sum(*all_wanted[:2], target, weights, backend=backend, recompute=False)
        assert not total.requires_grad and not linear_cross_entropy(*all_wanted[:2], target, backend=backend).loss.requires_grad


def test_gradients_made_once_are_given_once():
    (hidden, weight, _), target, _ = problem(5, 30)
    total, _ = linear_cross_entropy_sum(hidden.requires_grad_(), weight, target, torch.ones(5, device=DEVICE), recompute=False)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="recompute=True"):
        total.backward()


@each_backend
def test_same_bits(backend):
    tensors, target, douts = problem(20, 200, torch.bfloat16)
    same_bits(scores(target, backend=backend, chunk=(8, 64), **EVERYTHING), tensors, douts)
    same_bits(summed(target, torch.ones(20, device=DEVICE), backend=backend, chunk=(8, 64), recompute=False), tensors, [once(20)])


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
