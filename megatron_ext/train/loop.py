"""The training loop of every stage: from a config to a checkpoint, a report's worth of records, and the reason why it stopped.

    step -> journal -> validation -> checkpoint -> stop?

The state of a run is the stage's tensors and a few numbers (steps, samples, tokens, the criteria's counters). Learning rate, order of
samples and random numbers are functions of them, so that a resume has nothing else to restore.
"""
import contextlib
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_ext import checkpoint, platform
from megatron_ext.config.compose import to_yaml
from megatron_ext.config.schema import Config
from megatron_ext.errors import RunFailed, UserError
from megatron_ext.platform import Platform
from megatron_ext.train import record as records
from megatron_ext.train.journal import Journal
from megatron_ext.train.stage import Position, Stage
from megatron_ext.train.stop import Stop, StopCriteria


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. `checkpoint`: the best one where validations choose, else the newest, if any was written."""

    stop: Stop
    steps: int
    samples: int
    tokens: int
    checkpoint: Path | None
    validation: dict[str, float]


def run(config: Config, make: Callable[[Config, Platform], Stage], prepare: Callable[[Config], None]) -> Outcome:
    """Runs one stage on this rank. Collective over all ranks of the job.

    Args:
        make: the stage with its data, without its models.
        prepare: what one process does before the ranks meet: it may take longer than a collective is allowed to.

    Raises:
        UserError: data, checkpoint or layout that cannot work. RunFailed: too many non-finite steps in a row.
    """
    device = platform.install(config.launch.device)
    if platform.is_first_rank():
        prepare(config)
    platform.connect(device, config.launch.timeout)
    first = dist.get_rank() == 0
    stage = make(config, device)
    run_dir = Path(config.run.dir)
    if first:
        claim_run_directory(config, run_dir)
    dist.barrier()
    stage.build()
    criteria = StopCriteria.from_config(config, steps=stage.steps)
    source = checkpoint.find(config.checkpoint.load, run_dir / "checkpoints")
    position, parent = _restored(stage, source, criteria)
    if first:  # a refused resume leaves what the run says of itself as it was
        describe_run(config, run_dir, stage.tokenizer)

    journal = Journal(config, device, writes=first, steps=stage.steps, done=position.steps, ranks=len(stage.layout.ranks),
                      vocab_size=stage.vocab_size, flops=stage.training_flops)
    journal.event(
        "resume" if position.steps else "start", step=position.steps, samples=position.samples, layout=records.layout(config),
        checkpoint=str(parent) if parent else None, data=stage.identity, vocab_size=stage.vocab_size,
    )
    saver = checkpoint.Checkpoints(
        run_dir / "checkpoints", keep=config.checkpoint.keep, background=config.checkpoint.background,
        sharding=config.checkpoint.format, events=journal.events,
    )
    if parent:
        saver.protect(parent)
    try:
        loop = _Loop(config, stage, saver, journal, criteria, position)
        if parent and parent.absolute() == saver.directory / parent.name and checkpoint.read_record(parent)["sharding"] == config.checkpoint.format:
            loop.saved = position.steps  # written again it had another hash, which is not the one that later stages know it by
        outcome = loop.run()
    except BaseException:
        journal.close(exit_code=1)
        raise
    journal.close()
    saver.close()
    if first and config.log.report:
        try:
            stage.report(run_dir, outcome.checkpoint)
        except (OSError, UserError) as error:  # the model is saved: a picture is not worth the run
            warnings.warn(f"report.md could not be written: {error}", RuntimeWarning, stacklevel=1)
    return outcome


class _Loop:
    """One life of a run."""

    def __init__(self, config: Config, stage: Stage, saver: checkpoint.Checkpoints, journal: Journal, criteria: StopCriteria, position: Position):
        self.config, self.stage, self.saver, self.journal, self.criteria, self.position = config, stage, saver, journal, criteria, position
        self.saved: int | None = None
        self.validation: dict[str, float] = {}

    def run(self) -> Outcome:
        config, position = self.config, self.position
        if self.stage.best is not None and self.stage.best.step is not None and self.saver.protect_step(self.stage.best.step):
            self._name_best()  # a life that ended between the two wrote the checkpoint and not its name
        self.stage.begins(position, self.journal)
        stop = _agreed(self.criteria.budget(steps_done=position.steps, tokens_done=position.tokens), config)
        while stop is None:
            stop = self._step()
            if stop is None and config.checkpoint.every and position.steps % config.checkpoint.every == 0 and self.saved != position.steps:
                self._save(config.checkpoint.background)
        if not stop.failed:
            self.stage.ends(position, stop, self.journal)
        if config.checkpoint.save_at_end and not stop.failed and self.saved != position.steps:
            self.saver.poll()
            self._save(background=False)
        return self._outcome(stop)

    def _step(self) -> Stop | None:
        config, position, criteria = self.config, self.position, self.criteria
        self.saver.poll()
        began = time.perf_counter()
        report = self.stage.step(position)
        self.stage.platform.synchronize()
        seconds = time.perf_counter() - began
        position.steps += 1
        position.samples += report.samples
        position.tokens += report.tokens
        if not report.applied:
            self.journal.event("skipped_step", step=position.steps, loss=str(report.loss), grad_norm=str(report.grad_norm))
            self.journal.note(f"step {position.steps}: loss {report.loss}, gradient norm {report.grad_norm}: not finite, step skipped")
        stop = criteria.after_step(steps_done=position.steps, tokens_done=position.tokens, finite=report.applied or report.searching)
        stop = _agreed(stop, config)  # before the ranks validate together, or do not

        every = config.validation.every
        at_end = config.validation.at_end
        validation: dict[str, float] = {}
        if every and position.steps % every == 0 or at_end and stop and not stop.failed:
            validation = self._validate()
        metrics = {"step": position.steps, "loss": report.loss, **report.numbers, **validation}
        own = self.stage.verdict(metrics)
        if own and at_end and not validation:
            validation = self._validate()
            metrics |= validation
        if "validation_loss" in validation:
            own = criteria.after_validation(steps_done=position.steps, loss=validation["validation_loss"]) or own
        stop = stop if stop and stop.failed else own or stop
        self.journal.step(position.steps, report, seconds=seconds, tokens_done=position.tokens, validation=validation)
        if validation and self.stage.best is not None and self.stage.best.better(position.steps, metrics):
            self._save(background=False)
            if self.saver.protect_step(position.steps):
                self._name_best()
        return stop

    def _validate(self) -> dict[str, float]:
        if not self.stage.validates:
            return {}
        self.validation = self.stage.validate(self.position)
        self.journal.event("validation", step=self.position.steps, **self.validation)
        return self.validation

    def _save(self, background: bool) -> None:
        config, position = self.config, self.position
        own = self.stage.record()
        with self.stage.complete():
            self.saver.save(position.steps, self.stage.state(loading=False), {
                "samples": position.samples, "tokens": position.tokens, "vocab_size": self.stage.vocab_size,
                "model": records.architecture(config.model, self.stage.vocab_size), "layout": records.layout(config), "config": asdict(config),
                "stage": config.stage.name, "stop": self.criteria.state_dict(), "parent": position.parent, "parent_path": position.parent_path,
                "data": self.stage.identity, "best": self.stage.best.state_dict() if self.stage.best else None, **own,
            }, background=background)
        self.saved = position.steps

    def _name_best(self) -> None:
        best = self.stage.best
        if dist.get_rank() == 0:
            checkpoint.name_best(self.saver.directory, best.step, best.state_dict())
        self.journal.event("best", step=best.step)

    def _outcome(self, stop: Stop) -> Outcome:
        position, unsaved = self.position, None
        try:
            self.saver.wait()
        except UserError as error:
            unsaved = error
        newest = self.saver.newest()
        chosen = checkpoint.best_of(self.saver.directory) or newest
        self.journal.event("stop", step=position.steps, reason=stop.reason, criterion=stop.kind, elapsed=self.criteria.elapsed,
                           checkpoint=str(chosen) if chosen else None)
        if stop.failed:
            good = f"the last good checkpoint is {newest}" if newest else "no checkpoint was written"
            raise RunFailed(f"stopped at step {position.steps}: {stop.reason}; {good}")
        if unsaved:
            raise unsaved
        which = "the best checkpoint is" if chosen != newest else "checkpoint"
        self.journal.note(f"stopped at step {position.steps}: {stop.reason}" + (f"; {which} {chosen}" if chosen else ""))
        return Outcome(stop, position.steps, position.samples, position.tokens, chosen, self.validation)


def _agreed(stop: Stop | None, config: Config) -> Stop | None:
    """Rank 0's verdict, where clocks may differ; else all ranks have seen the same numbers."""
    if config.stop.wall_time is None or dist.get_world_size() == 1:
        return stop
    verdict = [stop]
    dist.broadcast_object_list(verdict, src=0)
    return verdict[0]


# ---- before the first step ---------------------------------------------------------------------------------------------------------


def claim_run_directory(config: Config, run_dir: Path) -> None:
    """Makes the directory. Raises UserError where it cannot be made, or holds a run that nobody asked to go on with."""
    if config.checkpoint.load is None and checkpoint.find("auto", run_dir / "checkpoints"):
        raise UserError("run.dir", config.run.dir, "holds a run already; add checkpoint.load=auto to go on with it, or name another directory")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("run.dir", config.run.dir, f"cannot be written: {error.strerror}") from None


def describe_run(config: Config, run_dir: Path, tokenizer: Path) -> None:
    """config.yaml and the tokenizer, so that the run can be read and used without the command that made it. Raises UserError."""
    try:
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        with contextlib.suppress(shutil.SameFileError):  # data.tokenizer names the run's own copy
            shutil.copyfile(tokenizer, run_dir / "tokenizer.json")
    except OSError as error:
        raise UserError("run.dir", config.run.dir, f"cannot be written: {error.strerror}") from None


def _restored(stage: Stage, source: Path | None, criteria: StopCriteria) -> tuple[Position, Path | None]:
    """Where the run continues from, and the checkpoint that it came from: its own, an earlier stage's, or none. Collective."""
    config = stage.config
    start = checkpoint.find(config.checkpoint.start, Path(config.run.dir) / "checkpoints", key="checkpoint.start", best=True)
    if source is not None and config.checkpoint.weights_only:
        source, start = None, source
    if source is None:
        if start is None:
            return Position(), None
        stage.start(start)
        return Position(parent=checkpoint.checkpoint_hash(start), parent_path=str(start.absolute())), start
    stored = checkpoint.read_record(source)
    if stored.get("stage", config.stage.name) != config.stage.name:
        raise UserError("checkpoint.load", source, f"is of stage {stored['stage']}, this one is {config.stage.name}; a stage starts from an earlier one "
                                                   "with checkpoint.start")
    records.check_data(stored["data"], stage.identity, source)
    own, known = source.absolute().parent == (Path(config.run.dir) / "checkpoints").absolute(), stored.get("parent")
    if own and start is not None and known is not None and checkpoint.checkpoint_hash(start) != known:
        raise UserError("checkpoint.start", start, f"is not what this run began with ({stored.get('parent_path')}, hash {known[:12]}...). To go on with the "
                                                   f"run, name that one; to begin from this one, remove {config.run.dir} or name another run.dir")
    expect = {"model": records.architecture(config.model, stage.vocab_size), "layout": records.layout(config), "lora": asdict(config.lora)}
    state = stage.state(loading=True, sharding=stored["sharding"])
    stage.load(checkpoint.load(source, state, expect=expect), stored)
    criteria.load_state_dict(stored["stop"])
    if stage.best is not None and stored.get("best"):
        stage.best.load_state_dict(stored["best"])
    # A run that goes on in its own directory has the parent that it had.
    kept = (stored.get("parent"), stored.get("parent_path")) if own else (checkpoint.checkpoint_hash(source), str(source.absolute()))
    tokens = stored.get("tokens", stored["samples"] * config.data.sequence_length)
    return Position(stored["step"], stored["samples"], tokens, *kept), source
