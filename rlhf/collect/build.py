"""`collect build`: documents and questions with answers to records that the stages read, and to passages that a model can write questions
about.

    qa          pairs as they are                                        -> sft.jsonl
    articles    "「대한민국헌법」 제1조의 내용을 알려 주세요." and the article    -> sft.jsonl
    faq         questions and answers that a document marks as such      -> sft.jsonl
    sections    a heading, and what stands under it                      -> sft.jsonl
    passages    a document in passages, for `collect augment`            -> passages.jsonl
    few_shot    questions behind solved examples of their domain         -> few_shot.jsonl, examples.jsonl
    tasks       answers to the same prompt, to be ranked                 -> tasks.jsonl
    auto        qa for pairs; of a document passages, and of articles, faq, sections the first that fits

Answers are the source's own words: nothing here is written by a model. Each record has an id (a hash of what it is) and its source; the
same input and keys make the same files.
"""
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml

from megatron_ext.config.overrides import conf_dir
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from rlhf.collect import cut, few_shot, output, sources, tasks
from rlhf.collect.rights import Gate
from rlhf.collect.sources import Document, Pair, Source, read
from rlhf.data import files

LEAST_PIECES = 2  # a document with one article, heading or question only mentions one


def build(config: Config) -> dict:
    """Reads `input`, writes into `output`. Returns the manifest. Raises UserError."""
    if config.input is None:
        raise UserError("input", "null", "name what is read: a file or directory of documents, questions with answers, or answers")
    folder, bad = output.directory(config.output), files.Skips(limit=config.chat.max_bad_records)
    inputs, gate = sources.inputs(Path(config.input)), Gate(config)
    if config.collect.builder == "tasks":
        outputs, left_out = tasks.write(config, folder, bad, gate)
    elif config.collect.builder == "few_shot":
        outputs, left_out = few_shot.write(config, folder, bad, gate)
    else:
        outputs, left_out = Builder(config).write(folder, bad, gate)
    left_out += gate.left_out
    if bad.count:
        left_out["unreadable"] = bad.count
    if not outputs:
        reasons = ", ".join(f"{reason} {count}" for reason, count in left_out.items()) or "it is empty"
        raise UserError("input", config.input, f"gives nothing with collect.builder={config.collect.builder}: {reasons}")
    curated = {one.sha256 for one in sources.cleaned(inputs).values()}
    more = gate.facts() | ({"curated": sorted(curated)} if curated else {})  # hashes of the manifests of cleaned documents
    return output.manifest(folder / "build.yaml", config, inputs=inputs, outputs=outputs, left_out=left_out, unreadable=bad.places, **more)


class Builder:
    """Makes records of documents and pairs, and counts what is left out."""

    def __init__(self, config: Config):
        self.config, self.wanted = config, config.collect.builder
        self.left_out: Counter[str] = Counter()
        self._phrases = phrases(config.collect.phrases)
        self._seen: set[bytes] = set()

    def write(self, folder: Path, bad: files.Skips, gate: Gate) -> tuple[list[dict], Counter]:
        with output.Records(folder / "sft.jsonl") as sft, output.Records(folder / "passages.jsonl") as passages:
            for item in read(Path(self.config.input), self.config, bad, gate):
                for record in self.records(item):
                    (passages if "passage" in record else sft).write(record)
        return [one for one in (sft.facts(), passages.facts()) if one], self.left_out

    def records(self, item: Document | Pair) -> Iterator[dict]:
        """The records of one document or pair."""
        wanted = self.wanted
        if isinstance(item, Pair):
            if wanted in ("auto", "qa"):
                yield from self._pair(item)
            else:
                self.left_out["no_document"] += 1
            return
        if wanted == "qa":
            self.left_out["no_pair"] += 1
            return
        if wanted != "passages":
            yield from self._pieces(item)
        if wanted in ("auto", "passages"):
            yield from self._passages(item)

    def _pair(self, item: Pair) -> Iterator[dict]:
        prompt = item.messages[0]["content"] if len(item.messages) == 1 else [dict(message) for message in item.messages]
        yield from self._kept("qa", prompt, item.response, item.source)

    def _pieces(self, item: Document) -> Iterator[dict]:
        kinds = ("articles", "faq", "sections") if self.wanted == "auto" else (self.wanted,)
        for kind in kinds:
            pieces = getattr(cut, kind)(item.text)
            if len(pieces) < (LEAST_PIECES if self.wanted == "auto" else 1):
                continue
            title = item.title or cut.title_of(item.text)
            for piece in pieces:
                if kind == "faq":
                    question = piece.label
                elif title is None:
                    self.left_out["no_title"] += 1
                    continue
                else:
                    question = self._question(kind, title, piece, item.source, item.text)
                part = piece.label if kind != "faq" else f"faq:{output.identity(piece.label)}"
                yield from self._kept(kind, question, piece.text, item.source.of(part))
            return
        if self.wanted != "auto":
            self.left_out[f"no_{self.wanted}"] += 1

    def _question(self, kind: str, title: str, piece: cut.Piece, source: Source, text: str) -> str:
        name = "section" if kind == "sections" else "named_article" if piece.title else "article"
        spoken = self._phrases.get(source.language(text)) or self._phrases["en"]
        digest = hashlib.sha256(f"{source.id}\0{piece.label}".encode()).digest()
        phrase = spoken[name][int.from_bytes(digest[:8], "big") % len(spoken[name])]
        for field, value in (("{title}", title), ("{label}", piece.label), ("{name}", piece.title or "")):
            phrase = phrase.replace(field, value)  # not str.format: a title may hold braces
        return phrase

    def _passages(self, item: Document) -> Iterator[dict]:
        title = item.title or cut.title_of(item.text)
        for number, passage in enumerate(cut.passages(item.text, self.config.collect.max_chars)):
            if len(passage) < self.config.collect.passage_chars:
                self.left_out["passage_too_short"] += 1
                continue
            source = item.source.of(f"passage:{number}")
            if self._repeated(passage, ""):
                self.left_out["repeated"] += 1
                continue
            yield {"id": output.identity("passage", source.id, passage), "passage": passage, "title": title, "language": source.language(passage),
                   "domain": source.domain, "source": source.record()}

    def _kept(self, builder: str, prompt: str | list, answer: str, source: Source) -> Iterator[dict]:
        settings, asked = self.config.collect, prompt if isinstance(prompt, str) else prompt[-1]["content"]
        reason = ("too_short" if len(answer.strip()) < settings.min_chars else "too_long" if max(len(answer), len(asked)) > settings.max_chars
                  else "repeated" if self._repeated(prompt, answer) else None)
        if reason:
            self.left_out[reason] += 1
            return
        yield {"id": output.identity("sft", source.id, prompt, answer), "prompt": prompt, "response": answer, "builder": builder,
               "language": source.language(asked + answer), "domain": source.domain, "source": source.record()}

    def _repeated(self, prompt: str | list, answer: str) -> bool:
        digest = bytes.fromhex(output.identity(prompt, answer))
        if digest in self._seen:
            return True
        self._seen.add(digest)
        return False


def phrases(path: str | None) -> dict:
    """{language: {article, named_article, section: [phrases]}}. Raises UserError."""
    file = Path(path) if path else conf_dir() / "collect" / "phrases.yaml"
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError("collect.phrases", file, f"cannot be read ({type(error).__name__}); conf/collect/phrases.yaml shows its form") from None
    right = isinstance(found, dict) and "en" in found and all(
        isinstance(spoken, dict) and all(isinstance(spoken.get(name), list) and spoken[name] and all(isinstance(one, str) for one in spoken[name])
                                         for name in ("article", "named_article", "section")) for spoken in found.values())
    if not right:
        raise UserError("collect.phrases", file, "needs, for en and any other language, lists of phrases under article, named_article and section")
    return found
