"""Few-shot prompts: a question behind solved examples of its own domain (and language), none of which is itself ever asked.

Which pairs become examples is decided by a hash of each pair; which of them stand before a question, by a hash of both: adding records
moves few, and no example has the source of the question it helps with.
"""
import hashlib
import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from rlhf.collect import output
from rlhf.collect.rights import RIGHTS, Gate
from rlhf.collect.sources import Pair, read
from rlhf.data import files

POOL = 16  # examples of a domain and language, or four times the shots
LONGEST = 500  # characters of an example: the short ones, since each stands before many questions


def write(config: Config, folder: Path, bad: files.Skips, gate: Gate) -> tuple[list[dict], Counter]:
    """few_shot.jsonl (prompts with a reference, docs/rlhf.md) and examples.jsonl (the pool). Raises UserError: collect.shots is 0."""
    shots, left_out = config.collect.shots, Counter()
    if not shots:
        raise UserError("collect.shots", 0, "must be at least 1 with collect.builder=few_shot: solved examples before each question")
    groups: dict[tuple, list[dict]] = {}
    seen = set()
    for item in read(Path(config.input), config, bad, gate):
        if not isinstance(item, Pair) or len(item.messages) != 1:
            left_out["no_single_question"] += 1
            continue
        record = _record(item)
        if record["prompt"] in seen:
            left_out["repeated"] += 1
            continue
        seen.add(record["prompt"])
        groups.setdefault((record["domain"] or "", record["language"]), []).append(record)
    with output.Records(folder / "examples.jsonl") as examples, output.Records(folder / "few_shot.jsonl") as prompts:
        for name in sorted(groups):
            pool = choose_pool(groups[name], max(POOL, 4 * shots))
            ids = {record["id"] for record in pool}
            for record in pool:
                examples.write(record)
            for record in groups[name]:
                if record["id"] in ids:
                    continue
                before = choose(pool, record["id"], record["source"]["id"], shots)
                if len(before) < shots:
                    left_out["too_few_examples"] += 1
                    continue
                shown = [one["id"] for one in before]
                prompts.write({"id": output.identity("few_shot", record["id"], shown), "prompt": messages(before, record["prompt"]),
                               "reference": record["response"], "shots": shown, "language": record["language"],
                               "domain": record["domain"], "source": also_of(record["source"], before)})
    return [one for one in (examples.facts(), prompts.facts()) if one], left_out


def choose_pool(records: Sequence[dict], size: int) -> list[dict]:
    """At most half of the records, the first `size` by the hash of their ids, of those that are short."""
    short = [record for record in records if len(record["prompt"]) + len(record["response"]) <= LONGEST]
    return sorted(short, key=lambda record: digest("pool", record["id"]))[: min(size, len(records) // 2)]


def choose(pool: Sequence[dict], asked: str, source: str, count: int) -> list[dict]:
    """`count` examples for the question with the id `asked`, none from its source; fewer where there are not so many."""
    others = [record for record in pool if record.get("source", {}).get("id") != source and record.get("id") != asked]
    return heapq.nsmallest(count, others, key=lambda record: digest("shot", f"{asked}\0{record.get('id')}"))


def also_of(source: Mapping, examples: Sequence[Mapping]) -> dict:
    """The source of a record that other records helped to make: it comes of theirs too. What is removed takes along what was made with it (`derived_from`), and what
    a licence of any of them forbids holds for it (`also`: of each other source what rights.py goes by)."""
    known = {source.get("id"), *(source.get("derived_from") or ())}
    others = [of for example in examples for of in [example.get("source")] if isinstance(of, Mapping)]
    ids = dict.fromkeys(one for of in others for one in (of.get("id"), *(of.get("derived_from") or ())))
    more = [one for one in ids if isinstance(one, str) and one not in known]
    also = [dict(one) for one in source.get("also") or ()]
    for part in (part for of in others for part in ({name: of[name] for name in RIGHTS if name in of}, *(of.get("also") or ()))):
        if part.get("id") != source.get("id") and part not in also:
            also.append(dict(part))
    return dict(source) | ({"derived_from": [*(source.get("derived_from") or ()), *more]} if more else {}) | ({"also": also} if also else {})


def messages(examples: Sequence[dict], question: str) -> list[dict]:
    """As a conversation: each example a turn of the user and one of the assistant, the question last."""
    turns = [turn for one in examples for turn in ({"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": one["response"]})]
    return [*turns, {"role": "user", "content": question}]


def _record(item: Pair) -> dict:
    question = item.messages[0]["content"]
    return {"id": output.identity("sft", item.source.id, question, item.response), "prompt": question, "response": item.response,
            "language": item.source.language(question + item.response), "domain": item.source.domain, "source": item.source.record()}


def digest(purpose: str, text: str) -> bytes:
    """A sort key that looks random and is the same for ever."""
    return hashlib.sha256(f"{purpose}\0{text}".encode()).digest()
