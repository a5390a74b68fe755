"""The main job: corpus -> tokenizer and tokens -> pretrain -> adapt -> sft -> reward -> ppo -> report.md, each a command of its own.

This process stays small and holds no torch: it starts `train`, `evaluate` and `generate` as a person would, and reads what they print.
Each stage has its folder in `run.dir` and starts from the one before. An interrupted job goes on where it was: `chain.json` says which stages are
done, and the one that was under way resumes from its newest checkpoint.
"""
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.chain import Chain, key_of
from megatron_ext.checkpoint.manifest import CHAIN
from megatron_ext.cli import recipe, vocabulary
from megatron_ext.config.compose import compose
from megatron_ext.config.schema import Config
from megatron_ext.config.sizes import vocab_size
from megatron_ext.errors import UserError
from megatron_ext.files import write_whole
from megatron_ext.observe.allocation import STARTED
from megatron_ext.parallel.job import PARENT
from megatron_ext.parallel.launch import with_ranks
from megatron_ext.parallel.signals import STOPS, UNFINISHED
from megatron_ext.plan.search import refuse
from megatron_ext.private import make_directory
from megatron_ext.redact import redact


class StepFailed(Exception):
    """A command of the job ended with `.code`; it has said why itself."""

    def __init__(self, code: int):
        super().__init__(f"exit code {code}")
        self.code = code


@dataclass(frozen=True)
class Finished:
    """What the report is written from. `seconds`: of each stage in this call, 0 where it was done before."""

    config: Config
    words: tuple[str, ...]
    stages: tuple[str, ...]
    prepared: object
    baseline: dict
    evaluation: dict
    completions: list[dict]
    seconds: dict[str, float]

    def folder(self, stage: str) -> Path:
        return Path(self.config.run.dir) / stage


@dataclass(frozen=True)
class Job(Chain):
    """The chain, done here. report: writes report.md of the whole chain and returns its path."""

    prompts: tuple[str, ...]
    report: Callable[[Finished], Path]

    def run(self) -> Path:
        """Runs every step; returns the path of the report. Raises StepFailed, UserError."""
        self.check()
        self.fits()
        start = time.monotonic()
        prepared = self._prepare()
        print(prepared.describe())
        baseline = self._baseline(prepared)
        seconds = {}
        for stage in self.config.run.stages:
            began = time.monotonic()
            self._stage(stage, prepared)
            seconds[stage] = time.monotonic() - began
        first = self.config.run.stages[0]
        _say(f"evaluating {first}")
        read = [*self.read_words(first, prepared.directory, drop=("checkpoint.load", "checkpoint.start")), f"checkpoint.load={self.folder(first)}"]
        evaluation = json.loads(command("evaluate", "--json", *read, capture=True))
        options = [word for prompt in self.prompts for word in ("--prompt", prompt)]
        generated = json.loads(command("generate", "--json", *options, *read, capture=True))
        path = self.report(Finished(self.config, self.words, self.config.run.stages, prepared, baseline, evaluation, generated["completions"],
                                    seconds | {"all": time.monotonic() - start}))
        _say(f"{path} tells all; done after {(time.monotonic() - start) / 60:.1f} minutes")
        return path

    def fits(self) -> None:
        """Every stage fits the GPU that is named (`hardware`), before hours go into the first. Raises UserError."""
        for stage in self.config.run.stages:
            config = compose((f"stage={stage}", *recipe.with_defaults(self.words, stage)))
            if config.hardware.memory is None:
                continue
            asked = any(key_of(word) == "launch.ranks" for word in self.words)
            try:
                refuse(with_ranks(config, asked=asked), vocabulary.words(config) or vocab_size(config))
            except UserError as error:
                raise UserError(error.key, error.value, f"{error.reason} (stage {stage})") from None

    def _stage(self, stage: str, prepared) -> None:
        words = self.stage_words(stage, prepared.directory, lambda: self._domain(prepared))
        kept = redact(words)
        make_directory(Path(self.config.run.dir), private=self.config.run.private)
        chain = Path(self.config.run.dir) / CHAIN
        done = json.loads(chain.read_text(encoding="utf-8")) if chain.exists() else {}
        if done.get(stage) == kept and (self.folder(stage) / "checkpoints").is_dir():
            _say(f"{stage}: done before")
            return
        if stage in done and done[stage] != kept:
            _say(f"{stage}: was done with other words. What is done stays; only steps that are left are done with the new ones. To do all of it "
                 f"again, remove {self.folder(stage)} and the folders of the stages after it")
        _say(f"{stage}; everything of it goes to {self.folder(stage)}")
        command("train", f"stage={stage}", *words)
        later = self.config.run.stages[self.config.run.stages.index(stage) :]
        write_whole(chain, json.dumps({name: said for name, said in done.items() if name not in later} | {stage: kept}, indent=1))

    def _prepare(self):
        from megatron_ext.data.prepare import prepare
        from megatron_ext.data.prepared import Prepared

        data = self.config.data
        if data.path is not None:
            return Prepared.load(data.path)
        name = Path(self.config.input).stem if self.config.input else data.corpus
        output = Path(self.config.output or Path(data.cache) / f"{name}-{data.vocab_size}")
        _say(f"preparing {self.config.input or 'the embedded corpus'} in {output}")
        return prepare(data, self.config.input, output)

    def _domain(self, prepared) -> Path:
        """The domain's text, in the tokens of the general one."""
        from dataclasses import replace

        from megatron_ext.data.prepare import prepare

        data = replace(self.config.data, corpus="stdlib-docs", tokenizer=str(prepared.tokenizer_path))
        output = Path(data.cache) / f"{data.corpus}-{prepared.vocab_size}"
        _say(f"preparing the domain's text in {output}")
        return prepare(data, None, output).directory

    def _baseline(self, prepared) -> dict[str, object]:
        from megatron_ext.data.ngram import trigram_baseline

        found = trigram_baseline(prepared.directory, split="validation")
        _say(f"the model has to beat an interpolated trigram: {found['bits_per_byte']:.4f} bits per byte on the validation split")
        return found


def command(*words: str, capture: bool = False) -> str:
    """Runs `python -m megatron_ext *words`, forwards signals to it, returns what it printed (with `capture`). Raises StepFailed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_ext", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if capture else None, text=True,
        env={**os.environ, PARENT: str(os.getpid()), STARTED: repr(time.time())}, start_new_session=True,
    )
    asked: list[int] = []

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, *STOPS)}
    try:
        printed = process.communicate()[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked and asked[0] in STOPS and process.returncode in (0, UNFINISHED):
        raise StepFailed(UNFINISHED)  # it saved and stopped as it should: the next life goes on
    if process.returncode or asked:
        raise StepFailed(128 + asked[0] if asked else process.returncode if process.returncode > 0 else 128 - process.returncode)
    return printed or ""


def _say(text: str) -> None:
    print(f"run: {text}", flush=True)
