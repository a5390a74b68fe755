"""docs/megatron_flags.md: every flag of it is one of Megatron-LM's, every key one of ours, and no key of the groups it covers is missing."""
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.config.build import key_types, sections
from megatron_ext.config.compose import compose
from megatron_ext.config.validate import validate

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "megatron_flags.md").read_text(encoding="utf-8")
THEIRS = frozenset(line for line in (ROOT / "tests" / "megatron_flags.txt").read_text(encoding="utf-8").splitlines() if line.startswith("--"))
COVERED = ("model", "parallel", "precision", "data", "optim", "train")  # what Megatron-LM has too: every key of these stands on the page
COMMANDS = [block.replace("\\\n", " ") for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)]


def rows(page: str = PAGE) -> list[tuple[list[str], list[str], str]]:
    """(flags, words of ours, note) of each row of the tables."""
    found = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            assert len(cells) == 3, line
            assert "`" in cells[1] or cells[1] == "-", line
            found.append((re.findall(r"`(.*?)`", cells[0]), re.findall(r"`(.*?)`", cells[1]), cells[2]))
    return found


def problem(word: str) -> str | None:
    """What is wrong with a key or override of the page, as the command line would take it."""
    key, equals, _ = word.partition("=")
    if key not in key_types() and key not in sections():
        return f"{key} is no key"
    if equals:
        compose([word])  # raises for a value of the wrong type, or a preset that is not there
    elif key in sections():
        return f"{key} is a group of keys"
    return None


def test_the_tables_are_read():
    assert len(rows()) > 90
    assert rows("| `--a`, `--b` | `train.steps=3` | as `c` |\n|---|---|---|\n| x | `y` | z |") == [(["--a", "--b"], ["train.steps=3"], "as `c`")]
    assert [problem(word) for word in ("train.steps", "precision=bf16", "stage=sft")] == [None] * 3
    assert problem("train.stepz") and problem("parallel") and problem("trains=3")
    with pytest.raises(Exception, match="model.bias"):
        problem("model.bias=7")


def test_flags_are_megatrons():
    assert len(THEIRS) == 865 and "--tensor-model-parallel-size" in THEIRS
    named = {flag.split()[0] for flag in re.findall(r"`(--[^`]*)`", PAGE)}
    assert len(named) > 120 and named <= THEIRS, sorted(named - THEIRS)


def test_keys_are_ours():
    wrong = [f"{flags}: {problem(word)}" for flags, words, _ in rows() for word in words if problem(word)]
    assert not wrong, "\n".join(wrong)


def test_keys_in_prose_are_ours():
    """Outside of the tables and the commands too: what looks like a key is one."""
    prose = "\n".join(line for line in re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL).splitlines() if not line.startswith("|"))
    named = [word for word in re.findall(r"`([a-z_]+\.[a-z_0-9]+)`", prose) if not word.endswith((".py", ".txt", ".md"))]
    assert len(named) >= 8 and not [word for word in named if word not in key_types()]


def test_no_key_is_missing():
    # Every word of a cell or of the last list counts, with or without a value.
    named = set(re.findall(r"`([a-z_]+\.[a-z_0-9]+)", PAGE))
    missing = [key for key in key_types() if key.split(".")[0] in COVERED and key not in named]
    assert not missing, f"put {', '.join(missing)} into docs/megatron_flags.md: beside Megatron-LM's flag, or under `Ours alone`"


def test_both_commands_say_the_same():
    """The example: Megatron's flags exist, and ours, which are its translation by the tables, compose into a configuration that is valid."""
    theirs, ours = (shlex.split(command) for command in COMMANDS)
    flags = {word for word in theirs if word.startswith("--")} - {"--nproc-per-node"}
    assert len(flags) > 30 and flags <= THEIRS
    words = ours[ours.index("train") + 1:]
    config = compose([*words, "launch.ranks=8"])
    validate(replace(config, data=replace(config.data, tokenizer=None)), "check")  # the files of the example are not there
    table = {flag.split()[0]: words for names, words, _ in rows() for flag in names}
    plain = {table[flag][0] for flag in flags if flag in table and len(table[flag]) == 1}
    set_here = {word.split("=")[0] for word in words}
    by_default = {"model.position_embedding", "model.norm", "model.activation", "model.bias", "model.tied_embeddings", "model.hidden_dropout",
                  "model.attention_dropout", "parallel.distributed_optimizer", "optim.schedule", "optim.beta2", "optim.weight_decay", "optim.clip",
                  "checkpoint.background", "parallel.overlap_grad_reduce"}
    assert not {word.split("=")[0] for word in plain} - set_here - by_default
    assert (config.model.norm, config.model.activation, config.model.bias, config.model.tied_embeddings) == ("rmsnorm", "swiglu", False, False)
    assert (config.optim.beta2, config.optim.weight_decay, config.optim.clip, config.optim.schedule) == (0.95, 0.1, 1.0, "cosine")
    assert config.parallel.overlap_param_gather and config.parallel.distributed_optimizer and config.checkpoint.background
    assert config.model.hidden_dropout == config.model.attention_dropout == 0.0
