"""Input that someone made to break a build, or that broke by itself: each is set aside with a reason or refused with one line, and what is good beside it comes out."""
import errno
import gzip
import json
import os
import resource
import zipfile
from dataclasses import replace
from pathlib import Path

import curate_files as made
import pytest

from megatron_ext.curate.config import CurateConfig
from megatron_ext.curate.documents import read_records
from megatron_ext.curate.ingest.config import IngestConfig
from megatron_ext.errors import UserError

pytest.importorskip("datatrove")

from megatron_ext.curate import command
from megatron_ext.curate import steps as steps_module

MOST = 1_000_000  # curate.ingest.max_bytes here
SETTINGS = CurateConfig(steps=("normalise", "language"), workers=1, task_bytes=1 << 20, ingest=IngestConfig(max_bytes=MOST))
DEEP = 600  # json.loads reads it; a walk over it needs more frames than Python has


def good(number: int) -> str:
    return json.dumps({"text": f"{made.KOREAN} {number}"}, ensure_ascii=False)


def lines(*records: str) -> bytes:
    """Records with a good one before, between and behind."""
    found = [good(0)]
    for number, record in enumerate(records, 1):
        found += [record, good(number)]
    return "\n".join(found).encode("utf-8", "surrogatepass")


def deep(opening: str, inner: str, closing: str, times: int = DEEP) -> str:
    return opening * times + inner + closing * times


ENTITIES = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><a><b>&b;</b></a>'


def bomb() -> dict[str, bytes]:
    return {"zeros.txt": b"0" * (MOST * 9 // 10), "huge.txt": b"0" * (2 * MOST), "/etc/absolute.txt": made.KOREAN.encode(), "../../up.txt": made.ENGLISH.encode(), "good.txt": made.KOREAN.encode()}


def packed(members: dict[str, bytes], path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


# file -> (content, documents that come out, words of the reason for what does not; None = all of it comes out)
FILES: dict[str, tuple[bytes, int, str | None]] = {
    "deep.json": (deep("[", "", "]", 100_000).encode(), 0, "not JSON that can be read"),
    "deep_text.json": (('{"document": [{"paragraph": ' + deep('[{"form": ', '"x"', "}]") + "}]}").encode(), 0, "shape that is not known|nested too deeply|not JSON that can be read"),
    "deep.xml": (deep("<a>", "x", "</a>", 50_000).encode(), 0, "nested too deeply|not XML|shape that is not known"),
    "deep.html": (deep("<div>", made.ENGLISH, "</div>", 3000).encode(), -1, ""),
    "deep.jsonl": (lines('{"text": "kept", "more": ' + deep("[", "", "]") + "}", '{"text": "x", "tables": [{"rows": ' + deep("[", "", "]") + "}]}"), 4, "nested too deeply|tables"),
    "entities.xml": (ENTITIES.encode(), 0, "XML entities"),
    "entities32.xml": (ENTITIES.replace("<?xml version=\"1.0\"?>", "").encode("utf-32"), 0, "XML entities|not XML"),
    "halves.jsonl": (lines('{"text": "a\\ud800b", "title": "\\udfff", "domain": "\\ud801", "language": "\\ud801", "derived_from": ["\\ud800"], "images": [{"path": "\\ud800"}]}'), 3, None),
    "no_number.jsonl": (lines('{"text": "a", "images": [{"path": "x", "box": [NaN, 1, 2, 3]}]}', '{"text": "b", "images": [{"path": 3}]}', '{"text": 7, "content": ["x"]}',
                              '{"text": ' + "9" * 5000 + "}"), 5, "JSON cannot|is no text|no text field|not JSON"),
    "long.jsonl": (lines('{"text": "' + "x" * (2 * MOST) + '"}'), 2, "longer than curate.ingest.max_bytes"),
    "long.jsonl.gz": (gzip.compress(lines('{"text": "' + "x" * (2 * MOST) + '"}'), mtime=0), 2, "longer than curate.ingest.max_bytes"),
    "bomb.txt.gz": (gzip.compress(b"0" * (3 * MOST), mtime=0), 0, "larger than curate.ingest.max_bytes"),
    "wide.csv": (("text,b\n" + "one line,1\n" * 3 + "x" * (2 * MOST) + ",1\nlost,2\n").encode(), 3, "what follows it was not read"),
    "quoted.csv": (("text,b\n" + "one line,1\n" * 3 + '"' + ("x" * 999 + "\n") * 2000 + '",1\nlost,2\n').encode(), 3, "what follows it was not read"),
    "nothing.csv": (b"\n\n\n", 0, "table without a header"),
    "blank.txt": (b" \n\n ", -1, None),
    "not.parquet": (b"PAR1" + bytes(100) + b"PAR1", 0, "not a Parquet"),
    "not.warc": (b"WARC/1.0\r\nContent-Length: 99999999999\r\n\r\nx", -1, "damaged WARC|"),
    "not.docx": (b"PK\x03\x04" + bytes(50), 0, "not a zip file"),
    "not.pdf": (b"%PDF-1.7\n" + b"1 0 obj<</Kids[1 0 R]>>endobj\n" * 50, 0, ""),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    raw = root / "raw"
    (raw / "closed").mkdir(parents=True)
    for name, (content, *_) in FILES.items():
        (raw / name).write_bytes(content)
    packed(bomb(), raw / "bomb.zip")
    for name in ("good.txt", "denied.txt", "closed/inner.txt"):
        (raw / name).write_text(made.KOREAN, encoding="utf-8")
    (raw / "circle").symlink_to(raw)
    (raw / "itself.txt").symlink_to(raw / "itself.txt")
    (raw / "nowhere.txt").symlink_to(raw / "gone.txt")
    os.mkfifo(raw / "pipe.txt")
    Path(os.fsdecode(bytes(raw) + b"/\xb0\xa1\xb3\xaa.txt")).write_text(made.KOREAN, encoding="utf-8")
    scandir, digest = os.scandir, steps_module.raw_sha256

    def closed(path):
        if str(path).endswith("/closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    def denied(path, start, stop):
        if path.name == "denied.txt":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return digest(path, start, stop)

    with pytest.MonkeyPatch.context() as patch:  # whoever tests may be root, whom no permission stops
        patch.setattr(os, "scandir", closed)
        patch.setattr(steps_module, "raw_sha256", denied)
        found = command.curate(SETTINGS, raw, root / "out", progress=False)
    records = [record for shard in found.fields["output"]["shards"] for record in read_records(found.shards / shard["name"])]
    aside = [json.loads(line) for line in (found.folder / "set_aside.jsonl").read_text(encoding="utf-8").splitlines()]
    return root, records, aside


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_harms_nobody(built, name):
    import re

    _, documents, reason = FILES[name]
    _, records, aside = built
    kept = [record for record in records if record["metadata"]["origin"].split("#")[0] == name]
    reasons = [one["reason"] for one in aside if one["path"] == name]
    assert documents < 0 or len(kept) == documents, reasons
    if reason is None:
        assert not reasons
    else:
        assert (reasons or documents < 0) and all(re.search(reason, one) for one in reasons), reasons
    assert all("\n" not in one and len(one) < 200 for one in reasons)
    if name.startswith("halves"):
        assert [record["text"] for record in kept][1] == "a?b"


def test_a_zip_that_means_harm(built):
    root, records, aside = built
    kept = {record["metadata"]["origin"].split("#")[1]: record["text"] for record in records if record["metadata"]["origin"].startswith("bomb.zip")}
    assert set(kept) == {"/etc/absolute.txt", "../../up.txt", "good.txt"} and kept["good.txt"] == made.KOREAN.strip()
    reasons = {one["position"]: one["reason"] for one in aside if one["path"] == "bomb.zip"}
    assert "as no text is" in reasons["zeros.txt"] and "max_bytes" in reasons["huge.txt"]
    assert sorted(path.name for path in root.iterdir()) == ["out", "raw"] and not Path("/etc/absolute.txt").exists(), "nothing is unpacked to disk"


def test_what_is_no_file_is_named(built):
    _, records, aside = built
    reasons = {one["path"]: one["reason"] for one in aside}
    assert all("no file" in reasons[name] for name in ("circle", "itself.txt", "nowhere.txt", "pipe.txt", "closed"))
    assert "Permission denied" in reasons["denied.txt"] and "not UTF-8" in reasons["\\udcb0\\udca1\\udcb3\\udcaa.txt"]
    assert [record["text"] for record in records if record["metadata"]["origin"] == "good.txt"] == [made.KOREAN.strip()]


@pytest.mark.parametrize(("text", "words"), [
    ("sources: [{name: a, path: ../secret}]", "leads out of the input"), ("sources: [{name: a, path: /etc/passwd}]", "leads out of the input"),
    ("sources: [{name: a, path: [x, a/../../b]}]", "leads out of the input"), ("source: []\nsources: [{name: a}]", "unknown key 'source'"),
    ("sources: [{name: a, encoding: klingon}]", "is none that is known"), ("sources: [{name: a, encoding: base64}]", "is none that is known"),
    ("sources: [{name: 'a:b'}]", "no colon"), ('sources: [{name: "a\\nb"}]', "printable"), ("sources: [{name: a, text: [[x]]}]", "a text or a list of texts"),
    ("a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nsources: [{name: a, text: *b}]", "unknown key 'a'"),
    ("sources: [{name: a, date: 2026-13-45}]", "is not YAML that can be read"), ("[" * 5000, "is not YAML"), ("!!python/object/apply:os.system [ls]", "is not YAML"), ("", "must hold a list"),
    ("sources: [{name: a, records: [1]}]", "must be one value"), ("sources: [{name: a, fields: 3}]", "maps some of"),
])
def test_a_catalogue_that_cannot_be_right(tmp_path, text, words):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.txt").write_text("text")
    (tmp_path / "c.yaml").write_text(text)
    settings = replace(SETTINGS, ingest=replace(SETTINGS.ingest, catalogue=str(tmp_path / "c.yaml")))
    with pytest.raises(UserError, match=words) as error:
        command.curate(settings, tmp_path / "raw", tmp_path / "out", progress=False)
    assert error.value.key == "curate.ingest.catalogue" and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_input_and_output_that_cannot_be(tmp_path):
    (tmp_path / "raw/inner").mkdir(parents=True)
    (tmp_path / "raw/inner/a.txt").write_text(made.KOREAN, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "raw")
    for read, written, key, words in (
        ("raw", "raw/out", "curate.output", "must not lie in one another"), ("raw/inner", "raw", "curate.output", "was not made by"),
        ("raw", "link/out", "curate.output", "must not lie in one another"), ("raw", "raw", "curate.output", "must not lie in one another|was not made by"),
        ("empty", "out", "input", "holds no file"), ("none", "out", "input", "no such file or folder"), ("raw", "file", "curate.output", "was not made by"),
        ("raw", "file/out", "curate.output", "cannot be written"),
    ):
        with pytest.raises(UserError, match=words) as error:
            command.curate(SETTINGS, tmp_path / read, tmp_path / written, progress=False)
        assert error.value.key == key and "\n" not in str(error.value), (read, written)
    assert [path.name for path in (tmp_path / "raw").rglob("*")] == ["inner", "a.txt"]


def test_a_full_disk_is_one_message_and_nothing_is_lost(tmp_path):
    """RLIMIT_FSIZE stands for it. The first line says which limit hits: the plan, a shard, an index of duplicates; then there is room again."""
    (tmp_path / "raw").mkdir()
    texts = [json.dumps({"text": " ".join(f"{word}{number}{part}" for part in range(3) for word in made.KOREAN.split())}, ensure_ascii=False) for number in range(300)]
    (tmp_path / "raw/a.jsonl").write_text("\n".join(texts), encoding="utf-8")
    settings = replace(SETTINGS, steps=("normalise", "language", "exact", "near", "paragraphs"), task_bytes=100_000)
    whole = command.curate(settings, tmp_path / "raw", tmp_path / "whole", progress=False)
    for limit in (100, 2_000, 6_000):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                command.curate(settings, tmp_path / "raw", tmp_path / "out", progress=False)
                os.write(writing, b"nothing")
            except UserError as error:
                os.write(writing, str(error).encode())
            except BaseException as error:  # noqa: BLE001 it is told to the test
                os.write(writing, repr(error).encode())
            finally:
                os._exit(0)
        os.close(writing)
        os.waitpid(pid, 0)
        with os.fdopen(reading) as stream:
            said = stream.read()
        assert said.startswith("curate.output=") and "File too large" in said and "\n" not in said, (limit, said)
        assert not (tmp_path / "out").exists()
    found = command.curate(settings, tmp_path / "raw", tmp_path / "out", progress=False)
    assert {path.name: path.read_bytes() for path in found.shards.iterdir()} == {path.name: path.read_bytes() for path in whole.shards.iterdir()} and found.sha256 == whole.sha256
