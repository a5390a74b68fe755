"""Rotary embedding of queries and keys, and its backward, at the head shapes of Llama models ("seq x batch x heads/groups x d"), half-rotation and
interleaved. Queries and keys are dense [seq, batch, heads, d]. Libraries that want another layout or another form of the tables get it outside the
timed call where the layout is theirs to choose, and inside where a megatron-core model would have to make it."""
from collections.abc import Iterator
from functools import partial

import torch
from harness import Case, compiled, main, optional

from kernels.rope import inverse_frequencies, rope, rope_reference, rope_tables

GPU = ((8192, 1, 16, 16, 128), (8192, 1, 32, 8, 128), (8192, 1, 64, 8, 128), (8192, 1, 128, 8, 128))  # heads x d = 2,048 to 16,384
CPU = ((2048, 1, 16, 8, 64), (2048, 1, 22, 22, 128), (2048, 1, 32, 8, 128))


def flash(cos, sin, interleaved, module):
    """flash-attn's takes [batch, seq, heads, d] and one tensor at a time."""
    def one(x):
        return module.apply_rotary_emb(x.transpose(0, 1), cos[:, 0], sin[:, 0], interleaved=interleaved).transpose(0, 1)

    return lambda q, k: (one(q), one(k))


def liger(cos, sin, module):
    """Liger's takes [batch, heads, seq, d] and tables [1, seq, d]. It turns dense inputs in place: its time is
    comparable, and its inputs are spent after one call."""
    wide = [torch.cat((t, t), dim=-1).transpose(0, 1).contiguous() for t in (cos, sin)]

    def both(q, k):
        turned = module.LigerRopeFunction.apply(*(x.permute(1, 2, 0, 3) for x in (q, k)), *wide)
        return tuple(x.permute(2, 0, 1, 3) for x in turned)

    return both


def transformer_engine(angles, interleaved, module):
    def both(q, k):
        return tuple(module.apply_rotary_pos_emb(x, angles, tensor_format="sbhd", fused=True, interleaved=interleaved) for x in (q, k))

    return both


def cases(device: str) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for interleaved in (False, True):
            for seq, batch, heads, groups, dim in GPU if device == "cuda" else CPU:
                positions, inverse = torch.arange(seq, device=device).unsqueeze(1), inverse_frequencies(dim, 500_000.0, device=device)
                cos, sin = rope_tables(positions, inverse)
                angles = (positions.unsqueeze(-1) * inverse).float()
                angles = (angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)).unsqueeze(2)
                ours = partial(rope, cos=cos, sin=sin, interleaved=interleaved)
                reference = partial(rope_reference, cos=cos, sin=sin, interleaved=interleaved)
                moved = 2 * seq * batch * (heads + groups) * dim * dtype.itemsize + 2 * cos.numel() * 4
                providers = {
                    "ours": ours, "ours-torch": partial(ours, backend="torch"), "eager": reference, "compile": compiled(reference),
                    "te": optional("transformer_engine.pytorch.attention.rope", partial(transformer_engine, angles, interleaved)),
                    "flash-attn": optional("flash_attn.layers.rotary", partial(flash, cos, sin, interleaved)),
                }
                if not interleaved:
                    providers["liger"] = optional("liger_kernel.ops.rope", partial(liger, cos, sin))
                yield Case(
                    op="rope_interleaved" if interleaved else "rope", shape=f"{seq}x{batch}x{heads}/{groups}x{dim}", dtype=dtype,
                    make=lambda generator, device, shape=(seq, batch, heads, groups, dim), dtype=dtype: tuple(
                        torch.randn(*shape[:2], n, shape[4], generator=generator, device=device).to(dtype) for n in shape[2:4]),
                    providers=providers, reference=reference, bytes_forward=moved, bytes_backward=moved)


if __name__ == "__main__":
    main(cases)
