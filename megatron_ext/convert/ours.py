"""The tensors of our own checkpoints, by the keys that megatron-core's sharded state dict gives them: what a model of some configuration has, how
large each is, and how tensor-parallel ranks share it. `models/` makes the same when it builds a model; tests hold the two together by loading.

Layouts of joined tensors, with a heads of width d in g groups:
    linear_qkv    [g (a / g + 2) d, hidden]    a group's queries, its key, its value, then the next group's
    linear_kv     [2 a d, hidden]              a head's key and its value, then the next head's
    linear_fc1    [2 f, hidden] with a gate    all of the gate, then all of the up-projection; ranks share each of the two
"""
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ext.config import sizes
from megatron_ext.config.schema import ModelConfig

LAYERS = "decoder.layers."
ENCODER = "encoder.layers."  # of an encoder-decoder; an encoder alone has the decoder's names
TYPES, TABLES = "embedding.tokentype_embeddings.weight", ("encoder_positions.weight", "decoder_positions.weight")
WORDS, POSITIONS = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight"
HEAD, HEAD_BIAS = "output_layer.weight", "output_layer.bias"
LAST_NORM = "decoder.final_layernorm"
PROJECT_IN, PROJECT_OUT = "embedding.word_embeddings.project_in", "project_out.weight"


@dataclass(frozen=True)
class Ours:
    """A tensor of a checkpoint.

    Attributes:
        key: its name. Layers share one: their tensors are stacked along a first axis that `shape` does not count.
        shape: of the whole (of one layer).
        axis: along which tensor-parallel ranks share it; None = each has all of it.
        halves: the two halves of that axis are shared, each by itself.
        first, last: of a tensor outside the layers, whether it lies on the first or the last pipeline stage.
    """

    key: str
    shape: tuple[int, ...]
    axis: int | None = None
    halves: bool = False
    first: bool = False
    last: bool = False

    @property
    def stacked(self) -> bool:
        return self.key.startswith((LAYERS, ENCODER))

    def layers(self, model: ModelConfig) -> int:
        """How many layers are stacked in it."""
        return sizes.decoder_layers(model) if model.family == "encoder_decoder" and self.key.startswith(LAYERS) else model.num_layers

    def stored(self, model: ModelConfig) -> tuple[int, ...]:
        """The shape that it has in a checkpoint."""
        return (self.layers(model), *self.shape) if self.stacked else self.shape

    def parts(self, rank: int, ranks: int) -> Iterator[tuple[int, int]]:
        """(start, length) along `axis` of what a tensor-parallel rank holds; the whole vocabulary is cut in parts as even as can be."""
        if self.axis is None:
            yield 0, self.shape[0] if self.shape else 0
            return
        whole, times = self.shape[self.axis], 2 if self.halves else 1
        size = whole // times
        for half in range(times):
            begin, end = (size * number // ranks for number in (rank, rank + 1))
            yield half * size + begin, end - begin


def tensors(model: ModelConfig, vocab: int) -> dict[str, Ours]:
    """The tensors of a model by key, tied tables once."""
    hidden, width, groups = model.hidden_size, sizes.head_dim(model), sizes.query_groups(model)
    heads, ffn, embedded = model.num_attention_heads * width, sizes.ffn_size(model), sizes.embedding_size(model)
    gated = model.activation in sizes.GATED
    qkv_bias, proj_bias, mlp_bias = sizes.biases(model)
    joined, into = heads + 2 * groups * width, 2 * ffn if gated else ffn
    found = [Ours(WORDS, (vocab, embedded), 0, first=True)]
    if model.position_embedding == "learned":
        found.append(Ours(POSITIONS, (sizes.position_rows(model), hidden), first=True))
    if embedded != hidden:
        found += [Ours(PROJECT_IN, (hidden, embedded), first=True), Ours(PROJECT_OUT, (embedded, hidden), last=True)]

    def norm(name: str, size: int, **place) -> list[Ours]:
        return [Ours(f"{name}.{kind}", (size,), **place) for kind in (("weight", "bias") if model.norm == "layernorm" else ("weight",))]

    def split(name: str, shape: tuple[int, ...], bias: bool, **place) -> list[Ours]:
        """A layer whose outputs are shared."""
        return [Ours(f"{name}.weight", shape, 0, **place), *([Ours(f"{name}.bias", shape[:1], 0, **place)] if bias else [])]

    def joining(name: str, shape: tuple[int, ...], bias: bool) -> list[Ours]:
        """A layer whose inputs are shared."""
        return [Ours(f"{name}.weight", shape, 1), *([Ours(f"{name}.bias", shape[:1])] if bias else [])]

    def stack(start: str, crosses: bool = False) -> list[Ours]:
        made = norm(f"{start}input_layernorm", hidden) + split(f"{start}self_attention.linear_qkv", (joined, hidden), qkv_bias)
        if model.qk_norm:
            made += norm(f"{start}self_attention.q_layernorm", width) + norm(f"{start}self_attention.k_layernorm", width)
        made += joining(f"{start}self_attention.linear_proj", (hidden, heads), proj_bias)
        if crosses:
            made += norm(f"{start}pre_cross_attn_layernorm", hidden) + split(f"{start}cross_attention.linear_q", (heads, hidden), model.bias)
            made += split(f"{start}cross_attention.linear_kv", (2 * heads, hidden), model.bias)
            made += joining(f"{start}cross_attention.linear_proj", (hidden, heads), model.bias)
        if model.block != "parallel_one_norm":
            made += norm(f"{start}pre_mlp_layernorm", hidden)
        return made + split(f"{start}mlp.linear_fc1", (into, hidden), mlp_bias, halves=gated) + joining(f"{start}mlp.linear_fc2", (hidden, ffn), mlp_bias)

    both = model.family == "encoder_decoder"
    if both and model.position_embedding == "relative":
        found += [Ours(name, (model.num_attention_heads, model.relative_buckets), 0, first=True) for name in TABLES]
    if both:
        found += stack(ENCODER) + (norm("encoder.final_layernorm", hidden) if model.block != "post_norm" else [])
    found += [Ours(TYPES, (model.token_types, hidden), first=True)] if model.token_types else []
    found += norm("embedding.norm", hidden, first=True) if model.embedding_norm else []
    found += stack(LAYERS, crosses=both)
    if model.block != "post_norm":
        found += norm(LAST_NORM, hidden, last=True)
    if model.family == "encoder":
        found += [Ours("transform.weight", (hidden, hidden), last=True), Ours("transform.bias", (hidden,), last=True), *norm("transform.norm", hidden, last=True)]
    if not model.tied_embeddings:
        found.append(Ours(HEAD, (vocab, embedded), 0, last=True))
    if model.head_bias:
        found.append(Ours(HEAD_BIAS, (vocab,), 0, last=True))
    return {one.key: one for one in found}
