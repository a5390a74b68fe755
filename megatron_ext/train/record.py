"""What a checkpoint says about its run beside the tensors: JSON, readable without torch.

A resume is refused where it would silently go on with something else: another model (checkpoint/read.py compares `model`), or other data,
whose position in samples would mean nothing.
"""
import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_ext.checkpoint import manifest
from megatron_ext.config import sizes
from megatron_ext.config.schema import Config, DataConfig, ModelConfig
from megatron_ext.data.build import dataset_tokenizer, default_directory
from megatron_ext.data.prepared import FILE, Prepared
from megatron_ext.errors import UserError

# The keys that every record has said from the start. Those that came later are left out at their default, so that what an older checkpoint says of a model
# is what this program says of the same one.
FIRST = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "ffn_hidden_size", "max_sequence_length", "position_embedding",
         "rotary_percent", "rotary_base", "rotary_interleaved", "rope_scaling_factor", "norm", "norm_eps", "activation", "bias", "qkv_bias", "tied_embeddings")
# Choices of training, not of the model that a checkpoint holds.
NOT_THE_MODEL = ("name", "hidden_dropout", "attention_dropout", "init_std", "vocab_multiple")


def architecture(model: ModelConfig, vocab_size: int) -> dict:
    """What two runs must share to share weights."""
    found = {key: value for key, value in asdict(model).items() if key not in NOT_THE_MODEL}
    if model.position_embedding == "rope":
        del found["max_sequence_length"]
    usual = ModelConfig()
    found = {key: value for key, value in found.items() if key in FIRST or value != getattr(usual, key)}
    return found | {
        "vocab_size": vocab_size, "num_query_groups": sizes.query_groups(model), "head_dim": sizes.head_dim(model),
        "ffn_hidden_size": sizes.ffn_size(model),
    }


def different(ours: dict, theirs: dict, words: Sequence[str]) -> str | None:
    """A key in which two architectures differ, None where they are one: of those that differ one that was typed (`words`), since derived sizes differ too."""
    typed = {word.lstrip("+").partition("=")[0] for word in words}
    keys = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    return min(keys, key=lambda key: (f"model.{key}" not in typed, key), default=None)


def layout(config: Config) -> dict:
    parallel = config.parallel
    return {"tp": parallel.tp, "pp": parallel.pp, "vpp": parallel.vpp, "cp": parallel.cp, "ranks": config.launch.ranks,
            "distributed_optimizer": parallel.distributed_optimizer}


def data_identity(data: DataConfig, model: ModelConfig) -> dict:
    """What the order of samples, and what is asked of each, depends on."""
    sources = {}
    for path in data.paths or (data.path or str(default_directory(data)),):
        if (Path(path) / FILE).exists():
            sources[str(path)] = Prepared.load(path).corpus_sha256
        else:  # a Megatron prefix: its index is the table of documents
            sources[str(path)] = manifest.hash_file(Path(f"{path}.idx"))
    return {
        "sources": list(sources.values()), "weights": list(data.weights), "tokenizer": dataset_tokenizer(data)[1].sha256,
        "seed": data.seed, "sequence_length": data.sequence_length, "split": list(data.split),
    } | {key: getattr(data, key) for key in {"encoder": ("masked_share",), "encoder_decoder": ("masked_share", "span_length")}.get(model.family, ())}


def curation(data: DataConfig, earlier: Sequence[dict] = ()) -> list[dict]:
    """The curated text that a run is trained on, and what earlier stages were: [{"path" of the tokens, "corpus_sha256", "manifest_sha256", "sources" (with their
    licences and what those forbid)}], each build once."""
    found = {one["manifest_sha256"]: dict(one) for one in earlier}
    for path in data.paths or ((data.path,) if data.path else ()):
        if not (Path(path) / FILE).exists():
            continue
        prepared = Prepared.load(path)
        if said := prepared.fields.get("curation"):
            found[said["manifest_sha256"]] = {"path": str(Path(path).absolute()), "corpus_sha256": prepared.corpus_sha256,
                                              "manifest_sha256": said["manifest_sha256"], "sources": said["sources"]}
    return list(found.values())


def keep_curation(data: DataConfig, run_dir: Path) -> None:
    """Copies the ledger of each curated text into the run: `curation/HASH.json`. Raises OSError."""
    for path in data.paths or ((data.path,) if data.path else ()):
        ledger = Path(path) / "curation.json"
        if ledger.is_file():
            content = ledger.read_bytes()
            (run_dir / "curation").mkdir(exist_ok=True)
            (run_dir / "curation" / f"{hashlib.sha256(content).hexdigest()[:16]}.json").write_bytes(content)


def check_data(stored: dict, ours: dict, path) -> None:
    """Raises UserError where a resume would count samples of other data."""
    different = [key for key in ours if stored.get(key) != ours[key]]
    if different:
        words = "; ".join(f"data {key}: {stored.get(key)} / {ours[key]}" for key in different)
        raise UserError("checkpoint.load", path, f"its position is counted in other samples ({words}, checkpoint / this run); "
                                                 "to start on other data from its weights add checkpoint.weights_only=true")
