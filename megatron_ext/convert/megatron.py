"""Checkpoints of Megatron-LM's own training scripts (`pretrain_gpt.py --ckpt-format torch_dist`) as a source of `convert`, beside Hugging Face directories.

Tensors have the names that ours have, but for the norms that Transformer Engine keeps in the linear layer behind them. The model is what `args` in common.pt says.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ext.config.schema import ModelConfig
from megatron_ext.convert.forms import Heads
from megatron_ext.convert.ours import HEAD, LAYERS, WORDS, Ours, tensors
from megatron_ext.convert.torch_dist import COMMON, METADATA, Reader
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError

KEY = "megatron"
# Our prefix -> Transformer Engine's.
NORMS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
SIZES = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings")  # no model without them
# Arguments with another value than these make a model that ours is not.
PLAIN = {"num_experts": None, "multi_latent_attention": False, "mtp_num_layers": None, "apply_layernorm_1p": False, "squared_relu": False, "window_size": None,
         "apply_residual_connection_post_layernorm": False, "heterogeneous_layers_config_path": None, "quick_geglu": False, "attention_output_gate": False,
         "rotary_seq_len_interpolation_factor": None, "no_rope_freq": None, "hybrid_override_pattern": None, "spec": None, "softmax_type": "vanilla"}


@dataclass(frozen=True)
class Piece:
    """One of our tensors (of one layer)."""

    ours: Ours
    layer: int | None


@dataclass(frozen=True)
class Checkpoint:
    """What was found; the same face as `source.Directory`."""

    path: Path
    model: ModelConfig
    reader: Reader
    placed: tuple[Piece, ...]
    dtype: torch.dtype
    iteration: int
    notes: Sequence[str] = ()
    kind = "Megatron-LM"

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def files(self) -> list[Path]:
        names = {chunk[0] for key in _names(self) for chunk in self.reader.tensors[key].chunks}
        return [self.path / name for name in (METADATA, COMMON, *sorted(names))]

    def make(self, one: Piece, heads: Heads) -> torch.Tensor:
        """Our tensor."""
        return _region(self.reader, one)

    def origin(self) -> dict:
        """For the record."""
        return {"format": "megatron_torch_dist", "family": None, "name": str(self.path.absolute()), "licence": "its trainer's", "licence_from": None, "card": {},
                "licence_files": {}, "iteration": self.iteration, "prefix": "", "dtypes": {}}


def open_checkpoint(path: Path, tokenizer: Path | None) -> Checkpoint:
    """Raises UserError: no such checkpoint, arguments that make another kind of model, tensors that are missing, unknown or of another shape.

    Args:
        path: an iteration's directory, or the run's, whose newest it is then.
        tokenizer: that the model was trained with: it says how many rows of the padded table are words. None: all of them.
    """
    path = _iteration(Path(path))
    reader = Reader(path, key=KEY)
    common = reader.common()
    args = getattr(common.get("args"), "__dict__", {})
    if missing := [name for name in SIZES if type(args.get(name)) is not int]:
        raise UserError(KEY, path / COMMON, f"does not hold the arguments of a training script: {missing[0]} is no number; name a checkpoint that pretrain_gpt.py saved")
    rows = reader.tensors[WORDS].shape[0] if WORDS in reader.tensors else 0
    vocab = Tokenizer.from_file(tokenizer).vocab_size if tokenizer is not None else args.get("vocab_size") or rows
    if vocab > rows:
        raise UserError("data.tokenizer", tokenizer, f"has {vocab} words, the model in {path} {rows} rows")
    model = replace(_model(args), vocab_size=vocab)
    placed = tuple(_placed(model, vocab))
    _check(reader, model, placed, vocab)
    dtype = reader.tensors[WORDS].dtype
    return Checkpoint(path, model, reader, placed, dtype, int(common.get("iteration") or 0),
                      () if tokenizer is not None else ("no tokenizer was named: add data.tokenizer=FILE, else rows that pad the table count as words",))


def _iteration(path: Path) -> Path:
    newest = path / "latest_checkpointed_iteration.txt"
    if not path.is_dir():
        raise UserError(KEY, path, "is not there; name a checkpoint directory of Megatron-LM")
    if (path / METADATA).is_file() or not newest.is_file():
        return path
    text = newest.read_text(encoding="utf-8").strip()
    return path / (f"iter_{int(text):07d}" if text.isdecimal() else text)


def _model(args: dict) -> ModelConfig:
    """Raises UserError(argument, value, ...)."""
    def wrong(name: str, reason: str) -> UserError:
        return UserError(f"{KEY}: {name}", args.get(name), reason)

    for name, plain in PLAIN.items():
        if args.get(name, plain) not in (plain, None, False):
            raise wrong(name, f"is not supported; only {plain}")
    kind = args.get("position_embedding_type", "learned_absolute")
    positions = "rope" if args.get("use_rotary_position_embeddings") else {"learned_absolute": "learned", "rope": "rope"}.get(kind)
    if positions is None:
        raise wrong("position_embedding_type", "is not supported; learned_absolute and rope are")
    norm = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}.get(args.get("normalization", "LayerNorm"))
    if norm is None:
        raise wrong("normalization", "is not supported; LayerNorm and RMSNorm are")
    bias = bool(args.get("add_bias_linear", True))
    tanh = args.get("openai_gelu") or bias and args.get("bias_gelu_fusion", True)  # the fused one is the approximation
    activation = "swiglu" if args.get("swiglu") else "gelu_tanh" if tanh else "gelu"
    scaling = {"rope_scaling_factor": float(args.get("rope_scaling_factor") or 8.0)} if args.get("use_rope_scaling") else {}
    return ModelConfig(
        name="megatron", num_layers=args["num_layers"], hidden_size=args["hidden_size"], num_attention_heads=args["num_attention_heads"],
        num_query_groups=args.get("num_query_groups") if args.get("group_query_attention") else None, head_dim=args.get("kv_channels"),
        ffn_hidden_size=args["ffn_hidden_size"], max_sequence_length=args["max_position_embeddings"], position_embedding=positions,
        rotary_percent=float(args.get("rotary_percent", 1.0)), rotary_base=float(args.get("rotary_base", 10000)),
        rotary_interleaved=bool(args.get("rotary_interleaved")), norm=norm, norm_eps=float(args.get("norm_epsilon") or args.get("layernorm_epsilon") or 1e-5),
        activation=activation, bias=bias, qkv_bias=bool(args.get("add_qkv_bias")), qk_norm=bool(args.get("qk_layernorm")),
        tied_embeddings=not args.get("untie_embeddings_and_output_weights", False), hidden_dropout=float(args.get("hidden_dropout", 0.0)),
        attention_dropout=float(args.get("attention_dropout", 0.0)), init_std=float(args.get("init_method_std", 0.02)), **scaling,
    )


def _placed(model: ModelConfig, vocab: int) -> Iterator[Piece]:
    for one in tensors(model, vocab).values():
        yield from (Piece(one, layer) for layer in range(model.num_layers)) if one.stacked else (Piece(one, None),)


def _stored_name(reader: Reader, one: Piece) -> tuple[str, bool] | None:
    """(the name under which a tensor is stored, whether layers are stacked there)."""
    if one.layer is None:
        return (one.ours.key, False) if one.ours.key in reader.tensors else None
    inner = one.ours.key.removeprefix(LAYERS)
    names = [inner] + [theirs + inner.removeprefix(ours) for ours, theirs in NORMS.items() if inner.startswith(ours)]
    for name in names:
        for key, stacked in ((LAYERS + name, True), (f"{LAYERS}{one.layer}.{name}", False)):
            if key in reader.tensors:
                return key, stacked
    return None


def _names(found: Checkpoint) -> set[str]:
    return {_stored_name(found.reader, one)[0] for one in found.placed}


def _region(reader: Reader, one: Piece) -> torch.Tensor:
    name, stacked = _stored_name(reader, one)
    lead = (one.layer,) if stacked else ()
    whole = reader.region(name, (*lead, *(0 for _ in one.ours.shape)), (*(1 for _ in lead), *one.ours.shape))
    return whole[0] if stacked else whole


def _check(reader: Reader, model: ModelConfig, placed: Sequence[Piece], vocab: int) -> None:
    used = set()
    for one in placed:
        found = _stored_name(reader, one)
        if found is None:
            raise UserError(KEY, reader.directory, f"lacks the tensor {one.ours.key}" + (f" of layer {one.layer}" if one.layer is not None else ""))
        name, stacked = found
        used.add(name)
        shape = (model.num_layers, *one.ours.shape) if stacked else one.ours.shape
        there = reader.tensors[name].shape
        padded = one.ours.key in (WORDS, HEAD) and there[1:] == shape[1:] and there[0] >= vocab
        if there != shape and not padded:
            raise UserError(KEY, reader.directory, f"{name} has shape {list(there)}, its arguments say {list(shape)}")
    rest = [name for name in reader.tensors if name not in used and not name.startswith(("optimizer.", "rng_state", "rerun_state", "opt_param_scheduler"))
            and "_extra_state" not in name and "optimizer" not in name.split(".")]
    if rest:
        raise UserError(KEY, reader.directory, f"holds {rest[0]}, which no model of its arguments has: it would be left out")
