"""`report.md` of the main job: each stage's verdict, numbers and pictures, the samples before and after, and the chain of checkpoints."""
import os
import platform
import time
from pathlib import Path

from megatron_ext import checkpoint
from megatron_ext.checkpoint.ancestry import chain
from megatron_ext.doctor import version_of
from megatron_ext.errors import UserError
from megatron_ext.observe import markdown, report
from megatron_ext.observe.report import Run
from megatron_ext.pipeline import Finished
from rlhf.report import chain_table, stage_parts
from rlhf.report import write_report as write_stage


def write(job: Finished) -> Path:
    """Writes `run.dir`/report.md, and a report.md into the folder of each stage. Returns the path of the first."""
    directory, validation = Path(job.config.run.dir), job.prepared.splits["validation"]
    parts = [f"# {job.config.model.name}: {' -> '.join(job.stages)}", _summary(job)]
    for stage in job.stages:
        folder = job.folder(stage)
        found = _chain(folder)
        if stage == "pretrain":
            _pretrain(job)
        else:
            write_stage(folder, title=f"{job.config.model.name}, {stage}", chain=found, bytes_per_token=validation.bytes_per_token)
        parts.append(f"## {stage}\n\n[All of it]({stage}/report.md).")
        parts += stage_parts(Run.read(folder), bytes_per_token=validation.bytes_per_token, prefix=f"{stage}/", level=3)
        if stage == "pretrain":
            parts += [markdown.table({"validation, bits per byte": job.evaluation["bits_per_byte"],
                                      "interpolated trigram, bits per byte": float(job.baseline["bits_per_byte"])})]
    last = _chain(job.folder(job.stages[-1]))
    if last:
        parts.append("## Where the last checkpoint comes from\n\n" + chain_table(last))
    return report.publish(directory, parts)


def _summary(job: Finished) -> str:
    versions = {name: version_of(name) for name in ("torch", "megatron-core", "tokenizers")}
    corpus = job.prepared
    minutes = {f"minutes of {stage}": job.seconds[stage] / 60 for stage in job.stages if job.seconds[stage] > 1}
    return markdown.table({
        "corpus": f"{corpus.fields['corpus']['name']}, sha256 {corpus.corpus_sha256}", "vocabulary": corpus.vocab_size, **minutes,
        "minutes in all": job.seconds["all"] / 60, "python": platform.python_version(), **versions, "cores": os.cpu_count(),
        "written": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "command": "python -m megatron_ext run " + " ".join(job.words),
    })


def _pretrain(job: Finished) -> None:
    corpus = job.prepared
    report.write_report(
        job.folder("pretrain"), title=f"{job.config.model.name}, pretrain",
        sections={
            "Evaluation": {name: value for name, value in job.evaluation.items() if isinstance(value, int | float | str)},
            "Corpus": {"name": corpus.fields["corpus"]["name"], "sha256": corpus.corpus_sha256, "vocabulary": corpus.vocab_size,
                       **{f"{name} tokens": split.tokens for name, split in corpus.splits.items()}},
            "Baseline": {name: value for name, value in job.baseline.items() if isinstance(value, int | float | str)},
        },
        samples=[{"prompt": one["prompt"], "completion": one["completion"]} for one in job.completions],
        bytes_per_token=corpus.splits["validation"].bytes_per_token, baseline_bits_per_byte=float(job.baseline["bits_per_byte"]),
    )


def _chain(folder: Path) -> list[dict]:
    try:
        path = checkpoint.find(str(folder), folder / "checkpoints", best=True)
    except UserError:
        return []
    return chain(path)
