"""Raw files as public bodies have them, made by hand: every byte is known, so that what a reader gives can be compared with what went in."""
import gzip
import io
import json
import zipfile
from pathlib import Path

KOREAN = "대한민국의 주권은 국민에게 있고, 모든 권력은 국민으로부터 나온다.\n제2조 대한민국의 국민이 되는 요건은 법률로 정한다."
ENGLISH = "The quick brown fox jumps over the lazy dog, and that is all there is to say of it."
PNG = (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x02\x00\x00\x00\x03\x08\x02\x00\x00\x006\x88I\xd6\x00\x00\x00\x0cIDATx\x9cc\xf8\xff\xff?\x03\x00\x08\xfc\x02\xfe"
       b"\xa7\x9a\xa0\xa0\x00\x00\x00\x00IEND\xaeB`\x82")
W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main" xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships" ' \
    'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main" xmlns:wp="http://schemas.openxmlformats.org/drawingml/2006/wordprocessingDrawing"'
HP = 'xmlns:hp="http://www.hancom.co.kr/hwpml/2011/paragraph" xmlns:hs="http://www.hancom.co.kr/hwpml/2011/section" xmlns:hc="http://www.hancom.co.kr/hwpml/2011/core"'


def zipped(members: dict[str, bytes | str]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            archive.writestr(zipfile.ZipInfo(name), member)
    return content.getvalue()


def docx() -> bytes:
    """Two paragraphs, one with a footnote, a deletion and an insertion; a table; an image with a caption."""
    body = f"""<?xml version="1.0" encoding="UTF-8" standalone="yes"?><w:document {W}><w:body>
<w:p><w:r><w:t>민원 처리 </w:t></w:r><w:ins><w:r><w:t>안내</w:t></w:r></w:ins><w:del><w:r><w:delText>삭제된 말</w:delText></w:r></w:del></w:p>
<w:p><w:r><w:t>둘째 줄</w:t><w:tab/><w:t>끝</w:t></w:r><w:r><w:footnoteReference w:id="2"/></w:r></w:p>
<w:tbl><w:tr><w:tc><w:p><w:r><w:t>부서</w:t></w:r></w:p></w:tc><w:tc><w:p><w:r><w:t>예산</w:t></w:r></w:p></w:tc></w:tr>
<w:tr><w:tc><w:p><w:r><w:t>기획과</w:t></w:r></w:p></w:tc><w:tc><w:p><w:r><w:t>1,200</w:t></w:r></w:p></w:tc></w:tr></w:tbl>
<w:p><w:r><w:drawing><wp:inline><wp:docPr id="1" descr="조직도"/><a:blip r:embed="rId7"/></wp:inline></w:drawing></w:r></w:p>
</w:body></w:document>"""
    notes = f'<w:footnotes {W}><w:footnote w:id="2"><w:p><w:r><w:t>각주 내용</w:t></w:r></w:p></w:footnote></w:footnotes>'
    links = '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="rId7" Type="image" Target="media/image1.png"/></Relationships>'
    core = '<cp:coreProperties xmlns:cp="c" xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>안내문</dc:title><dc:creator>홍길동</dc:creator></cp:coreProperties>'
    return zipped({"word/document.xml": body, "word/footnotes.xml": notes, "word/_rels/document.xml.rels": links, "word/media/image1.png": PNG, "docProps/core.xml": core})


def hwpx() -> bytes:
    """Two sections: text with a line break, a table, and a picture with a caption."""
    cell = '<hp:tc><hp:subList><hp:p><hp:run><hp:t>{}</hp:t></hp:run></hp:p></hp:subList></hp:tc>'
    table = "".join(f"<hp:tr>{''.join(cell.format(text) for text in row)}</hp:tr>" for row in (("연도", "건수"), ("2025", "31")))
    first = f"""<hs:sec {HP}><hp:p><hp:run><hp:secPr/><hp:t>행정 <hp:tab/>절차<hp:lineBreak/>다음 줄</hp:t></hp:run></hp:p>
<hp:p><hp:run><hp:tbl>{table}</hp:tbl><hp:t/></hp:run></hp:p>
<hp:p><hp:run><hp:pic><hc:img binaryItemIDRef="image1"/><hp:caption><hp:subList><hp:p><hp:run><hp:t>그림 1</hp:t></hp:run></hp:p></hp:subList></hp:caption></hp:pic></hp:run></hp:p></hs:sec>"""
    second = f"<hs:sec {HP}><hp:p><hp:run><hp:t>끝.</hp:t></hp:run></hp:p></hs:sec>"
    package = '<opf:package xmlns:opf="http://www.idpf.org/2007/opf/"><opf:metadata><opf:title>절차 안내</opf:title></opf:metadata><opf:manifest>' \
              '<opf:item id="image1" href="BinData/image1.png"/></opf:manifest></opf:package>'
    return zipped({"mimetype": "application/hwp+zip", "Contents/content.hpf": package, "Contents/section10.xml": second, "Contents/section0.xml": first,
                   "BinData/image1.png": PNG})


def pdf(pages: list[list[str]], *, text: bool = True) -> bytes:
    """Lines of text on pages, in a Korean font that is named and not embedded (as older public documents have it)."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "",
               "<< /Type /Font /Subtype /Type0 /BaseFont /HYSMyeongJo-Medium /Encoding /UniKS-UCS2-H /DescendantFonts [4 0 R] >>",
               "<< /Type /Font /Subtype /CIDFontType0 /BaseFont /HYSMyeongJo-Medium /CIDSystemInfo << /Registry (Adobe) /Ordering (Korea1) /Supplement 1 >> /DW 1000 /FontDescriptor 5 0 R >>",
               "<< /Type /FontDescriptor /FontName /HYSMyeongJo-Medium /Flags 6 /FontBBox [0 -200 1000 900] /ItalicAngle 0 /Ascent 800 /Descent -200 /CapHeight 700 /StemV 80 >>"]
    kids = []
    for page in pages:
        shown = "".join(f"BT /F1 10 Tf 50 {780 - 14 * number} Td <{line.encode('utf-16-be').hex()}> Tj ET\n" for number, line in enumerate(page)) if text else "0 0 10 10 re f\n"
        objects.append(f"<< /Length {len(shown)} >>\nstream\n{shown}endstream")
        objects.append(f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents {len(objects)} 0 R /Resources << /Font << /F1 3 0 R >> >> >>")
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    content, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(content))
        content += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    return content + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(content)}\n%%EOF\n".encode()


def html(encoding: str = "utf-8") -> bytes:
    paragraphs = "".join(f"<p>{KOREAN.splitlines()[0]} 이 문단은 {number}번째 설명이며, 국민 누구나 알 수 있도록 쓴 글이다.</p>" for number in range(6))
    return f"""<!doctype html><html lang="ko"><head><meta charset="{encoding}"><title>알림 마당</title><script>var hidden = "숨은 글";</script></head><body>
<nav><ul><li><a href="/">홈</a></li><li><a href="/map">찾아오시는 길</a></li></ul></nav><article><h1>새 제도 안내</h1>{paragraphs}
<table><caption>일정</caption><tr><th>날짜</th><th>내용</th></tr><tr><td>3월 1일</td><td>시행</td></tr></table>
<figure><img src="/img/a.png" alt="현장" width="640"><figcaption>현장 사진</figcaption></figure></article><footer>저작권</footer></body></html>""".encode(encoding)


def warc() -> bytes:
    """A page, one that was not found, a text, and a picture; each a gzip member, as crawlers write them."""
    def record(url: str, status: str, kind: str, content: bytes) -> bytes:
        http = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
        head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2026-03-04T05:06:07Z\r\nWARC-Record-ID: <urn:uuid:{len(content)}>\r\n" \
               f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n"
        return gzip.compress(head.encode() + http + b"\r\n\r\n", mtime=0)

    return (record("https://a.go.kr/1", "200 OK", "text/html; charset=euc-kr", html("euc-kr")) + record("https://a.go.kr/2", "404 Not Found", "text/html", html())
            + record("https://a.go.kr/3", "200 OK", "text/plain", KOREAN.encode()) + record("https://a.go.kr/4", "200 OK", "image/png", PNG))


AIHUB = {
    "documents": {"name": "summaries", "documents": [{"id": "1", "title": "예산안", "text": [[{"index": 0, "sentence": "첫 문장이다."}], [{"index": 1, "sentence": "둘째 문장이다."}]],
                                                      "abstractive": ["요약"]}]},
    "dialogue": {"numberOfItems": 1, "data": [{"header": {"dialogueInfo": {"topic": "여행"}}, "body": {"dialogue": [{"utterance": "어디 가?"}, {"utterance": "제주도."}]}}]},
    "reading": {"data": [{"title": "헌법", "paragraphs": [{"context": "헌법 본문이다.", "qas": [{"question": "무엇?", "answers": [{"text": "본문"}]}]}]}]},
    "nikl": {"id": "NIKL", "document": [{"id": "a", "metadata": {"title": "말뭉치"}, "paragraph": [{"id": "p1", "form": "문단 하나."}, {"id": "p2", "form": "문단 둘."}]}]},
}
PORTAL_JSON = {"response": {"header": {"resultCode": "00", "resultMsg": "NORMAL SERVICE."}, "body": {"items": {"item": [{"기관명": "행정안전부", "내용": "재난 문자 안내"}]}, "totalCount": 1}}}
PORTAL_ERROR = {"response": {"header": {"resultCode": "30", "resultMsg": "SERVICE KEY IS NOT REGISTERED"}}}
PORTAL_XML = '<?xml version="1.0" encoding="UTF-8"?><response><header><resultCode>00</resultCode></header><body><items><item><name>도서관</name><addr>서울</addr></item>' \
             "<item><name>미술관</name><addr>부산</addr></item></items></body></response>"
MARC = '<collection xmlns="http://www.loc.gov/MARC21/slim"><record><leader>x</leader><datafield tag="245" ind1="0" ind2="0"><subfield code="a">조선 왕조 실록</subfield>' \
       '<subfield code="b">역사</subfield></datafield><datafield tag="520" ind1=" " ind2=" "><subfield code="a">왕의 기록이다.</subfield></datafield></record></collection>'
DUBLIN = '<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/"><ListRecords><record><metadata><oai_dc:dc xmlns:oai_dc="o" xmlns:dc="http://purl.org/dc/elements/1.1/">' \
         "<dc:title>관보 제1호</dc:title><dc:description>공포된 법령을 싣는다.</dc:description><dc:rights>KOGL-1</dc:rights><dc:language>kor</dc:language></oai_dc:dc></metadata></record></ListRecords></OAI-PMH>"


def write_all(root: Path) -> dict[str, bytes]:
    """One file of each kind, and some that cannot be read. Returns their bytes by name."""
    import pyarrow
    import pyarrow.parquet

    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": [KOREAN, ENGLISH], "year": [2025, 2026]}), table)
    lines = [json.dumps({"text": f"{KOREAN} {number}", "date": "2026-01-02"}, ensure_ascii=False) for number in range(4)]
    csv = '번호,제목,내용\r\n1,가,"여러 줄의\n내용입니다"\r\n2,나,둘째 행의 내용입니다\r\n'
    files = {
        "text/utf8.txt": KOREAN.encode(), "text/cp949.txt": KOREAN.encode("cp949"), "text/utf16.txt": KOREAN.encode("utf-16"), "text/mark.txt": b"\xef\xbb\xbf" + ENGLISH.encode(),
        "text/packed.txt.gz": gzip.compress(ENGLISH.encode(), mtime=0), "page.html": html("euc-kr"), "guide.docx": docx(), "guide.hwpx": hwpx(),
        "law.pdf": pdf([["제1조 이 법은 국민의 권리를 정한다."], ["제2조 이 법은 공포한 날부터 시행한다."]]), "rows.csv": csv.encode("cp949"), "lines.jsonl": "\n".join(lines).encode(),
        "rows.parquet": table.getvalue(), "crawl.warc.gz": warc(), "aihub/a.json": json.dumps(AIHUB["documents"], ensure_ascii=False).encode(),
        "portal.json": json.dumps(PORTAL_JSON, ensure_ascii=False).encode(), "portal.xml": PORTAL_XML.encode(), "library.xml": MARC.encode(), "archive.xml": DUBLIN.encode(),
        "delivery.zip": zipped({"안/하나.txt": KOREAN.encode("cp949"), "b.json": json.dumps(AIHUB["dialogue"], ensure_ascii=False), "c.exe": b"MZ"}),
        "bad/noise.txt": bytes(range(256)) * 8, "bad/old.hwp": b"\xd0\xcf\x11\xe0" + bytes(64), "bad/cut.pdf": pdf([["x"]])[:200], "bad/scan.pdf": pdf([["x"]], text=False),
        "bad/cut.docx": docx()[:300], "bad/half.jsonl": b'{"text": "good"}\n{"text": broken\n[1]\n', "bad/empty.txt": b"",
        "bad/error.json": json.dumps(PORTAL_ERROR).encode(), "bad/bomb.xml": b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>',
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return files
