"""Learning from comparisons: the reward model's ranking loss, how right and how calibrated it is, and DPO.

A labeller ranks K responses to a prompt. Bradley and Terry (1952): i beats j with probability sigmoid(r_i - r_j). InstructGPT (arXiv 2203.02155, eq. 1)
takes all pairs of a prompt as one element, so that each response passes the model once and no pair is learned as though it were independent:

    loss of a prompt = mean over its pairs of -log sigmoid(r_w - r_l - m),      K = 2: the usual pairwise loss.

m >= 0 is a margin (Llama 2, arXiv 2307.09288, eq. 2): how far the better one has to lead.

Rules:
- Equal ranks are a tie. With ties="half" (the default) a tie says that either wins half the time, the cross-entropy -(log sigmoid(d) +
  log sigmoid(-d)) / 2, smallest (ln 2) at d = 0; it has no margin. With ties="skip" it is no pair, and the mean is over the others.
- A prompt without a pair (one response; with "skip" one where all are tied) adds nothing and does not count in `prompts`, by which the caller divides.
- Accuracy and calibration are over decided pairs only, without margin; equal rewards are half right, so that a constant model has accuracy 0.5.
- NaN in a reward makes the loss NaN: the engine then changes nothing.

DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) is the same loss with r = beta (log p(response) - log p_ref(response)), the policy being its own
reward model; label smoothing e (Mitchell 2023, "conservative DPO") takes a share e of preferences to be wrong.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import check_device, check_dtype, check_shape
from rlhf.packed import FLOATS, check_packed

TIES = ("half", "skip")
RANKING_SUMS = ("prompts", "pairs", "ties", "correct", "margin")
DPO_SUMS = ("correct", "margin", "chosen_reward", "rejected_reward")
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)

Result = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Pairs:
    """All pairs within prompts, each once, the better one first. int64 [pairs] and bool.

    Attributes:
        better, worse: positions in the flat rewards; either order where tied. prompt: of each pair. tied: equal ranks.
    """

    better: Tensor
    worse: Tensor
    prompt: Tensor
    tied: Tensor


def pairs_of(cu_seqlens: Tensor, ranks: Tensor) -> Pairs:
    """Every i < j of a prompt, without a loop.

    Args:
        cu_seqlens: int32 or int64 [p + 1], where each prompt's responses begin and end. ranks: integers [m], 1 (or 0) is best; equal = tied.
    Raises:
        TypeError, ValueError: a dtype, shape, device or offset that does not fit.
    """
    check_dtype("ranking", "ranks", ranks, INTEGERS)
    check_device("ranking", "ranks", ranks, cu_seqlens.device)
    prompts = check_packed("ranking", cu_seqlens, ranks=ranks.float())
    member = torch.arange(prompts, device=ranks.device).repeat_interleave(cu_seqlens.diff(), output_size=ranks.numel())
    at = torch.arange(ranks.numel(), device=ranks.device)
    later = cu_seqlens[1:].long()[member] - 1 - at  # responses of the same prompt after this one
    first = at.repeat_interleave(later)
    begin = later.cumsum(0) - later
    second = first + 1 + torch.arange(first.numel(), device=ranks.device) - begin[first]
    swap = ranks[second] < ranks[first]
    return Pairs(torch.where(swap, second, first), torch.where(swap, first, second), member[first], ranks[first] == ranks[second])


def ranking_loss(rewards: Tensor, cu_seqlens: Tensor, ranks: Tensor, margins: float | Tensor = 0.0, *, ties: str = "half") -> Result:
    """The sum over prompts of the mean over their pairs.

    Args:
        rewards: fp32 or fp64 [m], of all responses, prompt after prompt; differentiable.
        cu_seqlens, ranks: as of `pairs_of`.
        margins: one number, or fp32 [p] for each prompt.
        ties: half | skip.
    Returns:
        (scalar; RANKING_SUMS, scalars fp64 without a gradient: prompts that counted, decided pairs, tied pairs, decided pairs in the
        right order, and the sum of r_w - r_l over the decided).
    Raises:
        TypeError, ValueError: a dtype, shape, device, offset or name that does not fit.
    """
    if ties not in TIES:
        raise ValueError(f"ranking: ties is {ties!r}; it must be one of {', '.join(TIES)}")
    prompts = check_packed("ranking", cu_seqlens, rewards=rewards)
    check_shape("ranking", "ranks", ranks, rewards.shape)
    pairs = pairs_of(cu_seqlens, ranks)
    lead = rewards[pairs.better] - rewards[pairs.worse]
    if isinstance(margins, Tensor):
        check_shape("ranking", "margins", margins, (prompts,))
        check_dtype("ranking", "margins", margins, FLOATS)
        margins = margins.detach()[pairs.prompt]
    decided = -F.logsigmoid(lead - margins)
    counts = torch.ones_like(pairs.tied) if ties == "half" else ~pairs.tied
    of_pair = torch.where(pairs.tied, -(F.logsigmoid(lead) + F.logsigmoid(-lead)) / 2, decided) if ties == "half" else decided
    in_prompt = torch.bincount(pairs.prompt[counts], minlength=prompts)
    weights = counts / in_prompt[pairs.prompt].clamp(min=1).to(rewards.dtype)
    with torch.no_grad():
        known = lead.detach()[~pairs.tied]
        sums = {
            "prompts": (in_prompt > 0).sum().double(), "pairs": (~pairs.tied).sum().double(), "ties": pairs.tied.sum().double(),
            "correct": _correct(known), "margin": known.sum(dtype=torch.float64),
        }
    return (of_pair * weights).sum(), sums


@torch.no_grad()
def leads(rewards: Tensor, cu_seqlens: Tensor, ranks: Tensor) -> Tensor:
    """[decided pairs]: r_w - r_l, for `calibration_sums`. Raises what `ranking_loss` does."""
    check_packed("ranking", cu_seqlens, rewards=rewards)
    check_shape("ranking", "ranks", ranks, rewards.shape)
    pairs = pairs_of(cu_seqlens, ranks)
    return (rewards[pairs.better] - rewards[pairs.worse])[~pairs.tied]


@torch.no_grad()
def calibration_sums(lead: Tensor, *, bins: int = 10) -> Tensor:
    """What the model believes against how often it is right, in bins of equal width over [0.5, 1].

    It believes in the response with the greater reward, with confidence sigmoid(|r_w - r_l|): the sign of the lead says whether that was right. (The
    pairs as they are given have one outcome only: the winner wins.)

    Args:
        lead: [pairs], r_w - r_l.
    Returns:
        fp64 [bins, 3]: pairs, sum of confidences, pairs that were right. Adds up over batches and ranks.
    Raises:
        ValueError: a lead that is not finite (it has no bin), or no bins.
    """
    if bins < 1:
        raise ValueError(f"calibration: bins is {bins}; it must be at least 1")
    if not lead.isfinite().all():
        raise ValueError("calibration: a reward is not finite")
    lead = lead.double()
    confidence = lead.abs().sigmoid()
    of_bin = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    found = F.one_hot(of_bin, bins).double().T
    return found @ torch.stack((torch.ones_like(lead), confidence, (lead.sign() + 1) / 2), dim=1)


def calibration_error(sums: Tensor) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599): the mean over pairs of |right - confidence| of their bin. NaN without pairs."""
    pairs = sums[:, 0].sum()
    return float((sums[:, 2] - sums[:, 1]).abs().sum() / pairs)


def reliability(sums: Tensor) -> list[tuple[int, float, float]]:
    """(pairs, mean confidence, share that was right) of each bin that has any: the reliability diagram."""
    return [(int(count), confidence / count, right / count) for count, confidence, right in sums.tolist() if count]


def dpo_loss(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float,
             label_smoothing: float = 0.0) -> Result:
    """The sum over pairs of -(1 - e) log sigmoid(d) - e log sigmoid(-d), d = beta ((chosen - reference_chosen) - (rejected - reference_rejected)).

    Args:
        chosen, rejected: fp32 or fp64 [pairs], log-probabilities of whole responses, nats; differentiable. reference_*: the reference's.
        beta, label_smoothing: `ppo.beta` and `ppo.label_smoothing`, e in [0, 0.5).
    Returns:
        (scalar; DPO_SUMS, scalars fp64 without a gradient: pairs with d > 0, sums of d and of the implicit rewards).
    Raises:
        TypeError, ValueError: a dtype or shape that does not fit.
    """
    for name, tensor in (("chosen", chosen), ("rejected", rejected), ("reference_chosen", reference_chosen),
                         ("reference_rejected", reference_rejected)):
        check_dtype("dpo", name, tensor, FLOATS)
        check_shape("dpo", name, tensor, (chosen.numel(),))
    better, worse = beta * (chosen - reference_chosen.detach()), beta * (rejected - reference_rejected.detach())
    lead = better - worse
    loss = -(1 - label_smoothing) * F.logsigmoid(lead) - label_smoothing * F.logsigmoid(-lead)
    with torch.no_grad():
        sums = {"correct": _correct(lead), "margin": lead.sum(dtype=torch.float64), "chosen_reward": better.sum(dtype=torch.float64),
                "rejected_reward": worse.sum(dtype=torch.float64)}
    return loss.sum(), sums


def _correct(lead: Tensor) -> Tensor:
    """How many are in the right order; equal ones are half."""
    return (lead > 0).sum(dtype=torch.float64) + (lead == 0).sum(dtype=torch.float64) / 2
