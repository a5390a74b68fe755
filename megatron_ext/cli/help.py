"""The help pages. Keys, their defaults and meanings are read from the text of `schema.py`: one place says them."""
import ast
import dataclasses
import functools
import importlib.metadata
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.cli.options import FLAGS, TAKES, VALUES, VERBS
from megatron_ext.config import schema
from megatron_ext.config.overrides import GROUPS, options_of

# Groups of keys that the stages after pretraining read.
RLHF = ("chat", "lora", "ranking", "rewards", "rollout", "generate", "ppo", "critic", "reference_layout", "reward_layout", "critic_layout",
        "rollout_layout")
# The groups of keys that a verb reads.
READS = {
    "run": ("launch", "run"),
    "train": ("model", "parallel", "precision", "data", "optim", "train", "validation", "stop", "checkpoint", "launch", "log", "run", *RLHF),
    "submit": ("cluster", "run"),
    "check": ("model", "parallel", "precision", "data", "optim", "train", "checkpoint", "launch", "hardware", *RLHF),
    "plan": ("hardware", "plan", "scaling", "model", "parallel", "precision", "train", "data", "launch", "checkpoint", *RLHF),
    "prepare": ("data", "curate"),
    "ledger": ("curate",),
    "generate": ("checkpoint", "generate", "parallel", "launch"),
    "evaluate": ("checkpoint", "evaluate", "data", "parallel", "launch"),
    "collect": ("collect", "chat", "generate", "checkpoint", "parallel", "launch"),
    "convert": ("checkpoint", "parallel", "launch"),
    "report": ("run",),
    "doctor": (),
}
TOP = {"prepare": ("input", "output"), "ledger": ("output",), "collect": ("input", "output"),
       "convert": ("hf", "megatron", "adapter", "output")}  # keys that are in no group
EXAMPLES = {
    "run": "run launch.ranks=2",
    "train": "train data.path=outputs/data/stdlib parallel=tp2 launch.ranks=2 train.steps=200 run.dir=outputs/mine",
    "submit": "submit stage=pretrain model=llama3_8b data.path=/data/tokens cluster=slurm_gpu parallel.tp=4 run.dir=/runs/8b --dry-run",
    "check": "check stage=ppo checkpoint.start=outputs/sft rewards.models=[outputs/reward] reward_layout.tp=1 parallel.tp=2 launch.ranks=4",
    "plan": "plan model=mt_nlg_530b parallel.tp=8 parallel.pp=35 launch.ranks=2240 hardware=a100_80g train.tokens=270000000000",
    "prepare": "prepare input=corpus.jsonl.gz output=outputs/data/mine data.vocab_size=8192",
    "ledger": "ledger seen --document statutes:2024/act.hwpx run.dir=outputs",
    "generate": "generate checkpoint.load=outputs/run --prompt 'def main('",
    "evaluate": "evaluate checkpoint.load=outputs/run evaluate.split=test --json",
    "collect": "collect serve input=outputs/collect/tasks collect.annotators=[kim,lee]",
    "convert": "convert hf=downloads/Llama-3.1-8B output=outputs/llama parallel.tp=2",
    "report": "report run.dir=outputs/run",
    "doctor": "doctor --json",
}


def version() -> str:
    """The installed version, or what a checkout that is not installed can say."""
    try:
        return importlib.metadata.version("megatron-ext")
    except importlib.metadata.PackageNotFoundError:
        return "(a checkout, not installed)"


def overview() -> str:
    """The page of `--help`."""
    verbs = "\n".join(f"  {verb:<10}{text}" for verb, text in VERBS.items())
    return f"""python -m megatron_ext VERB [key=value ...] [group=preset ...] [--options]

{verbs}

Each verb has its own page: python -m megatron_ext VERB --help
Start here:  python -m megatron_ext run
Exit code 0 when it did what it says, 2 for bad input (one line says what would be right), 130 when interrupted, 1 for a bug."""


def keys() -> dict[str, list[tuple[str, str, str]]]:
    """Group of keys -> [(dotted key, default, meaning)]; "" holds the keys at the top."""
    found: dict[str, list[tuple[str, str, str]]] = {"": []}
    for row in _rows(schema.Config, ""):
        group, dot, _ = row[0].partition(".")
        found.setdefault(group if dot else "", []).append(row)
    return found


def _rows(kind: type, prefix: str) -> Iterator[tuple[str, str, str]]:
    """The keys of a dataclass and of those inside it, in the order of its text."""
    lines, body = _source(kind)
    types = typing.get_type_hints(kind)
    for entry in body:
        if dataclasses.is_dataclass(types[entry.target.id]):
            yield from _rows(types[entry.target.id], f"{prefix}{entry.target.id}.")
        else:
            yield _row(entry, prefix, lines)


@functools.cache
def _parsed(path: str) -> tuple[list[str], dict[str, ast.ClassDef]]:
    text = Path(path).read_text(encoding="utf-8")
    return text.splitlines(), {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}


def _source(kind: type) -> tuple[list[str], list[ast.AnnAssign]]:
    """The lines of the file that a dataclass stands in, and its fields there."""
    lines, classes = _parsed(sys.modules[kind.__module__].__file__)
    return lines, [entry for entry in classes[kind.__name__].body if isinstance(entry, ast.AnnAssign)]


def _row(field: ast.AnnAssign, prefix: str, lines: list[str]) -> tuple[str, str, str]:
    default = {"None": "null", "True": "true", "False": "false", "()": "[]"}.get(text := ast.unparse(field.value), text)
    if isinstance(field.value, ast.Tuple):
        default = "[" + ",".join(ast.unparse(item) for item in field.value.elts) + "]"
    comment = lines[field.end_lineno - 1][field.end_col_offset:].partition("#")[2].strip()
    return prefix + field.target.id, default.strip("'\""), comment


def verb_page(verb: str) -> str:
    """The page of `VERB --help`."""
    lines = [f"python -m megatron_ext {verb} [key=value ...]" + "".join(f" [{name}]" for name in TAKES[verb]), "", f"  {VERBS[verb]}", "",
             f"Example: python -m megatron_ext {EXAMPLES[verb]}"]
    if TAKES[verb]:
        lines += ["", *(f"  {name:<16}{(FLAGS | VALUES)[name]}" for name in TAKES[verb])]
    if verb == "generate":
        lines += ["", "Without --prompt and --prompt-file, standard input is one prompt a line."]
    groups = [group for group in GROUPS if group in READS[verb] or (group in ("stage", "cluster") and verb in ("train", "check", "submit", "plan"))]
    if verb in ("train", "check", "run", "submit", "plan", "prepare"):
        lines += ["", "Presets (conf/):", *(f"  {group + '=':<12}{' | '.join(options_of(group))}" for group in groups)]
    table = keys()
    rows = [row for row in table[""] if row[0] in TOP.get(verb, ())] + [row for group in READS[verb] for row in table[group]]
    if rows:
        width = max(len(f"{key}={default}") for key, default, _ in rows) + 2
        lines += ["", "Keys, with their defaults:"]
        lines += [f"  {f'{key}={default}':<{width}}{comment}".rstrip() for key, default, comment in rows]
    return "\n".join(lines)
