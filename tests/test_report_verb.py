"""`report run.dir=DIR`: pages written again, with the timeline; and megatron_ext/observe/timeline.py."""
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_cli import cli, imported
from test_goodput import HAND, Clock, campaign
from test_observe_report import png_size, run, table

from megatron_ext.cli.main import main
from megatron_ext.config.compose import compose, to_yaml
from megatron_ext.observe import plots, timeline
from megatron_ext.observe.goodput import Ledger, Span, read_goodput
from rlhf import chain_report

PICTURES = ("plot_loss", "plot_throughput", "plot_optimizer")
GOODPUT = 36 / (16 + 12.5 + 36 + 10 + 6 + 65 + 10.5 + 25)  # of the campaign of test_goodput.py, by hand: 19.9 %


@pytest.fixture
def quick(monkeypatch) -> None:
    """Pictures are drawn by nobody: half a second each."""
    for module, names in ((timeline, ("plot_timeline",)), (plots, PICTURES)):
        for name in names:
            monkeypatch.setattr(module, name, lambda path, *_, **__: path.write_bytes(b"a picture") > 0)


@pytest.fixture
def trained(tmp_path) -> Path:
    """A run of the stage adapt, of 40 steps in four lives, two of which died."""
    directory = tmp_path / "trained"
    events = [("start", {"step": 0}), ("resume", {"step": 20}), ("save", {"step": 20, "seconds": 2.0}), ("stop", {"reason": "all 40 steps are done"})]
    run(directory, [{"step": step, "loss": 3.0, "validation_loss": 3.0, "validation_bits_per_byte": 2.0} for step in range(1, 41)], events)
    (directory / "config.yaml").write_text(to_yaml(compose(["stage=adapt", "model=tiny"])))
    campaign(directory, Clock(), every=0.0)
    return directory


def test_columns_hold_all_the_time(tmp_path):
    campaign(tmp_path, Clock(), every=0.0)
    found = read_goodput(tmp_path)
    for count in (1, 7, 400, 5000):
        start, width, cut = timeline.columns(found.spans, count)
        assert (start, width) == (1_700_000_000.0, pytest.approx(found.wall / count))
        assert {name: sum(seconds) for name, seconds in cut.items() if any(seconds)} == pytest.approx(HAND)
        assert all(sum(cut[name][number] for name in cut) == pytest.approx(width) for number in range(count))


def test_columns_by_hand():
    spans = [Span(100.0, {"queue": 10_000_000}, 0), Span(110.0, {"step": 6_000_000, "data wait": 4_000_000}, 0)]
    start, width, cut = timeline.columns(spans, 4)
    assert (start, width) == (100.0, 5.0)
    assert cut["queue"] == [5, 5, 0, 0] and cut["step"] == [0, 0, 3, 3] and cut["data wait"] == [0, 0, 2, 2]
    assert timeline.columns([], 4)[1] == 0.0


def test_a_stage_is_rendered_again(trained, capsys):
    assert main(["report", f"run.dir={trained}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(trained / "report.md") and said[1].startswith("trained: Goodput 19.9 %: 36s of steps that were kept in 3m 01s of allocation, over 4 lives.")
    text = (trained / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# tiny, adapt\n\nStopped because all 40 steps are done.")
    assert "![Where the time went](timeline.png)" in text and min(png_size(trained / "timeline.png")) > 500
    assert "2 lives failed: a mean time to failure of 1m 28s." in text  # lives of 65.75, 47.75, 31.25 and 31.25 s: 176 s / 2
    assert "A save takes 2.00s, so that one every 19s (21 steps) would cost least" in text  # sqrt(2 x 88 x 2) = 18.76 s, of 0.9 s a step
    rows = table(text)
    assert rows["queue"] == "3m 41s | not allocated" and rows["lost work"] == "10s | 5.8 %" and rows["step"] == "36s | 19.9 %"
    assert rows["2"] == "48s | 21 to 33 | 9.00s | 3.50s | died" and rows["3"].endswith("| 31 to 35 | 4.00s | 0.00s | SIGUSR1: saved")
    assert "bits per byte" in text and "loss.png" in text


def test_figures_for_programs(trained, quick, capsys):
    assert main(["report", "--json", f"run.dir={trained}"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]["trained"]
    assert found["goodput"] == pytest.approx(GOODPUT) and found["failures"] == 2 and found["lives"] == 4 and found["interval_steps"] == 21 and found["mttf"] == 88
    assert {name: seconds for name, seconds in found["seconds"].items() if seconds} == HAND


def test_a_run_that_goes_on(tmp_path, quick, capsys):
    clock = Clock()
    ledger = Ledger(tmp_path / "goodput.jsonl", clock=clock)
    ledger.begin(life=1)
    clock.passes(8)
    ledger.step(1)
    assert main(["report", f"run.dir={tmp_path}"]) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "no metrics were recorded" in text and "running, or killed" in text and "Goodput 0.0 %" in capsys.readouterr().out


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: path / "none", "is not there; name the run.dir of a `train`"),
    (lambda path: path, "holds no run; name the run.dir of a `train`"),
    (lambda path: (path / "report.md").mkdir() or (path / "events.jsonl").touch() or path, "report.md cannot be written there: Is a directory"),
])
def test_where_there_is_nothing_to_report(tmp_path, quick, capsys, make, message):
    assert main(["report", f"run.dir={make(tmp_path)}"]) == 2
    assert message in capsys.readouterr().err


def test_it_needs_no_torch(trained):
    done = cli("report", f"run.dir={trained}", python=("-X", "importtime"))
    assert done.returncode == 0 and "matplotlib" in imported(done) and "torch" not in imported(done)


# ---- a folder of stages ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two stages of a main job."""
    for stage, steps in (("sft", 2), ("pretrain", 3)):
        run(tmp_path / stage, [{"step": step, "loss": 3.0} for step in range(1, steps + 1)], [("start", {"step": 0}), ("stop", {"reason": f"{stage} is done"})])
        (tmp_path / stage / "config.yaml").write_text(to_yaml(compose([f"stage={stage}", "model=tiny"])))
    campaign(tmp_path / "sft", Clock(), every=0.0)
    return tmp_path


def finished(directory: Path) -> SimpleNamespace:
    """As pipeline.Finished, of a job that did both."""
    split = SimpleNamespace(bytes_per_token=2.5, tokens=1000)
    prepared = SimpleNamespace(fields={"corpus": {"name": "books"}}, corpus_sha256="ab" * 32, vocab_size=500, splits={"validation": split, "train": split})
    return SimpleNamespace(
        config=SimpleNamespace(run=SimpleNamespace(dir=str(directory))), words=("model=tiny", "log.api_key=hunter2hunter2"), stages=("pretrain", "sft"),
        prepared=prepared, baseline={"bits_per_byte": 2.25, "order": 3}, evaluation={"bits_per_byte": 1.75, "split": "validation", "nested": {}},
        completions=[{"prompt": "def main(", "completion": "args):", "tokens": [1, 2]}], seconds={"pretrain": 120.0, "sft": 0.0, "all": 180.0},
    )


def test_a_job_is_rendered_again_as_it_was_written(folder, quick, capsys):
    page = chain_report.write(finished(folder))
    files = {path: path.read_bytes() for path in (page, folder / "pretrain" / "report.md", folder / "sft" / "report.md")}
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# tiny: pretrain -> sft\n") and "books, sha256 abab" in text and "hunter2" not in text and "hunter2" not in (folder / "report.json").read_text()
    rows = table(text)
    assert rows["sft"] == "3m 01s | 19.9 % | 4 | 2" and rows["validation, bits per byte"] == "1.75" and rows["interpolated trigram, bits per byte"] == "2.25"
    assert "minutes of sft" not in rows and rows["minutes of pretrain"] == "2"
    assert {"pretrain/loss.png", "sft/timeline.png"} <= set(re.findall(r"\]\((.*?)\)", text))
    own = files[folder / "pretrain" / "report.md"].decode()
    assert "args):" in own and table(own)["split"] == "validation" and "nested" not in table(own)
    for path in files:
        path.unlink()
    assert main(["report", f"run.dir={folder}"]) == 0
    assert {path: path.read_bytes() for path in files} == files
    assert capsys.readouterr().out.splitlines()[0] == str(page)


def test_a_picture_is_drawn_once_for_both_pages_and_the_baseline_stays_in_it(folder, quick, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "plot_loss", lambda path, records, *, baseline, **_: drawn.append((path.parent.name, baseline)) or True)
    chain_report.write(finished(folder))
    assert drawn == [("pretrain", ("interpolated trigram", 2.25)), ("sft", None)]


@pytest.mark.parametrize("facts", [None, "", "[]", '{"summary": {}}', '{"summary": 1, "samples": 2}'])
def test_a_job_that_goes_on_or_whose_facts_are_broken(folder, quick, facts):
    if facts is not None:
        (folder / "report.json").write_text(facts)
    text = chain_report.render(folder).read_text(encoding="utf-8")
    assert text.startswith("# tiny: pretrain -> sft\n") and "Stopped because sft is done." in text and "trigram" not in text
