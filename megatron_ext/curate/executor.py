"""Runs the phases of a build: datatrove's executor, with processes of our own on one machine, or one task at a time in an array of Slurm's.

datatrove's own local executor waits for ever when a worker is killed, its Slurm one sends pickles through a file, and both log the values of a failing step's
variables, which may be personal. What is kept of it: pipelines, tasks, and the folder of a phase, so that `jobs_status` and `merge_stats` read it.
"""
import concurrent.futures
import functools
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from datatrove.executor.base import DistributedEnvVars, PipelineExecutor
from datatrove.utils.logging import logger
from datatrove.utils.stats import PipelineStats

from megatron_ext.curate.blocks import Phase
from megatron_ext.curate.build import Build
from megatron_ext.curate.documents import write_json
from megatron_ext.curate.ingest.apart import die_with
from megatron_ext.curate.steps import told
from megatron_ext.data.progress import Progress
from megatron_ext.errors import RunFailed, UserError

logger.disable("datatrove")  # its messages would go to standard error, some with names of files


class PhaseExecutor(PipelineExecutor):
    """One phase of a build. `workers` processes; 1 = this one."""

    def __init__(self, build: Build, phase: Phase, *, workers: int, progress: Progress):
        super().__init__([], str(build.work / "phases" / phase.name), skip_completed=True)
        self.build, self.phase, self.workers, self.progress = build, phase, workers, progress

    @property
    def world_size(self) -> int:
        return self.phase.tasks

    def get_distributed_env(self, node_rank: int = -1) -> DistributedEnvVars:
        return DistributedEnvVars(datatrove_node_ips="localhost", datatrove_cpus_per_task="1", datatrove_mem_per_cpu="-1", datatrove_gpus_on_node="0",
                                  datatrove_executor="LOCAL")

    def run(self) -> None:
        """All tasks that are not done. Raises UserError, RunFailed."""
        left = self.get_incomplete_ranks()
        if not left:
            return
        with self.progress.items(self.phase.name, self.world_size, "tasks") as bar:
            bar.update(self.world_size - len(left))
            for _ in self._in_processes(left) if self.workers > 1 and len(left) > 1 else map(self.task, left):
                bar.update(1)

    def task(self, rank: int) -> None:
        """One task, unless it is done."""
        if self.is_rank_completed(rank):
            return
        steps = list(self.phase.steps())
        data = None
        try:
            for step in steps:
                data = step(data, rank, self.world_size)
            if data is not None:
                deque(data, maxlen=0)
        except (UserError, RunFailed):
            raise
        except OSError as error:
            raise UserError("curate.output", self.build.output, f"task {rank} of {self.phase.name}: {error.strerror or type(error).__name__}") from None
        except Exception as error:  # noqa: BLE001 its message and its variables may hold a document
            raise RunFailed(f"task {rank} of {self.phase.name}: {told(error)}") from None
        write_json(Path(self.logging_dir.path) / "stats" / f"{rank:05d}.json", [stat.to_dict() for stat in PipelineStats(steps).stats])
        self.mark_rank_as_completed(rank)

    def _in_processes(self, ranks: list[int]) -> Iterator[None]:
        # spawn: the parent may have torch and threads, which a fork would not survive
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(min(self.workers, len(ranks)), mp_context=context, initializer=die_with, initargs=(os.getpid(),))
        try:
            for done in concurrent.futures.as_completed([pool.submit(run_task, str(self.build.work), self.phase.name, rank) for rank in ranks]):
                yield done.result()
        except BaseException as error:  # the other tasks are not worth waiting for: what they have not ended begins again
            for process in list((pool._processes or {}).values()):
                process.kill()
            if isinstance(error, BrokenProcessPool):
                raise UserError("curate.workers", self.workers, "a worker was killed, perhaps for want of memory; the same command goes on from what is "
                                                                "done (fewer workers, or a smaller curate.task_bytes, take less memory)") from None
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@functools.lru_cache(maxsize=2)
def _phases(work: str) -> tuple[Build, dict[str, Phase]]:
    build = Build.open(Path(work))
    return build, {phase.name: phase for phase in build.phases()}


def run_task(work: str, phase: str, rank: int) -> None:
    """One task of a phase, in this process. Raises UserError, RunFailed."""
    build, phases = _phases(work)
    PhaseExecutor(build, phases[phase], workers=1, progress=Progress(False)).task(rank)


def run_phases(build: Build, *, progress: Progress) -> None:
    """All phases, one after the other, on this machine. Raises UserError, RunFailed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for phase in build.phases():
        PhaseExecutor(build, phase, workers=build.settings.workers or cores, progress=progress).run()


def main(argv: list[str]) -> None:
    """`python -m megatron_ext.curate.executor WORK PHASE INDEX COUNT`: the tasks INDEX, INDEX + COUNT, ... of a phase, as an element of a Slurm array does them."""
    work, name, index, count = argv[0], argv[1], int(argv[2]), int(argv[3])
    _, phases = _phases(work)
    if name not in phases:
        raise UserError("phase", name, f"is none of this build's: {', '.join(phases)}")
    for rank in range(index, phases[name].tasks, count):
        run_task(work, name, rank)


if __name__ == "__main__":
    from megatron_ext.parallel.launch import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:]) or 0, sys.argv[1:]))
