"""`submit prepare ...`: curation as arrays of Slurm. Each phase of the build is an array, held back until the one before has ended well; the last job is the
command itself, which finds every task done, writes the manifest and makes the tokens. No torch.
"""
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

from megatron_ext.config.cluster import CLUSTER
from megatron_ext.config.compose import compose
from megatron_ext.config.schema import ClusterConfig, Config
from megatron_ext.config.validate import ConfigErrors, validate
from megatron_ext.errors import UserError
from megatron_ext.submit import render

ELEMENTS = 1000  # of an array: one less than Slurm's own default of MaxArraySize; an element does every 1000th task


@dataclass(frozen=True)
class Part:
    """One sbatch: an array over the tasks of a phase, or the last job. It has what `render`, `limits` and `slurm` ask of a Job.

    Attributes:
        count: elements of the array; 0 = no array. command: what an element runs; its number is put behind `INDEX`.
    """

    name: str
    folder: Path
    config: Config
    command: tuple[str, ...]
    count: int
    after: tuple[str, ...]

    @property
    def cluster(self) -> ClusterConfig:
        return self.config.cluster

    @property
    def array(self) -> bool:
        return self.count > 0

    @property
    def runs(self) -> tuple:
        return (SimpleNamespace(directory=self.folder),) * max(self.count, 1)

    nodes = (1,)

    @property
    def script(self) -> Path:
        return self.folder / f"{self.name}.sbatch"

    def log(self, number: str = "%j", index: str = "%a") -> Path:
        return self.folder / (f"slurm-{number}_{index}.log" if self.array else f"slurm-{number}.log")


def parts(words: Sequence[str]) -> tuple[Part, ...]:
    """The jobs of a build, planned now: which tasks there are follows from the input alone. Raises UserError, ConfigErrors."""
    from megatron_ext.curate.build import Build
    from megatron_ext.curate.command import existing, text_folder

    config = compose(words)
    if not config.curate.steps:
        raise UserError("curate", "plain", "nothing is cleaned, and tokenising is one process's work: use `prepare` without submit, or name curate=standard")
    if config.output is None:
        raise UserError("output", "null", "name the directory to write: submit prepare input=PATH output=DIR curate=standard")
    validate(config, "prepare")
    one = replace(config.cluster, nodes=1, min_nodes=None, gpus_per_node=0, gpu_type=None, tasks_per_node=1)
    config = replace(config, cluster=one)
    if errors := [error for rule in CLUSTER for error in rule(config)]:
        raise errors[0] if len(errors) == 1 else ConfigErrors(errors)
    output = text_folder(config).absolute()
    folder = output.with_name(f"{output.name}.slurm")
    found: list[Part] = []
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", one.name or "curate").strip("-.") or "curate"
    if existing(config.curate, Path(config.input or ""), output) is None:
        build = Build.start(config.curate, config.input or "", output)
        for phase in build.phases():
            count = min(phase.tasks, ELEMENTS)
            command = ("-m", "megatron_ext.curate.executor", str(build.work), phase.name, "INDEX", str(count))
            found.append(Part(f"{base}-{phase.name}", folder, config, command, count, tuple(part.name for part in found[-1:])))
    last = ("-m", "megatron_ext", "prepare", *words)
    return (*found, Part(f"{base}-tokens", folder, config, last, 0, tuple(part.name for part in found[-1:])))


def script(part: Part) -> str:
    """The whole script; it can be read, kept and submitted by hand."""
    cluster = part.cluster
    python = cluster.python or (sys.executable if cluster.container == "none" else "python")
    pyxis, inside = render.container(cluster, part.config, part)
    command = shlex.join(["srun", "--nodes=1", "--ntasks=1", f"--cpus-per-task={cluster.cpus_per_task}", *pyxis, *inside, python, *part.command])
    head = [["#!/bin/bash", f"# {part.name}: rendered by `python -m megatron_ext submit prepare`; submit it again with: sbatch {shlex.quote(str(part.script))}"],
            [f"#SBATCH {option}" for option in render.options(part)], render.settings(part),
            ["launch() {", "    " + command.replace(" INDEX ", ' "$SLURM_ARRAY_TASK_ID" '), "}"]]
    body = files("megatron_ext.submit").joinpath("array.sh").read_text(encoding="utf-8")
    return "\n\n".join("\n".join(lines) for lines in head) + "\n\n" + body
