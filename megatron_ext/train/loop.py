"""The training loop of a stage: from a config to a checkpoint, a report's worth of records, and the reason why it stopped.

    data -> micro-batches -> engine.step -> journal -> validation -> checkpoint -> stop?

The state of a run is the engine's tensors and three numbers (steps, samples, the stop criteria's counters). Learning rate, order of
samples and dropout are functions of them, so that a resume has nothing else to restore.
"""
import contextlib
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_ext import checkpoint, platform
from megatron_ext.config.compose import to_yaml
from megatron_ext.config.geometry import steps_of
from megatron_ext.config.schema import Config
from megatron_ext.data.batches import micro_batches
from megatron_ext.data.build import build_datasets, dataset_tokenizer, ensure_prepared
from megatron_ext.data.samples import Samples
from megatron_ext.errors import RunFailed, UserError
from megatron_ext.evaluate.split import evaluate_split
from megatron_ext.parallel.layout import Layout
from megatron_ext.train import record as records
from megatron_ext.train.engine import Engine
from megatron_ext.train.journal import Journal
from megatron_ext.train.schedule import lr_at
from megatron_ext.train.stop import Stop, StopCriteria


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. `checkpoint`: the newest complete one, if any was written."""

    stop: Stop
    steps: int
    samples: int
    tokens: int
    checkpoint: Path | None
    validation_loss: float | None


@dataclass
class Position:
    """Where a run stands: what a resume continues from."""

    steps: int = 0
    samples: int = 0
    parent: str | None = None  # hash of the checkpoint that this run came from


def train(config: Config) -> Outcome:
    """Runs one stage on this rank. Collective over all ranks of the job.

    Raises:
        UserError: data, checkpoint or layout that cannot work. RunFailed: too many non-finite steps in a row.
    """
    device = platform.install(config.launch.device)
    if platform.is_first_rank():
        ensure_prepared(config.data)  # before the ranks meet: it may take longer than a collective is allowed to
    platform.connect(device, config.launch.timeout)
    first = dist.get_rank() == 0
    layout = layout_of(config)
    data = build_datasets(config.data, ("train", "validation") if config.validation.every or config.validation.at_end else ("train",))
    vocab_size = checked_vocabulary(config, data["train"])
    run_dir = Path(config.run.dir)
    if first:
        claim_run_directory(config, run_dir)
    dist.barrier()
    engine = Engine(config, layout, device, vocab_size=vocab_size)
    steps = steps_of(config)
    criteria = StopCriteria.from_config(config, steps=steps)
    identity = records.data_identity(config.data)
    source = checkpoint.find(config.checkpoint.load, run_dir / "checkpoints")
    position = restore(engine, source, config, identity, criteria) if source else Position()
    if first:  # a refused resume leaves what the run says of itself as it was
        describe_run(config, run_dir)

    journal = Journal(config, device, writes=first, steps=steps, done=position.steps, ranks=len(layout.ranks), vocab_size=vocab_size)
    journal.event(
        "resume" if position.steps else "start", step=position.steps, samples=position.samples, layout=records.layout(config),
        checkpoint=str(source) if source else None, data=identity, vocab_size=vocab_size,
    )
    saver = checkpoint.Checkpoints(
        run_dir / "checkpoints", keep=config.checkpoint.keep, background=config.checkpoint.background,
        sharding=config.checkpoint.format, events=journal.events,
    )
    if source:
        saver.protect(source)
    try:
        outcome = _loop(config, engine, data, saver, journal, criteria, position, steps, vocab_size, identity)
    except BaseException:
        journal.close(exit_code=1)
        raise
    journal.close()
    saver.close()
    return outcome


def _loop(config, engine: Engine, data: dict[str, Samples], saver, journal: Journal, criteria: StopCriteria, position: Position,
          steps: int, vocab_size: int, identity: dict) -> Outcome:
    train_config, groups = config.train, engine.groups
    batch, length = train_config.global_batch_size, config.data.sequence_length
    saved, validation_loss = None, None

    def save(background: bool) -> None:
        nonlocal saved
        with engine.complete_weights():
            saver.save(position.steps, engine.sharded_state(loading=False), {
                "samples": position.samples, "tokens": position.samples * length, "vocab_size": vocab_size,
                "model": records.architecture(config.model, vocab_size), "layout": records.layout(config), "config": asdict(config),
                "stage": config.stage.name, "stop": criteria.state_dict(), "parent": position.parent, "data": identity,
            }, background=background)
        saved = position.steps

    stop = _agreed(criteria.budget(steps_done=position.steps, tokens_done=position.samples * length), config)
    while stop is None:
        saver.poll()
        began = time.perf_counter()
        batches = micro_batches(
            data["train"], position.samples, global_batch=batch, micro_batch=train_config.micro_batch_size,
            dp_rank=groups.dp.rank(), dp_size=groups.dp.size(),
        )
        lr = lr_at(position.steps, config.optim, steps)
        result = engine.step(batches, lr=lr, step=position.steps)
        engine.platform.synchronize()
        seconds = time.perf_counter() - began
        position.steps += 1
        position.samples += batch
        tokens = position.samples * length
        if not result.applied:
            journal.event("skipped_step", step=position.steps, loss=str(result.loss), grad_norm=str(result.grad_norm))
            journal.note(f"step {position.steps}: loss {result.loss}, gradient norm {result.grad_norm}: not finite, step skipped")
        stop = criteria.after_step(steps_done=position.steps, tokens_done=tokens, finite=result.applied or result.searching)
        stop = _agreed(stop, config)  # before the ranks validate together, or do not

        validation = {}
        every = config.validation.every
        if "validation" in data and (every and position.steps % every == 0 or config.validation.at_end and stop and not stop.failed):
            validation = _validate(engine, data["validation"], config)
            validation_loss = validation["validation_loss"]
            verdict = criteria.after_validation(steps_done=position.steps, loss=validation_loss)
            stop = stop if stop and stop.failed else verdict or stop
            journal.event("validation", step=position.steps, **validation)
        journal.step(position.steps, result, lr=lr, seconds=seconds, tokens_done=tokens, validation=validation)
        if stop is None and config.checkpoint.every and position.steps % config.checkpoint.every == 0:
            save(config.checkpoint.background)
    if config.checkpoint.save_at_end and not stop.failed and saved != position.steps:
        saver.poll()
        save(background=False)
    unsaved = None
    try:
        saver.wait()
    except UserError as error:
        unsaved = error
    newest = saver.newest()
    journal.event("stop", step=position.steps, reason=stop.reason, criterion=stop.kind, elapsed=criteria.elapsed,
                  checkpoint=str(newest) if newest else None)
    if stop.failed:
        good = f"the last good checkpoint is {newest}" if newest else "no checkpoint was written"
        raise RunFailed(f"stopped at step {position.steps}: {stop.reason}; {good}")
    if unsaved:
        raise unsaved
    journal.note(f"stopped at step {position.steps}: {stop.reason}" + (f"; checkpoint {newest}" if newest else ""))
    return Outcome(stop, position.steps, position.samples, position.samples * length, newest, validation_loss)


def _agreed(stop: Stop | None, config: Config) -> Stop | None:
    """Rank 0's verdict, where clocks may differ; else all ranks have seen the same numbers."""
    if config.stop.wall_time is None or dist.get_world_size() == 1:
        return stop
    verdict = [stop]
    dist.broadcast_object_list(verdict, src=0)
    return verdict[0]


def _validate(engine: Engine, samples: Samples, config: Config) -> dict:
    result = evaluate_split(engine, samples, count=min(config.validation.samples, samples.samples_per_epoch),
                            micro_batch=config.train.micro_batch_size)
    found = {"validation_loss": result.loss}
    if samples.bytes_per_token:
        found["validation_bits_per_byte"] = result.loss / math.log(2) / samples.bytes_per_token
    return found


# ---- before the first step ---------------------------------------------------------------------------------------------------------


def layout_of(config: Config) -> Layout:
    """The layout over all ranks of the job. Raises UserError where they do not divide."""
    parallel, ranks = config.parallel, dist.get_world_size()
    if ranks % (parallel.tp * parallel.pp * parallel.cp):
        raise UserError("launch.ranks", ranks, f"is not a multiple of tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp}")
    return Layout(parallel.tp, parallel.pp, parallel.vpp, parallel.cp, parallel.sp, tuple(range(ranks)))


def checked_vocabulary(config: Config, samples: Samples) -> int:
    """Words of the model: its own number, or the tokenizer's. Raises UserError when the tokenizer knows more."""
    wanted = config.model.vocab_size
    if wanted is not None and wanted < samples.vocab_size:
        raise UserError("model.vocab_size", wanted, f"the tokenizer has {samples.vocab_size} words; give at least as many, or null")
    return wanted or samples.vocab_size


def claim_run_directory(config: Config, run_dir: Path) -> None:
    """Makes the directory. Raises UserError where it cannot be made, or holds a run that nobody asked to go on with."""
    if config.checkpoint.load is None and checkpoint.find("auto", run_dir / "checkpoints"):
        raise UserError("run.dir", config.run.dir, "holds a run already; add checkpoint.load=auto to go on with it, or name another directory")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("run.dir", config.run.dir, f"cannot be written: {error.strerror}") from None


def describe_run(config: Config, run_dir: Path) -> None:
    """config.yaml and the tokenizer, so that the run can be read and used without the command that made it. Raises UserError."""
    try:
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        with contextlib.suppress(shutil.SameFileError):  # data.tokenizer names the run's own copy
            shutil.copyfile(dataset_tokenizer(config.data)[0], run_dir / "tokenizer.json")
    except OSError as error:
        raise UserError("run.dir", config.run.dir, f"cannot be written: {error.strerror}") from None


def restore(engine: Engine, source: Path, config: Config, identity: dict, criteria: StopCriteria) -> Position:
    """Loads a checkpoint into the engine; where the run continues from. Collective."""
    stored = checkpoint.read_record(source)
    weights_only = config.checkpoint.weights_only
    if not weights_only:
        records.check_data(stored["data"], identity, source)
    expect = {"model": records.architecture(config.model, engine.vocab_size), "layout": records.layout(config)}
    state = engine.sharded_state(loading=True, weights_only=weights_only, sharding=stored["sharding"])
    engine.load_state(checkpoint.load(source, state, expect=expect))
    parent = checkpoint.checkpoint_hash(source)
    if weights_only:
        return Position(parent=parent)
    criteria.load_state_dict(stored["stop"])
    return Position(steps=stored["step"], samples=stored["samples"], parent=parent)
