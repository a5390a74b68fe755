"""What a model replied, as records; or the reason why it cannot be used. A reply is data that nobody has checked: it is parsed strictly, never run."""
import json
import re
from collections.abc import Iterator, Mapping

from rlhf.collect import cut, output

_FENCE = re.compile(r"\A\s*```[a-zA-Z]*\s*\n(?P<inside>.*?)\n?\s*```\s*\Z", re.DOTALL)
_QUESTION, _ANSWER = ("question", "q", "질문", "prompt"), ("answer", "a", "답변", "답", "response")


class Unusable(ValueError):
    """A reply, or one of its parts, that is left out. Its text is a reason that is counted: short, constant, without any of the reply."""


def records(makes: str, text: str, item: Mapping, *, longest: int, shortest: int, grounded: float) -> Iterator[dict | Unusable]:
    """The records of one reply, and the reasons why others of it were left out.

    Args:
        makes: of the template. item: what was asked about. longest, shortest: characters of an answer (a question may be shorter).
        grounded: least share of an answer's words that must stand in the item's passage, 0 to 1.
    """
    if makes == "answer":
        reason = _length(text, longest, shortest)
        yield Unusable(reason) if reason else {"prompt": item["prompt"], "response": text.strip()}
        return
    try:
        found = _list(text)
    except Unusable as error:
        yield error
        return
    seen = set()
    for one in found:
        try:
            record = _pair(one) if makes == "pairs" else _prompt(one, item)
            asked, said = record["prompt"], record.get("response", "")
            reason = _length(said, longest, shortest) if "response" in record else None
            if reason or len(asked) > longest:
                raise Unusable(reason or "too_long")
            if asked in seen or makes == "prompts" and asked == item.get("prompt"):
                raise Unusable("repeated")
            if makes == "pairs" and grounded and item.get("passage") and overlap(said, item["passage"]) < grounded:
                raise Unusable("not_grounded")
        except Unusable as error:
            yield error
            continue
        seen.add(asked)
        yield record


def _list(text: str) -> list:
    """A JSON list, bare, in a fence, or as the only list of an object; for pairs also lines of `Q: ...` and `A: ...`."""
    fence = _FENCE.match(text)
    inside = (fence["inside"] if fence else text).strip()
    try:
        found = json.loads(inside)
    except (ValueError, RecursionError):
        found = _within(inside)
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else [found]
    if found is None:
        marked = cut.faq(text)
        if not marked:
            raise Unusable("not_json")
        found = [{"question": piece.label, "answer": piece.text} for piece in marked]
    if not isinstance(found, list) or not found:
        raise Unusable("no_list")
    return found


def _within(text: str) -> list | None:
    """A list with words around it: from the first [ to the last ]."""
    begin, end = text.find("["), text.rfind("]")
    if not 0 <= begin < end:
        return None
    try:
        return json.loads(text[begin : end + 1])
    except (ValueError, RecursionError):
        return None


def _pair(one: object) -> dict:
    if not isinstance(one, dict):
        raise Unusable("no_pair")
    question = next((one[name] for name in _QUESTION if isinstance(one.get(name), str)), "").strip()
    answer = next((one[name] for name in _ANSWER if isinstance(one.get(name), str)), "").strip()
    if not question or not answer:
        raise Unusable("no_pair")
    return {"prompt": question, "response": answer}


def _prompt(one: object, item: Mapping) -> dict:
    asked = next((one[name] for name in _QUESTION if isinstance(one.get(name), str)), "") if isinstance(one, dict) else one
    if not isinstance(asked, str) or not asked.strip():
        raise Unusable("no_prompt")
    answer = item.get("response")
    return {"prompt": asked.strip()} | ({"response": answer} if isinstance(answer, str) and answer.strip() else {})


def _length(text: str, longest: int, shortest: int) -> str | None:
    size = len(text.strip())
    return "empty" if not size else "too_short" if size < shortest else "too_long" if size > longest else None


def overlap(text: str, passage: str) -> float:
    """Share of the text's words that the passage holds; of Korean words, whose endings change, the first two letters."""
    words = [word[:2] if "가" <= word[0] <= "힣" else word.lower() for word in re.findall(r"\w+", text)]
    there = {word[:2] if "가" <= word[0] <= "힣" else word.lower() for word in re.findall(r"\w+", passage)}
    return sum(word in there for word in words) / len(words) if words else 0.0


def finished(record: dict, item: Mapping, *, template: str, model: str, language: str) -> dict:
    """A record as it is written: with its id, who wrote it, and the source of what it was made of."""
    source = item.get("source") if isinstance(item.get("source"), dict) else {}
    return {"id": output.identity(template, model, item.get("id"), record), **record, "builder": f"augment:{template}", "model": model,
            "language": item.get("language") or language, "domain": item.get("domain"), "source": source, "made_from": item.get("id")}
