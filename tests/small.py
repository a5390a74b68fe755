"""What several tests train on: a little real text, and the command line that trains a tiny model on it."""
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import forked

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "model=tiny", "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4", "model.num_query_groups=2",
    "data.sequence_length=32", "data.workers=1", "train.global_batch_size=8", "train.micro_batch_size=4", "train.steps=8",
    "optim.warmup_steps=2", "optim.lr=0.002", "validation.every=0", "validation.at_end=false", "log.report=false",
)


def prepare_text(directory: Path, *, vocab_size: int = 500, split: tuple[float, float, float] = (0.9, 0.05, 0.05)) -> Path:
    """Paragraphs of three modules of the standard library, a document each, so that samples hold several. Returns the prepared directory."""
    from megatron_ext.config.schema import DataConfig
    from megatron_ext.data.prepare import prepare

    library = Path(sysconfig.get_path("stdlib"))
    text = "\n\n".join((library / f"{name}.py").read_text(encoding="utf-8") for name in ("argparse", "ast", "inspect"))
    lines = "".join(json.dumps({"text": part}) + "\n" for part in text.split("\n\n") if part.strip())
    (directory / "text.jsonl").write_text(lines, encoding="utf-8")
    prepare(DataConfig(vocab_size=vocab_size, split=split, workers=1), str(directory / "text.jsonl"), directory / "data", progress=False)
    return directory / "data"


def command(run: Path, data: Path, *words: str) -> list[str]:
    """The command line of a tiny training; a later word replaces an earlier one of the same key, which Hydra would refuse."""
    last = {word.split("=")[0]: word for word in (*TINY, f"data.path={data}", f"run.dir={run}", *words)}
    return [sys.executable, "-m", "megatron_ext", "train", *last.values()]


def environment() -> dict[str, str]:
    hidden = ("RANK", "WORLD_SIZE", "SLURM_PROCID")
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    return inherited | {"PYTHONPATH": str(ROOT) + (":" + os.environ["STUBS"] if "STUBS" in os.environ else ""), "OMP_NUM_THREADS": "1"}


def train(run: Path, data: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess:
    """Runs the command line; its exit code must be `code`."""
    done = forked.run(command(run, data, *words)[3:], env=environment(), timeout=300)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def records(run: Path, name: str = "metrics", *, growing: bool = False) -> list[dict]:
    """The lines of metrics.jsonl or events.jsonl; `growing`: of a run that goes on, which may be in the middle of its last one."""
    path = run / f"{name}.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in (text[: text.rfind("\n") + 1] if growing else text).splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Loss by step; every step stands there once."""
    found = records(run)
    assert len({record["step"] for record in found}) == len(found)
    return {record["step"]: record["loss"] for record in found}


def newest(run: Path) -> Path:
    from megatron_ext.checkpoint import find

    return find(str(run), run)
