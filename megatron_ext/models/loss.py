"""Cross-entropy over a vocabulary that is split over the tensor-parallel ranks, without gathering the logits.

    loss = log sum_v exp(l_v) - l_target,        d loss / d l_v = softmax(l)_v - [v = target]

megatron-core's own function takes its group from a global and reads the padding of the vocabulary as words. Here padded columns have no
probability, so that the loss does not depend on how far the table was padded. fp32 whatever the logits' dtype.
"""
import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, vocab_size: int, group) -> Tensor:
        ranks, width = group.size(), logits.shape[-1]
        first = group.rank() * width
        logits = logits.float()
        if first + width > vocab_size:
            logits = logits.clone()
            logits[..., max(vocab_size - first, 0):] = float("-inf")
        top = logits.amax(-1)
        if ranks > 1:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        shifted = logits - top.unsqueeze(-1)
        local = target - first
        here = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1).unsqueeze(-1)
        picked = torch.where(here, shifted.gather(-1, local).squeeze(-1), 0.0)
        weights = shifted.exp_()
        sums = torch.stack((weights.sum(-1), picked))
        if ranks > 1:
            dist.all_reduce(sums, group=group)
        total, picked = sums
        ctx.save_for_backward(weights.div_(total.unsqueeze(-1)), local, here)
        return total.log() - picked

    @staticmethod
    def backward(ctx, grad: Tensor):
        probabilities, local, here = ctx.saved_tensors
        grad_logits = probabilities * grad.unsqueeze(-1)
        grad_logits.scatter_add_(-1, local, torch.where(here, -grad, 0.0).unsqueeze(-1))
        return grad_logits, None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, target: Tensor, *, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """-log p(target), per position.

    Args:
        logits: [..., V/TP], this rank's columns of the padded vocabulary; any floating dtype.
        target: [...], int64, global token ids below `vocab_size`.
        vocab_size: words that exist; columns beyond are padding.
        group: the tensor-parallel group.
    Returns:
        [...] fp32, the same on every rank of the group.
    """
    return _VocabParallelCrossEntropy.apply(logits, target, vocab_size, group)
