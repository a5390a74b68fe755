"""From the words of `submit` to jobs: one stage, the chain of stages, or a sweep as an array, all validated as `check` does. No torch.

The chain is that of the main job (`pipeline.py`): the same words, folders and starting points; what it does one after the other, Slurm's dependencies
do. Ranks are told `checkpoint.load=auto` always, so that a life that was requeued goes on.
"""
import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_ext.chain import Chain, key_of
from megatron_ext.cli import cast, recipe, vocabulary
from megatron_ext.cli.options import Options
from megatron_ext.config import sizes
from megatron_ext.config.cluster import on_nodes
from megatron_ext.config.compose import compose
from megatron_ext.config.schema import Config
from megatron_ext.config.validate import ConfigErrors, problems
from megatron_ext.errors import UserError
from megatron_ext.plan.search import refuse
from megatron_ext.redact import redact_text
from megatron_ext.submit.job import Job, Run
from megatron_ext.train.start import adopt

TO_COME = ("checkpoint.start", "rewards.models", "critic.load")  # what an earlier stage of the chain will have written


def jobs(options: Options) -> tuple[Job, ...]:
    """In the order of submission. Raises UserError, ConfigErrors."""
    bare = [word for word in options.overrides if word in ("train", "run")]
    if len(set(bare)) > 1:
        raise UserError("submit", " ".join(bare), "is one of both: train (a stage) or run (the chain of stages)")
    words, what = [word for word in options.overrides if word not in bare], bare[0] if bare else "train"
    named = [word for word in words if key_of(word) == "stages"]
    if named:  # short for the chain's own key
        value = named[-1].partition("=")[2].strip()
        what, words = "run", [*(word for word in words if word not in named), f"run.stages={value if value.startswith('[') else f'[{value}]'}"]
    if what == "run" and options.sweeps:
        raise UserError("--sweep", options.sweeps[0], "goes with one stage, not with the chain of stages")
    if what == "run":
        return _chain(words)
    return (_array(words, options.sweeps) if options.sweeps else _single(words),)


# ---- one stage ----------------------------------------------------------------------------------------------------------------------

def _single(words: Sequence[str]) -> Job:
    run = _run(words)
    return Job(_name(run.config, run.config.stage.name), run.directory, (run,))


def _run(words: Sequence[str], to_come: Sequence[str] = ()) -> Run:
    """The words of a run, validated. `to_come`: keys whose runs do not exist yet."""
    config = compose(words)
    if config.checkpoint.start is not None and "checkpoint.start" not in to_come:
        config = adopt(config, words)
    asked = config.launch.ranks if any(key_of(word) == "launch.ranks" for word in words) else None
    config = on_nodes(config)
    if asked not in (None, config.launch.ranks):
        raise UserError("launch.ranks", asked, f"but cluster.nodes={config.cluster.nodes} nodes hold {config.launch.ranks}; leave launch.ranks out")
    fits = _validated(config, to_come)
    vocab = None
    if config.data.path is None or Path(config.data.path).exists() or not to_come:
        vocab = vocabulary.words(config)
    if not to_come:
        for path in config.data.paths:
            if not Path(path).exists() and not Path(f"{path}.bin").exists():
                raise UserError("data.paths", path, "is not there; name directories that `prepare` wrote, or prefixes of Megatron's .bin and .idx")
        cast.members(config, vocab or sizes.vocab_size(config))
    if config.hardware.memory is not None:
        refuse(config, vocab or sizes.vocab_size(config))
    return Run(_for_ranks(words, config), config, fits)


def _validated(config: Config, to_come: Sequence[str]) -> tuple[int, ...]:
    """The numbers of nodes that the run can use. The smallest and the largest that the job may get have to be among them."""
    fits, cluster = [], config.cluster
    for nodes in range(min(cluster.min_nodes or cluster.nodes, cluster.nodes), cluster.nodes + 1):
        found = [error for error in problems(on_nodes(config, nodes), "submit") if error.key not in to_come]
        if not found:
            fits.append(nodes)
        elif nodes in (cluster.min_nodes, cluster.nodes):
            where = "" if nodes == cluster.nodes else f" (on {nodes} nodes, which cluster.min_nodes={nodes} allows)"
            found = [UserError(error.key, error.value, error.reason + where) for error in found]
            raise found[0] if len(found) == 1 else ConfigErrors(found)
    return tuple(fits)


def _for_ranks(words: Sequence[str], config: Config) -> tuple[str, ...]:
    load = config.checkpoint.load
    if load not in (None, "auto"):
        raise UserError("checkpoint.load", load, "would be loaded again by every life of the job, which has to go on where it was; to start from "
                                                 "another run name checkpoint.start")
    for word in words:
        if redact_text(word) != word:
            raise UserError(key_of(word), redact_text(word).partition("=")[2], "looks like a secret, and would stand in the script: leave it in "
                                                                               "the environment")
    kept = [word for word in words if key_of(word) not in ("launch.ranks", "checkpoint.load")]
    return (*kept, "checkpoint.load=auto")


def _name(config: Config, stage: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", config.cluster.name or stage).strip("-.") or stage


# ---- a sweep ------------------------------------------------------------------------------------------------------------------------

def _array(words: Sequence[str], sweeps: Sequence[str]) -> Job:
    """Every combination of the values; the last key moves fastest."""
    axes = [_axis(sweep) for sweep in sweeps]
    base = compose([word for word in words if key_of(word) not in [key for key, _ in axes]])
    root, runs = Path(base.run.dir), []
    kept = [word for word in words if key_of(word) != "run.dir"]
    for index, values in enumerate(itertools.product(*(values for _, values in axes))):
        chosen = [f"{key}={value}" for (key, _), value in zip(axes, values, strict=True)]
        name = "_".join(f"{key.rsplit('.', 1)[-1]}-{value}" for (key, _), value in zip(axes, values, strict=True))
        label = re.sub(r"[^A-Za-z0-9.+_-]+", "-", f"{index:03d}_{name}")[:100]
        runs.append(_run([*kept, *chosen, f"run.dir={root / label}"]))
    return Job(_name(base, f"{base.stage.name}-sweep"), root.absolute(), tuple(runs), array=True)


def _axis(sweep: str) -> tuple[str, list[str]]:
    key, equals, text = sweep.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError("--sweep", sweep, "must be KEY=VALUE,VALUE,..., such as --sweep optim.lr=1e-3,3e-4")
    if key == "run.dir" or key.split(".")[0] == "cluster":
        raise UserError("--sweep", sweep, f"{key} is the same for all points of an array; each gets a folder of its own in run.dir")
    values = split(text)
    if not values or "" in values:
        raise UserError("--sweep", sweep, "holds an empty value; values are separated by commas, lists stand in brackets")
    if len(set(values)) < len(values):
        raise UserError("--sweep", sweep, "names a value twice")
    return key, values


def split(text: str) -> list[str]:
    """At commas outside of brackets and quotes."""
    found, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not found[-1].strip():
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        elif letter == "," and depth == 0:
            found.append("")
            continue
        found[-1] += letter
    return [value.strip() for value in found]


# ---- the chain ----------------------------------------------------------------------------------------------------------------------

def _chain(words: Sequence[str]) -> tuple[Job, ...]:
    first = compose(recipe.with_defaults(words))
    chain = Chain(replace(first, launch=replace(first.launch, ranks=1)), tuple(words))
    chain.check()
    prepare: list[tuple[str, ...]] = []
    data = _prepared(chain, prepare)
    found = []

    def named(stage: str) -> str:
        return f"{_name(chain.config, stage)}-{stage}" if chain.config.cluster.name else stage

    for number, stage in enumerate(chain.config.run.stages):
        own: list[tuple[str, ...]] = []
        told = chain.stage_words(stage, data, lambda own=own: _domain(chain, data, own))
        typed = {key_of(word) for word in recipe.typed(words, stage)}
        to_come = [key for key in TO_COME if key not in typed]
        run = _run([f"stage={stage}", *(word for word in told if key_of(word) != "launch.ranks")], to_come)
        name = named(stage)
        before = [*(prepare if number == 0 else ()), *own]
        found.append(Job(name, run.directory, (run,), before=tuple(before), after=tuple(map(named, chain.reads(stage)))))
    return tuple(found)


def _prepared(chain: Chain, commands: list[tuple[str, ...]]) -> Path:
    """Where the tokens are; adds the command that makes them, where nobody has named them."""
    data = chain.config.data
    if data.path is not None:
        vocabulary.words(chain.config)  # that it is there
        return Path(data.path)
    if chain.config.input is not None and not Path(chain.config.input).exists():
        raise UserError("input", chain.config.input, "is not there; name a text, .jsonl(.gz|.zst) or .parquet file, or a directory of them")
    name = Path(chain.config.input).stem if chain.config.input else data.corpus
    output = Path(chain.config.output or Path(data.cache) / f"{name}-{data.vocab_size}")
    source = (f"input={chain.config.input}",) if chain.config.input else ()
    commands.append(("prepare", *source, f"output={output}", *_data_words(chain.words, ())))
    return output


def _domain(chain: Chain, general: Path, commands: list[tuple[str, ...]]) -> Path:
    """The domain's text, in the tokens of the general one."""
    output = Path(chain.config.data.cache) / f"stdlib-docs-{chain.config.data.vocab_size}"
    commands.append(("prepare", f"output={output}", "data.corpus=stdlib-docs", f"data.tokenizer={general / 'tokenizer.json'}",
                     *_data_words(chain.words, ("data", "data.corpus", "data.tokenizer"))))
    return output


def _data_words(words: Sequence[str], without: Sequence[str]) -> list[str]:
    told = recipe.with_defaults(words)
    without = ("data.path", "data.paths", "data.weights", *without)
    return [word for word in told if key_of(word).split(".")[0] == "data" and key_of(word) not in without]
