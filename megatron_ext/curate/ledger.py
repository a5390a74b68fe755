"""Which documents are meant, which builds hold them, and which runs saw them: what is behind the command `ledger`.

A run saw a document if a sample that it was trained on holds a token of it. Which samples those are follows from the order of samples, a function of the seed
(data/order.py), and from how many samples the run's newest checkpoint says it has used. A run that started from a checkpoint has seen what that one had.
"""
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_ext.config.build import from_dict
from megatron_ext.config.schema import Config
from megatron_ext.config.spans import spans_of
from megatron_ext.config.stages import CHAT
from megatron_ext.curate.copies import copies
from megatron_ext.curate.documents import document_id, text_sha256
from megatron_ext.curate.index import find, read_index, split_codes
from megatron_ext.curate.ingest.block import normalised
from megatron_ext.curate.ingest.config import IngestConfig
from megatron_ext.curate.ingest.files import Readers, kind_of, raw_sha256
from megatron_ext.curate.ingest.items import Item, Unreadable
from megatron_ext.curate.ingest.records import Reading
from megatron_ext.curate.privacy.hidden import Hidden
from megatron_ext.curate.tokens import DOCUMENTS
from megatron_ext.data.blend import Blend
from megatron_ext.data.decompress import file_chunks
from megatron_ext.data.index import document_lengths
from megatron_ext.data.order import SampleOrder
from megatron_ext.data.prepared import FILE, SPLITS, Prepared
from megatron_ext.errors import UserError

SHOWN = 5  # samples that are named


@dataclass(frozen=True)
class Wanted:
    """The documents that were asked for: sets of hexadecimal digits, by what they name."""

    ids: frozenset[str] = frozenset()
    raw: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()

    def by_name(self) -> dict[str, frozenset[str]]:
        return {"id": self.ids, "sha256": self.raw, "text_sha256": self.texts}

    def __or__(self, other: "Wanted") -> "Wanted":
        return Wanted(self.ids | other.ids, self.raw | other.raw, self.texts | other.texts)


@dataclass(frozen=True)
class Held:
    """Documents in a prepared directory. `numbers`: split -> their numbers in it; `entries`: what a removal names them by."""

    directory: Path
    numbers: Mapping[str, list[int]]
    entries: tuple[dict[str, str], ...]


@dataclass
class Seen:
    """What a run had of the documents. `samples`: those that hold them, of all that it used; `reasons`: how else it came by them; `unknown`: why it cannot be told."""

    run: Path
    stage: str
    step: int
    samples: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def seen(self) -> bool:
        return bool(self.samples or self.reasons)

    def sentence(self) -> str:
        told = []
        if self.samples:
            shown = ", ".join(map(str, self.samples[:SHOWN])) + (", ..." if len(self.samples) > SHOWN else "")
            told.append(f"in {len(self.samples)} of its samples ({shown}) up to step {self.step}")
        told += self.reasons
        verdict = "saw it: " + "; ".join(told) if told else "cannot be told: " + "; ".join(self.unknown) if self.unknown else f"has not seen it up to step {self.step}"
        return f"{self.run} ({self.stage}) {verdict}"


def wanted(text: str, hidden: Hidden | None = None) -> Wanted:
    """What a person names a document by: its id (32 hexadecimal digits), a hash of its bytes or its text (64), SOURCE:PATH or SOURCE:PATH#POSITION as `origin`
    has it, or a file that lies here: all documents in it, and copies of them anywhere.

    Args:
        hidden: with the key and the settings of builds that took personal data out; what these call the document is looked for, too.

    Raises:
        UserError: none of these, or a file that cannot be read.
    """
    found = _plainly(text, hidden)
    if hidden is None or hidden.blind:
        return found
    return found | Wanted(*(frozenset(map(one, names)) for one, names in ((hidden.identity, found.ids), (hidden.digest, found.raw), (hidden.digest, found.texts))))


def _plainly(text: str, hidden: Hidden | None) -> Wanted:
    if len(text) in (32, 64) and all(letter in "0123456789abcdef" for letter in text):
        return Wanted(ids=frozenset((text,))) if len(text) == 32 else Wanted(raw=frozenset((text,)), texts=frozenset((text,)))
    path = Path(text)
    if path.is_file():
        return _of_file(path, hidden)
    source, colon, place = text.partition(":")
    if colon and source and place:
        file, _, position = place.partition("#")
        return Wanted(ids=frozenset((document_id(source, file, position),)))
    raise UserError("--document", text, "must be an id (32 hexadecimal digits), a sha256 (64), SOURCE:PATH[#POSITION], or a file that is here")


def _of_file(path: Path, hidden: Hidden | None) -> Wanted:
    raw, texts = set(), set()
    readers = Readers()
    try:
        raw.add(raw_sha256(path, 0, path.stat().st_size))
        kind = kind_of(path.name)
        for item in readers.read(path, kind, Reading(IngestConfig())) if kind else ():
            if isinstance(item, Item):
                raw.add(item.sha256)
                texts.add(text_sha256(text := normalised(item.text)))
                if hidden is not None and hidden.blind:
                    texts.add(text_sha256(hidden.cleaned(text)))
    except Unreadable as error:
        if not raw:
            raise UserError("--document", path, error.reason) from None
    finally:
        readers.close()
    return Wanted(raw=frozenset(raw), texts=frozenset(texts))


def held(directory: Path, asked: Wanted) -> Held | None:
    """What a prepared directory holds of the documents; None where it was prepared without curation. Raises UserError: no prepared directory."""
    prepared = Prepared.load(directory)
    if not (directory / DOCUMENTS).exists():
        return None
    rows = read_index(directory / DOCUMENTS)
    found = find(rows, asked.by_name())
    if not len(found):
        return Held(directory, {}, ())
    codes = split_codes(rows, tuple(prepared.fields["settings"]["split"]))
    numbers = {}
    for code in np.unique(codes[found]):  # of each row the number among those of its split
        numbers[SPLITS[code]] = np.searchsorted(np.flatnonzero(codes == code), found[codes[found] == code]).tolist()
    entries = tuple({"id": bytes(row["id"]).hex(), "sha256": bytes(row["raw"]).hex(), "text_sha256": bytes(row["text"]).hex()} for row in rows[found])
    return Held(directory, numbers, entries)


@dataclass(frozen=True)
class Copied:
    """What copies.py found, over several builds. `unknown`: builds of which it cannot be told."""

    entries: tuple[dict[str, str], ...] = ()
    stay: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    unknown: tuple[str, ...] = ()

    @classmethod
    def of(cls, directories: Iterable[Path], asked: Wanted) -> "Copied":
        """Of what lies behind prepared directories. Raises UserError: a file that cannot be read."""
        texts = {Prepared.load(directory).fields["curation"]["text"]: directory for directory in directories}
        entries: dict[str, dict[str, str]] = {}
        stay, shared, unknown = set(), set(), []
        for text, directory in texts.items():
            if not (Path(text) / "dropped").is_dir():
                unknown.append(f"{text}, from which {directory} was made, is gone: which copies were dropped there cannot be told")
                continue
            found = copies(Path(text), asked.by_name())
            entries |= {entry["id"]: entry for entry in found.entries}
            stay |= found.stay
            shared |= found.shared
        return cls(tuple(entries.values()), frozenset(stay), frozenset(shared), tuple(unknown))


# ---- runs ---------------------------------------------------------------------------------------------------------------------------

def runs_in(folder: Path) -> Iterator[Path]:
    """Run directories (those with checkpoints) in a folder and below it, itself included."""
    if (folder / "checkpoints").is_dir():
        yield folder
        return
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")) if folder.is_dir() else ():
        yield from runs_in(inner)


def directories(runs: Iterable[Path], also: str | None) -> list[Path]:
    """The prepared directories that runs name and that are still there, and one more."""
    from megatron_ext.checkpoint import manifest

    found: dict[Path, None] = {} if also is None else {Path(also).absolute(): None}
    for run in runs:
        for step in manifest.steps(run / "checkpoints")[-1:]:
            try:
                named = manifest.read_record(step).get("curation") or ()
            except UserError:
                continue
            found |= dict.fromkeys(Path(one["path"]) for one in named if "path" in one and (Path(one["path"]) / FILE).exists())
    return list(found)


def look(runs: Iterable[Path], asked: Wanted) -> list[Seen]:
    """What each run saw of the documents."""
    from megatron_ext.checkpoint import manifest

    found: dict[str, Seen] = {}  # by the hash of a checkpoint
    records: list[tuple[Seen, dict]] = []
    for run in runs:
        steps = manifest.steps(run / "checkpoints")
        if not steps:
            continue
        try:
            record = manifest.read_record(steps[-1])
        except UserError as error:
            records.append((Seen(run, "?", 0, unknown=[error.reason]), {}))
            continue
        seen = Seen(run, str(record.get("stage")), int(record.get("step") or steps[-1].name.rpartition("_")[2]))
        _own(seen, record, asked)
        records.append((seen, record))
        for step in steps:
            found[manifest.checkpoint_hash(step)] = seen
    for seen, record in records:  # a parent may come behind its child
        parent, path = found.get(record.get("parent")), [seen]
        while parent is not None and parent not in path:
            path.append(parent)
            if parent.seen:
                seen.reasons.append(f"it started from {parent.run}, which saw it")
                break
            parent = next((found.get(one[1].get("parent")) for one in records if one[0] is parent), None)
        if record.get("parent") and not seen.seen and record["parent"] not in found:
            seen.unknown.append(f"it started from {record.get('parent_path')}, which is not among the runs that were looked at")
    return [seen for seen, _ in records]


def _own(seen: Seen, record: Mapping, asked: Wanted) -> None:
    """What the run itself was trained on."""
    try:
        config = from_dict(record["config"])
    except (KeyError, TypeError, UserError):
        seen.unknown.append("its record is of another version of this program")
        return
    if seen.stage in CHAT and config.chat.path is not None:
        _chat(seen, Path(config.chat.path), asked)
    if seen.stage in CHAT and not config.ppo.ptx_coef:
        return
    _text(seen, record, config, asked)


def _text(seen: Seen, record: Mapping, config: Config, asked: Wanted) -> None:
    known = {one["path"]: one for one in record.get("curation") or () if "path" in one}
    paths = [config.data.path] if config.data.path else list(config.data.paths)
    for number, path in enumerate(paths):
        place = next((Path(one) for one in known if Path(one) == Path(path).absolute() or one.endswith(f"/{path}")), Path(path))
        try:
            prepared, found = Prepared.load(place), held(place, asked)
        except UserError as error:
            seen.unknown.append(f"its data {place}: {error.reason}")
            continue
        if prepared.corpus_sha256 not in record["data"]["sources"]:
            seen.unknown.append(f"{place} has been prepared anew since")
        elif found is None:
            seen.unknown.append(f"{place} was prepared without a ledger of documents")
        elif seen.stage in CHAT:
            if found.numbers.get("train"):
                seen.reasons.append(f"it is in {place}, of which pretraining samples were mixed in")
        elif found.numbers.get("train"):
            seen.samples += _samples(config, record, number, paths, prepared, found.numbers["train"])
    seen.samples.sort()


def _samples(config: Config, record: Mapping, number: int, paths: list[str], prepared: Prepared, documents: list[int]) -> list[int]:
    """The samples that the run used which hold one of the documents of data set `number`."""
    data, model = config.data, config.model
    length = data.sequence_length if model.family != "encoder_decoder" else spans_of(data.sequence_length, data.masked_share, data.span_length).text
    order = SampleOrder(document_lengths(prepared.splits["train"].prefix), sequence_length=length, seed=data.seed if number == 0 else f"{data.seed}.{number}")
    blend = None
    if len(paths) > 1:
        weights = data.weights or [Prepared.load(path).splits["train"].tokens for path in paths]
        blend = Blend(weights, names=paths, seed=data.seed)
    used, skipped = int(record["samples"]), [tuple(part) for part in (record.get("recovery") or {}).get("skip", ())]

    def place(sample: int) -> int:
        return sample if blend is None else blend.place(number, sample)

    found: set[int] = set()
    epoch = 0
    while order.samples_per_epoch and place(epoch * order.samples_per_epoch) < used:
        found.update(k for document in documents for k in map(place, order.holding(document, epoch)) if k < used)
        epoch += 1
    return sorted(k for k in found if not any(first <= k < last for first, last in skipped))


def _chat(seen: Seen, path: Path, asked: Wanted) -> None:
    """Records of a chat stage name the documents that they were made of (`derived_from`)."""
    names = [name.encode() for name in asked.ids]
    files = sorted(file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file() and ".json" in file.name)
    if not names or not files:
        return
    for file in files:
        tail = b""
        try:
            for chunk in file_chunks(file):
                window = tail + chunk
                if any(name in window for name in names):
                    seen.reasons.append(f"records made of it are in {file}")
                    break
                tail = window[-31:]
        except UserError as error:
            seen.unknown.append(f"{file}: {error.reason}")
