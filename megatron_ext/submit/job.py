"""A job as it will be submitted: one run, or several as an array. Plain values; `plan.py` makes them, `render.py` writes them out."""
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config.schema import ClusterConfig, Config


@dataclass(frozen=True)
class Run:
    """One `train`: its words, as they are given to every rank, and what they mean. Ranks are not among the words: the launcher says how many."""

    words: tuple[str, ...]
    config: Config
    nodes: tuple[int, ...] = ()  # numbers of nodes that it can run on, ascending; the last is cluster.nodes

    @property
    def directory(self) -> Path:
        return Path(self.config.run.dir).absolute()


@dataclass(frozen=True)
class Job:
    """One sbatch.

    Attributes:
        name: of the job, as squeue shows it, and of its script.
        folder: where the script and the log go.
        runs: one, or the points of an array: index i runs `runs[i]`.
        before: commands of this program that one process runs before the ranks start, such as `("prepare", ...)`.
        after: names of the jobs that must have ended well before this one starts.
    """

    name: str
    folder: Path
    runs: tuple[Run, ...]
    array: bool = False
    before: tuple[tuple[str, ...], ...] = ()
    after: tuple[str, ...] = ()

    @property
    def config(self) -> Config:
        return self.runs[0].config

    @property
    def cluster(self) -> ClusterConfig:
        return self.config.cluster

    @property
    def nodes(self) -> tuple[int, ...]:
        """Numbers of nodes that every run can use, ascending."""
        return tuple(number for number in self.runs[0].nodes if all(number in run.nodes for run in self.runs))

    @property
    def script(self) -> Path:
        return self.folder / f"{self.name}.sbatch"

    def log(self, number: str = "%j", index: str = "%a") -> Path:
        """The log of a job number; with Slurm's own signs where nothing is given."""
        return self.folder / (f"slurm-{'%A' if number == '%j' else number}_{index}.log" if self.array else f"slurm-{number}.log")

    def points(self) -> str:
        """Of an array: which index is which run, as JSON."""
        found = [{"index": index, "run.dir": str(run.directory), "words": list(run.words)} for index, run in enumerate(self.runs)]
        return json.dumps(found, indent=1)
