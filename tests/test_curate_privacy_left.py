"""Nothing of what was taken out is left anywhere: the whole command over files with planted personal data, and builds that crash and that are killed, searched byte by byte."""
import hashlib
import hmac
import json
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import curate_files as made
import pytest
import zstandard

pytest.importorskip("datatrove")
pytest.importorskip("kiwipiepy", reason="names need kiwipiepy: pip install 'megatron-ext[curate]'")

from megatron_ext.curate import blocks, command, ledger, removals
from megatron_ext.curate.build import Build
from megatron_ext.curate.config import CurateConfig
from megatron_ext.curate.documents import document_id, read_records, text_sha256
from megatron_ext.curate.index import read_index
from megatron_ext.curate.ingest.config import IngestConfig
from megatron_ext.curate.privacy.config import PrivacyConfig
from megatron_ext.curate.privacy.hidden import Hidden
from megatron_ext.errors import RunFailed, UserError

ROOT = Path(__file__).resolve().parent.parent
KEY = "KEY-f2a96b0d1c7e4853-not-to-be-seen"
# Each stands in one file and nowhere else. `TITLE`s stand in metadata alone, `FILE`s in names of files.
PLANTED = {
    "rrn": "850412-1234567", "phone": "010-7391-2846", "mail": "geumbi.tak@minwon.example.kr", "account": "302-4417-8823-51", "card": "5409-2600-1234-5676", "passport": "M48213957", "plate": "38허7294",
    "licence": "11-85-402917-33", "name": "탁금비", "address": "경기도 성남시 분당구 판교역로 235번길 15-2", "english": "Siobhan Featherstonehaugh", "ssn": "219-09-5527", "ip": "203.234.118.25", "iban": "GB82WEST12345698765432",
    "csv name": "곽두팔", "csv birth": "19790623", "csv phone": "01064829173", "title mail": "title.owner@secret.example.kr", "title phone": "02-2174-9385", "caption name": "남궁옥분", "cell phone": "010-5528-1937", "owner": "010-8841-3372",
    "record owner": "min.ju@writer.example.kr", "domain": "010-9922-4417", "derived": "010-2231-5564", "catalogue mail": "officer.kim@moe.example.kr", "file name": "김지훈", "file phone": "010-4471-9935", "bad file phone": "010-6617-2248",
    "bad file mail": "broken.man@file.example.kr", "member phone": "010-3345-8871", "member mail": "zip.member@inside.example.kr", "short phone": "010-1357-9246", "classified": "010-6543-2198", "tab name": "제갈공명", "footnote": "010-7812-4456",
}
FILLER = "대한민국의 주권은 국민에게 있고, 모든 권력은 국민으로부터 나온다. 국회는 법률을 의결하고 정부는 이를 집행한다. "

LONG = """지방자치단체는 해마다 다음 해의 살림을 어떻게 꾸릴지 미리 정하고, 주민에게 그 내용을 알린다. 먼저 각 부서가 필요한 사업과 비용을 적어 내면, 기획을 맡은 부서가 이를 모아 우선순위를 따진다.
도로와 하천을 고치는 일, 어린이집과 경로당을 돌보는 일, 쓰레기를 치우고 나무를 심는 일이 모두 여기에 들어 있다. 의회는 제출된 안을 심사하면서 꼭 필요한 곳에 돈이 쓰이는지 살핀다.
심사가 끝나면 본회의에서 표결하고, 확정된 예산은 누구나 볼 수 있도록 공개한다. 주민은 설명회에 나와 의견을 말할 수 있으며, 제안된 의견은 다음 해 계획을 세울 때 참고가 된다.
집행이 끝난 뒤에는 결산을 통해 계획과 실제가 얼마나 달랐는지 비교하고, 남은 돈은 다음 해로 넘긴다. 이런 과정을 거치면서 행정은 조금씩 나아지고 신뢰도 쌓인다."""


def write(raw: Path) -> Path:
    """The files, and the catalogue beside them."""
    p = PLANTED
    files = {
        "letters/a.txt": f"신청인 성명: {p['name']}\n주민등록번호 {p['rrn']}, 연락처 {p['phone']}, {p['mail']}\n주소: {p['address']}\n{FILLER}\n{p['name']}이 다시 왔다. 번호는 {p['phone'].replace('-', '')}이다.".encode("cp949"),
        "letters/nfd.txt": unicodedata.normalize("NFD", f"계좌번호 {p['account']} 카드 {p['card']} 여권번호 {p['passport']} 차량 {p['plate']} 운전면허 {p['licence']}\n{FILLER}").encode(),
        "letters/utf16.txt": ("\ufeff" + f"Patient: {p['english']}, SSN {p['ssn']}\nIBAN {p['iban']}\n접속 IP {p['ip']}\n{FILLER}").encode("utf-16-le"),
        "letters/short.txt": p["short phone"].encode(), "letters/secret.txt": f"대외비\n{FILLER} {p['classified']}".encode(),
        f"letters/{p['file name']}_이력서_{p['file phone']}.txt": f"{FILLER}첨부한 문서의 내용이다.".encode(),
        f"letters/통화기록 {p['bad file phone']} {p['bad file mail']}.hwp": b"\xd0\xcf\x11\xe0old",
        "rows.csv": f"성명,생년월일,휴대전화,비고\n{p['csv name']},{p['csv birth']},{p['csv phone']},{FILLER.replace(',', '')}\n".encode(),
        "long.txt": LONG.encode(),
        "tabs.txt": f"구분\t성명\t비고\n정\t{p['tab name']}\t없음\n{FILLER}{FILLER}".encode(),
        "lines.jsonl": b"\n".join([json.dumps({
            "text": f"{FILLER}{FILLER}", "title": f"문의 {p['title mail']} 전화 {p['title phone']}", "owner": p["record owner"], "domain": f"문의 {p['domain']}", "derived_from": [p["derived"], "0" * 32],
            "images": [{"path": "a.png", "caption": f"성명: {p['caption name']}"}], "tables": [{"rows": [["전화", p["cell phone"]]], "line": 0}]}, ensure_ascii=False).encode(), b'{"text": "' + p["member mail"].encode()]),
        "pack.zip": made.zipped({f"{p['member phone']}.txt": FILLER + "묶음 안의 글이다.", f"{p['member mail']}.hwp": b"\xd0\xcf\x11\xe0"}),
        "note.docx": made.zipped({"word/document.xml": f'<w:document {made.W}><w:body><w:p><w:r><w:t>{FILLER} 문의는 {p["footnote"]}</w:t></w:r></w:p></w:body></w:document>', "docProps/core.xml": f"<a><b>{p['name']}</b></a>"}),
    }
    for name, content in files.items():
        path = raw / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    catalogue = raw.parent / "sources.yaml"
    catalogue.write_text(f"sources:\n- {{name: letters, path: letters, owner: '기록과 {p['owner']}', terms: 'mailto:{p['catalogue mail']}', licence: KOGL-1}}\n- {{name: rest, path: '**'}}\n", encoding="utf-8")
    (raw.parent / "rules.yaml").write_text("name: moe\nmarks: [{mark: 대외비, action: drop}]\n", encoding="utf-8")
    return catalogue


def forms(value: str) -> dict[str, bytes]:
    """As it may lie in a file."""
    found = {"raw": value.encode(), "nfd": unicodedata.normalize("NFD", value).encode(), "utf16": value.encode("utf-16-le"), "utf16be": value.encode("utf-16-be"), "cp949": value.encode("cp949"),
             "escaped": json.dumps(value)[1:-1].encode(), "sha256": hashlib.sha256(value.encode()).hexdigest()[:32].encode(), "sha256 bytes": hashlib.sha256(value.encode()).digest()[:16]}
    if len(digits := re.sub(r"\D", "", value)) >= 7:
        found["digits"] = digits.encode()
    return found


def searched(*folders: Path, names: bool = True) -> list[tuple[str, str, str]]:
    """(value, form, file) of everything that is left: in the bytes of files, in what they hold compressed, in their names."""
    left = []
    wanted = [(name, form, content) for name, value in PLANTED.items() for form, content in forms(value).items()]
    for path in (path for folder in folders for path in ([folder] if folder.is_file() else sorted(folder.rglob("*")))):
        if path.is_dir():
            content = b""
        else:
            content = path.read_bytes()
            if path.suffix == ".zst":
                content += zstandard.ZstdDecompressor().stream_reader(content).read()
        content += str(path).encode() if names else b""
        left += [(name, form, path.name) for name, form, bytes_ in wanted if bytes_ in content]
    return left


def told(text: str) -> list[tuple[str, str, str]]:
    return [(name, form, "message") for name, value in PLANTED.items() for form, content in forms(value).items() if content in text.encode("utf-8", "surrogateescape")]


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("left") / "raw"
    write(folder)
    return folder


def settings(raw: Path, *steps: str, **privacy) -> CurateConfig:
    return CurateConfig(steps=steps or ("normalise", "language", "privacy", "exact"), workers=1, task_bytes=900, ingest=IngestConfig(catalogue=str(raw.parent / "sources.yaml")),
                        privacy=PrivacyConfig(rules=(str(raw.parent / "rules.yaml"),), **privacy))


@pytest.fixture
def no_key(monkeypatch):
    monkeypatch.delenv("MEGATRON_EXT_PSEUDONYM_KEY", raising=False)


def test_the_whole_command(raw, tmp_path):
    """`prepare curate=standard` as a person calls it, killed once: every file of both outputs, the logs, what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MEGATRON_EXT_PSEUDONYM_KEY": KEY}
    words = [f"input={raw}", f"output={tmp_path / 'tokens'}", "curate=standard", "curate.workers=1", "curate.task_bytes=1500", f"curate.ingest.catalogue={raw.parent / 'sources.yaml'}",
             f"curate.privacy.rules=[{raw.parent / 'rules.yaml'}]", "data.vocab_size=300", "data.workers=1", "curate.privacy.samples=20"]

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", "megatron_ext", "prepare", *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    process, work = start(), tmp_path / "tokens-text.work"
    while process.poll() is None and len(list(work.glob("phases/00*/completions/*"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    first = b"".join(process.communicate())
    assert work.exists() and not [one for one in searched(work) if one[2] not in {path.name for path in (work / "tasks").iterdir()}], "killed: names of files in tasks/ alone"
    output = b"".join(start().communicate(timeout=500))
    text, tokens = tmp_path / "tokens-text", tmp_path / "tokens"
    assert tokens.exists(), output.decode()
    records = [record for path in sorted((text / "shards").iterdir()) for record in read_records(path)]
    rows = {row["step"]: row for row in json.loads((text / "manifest.json").read_text())["steps"]}
    assert records and sum(rows["privacy"]["counts"].values()) >= 30, rows["privacy"]
    assert searched(text, tokens) == [] and told((first + output).decode("utf-8", "surrogateescape")) == []
    assert not work.exists() and KEY.encode() not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()) + first + output
    aside = [json.loads(line) for line in (text / "set_aside.jsonl").read_text().splitlines()]
    listed = sorted(path.relative_to(raw).as_posix() for path in raw.rglob("*") if path.is_file())
    assert any(entry["path"] == "letters/통화기록 [PHONE] [EMAIL]" and listed[entry["number"] - 1].endswith(".hwp") for entry in aside), "it can still be found: its number in the order of names"
    report = (text / "reports" / "privacy.md").read_text()
    assert "KR_RRN" in report and "○" in report
    # Hashes are of the key: nobody else can try out what stood in a document.
    names = [text_sha256(PLANTED["short phone"])[:32].encode(), hashlib.sha256((raw / "letters/a.txt").read_bytes()).hexdigest()[:32].encode()]
    everything = b"".join(path.read_bytes() for folder in (text, tokens) for path in folder.rglob("*") if path.is_file())
    assert not any(name in everything or bytes.fromhex(name.decode()) in everything for name in names)


def test_without_a_key_hashes_are_of_the_cleaned_text(raw, tmp_path, no_key):
    built = command.curate(settings(raw), raw, tmp_path / "out", progress=False)
    assert searched(built.folder) == []
    records = [record for path in sorted((built.folder / "shards").iterdir()) for record in read_records(path)]
    for record in records:
        assert record["metadata"]["sha256"] == record["metadata"]["text_sha256"] == text_sha256(record["text"])
    by_origin = {record["metadata"]["origin"]: record for record in records}
    assert by_origin["letters/a.txt"]["id"] == document_id("letters", "letters/a.txt", "")
    named = by_origin["letters/[PERSON]_이력서_[PHONE].txt"]
    assert named["id"] != document_id("letters", f"letters/{PLANTED['file name']}_이력서_{PLANTED['file phone']}.txt", "")
    gone = [record for path in sorted((built.folder / "dropped").iterdir()) for record in read_records(path)]
    assert any(record["reason"] == "classified" for record in gone) and not any("sha256" in record or "text_sha256" in record for record in gone if record["step"] == "privacy")
    plain = hashlib.sha256((raw / "letters/a.txt").read_bytes()).digest()
    assert all(plain[:16] != bytes(row["raw"]) for path in (built.folder / "index").iterdir() for row in read_index(path))
    # A file that lies here is still found, and removed, by what privacy leaves of it.
    hidden = Hidden(("privacy",), settings(raw).privacy)
    asked = ledger.wanted(str(raw / "letters/a.txt"), hidden)
    assert by_origin["letters/a.txt"]["metadata"]["text_sha256"] in asked.texts
    listed = tmp_path / "removals.jsonl"
    removals.add(listed, [{"text_sha256": by_origin["letters/a.txt"]["metadata"]["text_sha256"]}, {"id": named["id"]}])
    again = command.curate(replace(settings(raw), removals=str(listed)), raw, tmp_path / "again", progress=False)
    assert {row["step"]: row["dropped"] for row in again.fields["steps"]}["settle"] == {"removed": 2}


def test_with_a_key_documents_are_found_by_file_and_place(raw, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_EXT_PSEUDONYM_KEY", KEY)
    built = command.curate(settings(raw), raw, tmp_path / "out", progress=False)
    records = {record["metadata"]["origin"]: record for path in sorted((built.folder / "shards").iterdir()) for record in read_records(path)}
    hidden = Hidden(("privacy",), settings(raw).privacy)
    record = records["letters/a.txt"]
    assert record["id"] == hmac.new(KEY.encode(), f"document\0{document_id('letters', 'letters/a.txt', '')}".encode(), hashlib.sha256).hexdigest()[:32]
    assert record["metadata"]["sha256"] in ledger.wanted(str(raw / "letters/a.txt"), hidden).raw and record["id"] in ledger.wanted("letters:letters/a.txt", hidden).ids
    assert record["id"] not in ledger.wanted("letters:letters/a.txt").ids
    begun = Build.start(settings(raw), raw, tmp_path / "begun")
    monkeypatch.setenv("MEGATRON_EXT_PSEUDONYM_KEY", KEY[::-1])
    with pytest.raises(UserError, match="does not hold the key"):  # a job of an array where the variable was not handed on
        Build.open(begun.work)
    monkeypatch.setenv("MEGATRON_EXT_PSEUDONYM_KEY", KEY)
    listed = tmp_path / "removals.jsonl"
    removals.add(listed, [{"sha256": hashlib.sha256((raw / "letters/a.txt").read_bytes()).hexdigest()}, {"id": records["tabs.txt"]["id"]}])
    again = command.curate(replace(settings(raw), removals=str(listed)), raw, tmp_path / "again", progress=False)
    assert {row["step"]: row["dropped"] for row in again.fields["steps"]}["read"] == {"removed": 2}


class Failing:
    """A step that breaks on a document, and tells it."""

    def __init__(self, settings):
        pass

    def process(self, document):
        if "분당" in document.text or "[ADDRESS]" in document.text:
            raise ValueError(document.text, document.metadata)
        return blocks.KEPT


@pytest.mark.parametrize("steps", [("normalise", "breaking", "privacy"), ("normalise", "privacy", "breaking"), ("normalise", "privacy", "exact", "breaking")])
def test_a_crash_leaves_nothing(raw, tmp_path, monkeypatch, capfd, caplog, no_key, steps):
    """Before, behind and long after personal data is taken out: the working folder, what is printed and logged, the error with all that hangs on it."""
    monkeypatch.setitem(blocks.BLOCKS, "breaking", blocks.Entry("test_curate_privacy_left:Failing", "ingest"))
    with pytest.raises(RunFailed) as error:
        command.curate(settings(raw, *steps), raw, tmp_path / "out", progress=True)
    assert "ValueError at test_curate_privacy_left.py" in str(error.value) and error.value.__cause__ is None and error.value.__suppress_context__
    assert told(str(error.value) + repr(error.value) + "".join(capfd.readouterr()) + caplog.text) == []
    work = tmp_path / "out.work"
    tasks = {path.name for path in (work / "tasks").iterdir()}
    assert work.exists() and [one for one in searched(work) if one[2] not in tasks] == [] and not (tmp_path / "out").exists()


def test_a_recogniser_that_crashes_and_a_reader(raw, tmp_path, monkeypatch, capfd, no_key):
    from megatron_ext.curate.ingest.files import Readers
    from megatron_ext.curate.privacy.find import Recogniser

    with monkeypatch.context() as patched:
        patched.setattr(Recogniser, "normalised", lambda self, text, *rest: (_ for _ in ()).throw(IndexError(text)))
        blocks.opened.cache_clear()
        with pytest.raises(RunFailed) as error:
            command.curate(replace(settings(raw), ingest=IngestConfig()), raw / "letters/a.txt", tmp_path / "one", progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(Readers, "read", lambda self, path, *rest, **more: (_ for _ in ()).throw(KeyError(path.read_bytes())))
        path = next((raw / "letters").glob("*이력서*"))
        command.curate(replace(settings(raw), ingest=IngestConfig()), path, tmp_path / "two", progress=False)
    aside = (tmp_path / "two/set_aside.jsonl").read_text(encoding="utf-8")
    assert "privacy" in str(error.value) and "[PERSON]_이력서_[PHONE].txt" in aside and "its reader failed (KeyError)" in aside
    assert told(str(error.value) + aside + "".join(capfd.readouterr())) == []
