"""`checkpoint.load=auto` with a damaged checkpoint: it is set aside, and the run goes on from the one before.

A checkpoint is damaged where its bytes are not those that were written (checkpoint/manifest.py: Damaged). One that is named explicitly is refused, and
so is the last one there is: to begin a run anew is for a person to decide.
"""
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_ext import checkpoint
from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.agree import Ranks
from megatron_ext.errors import UserError
from megatron_ext.observe.events import Events

Taken = TypeVar("Taken")


def undamaged(load: str | None, run_dir: Path, take: Callable[[Path | None], Taken]) -> Taken:
    """`take(checkpoint)` of what `checkpoint.load` means, with `auto` of the newest one that is not damaged. Collective.

    Args:
        take: loads it; collective, raises on all ranks alike, and where it raises Damaged it has changed nothing.

    Raises:
        UserError: what `take` raises; a damaged checkpoint that was named or is the only one, or that cannot be renamed.
    """
    directory, ranks = Path(run_dir) / "checkpoints", Ranks()
    try:
        while True:
            source = _meant(load, directory, ranks)
            try:
                if source is not None:
                    _readable(source, ranks)
                return take(source)
            except manifest.Damaged as error:
                if load != "auto" or Path(error.value) != source:
                    raise
                damage = error
            if not _put_away(source, damage, run_dir, ranks):
                raise damage
    finally:
        ranks.close()


def _meant(load: str | None, directory: Path, ranks: Ranks) -> Path | None:
    """As rank 0 sees it: a shared file system may show the nodes different folders for a while."""
    found = problem = None
    if ranks.rank == 0:
        try:
            found = checkpoint.find(load, directory)
        except UserError as error:
            problem = error
    found, problem = ranks.gather((found, problem))[0]
    if problem is not None:
        raise problem
    return found


def _readable(source: Path, ranks: Ranks) -> None:
    """The ranks read the manifest one by one later on: here they agree on what they find."""
    found = None
    try:
        manifest.read_manifest(source)
    except UserError as error:
        found = error
    if first := next((error for error in ranks.gather(found) if error is not None), None):
        raise first


def _put_away(source: Path, damage: manifest.Damaged, run_dir: Path, ranks: Ranks) -> bool:
    """False where there is no other. Rank 0 alone looks: it is the one that renames."""
    alone = problem = None
    if ranks.rank == 0:
        alone = len(manifest.steps(source.parent)) < 2
    if ranks.rank == 0 and not alone:
        try:
            aside = manifest.set_aside(source)
        except OSError as error:
            problem = f"{damage.reason}; it cannot be set aside: {error.strerror}"
        else:
            events = Events(Path(run_dir) / "events.jsonl")
            events.write("checkpoint_damaged", checkpoint=str(source), set_aside=str(aside), reason=damage.reason)
            events.close()
            print(f"warning: {damage}; it is now {aside}, and the run goes on from the one before", file=sys.stderr, flush=True)
    alone, problem = ranks.gather((alone, problem))[0]
    if problem:
        raise UserError(manifest.KEY, source, problem)
    return not alone
