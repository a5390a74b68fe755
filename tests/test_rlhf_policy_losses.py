"""rlhf/policy_losses.py: by hand (../shared/ANCHORS.md, section 5), by the papers' equations, and however the batch is split."""
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from megatron_ext.config.schema import PpoConfig
from rlhf.policy_losses import POLICY_LOSSES, POLICY_SUMS, explained_variance, register, token_weights, value_loss, variance_sums

SETTINGS = PpoConfig(clip=0.2)
NAMES = ("cispo", "clip", "gspo", "reinforce")
LENGTHS = (3, 1, 7, 2, 4, 1)
each_loss = pytest.mark.parametrize("name", NAMES)


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def drawn(lengths=LENGTHS, *, spread: float = 0.3, dtype=torch.float64, one_advantage: bool = False) -> tuple[torch.Tensor, ...]:
    """(logprob, old_logprob, advantage), far enough apart that every branch of the clip is taken."""
    generator = torch.Generator().manual_seed(7)
    old = -torch.rand(sum(lengths), dtype=torch.float64, generator=generator) * 3 - 0.5
    new = old + spread * torch.randn(sum(lengths), dtype=torch.float64, generator=generator)
    advantage = torch.randn(sum(lengths), dtype=torch.float64, generator=generator)
    if one_advantage:
        advantage = torch.randn(len(lengths), dtype=torch.float64, generator=generator).repeat_interleave(torch.tensor(lengths))
    return new.to(dtype).requires_grad_(), old.to(dtype), advantage.to(dtype)


def one_token(name: str, advantage: float, ratio: float, settings: PpoConfig = SETTINGS) -> tuple[float, float, dict[str, float]]:
    """(loss, gradient in the log-probability, sums) of a single token with this ratio; its log-probability is log(ratio) - 1."""
    new = torch.tensor([math.log(ratio) - 1], dtype=torch.float64, requires_grad=True)
    old, weight = torch.tensor([-1.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    loss, sums = POLICY_LOSSES[name](new, old, torch.tensor([advantage], dtype=torch.float64), weight, offsets(1), settings)
    loss.backward()
    return loss.item(), new.grad.item(), {key: value.item() for key, value in sums.items()}


# ---- by hand -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("advantage", "ratio", "expected", "clipped"), [(1, 1.5, -1.2, 1), (1, 0.5, -0.5, 0), (-1, 1.5, 1.5, 0), (-1, 0.5, 0.8, 1)])
@pytest.mark.parametrize("name", ["clip", "gspo"])  # a response of one token has one ratio
def test_clip_by_hand(name, advantage, ratio, expected, clipped):
    loss, gradient, sums = one_token(name, advantage, ratio)
    assert loss == pytest.approx(expected) and gradient == pytest.approx(0 if clipped else expected)
    assert sums == pytest.approx({"clip_fraction": clipped, "ratio": ratio, "ratio_max": ratio, "approx_kl": ratio - 1 - math.log(ratio)})


def test_the_upper_clip_may_differ():
    wide = replace(SETTINGS, clip_high=0.4)
    assert one_token("clip", 1, 1.5, wide)[0] == pytest.approx(-1.4) and one_token("clip", 1, 1.3, wide)[0] == pytest.approx(-1.3)
    assert one_token("clip", -1, 0.5, wide)[0] == pytest.approx(0.8)


def test_reinforce_by_hand():
    loss, gradient, sums = one_token("reinforce", 2, 1.5)
    assert loss == pytest.approx(-2 * (math.log(1.5) - 1)) and gradient == -2 and sums["clip_fraction"] == 0


def test_cispo_by_hand():
    """The ratio is held, and the token learns all the same."""
    for advantage, ratio, held in ((2, 1.5, 1.2), (-2, 1.5, 1.2), (2, 0.1, 0.1)):
        loss, gradient, sums = one_token("cispo", advantage, ratio)
        assert loss == pytest.approx(-held * advantage * (math.log(ratio) - 1)) and gradient == pytest.approx(-held * advantage)
        assert sums["clip_fraction"] == (ratio > 1.2) and sums["ratio"] == pytest.approx(ratio)
    assert one_token("cispo", 1, 1.5, replace(SETTINGS, clip_high=0.3))[1] == pytest.approx(-1.3)


def test_gspo_is_equation_5_of_the_paper():
    """The mean over responses of min(s A, clip(s) A), s the geometric mean of a response's ratios, differentiated as it stands."""
    new, old, advantage = drawn(one_advantage=True)
    settings = replace(SETTINGS, clip=0.03)
    weights, count = token_weights(offsets(*LENGTHS), "sequences")
    loss, sums = POLICY_LOSSES["gspo"](new, old, advantage, weights.double(), offsets(*LENGTHS), settings)
    ours = torch.autograd.grad(loss, new)[0]
    terms, clipped = [], 0
    for n, o, a in zip(new.split(LENGTHS), old.split(LENGTHS), advantage.split(LENGTHS), strict=True):
        s = (n - o).mean().exp()
        terms.append(torch.minimum(s * a[0], s.clamp(0.97, 1.03) * a[0]))
        clipped += (s.clamp(0.97, 1.03) * a[0] < s * a[0]).item()
    theirs = -torch.stack(terms).sum()
    assert_close(loss, theirs, rtol=1e-6, atol=0)  # the weights are fp32
    assert_close(ours, torch.autograd.grad(theirs, new)[0], rtol=1e-6, atol=0)
    assert count == 6 and 0 < clipped < 6 and sums["clip_fraction"].item() == pytest.approx(clipped)


def test_value_loss_by_hand():
    value, zero, one = (torch.tensor([x], dtype=torch.float64) for x in (1.0, 0.0, 1.0))
    target = torch.tensor([1.5], dtype=torch.float64)
    loss, sums = value_loss(value.requires_grad_(), zero, target, 0.2, one)
    assert loss.item() == pytest.approx(0.845) and sums["value_clip_fraction"] == 1
    assert torch.autograd.grad(loss, value)[0] == 0
    loss, sums = value_loss(value, zero, target, None, one)
    assert loss.item() == 0.125 and sums["value_clip_fraction"] == 0 and torch.autograd.grad(loss, value)[0] == -0.5
    loss, sums = value_loss(value, zero, torch.zeros(1, dtype=torch.float64), 0.2, one)  # moved away: not clipped
    assert loss.item() == 0.5 and sums["value_clip_fraction"] == 0


# ---- the first inner step ----------------------------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_first_inner_step_the_ratio_is_one(name, dtype):
    """Exactly, nothing is clipped, and all losses have the same gradient: REINFORCE's."""
    _, old, advantage = drawn(dtype=dtype)
    new = old.clone().requires_grad_()
    loss, sums = POLICY_LOSSES[name](new, old, advantage, torch.ones_like(old), offsets(*LENGTHS), SETTINGS)
    assert {key: value.item() for key, value in sums.items()} == {"clip_fraction": 0, "ratio": sum(LENGTHS), "ratio_max": 1, "approx_kl": 0}
    assert torch.equal(torch.autograd.grad(loss, new)[0], -advantage)


# ---- sums --------------------------------------------------------------------------------------------------------------------------

SPLITS = (((0, 1, 2, 3, 4, 5),), ((0,), (1,), (2,), (3,), (4,), (5,)), ((5, 2), (0, 4, 3, 1)), ((), (3, 0, 1), (), (4, 2, 5)))


def part(flat: torch.Tensor, which: tuple[int, ...]) -> torch.Tensor:
    pieces = flat.split(LENGTHS)
    return torch.cat([flat[:0], *(pieces[i] for i in which)])


@each_loss
@pytest.mark.parametrize("over", ["tokens", "sequences"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_micro_batches_change_nothing(name, over, dtype):
    """Mistake: means of the micro-batches' means."""
    new, old, advantage = drawn(dtype=dtype)
    weights, count = token_weights(offsets(*LENGTHS), over)
    weights = weights.to(dtype)
    whole, sums = POLICY_LOSSES[name](new, old, advantage, weights, offsets(*LENGTHS), SETTINGS)
    gradient = torch.autograd.grad(whole, new)[0]
    assert count == (18 if over == "tokens" else 6) and set(sums) == set(POLICY_SUMS)
    exact = 1e-12 if dtype == torch.float64 else 2e-6
    for split in SPLITS:
        losses, numbers, means = [], [], []
        for which in split:
            cu_seqlens = offsets(*(LENGTHS[i] for i in which))
            again, here = token_weights(cu_seqlens, over)
            assert torch.equal(again.to(dtype), part(weights, which))
            loss, found = POLICY_LOSSES[name](part(new, which), part(old, which), part(advantage, which), again.to(dtype), cu_seqlens, SETTINGS)
            losses.append(loss)
            numbers.append(found)
            means.append(loss.item() / max(here, 1))
        assert_close(sum(losses), whole, rtol=0, atol=exact * max(1, abs(whole.item())))
        assert (torch.autograd.grad(sum(losses), new)[0] - gradient).norm() <= exact * gradient.norm()
        for key in POLICY_SUMS:
            values = [found[key].item() for found in numbers]
            assert (max(values) if key == "ratio_max" else sum(values)) == pytest.approx(sums[key].item(), rel=exact, abs=exact)
        if over == "tokens" and len(split) == 2:
            assert abs(sum(means) / 2 - whole.item() / count) > 1e-3  # the mistake would show


def test_value_loss_and_variance_are_sums():
    new, old, returns = drawn()
    weights = torch.ones_like(old)
    whole, sums = value_loss(new, old, returns, 0.2, weights)
    assert 0 < sums["value_clip_fraction"] < 18
    for split in SPLITS:
        pieces = [[part(x, which) for x in (new, old, returns, weights)] for which in split]
        found = [value_loss(n, o, r, 0.2, w) for n, o, r, w in pieces]
        assert_close(sum(loss for loss, _ in found), whole, rtol=1e-12, atol=1e-12)
        assert sum(numbers["value_clip_fraction"] for _, numbers in found) == sums["value_clip_fraction"]
        spread = [variance_sums(n, r) for n, _, r, _ in pieces]
        total = {key: sum(numbers[key] for numbers in spread) for key in spread[0]}
        errors = returns - new.detach()
        assert explained_variance(total) == pytest.approx(1 - (errors.var(correction=0) / returns.var(correction=0)).item(), rel=1e-10)


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(variance_sums(returns, returns)) == 1
    assert explained_variance(variance_sums(returns + 3, returns)) == pytest.approx(1)  # an offset is no variance
    assert explained_variance(variance_sums(torch.zeros(3), returns)) == pytest.approx(0)
    assert explained_variance(variance_sums(-returns, returns)) == pytest.approx(-3)
    weights = torch.tensor([1.0, 0.0, 1.0])
    assert explained_variance(variance_sums(torch.tensor([1.0, 99.0, 4.0]), returns, weights)) == 1
    for none in (torch.full((1000,), 0.1), returns[:0]):  # the sums of the first have a variance of 2e-18
        assert math.isnan(explained_variance(variance_sums(none + 1, none)))


# ---- gradients ---------------------------------------------------------------------------------------------------------------------


@each_loss
def test_gradients_are_those_of_the_losses(name):
    """Numerically, for what is not held constant: cispo holds its ratio, gspo's token form agrees where a response has one advantage and weights
    are the same."""
    new, old, advantage = drawn(one_advantage=True)
    weights = torch.ones_like(old)
    if name == "cispo":
        ratio = (new.detach() - old).exp().clamp(max=1.2)
        loss = POLICY_LOSSES[name](new, old, advantage, weights, offsets(*LENGTHS), SETTINGS)[0]
        assert_close(torch.autograd.grad(loss, new)[0], -ratio * advantage, rtol=1e-12, atol=0)
        return
    assert torch.autograd.gradcheck(lambda x: POLICY_LOSSES[name](x, old, advantage, weights, offsets(*LENGTHS), SETTINGS)[0], (new,))


@pytest.mark.parametrize("clip", [0.2, None])
def test_gradient_of_the_value_loss(clip):
    new, old, returns = drawn()
    old, returns = old.requires_grad_(), returns.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, returns, clip, torch.ones_like(old))[0], (new,))
    value_loss(new, old, returns, clip, torch.ones_like(old))[0].backward()
    assert new.grad.any() and old.grad is returns.grad is None


@each_loss
def test_only_the_new_log_probabilities_learn(name):
    new, old, advantage = drawn()
    old, advantage, weights = old.requires_grad_(), advantage.requires_grad_(), torch.ones_like(old).requires_grad_()
    loss, sums = POLICY_LOSSES[name](new, old, advantage, weights, offsets(*LENGTHS), SETTINGS)
    loss.backward()
    assert new.grad.any() and old.grad is advantage.grad is weights.grad is None and not any(value.requires_grad for value in sums.values())


# ---- bad input ---------------------------------------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_log_probabilities_far_apart_do_not_overflow(name, gap):
    old = torch.tensor([-201.0, -1.0])
    new = (old + torch.tensor([gap, 0.0])).requires_grad_()
    for sign in (1.0, -1.0):
        loss, sums = POLICY_LOSSES[name](new, old, torch.full((2,), sign), torch.ones(2), offsets(1, 1), SETTINGS)
        assert loss.isfinite() and torch.autograd.grad(loss, new)[0].isfinite().all() and all(value.isfinite() for value in sums.values())


@each_loss
def test_empty_responses_and_empty_micro_batches(name):
    new, old, advantage = drawn()
    weights = torch.ones_like(old)
    lengths = (0, 3, 1, 0, 7, 2, 4, 1, 0)
    loss, sums = POLICY_LOSSES[name](new, old, advantage, weights, offsets(*lengths), SETTINGS)
    whole, whole_sums = POLICY_LOSSES[name](new, old, advantage, weights, offsets(*LENGTHS), SETTINGS)
    assert torch.equal(loss, whole) and sums == whole_sums
    assert token_weights(offsets(*lengths), "sequences")[1] == 6 and token_weights(offsets(0, 0), "tokens")[1] == 0
    none = new[:0]
    loss, sums = POLICY_LOSSES[name](none, old[:0], advantage[:0], weights[:0], offsets(0, 0), SETTINGS)
    loss.backward()
    assert loss == 0 and not any(sums.values())


@each_loss
def test_nan_is_not_hidden(name):
    new, old, advantage = drawn()
    for broken in (new.detach(), old, advantage):
        kept, broken[4] = broken[4].item(), float("nan")
        loss, sums = POLICY_LOSSES[name](new, old, advantage, torch.ones_like(old), offsets(*LENGTHS), SETTINGS)
        assert loss.isnan() or name == "reinforce" and broken is old and sums["ratio"].isnan()  # which it does not learn from
        broken[4] = kept


@each_loss
def test_bad_input_is_named(name):
    new, old, advantage = drawn()
    right = {"logprob": new, "old_logprob": old, "advantage": advantage, "token_weights": torch.ones_like(old), "cu_seqlens": offsets(*LENGTHS)}
    for error, words, bad in (
        (ValueError, "old_logprob has shape", {"old_logprob": old[:-1]}), (ValueError, "advantage has shape", {"advantage": advantage[:6]}),
        (ValueError, "logprob has shape", {"logprob": new[None]}), (TypeError, "logprob is bfloat16", {"logprob": new.bfloat16()}),
        (ValueError, "token_weights has shape", {"token_weights": torch.ones(1, dtype=torch.float64)}),
        (ValueError, "cu_seqlens must rise", {"cu_seqlens": offsets(*LENGTHS, 2)}), (ValueError, "cu_seqlens must rise", {"cu_seqlens": offsets(20, -2)}),
        (TypeError, "cu_seqlens is float32", {"cu_seqlens": offsets(*LENGTHS).float()}), (ValueError, "advantage is on meta", {"advantage": advantage.to("meta")}),
    ):
        with pytest.raises(error, match=f"{name}: {words}"):
            POLICY_LOSSES[name](**right | bad, settings=SETTINGS)


def test_bad_input_of_values_and_registry_is_named():
    new, old, returns = drawn()
    for error, words, call in (
        (ValueError, "value_loss: returns has shape", lambda: value_loss(new, old, returns[:1], 0.2, old)),
        (TypeError, "value_loss: values is int64", lambda: value_loss(new.long(), old, returns, 0.2, old)),
        (ValueError, "variance_sums: returns has shape", lambda: variance_sums(new, returns[:1])),
        (ValueError, "over is 'words'", lambda: token_weights(offsets(2), "words")),
        (ValueError, "clip is registered already", lambda: register("clip")(lambda *parts: parts)),
    ):
        with pytest.raises(error, match=words):
            call()
    assert set(POLICY_LOSSES) == set(NAMES)


@each_loss
def test_everything_stays_on_its_device(name):
    """Also on a machine without a GPU: tensors of the meta device refuse to meet the CPU's, as a GPU's would."""
    new, old, advantage, weights = (torch.zeros(18, device="meta") for _ in range(4))
    cu_seqlens = torch.zeros(7, dtype=torch.int32, device="meta")
    loss, sums = POLICY_LOSSES[name](new.requires_grad_(), old, advantage, weights, cu_seqlens, SETTINGS)
    loss.backward()
    critic, more = value_loss(new, old, advantage, 0.2, weights)
    assert {x.device.type for x in (loss, new.grad, critic, *sums.values(), *more.values(), *variance_sums(new, old).values())} == {"meta"}
