"""What linear_cross_entropy holds beyond inputs and gradients, against the unfused path.

The torch path is measured: torch's allocator, through its profiler (benchmarks/measure/memory.py), forward and backward. The Triton path cannot run
at a real size without a GPU. Its loops can, on meta tensors, which have sizes and no data, with the two launches left out (they allocate nothing):
`LiveBytes` counts the storages that live. What a GPU adds to that, such as cuBLAS's workspace, is not in the figure.
"""
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from kernels import linear_cross_entropy_loops as loops
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sum

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from measure.memory import peak_bytes

TOKENS, WORDS = 4096, 128_256
CPU = torch.device("cpu")


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live: `live`, and the highest, `peak`. Those of `given` do not count."""

    def __init__(self, *given: torch.Tensor):
        super().__init__()
        self.live = self.peak = 0
        self.known = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in given})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known[storage] = True
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _freed(self, size: int) -> None:
        self.live -= size


def inputs(tokens: int, words: int, width: int, dtype=torch.float32, device="cpu"):
    generator = torch.Generator(device).manual_seed(0) if device == "cpu" else None
    hidden = torch.randn(tokens, width, generator=generator, device=device).to(dtype).requires_grad_()
    weight = torch.randn(words, width, generator=generator, device=device).mul_(width**-0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.zeros(tokens, dtype=torch.int64, device=device)


def unfused(hidden, weight, target):
    """Logits in the weights' dtype, the loss in fp32, as the plain path of the model has it."""
    F.cross_entropy((hidden @ weight.t()).float(), target, reduction="sum").backward()


def scores(hidden, weight, target, **options):
    loss, logprob, entropy = linear_cross_entropy(hidden, weight, target, backend="torch", **options)
    (loss.sum() + logprob.sum() + entropy.sum()).backward()


def summed(hidden, weight, target, **options):
    linear_cross_entropy_sum(hidden, weight, target, torch.ones(len(target)), backend="torch", **options)[0].backward()


def extra(call, tokens: int, words: int, width: int, dtype=torch.float32, **options) -> int:
    """Peak of forward and backward on the CPU, beyond inputs and gradients."""
    hidden, weight, target = inputs(tokens, words, width, dtype)
    gradients = (hidden.numel() + weight.numel()) * hidden.element_size()
    return peak_bytes(lambda: call(hidden, weight, target, **options), CPU) - gradients


@pytest.mark.parametrize(("call", "options"), [(scores, {}), (summed, {"recompute": True}), (summed, {"recompute": False})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tenth_of_the_unfused_path(call, options, dtype):
    """A thirty-second of the vocabulary, and of the width that goes with it."""
    sizes = TOKENS, WORDS // 32, 32
    ours, theirs = extra(call, *sizes, dtype, **options), extra(unfused, *sizes, dtype)
    assert theirs > 2 * 4 * TOKENS * (WORDS // 32) and ours <= theirs / 10, f"{ours / 1e6:.1f} MB, unfused {theirs / 1e6:.1f} MB"


@pytest.mark.campaign
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tenth_of_the_unfused_path_at_full_size(dtype):
    theirs = extra(unfused, TOKENS, WORDS, 512, dtype)
    for call, options in ((scores, {}), (summed, {})):
        ours = extra(call, TOKENS, WORDS, 512, dtype, **options)
        print(f"{call.__name__} {dtype}: {ours / 1e6:.1f} MB, unfused {theirs / 1e6:.1f} MB, 1/{theirs / ours:.0f}")
        assert ours <= theirs / 10


def test_it_grows_with_the_tile():
    """Not with tokens x words: 16 times as many logits, the same tile."""
    def both(tokens, words):
        return extra(scores, tokens, words, 16, chunk=(512, 512)), extra(summed, tokens, words, 16, chunk=(64, 512), recompute=False)

    small, large, wide = both(1024, 2048), both(4096, 2048), both(4096, 8192)
    a_token = 4096 * 40 * 4  # five numbers a token, and what is made of them
    assert large[0] <= small[0] + a_token and wide[0] <= small[0] + a_token
    assert large[1] <= small[1] + a_token
    assert wide[1] <= small[1] + a_token + 64 * (8192 - 2048) * 4  # all words of 64 tokens
    assert extra(scores, 1024, 2048, 16, chunk=(1024, 1024)) > 2 * small[0]


def on_meta(width: int, dtype) -> tuple[int, int]:
    """Peaks beyond inputs and gradients at the full size, of the Triton path and of the unfused one."""
    hidden, weight, target = inputs(TOKENS, WORDS, width, dtype, "meta")
    with LiveBytes(hidden, weight, target) as count:
        unfused(hidden, weight, target)
    gradients = (hidden.numel() + weight.numel()) * hidden.element_size()
    theirs, hidden, weight = count.peak - gradients, hidden.detach(), weight.detach()
    head = loops.Head(WORDS, "", 1.0, 0.0, 0.0, -100, 0, 0, True)
    with LiveBytes(hidden, weight, target) as count:
        loss, logprob, entropy, top, log_sum = loops.score(hidden, weight, None, target, head)
        plan = loops.plan(target, top, log_sum, entropy, loss, logprob, entropy, head)
        dhidden, dweight, _ = loops.gradients(hidden, weight, None, target, plan, True, None, head, (True, True, False))
        kept = dhidden.to(hidden.dtype), dweight
    return count.peak - sum(x.numel() * x.element_size() for x in kept), theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundredth_of_the_unfused_path_in_triton(dtype, monkeypatch):
    monkeypatch.setattr(loops.fused, "statistics", lambda *a: None)
    monkeypatch.setattr(loops.fused, "gradient", lambda *a: None)
    ours, theirs = on_meta(1024, dtype)
    print(f"{dtype}: {ours / 1e6:.1f} MB, unfused {theirs / 1e6:.1f} MB, 1/{theirs / ours:.0f}")
    assert ours <= theirs / 100, f"{ours / 1e6:.1f} MB, unfused {theirs / 1e6:.1f} MB"


@pytest.mark.parametrize("call", [unfused, scores])
def test_both_counts_agree(call):
    """What `LiveBytes` sees of real tensors is what torch's allocator hands out."""
    hidden, weight, target = inputs(300, 500, 16)
    body = call if call is unfused else lambda h, w, t: loops.score(h, w, None, t, loops.Head(500, "", 1.0, 0.1, 0.0, -100, 64, 64, False))
    with torch.set_grad_enabled(call is unfused):
        measured = peak_bytes(lambda: body(hidden, weight, target), CPU)
        hidden.grad = weight.grad = None
        with LiveBytes(hidden, weight, target) as count:
            body(hidden, weight, target)
    assert count.peak == pytest.approx(measured, rel=0.05)
