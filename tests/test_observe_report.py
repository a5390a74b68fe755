"""megatron_ext/observe/report.py: the report of whole, short, broken and resumed runs."""
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.observe.events import Events
from megatron_ext.observe.metrics import Metrics
from megatron_ext.observe.plots import smooth
from megatron_ext.observe.report import write_report


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def run(directory, records, events=()):
    metrics, log = Metrics(directory / "metrics.jsonl"), Events(directory / "events.jsonl")
    for record in records:
        metrics.write(**record)
    for kind, fields in events:
        log.write(kind, **fields)
    metrics.close()
    log.close()
    return directory


def table(text):
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.MULTILINE))


def test_a_whole_run(tmp_path):
    records = [{"step": s, "loss": 5.0 - s / 50, "tokens_per_second": 1000.0 + s, "lr": 1e-3, "grad_norm": 1.0, "tokens": s * 100}
               for s in range(1, 101)]
    records[49]["validation_loss"], records[99]["validation_loss"] = 4.5, math.log(2) * 3.0
    run(tmp_path, records, [("start", {"step": 0}), ("resume", {"step": 50}), ("stop", {"reason": "all 100 steps are done", "elapsed": 75.0})])
    (tmp_path / "config.yaml").write_text("optim:\n  lr: 0.001\n")
    path = write_report(
        tmp_path, title="A run", sections={"Evaluation": {"test, bits per byte": 1.25, "odd | name": None}, "Notes": "*free text*"},
        samples=[{"prompt": "def f(", "completion": "x):\n```\n한국어"}], bytes_per_token=2.0, baseline_bits_per_byte=1.8)
    text = path.read_text(encoding="utf-8")
    rows = table(text)
    assert text.startswith("# A run\n\nStopped because all 100 steps are done.\n")
    assert rows["steps"] == "100" and rows["tokens"] == "10.0k" and rows["wall time"] == "1m 15s" and rows["resumed"] == "1 time"
    assert rows["training loss, first -> last"] == "4.9800 -> 3.0100 nats per token"  # the last is the mean of a fiftieth
    assert rows["validation loss, last (best)"] == "2.0794 (2.0794) nats per token, perplexity 8.00"  # 3 bits a token
    assert rows["validation, bits per byte"] == "1.5000"  # 3 bits a token of 2 bytes
    assert rows["interpolated trigram, bits per byte"] == "1.8000"
    assert rows["model against it"] == "0.3000 bits per byte below (better)"
    assert rows["tokens per second, median"] == "1,051"
    assert rows["test, bits per byte"] == "1.25" and rows["odd \\| name"] == "-" and "*free text*" in text
    assert "````text\nx):\n```\n한국어\n````" in text and "```yaml\noptim:" in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures == ["loss.png", "throughput.png", "optimizer.png"]
    for name in pictures:
        width, height = png_size(tmp_path / name)
        assert width > 900 and height > 300


def test_a_model_that_loses_to_the_baseline_is_said_to(tmp_path):
    run(tmp_path, [{"step": 1, "loss": 3.0, "validation_loss": 3.0, "validation_bits_per_byte": 2.0}])
    rows = table(write_report(tmp_path, title="t", baseline_bits_per_byte=1.8).read_text())
    assert rows["validation, bits per byte"] == "2.0000" and rows["model against it"] == "0.2000 bits per byte above (worse)"


@pytest.mark.parametrize("count", [0, 1, 2, 21])
def test_few_points_and_no_validation(tmp_path, count):
    run(tmp_path, [{"step": s, "loss": 3.0} for s in range(count)])
    text = write_report(tmp_path, title="t").read_text()
    assert (tmp_path / "loss.png").exists() == (count > 0) == ("loss.png" in text)
    assert "validation" not in text and "throughput.png" not in text


def test_an_empty_directory(tmp_path):
    assert "no metrics were recorded" in write_report(tmp_path, title="t").read_text()


def test_losses_that_are_not_finite_are_counted_and_not_drawn(tmp_path):
    losses = [3.0, math.nan, math.inf, 2.0]
    run(tmp_path, [{"step": s, "loss": loss, "grad_norm": math.nan, "tokens_per_second": 5.0} for s, loss in enumerate(losses)])
    text = write_report(tmp_path, title="t").read_text()
    assert table(text)["non-finite losses"] == "2" and "3.0000 -> 2.0000" in text and "optimizer.png" not in text
    png_size(tmp_path / "loss.png")


def test_a_killed_run_with_torn_files(tmp_path):
    run(tmp_path, [{"step": s, "loss": 3.0} for s in range(5)], [("start", {"step": 0})])
    for name in ("metrics.jsonl", "events.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write('{"step": 5, "lo')
    text = write_report(tmp_path, title="t").read_text()
    assert "still going on, or was killed" in text and table(text)["steps"] == "4"


def test_long_event_logs_are_shortened_in_the_middle(tmp_path):
    run(tmp_path, [], [("save", {"step": s}) for s in range(100)])
    text = write_report(tmp_path, title="t").read_text()
    assert "60 events left out" in text and "step 0 |" in text and "step 99 |" in text and "step 50 |" not in text


def test_without_matplotlib(tmp_path, monkeypatch):
    run(tmp_path, [{"step": 1, "loss": 3.0}])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in write_report(tmp_path, title="t").read_text()


def test_smoothing_does_not_lag():
    line = [100.0 - i for i in range(1000)]
    assert smooth(line) == pytest.approx(line)
    noisy = smooth([(-1.0) ** i for i in range(1000)])
    assert max(abs(v) for v in noisy[10:-10]) < 0.06
    assert smooth([]) == [] and smooth([2.0]) == [2.0]


def test_nothing_heavy_is_imported_by_observing():
    code = ("import sys, megatron_ext.observe.report, megatron_ext.observe.progress, megatron_ext.observe.gpu, megatron_ext.observe.flops\n"
            "print([m for m in ('torch', 'numpy', 'matplotlib', 'wandb', 'pynvml') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert done.stdout == "[]\n"
