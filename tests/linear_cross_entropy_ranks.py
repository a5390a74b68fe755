"""A rank of test_linear_cross_entropy_ranks.py: a head split over two ranks against the whole head on one, in many settings.

    python tests/linear_cross_entropy_ranks.py DIRECTORY      under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
"""
import sys
from pathlib import Path

import torch
import torch.distributed as dist

WORDS, ROWS, WIDTH, TOKENS = 90, 64, 16, 21  # 128 rows, 38 of them padding on the last rank
SETTINGS = {"plain": {}, "everything": {"temperature": 0.7, "label_smoothing": 0.1, "z_loss": 1e-2}, "tiled": {"chunk": (8, 32)},
            "few words": {"vocab_size": 50}}  # the last rank has none
CALLS = [(kind, name, backend, dtype) for kind in ("scores", "sum", "sum at once") for name in SETTINGS
         for backend in ("torch", "triton") for dtype in (torch.float32, torch.bfloat16)]


def problem(dtype: torch.dtype, words: int) -> tuple[list, torch.Tensor, list]:
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(*shape, generator=generator).to(dtype) for shape in ((TOKENS, WIDTH), (2 * ROWS, WIDTH), (2 * ROWS,))]
    target = torch.randint(0, words, (TOKENS,), generator=generator)
    target[4] = -100
    return tensors, target, [torch.randn(TOKENS, generator=generator) for _ in range(4)]


def results(kind: str, name: str, backend: str, dtype: torch.dtype, group, reduce_hidden_grad: bool = True) -> list[torch.Tensor]:
    """Outputs and gradients: of the whole head without a group, of this rank's half with one."""
    from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sum

    options = {"vocab_size": WORDS, "reduce_hidden_grad": reduce_hidden_grad, "group": group, "backend": backend, **SETTINGS[name]}
    (hidden, weight, bias), target, douts = problem(dtype, options["vocab_size"])
    if group is not None:
        weight, bias = weight.chunk(2)[group.rank()].clone(), bias.chunk(2)[group.rank()].clone()
    tensors = [x.requires_grad_() for x in (hidden, weight, bias)]
    if kind == "scores":
        outputs = linear_cross_entropy(hidden, weight, target, bias=bias, **options)
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, tensors, douts[:3])]
    total, loss = linear_cross_entropy_sum(hidden, weight, target, douts[3].abs(), bias=bias, recompute=kind == "sum", **options)
    return [total.detach(), loss, *torch.autograd.grad(3 * total, tensors)]


class Counted:
    """How many collectives a call makes."""

    def __enter__(self):
        self.calls, self.kept = [], {name: getattr(dist, name) for name in ("all_gather_into_tensor", "all_reduce")}
        for name, function in self.kept.items():
            setattr(dist, name, lambda *a, _name=name, _function=function, **k: (self.calls.append(_name), _function(*a, **k))[1])
        return self.calls

    def __exit__(self, *_):
        for name, function in self.kept.items():
            setattr(dist, name, function)


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict = {}
    for call in CALLS:
        with Counted() as calls:
            found[call] = results(*call, dist.group.WORLD)
        found[call, "collectives"] = list(calls)
    found["partial"] = results("scores", "plain", "torch", torch.float32, dist.group.WORLD, reduce_hidden_grad=False)
    from kernels.linear_cross_entropy import linear_cross_entropy
    try:
        (hidden, weight, _), target, _ = problem(torch.float32, WORDS)
        linear_cross_entropy(hidden, weight[:40], target, vocab_size=WORDS, group=dist.group.WORLD)
    except ValueError as error:
        found["refused"] = str(error)
    torch.save(found, directory / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
