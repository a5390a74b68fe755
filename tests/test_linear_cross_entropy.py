"""kernels/linear_cross_entropy.py against fp64 and against torch's own losses, on CPU through Triton's interpreter and in torch."""
import pytest
import torch
import torch.nn.functional as F
from kernel_truth import DEVICE, SIZES, draw, each_backend, each_dtype, judge, same_bits

from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, linear_cross_entropy_sum

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
        judge(lambda *x, i=i: scores(target, backend=backend)(*x)[i], lambda *x, i=i: reference(target)(*x)[i], tensors, [douts[i]])


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
        total, loss = linear_cross_entropy_sum(hidden, weight, target, torch.ones(7, device=DEVICE), vocab_size=100, recompute=recompute,
                                               backend=backend)
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
        total, _ = linear_cross_entropy_sum(*all_wanted[:2], target, weights, backend=backend, recompute=False)
        assert not total.requires_grad and not linear_cross_entropy(*all_wanted[:2], target, backend=backend).loss.requires_grad


@each_backend
def test_same_bits(backend):
    tensors, target, douts = problem(20, 200, torch.bfloat16)
    same_bits(scores(target, backend=backend, chunk=(8, 64), **EVERYTHING), tensors, douts)
    same_bits(summed(target, torch.ones(20, device=DEVICE), backend=backend, chunk=(8, 64), recompute=False), tensors, [once(20)])
