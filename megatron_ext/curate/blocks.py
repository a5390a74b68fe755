"""What a step of curation is: the contract between the pipeline and the rooms that decide about documents. No datatrove, no torch.

Two kinds of steps stand in `curate.steps`, by the names of `BLOCKS`:

    Block         decides about one document alone: normalise, language, privacy, quality, taxonomy, ...
    GlobalBlock   has to see all documents first: duplicates. It names phases that run before, then decides document by document too

A block is made from its settings (a frozen dataclass, `Config.curate.NAME`) in the process that uses it, once a process: what it loads (a model, word lists)
may be large, and is never sent to another process. It is a function of the document and its settings alone, never of the order or of the worker, so that the
output is the same bytes whatever the number of workers.

Nothing here may put text into an error, a log or a count: reasons and names of counts are short constant words.
"""
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_ext.errors import UserError

IDENTITY = ("source", "sha256", "text_sha256", "derived_from")  # of metadata: what a block leaves there of these is undone
KEEP, CHANGE, DROP = "keep", "change", "drop"


@dataclass(frozen=True)
class Verdict:
    """What became of a document.

    Attributes:
        action: KEEP (nothing was touched), CHANGE (the block wrote into the document), DROP.
        reason: of a DROP a short constant word, such as "too_short"; the ledger counts them for each source. Of a CHANGE it may be empty.
        counts: what else is to be added up for each source, such as {"email": 2}: names are constant words too.
        of: of a copy the ids of the documents that stay in its place; of a CHANGE those of the documents that hold what was taken out. A removal of these
            reaches it (ledger.py).
    """

    action: str = KEEP
    reason: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    of: tuple[str, ...] = ()


KEPT = Verdict()
CHANGED = Verdict(CHANGE)


def dropped(reason: str, **counts: int) -> Verdict:
    """DROP with a reason."""
    return Verdict(DROP, reason, counts)


class Document(Protocol):
    """datatrove's `Document`, as the blocks see it; a test may hand in any object with these fields.

    Attributes:
        text: NFC, lines end in \\n.
        id: 32 hexadecimal digits, of source, path and position: it stays when the text changes.
        metadata: `source`, `licence`, `owner`, `date`, `origin` (path and position), `sha256` (of the raw bytes), `language`, `domain`, `title` (texts; absent
            when unknown), `images` and `tables` (lists of dicts, ingest/parts.py), `derived_from` (ids of the documents that this one was made of: whoever
            makes new records out of documents writes it, so that a removal reaches them). Texts inside (origin, title, captions, cells) are data of people too: a block
            that removes personal data has to look at them. Values are JSON.
        media: datatrove's; unused.
    """

    text: str
    id: str
    metadata: dict[str, Any]
    media: list


class Block(Protocol):
    """A step that decides about one document. `__init__(settings)` may load what it needs.

    A block may also have `take_report() -> dict`: what it has to tell since the last call, which empties it. It is called before and after each task; the
    function that `Entry.report` names makes one report of all.
    """

    def process(self, document: Document) -> Verdict:
        """Keeps, changes in place, or drops the document.

        An exception ends the build: the message that the user sees holds the step, the document's id and the exception's type, never its text.
        """
        ...


@dataclass(frozen=True)
class Shards:
    """Documents that lie on disk between two phases: shard i holds those that task i of `count` gives, in their order.

    Attributes:
        folder: where they are. count: of shards.
        reader: makes a datatrove step that yields the documents of shard `rank` (`world_size` is `count`).
        work: a folder for the step's own files. It is removed with the build's other working files: no text and nothing personal may lie there
            that could not lie in the shards themselves.
        ids: of (shard, number of a document in it) the ids, in the order asked for; None where nobody keeps an index.
    """

    folder: Path
    count: int
    reader: Callable[[], Any]
    work: Path
    ids: Callable[[Sequence[tuple[int, int]]], list[str]] | None = None


@dataclass(frozen=True)
class Phase:
    """Tasks that may run side by side, in any order and on any machine; the next phase starts when all have ended.

    Attributes:
        name: in the names of logs and jobs: letters, digits, _.
        tasks: a number that follows from the input and settings alone, not from how many workers there are.
        steps: makes the datatrove steps of the pipeline, called in the process that runs it. A task that was killed is run again from its start: what it
            writes has to be the same again, under the same names.
    """

    name: str
    tasks: int
    steps: Callable[[], Sequence[Any]]


class GlobalBlock(Protocol):
    """A step that has to see all documents before it can decide about one. `__init__(settings)` must be cheap."""

    def phases(self, shards: Shards) -> Sequence[Phase]:
        """What has to be done once over all documents. Called again at each restart: it may look at settings and `shards.count`, not at files."""
        ...

    def decide(self, shards: Shards, rank: int) -> Block:
        """The block for the documents of shard `rank`; it is given all of them, in their order, once each."""
        ...


@dataclass(frozen=True)
class Entry:
    """Where a step is.

    Attributes:
        block: "module:Class". settings: the path of its settings below `Config.curate`. whole: it is a GlobalBlock.
        report: "module:function" of (an iterable of reports, settings.samples) -> an object with `to_json()` and `markdown()`; None where the block reports nothing.
    """

    block: str
    settings: str
    whole: bool = False
    report: str | None = None


_ROOM = "megatron_ext.curate"
BLOCKS: dict[str, Entry] = {
    "normalise": Entry(f"{_ROOM}.ingest.block:Normalise", "ingest"),
    "language": Entry(f"{_ROOM}.ingest.block:Language", "ingest"),
    "privacy": Entry(f"{_ROOM}.privacy.block:Privacy", "privacy", report=f"{_ROOM}.privacy.report:merged"),
    "quality": Entry(f"{_ROOM}.quality.block:Quality", "quality"),
    "decontaminate": Entry(f"{_ROOM}.quality.block:Decontaminate", "quality"),
    "exact": Entry(f"{_ROOM}.quality.block:ExactDuplicates", "quality", whole=True),
    "near": Entry(f"{_ROOM}.quality.block:NearDuplicates", "quality", whole=True),
    "paragraphs": Entry(f"{_ROOM}.quality.block:ParagraphDuplicates", "quality", whole=True),
    "taxonomy": Entry(f"{_ROOM}.taxonomy.block:Taxonomy", "taxonomy"),
    "select": Entry(f"{_ROOM}.ingest.block:Select", "select"),
}


def entry(name: str) -> Entry:
    """Raises UserError for a step that is not there."""
    if name not in BLOCKS:
        raise UserError("curate.steps", name, f"is no step; there are {', '.join(BLOCKS)}")
    return BLOCKS[name]


@functools.lru_cache(maxsize=32)
def opened(name: str, settings: object) -> Any:
    """The block of a step with these settings, made once in this process.

    Raises:
        UserError: an unknown step; an optional package that is missing (with its pip line); files of its own that cannot be read.
    """
    return resolve(entry(name).block)(settings)


def resolve(name: str) -> Any:
    """What "module:name" names."""
    module, _, inner = name.partition(":")
    return getattr(importlib.import_module(module), inner)
