"""The main job: corpus -> tokenizer and tokens -> pretraining -> evaluation -> completions -> report.md, each a command of its own.

This process stays small and holds no torch: it starts `train`, `evaluate` and `generate` as a person would, and reads what they print.
An interrupted job goes on where it was: data that is prepared stays, training resumes from its newest checkpoint.
"""
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config.schema import Config
from megatron_ext.parallel.job import PARENT


class StepFailed(Exception):
    """A command of the job ended with `.code`; it has said why itself."""

    def __init__(self, code: int):
        super().__init__(f"exit code {code}")
        self.code = code


@dataclass(frozen=True)
class Job:
    """The job's configuration, and the words it is made of (the sub-commands are given the same)."""

    config: Config
    words: tuple[str, ...]
    prompts: tuple[str, ...]

    def run(self) -> Path:
        """Runs every step; returns the path of the report. Raises StepFailed, UserError."""
        start = time.monotonic()
        run_dir = Path(self.config.run.dir)
        prepared = self._prepare()
        print(prepared.describe())
        baseline = self._baseline(prepared)
        words = self._words(prepared.directory)
        _say(f"training; everything of this run goes to {run_dir}")
        command("train", *words, *self._resume())
        trained = self._words(prepared.directory, drop=("checkpoint.load",))
        _say("evaluating")
        evaluation = json.loads(command("evaluate", "--json", *trained, f"checkpoint.load={run_dir}", capture=True))
        _say("completing prompts")
        options = [word for prompt in self.prompts for word in ("--prompt", prompt)]
        generated = json.loads(command("generate", "--json", *options, *trained, f"checkpoint.load={run_dir}", capture=True))
        report = self._report(prepared, baseline, evaluation, generated, time.monotonic() - start)
        _say(f"{report} tells all; done after {(time.monotonic() - start) / 60:.1f} minutes")
        return report

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

    def _baseline(self, prepared) -> dict[str, object]:
        from megatron_ext.data.ngram import trigram_baseline

        found = trigram_baseline(prepared.directory, split="validation")
        _say(f"the model has to beat an interpolated trigram: {found['bits_per_byte']:.4f} bits per byte on the validation split")
        return found

    def _words(self, data: Path, drop: Sequence[str] = ()) -> list[str]:
        """The job's own words for a sub-command, with the prepared data in place of what it was made from."""
        replaced = ("data.path", "input", "output", *drop)
        kept = [word for word in self.words if word.lstrip("+").partition("=")[0] not in replaced]
        return [*kept, f"data.path={data}"]

    def _resume(self) -> list[str]:
        named = any(word.lstrip("+").startswith("checkpoint.load=") for word in self.words)
        return [] if named else ["checkpoint.load=auto"]

    def _report(self, prepared, baseline: dict, evaluation: dict, generated: dict, seconds: float) -> Path:
        from megatron_ext.doctor import version_of
        from megatron_ext.observe.report import write_report

        plain = {name: value for name, value in evaluation.items() if isinstance(value, int | float | str)}
        versions = {name: version_of(name) for name in ("torch", "megatron-core", "tokenizers")}
        return write_report(
            Path(self.config.run.dir),
            title=f"{self.config.model.name}, {self.config.stage.name}",
            sections={
                "Evaluation": plain,
                "Corpus": {
                    "name": prepared.fields["corpus"]["name"], "sha256": prepared.corpus_sha256, "vocabulary": prepared.vocab_size,
                    **{f"{name} tokens": split.tokens for name, split in prepared.splits.items()},
                },
                "Baseline": {name: value for name, value in baseline.items() if isinstance(value, int | float | str)},
                "Machine": {"python": platform.python_version(), **versions, "cores": os.cpu_count(), "minutes in all": seconds / 60,
                            "command": "python -m megatron_ext run " + " ".join(self.words)},
            },
            samples=[{"prompt": one["prompt"], "completion": one["completion"]} for one in generated["completions"]],
            bytes_per_token=prepared.splits["validation"].bytes_per_token,
            baseline_bits_per_byte=float(baseline["bits_per_byte"]),
        )


def command(*words: str, capture: bool = False) -> str:
    """Runs `python -m megatron_ext *words`, forwards signals to it, returns what it printed (with `capture`). Raises StepFailed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_ext", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if capture else None, text=True,
        env={**os.environ, PARENT: str(os.getpid())}, start_new_session=True,
    )
    asked: list[int] = []

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        printed = process.communicate()[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if process.returncode or asked:
        # Told to stop: a step that saved and stopped as it should is still not the whole job.
        raise StepFailed(128 + asked[0] if asked else process.returncode if process.returncode > 0 else 128 - process.returncode)
    return printed or ""


def _say(text: str) -> None:
    print(f"run: {text}", flush=True)
