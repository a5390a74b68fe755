"""Layers that put their norms and their two halves together in another way than the usual pre-norm one, x + A(n1 x), then x + M(n2 x):

    parallel            x + A(n1 x) + M(n2 x)           GPT-NeoX (Black et al. 2022, arXiv 2204.06745); n1 = n2 with `parallel_one_norm`: GPT-J, PaLM
    post_norm           y = n1(x + A x),  n2(y + M y)   the Transformer (Vaswani et al. 2017, arXiv 1706.03762), OPT-350M; no norm after the last layer

A is attention, M the MLP. Parameters have the names that they have in the usual layer. Each of the two forward passes serves both kinds of modules, those on
`kernels/` (fused, fp8) and megatron-core's own (plain).
"""
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ext.models.fused import FusedLayer


class PlainParts(TransformerLayer):
    """The parts of a layer by megatron-core's modules."""

    _dropped = FusedLayer._dropped

    def _attend(self, x: Tensor, attention_mask: Tensor | None, rotary_pos_emb: Tensor | None, packed_seq_params) -> Tensor:
        out, bias = self.self_attention(x, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params)
        return self._dropped(out, bias)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self._dropped(*self.mlp(x))

    def _normed_sum(self, norm, x: Tensor, residual: Tensor) -> Tensor:
        return norm(x + residual)


class FusedParts(FusedLayer):
    """The parts of a layer on our kernels."""

    def _attend(self, x: Tensor, attention_mask: Tensor | None, rotary_pos_emb: Tensor | None, packed_seq_params) -> Tensor:
        return self._dropped(*self.self_attention(x, attention_mask, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params))

    def _normed_sum(self, norm, x: Tensor, residual: Tensor) -> Tensor:
        return norm(x, residual=residual)[0]


class Parallel:
    """In front of one of the two."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, rotary_pos_emb: Tensor | None = None, packed_seq_params=None,
                **_) -> tuple[Tensor, None]:
        """[seq, batch, hidden] -> ([seq, batch, hidden], None)."""
        normed = self.input_layernorm(hidden_states)
        other = normed if self.config.block == "parallel_one_norm" else self.pre_mlp_layernorm(hidden_states)
        return hidden_states + self._attend(normed, attention_mask, rotary_pos_emb, packed_seq_params) + self._feed_forward(other), None


class PostNorm:
    """In front of one of the two."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, rotary_pos_emb: Tensor | None = None, packed_seq_params=None,
                **_) -> tuple[Tensor, None]:
        """[seq, batch, hidden] -> ([seq, batch, hidden], None)."""
        attended = self._attend(hidden_states, attention_mask, rotary_pos_emb, packed_seq_params)
        normed = self._normed_sum(self.input_layernorm, attended, hidden_states)
        return self._normed_sum(self.pre_mlp_layernorm, self._feed_forward(normed), normed), None


class PlainParallel(Parallel, PlainParts):
    """Parallel, plain."""


class FusedParallel(Parallel, FusedParts):
    """Parallel, fused."""


class PlainPostNorm(PostNorm, PlainParts):
    """Norms after the sums, plain."""


class FusedPostNorm(PostNorm, FusedParts):
    """Norms after the sums, fused."""


# block -> (plain, fused)
BLOCKS: dict[str, tuple[type, type]] = {
    "serial": (TransformerLayer, FusedLayer),
    "parallel": (PlainParallel, FusedParallel),
    "parallel_one_norm": (PlainParallel, FusedParallel),
    "post_norm": (PlainPostNorm, FusedPostNorm),
}
