"""A rank of test_context_parallel.py: ring and Ulysses against the same attention on one rank, which every rank computes by itself.

    python tests/context_parallel_ranks.py DIRECTORY      under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT

Writes DIRECTORY/rankN.json: for each case the errors of this rank's part against fp64, {"ring dense causal grouped float32":
{"out": [ours, PyTorch's, largest value], "dq": ...}}, and for each refusal its message.
"""
import json
import sys
from itertools import product
from pathlib import Path

from spawn import spawn

SEQUENCES = (8, 0, 24, 16)  # packed, in units of which 2 ranks take a multiple of 4 and 4 ranks a multiple of 8
HEADS = {"grouped": (8, 4), "one group": (4, 1), "every head": (4, 4)}


def main(directory: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    facts: dict[str, dict] = {}
    for (heads, (h, g)), packed, causal, dtype in product(HEADS.items(), (False, True), (True, False), ("float32", "bfloat16")):
        if heads != "grouped" and dtype != "float32":
            continue
        facts |= compare(rank, size, h, g, packed, causal, getattr(torch, dtype), f"{'packed' if packed else 'dense'} "
                         f"{'causal' if causal else 'bidirectional'} {heads} {dtype}")
    facts["bits"] = same_bits(rank, size)
    facts["refused"] = refusals(rank, size)
    facts["long"] = long_messages(rank, size)
    (directory / f"rank{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


def inputs(h: int, g: int, packed: bool, dtype):
    """q, k, v and dout of the whole sequences, the same on every rank: views of one projection, as in the model."""
    import torch

    shape = (sum(SEQUENCES),) if packed else (24, 2)
    generator = torch.Generator().manual_seed(7)
    mixed = torch.randn(*shape, h + 2 * g, 16, generator=generator).to(dtype)
    return [*mixed.split((h, g, g), dim=-2), torch.randn(*shape, h, 16, generator=generator).to(dtype)]


def gradients(function, q, k, v, dout):
    import torch

    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = function(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def compare(rank: int, size: int, h: int, g: int, packed: bool, causal: bool, dtype, name: str) -> dict[str, dict]:
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from kernels.attention import attention_reference
    from kernels.context_parallel import ring_attention, ulysses_attention, zigzag_packed_positions, zigzag_split

    lengths = SEQUENCES if packed else (24,)
    whole = inputs(h, g, packed, dtype)
    cu = F.pad(torch.tensor(SEQUENCES).cumsum(0), (1, 0)).int() if packed else None

    def alone(q, k, v):
        if not packed:
            return torch_attention(q, k, v)
        parts = zip(*(x.split(lengths) for x in (q, k, v)))
        return torch.cat([torch_attention(*(x[:, None] for x in part))[:, 0] for part in parts if part[0].shape[0]])

    def torch_attention(q, k, v):
        """In fp64 the definition, else torch's op (see test_attention.py)."""
        if q.dtype == torch.float64:
            return attention_reference(q, k, v, causal=causal)
        return F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), is_causal=causal, enable_gqa=True).permute(2, 0, 1, 3)

    def mine(x):
        return x[zigzag_packed_positions(cu, rank, size)] if packed else zigzag_split(x, 0, rank, size)

    exact, plain = gradients(alone, *(x.double() for x in whole)), gradients(alone, *whole)
    found = {}
    for method, function in (("ring", ring_attention), ("ulysses", ulysses_attention)):
        if method == "ulysses" and g % size and size % g:
            continue
        ours = gradients(lambda q, k, v, function=function: function(q, k, v, group=dist.group.WORLD, causal=causal, cu_seqlens=cu), *(mine(x) for x in whole))
        found[f"{method} {name}"] = {
            part: [(o.double() - mine(e)).abs().max().item(), (p.double() - e).abs().max().item(), e.abs().max().item()]
            for part, o, e, p in zip(("out", "dq", "dk", "dv"), ours, exact, plain, strict=True)}
    return found


def same_bits(rank: int, size: int) -> bool:
    import torch
    import torch.distributed as dist

    from kernels.context_parallel import ring_attention, ulysses_attention, zigzag_split

    parts = [zigzag_split(x, 0, rank, size) for x in inputs(8, 4, False, torch.bfloat16)]
    return all(
        all(map(torch.equal, *(gradients(lambda q, k, v, function=function: function(q, k, v, group=dist.group.WORLD, causal=True), *parts) for _ in range(2))))
        for function in (ring_attention, ulysses_attention))


def long_messages(rank: int, size: int) -> float:
    """Messages of megabytes, which gloo does not buffer, in both directions between the same ranks, with other point-to-point traffic under way."""
    import torch
    import torch.distributed as dist

    from kernels.attention import attention
    from kernels.context_parallel import ring_attention, zigzag_split

    generator = torch.Generator().manual_seed(1)
    whole = [torch.randn(1024, 1, 8, 64, generator=generator) for _ in range(4)]
    noise, heard = torch.full((4,), float(rank)), torch.zeros(4)
    other = [dist.isend(noise, (rank + 1) % size), dist.irecv(heard, (rank - 1) % size)]
    expected = gradients(lambda q, k, v: attention(q, k, v, causal=True), *whole)
    ours = gradients(lambda q, k, v: ring_attention(q, k, v, group=dist.group.WORLD, causal=True), *(zigzag_split(x, 0, rank, size) for x in whole))
    for work in other:
        work.wait()
    assert heard[0] == (rank - 1) % size
    return max((o - zigzag_split(e, 0, rank, size)).abs().max().item() for o, e in zip(ours, expected))


def refusals(rank: int, size: int) -> dict[str, str]:
    import torch
    import torch.distributed as dist

    from kernels.context_parallel import ring_attention, ulysses_attention

    q, k, v, _ = inputs(8, 4, False, torch.float32)
    tokens = [x[:12, 0] for x in (q, k, v)]
    group = dist.group.WORLD
    only_first = dist.new_group([0])
    odd = torch.tensor([0, 6, 12 * size], dtype=torch.int32)
    short = torch.tensor([0, 4 * size], dtype=torch.int32)
    calls = {
        "odd": lambda f: f(q[:5], k[:5], v[:5], group=group, causal=True),
        "length": lambda f: f(*tokens, group=group, causal=True, cu_seqlens=odd),
        "total": lambda f: f(*tokens, group=group, causal=True, cu_seqlens=short),
        "keys": lambda f: f(q[:4], k, v, group=group, causal=True),
        "dtype": lambda f: f(q, k.bfloat16(), v, group=group, causal=True),
        "group": lambda f: f(q, k, v, group=only_first if rank else None, causal=True),
        "heads": lambda f: f(q[:, :, :3], k[:, :, :1], v[:, :, :1], group=group, causal=True),
        "groups": lambda f: f(q.repeat(1, 1, 3, 1), k.repeat(1, 1, 2, 1)[:, :, :3], v.repeat(1, 1, 2, 1)[:, :, :3], group=group, causal=True),
        "backend": lambda f: f(q, k, v, group=group, causal=True, backend="varlen"),
    }
    found = {}
    for name, call in calls.items():
        for function in (ring_attention, ulysses_attention):
            if (name, function) not in (("heads", ring_attention), ("groups", ring_attention)):
                try:
                    call(function)
                    found[f"{function.__name__} {name}"] = "not refused"
                except (TypeError, ValueError) as error:
                    found[f"{function.__name__} {name}"] = f"{type(error).__name__}: {error}"
    return found


def run(directory: Path, ranks: int, timeout: float = 300) -> list[dict]:
    """Starts the ranks; the facts of each."""
    spawn([__file__, str(directory)], ranks, timeout=timeout)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(ranks)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
