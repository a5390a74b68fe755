"""Bytes to text: UTF-8, CP949 (which EUC-KR is a part of), UTF-16, and by charset-normalizer what is none of these.

CP949 accepts nearly every sequence of bytes, Chinese and Japanese ones too. So a text is taken for it only if it reads as Korean: of Korean prose the
syllables below are more than half; of another encoding's bytes, read as CP949, hardly one in ten is among them.
"""
import codecs
import re

from megatron_ext.curate.ingest.items import Unreadable, needed

COMMON = frozenset(
    "이다는의에을가하고로은지를한도서기사자대시인어리나해그정아일라수있부스제장들여과보상주전원구게면만성것오안국으조니신비경공동등선연용위유음계"
    "문법관행및소식업무화실교생물관년월각따방할때분학단민치지산세내재회요중미건바적체우모호결와마말되거않였습합된규칙항른개설명명통출입별표려권김저")
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"))
ALIASES = {"euc-kr": "cp949", "euckr": "cp949", "ks_c_5601-1987": "cp949", "ksc5601": "cp949", "ms949": "cp949", "windows-949": "cp949", "utf8": "utf-8",
           "iso-8859-1": "cp1252", "latin-1": "cp1252", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "x-sjis": "cp932"}
BROKEN = "\ufffd"
WESTERN = frozenset("àáâäçèéêëìíîïñòóôöùúûüßœæåøÀÁÂÄÇÈÉÊËÎÏÑÓÔÖÙÚÛÜŒÆÅØ¿¡«»‘’“”–—…€£§°·©®\u00a0")
SAMPLE = 1 << 16  # characters
_WRITTEN = re.compile("[\t\n\r\x20-\x7e\u00a0-\u024f\u0370-\u052f\u2010-\u203b\u2190-\u21ff\u2460-\u27bf\u3000-\u303f\u3041-\u30ff\u3131-\u318e\u4e00-\u9fff"
                      "\uac00-\ud7a3\uff01-\uffe6]")
_HANGUL = re.compile("[\uac00-\ud7a3]")
_WIDE = re.compile("[^\x00-\x7f]")


def decode(content: bytes, *, wanted: str = "auto", declared: str | None = None, max_broken: float = 0.0) -> tuple[str, str, int]:
    """Text, the encoding's name, and how many characters could not be decoded (each stands as U+FFFD).

    Args:
        wanted: `curate.ingest.encoding`: an encoding, or "auto".
        declared: what the file says of itself (of a page: its meta element); believed where it fits.
        max_broken: share of the characters that may be undecodable.

    Raises:
        Unreadable: binary, or text in no encoding that fits.
    """
    if wanted != "auto":
        return _as(content, wanted, max_broken) or _refuse(f"not {wanted}")
    for mark, name in MARKS:
        if content.startswith(mark):
            return _as(content, name, max_broken) or _refuse(f"marked as {name} and not that")
    try:
        return content.decode("utf-8"), "utf-8", 0
    except UnicodeDecodeError:
        pass
    if b"\0" in content:
        return _wide(content, max_broken)
    name = ALIASES.get((declared or "").strip().lower(), (declared or "").strip().lower())
    if name and name != "utf-8" and _known(name) and (found := _as(content, name, max_broken)) and (name != "cp949" or korean(found[0])):
        return found
    found = _as(content, "cp949", max_broken)
    if found is not None and korean(found[0]):
        return found
    return _as(content, "utf-8", max_broken) or _western(content) or _other(content)


def korean(text: str) -> bool:
    """Whether what lies beyond ASCII reads as Korean."""
    sample = text if len(text) <= 1 << 20 else text[: 1 << 19] + text[-(1 << 19):]
    syllables = _HANGUL.findall(sample)
    wide = len(_WIDE.findall(sample))
    return bool(syllables) and len(syllables) >= 0.3 * wide and sum(map(COMMON.__contains__, syllables)) >= 0.35 * len(syllables)


def _as(content: bytes, name: str, max_broken: float) -> tuple[str, str, int] | None:
    try:
        return content.decode(name), name.removesuffix("-sig"), 0
    except (UnicodeDecodeError, LookupError):
        pass
    if not max_broken or not _known(name):
        return None
    already = content.count(BROKEN.encode()) if name.startswith("utf-8") else 0
    text = content.decode(name, errors="replace")
    broken = text.count(BROKEN) - already
    return (text, name.removesuffix("-sig"), broken) if broken <= max_broken * len(text) else None


def _known(name: str) -> bool:
    try:
        return codecs.lookup(name)._is_text_encoding
    except LookupError:
        return False


def _wide(content: bytes, max_broken: float) -> tuple[str, str, int]:
    """UTF-16 without a mark: the order of bytes in which nearly all is ASCII, Hangul, or another letter of the ranges that text is written in."""
    for name in ("utf-16-le", "utf-16-be"):
        found = _as(content, name, max_broken)
        if found and len(_WRITTEN.findall(found[0][:SAMPLE])) >= 0.95 * min(len(found[0]), SAMPLE):
            return found
    return _refuse("binary, not text")


def _western(content: bytes) -> tuple[str, str, int] | None:
    """CP1252, where what lies beyond ASCII is letters and signs of western European languages, inside words that are mostly ASCII."""
    found = _as(content, "cp1252", 0.0)
    if found is None:
        return None
    wide = _WIDE.findall(found[0])
    return found if len(wide) <= 0.2 * len(found[0]) and all(letter in WESTERN for letter in wide) else None


def _other(content: bytes) -> tuple[str, str, int]:
    best = needed("charset_normalizer", "text in an unusual encoding").from_bytes(content[: 1 << 20]).best()
    found = None if best is None else _as(content, best.encoding, 0.0)
    return found or _refuse("text in no encoding that is known")


def _refuse(reason: str):
    raise Unreadable(reason)
