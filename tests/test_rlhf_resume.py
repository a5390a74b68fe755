"""ppo killed by SIGKILL in each phase of an iteration goes on as if nothing had happened: every number and every tensor to the last bit."""
import signal
from pathlib import Path

import pytest
from rlhf_small import ppo_words, run
from small import newest, records

from megatron_ext.checkpoint import read_record
from megatron_ext.checkpoint.compare import compare

STATE = ("ppo.kl_target=0.05", "ppo.kl_horizon=20", "ppo.ema=0.9", "checkpoint.every=1", "checkpoint.keep=0", "checkpoint.background=false")
TIMES = ("seconds", "share", "tokens_per_second")  # what no two runs have in common


@pytest.fixture(scope="module")
def chain(rlhf_chain):
    return rlhf_chain


@pytest.fixture(scope="module")
def whole(chain, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    run("ppo", directory, *ppo_words(chain, *STATE))
    return directory


def numbers(directory: Path) -> list[dict]:
    return [{name: value for name, value in one.items() if not name.startswith(TIMES)} for one in records(directory)]


@pytest.mark.parametrize("moment", ["rollout:2", "scoring:3", "policy:2", "critic:1"])
def test_a_kill_in_any_phase_changes_nothing(chain, whole, tmp_path, moment):
    directory, words = tmp_path / "run", ppo_words(chain, *STATE, "checkpoint.load=auto")
    killed = run("ppo", directory, *words, code=-signal.SIGKILL, script=(str(Path(__file__).with_name("rlhf_killed.py")), moment))
    assert killed.returncode == -signal.SIGKILL and len(records(directory)) == int(moment[-1]) - 1
    run("ppo", directory, *words)
    assert numbers(directory) == numbers(whole)
    assert records(directory, "samples") == records(whole, "samples") != []
    assert compare(newest(directory), newest(whole)) == []
    mine, theirs = read_record(newest(directory)), read_record(newest(whole))
    for name in ("kl", "roles", "criteria", "samples", "tokens", "parent"):
        assert mine[name] == theirs[name], name
    assert mine["kl"]["value"] != 0.02  # the controller has moved, so that losing it would show


def test_a_kill_of_two_ranks_changes_nothing(chain, tmp_path):
    """In the update of the critic, by a torchrun whose ranks die at once; tensor parallel."""
    words = ppo_words(chain, *STATE, "checkpoint.load=auto", "parallel.tp=2", "launch.ranks=2")
    run("ppo", tmp_path / "whole", *words)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(Path(__file__).with_name("rlhf_killed.py")), "critic:2")
    run("ppo", tmp_path / "run", *words, code=1, script=torchrun)
    assert len(records(tmp_path / "run")) == 1
    run("ppo", tmp_path / "run", *words)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert compare(newest(tmp_path / "run"), newest(tmp_path / "whole")) == []


@pytest.mark.parametrize(("moment", "done"), [("rollout:2:SIGUSR1", 1), ("scoring:2:SIGTERM", 1), ("policy:2:SIGUSR1", 2)])
def test_a_run_that_is_told_to_stop_saves_what_is_whole_and_goes_on(chain, whole, tmp_path, moment, done):
    """In rollout and scoring nothing has been learnt yet: the iteration is left, and done again. An update is finished first."""
    directory, words = tmp_path / "run", ppo_words(chain, *STATE, "checkpoint.every=0", "checkpoint.load=auto")
    run("ppo", directory, *words, code=75, script=(str(Path(__file__).with_name("rlhf_killed.py")), moment))
    assert len(records(directory)) == done and newest(directory).name == f"step_{done:08d}"
    (stop,) = [event for event in records(directory, "events") if event["kind"] == "stop"]
    assert stop["criterion"] == "signal" and moment.split(":")[2] in stop["reason"]
    run("ppo", directory, *words)
    assert numbers(directory) == numbers(whole)
    assert compare(newest(directory), newest(whole)) == []


def test_iterations_draw_new_responses(whole):
    """A fixed seed at each rollout would give an iteration with the same prompts the same responses; here rewards and lengths differ."""
    assert len({one["reward"] for one in records(whole)}) == 3


def test_first_iteration_is_at_the_reference(whole):
    first = records(whole)[0]
    assert abs(first["kl_k1"]) < 1e-6 and abs(first["kl_k3"]) < 1e-9 and first["first_ratio_max"] == 1.0 and first["first_clip_fraction"] == 0.0
    assert records(whole)[-1]["kl_k3"] > 1e-4


def test_another_reference_is_refused(chain, whole, tmp_path):
    """The reference is that of the start: a resume that finds another model there says so instead of measuring KL against it."""
    import shutil

    copied = tmp_path / "pretrain"
    shutil.copytree(chain["pretrain"], copied)
    words = ppo_words(dict(chain, pretrain=copied), *STATE, "checkpoint.load=auto")
    directory = tmp_path / "run"
    run("ppo", directory, *words, "train.steps=1")
    shutil.rmtree(copied / "checkpoints")
    done = run("ppo", directory, *words, "train.steps=2", code=2)
    assert "checkpoint.start" in done.stderr


@pytest.mark.parametrize("word", ["rollout.prompts=12", "rollout.samples=2"])
def test_another_number_of_prompts_is_refused(chain, whole, tmp_path, word):
    """The place in the data is counted in iterations."""
    done = run("ppo", tmp_path / "run", *ppo_words(chain, *STATE, f"checkpoint.load={whole}", "train.steps=4", word), code=2)
    assert "an iteration: 6 / 12" in done.stderr or "a prompt: 1 / 2" in done.stderr
