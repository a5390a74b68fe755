"""The loops of `linear_cross_entropy`: over tiles of logits [tokens, words], with everything that a vocabulary split over ranks needs.

`score` goes over the vocabulary once and keeps five numbers a token; `gradients` goes over it again (4 products in all) in an order in which each
block of words is finished before the next: the gradient of a 16-bit head then needs no fp32 copy of the head's size. `gradients_at_once` holds
all words of a few tokens, so that the logits are made once (3 products), and adds up the head's gradient over the tokens, in fp32.

A tile is computed either in torch (in the dtype of the products; elementwise arithmetic in fp32) or by the Triton kernels (fp32 logits).
Padded words are cut off before the first product: they cost nothing and have no probability.
"""
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from kernels import linear_cross_entropy_triton as fused
from kernels import tiles
from kernels.autocast import outside_autocast

LOWEST = -3.0e38  # a maximum over no words; finite, so that no infinity meets another


@dataclass(frozen=True)
class Head:
    """The numbers of a call. group: the name of a process group, "" for none; tokens, words: of a tile, 0 = `tiles.head` chooses."""

    vocab_size: int
    group: str
    temperature: float
    label_smoothing: float
    z_loss: float
    ignore_index: int
    tokens: int
    words: int
    triton: bool

    def ranks(self):
        """The process group, or None for one rank."""
        group = _resolve_process_group(self.group) if self.group else None
        return group if group is not None and group.size() > 1 else None

    def first(self, rows: int) -> int:
        """Global id of this rank's first word."""
        group = self.ranks()
        return group.rank() * rows if group else 0

    def live(self, rows: int) -> int:
        """How many of this rank's words exist."""
        return min(max(self.vocab_size - self.first(rows), 0), rows)

    def tile(self, tokens: int, words: int, device: torch.device, whole_rows: bool) -> tuple[int, int]:
        chosen = tiles.head(tokens, words, device.type if not self.triton else "cuda", whole_rows)
        return max(min(self.tokens or chosen[0], tokens), 1), max(min(self.words or chosen[1], words), 1)


def multiply(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out (+)= a b. `out` is of the operands' dtype, or fp32 with 16-bit operands, where cuBLAS keeps its fp32 sums."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.device.type == "cpu":  # no 16-bit product with an fp32 result there; sums over tiles are fp32 all the same
        out.add_(a @ b) if add else out.copy_(a @ b)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _logits(x: Tensor, hidden: Tensor, block: Tensor, bias: Tensor | None) -> None:
    """x [n, w] = hidden block^T + bias."""
    if bias is None:
        multiply(x, hidden, block.t(), add=False)
    elif x.dtype == hidden.dtype:
        torch.addmm(bias, hidden, block.t(), out=x)
    elif x.device.type == "cpu":
        x.copy_(torch.addmm(bias, hidden, block.t()))
    else:
        x.copy_(bias.expand_as(x))
        multiply(x, hidden, block.t(), add=True)


def _scaled(x: Tensor, temperature: float) -> Tensor:
    """fp32 logits of a tile: in place where the tile is fp32."""
    x = x.float()
    return x if temperature == 1.0 else x.div_(temperature)


def _statistics(x: Tensor, target: Tensor, state: Tensor, *, sums: bool, moment: bool) -> None:
    """Folds a tile x [n, w] into state [5, n] (`linear_cross_entropy_triton.statistics`) and leaves e^(x - m) in x; target: ids within the tile."""
    here = (target >= 0) & (target < x.shape[1])
    picked = x.gather(1, target.clamp(0, x.shape[1] - 1).unsqueeze(1)).squeeze(1)
    state[4] += torch.where(here, picked, 0.0)
    if sums:
        state[3] += x.sum(1)
    top = torch.maximum(state[0], x.amax(1))
    drop = state[0] - top
    scale = drop.exp()
    x.sub_(top.unsqueeze(1))
    if moment:
        e = x.exp()
        state[2] = scale * (state[2] + state[1] * drop) + x.mul_(e).sum(1)
        x = e
    else:
        x.exp_()
    state[1] = scale * state[1] + x.sum(1)
    state[0] = top


def _exponentials(x: Tensor, part: Tensor, *, entropy: bool) -> Tensor:
    """In place: logits [n, w] become p (factor of p + factor of p log p), for `plan`'s rows of these tokens."""
    x.sub_(part[0].unsqueeze(1))
    if not entropy:
        return x.exp_().mul_((part[2] * torch.exp(-part[1])).unsqueeze(1))
    x.sub_(part[1].unsqueeze(1))
    factor = torch.addcmul(part[2].unsqueeze(1), x, part[3].unsqueeze(1))
    return x.exp_().mul_(factor)


def _hits(x: Tensor, target: Tensor, part: Tensor, smoothed: bool) -> Tensor:
    """In place: adds the terms of the target and of every word. target: ids within the tile."""
    if smoothed:
        x.add_(part[5].unsqueeze(1))
    here = (target >= 0) & (target < x.shape[1])
    return x.scatter_add_(1, target.clamp(0, x.shape[1] - 1).unsqueeze(1), torch.where(here, part[4], 0.0).unsqueeze(1))


def empty_state(tokens: int, device: torch.device) -> Tensor:
    state = torch.zeros(5, tokens, dtype=torch.float32, device=device)
    state[0] = LOWEST
    return state


def combine(state: Tensor, head: Head) -> Tensor:
    """The state over all ranks' words: one all-gather, added up in the order of the ranks, so that every rank has the same bits."""
    group = head.ranks()
    if group is None:
        return state
    gathered = state.new_empty(group.size() * len(state), *state.shape[1:])  # gloo joins, and does not stack
    dist.all_gather_into_tensor(gathered, state.contiguous(), group=group)
    gathered = gathered.view(group.size(), *state.shape)
    top = gathered[:, 0].amax(0)
    drop = gathered[:, 0] - top
    scale = drop.exp()
    total = (scale * gathered[:, 1]).sum(0)
    moment = (scale * (gathered[:, 2] + gathered[:, 1] * drop)).sum(0)
    return torch.stack((top, total, moment, gathered[:, 3].sum(0), gathered[:, 4].sum(0)))


def finish(state: Tensor, target: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, logprob, entropy, m and log sum e^(l - m), of each token. A target that is no word gives NaN (on a CPU it was refused before)."""
    top, total, moment, plain, picked = state
    log_sum = total.log()
    logprob = (picked - top) - log_sum
    wrong = (target < 0) | (target >= head.vocab_size)
    logprob = torch.where(wrong, float("nan"), logprob)
    loss = -logprob
    if head.label_smoothing:
        loss = (1 - head.label_smoothing) * loss + head.label_smoothing * (log_sum - (plain / head.vocab_size - top))
    if head.z_loss:
        loss = loss + head.z_loss * (top + log_sum).square()
    ignored = target == head.ignore_index
    return *(torch.where(ignored, 0.0, x) for x in (loss, logprob, log_sum - moment / total)), top, log_sum


def plan(target: Tensor, top: Tensor, log_sum: Tensor, entropy: Tensor | None, dloss: Tensor | None, dlogprob: Tensor | None,
         dentropy: Tensor | None, head: Head) -> Tensor:
    """[6, tokens]: m, log sum, and what the gradient of a raw logit is made of: factors of p, of p log p, of [v = target], and of 1."""
    zero = torch.zeros_like(top)
    p = plogp = hit = flat = zero
    if dloss is not None:
        p = dloss * (1 + 2 * head.z_loss * (top + log_sum)) if head.z_loss else dloss
        hit = -(1 - head.label_smoothing) * dloss
        flat = dloss * (-head.label_smoothing / head.vocab_size) if head.label_smoothing else zero
    if dlogprob is not None:
        p, hit = p - dlogprob, hit + dlogprob
    if dentropy is not None:
        p, plogp = p - dentropy * entropy, -dentropy
    counted, wrong = target != head.ignore_index, (target < 0) | (target >= head.vocab_size)
    p = torch.where(wrong, float("nan"), p)  # never a wrong number, and never a silent zero
    factors = [torch.where(counted, x, 0.0) / head.temperature for x in (p, plogp, hit, flat)]
    return torch.stack((top, log_sum, *factors))


@outside_autocast
def score(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`finish` for all tokens: hidden [tokens, H], weight [rows, H]. One product, one all-gather."""
    live, first = head.live(len(weight)), head.first(len(weight))
    state = empty_state(len(hidden), hidden.device)
    tokens, words = head.tile(len(hidden), live, hidden.device, False)
    buffer = hidden.new_empty(tokens * words, dtype=torch.float32 if head.triton else hidden.dtype)
    for v in range(0, live, words):
        block, b = weight[v:min(v + words, live)], None if bias is None else bias[v:min(v + words, live)]
        for t in range(0, len(hidden), tokens):
            mine, ids, kept = hidden[t:t + tokens], target[t:t + tokens], state[:, t:t + tokens]
            x = buffer[:len(mine) * len(block)].view(len(mine), len(block))
            _logits(x, mine, block, b)
            if head.triton:
                fused.statistics(x, ids, kept, first + v, head.temperature)
            else:
                _statistics(_scaled(x, head.temperature), ids - (first + v), kept, sums=head.label_smoothing > 0, moment=True)
    return finish(combine(state, head), target, head)


@outside_autocast
def gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, plan: Tensor, entropy: bool, main_grad: Tensor | None, head: Head,
              needed: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (of this rank's words alone), weight and bias from a `plan`; the tiles are computed again. Three products.

    With main_grad (fp32 [rows, H]) the weight's is added into it and an empty tensor returned in its place, as for what is not `needed`.
    """
    live, first, wide = head.live(len(weight)), head.first(len(weight)), hidden.dtype != torch.float32
    tokens, words = head.tile(len(hidden), live, hidden.device, False)
    n, whole = len(hidden), tokens >= len(hidden)
    dhidden = torch.zeros(hidden.shape if needed[0] else 0, dtype=torch.float32, device=hidden.device)
    dweight = weight.new_empty(weight.shape if needed[1] and main_grad is None else 0)
    dbias = bias.new_zeros(bias.shape) if bias is not None and needed[2] else hidden.new_empty(0)
    buffer = hidden.new_empty(tokens * words, dtype=torch.float32 if head.triton else hidden.dtype)
    narrowed = hidden.new_empty(tokens * words) if head.triton and wide else buffer
    kept = weight.new_empty(words, weight.shape[1], dtype=torch.float32) if wide and not whole and len(dweight) else None
    for v in range(0, live, words):
        block, b = weight[v:min(v + words, live)], None if bias is None else bias[v:min(v + words, live)]
        dblock = main_grad[v:v + len(block)] if main_grad is not None else dweight[v:v + len(block)] if kept is None else kept[:len(block)]
        dbiased = torch.zeros(len(block) if len(dbias) else 0, dtype=torch.float32, device=hidden.device)
        for t in range(0, n, tokens):
            mine, ids, part = hidden[t:t + tokens], target[t:t + tokens], plan[:, t:t + tokens]
            x, d = (y[:len(mine) * len(block)].view(len(mine), len(block)) for y in (buffer, narrowed))
            _logits(x, mine, block, b)
            if head.triton:
                fused.gradient(x, ids, part, d, first + v, head.temperature, entropy)
            else:
                y = _exponentials(_scaled(x, head.temperature), part, entropy=entropy)
                _hits(y, ids - (first + v), part, head.label_smoothing > 0)
                if y is not d:
                    d.copy_(y)
            if needed[0]:
                multiply(dhidden[t:t + tokens], d, block, add=v > 0)
            if needed[1]:
                multiply(dblock, d.t(), mine, add=t > 0 or main_grad is not None)
            if len(dbiased):
                dbiased += d.sum(0, dtype=torch.float32)
        if kept is not None and n:
            dweight[v:v + len(block)] = dblock
        if len(dbiased):
            dbias[v:v + len(block)] = dbiased
    dweight[live if n else 0:] = 0
    return dhidden, dweight, dbias


@outside_autocast
def gradients_at_once(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, token_weights: Tensor, head: Head,
                      needed: tuple[bool, bool, bool], wide_weight: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss of each token, and the gradients of sum token_weights loss; three products. The weight's gradient is fp32 with wide_weight.

    All words of `tokens` tokens are held. Over ranks: one all-gather for each of these chunks.
    """
    live, first, n, wide = head.live(len(weight)), head.first(len(weight)), len(hidden), hidden.dtype != torch.float32
    tokens, words = head.tile(n, live, hidden.device, True)
    loss = torch.zeros(n, dtype=torch.float32, device=hidden.device)
    dhidden = hidden.new_zeros(hidden.shape if needed[0] else 0)
    # one chunk of tokens leaves nothing to add up
    dweight = weight.new_empty(weight.shape if needed[1] else 0, dtype=torch.float32 if wide_weight or tokens < n else None)
    dbias = torch.zeros(len(weight) if bias is not None and needed[2] else 0, dtype=torch.float32, device=hidden.device)
    buffer = hidden.new_empty(tokens * live, dtype=torch.float32 if head.triton else hidden.dtype)
    narrowed = hidden.new_empty(tokens * words) if head.triton and wide else None
    sums = torch.empty(tokens, hidden.shape[1], dtype=torch.float32, device=hidden.device) if wide and needed[0] else None
    starts = range(0, live, words)
    for t in range(0, n, tokens):
        mine, ids = hidden[t:t + tokens], target[t:t + tokens]
        state = empty_state(len(mine), hidden.device)
        blocks, tops = [], []
        for v in starts:  # each block is dense: the products and the elementwise passes find it in the cache
            width = min(words, live - v)
            x, b = buffer[len(mine) * v:len(mine) * (v + width)].view(len(mine), width), None if bias is None else bias[v:v + width]
            _logits(x, mine, weight[v:v + width], b)
            if head.triton:
                fused.statistics(x, ids, state, first + v, head.temperature)
            else:  # the block becomes e^(l - m), with the maximum m so far
                y = _scaled(x, head.temperature)
                _statistics(y, ids - (first + v), state, sums=head.label_smoothing > 0, moment=False)
                if y is not x:
                    x.copy_(y)
            blocks.append(x)
            tops.append(state[0].clone())
        loss[t:t + tokens], _, _, top, log_sum = finish(combine(state, head), ids, head)
        if not any(needed):
            continue
        part = plan(ids, top, log_sum, None, token_weights[t:t + tokens], None, None, head)
        dmine = dhidden[t:t + tokens] if sums is None else sums[:len(mine)]
        for v, x, then in zip(starts, blocks, tops, strict=True):
            width = x.shape[1]
            if head.triton:
                d = x if narrowed is None else narrowed[:x.numel()].view(x.shape)
                fused.gradient(x, ids, part, d, first + v, head.temperature, False)
            else:
                d, y = x, x.float().mul_((part[2] * torch.exp((then - top) - log_sum)).unsqueeze(1))
                _hits(y, ids - (first + v), part, head.label_smoothing > 0)
                if y is not d:
                    d.copy_(y)
            if needed[0]:
                multiply(dmine, d, weight[v:v + width], add=v > 0)
            if needed[1]:
                multiply(dweight[v:v + width], d.t(), mine, add=t > 0)
            if len(dbias):
                dbias[v:v + width] += d.sum(0, dtype=torch.float32)
        if sums is not None and live:
            dhidden[t:t + tokens] = dmine
    dweight[live if n else 0:] = 0
    return loss, dhidden, dweight if wide_weight else dweight.to(weight.dtype), dbias
