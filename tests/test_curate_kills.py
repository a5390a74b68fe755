"""Builds that are killed: at every kind of moment of every phase, by SIGKILL, and what goes on from there is the same bytes; what has changed meanwhile is refused."""
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import curate_bad_readers
import curate_files as made
import forked
import pytest
from small import environment

from megatron_ext.config.compose import compose
from megatron_ext.curate.documents import read_records
from megatron_ext.errors import UserError

pytest.importorskip("datatrove")

from megatron_ext.curate import build as building
from megatron_ext.curate import command, executor, manifest, steps
from megatron_ext.curate.build import Build
from megatron_ext.curate.executor import run_phases
from megatron_ext.data.progress import Progress

STEPS = "curate.steps=[normalise,language,exact,near,paragraphs,select]"
TOUCHED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")  # audit events of what is done to files
READING, MANIFEST, RENAMING, CLEARING, TOKENS = "00_normalise_language", "manifest", "renaming", "clearing", "tokens"


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (".input", "prepared.json")}


def said(folder: Path) -> dict:
    """What prepared.json says, without places and times."""
    fields = json.loads((folder / "prepared.json").read_text())
    return {key: value for key, value in fields.items() if key != "corpus"} | {"curation": {key: value for key, value in fields["curation"].items() if key != "text"}}


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Many formats, and JSON lines with copies, near copies and shared paragraphs, so that every step has work."""
    root = tmp_path_factory.mktemp("kills") / "raw"
    made.write_all(root)
    for path in [*root.rglob("*.pdf"), *root.rglob("*.warc*")]:  # read in a process of its own, which takes a second to start
        path.unlink()
    draw, words = random.Random(1), [a + b for a in made.KOREAN.split() for b in ("은", "을", "에서", "으로")]
    texts = [" ".join(draw.choices(words, k=40)) for _ in range(60)]
    common = " ".join(draw.choices(words, k=20))
    texts += [texts[3], texts[5].replace(" ", "\n"), texts[7] + " 끝", texts[9] + " 끝", f"{texts[0][:90]}\n\n{common}", f"{texts[1][:80]} 또\n\n{common}", common]
    (root / "many.jsonl").write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    return root


def config_of(raw: Path, output: Path, workers: int = 1, *more: str):
    words = (f"input={raw}", f"output={output}", "curate=read", STEPS, "curate.task_bytes=6000", f"curate.workers={workers}", "data.vocab_size=300", "data.workers=1",
             "data.split=[0.8,0.1,0.1]", *more)
    return compose(list({word.split("=")[0]: word for word in words}.values()))


@pytest.fixture(scope="module")
def whole(raw) -> Path:
    """The build that nobody disturbed."""
    command.prepare_curated(config_of(raw, raw.parent / "whole/tokens"), progress=False)
    return raw.parent / "whole"


def in_child(config, watch) -> int:
    """Runs `prepare` in a process of its own, in which watch(place, event) is called at each event: something done to a file, or a document decided about. Returns the status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        place, busy = [""], []

        def at(name: str, function):
            def inside(*words, **named):
                place[0] = name or words[0].phase.name
                return function(*words, **named)

            return inside

        def also(name: str, function):
            def inside(*words, **named):
                watch(place[0], name)
                return function(*words, **named)

            return inside

        executor.PhaseExecutor.task = at("", executor.PhaseExecutor.task)
        command.finish = at(MANIFEST, command.finish)
        manifest.publish = at(RENAMING, manifest.publish)
        manifest.shutil = SimpleNamespace(rmtree=at(CLEARING, shutil.rmtree))
        command.prepare = at(TOKENS, command.prepare)
        os.fsync = also("fsync", os.fsync)
        steps.BlockStep._decide = also("document", steps.BlockStep._decide)
        output = str(Path(config.output).parent)

        def heard(event: str, words: tuple) -> None:
            if event in TOUCHED and not busy and (str(words[0]).startswith(output) or place[0] == CLEARING):
                busy.append(event)  # what the watcher does is no event
                watch(place[0], event)
                busy.clear()

        sys.addaudithook(heard)
        command.prepare_curated(config, progress=False)
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 nothing may go on as the test
        print(repr(error), file=sys.__stderr__)
        os._exit(1)


def test_killed_at_every_kind_of_moment_and_the_same_bytes(raw, whole, tmp_path):
    """First a run that only counts what happens in each phase; then one build that is killed three times in each, at random events of it, and goes on each time."""
    counts = tmp_path / "counts"
    found: dict[str, int] = {}

    def count(place: str, event: str) -> None:
        found[place] = found.get(place, 0) + 1
        if event != "open":
            return
        with counts.open("w") as stream:  # outside the folder that is watched
            json.dump(found, stream)

    assert in_child(config_of(raw, tmp_path / "counted/tokens"), count) == 0
    events = json.loads(counts.read_text())
    phases = [phase.name for phase in Build(config_of(raw, tmp_path / "x").curate, raw, tmp_path / "x", tasks=1).phases()]
    assert [name for name in events if name] == [*phases, MANIFEST, RENAMING, CLEARING, TOKENS], "there is no phase without a moment to be killed at"
    draw, config = random.Random(8), config_of(raw, tmp_path / "killed/tokens")
    for place, number in events.items():
        for _ in range(1 if place == CLEARING else 3):  # what is cleared is not cleared again
            left = [draw.randrange(max(number // 4, 1))]  # three times a quarter: the phase is not done by then

            def kill(now: str, event: str, place=place, left=left) -> None:
                if now == place:
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            status = in_child(config, kill)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, place
            assert not (tmp_path / "killed/tokens/prepared.json").exists() and (tmp_path / "killed/tokens-text").exists() == (place in (CLEARING, TOKENS))
    assert in_child(config, lambda place, event: None) == 0
    for name in ("tokens-text", "tokens"):
        assert content(tmp_path / "killed" / name) == content(whole / name)
    assert said(tmp_path / "killed/tokens") == said(whole / "tokens")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["tokens", "tokens-text"], "nothing is left behind"
    ids = [record["id"] for path in sorted((whole / "tokens-text/shards").iterdir()) for record in read_records(path)]
    assert len(set(ids)) == len(ids)


def test_the_same_bytes_whatever_the_workers(raw, whole, tmp_path):
    """Three against one; two against one stands below, with kills."""
    settings = config_of(raw, tmp_path / "x", 3).curate
    assert content(command.curate(settings, raw, tmp_path / "text", progress=False).folder) == content(whole / "tokens-text")
    rows = {row["step"]: row for row in json.loads((whole / "tokens-text/manifest.json").read_text())["steps"]}
    assert rows["exact"]["dropped"]["exact_duplicate"] >= 2 and rows["near"]["dropped"]["near_duplicate"] >= 2 and rows["paragraphs"]["changed"] >= 1, "every step has work"


def test_the_program_and_its_workers_by_a_signal(tmp_path):
    """The command with two workers, killed in the middle; they end with it. What goes on from there gives the bytes that one worker gives."""
    (tmp_path / "raw").mkdir()
    lines = [json.dumps({"text": f"{made.KOREAN} 문서 {number}"}, ensure_ascii=False) for number in range(1500)]
    (tmp_path / "raw/a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = ["-m", "megatron_ext", "prepare", f"input={tmp_path / 'raw'}", "curate=read", "curate.task_bytes=20000", "curate.workers=2", "data.vocab_size=300", "data.workers=1"]

    def start(output: str):
        return forked.start([*words, f"output={tmp_path / output}"], env=environment(), out=tmp_path / "out", error=tmp_path / "error")

    work = tmp_path / "killed-text.work"
    process = start("killed")
    while process.poll() is None and len(list(work.glob("phases/*/completions/*"))) < 2:
        time.sleep(0.02)
    assert process.poll() is None, (tmp_path / "error").read_text()
    below = [int(word) for task in Path(f"/proc/{process.pid}/task").iterdir() for word in (task / "children").read_text().split()]
    process.kill()
    process.wait()
    assert not (tmp_path / "killed-text").exists() and len(below) >= 2
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/exe").exists() for pid in below) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in below), "its workers end with it"
    start("killed").wait()
    assert "1,500 documents" in (tmp_path / "out").read_text(), (tmp_path / "error").read_text()
    settings = compose([word for word in words[3:] if not word.startswith(("data.", "curate.workers"))]).curate
    assert content(command.curate(replace(settings, workers=1), tmp_path / "raw", tmp_path / "alone", progress=False).folder) == content(tmp_path / "killed-text")


def test_a_worker_that_is_killed_does_not_hang_the_build(raw, tmp_path, monkeypatch):
    build = Build.start(config_of(raw, tmp_path / "x", 2).curate, raw, tmp_path / "out")
    monkeypatch.setattr("megatron_ext.curate.executor.run_task", curate_bad_readers.leave)
    with pytest.raises(UserError, match="a worker was killed"):
        run_phases(build, progress=Progress(False))


def test_what_changed_since_a_kill_is_told(tmp_path, monkeypatch):
    """Another setting, file of a setting, input or program: one message that says which, and the folder stays as it is."""
    (tmp_path / "raw").mkdir()
    for name in "ab":
        (tmp_path / f"raw/{name}.txt").write_text(made.KOREAN, encoding="utf-8")
    catalogue = tmp_path / "sources.yaml"
    catalogue.write_text("sources: [{name: all, path: '**'}]\n")
    settings = config_of(tmp_path, tmp_path / "x", 1, f"curate.ingest.catalogue={catalogue}", "curate.task_bytes=1").curate
    begun = Build.start(settings, tmp_path / "raw", tmp_path / "out")
    executor.PhaseExecutor(begun, begun.phases()[0], progress=Progress(False)).task(0)

    def refused(words: str, settings=settings, input=tmp_path / "raw") -> None:
        before = content(begun.work)
        with pytest.raises(UserError, match=f"holds a build of {words}, begun and not ended; remove that folder") as error:
            command.curate(settings, input, begun.output, progress=False)
        assert error.value.key == "curate.output" and content(begun.work) == before

    refused("other settings", replace(settings, task_bytes=300))
    refused("another input", input=tmp_path / "raw/a.txt")
    catalogue.write_text("sources: [{name: all, path: '**', licence: CC0}]\n")
    refused("another catalogue, list or model")
    catalogue.write_text("sources: [{name: all, path: '**'}]\n")
    with monkeypatch.context() as patch:
        patch.setattr(building, "code_sha256", lambda: "other")
        refused("another version of this program")
    os.utime(tmp_path / "raw/b.txt", ns=(1, 1))
    refused("an input that has changed since")
    (tmp_path / "raw/b.txt").unlink()
    refused("an input that has changed since")


def test_an_input_that_changes_while_it_is_read_is_told(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.txt").write_text(made.KOREAN, encoding="utf-8")
    settings = config_of(tmp_path, tmp_path / "x").curate
    build = Build.start(settings, tmp_path / "raw", tmp_path / "out")
    run_phases(build, progress=Progress(False))
    (tmp_path / "raw/a.txt").write_text(made.KOREAN * 2, encoding="utf-8")
    with pytest.raises(UserError, match="changed while it was read"):
        manifest.finish(build)
    assert not build.output.exists()
