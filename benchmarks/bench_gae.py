"""Generalised advantage estimation: `kernels/gae.py` against the loop over time that it replaces, packed and padded.

No `torch.compile` provider: it unrolls the loop over time, and compiles for minutes at 1,024 positions.

    python benchmarks/bench_gae.py [--quick] [--output FILE]
"""
from collections.abc import Iterator

import torch
from harness import Case, main

from kernels.gae import gae, gae_reference


def cases(device: str) -> Iterator[Case]:
    shapes = [(64, 1024), (512, 1024)] if device == "cpu" else [(512, 1024), (1024, 4096), (64, 16384)]
    for batch, seq in shapes:
        offsets = torch.arange(batch + 1, device=device) * seq

        def make(generator, device, batch=batch, seq=seq):
            return tuple(torch.randn(batch, seq, generator=generator, device=device) for _ in range(2))

        def packed(backend, offsets=offsets, batch=batch, seq=seq):
            def run(r, v):
                advantages, returns = gae(r.view(-1), v.view(-1), cu_seqlens=offsets, gamma=0.99, backend=backend)
                return advantages.view(batch, seq), returns.view(batch, seq)
            return run

        yield Case(
            op="gae", shape=f"{batch}x{seq}", dtype=torch.float32, make=make,
            providers={
                "ours": lambda r, v: gae(r, v, gamma=0.99), "ours-torch": lambda r, v: gae(r, v, gamma=0.99, backend="torch"),
                "ours-packed": packed("auto"), "eager": lambda r, v: gae_reference(r, v, 0.99, 0.95),
            },
            reference=lambda r, v: gae_reference(r, v, 0.99, 0.95), bytes_forward=4 * 4 * batch * seq, differentiable=())


if __name__ == "__main__":
    main(cases)
