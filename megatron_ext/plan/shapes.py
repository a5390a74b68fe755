"""The parameters that a rank holds, tensor by tensor, from the configuration alone: names, shapes and order are those of a real build. No torch.

With TP ranks a column-parallel matrix [out, in] is [out / TP, in], a row-parallel one [out, in / TP], the table of words [V / TP, h]; norms, position
tables and biases that are added after the sum over ranks are whole. Pipeline rank r holds chunk v of `vpp` as stage v PP + r.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ext.config import sizes
from megatron_ext.config.schema import Config, LoraConfig, ModelConfig


@dataclass(frozen=True)
class Tensor:
    """A parameter of this rank. alone: it has a bucket of its own (the table of words that the first and the last stage share)."""

    name: str
    shape: tuple[int, ...]
    alone: bool = False
    trained: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Chunk:
    """A model chunk: `layers` layers, whether it embeds (`first`), whether it holds the head (`last`)."""

    stage: int
    layers: int
    first: bool
    last: bool


def chunks(config: Config, pipeline_rank: int) -> tuple[Chunk, ...]:
    """The chunks of a pipeline rank: one, or `parallel.vpp`."""
    pp, vpp = config.parallel.pp, config.parallel.vpp or 1
    each = config.model.num_layers // (pp * vpp)
    return tuple(Chunk(v * pp + pipeline_rank, each, v == 0 and pipeline_rank == 0, v == vpp - 1 and pipeline_rank == pp - 1) for v in range(vpp))


def tensors(config: Config, chunk: Chunk, vocab: int, *, head: str = "vocabulary") -> list[Tensor]:
    """The parameters of a chunk in the order of `named_parameters()`.

    Args:
        vocab: words that exist.
        head: vocabulary | scalar (reward models and value functions).
    """
    model, tp = config.model, config.parallel.tp
    rows, hidden = sizes.padded_vocabulary(vocab, model.vocab_multiple, tp) // tp, model.hidden_size
    tied = model.tied_embeddings and head == "vocabulary"
    apart = tied and config.parallel.pp > 1  # the first and the last stage each have a copy
    found: list[Tensor] = []
    if chunk.first:
        found.append(Tensor("embedding.word_embeddings.weight", (rows, hidden), alone=apart))
        if model.position_embedding == "learned":
            found.append(Tensor("embedding.position_embeddings.weight", (model.max_sequence_length, hidden)))
    for layer in range(chunk.layers):
        found += _layer(model, tp, f"decoder.layers.{layer}.", config.lora)
    if chunk.last:
        found += _norm(model, "decoder.final_layernorm")
        if head == "scalar":
            found += [Tensor("value_head.weight", (1, hidden)), Tensor("value_head.bias", (1,))]
        elif not (tied and chunk.first):
            found.append(Tensor("output_layer.weight", (rows, hidden), alone=apart))
    if config.lora.rank:
        found = [Tensor(t.name, t.shape, t.alone, t.name.endswith(("lora_a", "lora_b")) or t.name.startswith("value_head.")) for t in found]
    return found


def _norm(model: ModelConfig, name: str) -> list[Tensor]:
    parts = ("weight", "bias") if model.norm == "layernorm" else ("weight",)
    return [Tensor(f"{name}.{part}", (model.hidden_size,)) for part in parts]


def _layer(model: ModelConfig, tp: int, prefix: str, lora: LoraConfig) -> Iterator[Tensor]:
    hidden, ffn = model.hidden_size, sizes.ffn_size(model)
    width = sizes.head_dim(model) * model.num_attention_heads
    into_attention = width + 2 * sizes.head_dim(model) * sizes.query_groups(model)
    into_ffn = 2 * ffn if model.activation in sizes.GATED else ffn

    def linear(name: str, out: int, width: int, column: bool, bias: bool) -> Iterator[Tensor]:
        shape = (out // tp, width) if column else (out, width // tp)
        yield Tensor(f"{name}.weight", shape)
        if bias:
            yield Tensor(f"{name}.bias", shape[:1])
        if lora.rank and name.rpartition(".")[2] in lora.targets:
            yield Tensor(f"{name}.lora_a", (lora.rank, shape[1]))
            yield Tensor(f"{name}.lora_b", (shape[0], lora.rank))

    yield from _norm(model, f"{prefix}input_layernorm")
    yield from linear(f"{prefix}self_attention.linear_proj", hidden, width, False, model.bias)
    yield from linear(f"{prefix}self_attention.linear_qkv", into_attention, hidden, True, model.bias or model.qkv_bias)
    yield from _norm(model, f"{prefix}pre_mlp_layernorm")
    yield from linear(f"{prefix}mlp.linear_fc1", into_ffn, hidden, True, model.bias)
    yield from linear(f"{prefix}mlp.linear_fc2", hidden, ffn, False, model.bias)
