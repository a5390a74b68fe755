"""Which language a text is in: by its script, and for Latin letters by the words that every sentence has. A function of the text; no model, no download.

Letters are counted by script over a sample. Korean text names things in Latin letters and old documents write Hanja, so Hangul decides from a quarter on. A
language in Latin letters is the one whose function words are the largest share of the words, if that is at least one in twelve.
"""
import re

SAMPLE = 20_000  # characters: the first and the last half of these
UNKNOWN = "und"  # ISO 639-2's undetermined
_SCRIPTS = {
    "hangul": re.compile("[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]+"), "kana": re.compile("[\u3041-\u30ff\u31f0-\u31ff]+"), "han": re.compile("[\u3400-\u9fff\uf900-\ufaff]+"),
    "latin": re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+"), "cyrillic": re.compile("[\u0400-\u04ff]+"), "arabic": re.compile("[\u0600-\u06ff]+"),
    "hebrew": re.compile("[\u05d0-\u05ea]+"), "greek": re.compile("[\u0370-\u03ff]+"), "thai": re.compile("[\u0e00-\u0e7f]+"),
    "devanagari": re.compile("[\u0900-\u097f]+"), "khmer": re.compile("[\u1780-\u17ff]+"),
}
_BY_SCRIPT = {"cyrillic": "ru", "arabic": "ar", "hebrew": "he", "greek": "el", "thai": "th", "devanagari": "hi", "khmer": "km"}
# A syllable of Hangul, kana or a sign says as much as two or three Latin letters.
_WEIGHT = {"latin": 0.4, "cyrillic": 0.4}
_WORD = re.compile("[^\\W\\d_]+")
_FUNCTION = {
    "en": "the of and to in is that it for was on are as with be by at this have from or an not they his he you we were which",
    "de": "der die und das ist nicht ein eine den von zu mit sich auf des dem im für als auch es an werden aus er hat dass sie nach wird bei",
    "fr": "le la les et de des est un une que dans pour qui par sur pas au ce il avec sont du en se ne plus cette ou mais aux",
    "es": "el la los las y de que en un una es por con para no se del al su lo como más pero sus le ha este sí porque esta",
    "it": "il lo la gli le e di che in un una è per con non si del della dei sono da al come più anche questo alla ma nel delle",
    "pt": "o a os as e de que em um uma é por com para não se do da dos das no na ao mais como foi mas pela são seu",
    "nl": "de het een en van is dat op te in met voor niet zijn aan er om ook als bij door naar dan maar werd uit nog wordt deze worden",
    "vi": "và của là các có trong được cho với không một những này người khi đã từ đến để như về tại ra cũng theo đó nhiều",
    "id": "yang dan di dengan untuk dari pada ini itu tidak dalam adalah akan ke oleh juga atau sebagai karena lebih dapat ada tersebut telah",
}
_WORDS = {language: frozenset(words.split()) for language, words in _FUNCTION.items()}


def identify(text: str) -> str:
    """ISO 639-1 code, or UNKNOWN for text without letters or in a language that is not told."""
    sample = text if len(text) <= SAMPLE else text[: SAMPLE // 2] + text[-SAMPLE // 2:]
    present = ("latin",) if sample.isascii() else _SCRIPTS
    counts = dict.fromkeys(_SCRIPTS, 0.0) | {name: sum(map(len, _SCRIPTS[name].findall(sample))) * _WEIGHT.get(name, 1.0) for name in present}
    total = sum(counts.values())
    if total < 1:
        return UNKNOWN
    if counts["hangul"] >= 0.25 * total:
        return "ko"
    if counts["kana"] >= 0.1 * total:
        return "ja"
    if counts["han"] >= 0.5 * total:
        return "zh"
    script = max(counts, key=counts.__getitem__)
    return _latin(sample) if script == "latin" else _BY_SCRIPT.get(script, UNKNOWN)


def _latin(sample: str) -> str:
    words = _WORD.findall(sample.lower())
    shares = {language: sum(map(known.__contains__, words)) for language, known in _WORDS.items()}
    best = max(shares, key=shares.__getitem__)
    return best if shares[best] * 12 >= max(len(words), 1) else UNKNOWN
