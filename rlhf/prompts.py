"""What the stages of RLHF read: conversations, rankings and prompts of `chat.path`, in tokens, with a part held out.

The part is chosen by a hash of the first question, so that the same prompt is never on both sides, and adding records moves none.
"""
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ext.config.schema import Config
from megatron_ext.data.build import build_datasets, ensure_prepared
from megatron_ext.data.prepared import file_sha256
from megatron_ext.data.read import BadRecords
from megatron_ext.data.samples import Samples
from megatron_ext.data.split import document_digest
from megatron_ext.data.tokenizer import Tokenizer, tokenizer_file
from megatron_ext.errors import UserError
from rlhf.data import stdlib_files
from rlhf.data.examples import Example, Skipped, examples, question, ranked
from rlhf.data.packing import ChatSamples
from rlhf.data.records import KINDS, Message, read
from rlhf.data.template import Refused, Template
from rlhf.experience import Sequence_
from rlhf.ranked import Ranked
from rlhf.rollout import Question, longest_prompt


def prepare(config: Config) -> None:
    """What one process does before the ranks meet: the embedded tasks, and pretraining text where it is mixed in."""
    if config.chat.path is None:
        stdlib_files.ensure(config.data)
    if config.ppo.ptx_coef:
        ensure_prepared(config.data)


class Chat:
    """Records of a stage and how they become tokens.

    Attributes:
        tokenizer, file: the policy's. vocab_size: words of the model. identity: what the order of samples depends on.
        training, held_out: what each kind of stage makes of the records.

    Raises:
        UserError: no tokenizer; records, a template or a validation share that cannot be used.
    """

    def __init__(self, config: Config):
        self.config, chat = config, config.chat
        if config.data.tokenizer is None:
            raise UserError("data.tokenizer", None, "the run that this one starts from has no tokenizer.json; name one")
        self.file = tokenizer_file(config.data.tokenizer)
        self.tokenizer = Tokenizer.from_file(self.file)
        self.vocab_size = config.model.vocab_size or self.tokenizer.vocab_size
        self.template = Template.of(self.tokenizer, chat.template)
        self.longest = min(chat.max_length or config.data.sequence_length, config.model.max_sequence_length)
        self._truncate = chat.overlong == "truncate"
        self._notes: list[tuple[str, int | None, str, int]] = []
        kind = KINDS[config.stage.name]
        path = Path(chat.path) if chat.path else stdlib_files.ensure(config.data)[config.stage.name]
        found, bad = read(path, chat, kind)
        self._tell_bad(bad)
        if chat.validation:
            held, bad = read(Path(chat.validation), chat, kind, key="chat.validation")
            self._tell_bad(bad)
            training = found
        else:
            held = [one for one in found if _held_out(one.messages, chat.validation_share)]
            training = [one for one in found if not _held_out(one.messages, chat.validation_share)]
        if not training:
            raise UserError("chat.validation_share", chat.validation_share, f"leaves nothing of the {len(found)} records to train on")
        self.training, self.held_out = self.tokens(training), self.tokens(held)
        if not self.training:
            raise UserError("chat.path", path, f"holds no record that fits: {', '.join(reason for _, _, reason, _ in self._notes)}")
        self.identity = {
            "sources": [_sha256(path), *([_sha256(Path(chat.validation))] if chat.validation else [])], "tokenizer": self.tokenizer.sha256,
            "template": hashlib.sha256(self.template.source.encode()).hexdigest(), "validation_share": chat.validation_share, "seed": config.data.seed,
            "longest": self.longest, "overlong": chat.overlong, "packing": chat.packing, "format": chat.format,
        }

    def tokens(self, records: Sequence) -> list:
        """Records of the stage's kind as it uses them."""
        raise NotImplementedError

    def note(self, skipped: Skipped) -> None:
        self._notes += [("", None, reason, count) for reason, count in skipped.counts.items()]

    def _tell_bad(self, bad: BadRecords) -> None:
        for place in bad.places:
            file, _, rest = place.partition(":")
            line, _, reason = rest.partition(": ")
            self._notes.append((file, int(line) if line.isdigit() else None, reason, 1))
        if bad.count > len(bad.places):
            self._notes.append(("", None, "more of the same", bad.count - len(bad.places)))

    @property
    def skipped(self) -> int:
        """Records that were left out or cut."""
        return sum(count for *_, count in self._notes)

    def tell(self, journal) -> None:
        """Says which records were skipped, in the events."""
        for file, line, reason, count in self._notes:
            journal.event("record_skipped", file=file, line=line, reason=reason, count=count)
        if self._notes:
            journal.note(f"{self.skipped} records were skipped or cut; events.jsonl says why")


class Conversations(Chat):
    """For sft: examples, and the samples that they are packed into."""

    def tokens(self, records: Sequence) -> list[Example]:
        longest = min(self.longest, self.config.data.sequence_length + 1)
        found, skipped = examples(records, self.template, longest=longest, truncate=self._truncate)
        self.note(skipped)
        return found

    def samples(self, split: Sequence[Example], *, reshuffle: bool) -> ChatSamples:
        data = self.config.data
        return ChatSamples(split, sequence_length=data.sequence_length, packing=self.config.chat.packing, seed=data.seed, reshuffle=reshuffle,
                           vocab_size=self.tokenizer.vocab_size, eod=self.tokenizer.eod, name=str(self.config.chat.path))


class Rankings(Chat):
    """For reward and dpo."""

    def tokens(self, records: Sequence) -> list[Ranked]:
        found, skipped = [], Skipped()
        for record in records:
            one = ranked(record, self.template, longest=self.longest, truncate=self._truncate, skipped=skipped)
            if one is not None:
                pairs, kept = one
                sequences = tuple(Sequence_(np.array([*prompt, *answer], dtype=np.int64), len(prompt)) for prompt, answer in pairs)
                found.append(Ranked(sequences, kept.ranks, kept.margin, kept.demonstrations))
        self.note(skipped)
        return found


class Prompts(Chat):
    """For ppo, grpo and rloo. Of the held-out prompts `ppo.evaluate_prompts` are answered at each validation."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.held_out = self.held_out[: config.ppo.evaluate_prompts]

    def tokens(self, records: Sequence) -> list[Question]:
        found, skipped, longest = [], Skipped(), longest_prompt(self.config)
        for record in records:
            try:
                tokens = question(record.messages, self.template)
            except Refused as error:
                skipped.add(f"the template {error.reason}")
                continue
            if len(tokens) > longest:
                skipped.add(f"prompt longer than {longest} tokens")
                continue
            found.append(Question(tokens, _shown(record.messages), record.reference, record.record))
        self.note(skipped)
        return found

    def pretraining(self) -> Samples:
        """The text of the PTX mix. Raises UserError: text of another tokenizer."""
        from megatron_ext.data.build import dataset_tokenizer

        if dataset_tokenizer(self.config.data)[1].sha256 != self.tokenizer.sha256:
            raise UserError("data.path", self.config.data.path, "was made with another tokenizer than the policy's; prepare it with data.tokenizer=")
        return build_datasets(self.config.data, ("train",))["train"]


def _shown(messages: Sequence[Message]) -> str:
    """The prompt as reward functions and people read it: what was asked last, or the whole conversation."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _held_out(messages: Sequence[Message], share: float) -> bool:
    """By the first question: dialogues that begin alike share prompts (each turn is one), and so are on the same side, in every stage."""
    asked = next(message for message in messages if message["role"] not in ("assistant", "system"))
    text = json.dumps([dict(asked)], ensure_ascii=False, sort_keys=True)
    return int.from_bytes(document_digest(text)[:8], "big") / 2**64 < share


def _sha256(path: Path) -> str:
    if path.is_file():
        return file_sha256(path)
    parts = [f"{file.relative_to(path)} {file_sha256(file)}" for file in sorted(path.rglob("*")) if file.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
