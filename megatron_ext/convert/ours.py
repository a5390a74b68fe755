"""The tensors of our own checkpoints, by the keys that megatron-core's sharded state dict gives them: what a model of some configuration has, how
large each is, and how tensor-parallel ranks share it. `models/` makes the same when it builds a model; tests hold the two together by loading.

Layouts of joined tensors, with a heads of width d in g groups:
    linear_qkv    [g (a / g + 2) d, hidden]    a group's queries, its key, its value, then the next group's
    linear_fc1    [2 f, hidden] with a gate    all of the gate, then all of the up-projection; ranks share each of the two
"""
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ext.config import sizes
from megatron_ext.config.schema import ModelConfig

LAYERS = "decoder.layers."
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
        return self.key.startswith(LAYERS)

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
    """The tensors of a decoder by key, tied tables once."""
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

    found += norm(f"{LAYERS}input_layernorm", hidden)
    found.append(Ours(f"{LAYERS}self_attention.linear_qkv.weight", (joined, hidden), 0))
    found += [Ours(f"{LAYERS}self_attention.linear_qkv.bias", (joined,), 0)] if qkv_bias else []
    if model.qk_norm:
        found += norm(f"{LAYERS}self_attention.q_layernorm", width) + norm(f"{LAYERS}self_attention.k_layernorm", width)
    found.append(Ours(f"{LAYERS}self_attention.linear_proj.weight", (hidden, heads), 1))
    found += [Ours(f"{LAYERS}self_attention.linear_proj.bias", (hidden,))] if proj_bias else []
    if model.block != "parallel_one_norm":
        found += norm(f"{LAYERS}pre_mlp_layernorm", hidden)
    found.append(Ours(f"{LAYERS}mlp.linear_fc1.weight", (into, hidden), 0, halves=gated))
    found += [Ours(f"{LAYERS}mlp.linear_fc1.bias", (into,), 0, halves=gated)] if mlp_bias else []
    found.append(Ours(f"{LAYERS}mlp.linear_fc2.weight", (hidden, ffn), 1))
    found += [Ours(f"{LAYERS}mlp.linear_fc2.bias", (hidden,))] if mlp_bias else []
    if model.block != "post_norm":
        found += norm(LAST_NORM, hidden, last=True)
    if not model.tied_embeddings:
        found.append(Ours(HEAD, (vocab, embedded), 0, last=True))
    if model.head_bias:
        found.append(Ours(HEAD_BIAS, (vocab,), 0, last=True))
    return {one.key: one for one in found}
