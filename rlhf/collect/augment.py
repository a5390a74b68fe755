"""`collect augment`: a template, items (passages, prompts) and a model to new records.

    1. every item becomes messages, and `generate.samples` requests of them; what the cache has is not asked again
    2. replies are written into the cache as they come, several under way at once
    3. when all are there (or the budget is spent), records are made of the cache in the order of the items: the same bytes however it came about
"""
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

from megatron_ext.config.schema import Config
from megatron_ext.errors import RunFailed, UserError
from rlhf.collect import few_shot, output, replies
from rlhf.collect.budget import Budget
from rlhf.collect.cache import Cache, Request
from rlhf.collect.rights import Gate
from rlhf.collect.sources import values
from rlhf.collect.templates import Template
from rlhf.data import files

WRITES = {"pairs": ("sft.jsonl",), "prompts": ("sft.jsonl", "prompts.jsonl"), "answer": ("answers.jsonl",)}
READS = {"pairs": ("passages.jsonl",), "prompts": ("sft.jsonl", "prompts.jsonl"), "answer": ("prompts.jsonl", "sft.jsonl")}


class Backend(Protocol):
    """Who replies."""

    def run(self, requests: Iterator[Request], cache: Cache, budget: Budget) -> Counter:
        """Puts a reply to each request that the cache has not into it, and returns why it could not, and how often."""


@dataclass(frozen=True)
class Augmentation:
    """What one command does. file: of the items. pool: examples. sampling: of every request."""

    config: Config
    template: Template
    file: Path
    pool: tuple[Mapping, ...]
    sampling: Mapping[str, object]

    @classmethod
    def of(cls, config: Config, words: tuple[str, ...]) -> "Augmentation":
        """Reads what can be read before any model is asked.

        Args:
            words: the overrides that were typed: their `generate.*` go before the template's.
        Raises:
            UserError: input, output, template or examples are missing or wrong.
        """
        if config.input is None:
            raise UserError("input", "null", "name the passages or prompts to read: a file, or the directory that `collect build` wrote")
        template = Template.load(config.collect.template)
        if config.collect.shots:
            template = replace(template, shots=config.collect.shots)
        file = Path(config.input)
        if file.is_dir():
            file = next((file / name for name in READS[template.makes] if (file / name).is_file()), file / READS[template.makes][0])
        files.find(file, key="input")
        pool = template.examples if config.collect.examples is None else _examples(Path(config.collect.examples), config, Gate(config))
        pool = tuple({"id": str(number), **one} for number, one in enumerate(pool))
        if len(pool) < template.shots:
            reason = f"holds {len(pool)} examples, {template.shots} are to stand before each item"
            raise UserError("collect.examples", config.collect.examples or "null", reason)
        typed = {word.lstrip("+").partition("=")[0] for word in words}
        own = {name: getattr(config.generate, name) for name in ("temperature", "top_p", "max_tokens", "stop")}
        own["stop"] = list(own["stop"])
        sampling = own | {name: value for name, value in template.sampling.items() if f"generate.{name}" not in typed}
        if not sampling["stop"]:
            del sampling["stop"]
        if config.checkpoint.load is not None:  # a checkpoint of our own draws by these too; endpoints know neither
            sampling |= {"seed": config.generate.seed, "top_k": config.generate.top_k}
        return cls(config, template, file, pool, sampling)

    def items(self, left_out: Counter, bad: files.Skips, gate: Gate) -> Iterator[dict]:
        """Records of the input that the template can ask about, and may."""
        needed = "passage" if self.template.makes == "pairs" else "prompt"
        seen = set()
        for _, _, value in values(self.file, bad):
            found = value.get(needed)
            if not isinstance(found, str | list) or not found or needed == "passage" and not isinstance(found, str):
                left_out[f"no_{needed}"] += 1
                continue
            item = value if value.get("id") else value | {"id": output.identity(found)}
            if item["id"] in seen:
                left_out["repeated_item"] += 1
                continue
            seen.add(item["id"])
            if gate.admits(_source(item)):
                yield item

    def requests(self, model: str, items: Iterator[dict]) -> Iterator[tuple[dict, list[Request]]]:
        """Each item with the replies that are wanted of it."""
        for item in items:
            examples = self.template.choose(self.pool, item)
            messages = self.template.render(item, examples)
            yield item | {"source": few_shot.also_of(_source(item), examples)}, [Request.of(model, messages, draw, self.sampling) for draw in range(self.config.generate.samples)]


def augment(work: Augmentation, model: str, backend: Callable[[], Backend]) -> dict:
    """Asks and writes. Returns the manifest.

    Args:
        model: its name, in hashes and records. backend: makes who replies; called when there is something to ask.
    Raises:
        UserError, RunFailed: see the backend. RunFailed too where the budget was spent before all was asked; what is there is written.
    """
    config, folder = work.config, output.directory(work.config.output)
    budget, asked = Budget(config.collect), Counter()
    with Cache(folder, budget) as cache:
        bad = files.Skips(limit=config.chat.max_bad_records)
        missing = (request for _, wanted in work.requests(model, work.items(Counter(), bad, Gate(config))) for request in wanted if request.key not in cache)
        first = next(missing, None)
        before = len(cache)
        if first is not None:
            asked = backend().run(_chained(first, missing), cache, budget)
        left_out, bad = Counter(asked), files.Skips(limit=config.chat.max_bad_records)
        gate = Gate(config)
        outputs, open_ = _write(work, model, cache, folder, left_out, bad, gate)
        left_out += gate.left_out
        if bad.count:
            left_out["unreadable"] = bad.count
        found = output.manifest(
            folder / "augment.yaml", config, inputs=[work.file], outputs=outputs, left_out=left_out, template=work.template.name, model=model, spent=budget.facts(),
            replies=len(cache), new_replies=len(cache) - before, without_reply=open_, complete=not budget.reached and not open_,
            **gate.facts(),
        )
    if budget.reached:
        value = getattr(config.collect, budget.reached.partition(".")[2])
        spent = ", ".join(f"{name} {count}" for name, count in budget.facts().items())
        raise RunFailed(f"{budget.reached}={value} is spent ({spent}); {open_} replies are missing, what came is written. A larger budget goes on from here")
    if not outputs:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(left_out.items()))
        raise RunFailed(f"no reply could be used: {reasons or 'the input holds no item'}")
    return found


def _write(work: Augmentation, model: str, cache: Cache, folder: Path, left_out: Counter, bad: files.Skips, gate: Gate) -> tuple[list[dict], int]:
    """Records of all replies that are there; and how many are not."""
    settings, makes, missing = work.config.collect, work.template.makes, 0
    seen: set[str] = set()
    names = WRITES[makes]
    with output.Records(folder / names[0]) as first, output.Records(folder / names[-1]) if len(names) > 1 else _Nothing() as last:
        for item, wanted in work.requests(model, work.items(left_out, bad, gate)):
            for request in wanted:
                if request.key not in cache:
                    missing += 1
                    continue
                reply = cache.get(request.key)
                if reply.stop == "length" and makes == "answer" and not settings.keep_cut:
                    left_out["cut_off"] += 1
                    continue
                limits = {"longest": settings.max_chars, "shortest": settings.min_chars, "grounded": settings.grounded}
                for record in replies.records(makes, reply.text, item, **limits):
                    if isinstance(record, replies.Unusable):
                        left_out[str(record)] += 1
                        continue
                    whole = replies.finished(record, item, template=work.template.name, model=model, language=work.template.language)
                    same = output.identity(record["prompt"], record.get("response"))
                    if same in seen:
                        left_out["repeated"] += 1
                        continue
                    seen.add(same)
                    (first if "response" in record else last).write(whole)
    return [one for one in (first.facts(), last.facts()) if one], missing


class _Nothing:
    """A second file where there is none."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        pass

    def facts(self) -> dict:
        return {}


def _chained(first: Request, rest: Iterator[Request]) -> Iterator[Request]:
    yield first
    yield from rest


def _source(record: Mapping) -> Mapping:
    return record["source"] if isinstance(record.get("source"), Mapping) else {}


def _examples(path: Path, config: Config, gate: Gate) -> Iterator[dict]:
    bad = files.Skips(limit=config.chat.max_bad_records)
    for _, _, value in values(path, bad, key="collect.examples"):
        if isinstance(value.get("response"), str) and value["response"].strip() and gate.admits(_source(value)):
            yield value
