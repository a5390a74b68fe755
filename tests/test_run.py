"""The main job from one command, small but whole: corpus, tokenizer, two tensor-parallel ranks, evaluation, completions, report."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = (
    "model=micro_llama", "data.vocab_size=512", "data.sequence_length=64", "train.tokens=20000", "train.global_batch_size=8", "train.micro_batch_size=4",
    "optim.warmup_steps=5", "validation.every=20", "checkpoint.every=20", "generate.max_tokens=8", "data.split=[0.7,0.2,0.1]",
)


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "megatron_ext", "run", *WORDS, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    folder = tmp_path_factory.mktemp("main job")
    sources = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:40]
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": source.read_text(encoding="utf-8")}) + "\n" for source in sources)
    words = (f"run.dir={folder / 'run'}", f"data.cache={folder / 'data'}", f"input={folder / 'text.jsonl'}")
    done = run(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", words


def test_it_leaves_a_report_of_what_it_did(finished):
    directory, _ = finished
    report = (directory / "report.md").read_text(encoding="utf-8")
    for part in ("sha256", "bits_per_byte", "def main(", "loss.png", "throughput.png", "python -m megatron_ext run"):
        assert part in report, part
    for name in ("loss.png", "throughput.png"):
        assert (directory / name).read_bytes().startswith(b"\x89PNG")


def test_it_learned_and_says_why_it_stopped(finished):
    directory, _ = finished
    metrics = lines(directory / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, 41))  # 20,000 tokens in steps of 8 x 64
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5 and metrics[-1]["tokens"] == 40 * 8 * 64
    assert metrics[-1]["validation_bits_per_byte"] > 0
    stop = [event for event in lines(directory / "events.jsonl") if event["kind"] == "stop"]
    assert len(stop) == 1 and stop[0]["criterion"] in ("tokens", "steps") and stop[0]["checkpoint"].endswith("step_00000040")


def test_evaluation_in_the_report_is_that_of_the_last_validation(finished):
    directory, _ = finished
    metrics = lines(directory / "metrics.jsonl")
    stated = [float(found) for found in re.findall(r"bits_per_byte[^0-9]*([0-9.]+)", (directory / "report.md").read_text(encoding="utf-8"))]
    # All of the split here, its first 256 sequences there: the same text where the split is smaller than that.
    assert any(abs(value - metrics[-1]["validation_bits_per_byte"]) < 0.05 for value in stated), stated


def test_a_second_call_trains_nothing_and_reports_again(finished):
    directory, words = finished
    before = (directory / "metrics.jsonl").read_bytes()
    (directory / "report.md").unlink()
    done = run(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (directory / "metrics.jsonl").read_bytes() == before and (directory / "report.md").exists()
