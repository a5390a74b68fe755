"""AdamW: the fused update that `kernels/adamw.py` uses, against a loop over tensors, torch._foreach_*, and torch.optim.AdamW.

    python benchmarks/bench_adamw.py [--threads N] [--device cpu|cuda]

Prints milliseconds a step (median of the repeats) for the shapes of a 4-layer, hidden-256 Llama with a vocabulary of 2,048, and for the
same numbers as one flat tensor, which is what a rank of the distributed optimizer holds.
"""
import argparse
import statistics
import time
from collections.abc import Callable

import torch

from kernels.adamw import AdamW, adamw_reference_

HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def model_shapes() -> list[tuple[int, ...]]:
    layer = [(768, 256), (256, 256), (1408, 256), (256, 704), (256,), (256,)]
    return [(2048, 256), (2048, 256), (256,), *layer * 4]


def foreach_update(params: list, grads: list, first: list, second: list, step: int) -> None:
    (b1, b2), lr = HYPER["betas"], HYPER["lr"]
    torch._foreach_mul_(params, 1 - lr * HYPER["weight_decay"])
    torch._foreach_lerp_(first, grads, 1 - b1)
    torch._foreach_mul_(second, b2)
    torch._foreach_addcmul_(second, grads, grads, 1 - b2)
    bottom = torch._foreach_sqrt(second)
    torch._foreach_div_(bottom, (1 - b2**step) ** 0.5)
    torch._foreach_add_(bottom, HYPER["eps"])
    torch._foreach_addcdiv_(params, first, bottom, -lr / (1 - b1**step))


def milliseconds(update: Callable[[int], object], device: str, repeats: int) -> float:
    times = []
    for step in range(1, repeats + 4):
        begin = time.perf_counter()
        update(step)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[3:])


def candidates(shapes: list[tuple[int, ...]], device: str) -> dict[str, Callable[[int], object]]:
    def tensors(zero: bool = False) -> list:
        return [(torch.zeros if zero else torch.randn)(s, device=device) for s in shapes]

    def optimizer(cls: type, **options: object) -> Callable[[int], object]:
        params = [torch.nn.Parameter(t) for t in tensors()]
        for p, g in zip(params, tensors(), strict=True):
            p.grad = g
        built = cls(params, **HYPER, **options)
        return lambda _: built.step()

    p, g, m, v = tensors(), tensors(), tensors(True), tensors(True)
    return {
        "kernels.adamw.AdamW": optimizer(AdamW),
        "torch.optim.AdamW(fused=True)": optimizer(torch.optim.AdamW, fused=True),
        "torch.optim.AdamW(foreach=True)": optimizer(torch.optim.AdamW, foreach=True),
        "torch._foreach_*": lambda step: foreach_update(p, g, m, v, step),
        "loop over tensors": lambda step: [adamw_reference_(*row, step=step, **HYPER) for row in zip(p, g, m, v, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, shapes in (("model", model_shapes()), ("flat", [(sum(torch.Size(s).numel() for s in model_shapes()),)])):
        numbers = sum(torch.Size(s).numel() for s in shapes)
        print(f"{name}: {numbers / 1e6:.2f} M parameters in {len(shapes)} tensors, {options.device}, {options.threads} thread(s)")
        for label, update in candidates(shapes, options.device).items():
            print(f"  {label:34s}{milliseconds(update, options.device, options.repeats):9.2f} ms")


if __name__ == "__main__":
    with torch.no_grad():
        main()
