"""The training loop of every stage: from a config to a checkpoint, a report's worth of records, and the reason why it stopped.

    step -> journal -> validation -> checkpoint -> stop?

The state of a run is the stage's tensors and a few numbers (steps, samples, tokens, the criteria's counters). Learning rate, order of
samples and random numbers are functions of them, so that a resume has nothing else to restore. What watches over a life is in life.py, steps
that go wrong in recovery.py, when to save in saves.py.
"""
import contextlib
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_ext import checkpoint, platform, private
from megatron_ext.config.compose import to_yaml
from megatron_ext.config.schema import Config
from megatron_ext.errors import RunFailed, UserError
from megatron_ext.files import write_whole
from megatron_ext.health.evidence import record_flight
from megatron_ext.parallel.lease import hold
from megatron_ext.parallel.signals import Interrupted
from megatron_ext.platform import Platform
from megatron_ext.train import record as records
from megatron_ext.train.fallback import undamaged
from megatron_ext.train.foretold import foretold
from megatron_ext.train.journal import Journal
from megatron_ext.train.life import Watched
from megatron_ext.train.recovery import Recovery, bad
from megatron_ext.train.saves import Saves
from megatron_ext.train.stage import Position, Stage, StepReport
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
    device, run_dir = platform.install(config.launch.device), Path(config.run.dir)
    with contextlib.ExitStack() as stack:
        if platform.is_first_rank():
            claim_run_directory(config, run_dir)
        before = private.own_files(private=config.run.private)
        if platform.is_first_rank():
            stack.enter_context(hold(run_dir))
            with private.umask(before):  # prepared data is for every run
                prepare(config)
        record_flight()
        platform.connect(device, config.launch.timeout)
        stage = make(config, device)
        life = Watched(config, stage.layout, device, run_dir)
        try:
            outcome = _live(config, stage, life, device, run_dir)
        except BaseException as error:
            life.failed(error)
            raise
        life.close(outcome.stop.reason)
    if dist.get_rank() == 0 and config.log.report and not outcome.stop.unfinished:
        try:
            stage.report(run_dir, outcome.checkpoint)
        except (OSError, UserError) as error:  # the model is saved: a picture is not worth the run
            warnings.warn(f"report.md could not be written: {error}", RuntimeWarning, stacklevel=1)
    return outcome


def _live(config: Config, stage: Stage, life: Watched, device: Platform, run_dir: Path) -> Outcome:
    """From the models to the last checkpoint of this life."""
    first, stage.life = dist.get_rank() == 0, life
    stage.build()
    recovery, criteria = Recovery(config.recovery), StopCriteria.from_config(config, steps=stage.steps)
    position, parent = undamaged(config.checkpoint.load, run_dir, lambda source: _restored(stage, source, criteria, recovery))
    if first:  # a refused resume leaves what the run says of itself as it was
        describe_run(config, run_dir, stage.tokenizer)
    life.ledger.accepted()

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
        loop = _Loop(config, stage, life, saver, journal, criteria, recovery, position)
        if parent and parent.absolute() == saver.directory / parent.name and checkpoint.read_record(parent)["sharding"] == config.checkpoint.format:
            loop.saves.done = position.steps  # written again it had another hash, which is not the one that later stages know it by
        outcome = loop.run()
    except BaseException:
        journal.close(exit_code=1)
        raise
    journal.close()
    saver.close()
    return outcome


class _Loop:
    """One life of a run."""

    def __init__(self, config: Config, stage: Stage, life: Watched, saver: checkpoint.Checkpoints, journal: Journal, criteria: StopCriteria,
                 recovery: Recovery, position: Position):
        self.config, self.stage, self.life, self.saver, self.journal = config, stage, life, saver, journal
        self.criteria, self.recovery, self.position = criteria, recovery, position
        self.saves = Saves(config, saver)
        self.curation = records.curation(config.data, position.curation)
        self.validation: dict[str, float] = {}
        self.seconds: deque[float] = deque(maxlen=1000)  # of the newest steps

    def run(self) -> Outcome:
        config, position = self.config, self.position
        if self.stage.best is not None and self.stage.best.step is not None and self.saver.protect_step(self.stage.best.step):
            self._name_best()  # a life that ended between the two wrote the checkpoint and not its name
        self.stage.begins(position, self.journal)
        if self.stage.samples_move_on:
            position.samples = self.recovery.past(position.samples, config.train.global_batch_size)
        stop = _agreed(self.criteria.budget(steps_done=position.steps, tokens_done=position.tokens), config)
        while stop is None:
            stop = self._step()
            stop = stop or self.life.told()
            if stop is None and self.saves.due(position.steps):
                self._save(config.checkpoint.background)
        if not stop.failed and not stop.unfinished:
            with self.life.phase("evaluation"):
                self.stage.ends(position, stop, self.journal)
        if (config.checkpoint.save_at_end or stop.unfinished and position.steps) and not stop.failed and self.saves.done != position.steps:
            self.saver.poll()
            self._save(background=False)
        self._compare_with_plan()
        return self._outcome(stop)

    def _compare_with_plan(self) -> None:
        """What the plan said beside what was measured: a figure for people, never worth a run."""
        engine = getattr(self.stage, "engine", None)
        if not self.journal.writes or engine is None or engine.optimizer is None or not self.seconds:
            return
        try:
            self.journal.event("foretold", **foretold(self.config, engine, self.stage.platform, self.seconds))
        except Exception as error:  # noqa: BLE001
            warnings.warn(f"the plan could not be compared with the run: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=1)

    def _taken(self) -> tuple[StepReport, float]:
        """One step, and its seconds."""
        with self.life.step(self.position.steps):
            began = time.perf_counter()
            report = self.stage.step(self.position)
            self.stage.platform.synchronize()
            return report, time.perf_counter() - began

    def _step(self) -> Stop | None:
        config, position, criteria = self.config, self.position, self.criteria
        self.saver.poll()
        try:
            report, seconds = self._taken()
        except Interrupted:
            return self.life.told()
        part = (position.samples, position.samples + report.samples)
        if self.stage.samples_move_on:
            if bad(report):
                self._tell_bad("bad_step", report, part)
                report, seconds = self._taken()
                if bad(report):
                    return self._leave_out(part, report)
                self._blame("hardware", part, "the same step gave finite numbers when it was done once more")
            elif self.recovery.spikes(report.loss):
                return self._go_back(part, report)
            elif self.recovery.cleared(part):
                self._blame("hardware", part, "the loss did not jump when these samples were trained on once more")
        elif bad(report):
            self._tell_bad("skipped_step", report, part)
        self.recovery.keep(report.loss)
        position.steps += 1
        position.samples += report.samples
        position.tokens += report.tokens
        self.life.stepped(position.steps, seconds, self.journal)
        self.seconds.append(seconds)
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
        if self.stage.samples_move_on:
            position.samples = self.recovery.past(position.samples, report.samples)
        if validation and self.stage.best is not None and self.stage.best.better(position.steps, metrics):
            self._save(background=False)
            if self.saver.protect_step(position.steps):
                self._name_best()
        return stop

    # ---- steps that go wrong (recovery.py)

    def _tell_bad(self, kind: str, report: StepReport, part: tuple[int, int]) -> None:
        step = self.position.steps + 1
        self.journal.event(kind, step=step, samples=list(part), loss=str(report.loss), grad_norm=str(report.grad_norm))
        self.journal.note(f"step {step}: loss {report.loss}, gradient norm {report.grad_norm} on samples {part[0]} to {part[1] - 1}")

    def _blame(self, whom: str, part: tuple[int, int], why: str) -> None:
        step = self.position.steps + 1
        self.journal.event("blame", step=step, samples=list(part), whom=whom, reason=why)
        self.journal.note(f"step {step}: points to {whom}: {why}")

    def _leave_out(self, part: tuple[int, int], report: StepReport) -> Stop | None:
        """The samples of a step that changed nothing are skipped, and it counts as none."""
        self._blame("data", part, f"not finite, and not when it was done once more: samples {part[0]} to {part[1] - 1} are left out")
        self.recovery.skip.append(part)
        self.position.samples = self.recovery.past(self.position.samples, report.samples)
        return self.criteria.not_finite(step=self.position.steps + 1)

    def _go_back(self, part: tuple[int, int], report: StepReport) -> Stop | None:
        """To the newest checkpoint, since a loss that jumped has changed the weights already."""
        position, recovery, step = self.position, self.recovery, self.position.steps + 1
        self._tell_bad("loss_spike", report, part)
        source = self.saves.settled()
        if recovery.rewinds >= self.config.recovery.max_rewinds:
            return Stop(f"the loss jumped to {report.loss:.4g}, and the run has gone back {recovery.rewinds} times (recovery.max_rewinds)", "loss_spike")
        if source is None:
            return Stop(f"the loss jumped to {report.loss:.4g} before the first checkpoint", "loss_spike")
        if recovery.suspected(part):
            self._blame("data", part, f"the loss jumped twice on samples {part[0]} to {part[1] - 1}: they are left out")
            recovery.skip.append(part)
        recovery.rewinds += 1
        found = _loaded(self.stage, source, self.criteria, recovery)
        position.steps, position.samples, position.tokens = found.steps, found.samples, found.tokens
        self.saves.done = position.steps
        self.life.ledger.rewind(position.steps)
        self.journal.rewind(position.steps)
        self.journal.event("rewind", step=position.steps, from_step=step, checkpoint=str(source))
        self.journal.note(f"back to step {position.steps} ({source.name}) from step {step}")
        position.samples = recovery.past(position.samples, report.samples)
        return None

    # ---- validation and checkpoints

    def _validate(self) -> dict[str, float]:
        if not self.stage.validates:
            return {}
        with self.life.phase("evaluation"):
            self.validation = self.stage.validate(self.position)
        self.journal.event("validation", step=self.position.steps, **self.validation)
        return self.validation

    def _save(self, background: bool) -> None:
        config, position = self.config, self.position
        own = self.stage.record()
        with self.life.phase("checkpoint"), self.stage.complete():
            self.saver.save(position.steps, self.stage.state(loading=False), {
                "samples": position.samples, "tokens": position.tokens, "vocab_size": self.stage.vocab_size,
                "model": records.architecture(config.model, self.stage.vocab_size), "layout": records.layout(config), "config": asdict(config),
                "stage": config.stage.name, "stop": self.criteria.state_dict(), "parent": position.parent, "parent_path": position.parent_path,
                "data": self.stage.identity, "best": self.stage.best.state_dict() if self.stage.best else None,
                "recovery": self.recovery.state_dict(), "origin": position.origin,
                "curation": self.curation, **own,
            }, background=background)
        self.saves.done = position.steps

    def _name_best(self) -> None:
        best = self.stage.best
        if dist.get_rank() == 0:
            checkpoint.name_best(self.saver.directory, best.step, best.state_dict())
        self.journal.event("best", step=best.step)

    def _outcome(self, stop: Stop) -> Outcome:
        position, unsaved = self.position, None
        try:
            with self.life.phase("checkpoint"):
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
        if stop.unfinished:
            chosen = newest
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
    private.make_directory(run_dir, private=config.run.private)


def describe_run(config: Config, run_dir: Path, tokenizer: Path) -> None:
    """config.yaml and the tokenizer, so that the run can be read and used without the command that made it. Raises UserError."""
    try:
        write_whole(run_dir / "config.yaml", to_yaml(config))
        write_whole(run_dir / "tokenizer.json", Path(tokenizer).read_bytes())
        records.keep_curation(config.data, run_dir)
    except OSError as error:
        raise UserError("run.dir", config.run.dir, f"cannot be written: {error.strerror}") from None


def _restored(stage: Stage, source: Path | None, criteria: StopCriteria, recovery: Recovery) -> tuple[Position, Path | None]:
    """Where the run continues from, and the checkpoint that it came from: its own, an earlier stage's, or none. Collective."""
    config = stage.config
    start = checkpoint.find(config.checkpoint.start, Path(config.run.dir) / "checkpoints", key="checkpoint.start", best=True)
    if source is not None and config.checkpoint.weights_only:
        source, start = None, source
    if source is None:
        if start is None:
            return Position(), None
        stage.start(start)
        begun = checkpoint.read_record(start)
        return Position(parent=checkpoint.checkpoint_hash(start), parent_path=str(start.absolute()), origin=begun.get("origin"),
                        curation=begun.get("curation") or []), start
    stored = checkpoint.read_record(source)
    if stored.get("stage", config.stage.name) != config.stage.name:
        raise UserError("checkpoint.load", source, f"is of stage {stored['stage']}, this one is {config.stage.name}; a stage starts from an earlier one "
                                                   "with checkpoint.start")
    records.check_data(stored["data"], stage.identity, source)
    own, known = source.absolute().parent == (Path(config.run.dir) / "checkpoints").absolute(), stored.get("parent")
    if own and start is not None and known is not None and checkpoint.checkpoint_hash(start) != known:
        raise UserError("checkpoint.start", start, f"is not what this run began with ({stored.get('parent_path')}, hash {known[:12]}...). To go on with the "
                                                   f"run, name that one; to begin from this one, remove {config.run.dir} or name another run.dir")
    position = _loaded(stage, source, criteria, recovery)
    position.origin, position.curation = stored.get("origin"), stored.get("curation") or []
    # A run that goes on in its own directory has the parent that it had.
    position.parent, position.parent_path = (known, stored.get("parent_path")) if own else (checkpoint.checkpoint_hash(source), str(source.absolute()))
    return position, source


def _loaded(stage: Stage, source: Path, criteria: StopCriteria, recovery: Recovery) -> Position:
    """Takes a checkpoint of the same stage whole. Collective."""
    config, stored = stage.config, checkpoint.read_record(source)
    expect = {"model": records.architecture(config.model, stage.vocab_size), "layout": records.layout(config), "lora": asdict(config.lora)}
    state = stage.state(loading=True, sharding=stored["sharding"])
    stage.load(checkpoint.load(source, state, expect=expect), stored)
    criteria.load_state_dict(stored["stop"])
    if stored.get("recovery"):
        recovery.load_state_dict(stored["recovery"])
    if stage.best is not None and stored.get("best"):
        stage.best.load_state_dict(stored["best"])
    tokens = stored.get("tokens", stored["samples"] * config.data.sequence_length)
    return Position(stored["step"], stored["samples"], tokens)
