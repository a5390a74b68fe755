"""rlhf/kl.py: by hand (../shared/ANCHORS.md, section 5), and over all tokens of a vocabulary."""
import json
import math

import pytest
import torch
from torch.testing import assert_close

from megatron_ext.config.schema import PpoConfig
from megatron_ext.errors import UserError
from rlhf.kl import AdaptiveKL, FixedKL, controller, estimate, sequence_kl

LOGP, REF = torch.tensor([-1.0, -2.0, -1.5]), torch.tensor([-1.2, -1.9, -2.5])
NAN = float("nan")


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize(("kind", "expected"), [
    ("k1", [0.2, -0.1, 1.0]), ("k2", [0.02, 0.005, 0.5]), ("k3", [0.01873075, 0.00517092, 0.36787944])])
def test_estimators_by_hand(kind, expected):
    exact = estimate(LOGP.double(), REF.double(), kind)
    assert_close(exact, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-8)  # of the inputs' fp32
    assert_close(estimate(LOGP, REF, kind).double(), exact, rtol=1e-6, atol=0)
    assert not estimate(LOGP, LOGP, kind).any()  # before the first update it is 0 exactly


def test_k3_is_never_negative():
    differences = torch.cat((torch.linspace(-3, 3, 100001), torch.randn(100000, generator=torch.Generator().manual_seed(1)) * 1e-4))
    assert (torch.exp(-differences) - 1 + differences).min() < 0  # as it is usually written
    assert estimate(differences, torch.zeros_like(differences), "k3").min() >= 0


def policies() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(7, dtype=torch.float64, generator=generator, requires_grad=True), torch.randn(7, dtype=torch.float64, generator=generator).log_softmax(0)


def gradient(of_logp) -> torch.Tensor:
    logits, _ = policies()
    return torch.autograd.grad(of_logp(logits.log_softmax(0)), logits)[0]


def test_which_estimator_is_right_where():
    """Expectations over all seven tokens, not samples: what the module's docstring says of values and gradients."""
    reference = policies()[1]
    reverse = gradient(lambda p: (p.exp() * (p - reference)).sum())
    forward = gradient(lambda p: (reference.exp() * (reference - p)).sum())
    in_loss = {kind: gradient(lambda p, k=kind: (p.detach().exp() * estimate(p, reference, k)).sum()) for kind in ("k1", "k2", "k3")}
    in_reward = {kind: gradient(lambda p, k=kind: (p.detach().exp() * estimate(p, reference, k).detach() * p).sum()) for kind in ("k1", "k2", "k3")}
    assert in_loss["k1"].abs().max() < 1e-15
    assert_close(in_loss["k2"], reverse)
    assert_close(in_loss["k3"], forward)
    assert_close(in_reward["k1"], reverse)
    for wrong in (in_reward["k2"], in_reward["k3"], forward):
        assert (wrong - reverse).norm() > 0.1 * reverse.norm()
    p = policies()[0].detach().log_softmax(0)
    means = {kind: (p.exp() * estimate(p, reference, kind)).sum() for kind in ("k1", "k2", "k3")}
    assert_close(means["k1"], means["k3"])
    assert abs(means["k2"] - means["k1"]) > 0.01 * means["k1"]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_estimators_are_differentiable_in_both(kind):
    assert torch.autograd.gradcheck(lambda a, b: estimate(a, b, kind), (LOGP.double().requires_grad_(), REF.double().requires_grad_()))


def test_kl_of_a_response_is_the_sum_of_its_tokens():
    assert sequence_kl(torch.tensor([0.5, 1.0, 2.0, -4.0]), offsets(2, 0, 2)).tolist() == [1.5, 0.0, -2.0]
    kl = sequence_kl(torch.tensor([NAN, 1.0, 2.0]), offsets(1, 2))
    assert kl[0].isnan() and kl[1] == 3.0  # a broken response breaks no other


def test_adaptive_coefficient_by_hand():
    kl = AdaptiveKL(0.15, target=6.0, horizon=1e4)
    for mean, expected in ((12.0, 0.151536), (6.0, 0.151536), (3.0, 0.14998427), (6.5, 0.15062420)):
        kl.update(mean, 512)
        assert kl.value == pytest.approx(expected, abs=5e-9)


def test_adaptive_coefficient_goes_on_to_the_last_bit():
    whole = AdaptiveKL(0.15, target=6.0, horizon=1000.0)
    first = AdaptiveKL(0.15, target=6.0, horizon=1000.0)
    means = [12.0, 5.9, 3.0, 6.5, 0.1, 100.0]
    for at, mean in enumerate(means):
        whole.update(mean, 333)
        if at == 3:
            saved = json.loads(json.dumps(first.state_dict()))
            first = AdaptiveKL(0.7, target=6.0, horizon=1000.0)
            first.load_state_dict(saved)
        first.update(mean, 333)
    assert first.value == whole.value != 0.15


def test_adaptive_coefficient_survives_what_the_formula_would_not():
    kl = AdaptiveKL(0.1, target=6.0, horizon=100.0)
    kl.update(0.0, 100_000)  # 1 - 0.2 x 1000 < 0
    assert kl.value == pytest.approx(0.08)
    kl.update(math.inf, 100)
    assert kl.value == pytest.approx(0.096)
    kl.update(NAN, 100)
    assert kl.value == pytest.approx(0.096)


def test_controllers_come_from_the_configuration():
    fixed = controller(PpoConfig(kl_coef=0.3))
    fixed.update(100.0, 512)
    fixed.load_state_dict(FixedKL(0.7).state_dict())
    assert fixed.value == 0.3
    adaptive = controller(PpoConfig(kl_coef=0.3, kl_target=6.0, kl_horizon=50.0))
    assert (adaptive.value, adaptive.target, adaptive.horizon) == (0.3, 6.0, 50.0)
    for one, other in ((fixed, adaptive), (adaptive, fixed)):
        with pytest.raises(UserError, match="ppo.kl_target.* goes on with the controller that it began with"):
            one.load_state_dict(other.state_dict())


def test_bad_input_of_kl_is_named():
    for error, words, call in (
        (ValueError, r"ref_logp has shape \(1,\)", lambda: estimate(LOGP, REF[:1], "k1")), (UserError, "ppo.kl=k4", lambda: estimate(LOGP, REF, "k4")),
        (UserError, "ppo.kl_target=0", lambda: AdaptiveKL(0.1, target=0.0, horizon=1.0)),
        (UserError, "ppo.kl_horizon=inf", lambda: AdaptiveKL(0.1, target=1.0, horizon=math.inf)),
        (ValueError, "cu_seqlens must rise", lambda: sequence_kl(LOGP, offsets(2))), (ValueError, r"expected \(n \+ 1,\)", lambda: sequence_kl(LOGP, offsets(3)[None])),
        (TypeError, "kl is int64", lambda: sequence_kl(torch.tensor([1]), offsets(1))), (TypeError, "cu_seqlens is float32", lambda: sequence_kl(LOGP, LOGP)),
    ):
        with pytest.raises(error, match=words):
            call()
