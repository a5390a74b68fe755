"""Attention, softmax(scale q k^T) v: dense and causal, packed documents, and a decoding step with mask and cache.

`eager` is torch's scaled_dot_product_attention called as a model without this op calls it: with the mask of documents where they are packed.
Sizes: 8,192 tokens, 32 heads of 128 in 8 groups on a GPU; a small model's on CPU. Bound by arithmetic but for the decoding step.
"""
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Case, NotInstalled, compiled, main, optional

from kernels.attention import attention, attention_reference, cu_seqlens_of
from kernels.backend import MissingBackend, choose

DENSE = ("flash-attn-3", "flash-attn-4", "flash-attn-2", "transformer-engine")
PACKED = (*DENSE, "varlen", "flex")


def sdpa(q, k, v, *, mask=None, causal=False):
    """torch's op on [seq, batch, heads, d]; True in the mask hides."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else ~mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.permute(2, 0, 1, 3)


def documents(batch: int, seq: int, device) -> torch.Tensor:
    """Documents of 1 to seq / 4 tokens, the same on every machine."""
    starts = torch.rand(batch, seq, generator=torch.Generator().manual_seed(3)) < 8 / seq
    return starts.long().cumsum(1).to(device)


def drawn(generator, device, dtype, queries, keys, batch, heads, groups, size):
    shapes = ((queries, heads), (keys, groups), (keys, groups))
    return [torch.randn(n, batch, h, size, generator=generator, device=device).to(dtype) for n, h in shapes]


def library(backend: str, call, device: str):
    """A provider that is one backend of the op."""
    def build():
        try:
            choose("attention", backend, device=device)
        except MissingBackend as missing:
            raise NotInstalled(missing.reason) from None
        return lambda *inputs: call(*inputs, backend=backend)

    return optional("kernels.attention", build)


def cases(device: str) -> Iterator[Case]:
    on_gpu = device == "cuda"
    batch, seq, heads, groups, size = (4, 8192, 32, 8, 128) if on_gpu else (4, 512, 8, 4, 64)
    for dtype in (torch.bfloat16, torch.float32):
        unit = batch * seq * heads * size * dtype.itemsize
        traffic, share = 2 * unit + 2 * unit * groups // heads, 2  # a causal matrix is half of the square
        flops = 4 * batch * heads * seq * seq * size / share

        def dense(q, k, v, backend="auto"):
            return attention(q, k, v, causal=True, backend=backend)

        def ring_part(q, k, v):
            return attention(q, k, v, causal=True, return_lse=True)[0]

        yield Case(
            op="attention", shape=f"causal {batch}x{seq}x{heads}/{groups}x{size}", dtype=dtype,
            make=lambda generator, device, dtype=dtype: drawn(generator, device, dtype, seq, seq, batch, heads, groups, size),
            providers={"ours": dense, "ours-lse": ring_part, "eager": lambda q, k, v: sdpa(q, k, v, causal=True),
                       "compile": compiled(lambda q, k, v: sdpa(q, k, v, causal=True)), **{name: library(name, dense, device) for name in DENSE}},
            reference=None if on_gpu else lambda q, k, v: attention_reference(q, k, v, causal=True),
            bytes_forward=traffic, bytes_backward=2 * traffic + unit, flops_forward=flops, flops_backward=2.5 * flops, memory_bound=False)

        runs = documents(batch, seq, device)
        cu = cu_seqlens_of(runs)
        longest = int(cu.diff().max())
        hidden = (runs[:, :, None] != runs[:, None])[:, None] | torch.ones(seq, seq, dtype=torch.bool, device=device).triu(1)
        flops = 2 * heads * size * float((cu.diff().double() ** 2).sum())

        def packed(q, k, v, backend="auto", cu=cu, longest=longest):
            flat = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))  # rows one after the other
            out = attention(*flat, causal=True, cu_seqlens_q=cu, max_seqlen_q=longest, max_seqlen_k=longest, backend=backend)
            return out.unflatten(0, (batch, seq)).transpose(0, 1)

        yield Case(
            op="attention", shape=f"packed {batch}x{seq}x{heads}/{groups}x{size}", dtype=dtype,
            make=lambda generator, device, dtype=dtype: drawn(generator, device, dtype, seq, seq, batch, heads, groups, size),
            providers={"ours": packed, "eager": lambda q, k, v, hidden=hidden: sdpa(q, k, v, mask=hidden),
                       "compile": compiled(lambda q, k, v, hidden=hidden: sdpa(q, k, v, mask=hidden)),
                       **{name: library(name, packed, device) for name in PACKED}},
            reference=None if on_gpu else lambda q, k, v, hidden=hidden: attention_reference(q, k, v, hidden, causal=False),
            bytes_forward=traffic, bytes_backward=2 * traffic + unit, flops_forward=flops, flops_backward=2.5 * flops, memory_bound=False)

        rows = 64 if on_gpu else 16
        mask = torch.arange(seq, device=device) >= torch.linspace(seq // 2, seq, rows, device=device)[:, None, None, None]
        cache = 2 * rows * seq * groups * size * dtype.itemsize
        yield Case(
            op="attention", shape=f"decode {rows}x{seq}x{heads}/{groups}x{size}", dtype=dtype,
            make=lambda generator, device, dtype=dtype, rows=rows, seq=seq: drawn(generator, device, dtype, 1, seq, rows, heads, groups, size),
            providers={"ours": lambda q, k, v, mask=mask: attention(q, k, v, causal=False, mask=mask),
                       "eager": lambda q, k, v, mask=mask: sdpa(q, k, v, mask=mask)},
            reference=lambda q, k, v, mask=mask: attention_reference(q, k, v, mask, causal=False),
            bytes_forward=cache, flops_forward=4 * rows * heads * seq * size, differentiable=(), modes=("forward",))


if __name__ == "__main__":
    main(cases)
