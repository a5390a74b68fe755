"""A build: from the configuration to phases of tasks, kept in a working folder so that any process on any machine can do any task, again if it has to.

    OUTPUT.work/build.json        input, output, settings, and the code that they are for
    OUTPUT.work/plan.json         the input's files and how many tasks they are; tasks/000000.json, ... the units of each
    OUTPUT.work/phases/NAME/      datatrove's records of a phase: completions/, stats/
    OUTPUT.work/groups/N/         documents between two phases
    OUTPUT.work/out/              the result, renamed to OUTPUT when it is complete

Steps are cut into groups at those that must see all documents first. A group is one phase: each task reads its units or its shard, runs the group's steps and
writes a shard. So there are as many shards as tasks, whatever the number of workers, and documents stay in the order of the input.
"""
import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ext import __version__
from megatron_ext.config.build import from_dict
from megatron_ext.curate.blocks import Phase, Shards, entry, opened
from megatron_ext.curate.config import CurateConfig
from megatron_ext.curate.documents import write_json
from megatron_ext.curate.index import ids_at
from megatron_ext.curate.ingest.catalogue import Source, read_catalogue
from megatron_ext.curate.ingest.licences import forbidden, warnings
from megatron_ext.curate.ingest.records import Reading
from megatron_ext.curate.ingest.units import SetAside, fingerprint, list_files, tasks_of, units_of
from megatron_ext.curate.privacy.hidden import Hidden
from megatron_ext.curate.privacy.replace import Key
from megatron_ext.curate.removals import Removals
from megatron_ext.data.prepared import file_sha256
from megatron_ext.errors import UserError

FIRST = ("normalise",)  # steps in front of the fingerprint of a text


@dataclass(frozen=True)
class Build:
    """One build. `input` and `output` are absolute paths; `tasks` and `set_aside` (what no task reads) are the plan's."""

    settings: CurateConfig
    input: Path
    output: Path
    tasks: int = 0
    set_aside: tuple[SetAside, ...] = ()

    @property
    def work(self) -> Path:
        return self.output.with_name(f"{self.output.name}.work")

    @property
    def out(self) -> Path:
        return self.work / "out"

    # ---- making and opening ---------------------------------------------------------------------------------------------------------

    @classmethod
    def start(cls, settings: CurateConfig, input: str | Path, output: str | Path) -> "Build":
        """Plans a build, or goes on with one that was begun.

        Raises:
            UserError: no input; settings that cannot work; a working folder of something else.
        """
        self = cls(settings, Path(input).absolute(), Path(output).absolute())
        for step in settings.steps:
            entry(step)
        apart(self.input, self.output, "curate.output")
        sources = self.sources()
        Removals.read(settings.removals)
        files = list_files(self.input)
        asked = {"input": str(self.input), "output": str(self.output), "settings": plain_settings(settings), "settings_files": settings_files(settings),
                 "code": code_sha256(), "fingerprint": fingerprint(self.input, files)}
        if (self.work / "plan.json").exists():
            self._same(asked)
            return replace(cls.open(self.work), settings=settings)
        try:
            shutil.rmtree(self.work, ignore_errors=True)
            (self.work / "tasks").mkdir(parents=True)
            write_json(self.work / "build.json", asked)
            self._plan(files, sources)
        except OSError as error:
            raise UserError("curate.output", self.output, f"its working folder {self.work.name} cannot be written: {error.strerror}") from None
        return replace(cls.open(self.work), settings=settings)

    @classmethod
    def open(cls, work: Path) -> "Build":
        """The build of a working folder. Raises UserError."""
        try:
            asked = json.loads((work / "build.json").read_text(encoding="utf-8"))
            plan = json.loads((work / "plan.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError("curate.output", work, f"is no working folder of a build ({type(error).__name__}); remove it") from None
        settings = from_dict(asked["settings"], CurateConfig, "curate.")
        if key_name(settings) != asked["settings_files"].get("privacy.key"):  # of a job on another machine
            raise UserError("curate.privacy.key_env", settings.privacy.key_env, "does not hold the key that this build was begun with")
        return cls(settings, Path(asked["input"]), Path(asked["output"]), plan["tasks"],
                   tuple(SetAside(**one) for one in plan["set_aside"]))

    def asked(self) -> dict:
        """What the build was begun with: input, output, settings, settings_files, code, fingerprint (of the input)."""
        return json.loads((self.work / "build.json").read_text(encoding="utf-8"))

    def _same(self, asked: dict) -> None:
        found = self.asked()
        words = {"input": "another input", "settings": "other settings", "settings_files": "another catalogue, list or model", "code": "another version of this program",
                 "fingerprint": "an input that has changed since"}
        changed = [words[key] for key in words if found.get(key) != asked[key] and not (key == "fingerprint" and found.get("input") != asked["input"])]
        if changed:
            raise UserError("curate.output", self.output, f"its working folder {self.work.name} holds a build of {' and '.join(changed)}, begun and not ended; "
                                                          "remove that folder, or name another curate.output")

    def _plan(self, files: Sequence[tuple[str, int]], sources: Sequence[Source]) -> None:
        aside: list[SetAside] = []
        catalogue, hidden = self.catalogue(), self.hidden()
        numbers = {path: number for number, (path, _) in enumerate(files, 1)} if hidden.on else {}

        def units() -> Iterator[Any]:
            for one in units_of(self.input, files, catalogue, sources, self.settings.task_bytes):
                if isinstance(one, SetAside):
                    path, position, number = hidden.place(one.path, one.position, numbers.get(one.path, 0))
                    aside.append(replace(one, path=path, position=position, number=number))
                else:
                    yield one

        count = 0
        for count, task in enumerate(tasks_of(units(), self.settings.task_bytes), 1):
            write_json(self.work / "tasks" / f"{count - 1:06d}.json", [asdict(unit) for unit in task])
        if not count:
            first = f"; the first: {aside[0].path}: {aside[0].reason}" if aside else ""
            raise UserError("input", self.input, f"holds nothing that can be read ({len(files)} files{first})")
        write_json(self.work / "plan.json", {"tasks": count, "files": len(files), "bytes": sum(size for _, size in files),
                                             "set_aside": [asdict(one) for one in aside]})

    # ---- what is to be done ---------------------------------------------------------------------------------------------------------

    def hidden(self) -> Hidden:
        """What its files may tell. Raises UserError: a key that cannot be read."""
        return Hidden(self.settings.steps, self.settings.privacy)

    def catalogue(self) -> tuple[Source, ...]:
        """Raises UserError: a catalogue that cannot be read."""
        named = self.settings.ingest.catalogue
        return read_catalogue(named, "" if named else self.hidden().name(self.input.stem) or "input")

    def sources(self) -> tuple[Source, ...]:
        """Those of the catalogue that the build may use. Raises UserError: a licence that forbids a use, where that is to be refused."""
        settings, found = self.settings, self.catalogue()
        against = [source for source in found if set(forbidden(source.described())) & set(settings.uses)]
        if against and settings.forbidden == "refuse":
            said = warnings([source.described() for source in against], settings.uses)
            raise UserError("curate.uses", ",".join(settings.uses), f"{'; '.join(said)}. curate.forbidden=leave_out builds without, warn with them")
        return tuple(source for source in found if source not in against) if settings.forbidden == "leave_out" else found

    def readings(self, sources: Sequence[Source]) -> dict[str, Reading]:
        ingest = self.settings.ingest
        return {source.name: Reading(ingest, source.text or ingest.text_fields, source.records, source.fields, source.encoding or ingest.encoding,
                                     self.settings.images) for source in sources}

    def step_settings(self, step: str) -> Any:
        found: Any = self.settings
        for name in entry(step).settings.split("."):
            found = getattr(found, name)
        return found

    def groups(self) -> list[list[str]]:
        """The steps of each group; a GlobalBlock is the first of its."""
        found: list[list[str]] = [[]]
        for step in self.settings.steps:
            if entry(step).whole:
                found.append([step])
            else:
                found[-1].append(step)
        return found

    def phases(self) -> list[Phase]:
        """All phases, in order. The names begin with their number."""
        found: list[Phase] = []
        groups = self.groups()
        for number, steps in enumerate(groups):
            if number:
                shards = self._shards(number - 1, steps[0])
                found += opened(steps[0], self.step_settings(steps[0])).phases(shards)
            last = number == len(groups) - 1
            found.append(Phase("_".join(steps[:3]) or "read", self.tasks, functools.partial(self._group, number, steps, last)))
        if self.settings.images:
            found.append(Phase("webdataset", self.tasks, self._webdataset))
        return [Phase(f"{number:02d}_{phase.name}", phase.tasks, phase.steps) for number, phase in enumerate(found)]

    def folder(self, group: int) -> Path:
        """Where the shards of a group go."""
        return self.out if group == len(self.groups()) - 1 else self.work / "groups" / str(group)

    def _webdataset(self) -> list[Any]:
        from megatron_ext.curate.webdataset import TarWriter

        return [TarWriter(self.out / "shards", self.work / "pictures", self.out / "webdataset", self.counts("webdataset"))]

    def counts(self, group: int | str) -> Path:
        """Where what the tasks of a group counted is kept until the manifest is written."""
        return self.work / "counts" / str(group)

    def _shards(self, group: int, step: str) -> Shards:
        from megatron_ext.curate.steps import ShardReader

        folder = self.folder(group) / "shards"
        return Shards(folder, self.tasks, functools.partial(ShardReader, folder), self.work / "steps" / step, functools.partial(ids_at, self.folder(group) / "index"))

    def _group(self, number: int, steps: Sequence[str], last: bool) -> list[Any]:
        from megatron_ext.curate.steps import BlockStep, Fingerprint, RawReader, Settle, ShardReader, ShardWriter

        hidden = self.hidden()
        removals = Removals.read(self.settings.removals if number == 0 or "privacy" in steps else None)  # where one is asked for
        if number == 0:
            sources = self.sources()
            found: list[Any] = [RawReader(self.input, self.work / "tasks", sources, self.readings(sources), removals,
                                          self.work / "pictures" if self.settings.images else None, hidden)]
        else:
            found = [ShardReader(self.folder(number - 1) / "shards")]
        before = len([step for step in steps if step in FIRST]) if number == 0 else None
        for place, step in enumerate(steps):
            if place == before:
                found.append(Fingerprint(removals, hidden))
            shards = self._shards(number - 1, step) if entry(step).whole else None
            found.append(BlockStep(step, self.step_settings(step), shards, hidden=hidden))
            if step == "privacy" and hidden.blind:
                found.append(Settle(removals, hidden))
        if before is not None and before >= len(steps):
            found.append(Fingerprint(removals, hidden))
        return [*found, ShardWriter(self.folder(number), found, gone=self.out / "dropped", counts=self.counts(number), group=None if last else number, hidden=hidden)]


def apart(input: Path, output: Path, key: str) -> None:
    """Raises UserError: one lies in the other, so that what is written would be read."""
    read, written = input.resolve(), output.resolve()
    if read == written or read in written.parents or written in read.parents:
        raise UserError(key, output, f"and input={input} must not lie in one another: what is written would be read the next time")


def plain_settings(settings: CurateConfig) -> dict:
    """The settings that documents depend on, as JSON has them."""
    return json.loads(json.dumps({key: value for key, value in asdict(settings).items() if key not in ("workers", "output")}))


@functools.cache
def code_sha256() -> str:
    """Of the source of this room: another one may make other documents of the same input."""
    digest = hashlib.sha256(__version__.encode())
    root = Path(__file__).parent
    for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".yaml")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def settings_files(settings: CurateConfig) -> dict[str, str]:
    """sha256 of every file that a setting names: a catalogue, a list of words, a model. Of the key of pseudonyms a pseudonym. Raises UserError: no key."""
    found: dict[str, str] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else name)
        elif isinstance(value, tuple):
            for number, inner in enumerate(value):
                walk(inner, f"{key}[{number}]")
        elif isinstance(value, str) and value and key not in ("output", "privacy.key_file") and Path(value).is_file():
            found[key] = file_sha256(Path(value))

    walk(asdict(settings), "")
    if (name := key_name(settings)) is not None:
        found["privacy.key"] = name
    return found


def key_name(settings: CurateConfig) -> str | None:
    """Which key pseudonyms, ids and hashes are of, and not what it is. None: the build has none. Raises UserError: it needs one, or it cannot be read."""
    if "privacy" not in settings.steps:
        return None
    actions = (settings.privacy.action, *(entry.partition(":")[2] for entry in settings.privacy.actions))
    key = Key.read(settings.privacy) if "pseudonym" in actions else Key.found(settings.privacy)
    return None if key is None else key.pseudonym("build", "megatron_ext")
