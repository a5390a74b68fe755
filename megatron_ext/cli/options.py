"""The words after `python -m megatron_ext`, taken apart: a verb, overrides for Hydra, and options that Hydra never sees."""
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ext.errors import UserError

VERBS = {
    "run": "the main job: corpus, tokenizer, pretraining, evaluation, completions and report.md, on the embedded data",
    "train": "one stage: train stage=pretrain model=tiny data.path=DIR launch.ranks=2 ...",
    "submit": "runs as jobs of Slurm: submit stage=pretrain cluster=slurm_gpu ..., submit run ... (the chain), submit prepare ..., or with --sweep (an array)",
    "check": "validates a config without torch; prints the rank grid, the batch, the models of a stage and where it starts from",
    "plan": "memory, step time and cost before anything is paid for: plan model=llama3_8b hardware=h100_sxm launch.ranks=64; plan search | acquire | calibrate | scaling",
    "prepare": "text to tokenised, indexed data: prepare input=PATH output=DIR; any files, cleaned first: curate=standard",
    "ledger": "which runs saw a document: ledger seen --document X; and that it must not come in again: ledger remove --document X curate.removals=FILE",
    "generate": "completions from a checkpoint: generate checkpoint.load=DIR --prompt TEXT",
    "evaluate": "a checkpoint's perplexity on a split, or tasks of lm-evaluation-harness: evaluate checkpoint.load=DIR evaluate.split=test",
    "collect": "data for SFT and reward models: collect build | augment | serve (a page where people order answers) | export | status",
    "convert": "Hugging Face to a checkpoint, and back: convert hf=DIR output=DIR, convert checkpoint.load=DIR output=DIR",
    "report": "writes report.md again, of a run that goes on or has ended: report run.dir=DIR",
    "doctor": "what serves each op here, and why not something better; versions",
}
FLAGS = {"--json": "print one JSON object instead of text", "--dry-run": "submit: print the script and the placement, submit nothing; plan: build and step ranks without memory, and count",
         "--shared": "ledger remove: also documents that only lost paragraphs to it, as copies of these"}
VALUES = {"--prompt": "a prompt (repeatable)", "--prompt-file": "a file with one prompt a line",
          "--document": "ledger: a file, SOURCE:PATH[#POSITION], an id or a sha256 (repeatable)",
          "--rank": "a rank to dry-run (repeatable); default: the first of the first and of the last pipeline stage",
          "--sweep": "KEY=VALUE,VALUE,...: a job array over the values (repeatable: all combinations)"}
TAKES = {
    "check": ("--json",),
    "plan": ("--json", "--dry-run", "--rank"),
    "doctor": ("--json",),
    "generate": ("--json", "--prompt", "--prompt-file"),
    "evaluate": ("--json",),
    "report": ("--json",),
    "submit": ("--dry-run", "--sweep", "--json"),
    "collect": ("--json",),
    "run": (),
    "train": (),
    "prepare": (),
    "ledger": ("--json", "--document", "--shared"),
    "convert": (),
}
# Words that stand right after a verb.
ACTIONS = {"plan": ("search", "calibrate", "acquire", "scaling"), "ledger": ("seen", "remove"),
           "collect": ("build", "augment", "serve", "export", "status")}
NEEDED = ("collect",)  # verbs that do nothing without an action


@dataclass(frozen=True)
class Options:
    """What was typed. `argv` is the whole command line (ranks are started with it again); `assumed`, overrides that `plan` adds to the typed ones."""

    verb: str
    argv: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    json: bool = False
    dry_run: bool = False
    shared: bool = False
    sweeps: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    prompt_file: Path | None = None
    documents: tuple[str, ...] = ()
    action: str | None = None
    ranks: tuple[int, ...] = ()
    assumed: tuple[str, ...] = ()
    help: bool = False


def parse(argv: Sequence[str]) -> Options:
    """Raises UserError for an unknown verb or option, naming the nearest."""
    verb, *words = argv
    if verb not in VERBS:
        if "=" in verb:
            raise UserError("verb", verb, f"the verb comes first: python -m megatron_ext VERB {verb}; VERB is one of {', '.join(VERBS)}")
        raise UserError("verb", verb, f"unknown; {_closest(verb, list(VERBS))}")
    options = Options(verb, tuple(argv))
    position = 0
    if words and words[0] in ACTIONS.get(verb, ()):
        options, position = replace(options, action=words[0]), 1
    elif words and verb in ACTIONS and "=" not in words[0] and not words[0].startswith("-"):
        other = "" if verb in NEEDED else ", or overrides such as model=llama3_8b"
        raise UserError(verb, words[0], f"unknown; {_closest(words[0], list(ACTIONS[verb]))}{other}")
    if verb in NEEDED and options.action is None and not {"-h", "--help"} & {*words}:
        raise UserError(verb, " ".join(words[:1]), f"an action comes first: {', '.join(ACTIONS[verb])}")
    while position < len(words):
        word = words[position]
        position += 1
        if word in ("-h", "--help"):
            options = replace(options, help=True)
            continue
        if not word.startswith("--"):
            options = replace(options, overrides=(*options.overrides, word))
            continue
        name, equals, value = word.partition("=")
        if name not in TAKES[verb]:
            raise UserError("option", name, f"unknown to {verb}; {_closest(name, [*TAKES[verb], '--help'])}")
        if name in FLAGS:
            if equals:
                raise UserError(name, value, "takes no value")
            options = replace(options, **{name.removeprefix("--").replace("-", "_"): True})
            continue
        if not equals:
            if position == len(words):
                raise UserError(name, "", "needs a value after it")
            value = words[position]
            position += 1
        if name == "--prompt":
            options = replace(options, prompts=(*options.prompts, value))
        elif name == "--document":
            options = replace(options, documents=(*options.documents, value))
        elif name == "--rank":
            if not value.isdecimal():
                raise UserError(name, value, "must be a whole number, such as 0")
            options = replace(options, ranks=(*options.ranks, int(value)))
        elif name == "--sweep":
            options = replace(options, sweeps=(*options.sweeps, value))
        else:
            options = replace(options, prompt_file=Path(value))
    return options


def _closest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"did you mean {close[0]}? " if close else "") + f"known: {', '.join(known)}"
