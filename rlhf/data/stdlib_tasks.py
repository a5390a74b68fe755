"""The embedded tasks of the chain: questions about the standard library, answered by its own documentation and source.

Each definition with a documentation string gives at most one question:

- *describe*: "What does os.path.join(a, *p) do?", answered by the first sentences of the documentation string;
- *complete*: signature and documentation, answered by the body (where it is short; a hash chooses between the two).

No prompt and no answer stands twice, and a hash of the prompt gives each question to one stage only, as InstructGPT's labelled data were collected
for one stage each (Ouyang et al. 2022, arXiv 2203.02155, table 6: SFT 13k, reward model 33k, PPO 31k prompts). Each stage then holds out its own
share by another hash (`chat.validation_share`). What is held out is held out of these stages: the texts of pretraining and `adapt` hold the library itself, which is where a
model knows the answers from.

**Rankings** have four responses: the true answer; the true answer cut off before its end; another definition's answer, from another module and
without a word of the question in it; the true answer's words in random order. The order is

    true  >  cut off = another's  >  shuffled

since the true answer is whole and to the point, a cut one is to the point only, another's is whole only, and words in random order are no answer
at all. Which of the middle two is worse people do not agree on: a tie. (Were cut off > another's a pair, a model that does not know yet which answer
belongs to which question, and that is what takes longest to learn, would find that answers without a full stop are better, and learn true > cut
off backwards; seen in trials.)
Each answer serves about once as the true one and once as another's, so the answer alone does not tell how good it is: only question and answer do.
"""
import ast
import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_ext.data.definitions import Definition, stdlib_modules

SHARES = {"sft": 0.35, "rankings": 0.45, "prompts": 0.2}  # of the questions
KINDS = ("describe", "complete")
SHORTEST = 5  # words of an answer
LONGEST_ANSWER, LONGEST_PROMPT = 220, 420  # characters; at about 3 a token of a 2,048-word vocabulary both fit into 256 tokens

_DESCRIBE = ("What does {call} do?", "What does {name} do?", "Explain {call}.", "Describe {call} in a sentence or two.", "What is {call} for?")
_DESCRIBE_CLASS = ("What is {name}?", "What is the class {name} for?", "Explain the class {name}.", "Describe {name} in a sentence or two.")
_COMPLETE = ("Complete this function of {owner}:\n\n{code}", "Write the body of this function of {owner}:\n\n{code}",
             "{code}\n\nHow does this function of {owner} go on?")  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A question.

    Attributes:
        kind: describe | complete.
        name: of the definition, such as `os.path.join`.
    """

    kind: str
    name: str
    prompt: str
    answer: str

    @property
    def module(self) -> str:
        return self.name.partition(".")[0]


def tasks(root: Path | None = None) -> list[Task]:
    """All questions, in the order of the library.

    Args:
        root: the library's directory; None = the running Python's.
    """
    found, prompts, answers = [], set(), set()
    for module in stdlib_modules(root):
        for definition in module.definitions:
            task = _task(definition)
            if task and task.prompt not in prompts and task.answer not in answers:
                found.append(task)
                prompts.add(task.prompt)
                answers.add(task.answer)
    return found


def of_stage(stage: str, questions: Iterable[Task]) -> list[Task]:
    """The questions of `sft`, `rankings` or `prompts`, in an order that a hash gives."""
    mine = [task for task in questions if _stage(task.prompt) == stage]
    return sorted(mine, key=lambda task: _hash("order", task.prompt))


def conversations(questions: Sequence[Task]) -> Iterator[dict]:
    """{"prompt", "response"} of the sft stage."""
    for task in of_stage("sft", questions):
        yield {"prompt": task.prompt, "response": task.answer}


def prompts(questions: Sequence[Task]) -> Iterator[dict]:
    """{"prompt", "reference"} of ppo, grpo and rloo."""
    for task in of_stage("prompts", questions):
        yield {"prompt": task.prompt, "reference": task.answer}


def rankings(questions: Sequence[Task]) -> Iterator[dict]:
    """{"prompt", "responses", "ranking", "demonstration"} of the reward and dpo stages.

    `ranking` lists positions in `responses`, best first, a list within it a tie; `demonstration` is the position of the true answer. The responses
    stand in random order.
    """
    mine = of_stage("rankings", questions)
    others = _others(mine)
    for task in mine:
        cut = cut_off(task)
        if cut is None or task.prompt not in others:
            continue
        responses = [task.answer, cut, others[task.prompt], shuffled(task)]
        if len(set(responses)) < len(responses):
            continue
        order = list(range(len(responses)))
        _random("responses", task.prompt).shuffle(order)
        true, short, other, mixed = (order.index(number) for number in range(len(responses)))
        yield {
            "prompt": task.prompt, "responses": [responses[number] for number in order],
            "ranking": [true, sorted((short, other)), mixed], "demonstration": true,
        }  # fmt: skip


def cut_off(task: Task) -> str | None:
    """The answer up to the end of a word between 30 and 70 % of its length: a sentence without its end, or code such that it is no complete code. None
    where code cannot be cut so."""
    ends = [match.end() for match in re.finditer(r"\S+", task.answer)]
    candidates = [end for end in ends if 0.3 <= end / len(task.answer) <= 0.7]
    _random("cut", task.prompt).shuffle(candidates)
    for end in candidates:
        cut = task.answer[:end]
        if task.kind == "describe":
            return cut.rstrip(".,;:!?")
        if not _parses(cut):
            return cut
    return None


def shuffled(task: Task) -> str:
    """The words in random order: of ten, the one that keeps the fewest neighbours together."""
    words, draw = task.answer.split(), _random("shuffle", task.prompt)
    neighbours = set(pairwise(words))
    orders = [draw.sample(words, len(words)) for _ in range(10)]
    return " ".join(min(orders, key=lambda order: sum(pair in neighbours for pair in pairwise(order))))


def stems(text: str) -> set[str]:
    """First four letters of each word of at least four, `CamelCase` and `snake_case` taken apart."""
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", text)
    return {word[:4].lower() for word in re.findall(r"[A-Za-z]{4,}", apart)}


def first_sentences(documentation: str) -> str | None:
    """The whole sentences at the start of the first paragraph that fit, in one line. None where it holds none, or other things than sentences."""
    paragraph = " ".join(documentation.split("\n\n")[0].split())
    if ">>>" in paragraph or not re.match(r"[A-Z][a-z]*[a-zA-Z']* [^=(]", paragraph):
        return None
    if paragraph[-1] not in ".!?:;,":
        paragraph += "."  # a headline, as PEP 257 does not want it
    sentences = re.findall(r".+?[.!?](?=\s+[^a-z\s]|$)", paragraph)
    taken = ""
    for sentence in sentences:
        longer = f"{taken} {sentence.strip()}".strip()
        if len(longer) > LONGEST_ANSWER:
            break
        taken = longer
    return taken if len(taken.split()) >= SHORTEST else None


def _task(definition: Definition) -> Task | None:
    sentences = first_sentences(definition.documentation)
    if sentences is None:
        return None
    complete = not definition.is_class and _short(definition.body) and _hash("kind", definition.name) % 2 == 0
    if complete:
        owner = definition.name.rpartition(".")[0]
        code = f'{definition.header}\n    """{sentences}"""'
        prompt = _phrase(_COMPLETE, definition).format(owner=owner, code=code)
        task = Task("complete", definition.name, prompt, definition.body)
    else:
        phrase = _phrase(_DESCRIBE_CLASS if definition.is_class else _DESCRIBE, definition)
        task = Task("describe", definition.name, phrase.format(call=definition.call, name=definition.name), sentences)
    return task if len(task.prompt) <= LONGEST_PROMPT else None


def _short(body: str) -> bool:
    return len(body) <= LONGEST_ANSWER and len(body.split()) >= SHORTEST and not body.startswith("raise NotImplementedError") and _parses(body)


def _parses(body: str) -> bool:
    indented = "\n".join(f"    {line}" for line in body.split("\n"))
    try:
        ast.parse(f"async def f():\n{indented}")
    except SyntaxError:
        return False
    return True


def _others(mine: Sequence[Task]) -> dict[str, str]:
    """For each prompt another task's answer of the same kind, from another module and without a word of the question: the first that fits in a queue at
    whose end it then stands again, so that each serves about once."""
    found: dict[str, str] = {}
    for kind in KINDS:
        queue = [(task, stems(task.answer)) for task in mine if task.kind == kind]
        for task in [task for task, _ in queue]:
            asked = stems(task.prompt)
            place = next((place for place, (other, words) in enumerate(queue) if other.module != task.module and not words & asked), None)
            if place is not None:
                queue.append(queue.pop(place))
                found[task.prompt] = queue[-1][0].answer
    return found


def _phrase(phrases: Sequence[str], definition: Definition) -> str:
    return phrases[_hash("phrase", definition.name) % len(phrases)]


def _stage(prompt: str) -> str:
    position, cumulated = _hash("stage", prompt) / 2**64, 0.0
    for stage, share in SHARES.items():
        cumulated += share
        if position < cumulated:
            return stage
    return next(reversed(SHARES))


def _hash(purpose: str, text: str) -> int:
    """64 bits, independent for each purpose."""
    return int.from_bytes(hashlib.sha256(f"{purpose}\0{text}".encode()).digest()[:8], "big")


def _random(purpose: str, text: str) -> random.Random:
    return random.Random(_hash(purpose, text))
