"""Tasks: a prompt and two or more answers to it, which a person is to order.

`collect build collect.builder=tasks input=DIR` puts together all answers that its files hold to the same prompt: answers of several models
or of one model drawn several times (`collect augment` with a template that makes answers), and the answer that a Q-A source gave, which is
then marked as the demonstration. Records with `responses` are tasks by themselves.
"""
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megatron_ext.config.schema import ChatConfig, Config
from megatron_ext.errors import UserError
from rlhf.collect import few_shot, output
from rlhf.collect.rights import Gate
from rlhf.collect.sources import values
from rlhf.data import fields, files
from rlhf.data.fields import Bad

DEMONSTRATION = "demonstration"
MOST = 9  # answers: as many as there are digit keys


@dataclass(frozen=True)
class Answer:
    """id: within its task. origin: the model that wrote it, or DEMONSTRATION; people are not shown it."""

    id: str
    text: str
    origin: str


@dataclass(frozen=True)
class Task:
    """prompt: messages. source: of the prompt, as records hold it."""

    id: str
    prompt: tuple[fields.Message, ...]
    answers: tuple[Answer, ...]
    domain: str = ""
    language: str = ""
    source: dict = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Of what a person orders: the prompt and the answers."""
        return output.identity([dict(message) for message in self.prompt], [[one.id, one.text] for one in self.answers])

    def record(self) -> dict:
        alone = len(self.prompt) == 1 and self.prompt[0]["role"] == "user"
        prompt = self.prompt[0]["content"] if alone else [dict(message) for message in self.prompt]
        return {"id": self.id, "prompt": prompt, "answers": [{"id": one.id, "text": one.text, "origin": one.origin} for one in self.answers],
                "domain": self.domain, "language": self.language, "source": self.source}


@dataclass
class _Group:
    prompt: tuple[fields.Message, ...]
    record: dict
    answers: dict[str, str] = field(default_factory=dict)  # text -> origin
    known: set[str] = field(default_factory=set)
    sources: list[dict] = field(default_factory=list)

    def learn(self, value: dict) -> None:
        """Source, domain and language of the first record that says them: in some files only a few do."""
        for name, kind in (("source", dict), ("domain", str), ("language", str)):
            if name not in self.known and isinstance(value.get(name), kind) and value[name]:
                self.record[name] = value[name]
                self.known.add(name)


def write(config: Config, folder: Path, bad: files.Skips, gate: Gate) -> tuple[list[dict], Counter]:
    """tasks.jsonl, in the order in which prompts first stand in the input."""
    groups: dict[str, _Group] = {}
    left_out: Counter[str] = Counter()
    for file, line, value in values(Path(config.input), bad):
        if "answers" in value or "passage" in value:
            continue  # tasks and passages that lie in the same directory
        if "responses" not in value and config.chat.response_key not in value:
            left_out["no_answer"] += 1
            continue
        try:
            prompt, found = _answers(value, config.chat)
        except Bad as error:
            bad.add(file, line, str(error))
            continue
        name = output.identity([dict(message) for message in prompt])
        here = {"id": f"{config.collect.source or file.name}:{line}", "file": file.name, "line": line}
        here |= {"licence": config.collect.licence} if config.collect.licence else {}
        given = value["source"] if isinstance(value.get("source"), dict) and value["source"] else None
        if not gate.admits(given or here):
            continue
        group = groups.setdefault(name, _Group(prompt, {"source": here, "domain": config.collect.domain or "", "language": ""}))
        group.learn(value)
        if given is not None:
            group.sources.append(given)
        for text, origin in found:
            if text in group.answers:
                left_out["repeated_answer"] += 1
            if group.answers.setdefault(text, origin) != origin and origin == DEMONSTRATION:
                group.answers[text] = origin
    with output.Records(folder / "tasks.jsonl") as records:
        for group in groups.values():
            if len(group.answers) < 2:
                left_out["one_answer_only"] += 1
                continue
            if (extra := len(group.answers) - config.collect.max_answers) > 0:
                left_out["answer_beyond_max_answers"] += extra
            records.write(_task(group, config.collect.max_answers).record())
    return [one for one in (records.facts(),) if one], left_out


def _task(group: _Group, most: int) -> Task:
    """With at most `most` answers: the demonstration, and of the others the first by a hash, in an order that says nothing of who wrote them."""
    ordered = sorted(group.answers.items(), key=lambda item: (item[1] != DEMONSTRATION, few_shot.digest("answer", item[0])))[:most]
    ordered.sort(key=lambda item: few_shot.digest("answer", item[0]))
    answers = tuple(Answer(f"a{number}", text, origin) for number, (text, origin) in enumerate(ordered))
    prompt = [dict(message) for message in group.prompt]
    source = few_shot.also_of(group.record["source"], [{"source": one} for one in group.sources])  # of all answers, not of the first alone
    return Task(output.identity("task", prompt, [one.text for one in answers]), group.prompt, answers, **group.record | {"source": source})


def _answers(value: dict, chat: ChatConfig) -> tuple[tuple[fields.Message, ...], list[tuple[str, str]]]:
    prompt = fields.asked(value, chat)
    if isinstance(value.get("responses"), list):
        texts = [one.get("text") if isinstance(one, dict) else one for one in value["responses"]]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise Bad("one of its responses is no text, or empty")
        return prompt, [(text, str(value.get("model") or "")) for text in texts]
    text = fields.text(value, chat.response_key)
    if not text.strip():
        raise Bad("has an empty response")
    return prompt, [(text, str(value["model"]) if isinstance(value.get("model"), str) else DEMONSTRATION)]


def load(path: Path) -> dict[str, Task]:
    """The tasks of a file, by id, in its order. Raises UserError: it is not there, or a line is no task (a page must not lose one unseen)."""
    bad = files.Skips(limit=0)
    if not path.is_file():
        raise UserError("input", path, "is not there; `collect build collect.builder=tasks` writes it")
    found: dict[str, Task] = {}
    for _, line, value in values(path, bad):
        try:
            task = _read(value)
        except (Bad, KeyError, TypeError, AttributeError) as error:
            raise UserError("input", f"{path}:{line}", f"is no task ({error}); `collect build collect.builder=tasks` writes them") from None
        if task.id in found:
            raise UserError("input", f"{path}:{line}", f"has the id of an earlier task ({task.id})")
        found[task.id] = task
    if not found:
        raise UserError("input", path, "holds no task")
    return found


def _read(value: dict) -> Task:
    prompt = fields.asked(value, ChatConfig())
    answers = tuple(Answer(one["id"], one["text"], one.get("origin", "")) for one in value["answers"])
    if not all(isinstance(one.id, str) and isinstance(one.text, str) and isinstance(one.origin, str) for one in answers):
        raise Bad("an answer has no id or no text")
    if not 2 <= len({one.id for one in answers}) == len(answers) <= MOST:
        raise Bad(f"has {len(answers)} answers; 2 to {MOST} with different ids can be ordered")
    if not isinstance(value["id"], str) or not value["id"]:
        raise Bad("has no id")
    return Task(value["id"], prompt, answers, str(value.get("domain") or ""), str(value.get("language") or ""), value.get("source") or {})
