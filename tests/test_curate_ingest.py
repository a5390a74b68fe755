"""Files to documents: every format against what was written into it, encodings against the codecs, and nothing lost, fatal or told that should not be."""
import json
import unicodedata
import zipfile
from pathlib import Path

import curate_files as made
import pytest

from megatron_ext.curate.blocks import DROP
from megatron_ext.curate.ingest import parts, units
from megatron_ext.curate.ingest.block import Language, Normalise, Select, normalised
from megatron_ext.curate.ingest.catalogue import read_catalogue
from megatron_ext.curate.ingest.config import IngestConfig, SelectConfig
from megatron_ext.curate.ingest.deliveries import json_file, xml_file
from megatron_ext.curate.ingest.encoding import decode
from megatron_ext.curate.ingest.files import Readers, kind_of, why_not
from megatron_ext.curate.ingest.items import Item, Problem, Unreadable
from megatron_ext.curate.ingest.language import identify
from megatron_ext.curate.ingest.licences import forbidden, licence, warnings
from megatron_ext.curate.ingest.records import Reading
from megatron_ext.curate.ingest.tabular import part_of
from megatron_ext.errors import UserError

pytest.importorskip("datatrove")
READING = Reading(IngestConfig())
SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


class Document:
    def __init__(self, text: str, **metadata):
        self.text, self.id, self.metadata, self.media = text, "0" * 32, {"source": "s"} | metadata, []


def read(path: Path, reading: Reading = READING, **part) -> list[Item | Problem]:
    readers = Readers()
    try:
        return list(readers.read(path, kind_of(path.name), reading, **part))
    finally:
        readers.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    made.write_all(root)
    return root


# ---- encodings and languages --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949", "euc-kr", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_korean_in_every_encoding(encoding):
    text = made.KOREAN * 3
    assert decode(text.encode(encoding))[0] == text


def test_what_is_not_korean_is_not_taken_for_it():
    chinese = "中华人民共和国的一切权力属于人民。人民行使国家权力的机关是全国人民代表大会和地方各级人民代表大会。" * 3
    japanese = "日本国民は、正当に選挙された国会における代表者を通じて行動し、われらとわれらの子孫のために。" * 3
    french = "L'été dernier, la forêt où nous étions était très belle; le garçon a mangé des crêpes à Noël." * 3
    assert decode(chinese.encode("gb18030"))[1] != "cp949"
    assert decode(japanese.encode("cp932"))[1] != "cp949" and decode(japanese.encode("euc-jp"))[1] != "cp949"
    assert decode(french.encode("cp1252"))[0] == french


def test_a_declared_encoding_is_believed_where_it_fits():
    assert decode("국민".encode("cp949"), declared="EUC-KR")[0] == "국민"
    assert decode(made.KOREAN.encode(), declared="euc-kr")[0] == made.KOREAN, "UTF-8 that says that it is EUC-KR"


def test_a_few_broken_bytes_are_counted_and_many_refused():
    broken = made.KOREAN.encode("cp949") * 20 + b"\xff" + made.ENGLISH.encode()
    text, encoding, count = decode(broken, max_broken=0.001)
    assert encoding == "cp949" and count == 1 and text.count("\ufffd") == 1
    with pytest.raises(Unreadable, match="binary"):
        decode(bytes(range(256)) * 8)
    with pytest.raises(Unreadable, match="not utf-8"):
        decode(b"\xff\xfe\x00", wanted="utf-8")


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not here")
def test_real_text_in_cp949_comes_back():
    for path in sorted((SHARED / "ko_public").glob("*.txt"))[:6]:
        text = path.read_text(encoding="utf-8", errors="ignore")
        kept = text.encode("cp949", "ignore").decode("cp949")
        assert decode(kept.encode("cp949"))[:2] == (kept, "cp949"), path


@pytest.mark.parametrize(("text", "language"), [
    (made.KOREAN, "ko"), (made.ENGLISH, "en"), ("大韓民國의 主權은 國民에게 있고, 모든 權力은 國民으로부터 나온다.", "ko"), ("東京は日本の首都であり、人口が多い。", "ja"),
    ("中华人民共和国的一切权力属于人民。", "zh"), ("Die Würde des Menschen ist unantastbar. Sie zu achten ist die Pflicht aller.", "de"), ("Все люди рождаются свободными.", "ru"),
    ("Tous les êtres humains naissent libres et égaux en dignité et en droits.", "fr"), ("GPU 서버 API 사용법: docker run nginx를 실행한다", "ko"), ("123 456", "und"), ("zxqv kjhg wpfm", "und"),
])
def test_languages(text, language):
    assert identify(text) == language


def test_normalised():
    wild = "\ufeffe\u0301t\u00e9 \r\n가\u1100\u1161 \t\r\n\n\n\n\n\n끝\x00\u200b\x07  "
    assert normalised(wild) == "été\n가가\n\n\n끝" and unicodedata.is_normalized("NFC", normalised(wild))
    assert normalised(normalised(wild)) == normalised(wild)
    document = Document("\n \n", title=" a\n b ")
    verdict = Normalise(IngestConfig()).process(document)
    assert (verdict.action, verdict.reason) == (DROP, "empty") and document.metadata["title"] == "a b"
    assert Normalise(IngestConfig(min_characters=5)).process(Document("abc")).reason == "too_short"


def test_language_and_select():
    document = Document(made.KOREAN)
    assert Language(IngestConfig()).process(document).counts == {"language_ko": 1} and document.metadata["language"] == "ko"
    assert Select(SelectConfig(languages=("en",))).process(document).reason == "other_language"
    assert Select(SelectConfig(domains=("law",))).process(document).reason == "other_domain"
    assert Select(SelectConfig(sources=("s",), languages=("ko", "en"))).process(document).action != DROP


# ---- formats ------------------------------------------------------------------------------------------------------------------------

def test_text_files(files):
    for name in ("utf8.txt", "cp949.txt", "utf16.txt"):
        (item,) = read(files / "text" / name)
        assert item.text == made.KOREAN and item.position == ""
    assert read(files / "text/mark.txt")[0].text == read(files / "text/packed.txt.gz")[0].text == made.ENGLISH


def test_docx(files):
    (item,) = read(files / "guide.docx", Reading(IngestConfig(), images=True))
    assert item.text.split("\n")[:5] == ["민원 처리 안내", "둘째 줄\t끝", "각주 내용", "부서 | 예산", "기획과 | 1,200"]
    assert "삭제된" not in item.text and item.metadata == {"title": "안내문"}, "deleted text and the author stay out"
    (table,), (image,) = item.tables, item.images
    assert table["rows"] == [["부서", "예산"], ["기획과", "1,200"]] and item.text.split("\n")[table["line"]] == "부서 | 예산"
    assert image["path"] == "word/media/image1.png" and image["caption"] == "조직도" and (image["width"], image["height"]) == (2, 3)
    assert item.pictures == {image["sha256"]: made.PNG}


def test_hwpx(files):
    (item,) = read(files / "guide.hwpx")
    lines = [line for line in item.text.split("\n") if line]
    assert lines == ["행정 \t절차", "다음 줄", "연도 | 건수", "2025 | 31", "끝."], "sections in the order of their numbers"
    assert item.tables[0]["rows"] == [["연도", "건수"], ["2025", "31"]] and item.images[0]["caption"] == "그림 1" and item.metadata["title"] == "절차 안내"
    assert item.text.split("\n")[item.tables[0]["line"]] == "연도 | 건수" and not item.pictures, "content of images only where it is wanted"


def test_pdf(files):
    (item,) = read(files / "law.pdf")
    assert item.text.split("\n\n") == ["제1조 이 법은 국민의 권리를 정한다.", "제2조 이 법은 공포한 날부터 시행한다."]


def test_pdf_lines_and_running_heads():
    from megatron_ext.curate.ingest.pdf import unwrapped, without_edges

    bodies = ["가나다 본문이다.", "다음 쪽이다.", "표가 있다.", "네 번째 쪽.", "맺음말이다."]
    pages = [["연구 보고서", body, f"- {number} -"] for number, body in enumerate(bodies, 1)]
    assert without_edges(pages) == [[body] for body in bodies]
    assert without_edges(pages[:3]) == pages[:3], "too few pages to know"
    wide = "이 문장은 쪽의 너비 때문에 두 줄로 나뉘어 있으며 이어"
    assert unwrapped([wide, "붙여야 한다.", "1. 항목", "2. 항목"]) == [f"{wide} 붙여야 한다.", "1. 항목", "2. 항목"]


def test_html(files):
    (item,) = read(files / "page.html")
    assert "새 제도 안내" in item.text and "3번째 설명" in item.text and "숨은" not in item.text and "찾아오시는 길" not in item.text
    assert item.metadata["title"] == "알림 마당" and item.tables[0] == {"rows": [["날짜", "내용"], ["3월 1일", "시행"]], "caption": "일정"}
    assert item.images[0] == {"path": "/img/a.png", "caption": "현장 사진", "width": 640}
    (everything,) = read(files / "page.html", Reading(IngestConfig(html="all")))
    assert "찾아오시는 길" in everything.text and "날짜 | 내용" in everything.text and "숨은" not in everything.text


def test_rows_and_lines(files):
    rows = read(files / "rows.csv")
    assert [row.text for row in rows] == ["여러 줄의\n내용입니다", "둘째 행의 내용입니다"] and [row.position for row in rows] == ["1", "2"] and rows[0].metadata["title"] == "가"
    named = read(files / "rows.csv", Reading(IngestConfig(), text=("제목", "내용")))
    assert named[1].text == "나\n둘째 행의 내용입니다"
    lines = read(files / "lines.jsonl")
    assert [line.text[-1] for line in lines] == ["0", "1", "2", "3"] and lines[0].position == "0" and lines[2].metadata["date"] == "2026-01-02"
    content = (files / "lines.jsonl").read_bytes()
    assert all(content[int(line.position):].startswith(b'{"text"') for line in lines), "the position is the byte"
    table = read(files / "rows.parquet")
    assert [row.text for row in table] == [made.KOREAN, made.ENGLISH] and [row.position for row in table] == ["1", "2"]


def test_parts_of_a_file_are_the_file(files):
    """Cut anywhere, each line is read once, under the same position."""
    path = files / "lines.jsonl"
    whole, size = [(line.position, line.text) for line in read(path)], path.stat().st_size
    for step in (1, 7, 100, size // 2, size - 1):
        got = [(item.position, item.text) for start in range(0, size, step) for item in read(path, start=start, stop=min(start + step, size))]
        assert got == whole, step
    assert [line for _, line in part_of(path, 0, size, size)] == path.read_bytes().split(b"\n")


def test_warc(files):
    page, text = read(files / "crawl.warc.gz")
    assert "새 제도 안내" in page.text and page.metadata["url"] == "https://a.go.kr/1" and page.metadata["date"] == "2026-03-04"
    assert text.text == made.KOREAN and int(text.position) > 0


@pytest.mark.parametrize(("name", "text", "title"), [
    ("documents", "첫 문장이다.\n둘째 문장이다.", "예산안"), ("dialogue", "어디 가?\n제주도.", "여행"), ("reading", "헌법 본문이다.", "헌법"), ("nikl", "문단 하나.\n문단 둘.", "말뭉치"),
])
def test_deliveries_of_ai_hub_and_nikl(name, text, title):
    (item,) = json_file(json.dumps(made.AIHUB[name], ensure_ascii=False).encode(), READING)
    assert (item.text, item.metadata["title"]) == (text, title)


def test_the_public_data_portal():
    (item,) = json_file(json.dumps(made.PORTAL_JSON, ensure_ascii=False).encode("cp949"), READING)
    assert item.text == "재난 문자 안내"
    first, second = xml_file(made.PORTAL_XML.encode(), READING)
    assert first.text == "name: 도서관\naddr: 서울" and second.position == "2"
    assert next(iter(xml_file(made.PORTAL_XML.replace("UTF-8", "EUC-KR").encode("cp949"), READING))).text == first.text
    with pytest.raises(Unreadable, match="an error"):
        list(json_file(json.dumps(made.PORTAL_ERROR).encode(), READING))


def test_libraries_and_archives():
    (book,) = xml_file(made.MARC.encode(), READING)
    assert book.text == "조선 왕조 실록 역사\n왕의 기록이다." and book.metadata["title"] == "조선 왕조 실록 역사"
    (gazette,) = xml_file(made.DUBLIN.encode(), READING)
    assert gazette.text.startswith("관보 제1호") and gazette.metadata == {"title": "관보 제1호", "licence": "KOGL-1", "language": "ko"}


def test_a_catalogue_says_where_text_is():
    reading = Reading(IngestConfig(), records="a.b[*]", text=("x", "y[*].z"), fields=(("date", "when"),))
    first, second = json_file(json.dumps({"a": {"b": [{"x": "하나", "y": [{"z": "둘"}, {"z": "셋"}], "when": 2026}, {"w": 1}]}}).encode(), reading)
    assert first.text == "하나\n둘\n셋" and first.metadata["date"] == "2026"
    assert isinstance(second, Problem) and "no text field x, y[*].z" in second.reason


def test_zip_deliveries_with_names_in_cp949(files, tmp_path):
    text, dialogue, other = read(files / "delivery.zip")
    assert (text.position, text.text) == ("안/하나.txt", made.KOREAN) or text.position == "b.json!1"
    found = {one.position: one for one in (text, dialogue, other)}
    assert found["안/하나.txt"].text == made.KOREAN and found["b.json!1"].text == "어디 가?\n제주도." and "not read" in found["c.exe"].reason
    content = made.zipped({"xxxx.txt": made.KOREAN})
    (tmp_path / "old.zip").write_bytes(content.replace(b"xxxx", "자료".encode("cp949")))
    (item,) = read(tmp_path / "old.zip")
    assert item.position == "자료.txt"
    with zipfile.ZipFile(tmp_path / "old.zip") as archive:
        assert archive.namelist() != ["자료.txt"], "zipfile itself does not know"


# ---- what cannot be read ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "reason"), [
    ("noise.txt", "binary"), ("cut.pdf", "not a PDF"), ("scan.pdf", "no text layer"), ("cut.docx", "not a zip file"), ("error.json", "an error, not data"),
    ("bomb.xml", "XML entities"),
])
def test_set_aside_with_a_reason(files, name, reason):
    with pytest.raises(Unreadable, match=reason):
        read(files / "bad" / name)


def test_bad_records_are_named_and_their_neighbours_kept(files):
    good, broken, wrong = read(files / "bad/half.jsonl")
    assert good.text == "good" and (broken.position, wrong.position) == ("17", "33")
    assert "not JSON" in broken.reason and "not a JSON object but list" in wrong.reason and "broken" not in broken.reason


def test_a_table_with_broken_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("글,값\n".encode("cp949") + f"{made.KOREAN.splitlines()[1]},1\n".encode("cp949") * 40 + b"\xff\xff,2\n" + "끝,3,4\n".encode("cp949"))
    found = read(path, Reading(IngestConfig(max_broken=0.01)))
    assert [(one.position, one.reason) for one in found if isinstance(one, Problem)] == [("41", "not cp949"), ("42", "3 cells, the header has 2")]
    assert sum(isinstance(one, Item) for one in found) == 40


def test_too_large_truncated_and_unknown(files, tmp_path):
    with pytest.raises(Unreadable, match="max_bytes"):
        read(files / "text/utf8.txt", Reading(IngestConfig(max_bytes=10)))
    (tmp_path / "cut.jsonl.gz").write_bytes(made.gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(Unreadable, match="truncated"):
        read(tmp_path / "cut.jsonl.gz")
    assert kind_of("a.hwp") is None and "HWPX" in why_not("a.hwp") and kind_of("b.JSONL.GZ") == "jsonl" and kind_of("c.pdf.gz") is None


def test_a_reader_that_crashes_or_hangs_is_survived(tmp_path):
    from megatron_ext.curate.ingest.apart import Apart

    apart = Apart()
    try:
        for function in ("curate_bad_readers:crash", "curate_bad_readers:spin"):
            with pytest.raises(Unreadable, match="crashed or took too long"):
                apart.read(function, b"", Reading(IngestConfig(max_seconds=1)))
        with pytest.raises(Unreadable, match=r"its reader failed \(ValueError\)"):
            apart.read("curate_bad_readers:fail", b"secret", READING)
        assert apart.read("curate_bad_readers:fine", b"abc", READING).text == "abc"
    finally:
        apart.close()


# ---- catalogue, licences, parts, tasks ----------------------------------------------------------------------------------------------

def test_catalogue(tmp_path):
    path = tmp_path / "sources.yaml"
    path.write_text("sources:\n- {name: law, path: [law/**, '*.pdf'], licence: KOGL-1, owner: 법제처, date: 2026-05-01, fields: {date: when}}\n"
                    "- {name: news, path: news, licence: CC-BY-NC, text: body}\n- {name: odd, path: 'x/[ab]?.txt'}\n", encoding="utf-8")
    law, news, odd = read_catalogue(str(path), "x")
    assert law.holds("law/2024/a.txt") and law.holds("b.pdf") and not law.holds("c/b.pdf") and news.holds("news/a/b.json") and not news.holds("newsletter")
    assert odd.holds("x/a1.txt") and not odd.holds("x/c1.txt") and law.date == "2026-05-01" and news.text == ("body",)
    assert forbidden(news.described()) == ("commercial",) and warnings([law.described()], ["commercial"]) == []
    assert "forbids: commercial" in warnings([news.described()])[0] and "nothing is known" in warnings([odd.described()])[0]


@pytest.mark.parametrize(("text", "words"), [
    ("[", "is not YAML"), ("a: 1", "must hold a list"), ("sources: [{path: a}]", "has no name"), ("sources: [{name: a, licens: b}]", "unknown key 'licens'"),
    ("sources: [{name: a}, {name: a}]", "twice"), ("sources: [{name: a, format: pdff}]", "must be one of"), ("sources: [{name: a, forbids: [sale]}]", "forbids 'sale'"),
    ("sources: [{name: a, fields: {colour: x}}]", "fields has 'colour'"),
])
def test_bad_catalogues(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        read_catalogue(str(tmp_path / "c.yaml"), "x")
    assert error.value.key == "curate.ingest.catalogue"


def test_licences():
    assert licence("공공누리 제2유형").forbids == ("commercial",) and licence("cc by-nc-nd 4.0").forbids == ("commercial", "adapt") and licence("CC-BY-4.0").forbids == ()
    assert licence("AIHub").forbids == ("redistribute",) and licence("whatever") is None and forbidden({"licence": "CC0", "forbids": ["adapt"]}) == ("adapt",)


def test_parts():
    good = {"images": [parts.image("a.png", page=1, box=[0, 0, 1.5, 2], line=0)], "tables": [parts.table([["a"]], line=3)]}
    assert parts.problems(good) == []
    bad = {"images": [{"caption": "x"}, {"path": "a", "page": -1}, {"path": "a", "box": [1]}], "tables": [{"rows": ["a"]}, 3]}
    assert len(parts.problems(bad)) == 5 and not any("x" == word for problem in parts.problems(bad) for word in problem.split())
    parts.realign(good, "one\ntwo\nthree\nfour", "two\nfour")
    assert (good["images"][0]["line"], good["tables"][0]["line"]) == (0, 1)
    jpeg = b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(10) + b"\xff\xc0\x00\x11\x08\x00\x20\x00\x40" + bytes(8)
    assert parts.size(jpeg) == (64, 32) and parts.media_type(jpeg) == "image/jpeg"


def test_tasks_depend_on_the_input_alone(files):
    sources = read_catalogue(None, "raw")
    found = list(units.units_of(files, units.list_files(files), sources, sources, 200))
    kept, aside = [one for one in found if isinstance(one, units.Unit)], [one for one in found if isinstance(one, units.SetAside)]
    assert {one.path for one in aside} == {"bad/old.hwp", "bad/empty.txt"}
    tasks = list(units.tasks_of(kept, 200))
    assert [unit for task in tasks for unit in task] == kept and all(len(task) == 1 or sum(unit.size for unit in task) <= 200 for task in tasks)
    lines = [unit for unit in kept if unit.path == "lines.jsonl"]
    assert len(lines) > 2 and [unit.start for unit in lines[1:]] == [unit.stop for unit in lines[:-1]], "a large file of lines is cut"
    with pytest.raises(UserError, match="no such file"):
        units.list_files(files / "none")
