"""Reward functions that raise, hang, die or talk nonsense: named, counted, replaced by the mean of the others; and the run goes on."""
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from megatron_ext.config.schema import RewardsConfig
from megatron_ext.errors import RunFailed, UserError
from rlhf.rewards import Functions
from rlhf.rewards.runner import MOST_LOST

ROOT = Path(__file__).resolve().parent.parent
ODD = """
import os, random, signal, subprocess, sys, time
from rlhf.rewards import Unanswerable

def function(body):
    def run(prompt, response, *, reference, record):
        return body(response) if response.startswith("bad") else float(len(response))
    return run

def raises(response):
    raise ValueError("the prompt was: " + response)

def leaves(response):
    os._exit(3)

def crashes(response):
    os.kill(os.getpid(), signal.SIGSEGV)

def hangs(response):
    subprocess.Popen(["sleep", "61.37"])
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass

def unanswerable(response):
    raise Unanswerable("the record has no colour")

good, raising, leaving, crashing = function(len), function(raises), function(leaves), function(crashes)
hanging, exiting, unable = function(hangs), function(sys.exit), function(unanswerable)
nan, infinite, nothing, text, huge = (function(lambda response, value=value: value) for value in (float("nan"), -float("inf"), None, "1.5", 10**400))
complex_, listed, truth, whole = (function(lambda response, value=value: value) for value in (1j, [1.0], True, 7))

def chance(prompt, response, *, reference, record):
    return random.random()

def talks(prompt, response, *, reference, record):
    print('{"value": 3}')
    os.write(1, b'{"value": 4}\\n')
    return float(sys.stdin.read() == "")

def sees(prompt, response, *, reference, record, factor: float = 1.0):
    return factor * (len(prompt) + 10 * len(response) + 100 * len(reference or "") + 1000 * record["n"] + 10000 * ("torch" in sys.modules))

def slow(prompt, response, *, reference, record):
    time.sleep(0.05)
    return float(os.getpid())

def always(prompt, response, *, reference, record):
    return 1 / (response != "bad")

def where(prompt, response, *, reference, record):
    return float(os.environ["PYTHONHASHSEED"] == "0" and "RANK" not in os.environ and os.path.dirname(os.environ["TMPDIR"]) == record["folder"])
"""


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch, tmp_path):
    """The module, a folder for temporary files that is empty at the end, and no process that was not there before."""
    (tmp_path / "odd_rewards.py").write_text(ODD)
    monkeypatch.syspath_prepend(tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    sys.modules.pop("odd_rewards", None)
    assert list(scratch.iterdir()) == []
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    left = [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", "61.37"]]
    assert psutil.wait_procs(left, timeout=30)[1] == []  # killed a moment ago, it may still be there


def functions(*names: str, timeout: float = 60.0, workers: int | None = None) -> Functions:
    entries = tuple(name if name.partition(":")[0] in ("code", "exact_match", "length") else f"odd_rewards:{name}" for name in names)
    return Functions(RewardsConfig(functions=entries, timeout=timeout), workers=workers)


def ask(asked: Functions, responses: list[str], records: list[dict] | None = None, references: list[str | None] | None = None):
    return asked(["a prompt"] * len(responses), responses, records or [{}] * len(responses), references or [None] * len(responses))


def test_what_goes_wrong_is_named_and_counted(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    names = ("good", "raising", "nan", "infinite", "nothing", "text", "huge", "complex_", "listed", "truth", "whole", "exiting", "unable", "leaving", "crashing", "talks")
    with functions(*names) as asked:
        values, failures = ask(asked, ["a", "bad", "four", "bad 2"])
        # by hand: a function without a value for the bad ones has 1 and 4 for the others
        assert list(values) == list(names) == list(asked.names)
        assert values["good"] == [1, 3, 4, 5] and values["truth"] == [1, 1, 4, 1] and values["whole"] == [1, 7, 4, 7] and values["talks"] == [1] * 4
        assert all(values[name] == [1, 2.5, 4, 2.5] for name in names if name not in ("good", "truth", "whole", "talks"))
        line = 1 + next(number for number, line in enumerate(ODD.split("\n")) if "return body(response)" in line)
        assert failures == [
            ("raising", f"raised ValueError in line {line} of odd_rewards.py", 2), ("nan", "returned nan", 2), ("infinite", "returned -inf", 2),
            ("nothing", "returned a NoneType, no number", 2), ("text", "returned a str, no number", 2),
            ("huge", "returned a int that is no float (OverflowError)", 2), ("complex_", "returned a complex, no number", 2),
            ("listed", "returned a list, no number", 2), ("exiting", f"raised SystemExit in line {line} of odd_rewards.py", 2),
            ("unable", "the record has no colour", 2), ("leaving", "ended its process (exit code 3)", 2),
            ("crashing", "ended its process (signal SIGSEGV)", 2),
        ]  # fmt: skip
        assert "the prompt" not in json.dumps(failures)
        again = ask(asked, ["a", "four"])  # and it goes on
        assert again.failures == [] and again.values["leaving"] == [1, 4]


def test_what_functions_get(tmp_path):
    with functions("sees", "sees:factor=0.5", "exact_match", "where") as asked:
        records = [{"n": 1, "folder": str(tmp_path / "scratch")}, {"n": 2, "folder": "", "other": object()}]
        values, failures = asked(["ab", ""], ["abc", "\ud800안\n"], records, ["abc", None])
        assert values == {"sees": [1332.0, 2030.0], "sees_2": [666.0, 1015.0], "exact_match": [1.0, 1.0], "where": [1.0, 0.0]}
        assert failures == [("exact_match", "the record has no reference", 1)]
        assert ask(asked, []).values == {name: [] for name in values}
        with pytest.raises(ValueError):
            asked(["a"], ["b", "c"], [{}], [None])
    with pytest.raises(ValueError, match="closed"):
        ask(asked, ["a"])
    asked.close()


def test_one_that_hangs():
    with functions("hanging", "good", timeout=1.5) as asked:
        started = time.monotonic()
        values, failures = ask(asked, ["a", "bad", "four"])
        assert values == {"hanging": [1, 2.5, 4], "good": [1, 3, 4]} and failures == [("hanging", "took longer than rewards.timeout=1.5 s", 1)]
        assert time.monotonic() - started >= 1.5


def test_one_that_always_loses_its_process_is_not_asked_for_ever():
    with functions("leaving", "good", workers=1) as asked:
        values, failures = ask(asked, ["bad"] * 8 + ["a"])
        assert values["good"] == [3] * 8 + [1] and values["leaving"] == [0.0] * 9  # "a" was not asked about either
        assert failures == [("leaving", "ended its process (exit code 3)", MOST_LOST),
                            ("leaving", f"was not asked after it had lost {MOST_LOST} processes", 9 - MOST_LOST)]
        assert ask(asked, ["four", "a"]).values["leaving"] == [4, 1]  # a scoring later it may show that it is better


def test_total_failure_ends_the_run_at_the_third_time_in_a_row():
    with functions("always", "good") as asked:
        for responses in (["bad"] * 2, ["bad"], ["bad", "a"], ["bad"], []):
            values, failures = ask(asked, responses)
            assert values["always"] == ([1.0] * 2 if "a" in responses else [0.0] * len(responses))
            assert sum(count for *_, count in failures) == responses.count("bad")
        ask(asked, ["bad"])
        reason = r"raised ZeroDivisionError in line \d+ of odd_rewards.py \(2 times\)"
        with pytest.raises(RunFailed, match=rf"always has failed on every response of 3 scorings in a row: {reason}"):
            ask(asked, ["bad", "bad"])


def test_scores_do_not_depend_on_how_many_processes_there_are():
    responses = [f"{number} {'w ' * (number % 7)}" for number in range(24)]
    found = []
    for workers in (1, 3):
        with functions("chance", "length", "slow", workers=workers) as asked:
            found.append([ask(asked, responses).values, ask(asked, responses).values])
            while len(set(found[-1][-1]["slow"])) < workers:  # a process that has just been started may be late for all of a scoring
                found[-1].append(ask(asked, responses).values)
        assert len(set(found[-1][-1]["slow"])) == workers
    assert all(one[name] == found[0][0][name] for both in found for one in both for name in ("chance", "length"))
    assert len(set(found[0][0]["chance"])) == 24 and found[0][0]["length"][1] == math.exp(-38 / 20)


def test_code_is_run():
    records = [{"tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}, {"tests": "assert add(2, 2) == 4"}, {"tests": ["assert add(1, 1) == 2"] * 4},
               {"stdin": ["1 2\n", "5"], "stdout": ["3\n", "5"]}, {"stdout": "hello\n"}, {"prefix": "def add(a, b):\n", "tests": ["assert add(1, 2) == 3"]},
               {}, {"tests": []}, {"stdin": ["1"], "stdout": ["1", "2"]}]  # fmt: skip
    responses = ["So:\n```python\ndef add(a, b):\n    return a + b\n```", "def add(a, b): return a * b", "def add(a, b): return a - b",
                 "print(sum(map(int, input().split())) if 1 else 0)", "print('hello  ')", "    return a + b", "1", "1", "1"]  # fmt: skip
    with functions("code:seconds=30", "code:seconds=30:partial=false") as asked:
        values, failures = ask(asked, responses, records)
    known = [1, 1, 0, 1, 1, 1, None, None, None]
    assert values["code"] == values["code_2"] == [5 / 6 if one is None else one for one in known]
    assert failures[:3] == [("code", reason, 1) for reason in ("the record has neither tests nor stdout", "the record's tests is no text and no list of texts",
                                                              "the record's stdin and stdout differ in number")]  # fmt: skip
    with functions("code:seconds=1", "code:seconds=1:partial=false") as asked:
        assert ask(asked, ["while True: pass"], [{"tests": ["1"]}]) == ({"code": [0.0], "code_2": [0.0]}, [])
    with functions("code", "code:partial=false") as asked:
        values, _ = ask(asked, ["def f(): return 1"] * 2, [{"tests": ["assert f() == 1", "assert f() == 2"]}, {"stdout": ["", "no"]}])
    assert values == {"code": [0.5, 0.5], "code_2": [0.0, 0.0]}


def test_it_starts_late_and_fails_early():
    before = len(psutil.Process().children())
    with functions("good", "length"):
        assert len(psutil.Process().children()) == before
    with pytest.raises(UserError, match="has no function god; did you mean good"):
        functions("good", "god")
    asked = functions("good")
    Path(sys.modules["odd_rewards"].__file__).write_text("")  # between the check and the first scoring
    with asked, pytest.raises(RunFailed, match="has no function good"):
        ask(asked, ["a"])


def test_processes_that_die_between_scorings_are_replaced():
    with functions("good", "slow", workers=2) as asked:
        ask(asked, ["a"] * 12)
        for child in psutil.Process().children():
            child.kill()
        while any(child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process().children()):
            time.sleep(0.05)
        values, failures = ask(asked, ["a", "four"])
        assert values["good"] == [1, 4] and failures == []


def line(process: psutil.Process) -> list[str]:
    """Its command line; none where it has ended since it was found, as a sandbox does all the time."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def test_the_end_of_the_run_is_the_end_of_its_functions(tmp_path):
    """Killed while a function hangs; and none of it imported torch."""
    script = """
import sys
from megatron_ext.config.schema import RewardsConfig
from rlhf.rewards import Functions
functions = Functions(RewardsConfig(functions=("odd_rewards:hanging", "code"), timeout=100.0))
assert "torch" not in sys.modules
functions(["a"] * 2, ["bad"] * 2, [{}] * 2, [None] * 2)
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "TMPDIR": str(tmp_path)}
    run = subprocess.Popen([sys.executable, "-c", script], env=environment)
    children, end = [], time.monotonic() + 180
    while not any(line(child) == ["sleep", "61.37"] for child in children):
        assert time.monotonic() < end and run.poll() is None
        time.sleep(0.1)
        children = psutil.Process(run.pid).children(recursive=True)
    workers = [child for child in children if "rlhf.rewards.worker" in line(child)]
    assert workers
    run.send_signal(signal.SIGKILL)
    run.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []
    for child in children:  # what a function has started by itself is its own business when everything is killed
        if line(child) == ["sleep", "61.37"]:
            child.kill()
            child.wait()
