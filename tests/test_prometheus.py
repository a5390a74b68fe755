"""Figures for Prometheus and Grafana, and those of all ranks' GPUs."""
import json
import math
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_grammar import read
from spawn import spawn

from megatron_ext.config.compose import compose
from megatron_ext.config.observing import parse_address
from megatron_ext.config.validate import problems
from megatron_ext.errors import UserError
from megatron_ext.observe import gpus, prometheus
from megatron_ext.observe.prometheus import Publisher

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "slurm" / "grafana" / "megatron_ext.json"
LABELS = {"run": "outputs/run", "stage": "ppo"}
FIELDS = {
    "loss": 2.5, "grad_norm": 0.75, "lr": 1e-3, "tokens": 8192, "tokens_per_second": 12345.678, "seconds": 0.1, "applied": True, "mfu": 0.41, "hfu": 0.5,
    "validation_loss": 2.75, "energy_per_token": 0.025, "reward_mean": 1.5, "gpu_utilisation": 87.0, "gpu_throttle": "power cap",
}
HOT = gpus.pack({"gpu_utilisation": 87, "gpu_memory_used": 3.0, "gpu_memory_total": 80.0, "gpu_power": 350.5, "gpu_power_limit": 700.0,
                 "gpu_temperature": 85, "gpu_clock": 1200, "gpu_memory_clock": 2619, "gpu_throttle": "power cap, hardware thermal", "gpu_energy": 1e6})
COOL = gpus.pack({"gpu_utilisation": 12, "gpu_memory_used": 4.0, "gpu_memory_total": 80.0, "gpu_power": 300.5, "gpu_power_limit": 700.0,
                  "gpu_temperature": 61, "gpu_clock": 1980, "gpu_memory_clock": 2619, "gpu_throttle": "", "gpu_energy": 2e6})


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def full(tmp_path: Path, **options) -> Publisher:
    """A publisher that has been told everything there is."""
    made = Publisher({tmp_path / "metrics.prom": None}, labels=LABELS, fixed={"planned_steps": 100, "restarts": 2}, **options)
    made.step(7, FIELDS, [HOT, COOL])
    return made


def run(**labels) -> frozenset:
    return frozenset({**LABELS, **labels}.items())


# --- the text

def test_every_figure_stands_in_the_file_with_its_unit(tmp_path):
    full(tmp_path, clock=Clock())
    found = read((tmp_path / "metrics.prom").read_text())

    def value(metric, /, **labels):
        return found[f"megatron_ext_{metric}"]["samples"][run(**labels)]
    assert (value("step"), value("planned_steps"), value("restarts"), value("running")) == (7, 100, 2, 1)
    assert (value("loss"), value("trained_tokens"), value("tokens_per_second"), value("mfu_ratio")) == (2.5, 8192, 12345.678, 0.41)
    assert value("last_step_timestamp_seconds") == value("start_timestamp_seconds") == 1000.0
    assert value("number", name="reward_mean") == 1.5 and len(found["megatron_ext_number"]["samples"]) == 1
    assert value("gpu_utilisation_ratio", rank="0") == pytest.approx(0.87) and value("gpu_utilisation_ratio", rank="1") == pytest.approx(0.12)
    assert value("gpu_memory_used_bytes", rank="1") == 4 * 2**30 and value("gpu_clock_hertz", rank="0") == 1.2e9
    assert (value("gpu_throttled", rank="0"), value("gpu_throttled", rank="1")) == (1, 0)
    assert all(entry["help"] for entry in found.values())
    assert {name for name, entry in found.items() if entry["type"] == "counter"} == {name for name in found if name.endswith("_total")}
    assert len(found) == len(prometheus.RUN) + len(prometheus.GPU) + 1


def test_prometheus_own_client_reads_it(tmp_path):
    parser = pytest.importorskip("prometheus_client.parser")
    full(tmp_path)
    text = (tmp_path / "metrics.prom").read_text()
    families = list(parser.text_string_to_metric_families(text))
    ours = read(text)
    theirs = {(sample.name, frozenset(sample.labels.items())): sample.value for family in families for sample in family.samples}
    assert theirs == {(name, labels): value for name, entry in ours.items() for labels, value in entry["samples"].items()}


@pytest.mark.parametrize("name", ['a "run"', "back\\slash", "line\nfeed", "C:\\new", "한국어", 'x",stage="y', "\\", "\\n", "{}", "a,b=c"])
def test_any_text_survives_in_a_label(name):
    text = prometheus.run_text({"loss": 1.0}, {"run": name, "stage": "sft"})
    assert read(text)["megatron_ext_loss"]["samples"] == {frozenset({("run", name), ("stage", "sft")}): 1.0}
    metric = prometheus.Metric("x", f"help of {name}", "x")
    assert read(prometheus.family(metric, [({}, 1.0)]))["megatron_ext_x"]["help"] == f"help of {name}"


@pytest.mark.parametrize("value", [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2**53, 10**20, True, math.nan, math.inf, -math.inf])
def test_values_keep_every_bit(value):
    got = read(prometheus.run_text({"loss": value}, {}))["megatron_ext_loss"]["samples"][frozenset()]
    assert got == value or math.isnan(got) and math.isnan(value)


def test_what_is_not_there_has_no_lines(tmp_path):
    publisher = Publisher({tmp_path / "m.prom": None}, labels=LABELS)
    publisher.step(1, {"loss": 1.0, "grad_norm": None, "note": "text"}, [gpus.pack({}), gpus.pack({"gpu_power": 300.0})])
    found = read((tmp_path / "m.prom").read_text())
    assert not {"megatron_ext_mfu_ratio", "megatron_ext_gradient_norm", "megatron_ext_number", "megatron_ext_gpu_clock_hertz"} & found.keys()
    assert found["megatron_ext_gpu_power_watts"]["samples"] == {run(rank="1"): 300.0}


# --- the file

def test_the_file_is_written_seldom_whole_and_a_last_time(tmp_path):
    clock, path = Clock(), tmp_path / "metrics.prom"
    publisher = full(tmp_path, clock=clock)

    def step():
        return read(path.read_text())["megatron_ext_step"]["samples"][run()]
    inode = path.stat().st_ino
    for now, number, shown in ((1001, 8, 7), (1009, 9, 7), (1010, 10, 10), (1011, 11, 10)):
        clock.now = now
        publisher.step(number, {"loss": 1.0, "applied": number != 9})
        assert step() == shown
    assert path.stat().st_ino != inode, "replaced, not overwritten under a reader"
    publisher.close()
    found = read(path.read_text())
    assert step() == 11 and found["megatron_ext_running"]["samples"] == {run(): 0} and not any("gpu" in name for name in found)
    assert found["megatron_ext_skipped_steps_total"]["samples"] == {run(): 1} and list(tmp_path.iterdir()) == [path]


def test_the_collectors_file_is_readable_by_all_and_goes_with_the_run(tmp_path):
    path = tmp_path / "megatron_ext_x.prom"
    before = os.umask(0o077)  # of a private run
    try:
        publisher = Publisher({path: 0o644}, labels=LABELS, passing=[path])
        publisher.step(1, FIELDS)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644 and read(path.read_text())
    publisher.close()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_warns_once(tmp_path):
    publisher = Publisher({tmp_path / "none" / "m.prom": None}, labels=LABELS, every=0.0)
    with pytest.warns(RuntimeWarning, match="the run goes on") as caught:
        [publisher.step(number, FIELDS) for number in (1, 2)]
    publisher.close()
    assert len(caught) == 1


# --- the endpoint

def test_the_endpoint_tells_the_newest_figures_and_nothing_else(tmp_path):
    publisher = full(tmp_path, listen=("127.0.0.1", 0))
    at = f"http://127.0.0.1:{publisher.endpoint.port}"
    publisher.step(8, FIELDS)  # within the ten seconds of the file
    with urllib.request.urlopen(f"{at}/metrics", timeout=60) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8" and "Python" not in str(answer.headers)
        assert read(answer.read().decode())["megatron_ext_step"]["samples"] == {run(): 8}
    for path in ("/", "/metrics/../../etc/passwd", "/x"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(at + path, timeout=60)
    with pytest.warns(RuntimeWarning, match="in use"):
        other = Publisher({}, labels=LABELS, listen=("127.0.0.1", publisher.endpoint.port))
    assert other.endpoint is None
    other.close()
    publisher.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{at}/metrics", timeout=60)


def test_addresses():
    assert parse_address("127.0.0.1:9400") == ("127.0.0.1", 9400) and parse_address("[::1]:0") == ("::1", 0)
    for text in ("9400", ":9400", "127.0.0.1", "127.0.0.1:99999", "http://x:1", "::1:9400", "a b:1", "x:-1"):
        with pytest.raises(UserError, match="HOST:PORT"):
            parse_address(text)
        assert "log.prometheus_listen" in str(problems(compose([f"log.prometheus_listen='{text}'"]))[0])
    assert not problems(compose(["log.prometheus_listen=0.0.0.0:9400"]))


# --- the dashboard

def test_every_metric_and_label_of_the_dashboard_exists(tmp_path):
    full(tmp_path)
    told = {name: {key for labels in entry["samples"] for key, _ in labels} for name, entry in read((tmp_path / "metrics.prom").read_text()).items()}
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    queries += [variable["query"]["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    asked = set()
    for query in queries:
        names = re.findall(r"megatron_ext_\w+", query)
        assert names, query
        asked.update(names)
        for name, selector in re.findall(r"(megatron_ext_\w+)\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)\s*(?:=|!=|=~|!~)\s*\"", selector)) <= told[name], query
        for grouping in re.findall(r"by \(([^)]*)\)", query):
            assert set(re.split(r",\s*", grouping)) <= told[names[0]], query
    assert asked <= told.keys(), f"the dashboard asks for {sorted(asked - told.keys())}"
    assert asked == told.keys(), f"the dashboard does not show {sorted(told.keys() - asked)}"
    variables = {variable["name"] for variable in board["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(board))) <= variables
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


# --- all ranks' GPUs

def test_packing_loses_nothing():
    figures = {"gpu_utilisation": 87, "gpu_power": 350.5, "gpu_throttle": "power cap, hardware thermal", "gpu_energy": 1.5e9}
    assert gpus.unpack(gpus.pack(figures)) == figures
    assert gpus.unpack(gpus.pack({})) == {} and gpus.unpack(gpus.pack({"gpu_throttle": ""})) == {"gpu_throttle": ""}


def test_who_is_the_worst():
    blind = gpus.pack({})
    told = gpus.summary([COOL, blind, HOT])
    assert (told["gpu_utilisation"], told["gpu_utilisation_min"], told["gpu_utilisation_max"], told["gpu_utilisation_worst"]) == (49.5, 12, 87, 0)
    assert (told["gpu_temperature_max"], told["gpu_temperature_worst"]) == (85, 2) and (told["gpu_clock_min"], told["gpu_clock_worst"]) == (1200, 2)
    assert (told["gpu_memory_used"], told["gpu_memory_used_worst"]) == (3.5, 0)
    assert (told["gpu_throttled"], told["gpu_throttle"]) == (1, "rank 2: power cap, hardware thermal")
    assert "gpu_power_worst" not in told and not any("energy" in name for name in told)
    assert gpus.summary([blind, blind]) == {} and gpus.summary([COOL])["gpu_clock"] == 1980 and "gpu_clock_min" not in gpus.summary([COOL])
    many = gpus.summary([HOT] * 20)
    assert many["gpu_throttled"] == 20 and many["gpu_throttle"].count("rank") == 8 and many["gpu_throttle"].endswith("; ...")


def test_energy_a_token_by_hand():
    def row(**figures):
        return gpus.pack({f"gpu_{name}": value for name, value in figures.items()})
    meter = gpus.Energy()
    assert meter.read([row(energy=100.0), row(energy=500.0)], tokens=1000, now=0.0) is None
    assert meter.read([row(energy=400.0), row(energy=700.0)], tokens=1500, now=10.0) == (300 + 200) / 500
    # One was loaded anew and counts from 0: its mean power of 250 W for 4 s. The other tells no energy at all.
    assert meter.read([row(energy=5.0, power=200.0), row(power=300.0)], tokens=1600, now=11.0) is None
    assert meter.read([row(energy=1.0, power=300.0), row(power=100.0)], tokens=2000, now=15.0) == (250 * 4 + 200 * 4) / 400
    assert meter.read([row(energy=2.0, power=300.0), row(power=100.0)], tokens=2000, now=16.0) is None, "no tokens in between"
    assert meter.read([row(), row(power=100.0)], tokens=2100, now=17.0) is None


def test_the_journal_of_two_ranks(tmp_path):
    """Two ranks, each with a GPU that pynvml's stand-in invents; a device that torch's stand-in calls an H100; FP8."""
    spawn([str(ROOT / "tests" / "gpu_ranks.py"), str(tmp_path)], 2, timeout=300, WANDB_MODE="disabled")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [(1, 2.0), (2, 2.0), (3, 1.5)], "rewound to 2 after step 4"
    assert ["gpu_power" in record for record in records] == [False, True, False] and "energy_per_token" not in records[1]
    last = json.loads((tmp_path / "step_4.json").read_text())
    assert (last["gpu_power"], last["gpu_power_min"], last["gpu_power_max"]) == (150.0, 100.0, 200.0)
    assert (last["gpu_temperature_max"], last["gpu_temperature_worst"], last["gpu_throttled"]) == (61, 1, 1)
    # Between the readings of steps 2 and 4 rank 0 used 1,000 J and rank 1 3,000 J, for two steps of 64 tokens.
    assert last["energy_per_token"] == 4000 / 128
    # One layer of hidden 64 with 4 heads of 16, 2 key/value heads and a gated width of 128, all in FP8; sequence 32, 100 words; two devices, 64 tokens/s.
    linear, other = 2 * 2 * 64 * 64 + 2 * 2 * 64 * 32 + 3 * 2 * 64 * 128, 4 * 64 * 32 + 2 * 64 * 100
    assert last["mfu"] == pytest.approx(3 * (linear / 1978.9e12 + other / 989.4e12) * 64 / 2, rel=1e-12)
    found = read((tmp_path / "metrics.prom").read_text())
    assert found["megatron_ext_restarts"]["samples"] == {frozenset({("run", str(tmp_path)), ("stage", "pretrain")}): 1}
    shown = (tmp_path / "before_the_end.prom").read_text()
    assert not list((tmp_path / "collector").iterdir())
    assert {dict(labels)["rank"]: value for labels, value in read(shown)["megatron_ext_gpu_power_watts"]["samples"].items()} == {"0": 100.0, "1": 200.0}


def test_no_torch_is_needed_to_publish():
    code = "import sys, megatron_ext.observe.prometheus, megatron_ext.observe.gpus, megatron_ext.private; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout == "False\n"
