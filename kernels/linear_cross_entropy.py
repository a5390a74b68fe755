"""The head of a language model fused with its loss: cross-entropy, logprob and entropy of each token, without the logits of a batch in memory.

With z = W h + b over V words, l = z / temperature, lse = log sum_v e^(l_v), p = e^(l - lse), target t, smoothing eps, z-loss zeta:
    logprob = l_t - lse,      entropy = lse - sum_v p_v l_v,
    loss = (1 - eps)(lse - l_t) + eps (lse - mean_v l_v) + zeta lse^2;
for incoming gradients g of the loss, q of the logprob and s of the entropy
    d l_v = p_v (g (1 + 2 zeta lse) - q - s (entropy + log p_v)) + [v = t] (q - g (1 - eps)) - g eps / V.
(Szegedy et al. 2016, arXiv 1512.00567, for the smoothing; de Brebisson & Vincent 2016, arXiv 1604.08859, for the z-loss; Wijmans et al. 2025,
arXiv 2411.09009, for a loss whose memory does not grow with tokens x words.)

Only a tile of logits exists at a time (`linear_cross_entropy_loops`), elementwise arithmetic is fp32, and so are all sums over tiles.
`linear_cross_entropy` keeps two numbers a token and computes the tiles again in its backward pass: 4 products for the 3 of the unfused path.
`linear_cross_entropy_sum` needs its gradient only up to a factor, and can make it in the forward pass: 3 products.

Over tensor-parallel ranks each holds V/TP rows of W. One all-gather of five numbers a token makes every rank's outputs the same to the bit. The
gradient of h is a sum over ranks: all-reduced here (`reduce_hidden_grad`), or left partial for a caller whose own mapping reduces it, such as
megatron-core's copy_to_ and gather_from_sequence_parallel regions.

Shapes: hidden [..., H], weight [V/TP, H], bias [V/TP], target [...] int64; results [...] fp32. Memory traffic, T tokens, E bytes an element:
E (T H tiles of words + V H tiles of tokens) each time the logits are made, and 8 bytes an fp32 sum and tile.
"""
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import serving
from kernels.checks import check_device, check_dtype, check_integer, check_last_dense, check_shape, rows_of
from kernels.linear_cross_entropy_loops import Head, gradients, gradients_at_once, plan, score

OP = "linear_cross_entropy"


class TokenScores(NamedTuple):
    """Of each token, fp32, 0 where the target is ignored."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *, vocab_size: int | None = None,
                                   temperature: float = 1.0, label_smoothing: float = 0.0, z_loss: float = 0.0,
                                   ignore_index: int = -100) -> TokenScores:
    """The definition in plain PyTorch on one rank, with all logits: what the op is compared with in fp64, and what it replaces."""
    logits = torch.nn.functional.linear(hidden, weight, bias)[..., :vocab_size]
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    logp = logits.log_softmax(-1)
    ignored = target == ignore_index
    logprob = logp.gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    loss = (label_smoothing - 1) * logprob - label_smoothing * logp.mean(-1) + z_loss * logits.logsumexp(-1).square()
    entropy = -(logp.exp() * logp).sum(-1)
    return TokenScores(*(x.masked_fill(ignored, 0) for x in (loss, logprob, entropy)))


def _head(vocab_size: int, group: str, temperature: float, label_smoothing: float, z_loss: float, ignore_index: int, tokens: int, words: int,
          backend: str, target: Tensor) -> Head:
    if target.device.type == "cpu":  # on a GPU that would wait for it: such tokens score NaN there
        wrong = ((target < 0) | (target >= vocab_size)) & (target != ignore_index)
        if bool(wrong.any()):
            raise ValueError(f"{OP}: target has {int(target[wrong][0])}; it must be in 0 .. {vocab_size - 1}, or {ignore_index} to be ignored")
    return Head(vocab_size, group, temperature, label_smoothing, z_loss, ignore_index, tokens, words,
                serving(OP, backend, target.device.type) == "triton")


def _reduced(dhidden: Tensor, dtype: torch.dtype, reduce: bool, head: Head) -> Tensor:
    if reduce and (group := head.ranks()) is not None:
        dist.all_reduce(dhidden, group=group)
    return dhidden.to(dtype)


@torch.library.custom_op("kernels::linear_cross_entropy", mutates_args=())
def _score(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, main_grad: Tensor | None, vocab_size: int, group: str,
           temperature: float, label_smoothing: float, z_loss: float, ignore_index: int, tokens: int, words: int, reduce_hidden_grad: bool,
           backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = _head(vocab_size, group, temperature, label_smoothing, z_loss, ignore_index, tokens, words, backend, target)
    loss, logprob, entropy, top, log_sum = score(hidden, weight, bias, target, head)
    return loss, logprob, entropy, top.clone(), log_sum


@_score.register_fake
def _(hidden, weight, bias, target, *rest):
    return tuple(hidden.new_empty(target.shape, dtype=torch.float32) for _ in range(5))


@torch.library.custom_op("kernels::linear_cross_entropy_backward", mutates_args=("main_grad",))
def _score_backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, main_grad: Tensor | None, top: Tensor, log_sum: Tensor,
                    entropy: Tensor, dloss: Tensor | None, dlogprob: Tensor | None, dentropy: Tensor | None, needed: list[bool], vocab_size: int,
                    group: str, temperature: float, label_smoothing: float, z_loss: float, ignore_index: int, tokens: int, words: int,
                    reduce_hidden_grad: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(vocab_size, group, temperature, label_smoothing, z_loss, ignore_index, tokens, words,
                serving(OP, backend, target.device.type) == "triton")
    planned = plan(target, top, log_sum, entropy, dloss, dlogprob, dentropy, head)
    dhidden, dweight, dbias = gradients(hidden, weight, bias, target, planned, dentropy is not None, main_grad, head, tuple(needed))
    return _reduced(dhidden, hidden.dtype, reduce_hidden_grad, head), dweight, dbias


def _fake_gradients(hidden, weight, bias, needed, wide):
    return (hidden.new_empty(hidden.shape if needed[0] else 0), weight.new_empty(weight.shape if needed[1] else 0, dtype=wide or weight.dtype),
            hidden.new_empty(bias.shape if bias is not None and needed[2] else 0))


@_score_backward.register_fake
def _(hidden, weight, bias, target, main_grad, top, log_sum, entropy, dloss, dlogprob, dentropy, needed, *rest):
    return _fake_gradients(hidden, weight, bias, (needed[0], needed[1] and main_grad is None, needed[2]), None)


def _setup(ctx, inputs, output):
    hidden, weight, bias, target, ctx.main_grad, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(hidden, weight, bias, target, *output[2:])


def _instead(weight: Tensor) -> Tensor | None:
    """What autograd gets for a weight whose gradient is in main_grad: what megatron-core's own fused accumulation hands it.

    Its data-parallel hooks want a tensor to run at all, and read `grad_added_to_main_grad` to know that there is nothing in it.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def _gradients(ctx, dloss, dlogprob, dentropy, *_):
    hidden, weight, bias, target, entropy, top, log_sum = ctx.saved_tensors
    nothing = [None] * len(ctx.settings)
    if dloss is None and dlogprob is None and dentropy is None:
        return None, None, None, None, None, *nothing
    needed = list(ctx.needs_input_grad[:3])
    dhidden, dweight, dbias = torch.ops.kernels.linear_cross_entropy_backward(
        hidden, weight, bias, target, ctx.main_grad if needed[1] else None, top, log_sum, entropy, dloss, dlogprob, dentropy, needed, *ctx.settings)
    if needed[1] and ctx.main_grad is not None:
        dweight = _instead(weight)
    return dhidden if needed[0] else None, dweight if needed[1] else None, dbias if needed[2] else None, None, None, *nothing


_score.register_autograd(_gradients, setup_context=_setup)


@torch.library.custom_op("kernels::linear_cross_entropy_sum", mutates_args=())
def _sum(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, main_grad: Tensor | None, token_weights: Tensor, needed: list[bool],
         vocab_size: int, group: str, temperature: float, label_smoothing: float, z_loss: float, ignore_index: int, tokens: int, words: int,
         reduce_hidden_grad: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = _head(vocab_size, group, temperature, label_smoothing, z_loss, ignore_index, tokens, words, backend, target)
    loss, dhidden, dweight, dbias = gradients_at_once(hidden, weight, bias, target, token_weights, head, tuple(needed), main_grad is not None)
    return ((loss * token_weights).sum(), loss, _reduced(dhidden, hidden.dtype, reduce_hidden_grad, head), dweight, dbias.to(hidden.dtype))


@_sum.register_fake
def _(hidden, weight, bias, target, main_grad, token_weights, needed, *rest):
    return (hidden.new_empty((), dtype=torch.float32), hidden.new_empty(target.shape, dtype=torch.float32),
            *_fake_gradients(hidden, weight, bias, needed, None if main_grad is None else torch.float32))


def _setup_sum(ctx, inputs, output):
    _, ctx.weight, _, _, ctx.main_grad, *ctx.rest = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.made = output[2:]  # not save_for_backward: they are scaled in place and given away, the head's gradient being the largest tensor here


@once_differentiable  # what it scales are constants by now: a second derivative would be wrong
def _gradients_sum(ctx, dtotal, *_):
    nothing = [None] * (2 + len(ctx.rest))
    if dtotal is None:
        return None, None, None, *nothing
    if ctx.made is None:
        raise RuntimeError(f"{OP}_sum: a second backward pass; its gradients were made in the forward pass and given away by the first. "
                           "Pass recompute=True where the graph is kept")
    (dhidden, dweight, dbias), ctx.made = ctx.made, None
    for made in (dhidden, dweight, dbias):
        made.mul_(dtotal)
    needed = ctx.needs_input_grad
    if needed[1] and ctx.main_grad is not None:
        ctx.main_grad.add_(dweight)
        dweight = _instead(ctx.weight)
    return dhidden if needed[0] else None, dweight if needed[1] else None, dbias if needed[2] else None, *nothing


_sum.register_autograd(_gradients_sum, setup_context=_setup_sum)


def _checked(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, main_grad: Tensor | None, vocab_size: int | None, group,
             temperature: float, label_smoothing: float, z_loss: float, ignore_index: int,
             chunk: tuple[int, int] | None) -> tuple[Tensor, Tensor, list]:
    """hidden as rows, target as a row, and the settings of the registered ops, up to the chunk."""
    check_dtype(OP, "hidden", hidden)
    rows = rows_of(OP, "hidden", hidden)
    if not rows.shape[1]:
        raise ValueError(f"{OP}: hidden has shape {tuple(hidden.shape)}; its last dimension must not be empty")
    if weight.dim() != 2:
        raise ValueError(f"{OP}: weight has shape {tuple(weight.shape)}, expected [words, {rows.shape[1]}]")
    check_shape(OP, "weight", weight, (len(weight), rows.shape[1]))
    check_last_dense(OP, "weight", weight)
    check_dtype(OP, "target", target, (torch.int64,))
    check_shape(OP, "target", target, hidden.shape[:-1])
    for name, tensor, shape, dtype in (("weight", weight, weight.shape, hidden.dtype), ("bias", bias, weight.shape[:1], hidden.dtype),
                                       ("main_grad", main_grad, weight.shape, torch.float32), ("target", target, target.shape, torch.int64)):
        if tensor is not None:
            check_dtype(OP, name, tensor, (dtype,))
            check_shape(OP, name, tensor, shape)
            check_device(OP, name, tensor, hidden.device)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{OP}: group is a {type(group).__name__}; it must be a torch.distributed.ProcessGroup or None")
    whole = {"vocab_size": vocab_size, "ignore_index": ignore_index, **{f"chunk[{i}]": n for i, n in enumerate(chunk or ())}}
    for name, value in whole.items():
        if value is not None:
            check_integer(OP, name, value)
    ranks = group.size() if group is not None else 1
    if vocab_size is None:
        vocab_size = len(weight) * ranks
    if not 0 < vocab_size <= len(weight) * ranks:
        raise ValueError(f"{OP}: vocab_size is {vocab_size}, but group has {ranks} ranks with {len(weight)} rows of weight each; "
                         f"it must be in 1 .. {len(weight) * ranks}")
    for name, value, right in (("temperature", temperature, 0 < temperature < float("inf")), ("z_loss", z_loss, 0 <= z_loss < float("inf")),
                               ("label_smoothing", label_smoothing, 0 <= label_smoothing <= 1)):
        if not right:
            raise ValueError(f"{OP}: {name} is {value}; it must be " + {"temperature": "above 0", "z_loss": "at least 0"}.get(name, "in 0 .. 1"))
    if chunk is not None and (len(chunk) != 2 or min(chunk) < 1):
        raise ValueError(f"{OP}: chunk is {chunk}; it must be (tokens, words), both at least 1")
    name = "" if group is None else group.group_name
    return rows, target.reshape(-1), [vocab_size, name, float(temperature), float(label_smoothing), float(z_loss), ignore_index, *(chunk or (0, 0))]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, *, vocab_size: int | None = None, group: dist.ProcessGroup | None = None,
                         bias: Tensor | None = None, temperature: float = 1.0, label_smoothing: float = 0.0, z_loss: float = 0.0,
                         ignore_index: int = -100, chunk: tuple[int, int] | None = None, main_grad: Tensor | None = None,
                         reduce_hidden_grad: bool = True, backend: str = "auto") -> TokenScores:
    """Loss, logprob and entropy of each token; all three differentiable, together or alone.

    Args:
        hidden: [..., H] fp32, bf16 or fp16; the last dimension dense, the leading ones collapsible into rows.
        weight: [V/TP, H], hidden's dtype: this rank's rows of the head.
        target: [...] int64, global ids; any strides.
        vocab_size: words that exist; rows beyond are padding and have no probability. None = all rows.
        group: ranks that split the vocabulary, rank r holding rows r V/TP up to (r + 1) V/TP. All call this, with the same tokens.
        bias: [V/TP], or None.
        temperature: divides the logits, of all three results.
        ignore_index: tokens of this target score 0 and have no gradient. They still cost their products: leave them out where they are many.
        chunk: (tokens, words) of the logits held at a time; None = `tiles.head`. It sets memory and speed, not results beyond rounding.
        main_grad: fp32 [V/TP, H]: the weight's gradient is added into it, and autograd gets none (with megatron-core's
            `grad_added_to_main_grad` on the weight, the placeholder that its hooks expect, and the flag set).
        reduce_hidden_grad: whether hidden's gradient is summed over the group; False = this rank's words alone, for a caller who reduces it.
        backend: triton, torch, or auto.
    Raises:
        TypeError: a wrong dtype, or no process group. ValueError: a wrong shape, device, setting, or (on a CPU) a target that is no word; on a GPU,
            where looking would stall it, such a token's loss, logprob and gradients are NaN. MissingBackend: the backend cannot serve here.
    """
    rows, flat, settings = _checked(hidden, weight, target, bias, main_grad, vocab_size, group, temperature, label_smoothing, z_loss,
                                    ignore_index, chunk)
    found = _score(rows, weight, bias, flat, main_grad, *settings, reduce_hidden_grad, backend)
    return TokenScores(*(x.view(target.shape) for x in found[:3]))


def _recomputes(hidden: Tensor, ranks: int) -> bool:
    """Whether `linear_cross_entropy_sum` computes its logits twice.

    On a GPU, adding into the head's gradient once for every thousand tokens costs what the fourth product does, and holding all words thirty times
    the memory. fp16 needs the loss scale before it rounds. Over ranks the maximum and the sum would be gathered once a chunk. bf16 adds up the
    head's gradient in fp32: 4 V H bytes beside the 12 V tokens of unfused logits, so it must be small beside the tokens.
    """
    few = hidden.dtype == torch.bfloat16 and hidden.numel() < 4 * hidden.shape[-1] ** 2
    return hidden.device.type != "cpu" or ranks > 1 or hidden.dtype == torch.float16 or few


def linear_cross_entropy_sum(hidden: Tensor, weight: Tensor, target: Tensor, token_weights: Tensor, *, vocab_size: int | None = None,
                             group: dist.ProcessGroup | None = None, bias: Tensor | None = None, temperature: float = 1.0,
                             label_smoothing: float = 0.0, z_loss: float = 0.0, ignore_index: int = -100, chunk: tuple[int, int] | None = None,
                             main_grad: Tensor | None = None, reduce_hidden_grad: bool = True, recompute: bool | None = None,
                             backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(sum token_weights loss, loss of each token without gradient): what pretraining calls. Arguments as in `linear_cross_entropy`, and:

    Args:
        token_weights: [...] fp32, such as the loss mask; not differentiable.
        recompute: False makes the gradients in the forward pass (3 products; holds all words of chunk[0] tokens and the head's gradient in fp32; over
            ranks, an all-gather a chunk), True in the backward pass (4 products; holds one tile). None = `_recomputes`.
    Raises: as `linear_cross_entropy`; RuntimeError in a second backward pass through one forward pass without recomputation.
    """
    check_dtype(f"{OP}_sum", "token_weights", token_weights, (torch.float32,))
    check_shape(f"{OP}_sum", "token_weights", token_weights, target.shape)
    check_device(f"{OP}_sum", "token_weights", token_weights, hidden.device)
    if token_weights.requires_grad:
        raise ValueError(f"{OP}_sum: token_weights requires a gradient, and has none here; use linear_cross_entropy, or detach it")
    if recompute is None:
        recompute = _recomputes(hidden, group.size() if group is not None else 1)
    if recompute:
        loss = linear_cross_entropy(
            hidden, weight, target, vocab_size=vocab_size, group=group, bias=bias, temperature=temperature, label_smoothing=label_smoothing,
            z_loss=z_loss, ignore_index=ignore_index, chunk=chunk, main_grad=main_grad, reduce_hidden_grad=reduce_hidden_grad, backend=backend).loss
        return (loss * token_weights).sum(), loss.detach()
    rows, flat, settings = _checked(hidden, weight, target, bias, main_grad, vocab_size, group, temperature, label_smoothing, z_loss,
                                    ignore_index, chunk)
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    total, loss, *_ = _sum(rows, weight, bias, flat, main_grad, token_weights.reshape(-1), needed, *settings, reduce_hidden_grad, backend)
    return total, loss.view(target.shape)
