"""Rules of `curate`: steps in an order that can work, files that are there. They belong to the rules of `validate.py`, which says what a rule is. No torch."""
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.config.layouts import Rule
from megatron_ext.config.schema import Config
from megatron_ext.curate import config as curate
from megatron_ext.curate.blocks import BLOCKS
from megatron_ext.curate.ingest.licences import USES
from megatron_ext.errors import UserError


def steps_are_in_order(config: Config) -> Iterator[UserError]:
    steps = config.curate.steps
    shown = ",".join(steps)
    for step in steps:
        if step not in BLOCKS:
            yield UserError("curate.steps", step, f"is no step; there are {', '.join(BLOCKS)}")
            return
    if len(set(steps)) < len(steps):
        yield UserError("curate.steps", shown, "names a step twice")
    if "normalise" in steps and steps[0] != "normalise":
        yield UserError("curate.steps", shown, "normalise goes first: what a text is compared by must not depend on how it was written")
    whole = next((place for place, step in enumerate(steps) if BLOCKS[step].whole), len(steps))
    if "privacy" in steps[whole + 1 :]:
        yield UserError("curate.steps", shown, f"privacy must stand before {steps[whole]}, for which documents are written to disk: personal data would lie there")


def input_is_named(config: Config) -> Iterator[UserError]:
    if config.curate.steps and config.input is None:
        yield UserError("input", "null", "name the files that curate.steps are for: prepare input=PATH output=DIR curate=standard")


def curate_files_exist(config: Config) -> Iterator[UserError]:
    for key, value in (("curate.ingest.catalogue", config.curate.ingest.catalogue), ("curate.removals", config.curate.removals)):
        if value is not None and not Path(value).is_file():
            yield UserError(key, value, "is not a file")


def uses_are_known(config: Config) -> Iterator[UserError]:
    for use in config.curate.uses:
        if use not in USES:
            yield UserError("curate.uses", use, f"must be one of {', '.join(USES)}")


def rooms_agree(config: Config) -> Iterator[UserError]:
    """What the rooms of curation say of their own settings, for the steps that are used."""
    used = {BLOCKS[step].settings.split(".")[0] for step in config.curate.steps if step in BLOCKS}
    for room in curate.ROOMS:
        name = room.__name__.split(".")[-2]
        if name in used and hasattr(room, "problems"):
            yield from room.problems(getattr(config.curate, name))


CURATE: tuple[Rule, ...] = (steps_are_in_order, input_is_named, curate_files_exist, uses_are_known, rooms_agree)
