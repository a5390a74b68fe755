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


class Workers:
    """Processes that do tasks of any phase of a build, started when there is work for them: what they load (a model, a dictionary) is loaded once.

    With one worker, tasks run in this process.
    """

    def __init__(self, build: Build, number: int):
        self._build, self.number = build, number
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def run(self, executor: "PhaseExecutor", ranks: list[int]) -> Iterator[None]:
        """Yields when a task is done. Raises UserError, RunFailed: the first failure; the other tasks end with it."""
        if self.number <= 1 or self._pool is None and len(ranks) == 1:
            yield from map(executor.task, ranks)
            return
        if self._pool is None:  # spawn: the parent may have torch and threads, which a fork would not survive
            self._pool = concurrent.futures.ProcessPoolExecutor(self.number, mp_context=multiprocessing.get_context("spawn"), initializer=die_with,
                                                                initargs=(os.getpid(),))
        try:
            name, work = executor.phase.name, str(self._build.work)
            for done in concurrent.futures.as_completed([self._pool.submit(run_task, work, name, rank) for rank in ranks]):
                yield done.result()
        except BrokenProcessPool:
            raise UserError("curate.workers", self.number, "a worker was killed, perhaps for want of memory; the same command goes on from what is done "
                                                           "(fewer workers, or a smaller curate.task_bytes, take less memory)") from None

    def close(self, kill: bool) -> None:
        """kill: without waiting for tasks that are under way: what they have not ended begins again."""
        if self._pool is None:
            return
        for process in list((self._pool._processes or {}).values()) if kill else ():
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)


class PhaseExecutor(PipelineExecutor):
    """One phase of a build."""

    def __init__(self, build: Build, phase: Phase, *, progress: Progress):
        super().__init__([], str(build.work / "phases" / phase.name), skip_completed=True)
        self.build, self.phase, self.progress = build, phase, progress

    @property
    def world_size(self) -> int:
        return self.phase.tasks

    def get_distributed_env(self, node_rank: int = -1) -> DistributedEnvVars:
        return DistributedEnvVars(datatrove_node_ips="localhost", datatrove_cpus_per_task="1", datatrove_mem_per_cpu="-1", datatrove_gpus_on_node="0",
                                  datatrove_executor="LOCAL")

    def run(self, workers: Workers | None = None) -> None:
        """All tasks that are not done; without workers, in this process. Raises UserError, RunFailed."""
        left = self.get_incomplete_ranks()
        if not left:
            return
        with self.progress.items(self.phase.name, self.world_size, "tasks") as bar:
            bar.update(self.world_size - len(left))
            for _ in map(self.task, left) if workers is None else workers.run(self, left):
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


@functools.lru_cache(maxsize=2)
def _phases(work: str) -> tuple[Build, dict[str, Phase]]:
    build = Build.open(Path(work))
    return build, {phase.name: phase for phase in build.phases()}


def run_task(work: str, phase: str, rank: int) -> None:
    """One task of a phase, in this process. Raises UserError, RunFailed."""
    build, phases = _phases(work)
    PhaseExecutor(build, phases[phase], progress=Progress(False)).task(rank)


def run_phases(build: Build, *, progress: Progress) -> None:
    """All phases, one after the other, on this machine. Raises UserError, RunFailed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers, done = Workers(build, build.settings.workers or cores), False
    try:
        for phase in build.phases():
            PhaseExecutor(build, phase, progress=progress).run(workers)
        done = True
    finally:
        workers.close(kill=not done)


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
