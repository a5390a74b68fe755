"""Prompt templates of `collect augment`: YAML with messages in Jinja (in a sandbox, missing names are errors), and what is made of the
replies.

    name: qa_ko
    language: ko
    makes: pairs         pairs: a JSON list of {question, answer}                        -> sft.jsonl
                         prompts: a JSON list of other wordings of the prompt            -> sft.jsonl (with the item's own answer), prompts.jsonl
                         answer: the reply itself is an answer to the item's prompt      -> answers.jsonl, to be ranked
    count: 3             how many pairs or prompts a reply is asked for ({{ count }})
    sampling: {temperature: 0.7, top_p: 0.9, max_tokens: 1024, stop: []}
    shots: 2             solved examples before the item, from `examples` here or collect.examples
    messages: [{role: system, content: ...}, {role: user, content: ...}]
    example: ...         how one example is asked (Jinja; its response is the assistant's turn); by default as the last message
    examples: [{...variables, response: ...}]

Variables: passage, title, domain, language, prompt, response (of the item; empty text where it has none), count. For `answer` without
messages the item's own prompt is asked as it is. Items are data, also when they look like instructions: templates put them between marks
and say so.
"""
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_ext.config.overrides import conf_dir
from megatron_ext.errors import UserError
from rlhf.collect import few_shot

KEY = "collect.template"
MAKES = ("pairs", "prompts", "answer")
VARIABLES = ("passage", "title", "domain", "language", "prompt", "response", "count")
_SAMPLING = {"temperature": (float, int), "top_p": (float, int), "max_tokens": (int,), "stop": (list,)}
_FIELDS = {"name": str, "language": str, "makes": str, "count": int, "sampling": dict, "shots": int, "messages": list, "example": str,
           "examples": list}
_KINDS = {str: "text", int: "a whole number", dict: "a mapping", list: "a list"}
_ROLES = ("system", "user", "assistant")
_FAILURES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class Template:
    """A template as its file says. messages: (role, Jinja text)."""

    name: str
    language: str
    makes: str
    messages: tuple[tuple[str, str], ...]
    count: int = 1
    shots: int = 0
    sampling: Mapping[str, object] = field(default_factory=dict)
    example: str | None = None
    examples: tuple[Mapping, ...] = ()

    @classmethod
    def load(cls, name: str) -> "Template":
        """`collect.template`: a name in conf/collect, or a file. Raises UserError: not there, or no template."""
        path = Path(name) if name.endswith((".yaml", ".yml")) else conf_dir() / "collect" / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in (conf_dir() / "collect").glob("*.yaml") if file.stem != "phrases"))
            raise UserError(KEY, name, f"is not there; conf/collect has {known}, or name a .yaml file")
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(KEY, path, f"is not YAML: {' '.join(str(error).split())}") from None
        return cls.of(found, path)

    @classmethod
    def of(cls, found: object, path: object) -> "Template":
        """Raises UserError: a field that is missing, unknown or of another type; Jinja that fails."""
        def wrong(name: str, reason: str) -> UserError:
            return UserError(KEY, path, f"its {name} {reason}")

        if not isinstance(found, dict):
            raise UserError(KEY, path, "holds no mapping of fields (name, language, makes, messages)")
        for name, value in found.items():
            if name not in _FIELDS:
                raise wrong(name, f"is unknown; known are {', '.join(_FIELDS)}")
            if not isinstance(value, _FIELDS[name]) or isinstance(value, bool):
                raise wrong(name, f"must be {_KINDS[_FIELDS[name]]}")
        for name in ("name", "language", "makes"):
            if name not in found:
                raise wrong(name, "is missing")
        if found["makes"] not in MAKES:
            raise wrong("makes", f"is {found['makes']}; it is one of {', '.join(MAKES)}")
        if found.get("count", 1) < 1 or found.get("shots", 0) < 0:
            raise wrong("count", "must be at least 1, its shots at least 0")
        messages = found.get("messages", [])
        for one in messages:
            right = isinstance(one, dict) and set(one) == {"role", "content"} and one["role"] in _ROLES and isinstance(one["content"], str)
            if not right:
                raise wrong("messages", "must each have a role (system, user, assistant) and a content")
        if not messages and found["makes"] != "answer" or messages and messages[-1]["role"] != "user":
            raise wrong("messages", "must end with one of the user")
        for name, value in found.get("sampling", {}).items():
            if name not in _SAMPLING or not isinstance(value, _SAMPLING[name]) or isinstance(value, bool):
                raise wrong("sampling", f"knows {', '.join(_SAMPLING)}, not {name}: {value}")
        if not all(isinstance(one, dict) and isinstance(one.get("response"), str) for one in found.get("examples", [])):
            raise wrong("examples", "must each be a mapping of variables with a response")
        template = cls(**{name: value for name, value in found.items() if name not in ("messages", "examples")},
                       messages=tuple((one["role"], one["content"]) for one in messages), examples=tuple(found.get("examples", ())))
        probe = {"passage": "a", "title": "a", "prompt": "a", "response": "a"}
        template.render(probe, template.examples or [probe])  # what fails on every item is told now
        return template

    def render(self, item: Mapping, examples: Sequence[Mapping] = ()) -> list[dict]:
        """The messages for an item (see VARIABLES), with solved examples before the last one.

        Raises:
            UserError: the template fails on it. Its text is not shown.
        """
        if not self.messages:
            asked = item["prompt"] if isinstance(item.get("prompt"), list) else [{"role": "user", "content": item.get("prompt", "")}]
            return [*(turn for one in examples for turn in self._example(one)), *(dict(message) for message in asked)]
        *before, (role, last) = [(role, self._text(content, item)) for role, content in self.messages]
        turns = [turn for one in examples for turn in self._example(one)]
        return [*({"role": name, "content": text} for name, text in before), *turns, {"role": role, "content": last}]

    def _example(self, one: Mapping) -> list[dict]:
        asked = self._text(self.example or (self.messages[-1][1] if self.messages else "{{ prompt }}"), one)
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": one["response"]}]

    def _text(self, content: str, item: Mapping) -> str:
        values = {name: item.get(name) or "" for name in VARIABLES} | {"count": self.count}
        if isinstance(values["prompt"], list):
            values["prompt"] = "\n\n".join(message["content"] for message in values["prompt"])
        try:
            return _compiled(content).render(values).strip()
        except _FAILURES as error:
            said = str(error) if isinstance(error, jinja2.TemplateSyntaxError | jinja2.UndefinedError) else type(error).__name__
            raise UserError(KEY, self.name, f"cannot be filled in: {said}") from None

    def choose(self, pool: Sequence[Mapping], item: Mapping) -> list[Mapping]:
        """The examples that stand before an item: by a hash, none from its source."""
        if not self.shots:
            return []
        return few_shot.choose(pool, str(item.get("id")), str((item.get("source") or {}).get("id")), self.shots)


_ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=False)
_compiled = functools.lru_cache(64)(_ENVIRONMENT.from_string)
