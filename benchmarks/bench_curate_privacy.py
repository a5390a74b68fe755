"""De-identification against Presidio: recall, precision and speed on the same text, in one table.

    python benchmarks/bench_curate_privacy.py [--rounds 16] [--seconds 10] [--rows ours ours-without-kiwi presidio] [--faker 200] [--json benchmarks/results/curate_privacy.json]

The text is the labelled set of tests/privacy_corpus.py (Korean, English, hard negatives), clean and spoilt (full-width digits, hyphens, blanks, wrapped lines).
Presidio (pip install presidio-analyzer; needed here alone) runs with all its predefined recognisers of both languages on spaCy's blank pipelines, since its models
cannot be fetched: it then has no names and no places. It is asked in the language of the sentence; for negatives in Korean and English by their letters.

--faker: also values that others make (privacy_faker.py; pip install faker), by the first row's recogniser. --json: writes what was measured there,
beside rows that were measured before.

Speed is single-threaded processor time over documents of 12 sentences, and over real text where ../shared/data is there.
"""
import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from privacy_corpus import corpus, documents
from privacy_score import STRUCTURED, scored

Find = Callable[[str], list[tuple[int, int, str]]]
PRESIDIO = {  # its names in ours
    "KR_RRN": "KR_RRN", "KR_FRN": "KR_FRN", "KR_PASSPORT": "PASSPORT", "US_PASSPORT": "PASSPORT", "UK_PASSPORT": "PASSPORT", "KR_DRIVER_LICENSE": "DRIVER_LICENCE", "US_DRIVER_LICENSE": "DRIVER_LICENCE", "KR_BRN": "KR_BUSINESS",
    "PHONE_NUMBER": "PHONE", "EMAIL_ADDRESS": "EMAIL", "CREDIT_CARD": "CARD", "IP_ADDRESS": "IP", "US_SSN": "US_SSN", "UK_NINO": "UK_NINO", "UK_NHS": "UK_NHS", "IBAN_CODE": "BANK_ACCOUNT", "US_BANK_NUMBER": "BANK_ACCOUNT", "US_ITIN": "US_SSN",
    "UK_POSTCODE": "ADDRESS", "UK_VEHICLE_REGISTRATION": "PLATE", "MAC_ADDRESS": "IP", "UK_DRIVING_LICENCE": "DRIVER_LICENCE", "ABA_ROUTING_NUMBER": "BANK_ACCOUNT", "PERSON": "PERSON", "LOCATION": "ADDRESS",
}
IGNORED = {"URL", "DATE_TIME", "CRYPTO", "NRP", "MEDICAL_LICENSE"}  # asked for by nobody here: they count neither way


def ours(morphology: str) -> Find:
    from megatron_ext.curate.privacy.clean import Cleaner
    from megatron_ext.curate.privacy.config import PrivacyConfig

    cleaner = Cleaner(PrivacyConfig(morphology=morphology))
    return lambda text: [(span.start, span.end, span.kind) for span in cleaner.find(text)]


def presidio(threshold: float = 0.35) -> Find:
    import spacy
    import tldextract
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
    own_list = tldextract.TLDExtract(suffix_list_urls=())  # else it asks the network for a newer one, again for each address
    tldextract.extract = tldextract.tldextract.extract = own_list
    by_spaces = {"nlp": {"tokenizer": {"@tokenizers": "spacy.Tokenizer.v1"}}}  # Korean's own tokenizer needs MeCab

    class Blank(SpacyNlpEngine):
        def __init__(self):
            super().__init__(models=[{"lang_code": "en", "model_name": "blank"}, {"lang_code": "ko", "model_name": "blank"}])
            self.nlp = {"en": spacy.blank("en"), "ko": spacy.blank("ko", config=by_spaces)}

        def load(self) -> None:
            pass

    registry = RecognizerRegistry(supported_languages=["en", "ko"])
    engine = Blank()
    registry.load_predefined_recognizers(languages=["en", "ko"], nlp_engine=engine)
    _add_countries(registry)
    analyzer = AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en", "ko"])

    def find(text: str) -> list[tuple[int, int, str]]:
        language = "ko" if any("가" <= character <= "힣" for character in text) else "en"
        found = analyzer.analyze(text, language=language, score_threshold=threshold)
        return [(one.start, one.end, PRESIDIO.get(one.entity_type, one.entity_type)) for one in found if one.entity_type not in IGNORED]

    return find


def _add_countries(registry) -> None:
    """Its recognisers of Korea and of phones in Korean text, where the defaults leave them out."""
    import presidio_analyzer.predefined_recognizers as known

    have = {(type(one).__name__, one.supported_language) for one in registry.recognizers}
    for name in dir(known):
        if name.startswith("Kr") and name.endswith("Recognizer") and (name, "ko") not in have:
            registry.add_recognizer(getattr(known, name)(supported_language="ko"))
    for name in ("EmailRecognizer", "CreditCardRecognizer", "IpRecognizer", "IbanRecognizer"):
        if (name, "ko") not in have:
            registry.add_recognizer(getattr(known, name)(supported_language="ko"))
    if ("PhoneRecognizer", "ko") not in have:
        registry.add_recognizer(known.PhoneRecognizer(supported_language="ko", supported_regions=("KR", "US", "GB")))


PACKAGES = {"presidio": "presidio-analyzer"}  # spaCy comes with it
ROWS: dict[str, Callable[[], Find]] = {"ours": lambda: ours("kiwi"), "ours-without-kiwi": lambda: ours("none"), "presidio": presidio}


def speed(find: Find, texts: list[str], seconds: float) -> float:
    """MB (10^6 bytes of UTF-8) a processor second; the median of three passes, each over as many texts as fit its time."""
    rates = []
    for _ in range(3):
        size, start = 0, time.process_time()
        for text in texts:
            find(text)
            size += len(text.encode())
            if time.process_time() - start > seconds / 3:
                break
        rates.append(size / 1e6 / (time.process_time() - start))
    return statistics.median(rates)


def real_texts() -> list[str]:
    folder = ROOT.parent / "shared" / "data"
    if not folder.exists():
        return []
    lines = (folder / "chatbot_ko.csv").read_text(encoding="utf-8").splitlines()
    talk = ["\n".join(lines[start:start + 50]) for start in range(0, len(lines), 50)]
    english = (folder / "tinyshakespeare.txt").read_text(encoding="utf-8")
    return [file.read_text(encoding="utf-8") for file in sorted((folder / "ko_public").glob("*.txt"))] + talk + [english[start:start + 4000] for start in range(0, 400_000, 4000)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=16, help="of the sentences; each has about 150 spans")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement of speed")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--faker", type=int, default=0, metavar="N", help="values of each set of privacy_faker.py")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--missed", action="store_true", help="also print what was missed and what was wrong")
    options = parser.parse_args()
    clean, spoilt = corpus(rounds=options.rounds), corpus(seed=2, rounds=options.rounds, spoil=0.5)
    texts, real = [item.text for item in documents(clean)], real_texts()
    print(f"{sum(len(item.spans) for item in clean)} spans in {len(clean)} sentences, {sum(len(text.encode()) for text in texts) / 1e6:.2f} MB of labelled and {sum(len(text.encode()) for text in real) / 1e6:.2f} MB of real text")
    figures: dict = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.exists() else {"rows": {}}
    size = {"rounds": options.rounds, "spans": sum(len(item.spans) for item in clean), "negatives": sum(not item.spans for item in clean)}
    print("| | structured | names | addresses | precision | spoilt: structured | names | addresses | precision | MB/s labelled | MB/s real |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in options.rows:
        try:
            find = ROWS[row]()
        except ImportError as error:
            print(f"| {row} | not installed: pip install {PACKAGES.get(row, error.name)} |")
            continue
        cells, scores = [], []
        told = figures["rows"][row] = dict(size)
        for name, items in (("clean", clean), ("spoilt", spoilt)):
            score = scored(find, items)
            measured = {kind: score.recall(of) for kind, of in (("structured", STRUCTURED & set(score.true)), ("names", {"PERSON"}), ("addresses", {"ADDRESS"}))} | {"precision": score.precision()}
            told[name] = {key: round(value, 4) for key, value in measured.items()}
            cells += [f"{100 * value:.1f} %" for value in measured.values()]
            scores.append(score)
        rates = [speed(find, texts, options.seconds), speed(find, real, options.seconds) if real else None]
        told["mb_per_second"] = {"labelled": round(rates[0], 3), "real": rates[1] and round(rates[1], 3)}
        cells += [f"{rate:.2f}" if rate else "-" for rate in rates]
        print(f"| {row} | " + " | ".join(cells) + " |", flush=True)
        if options.missed:
            for score in scores:
                for each in (*score.missed[:60], *score.wrong[:60]):
                    print("   ", each)
    if options.faker:
        from privacy_faker import results

        figures["faker"] = {"each": options.faker, "found": {}}
        for what, share in results(ROWS[options.rows[0]](), options.faker):
            figures["faker"]["found"][what] = round(share, 4)
            print(f"{what:34} {100 * share:5.1f} %", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
