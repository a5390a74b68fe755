"""Mail and network addresses, also with blanks, wrapped lines and words in place of signs ("hong (at) example dot com", "hong 골뱅이 example.com")."""
import ipaddress
import re
from collections.abc import Iterator

from megatron_ext.curate.privacy import kinds
from megatron_ext.curate.privacy.context import Around, S
from megatron_ext.curate.privacy.spans import Span

# Ends of domains that are believed with blanks around the dots; without blanks any is.
_COMMON = r"(?:com|net|org|edu|gov|mil|info|biz|io|kr|uk|jp|cn|한국)"
_AT = re.compile(r"@|[(\[{<] ?(?:at|AT|At|골뱅이|앳) ?[)\]}>]|골뱅이|[ \n](?:at|AT)(?=[ \n]{1,3}[A-Za-z0-9])")
_LOCAL = r"[A-Za-z0-9._%+'~-]"
_BEFORE = re.compile(rf"(?:\"[^\"\n@]{{1,40}}\"|[A-Za-z0-9_%+-](?:{_LOCAL}){{0,63}}|[가-힣](?:[가-힣0-9._-]){{0,30}}){S}$")
_DOT = rf"(?:{S}\.{S}|[ \n]{{0,2}}[(\[{{][ ]?(?:dot|DOT|점|닷)[ ]?[)\]}}][ \n]{{0,2}}|[ \n]{{1,3}}(?:dot|DOT|점|닷)[ \n]{{1,3}})"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]){0,62}"
_TIGHT = re.compile(r"(?:[A-Za-z0-9가-힣](?:[A-Za-z0-9가-힣-]){0,62}\.){1,6}(?:[A-Za-z]{2,24}|xn--[A-Za-z0-9-]{1,40}|한국)(?![A-Za-z0-9_])|\[\d{1,3}(?:\.\d{1,3}){3}\]")
_NOISY = re.compile(rf"{S}{_LABEL}(?:{_DOT}{_LABEL}){{0,5}}?{_DOT}{_COMMON}(?:{_DOT}(?:kr|uk|jp|au|nz|in|za|br|cn|sg|hk|tw))?(?![A-Za-z0-9])")
_PROVIDERS = re.compile(rf"{S}(?:네이버|다음|한메일|지메일|네이트|핫메일|코리아)(?:{S}(?:닷|점|쩜){S}(?:컴|콤|넷|케이알))?")
_REACH = 80  # characters before the sign

_V4 = re.compile(r"\d(?<![\d.]\d)(?<![A-Za-z]\d)\d{0,2}(?:\.\d{1,3}){3}(?!\d|\.\d|[A-Za-z_])")
_V4_NOISY = re.compile(rf"\d(?<!\d\d)(?<![\d.]\d)\d{{0,2}}(?:{S}\.{S}\d{{1,3}}){{3}}(?!{S}\.{S}\d|\d)")
_V6 = re.compile(r"[0-9A-Fa-f:](?<![0-9A-Za-z:.].)[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,8}(?:%\w{1,16})?(?:\.\d{1,3}){0,3}(?![0-9A-Za-z:])")
_MAC = re.compile(r"[0-9A-Fa-f](?<![0-9A-Za-z:-].)[0-9A-Fa-f](?P<sign>[:-])(?:[0-9A-Fa-f]{2}(?P=sign)){4}[0-9A-Fa-f]{2}(?![0-9A-Za-z:-])")
_NOT_IP = re.compile(r"(?:버전|판|version|ver\.?|\bv|release|firmware|build|section|절|항|제|chapter|ch\.|table|표|그림|fig(?:ure)?\.?|oid|appendix|별표)[: ]{0,2}$")


def mails(text: str) -> Iterator[Span]:
    """Every sign is looked at once, 80 characters to the left and 400 to the right of it."""
    for sign in _AT.finditer(text):
        before = _BEFORE.search(text, max(0, sign.start() - _REACH), sign.start())
        if before is None:
            continue
        plain = sign[0] == "@"
        tight = _TIGHT.match(text, sign.end(), sign.end() + 400) if plain else None
        wide = _NOISY.match(text, sign.end(), sign.end() + 400)
        spoken = _PROVIDERS.match(text, sign.end()) if "골뱅이" in sign[0] else None
        after = max((match for match in (tight, wide, spoken) if match), key=lambda match: match.end(), default=None)
        if after is None:
            continue
        # A word before "at" is a word: "look at example.com" has blanks and no brackets.
        if sign[0].strip() in ("at", "AT") and _SPOKEN.match(text, sign.end()) is None:
            continue
        start = before.start()
        name = before[0].rstrip()
        if not name.isascii() and (not plain or name != before[0]):  # 인스타 @name
            continue
        if name == "git" and text[after.end():after.end() + 1] == ":":  # git@host:path
            continue
        yield Span(start, after.end(), kinds.EMAIL, 0.97 if plain else 0.85)


_SPOKEN = re.compile(rf"[ \n]{{1,3}}{_LABEL}[ \n]{{1,3}}(?:dot|DOT|점)[ \n]{{1,3}}{_COMMON}")


def addresses(text: str) -> Iterator[Span]:
    """IP addresses of machines that may belong to someone (not this machine, not masks), and hardware addresses."""
    for match in _V4.finditer(text):
        if _is_address(match[0]) and _stands_for_machine(text, match):
            yield Span(*match.span(), kinds.IP, 0.9)
    for match in _V4_NOISY.finditer(text):
        if " " in match[0] or "\n" in match[0]:
            around = Around(text, *match.span())
            value = "".join(match[0].split())
            if 0 <= around.labelled(kinds.IP) <= 10 and _is_address(value):
                yield Span(*match.span(), kinds.IP, 0.8)
    if ":" in text:
        for match in _V6.finditer(text):
            if _is_v6(match[0]):
                yield Span(*match.span(), kinds.IP, 0.9)
    for match in _MAC.finditer(text):
        yield Span(*match.span(), kinds.IP, 0.85)


def _is_address(value: str) -> bool:
    parts = value.split(".")
    if any(int(part) > 255 or len(part) > 1 and part[0] == "0" for part in parts):
        return False
    return parts[0] not in ("0", "127", "255")


def _stands_for_machine(text: str, match: re.Match) -> bool:
    around = Around(text, *match.span())
    if _NOT_IP.search(around.before):
        return False
    return around.labelled(kinds.IP) >= 0 or any(int(part) > 12 for part in match[0].split("."))


def _is_v6(value: str) -> bool:
    value = value.partition("%")[0]
    groups = [group for group in value.split(":") if group]
    if len(groups) < 3 and not value.lower().startswith(("fe80", "2001", "fd", "2")) or not any(character.isdigit() for character in value):
        return False
    try:
        return not ipaddress.IPv6Address(value).is_loopback
    except ValueError:
        return False
