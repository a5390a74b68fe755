"""The head fused with its loss: `kernels/linear_cross_entropy.py` against logits in memory, time and peak memory, forward and backward.

    python benchmarks/bench_linear_cross_entropy.py [--quick] [--threads 1] [--output DIR]

Two cases a shape: `linear_cross_entropy_sum` (the sum of the losses; what pretraining calls) and `linear_cross_entropy` (loss, logprob and entropy of
each token). "eager" and "compile" have logits in the dtype of the weights and the loss in fp32, as the model's plain path; "eager-narrow" leaves the
loss in 16 bits too. `peak_mb` holds outputs and gradients as well; beyond them it is measured in tests/test_linear_cross_entropy_memory.py.
"""
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from harness import Case, compiled, main, optional

from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, linear_cross_entropy_sum

SIZES = {"cpu": [(1024, 512, 8192), (2048, 1024, 32768)], "cuda": [(4096, 2048, 128256), (8192, 4096, 128256), (8192, 8192, 32768)]}


def liger(target: torch.Tensor) -> Callable:
    def build(module):
        loss = module.LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return lambda h, w: loss(w, h, target).float()

    return build


def cases(device: str) -> Iterator[Case]:
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
    for tokens, width, words in SIZES[device]:
        target = torch.randint(0, words, (tokens,), generator=torch.Generator().manual_seed(1)).to(device)
        ones = torch.ones(tokens, device=device)
        for dtype in dtypes:
            size = torch.finfo(dtype).bits // 8

            def make(generator, device, tokens=tokens, width=width, words=words, dtype=dtype):
                hidden = torch.randn(tokens, width, generator=generator, device=device)
                weight = torch.randn(words, width, generator=generator, device=device) * width**-0.5
                return hidden.to(dtype), weight.to(dtype)

            def summed(target=target, ones=ones, **options):
                return lambda h, w: linear_cross_entropy_sum(h, w, target, ones, **options)[0]

            def scores(target=target, **options):
                return lambda h, w: tuple(linear_cross_entropy(h, w, target, **options))

            def eager(h, w, target=target):
                logits = h @ w.t()
                return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target, reduction="sum")

            def narrow(h, w, target=target):
                return F.cross_entropy(h @ w.t(), target, reduction="sum").float()

            def eager_scores(h, w, target=target):
                return tuple(linear_cross_entropy_reference(h, w, target))

            shape, flops = f"{tokens}x{width}x{words}", 2.0 * tokens * width * words
            moved = size * (tokens * width + words * width)
            providers = {"ours": summed(), "ours-torch": summed(backend="torch"), "ours-at-once": summed(recompute=False),
                         "ours-twice": summed(recompute=True), "eager": eager, "eager-narrow": narrow}
            if device == "cuda":
                providers |= {"compile": compiled(eager), "liger": optional("liger_kernel.transformers", liger(target))}
            yield Case(op="linear_cross_entropy_sum", shape=shape, dtype=dtype, make=make, providers=providers, reference=eager,
                       bytes_forward=moved, bytes_backward=2 * moved, flops_forward=flops, flops_backward=2 * flops, memory_bound=False,
                       modes=("both",))
            providers = {"ours": scores(), "ours-torch": scores(backend="torch"), "eager": eager_scores}
            if device == "cuda":
                providers |= {"compile": compiled(eager_scores)}
            yield Case(op="linear_cross_entropy", shape=shape, dtype=dtype, make=make, providers=providers, reference=eager_scores,
                       bytes_forward=moved, bytes_backward=2 * moved, flops_forward=flops, flops_backward=2 * flops, memory_bound=False)


if __name__ == "__main__":
    main(cases)
