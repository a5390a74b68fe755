"""Documents from files: every kind gives the same text byte for byte, and every kind of bad input is named."""
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_ext.data.corpus import stdlib_documents, stdlib_files
from megatron_ext.data.read import BadRecords, find_files, read_documents
from megatron_ext.errors import UserError

# byte-order mark, NUL, both kinds of newlines, decomposed Hangul, lone combining mark, emoji sequence, line separators, astral plane
HARD = ["\ufeffab\0c\r\nd\r\n", "각 vs 각", "\u0301alone", "👩‍👩‍👧‍👦🇰🇷", "a\u2028b\u2029c\x85d\x1c", "𝔘𐍈", "대한민국의 수도는?", " ", "\n", "\ufffd"]


def read(path: Path, *, limit: int = 0, text_key: str = "text") -> tuple[list[str], BadRecords]:
    bad = BadRecords(limit)
    return list(read_documents(find_files(path)[0], text_key=text_key, bad=bad)), bad


def jsonl(texts: list[str], *, ascii: bool = False) -> bytes:
    return b"".join(json.dumps({"id": n, "text": text}, ensure_ascii=ascii).encode() + b"\n" for n, text in enumerate(texts))


@pytest.fixture(params=["jsonl", "ndjson escaped", "jsonl.gz", "gz of two members", "jsonl.zst", "zst of two frames", "parquet", "parquet dictionary"])
def written(request, tmp_path) -> Path:
    """HARD in one kind of file."""
    kind = request.param
    if kind.startswith("parquet"):
        column = pyarrow.array(HARD)
        table = pyarrow.table({"id": range(len(HARD)), "text": column.dictionary_encode() if kind.endswith("dictionary") else column})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
        return tmp_path / "a.parquet"
    halves = jsonl(HARD[:4]), jsonl(HARD[4:])
    name, content = {
        "jsonl": ("a.jsonl", b"".join(halves)),
        "ndjson escaped": ("a.ndjson", b"\xef\xbb\xbf" + jsonl(HARD, ascii=True).replace(b"\n", b"\r\n\r\n")),
        "jsonl.gz": ("a.jsonl.gz", gzip.compress(b"".join(halves))),
        "gz of two members": ("a.jsonl.gz", gzip.compress(halves[0]) + gzip.compress(halves[1]) + bytes(7)),
        "jsonl.zst": ("a.jsonl.zst", zstandard.compress(b"".join(halves))),
        "zst of two frames": ("a.jsonl.zst", zstandard.compress(halves[0]) + zstandard.compress(halves[1])),
    }[kind]
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


def test_every_kind_gives_the_same_text(written):
    taken: list[int] = []
    bad = BadRecords(0)
    assert list(read_documents([written], text_key="text", bad=bad, read=taken.append)) == HARD
    assert bad.count == 0 and sum(taken) == written.stat().st_size


def test_folder_of_text_files_in_order_of_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in (("b/1.txt", "second"), ("a.txt", "first"), ("c.txt.gz", "third"), (".hidden.txt", "no"), ("notes.md", "no"), ("d.txt", "")):
        content = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    _, passed_over = find_files(tmp_path)
    assert read(tmp_path)[0] == ["first", "second", "third"]
    assert [file.name for file in passed_over] == ["notes.md"]


def test_text_file_is_one_document_byte_for_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes("".join(HARD).encode())
    assert "".join(read(tmp_path / "a.txt")[0]).encode() == "".join(HARD).encode()


BAD_LINES = {
    b'{"text": "cut': "not JSON",
    b"[" * 100_000: "not JSON that can be read",
    b'{"text": 1' + b"0" * 5000 + b"}": "not JSON that can be read",
    b'["text"]': "not a JSON object but list",
    b'{"body": "x"}': "no field 'text'",
    b'{"text": 7}': "is not text but int",
    b'{"text": null}': "is not text but NoneType",
    b'{"text": "\xff\xfe"}': "not UTF-8 at byte 10",
    b'{"text": "\\ud800"}': "lone surrogate",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=list(BAD_LINES.values()))
def test_bad_line_is_named_skipped_and_counted_then_refused(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["one"]) + line + b"\n" + jsonl(["two"]))
    texts, bad = read(path, limit=1)
    assert texts == ["one", "two"] and bad.count == 1
    assert bad.places[0].startswith(f"{path}:2: ") and BAD_LINES[line] in bad.places[0]
    with pytest.raises(UserError, match=r"data.max_bad_lines=0: 1 unreadable.*a.jsonl:2: ") as refused:
        read(path)
    assert BAD_LINES[line] in str(refused.value)


def test_text_that_is_not_utf8_is_named_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("한국".encode("cp949"))
    (tmp_path / "b.txt").write_text("fine")
    texts, bad = read(tmp_path, limit=1)
    assert texts == ["fine"] and bad.places == [f"{tmp_path / 'a.txt'}: not UTF-8 at byte 0"]
    with pytest.raises(UserError, match="a.txt: not UTF-8"):
        read(tmp_path)


def test_bad_parquet_rows(tmp_path):
    invalid = pyarrow.array([b"ok", b"\xff", None, b"fine"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid}), tmp_path / "a.parquet")
    texts, bad = read(tmp_path / "a.parquet", limit=2)
    assert texts == ["ok", "fine"]
    assert [place.split(":", 1)[1] for place in bad.places] == ["2: not UTF-8 at byte 0", "3: column 'text' is null"]


def test_parquet_without_the_column_or_with_numbers(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="data.text_key=words: .*no such column; it has body, text"):
        read(tmp_path / "a.parquet", text_key="words")
    with pytest.raises(UserError, match="is int64, not text"):
        read(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_key="body")[0] == ["x"]


@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_truncated_and_damaged_compressed_files(tmp_path, suffix, compress):
    path = tmp_path / f"a.jsonl{suffix}"
    whole = compress(jsonl([str(n) * 50 for n in range(1000)]))
    for content, reason in (
        (whole[:-9], "truncated"), (whole[: len(whole) // 2], "truncated"), (whole[:3], "truncated"), (b"", "truncated"),
        (b"no such data" + whole, "damaged"), (whole + b"garbage", "damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"input=.*a.jsonl\{suffix}: {reason}"):
            read(path, limit=10**6)


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"] * 100}), path)
    for content in (path.read_bytes()[:-20], b"", b"PAR1" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a Parquet file that can be read"):
            read(path)


def test_unknown_kinds_of_files_and_missing_ones(tmp_path):
    (tmp_path / "a.docx").touch()
    for path, reason in (
        (tmp_path / "a.docx", "unknown kind of file .docx; readable are .txt, .jsonl"),
        (tmp_path, "no readable file in this folder .1 others"),
        (tmp_path / "gone.txt", "no such file"),
    ):
        with pytest.raises(UserError, match=reason):
            read(path)


def test_the_embedded_corpus_is_the_standard_library():
    names = {file.name for file in stdlib_files()}
    assert {"argparse.py", "topics.py", "base_events.py"} <= names
    assert not any(part in ("test", "tests", "site-packages", "idle_test") for file in stdlib_files() for part in file.parts[-4:-1])
    documents = list(stdlib_documents())
    assert 8e6 < sum(len(text.encode()) for text in documents) < 14e6
    assert documents == list(stdlib_documents())
    assert not any("gencodec.py" in text[:300] for text in documents)
