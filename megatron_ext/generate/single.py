"""The decoder's forward pass for one new token a row, on the modules' own weights.

    h <- h + W_o attention(rope(W_qkv norm(h)), cache),    h <- h + W_2 f(W_1 norm(h)),    logits = W norm(h)      (or as models/blocks.py has it)

For one token the Python around megatron-core's layers (autograd functions, permutations, angles turned into cosines in each layer, ...)
takes longer than their arithmetic. Here it is left out: rotary cosines are made once a step, the query heads of a group are taken as the
queries of their key head. It computes what `Decoder.forward` does (tests hold the two together) and serves layers made of exactly the
modules below; any other layer goes through its own forward pass.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_ext.generate.cache import StageCache
from megatron_ext.generate.packed import Linear
from megatron_ext.models.attention import CoreAttention, LayerCache
from megatron_ext.models.blocks import BLOCKS
from megatron_ext.models.decoder import Decoder
from megatron_ext.models.fused import FusedNorm, FusedSelfAttention, HeadNorm, PlainSelfAttention, rotary_tables
from megatron_ext.models.lora import Adapted, active
from megatron_ext.models.norm import Norm

KINDS = {
    "": tuple({kind for kinds in BLOCKS.values() for kind in kinds}),
    "input_layernorm": (Norm, FusedNorm),
    "self_attention": (PlainSelfAttention, FusedSelfAttention),
    "self_attention.linear_qkv": ColumnParallelLinear,
    "self_attention.q_layernorm": (IdentityOp, type(None), Norm, HeadNorm),
    "self_attention.k_layernorm": (IdentityOp, type(None), Norm, HeadNorm),
    "self_attention.core_attention": CoreAttention,
    "self_attention.linear_proj": RowParallelLinear,
    "cross_attention": IdentityOp,
    "pre_mlp_layernorm": (Norm, FusedNorm, IdentityOp),
    "mlp": MLP,
    "mlp.linear_fc1": ColumnParallelLinear,
    "mlp.linear_fc2": RowParallelLinear,
}


def knows(model: Decoder) -> bool:
    """Whether all layers are made of the modules that are spelled out here."""
    config = model.config
    if config.num_query_groups < model.tp_group.size() or config.fp32_residual_connection:
        return False
    for layer in model.decoder.layers:
        for path, kinds in KINDS.items():
            part = layer
            for name in path.split(".") if path else ():
                part = getattr(part, name, None)
            kind = part.kind if isinstance(part, Adapted) else type(part)
            if kind not in (kinds if isinstance(kinds, tuple) else (kinds,)):
                return False
    return True


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one token: q [rows, groups, heads of a group, d], k and v [rows, groups, keys, d], mask [rows, 1, 1, keys] to add or
    None -> as q."""
    if q.device.type != "cpu" or q.dtype != torch.float32:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    # torch's CPU kernel is made for many queries; for one, two batched products are faster.
    scores = torch.bmm((q * scale).flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    if mask is not None:
        scores.view(*q.shape[:3], -1).add_(mask)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(q.shape)


norm = Norm.forward  # torch's: for one token a row the way into a fused kernel takes longer than the norm


class SingleToken:
    """Called with tokens [rows], positions [rows, 1], hides (bool [rows, 1, 1, keys], True hides, or None), hidden ([1, rows, hidden] of
    the stage before) and the cache; returns [1, rows, hidden], or on the last stage this rank's columns of the logits [rows, V / TP]."""

    def __init__(self, model: Decoder, *, pack: bool = True):
        self.model, self.config, self.group = model, model.config, model.tp_group
        self.parallel = self.group.size() > 1
        self._linear = Linear(pack=pack)

    def __call__(self, tokens: Tensor, positions: Tensor, hides: Tensor | None, hidden: Tensor | None, cache: StageCache) -> Tensor:
        model = self.model
        h = (model.embedding(tokens[:, None], positions) if model.pre_process else hidden)[0]
        mask = None if hides is None else torch.zeros(hides.shape, dtype=h.dtype, device=h.device).masked_fill_(hides, float("-inf"))
        rotation = self._rotation(positions, h.dtype)
        block = {"serial": self._serial, "post_norm": self._post_norm}.get(self.config.block, self._beside)
        for layer, kept in zip(model.decoder.layers, cache.layers):
            h = block(layer, h, rotation, mask, kept)
        self._linear.passed()
        if not model.post_process:
            return h[None]
        weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else model.output_layer.weight
        if model.decoder.final_layernorm is not None:
            h = norm(model.decoder.final_layernorm, h)
        if model.project_out is not None:
            h = model.project_out(h)
        return self._linear(h, weight, model.output_layer.bias)

    def _serial(self, layer, h: Tensor, *attending) -> Tensor:
        h = h + self._attention(layer.self_attention, norm(layer.input_layernorm, h), *attending)
        return h + self._mlp(layer.mlp, norm(layer.pre_mlp_layernorm, h))

    def _beside(self, layer, h: Tensor, *attending) -> Tensor:
        normed = norm(layer.input_layernorm, h)
        other = normed if self.config.block == "parallel_one_norm" else norm(layer.pre_mlp_layernorm, h)
        return h + self._attention(layer.self_attention, normed, *attending) + self._mlp(layer.mlp, other)

    def _post_norm(self, layer, h: Tensor, *attending) -> Tensor:
        h = norm(layer.input_layernorm, h + self._attention(layer.self_attention, h, *attending))
        return norm(layer.pre_mlp_layernorm, h + self._mlp(layer.mlp, h))

    def _attention(self, attention: SelfAttention, x: Tensor, rotation, mask: Tensor | None, kept: LayerCache) -> Tensor:
        groups, width = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        heads = self._product(x, attention.linear_qkv).view(len(x), groups, -1, width)
        turned, values = heads[:, :, :-1], heads[:, :, -1:]  # the queries of a group, its key; its value
        if self.config.qk_layernorm:
            turned = torch.cat((norm(attention.q_layernorm, turned[:, :, :-1]), norm(attention.k_layernorm, turned[:, :, -1:])), dim=2)
        if rotation is not None:
            turned = self._rotate(turned, *rotation)
        k, v = kept.append(turned[:, :, -1:], values)
        out = attend(turned[:, :, :-1], k, v, mask, attention.core_attention.scale)
        return self._row_parallel(attention.linear_proj, out.reshape(len(x), -1))

    def _mlp(self, mlp: MLP, x: Tensor) -> Tensor:
        x = self._product(x, mlp.linear_fc1)
        if self.config.gated_linear_unit:
            gate, up = x.chunk(2, dim=-1)
            x = self.config.activation_func(gate).mul_(up)
        else:
            x = self.config.activation_func(x)
        return self._row_parallel(mlp.linear_fc2, x)

    def _product(self, x: Tensor, linear: ColumnParallelLinear | RowParallelLinear, *, bias: bool = True) -> Tensor:
        """This rank's part: of the rows, or of the sum over the ranks. Adapters too are such parts."""
        out = self._linear(x, linear.weight, linear.bias if bias else None)
        return linear.raised(out, linear.low(x)) if active(linear) else out

    def _row_parallel(self, linear: RowParallelLinear, x: Tensor) -> Tensor:
        if not self.parallel:
            return self._product(x, linear)
        out = self._product(x, linear, bias=False)
        dist.all_reduce(out, group=self.group)
        return out if linear.bias is None else out + linear.bias

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """cos [rows, 1, 1, d] and sin [rows, 1, 1, d / 2] of each row's angles, d the rotated part of a head: the numbers that the layers train with."""
        if self.model.rotary is None:
            return None
        if self.config.layers == "plain":
            angles = self.model.rotary_angles(positions, per_row=True)[0, :, None]
            half = angles[..., ::2] if self.config.rotary_interleaved else angles[..., : angles.shape[-1] // 2]
            return angles.cos().to(dtype), half.sin().to(dtype)
        cos, sin = rotary_tables(positions, self.model.rotary.inv_freq.to(positions.device))[:, :, :, None]
        return cos.repeat_interleave(2, dim=-1) if self.config.rotary_interleaved else torch.cat((cos, cos), dim=-1), sin

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates the pairs (a, b) of x [rows, groups, heads, head_dim]: a cos - b sin, b cos + a sin. Pairs are neighbours when
        interleaved, else the two halves. In fp32 where cos and sin are."""
        width = cos.shape[-1]
        part = x[..., :width]
        out = part * cos
        if self.config.rotary_interleaved:
            first, second = slice(0, width, 2), slice(1, width, 2)
        else:
            first, second = slice(0, width // 2), slice(width // 2, width)
        out[..., first].addcmul_(part[..., second], sin, value=-1)
        out[..., second].addcmul_(part[..., first], sin)
        out = out.to(x.dtype)
        return out if width == x.shape[-1] else torch.cat((out, x[..., width:]), dim=-1)
