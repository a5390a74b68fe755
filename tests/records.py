"""Checkpoints that are only a manifest: enough for whatever reads records and no tensors."""
from pathlib import Path

from megatron_ext.checkpoint import manifest
from megatron_ext.config.build import to_dict
from megatron_ext.config.compose import compose


def write_record(run: Path, step: int, *words: str, **record) -> Path:
    """A checkpoint in the run directory `run`, of the configuration that `words` make. `record`: what else it says. Returns its path."""
    config = compose(words)
    path = Path(run) / "checkpoints" / manifest.step_name(step)
    path.mkdir(parents=True)
    said = {"config": to_dict(config), "stage": config.stage.name, "step": step, "samples": 0, "vocab_size": 512, "parent": None, "parent_path": None,
            "data": {"tokenizer": "0" * 64, "sources": ["1" * 64]}, **record}
    fields = {"format": manifest.FORMAT, "version": manifest.VERSION, "written": float(step), "record": said,
              "files": {manifest.COMMON: {"size": 2, "sha256": "0" * 64}}}
    (path / manifest.MANIFEST).write_bytes(manifest.seal(fields))
    return path


def child_of(parent: Path) -> dict:
    """What a record says of its parent."""
    return {"parent": manifest.checkpoint_hash(parent), "parent_path": str(parent.absolute())}
