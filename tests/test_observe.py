"""megatron_ext/observe: events, metrics, progress, tracking and GPU figures."""
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from megatron_ext.config.schema import Config, LogConfig
from megatron_ext.errors import UserError
from megatron_ext.observe.events import Events, read_events
from megatron_ext.observe.gpu import GpuMonitor
from megatron_ext.observe.metrics import Metrics, read_metrics
from megatron_ext.observe.progress import Progress, human_count, human_time
from megatron_ext.observe.track import Tracker, identity


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")
    return json.loads(text, parse_constant=refuse)


# --- metrics.jsonl

def test_metrics_keep_every_bit(tmp_path):
    values = [0.1, 1 / 3, 1e-310, 2.0**-1074, 1.7976931348623157e308, -0.0, 5.0]
    metrics = Metrics(tmp_path / "run" / "metrics.jsonl")
    for step, value in enumerate(values):
        metrics.write(step, loss=value)
    metrics.close()
    got = [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert [v.hex() for v in got] == [v.hex() for v in values]


def test_metrics_write_valid_json_for_what_json_lacks(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write(1, loss=math.nan, grad_norm=math.inf, low=-math.inf, nested={"a": [math.nan]}, skipped=True, text="한국어 \ud800")
    metrics.close()
    raw = strict(path.read_text())
    assert (raw["loss"], raw["grad_norm"], raw["low"], raw["nested"]) == ("NaN", "Infinity", "-Infinity", {"a": ["NaN"]})
    record = read_metrics(path)[0]
    assert math.isnan(record["loss"]) and record["grad_norm"] == math.inf and record["low"] == -math.inf and record["skipped"] is True


def test_metrics_take_tensors_and_arrays_of_one_element(tmp_path):
    numpy = pytest.importorskip("numpy")
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.write(1, a=numpy.float32(0.5), b=numpy.int64(3))
    metrics.close()
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "a": 0.5, "b": 3}]


def test_resume_keeps_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path)
    for step in range(10):
        first.write(step, loss=step + 0.1)
    first.close()
    second = Metrics(path, first=6)
    assert second.dropped == 4
    for step in range(6, 12):
        second.write(step, loss=step + 0.2)
    second.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(s, s + (0.1 if s < 6 else 0.2)) for s in range(12)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_run_in_an_old_directory_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        metrics = Metrics(path)
        metrics.write(0, loss=1.0)
        metrics.close()
    assert len(read_metrics(path)) == 1


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', "\x00\x00\x00"])
def test_a_torn_last_line_is_repaired(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n' + torn)
    metrics = Metrics(path, first=3)
    metrics.write(3, loss=1.5)
    metrics.close()
    assert [strict(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.5}]


def test_an_untouched_file_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n')
    inode = path.stat().st_ino
    assert Metrics(path, first=2).dropped == 0
    assert path.stat().st_ino == inode


def test_killed_at_any_byte_every_record_is_whole(tmp_path):
    """A writer is killed with SIGKILL again and again; each life resumes where the file says."""
    path = tmp_path / "metrics.jsonl"
    code = ("import sys; from pathlib import Path; from megatron_ext.observe.metrics import Metrics, read_metrics\n"
            "p = Path(sys.argv[1]); done = [r['step'] for r in read_metrics(p)]; first = max(0, (done[-1] if done else -1) + 1 - 3)\n"
            "m = Metrics(p, first=first); print('up', flush=True)\n"
            "for s in range(first, 10**9): m.write(s, loss=s * 0.1, text='x' * (s % 3000))\n")
    for life in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
        process.stdout.readline()
        while process.poll() is None and path.read_bytes().count(b"\n") < 10 * (life + 1):  # it has begun, however little of the machine it gets
            time.sleep(0.001)
        time.sleep(0.02 * (life + 1))
        process.kill()
        process.wait()
        process.stdout.close()
    steps = [r["step"] for r in read_metrics(path)]
    assert len(steps) > 10 and steps == list(range(len(steps)))


def test_metrics_cost_next_to_nothing(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl")
    begin = time.process_time()
    for step in range(2000):
        metrics.write(step, loss=step / 3, lr=1e-3, grad_norm=0.7, tokens_per_second=12345.678, tokens=step * 8192)
    metrics.close()
    assert (time.process_time() - begin) / 2000 < 5e-4  # measured: 2e-5 s of processor time


# --- events.jsonl

def test_events(tmp_path):
    path = tmp_path / "events.jsonl"
    events = Events(path)
    events.write("start", step=0)
    events.write("stop", reason="all 3 steps are done", path=Path("/a/b"))
    events.close()
    first, second = (strict(line) for line in path.read_text().splitlines())
    assert (first["kind"], first["step"], second["reason"], second["path"]) == ("start", 0, "all 3 steps are done", "/a/b")
    from datetime import datetime, timedelta
    assert datetime.fromisoformat(first["time"]).utcoffset() == timedelta(0)
    Events(path).write("resume", step=2)
    assert [e["kind"] for e in read_events(path)] == ["start", "stop", "resume"]


def test_a_torn_event_is_cut_off_when_the_next_life_begins(tmp_path):
    path = tmp_path / "events.jsonl"
    for torn in ("", '{"kind": "sa', "x" * 200_000):
        path.write_text('{"kind": "start"}\n' + torn)
        Events(path).write("resume", step=2)
        assert [strict(line)["kind"] for line in path.read_text().splitlines()] == ["start", "resume"]
    path.write_text('{"kind": "torn fir')
    Events(path).write("start")
    assert [e["kind"] for e in read_events(path)] == ["start"]


def test_a_full_disk_warns_once_and_leaves_whole_lines(tmp_path):
    """RLIMIT_FSIZE makes the kernel refuse, after a part of a line, what a full disk would refuse."""
    code = ("import resource, sys, warnings; from megatron_ext.observe.events import Events\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); warnings.simplefilter('always')\n"
            "events = Events(sys.argv[1])\n"
            "for step in range(100): events.write('save', step=step)\n"
            "print('trained on')\n")
    path = tmp_path / "events.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert done.stdout == "trained on\n" and done.stderr.count("RuntimeWarning") == 1 and str(path) in done.stderr
    steps = [strict(line)["step"] for line in path.read_text().splitlines()]
    assert steps == list(range(len(steps))) and 5 < len(steps) < 20


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_device_that_is_full_from_the_start():
    events = Events(Path("/dev/full"))
    with pytest.warns(RuntimeWarning, match="No space left") as caught:
        [events.write(kind) for kind in ("start", "stop")]
    assert len(caught) == 1


def test_events_in_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="the run goes on"):
        Events(tmp_path / "file" / "events.jsonl").write("start")


# --- progress

class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def drive(stream, steps=10, seconds=2.0, **options):
    clock = Clock()
    progress = Progress(steps, stream=stream, clock=clock, **options)
    for done in range(1, steps + 1):
        clock.now += seconds
        progress.update(done, loss=3.0, tokens_per_second=12345.0, lr=1e-3, grad_norm=0.5)
    progress.close()
    return stream.getvalue()


def test_progress_in_a_file_is_plain_lines():
    lines = drive(io.StringIO()).splitlines()
    assert len(lines) == 10 and "\x1b" not in "".join(lines)
    assert lines[4] == "step  5/10 50% | loss 3.0000 | 12.3k tok/s | lr 1.0e-03 | grad 0.500 | eta 10s"
    assert "eta" not in lines[-1] and "10/10 100%" in lines[-1]


def test_progress_is_rare_in_files_of_fast_runs_and_respects_every():
    assert len(drive(io.StringIO(), steps=100, seconds=0.1).splitlines()) < 8
    assert [line.split()[1] for line in drive(io.StringIO(), every=4).splitlines()] == ["1/10", "4/10", "8/10", "10/10"]


def test_progress_on_a_terminal_is_one_line_that_fits(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = drive(Terminal())
    assert text.count("\n") == 1 and text.count("\r\x1b[K") == 10
    assert max(len(part) for part in text.rstrip("\n").split("\r\x1b[K")) == 39


def test_progress_keeps_the_validation_loss_and_notes_stand_alone():
    stream = Terminal()
    progress = Progress(10, stream=stream, clock=Clock())
    progress.update(1, loss=3.0, validation_loss=3.25)
    progress.note("saved step_00000001")
    progress.update(10, loss=2.0)
    text = stream.getvalue()
    assert "\r\x1b[Ksaved step_00000001\n" in text and text.endswith("loss 2.0000 | val 3.2500")


def test_progress_survives_a_reader_that_has_gone():
    stream = io.StringIO()
    progress = Progress(3, stream=stream)
    stream.close()
    progress.update(1, loss=1.0)
    progress.note("on")


def test_estimate_of_a_resumed_run_counts_only_its_own_steps():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(1000, done=900, stream=stream, clock=clock)
    clock.now = 3.0
    progress.update(901)
    assert stream.getvalue().endswith("eta 4m 57s\n")  # 99 steps of 3 s


def test_figures_for_people():
    assert [human_count(x) for x in (7, 1234, 56_789, 999_499, 5.6e6, 2e9, 3.1e12)] == [
        "7", "1.23k", "56.8k", "999k", "5.60M", "2.00G", "3.10T"]
    assert [human_time(x) for x in (0.4, 59.6, 75, 3599, 7260, 200_000)] == ["0s", "1m 00s", "1m 15s", "59m 59s", "2h 01m", "2d 07h"]


# --- wandb

def test_tracking_that_is_off_imports_nothing(tmp_path):
    code = ("import sys; from pathlib import Path; from megatron_ext.config.schema import LogConfig\n"
            "from megatron_ext.observe.track import Tracker; t = Tracker(LogConfig(wandb='disabled'), run_dir=Path('.')); t.log(1, loss=2.0); t.close()\n"
            "print('wandb' in sys.modules, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert done.stdout == "False False\n"


def test_missing_wandb_is_the_users_to_mend(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="log.wandb=offline.*pip install wandb"):
        Tracker(LogConfig(wandb="offline"), run_dir=tmp_path)
    with pytest.raises(UserError, match="disabled, offline or online"):
        Tracker(LogConfig(wandb="on"), run_dir=tmp_path)


def test_by_default_wandb_writes_to_disk_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    calls = fake_wandb(monkeypatch, FakeRun())
    Tracker(LogConfig(), run_dir=tmp_path)
    assert calls["mode"] == "offline"
    calls = fake_wandb(monkeypatch, FakeRun())
    monkeypatch.setenv("WANDB_MODE", "disabled")  # as wandb's own users switch it off
    Tracker(LogConfig(), run_dir=tmp_path)
    assert not calls
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setitem(sys.modules, "wandb", None)
    Tracker(LogConfig(), run_dir=tmp_path).log(1, loss=1.0)


class FakeRun:
    """step: where wandb says that the run stands."""

    def __init__(self, broken=False, step=0):
        self.logged, self.finished, self.broken, self.step, self.axes = [], None, broken, step, []

    def define_metric(self, name, step_metric):
        self.axes.append((name, step_metric))

    def log(self, fields, step):
        if self.broken:
            raise ConnectionError("gone")
        self.logged.append((step, fields))

    def finish(self, exit_code):
        self.finished = exit_code


def fake_wandb(monkeypatch, run=None, error=None):
    calls = {}

    def init(**options):
        calls.update(options)
        if error:
            raise error
        return run
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=dict))
    return calls


def test_tracking(tmp_path, monkeypatch):
    run = FakeRun()
    calls = fake_wandb(monkeypatch, run)
    tracker = Tracker(LogConfig(wandb="offline", wandb_project="p"), run_dir=tmp_path / "mine", config=Config())
    tracker.log(3, loss=1.5)
    tracker.close(exit_code=1)
    tracker.log(4, loss=1.0)
    assert run.logged == [(3, {"step": 3, "loss": 1.5})] and run.finished == 1 and run.axes == [("*", "step")]
    assert (calls["mode"], calls["project"], calls["name"], calls["resume"]) == ("offline", "p", "mine", None)
    assert calls["config"]["optim"]["lr"] == 1e-3


def test_every_life_has_the_runs_id_and_a_new_directory_another(tmp_path, monkeypatch):
    ids = []
    for folder in ("a", "a", "b"):
        calls = fake_wandb(monkeypatch, FakeRun())
        Tracker(LogConfig(wandb="online"), run_dir=tmp_path / folder)
        ids.append(calls["id"])
        assert calls["resume"] == "allow"
    (tmp_path / "a").rename(tmp_path / "moved")
    assert identity(tmp_path / "moved") == ids[0] == ids[1] != ids[2]
    shutil.rmtree(tmp_path / "moved")
    (tmp_path / "moved").mkdir()
    assert identity(tmp_path / "moved") != ids[0]


def test_an_offline_life_tells_the_lives_before_it(tmp_path, monkeypatch):
    """wandb replaces what an earlier life uploaded, so that each life's folder has to be the whole run."""
    run, past = FakeRun(), [{"step": step, "loss": 10.0 - step} for step in range(1, 4)]
    fake_wandb(monkeypatch, run)
    Tracker(LogConfig(wandb="offline"), run_dir=tmp_path, history=lambda: past).log(4, loss=0.0)
    assert [(at, fields["step"], fields["loss"]) for at, fields in run.logged] == [(1, 1, 9.0), (2, 2, 8.0), (3, 3, 7.0), (4, 4, 0.0)]
    run, past = FakeRun(), [{"step": step} for step in range(1, 25_001)]
    fake_wandb(monkeypatch, run)
    Tracker(LogConfig(wandb="offline"), run_dir=tmp_path, history=lambda: past)
    assert 8_000 < len(run.logged) <= 10_000 and run.logged[0][0] == 1 and run.logged[-1][0] > 24_990


def test_steps_that_are_done_again_are_logged_again(tmp_path, monkeypatch):
    """wandb drops what is not after its newest step: a resumed run stands at 61 (60 was the last), and this life begins with 51; then it rewinds."""
    run = FakeRun(step=61)
    fake_wandb(monkeypatch, run)
    tracker = Tracker(LogConfig(wandb="online"), run_dir=tmp_path, history=lambda: pytest.fail("online, wandb has it"))
    for step in (51, 52, 53, 52, 53):
        tracker.log(step)
    assert [(at, fields["step"]) for at, fields in run.logged] == [(61, 51), (62, 52), (63, 53), (64, 52), (65, 53)]


def test_wandbs_errors_never_stop_the_run(tmp_path, monkeypatch):
    fake_wandb(monkeypatch, FakeRun(broken=True))
    tracker = Tracker(LogConfig(wandb="online"), run_dir=tmp_path)
    with pytest.warns(RuntimeWarning, match="gone") as caught:
        [tracker.log(step, loss=1.0) for step in (1, 2)]
    assert len(caught) == 1
    fake_wandb(monkeypatch, error=ConnectionError("no network"))
    with pytest.warns(RuntimeWarning, match="no network"):
        tracker = Tracker(LogConfig(wandb="online"), run_dir=tmp_path)
    tracker.log(1, loss=1.0)
    tracker.close()


# --- NVML

class NVMLError(Exception):
    pass


def fake_nvml(monkeypatch, devices=("GPU-aa", "GPU-bb"), **broken):
    def refuse(*_):
        raise NVMLError("not supported")

    def by_index(i):
        if i >= len(devices):
            raise NVMLError("invalid argument")
        return devices[i]
    space = types.SimpleNamespace
    module = space(
        NVMLError=NVMLError, NVML_TEMPERATURE_GPU=0, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, open=0,
        nvmlDeviceGetHandleByIndex=by_index, nvmlDeviceGetHandleByUUID=lambda u: devices[devices.index(u)],
        nvmlDeviceGetUtilizationRates=lambda h: space(gpu=87 if h == "GPU-aa" else 12),
        nvmlDeviceGetMemoryInfo=lambda h: space(used=3 * 2**30, total=80 * 2**30),
        nvmlDeviceGetPowerUsage=lambda h: 350_500, nvmlDeviceGetEnforcedPowerLimit=lambda h: 700_000,
        nvmlDeviceGetTemperature=lambda h, kind: 61, nvmlDeviceGetClockInfo=lambda h, kind: {1: 1980, 2: 2619}[kind],
        nvmlDeviceGetCurrentClocksEventReasons=lambda h: 0x1 | 0x4 | 0x40)
    module.nvmlInit = lambda: setattr(module, "open", module.open + 1)
    module.nvmlShutdown = lambda: setattr(module, "open", module.open - 1)
    for name in broken:
        setattr(module, name, refuse)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return module


def test_gpu_figures(monkeypatch):
    module = fake_nvml(monkeypatch)
    monitor = GpuMonitor(0)
    assert monitor.read() == {
        "gpu_utilisation": 87, "gpu_memory_used": 3.0, "gpu_memory_total": 80.0, "gpu_power": 350.5, "gpu_power_limit": 700.0,
        "gpu_temperature": 61, "gpu_clock": 1980, "gpu_memory_clock": 2619, "gpu_throttle": "power cap, hardware thermal"}
    monitor.close()
    assert module.open == 0 and monitor.read() == {}


def test_gpu_figures_follow_the_visible_devices(monkeypatch):
    fake_nvml(monkeypatch)
    for visible, utilisation in (("1", 12), ("1,0", 12), ("GPU-bb", 12), ("GPU-aa", 87)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert GpuMonitor(0).read()["gpu_utilisation"] == utilisation
    for visible in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert GpuMonitor(0).read() == {}


def test_gpu_figures_that_a_device_lacks_are_left_out(monkeypatch):
    fake_nvml(monkeypatch, nvmlDeviceGetPowerUsage=True, nvmlDeviceGetCurrentClocksEventReasons=True)
    figures = GpuMonitor(0).read()
    assert "gpu_power" not in figures and "gpu_throttle" not in figures and figures["gpu_temperature"] == 61


def test_no_gpu_no_figures(monkeypatch):
    fake_nvml(monkeypatch, nvmlInit=True)
    assert GpuMonitor(0).read() == {}
    fake_nvml(monkeypatch, devices=())
    assert GpuMonitor(0).read() == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuMonitor(0).read() == {}
