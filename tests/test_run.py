"""The main job from one command, small but whole: corpus, tokenizer, five stages over two ranks, report; and going on after a kill."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ext import pipeline
from megatron_ext.checkpoint import find
from megatron_ext.checkpoint.ancestry import chain
from megatron_ext.cli import recipe
from megatron_ext.cli.main import main
from megatron_ext.config.compose import compose

pytestmark = pytest.mark.timeout(1500)  # five stages of two ranks, some of them twice: a minute or two of it is starting processes
ROOT = Path(__file__).parents[1]
STAGES = ("pretrain", "adapt", "sft", "reward", "ppo")
WORDS = (
    "model=micro_llama", "data.vocab_size=512", "data.sequence_length=128", "train.global_batch_size=8", "train.micro_batch_size=4", "log.wandb=disabled",
    "optim.warmup_steps=1", "validation.samples=16", "checkpoint.every=4", "data.split=[0.7,0.2,0.1]", "chat.overlong=truncate",
    "pretrain:train.tokens=20480", "pretrain:validation.every=20", "adapt:train.tokens=4096", "adapt:validation.every=4", "sft:train.steps=4", "sft:validation.every=2",
    "reward:train.steps=3", "reward:validation.every=3", "ppo:train.steps=2", "ppo:rollout.prompts=8", "ppo:ppo.evaluate_prompts=8", "ppo:validation.every=2",
    "ppo:generate.max_tokens=12",
)


def command(*words: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "megatron_ext", "run", *WORDS, *words]


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def headings(report: str) -> list[str]:
    return [line for line in report.splitlines() if line.startswith("#")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, tuple[str, ...], float]:
    """A whole job that was killed in the middle of its sft stage, and started again."""
    folder = tmp_path_factory.mktemp("main job")
    sources = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:40]
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": source.read_text(encoding="utf-8")}) + "\n" for source in sources)
    words = (f"run.dir={folder / 'run'}", f"data.cache={folder / 'data'}", f"input={folder / 'text.jsonl'}")
    started = subprocess.Popen(command(*words), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    metrics = folder / "run" / "sft" / "metrics.jsonl"
    deadline = time.monotonic() + 900
    while not (metrics.exists() and metrics.read_text()):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    before = (folder / "run" / "pretrain" / "metrics.jsonl").stat().st_mtime_ns
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    time.sleep(3)  # its ranks see that it is gone
    done = run(*words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "run", words, before


def test_it_leaves_a_report_of_every_stage(finished):
    directory, *_ = finished
    report = (directory / "report.md").read_text(encoding="utf-8")
    for part in ("sha256", "bits per byte", "pretrain/loss.png", "ppo/", "python -m megatron_ext run", *(f"## {stage}" for stage in STAGES)):
        assert part in report, part
    for stage in STAGES:
        assert (directory / stage / "report.md").exists(), stage
    for picture in re.findall(r"\]\(([a-z]+/[a-z_]+\.png)\)", report):
        assert (directory / picture).read_bytes().startswith(b"\x89PNG"), picture
    assert "def main(" in (directory / "pretrain" / "report.md").read_text(encoding="utf-8")


def test_it_learned_and_says_why_each_stage_stopped(finished):
    directory, *_ = finished
    metrics = lines(directory / "pretrain" / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, 21))  # 20,480 tokens in steps of 8 x 128
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.2 and metrics[-1]["tokens"] == 20480
    for stage in STAGES:
        stop = [event for event in lines(directory / stage / "events.jsonl") if event["kind"] == "stop"]
        assert len(stop) == 1 and stop[0]["reason"] and "step_" in stop[0]["checkpoint"], stage


def test_it_went_on_where_it_was_killed(finished):
    """Stages that were done are not done again; the one that was under way continues, or begins anew where it had no checkpoint yet."""
    directory, _, before = finished
    assert (directory / "pretrain" / "metrics.jsonl").stat().st_mtime_ns == before
    assert [record["step"] for record in lines(directory / "sft" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_the_chain_can_be_read_back(finished):
    directory, *_ = finished
    found = chain(find(str(directory / "ppo"), directory, best=True))
    assert [link["stage"] for link in found] == ["ppo", "sft", "adapt", "pretrain"] and not any("broken" in link for link in found)
    assert {role["role"] for role in found[0]["roles"]} == {"reference", "reward"}
    assert find(str(directory), directory, best=True).parents[1] == directory / "ppo"  # the job's directory means its last policy


def test_samples_before_and_after(finished):
    directory, *_ = finished
    samples = lines(directory / "ppo" / "samples.jsonl")
    assert {sample["step"] for sample in samples} == {0, 2} and len(samples) == 16
    assert all({"prompt", "response", "reward", "kl", "stop"} <= set(sample) for sample in samples)


def test_another_call_trains_nothing_and_reports_again(finished, monkeypatch, capsys):
    """The two commands that it would start, ranks and all, are answered with what they found in the call before."""
    directory, words, _ = finished
    before = {stage: (directory / stage / "metrics.jsonl").read_bytes() for stage in STAGES}
    text, facts = (directory / "report.md").read_text(encoding="utf-8"), json.loads((directory / "report.json").read_bytes())
    answers, started = {"evaluate": facts["sections"]["Evaluation"], "generate": {"completions": facts["samples"]}}, []
    monkeypatch.setattr(pipeline, "command", lambda verb, *words, capture: started.append((verb, words)) or json.dumps(answers[verb]))
    (directory / "report.md").unlink()
    assert main(["run", *WORDS, *words]) == 0
    assert capsys.readouterr().out.count("done before") == 5 and [verb for verb, _ in started] == ["evaluate", "generate"]
    assert all(f"checkpoint.load={directory / 'pretrain'}" in words for _, words in started)
    assert before == {stage: (directory / stage / "metrics.jsonl").read_bytes() for stage in STAGES}
    assert headings((directory / "report.md").read_text(encoding="utf-8")) == headings(text)


@pytest.mark.parametrize("typed, wanted", [
    ((), {"data.paths=[/domain,/general]", "data.weights=[0.7,0.3]"}),
    (("data.path=/general",), {"data.path=/general"}),
    (("adapt:data.path=/mine",), {"data.path=/mine"}),
    (("adapt:data.paths=[/mine,/general]", "adapt:data.weights=[0.9,0.1]"), {"data.paths=[/mine,/general]", "data.weights=[0.9,0.1]"}),
], ids=["the domain", "text of the user's", "for adapt alone", "blended"])
def test_adapt_reads_what_was_named(tmp_path, monkeypatch, capsys, typed, wanted):
    """And where a stage was done with other words, that is said: what is done is not done again."""
    said: list[tuple[str, ...]] = []
    monkeypatch.setattr(pipeline, "command", lambda *words, **_: said.append(words))
    monkeypatch.setattr(pipeline.Job, "_domain", lambda *_: Path("/domain"))
    words = (f"run.dir={tmp_path}", *typed)
    job = pipeline.Job(compose(recipe.with_defaults(words)), words, (), None)
    job._stage("adapt", SimpleNamespace(directory=Path("/general")))
    assert {word for word in said[0] if word.startswith(("data.path", "data.weights"))} == wanted
    assert "other words" not in capsys.readouterr().out
    replace(job, words=(*words, "adapt:optim.lr=0.1"))._stage("adapt", SimpleNamespace(directory=Path("/general")))
    assert "adapt: was done with other words" in capsys.readouterr().out


@pytest.mark.parametrize("word, key", [("ppo:train.stepz=3", "train.stepz"), ("pppo:train.steps=3", "pppo"), ("run.stages=[ppo]", "run.stages"),
                                       ("reward:train.steps=0", "train.steps")])
def test_a_mistake_in_a_late_stage_is_told_at_once(tmp_path, word, key):
    done = run(f"run.dir={tmp_path / 'run'}", word)
    assert done.returncode == 2 and key in done.stderr and not (tmp_path / "run").exists(), done.stdout + done.stderr
