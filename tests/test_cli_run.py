"""The main job's own parts: its recipe, its sub-commands, the vocabulary of prepared data. Its steps have tests of their own."""
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_ext import pipeline
from megatron_ext.cli import recipe, vocabulary
from megatron_ext.config.compose import compose
from megatron_ext.config.validate import validate
from megatron_ext.data.prepare import prepare
from megatron_ext.errors import UserError


def test_the_recipe_is_valid_and_has_prompts():
    config = compose(recipe.with_defaults([]))
    validate(config, "run")
    assert config.launch.ranks == 2 and config.parallel.tp == 2
    assert recipe.read()["prompts"]


def test_the_command_line_has_the_last_word():
    words = recipe.with_defaults(["train.steps=7", "optim=adamw", "parallel.tp=1"])
    config = compose(words)
    assert config.train.steps == 7 and config.parallel.tp == 1 and config.launch.ranks == 2
    assert not [word for word in words if word.startswith("optim.")]  # a group that is chosen is taken as it is


def test_commands_tell_their_exit_code():
    assert "parameters" in pipeline.command("check", capture=True)
    with pytest.raises(pipeline.StepFailed) as failed:
        pipeline.command("check", "train.steps=x")
    assert failed.value.code == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_signals_reach_a_command(monkeypatch, tmp_path):
    script = tmp_path / "sleeper.py"
    script.write_text("import time\ntime.sleep(60)\n")
    started = []
    real = pipeline.subprocess.Popen

    def popen(words, **settings):
        started.append(real([sys.executable, str(script)], **settings))
        return started[0]

    monkeypatch.setattr(pipeline.subprocess, "Popen", popen)

    before = signal.getsignal(signal.SIGTERM)

    def interrupt() -> None:
        while not started or signal.getsignal(signal.SIGTERM) == before:  # until then it would end the tests
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(pipeline.StepFailed) as failed:
        pipeline.command("train")
    assert failed.value.code == 128 + signal.SIGTERM and started[0].poll() is not None


def test_sub_commands_read_the_prepared_data():
    job = pipeline.Job(compose(), ("input=/tmp/한국어,1.txt", "train.steps=7", "ppo:train.steps=9", "checkpoint.load=auto"), (), report=print)
    for stage, steps in (("sft", "train.steps=7"), ("ppo", "train.steps=9")):
        words = job.read_words(stage, Path("outputs/data/a=b"))
        assert steps in words and words[-2:] == ["data.path=outputs/data/a=b", f"run.dir=outputs/run/{stage}"]
        assert not [word for word in words if word.startswith(("input", "ppo:"))]


def test_stages_start_from_the_one_before():
    job = pipeline.Job(compose(), (), (), report=print)
    assert [job.parent(stage) for stage in job.config.run.stages] == [None, "pretrain", "adapt", "sft", "sft"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.jsonl").write_text("".join(f'{{"text": "line {i} of some text"}}\n' for i in range(200)))
    prepare(compose(["data.vocab_size=300", "data.workers=1"]).data, str(folder / "text.jsonl"), folder / "data", progress=False)
    return folder / "data"


def test_prepared_data_says_how_many_words_there_are(prepared):
    config = compose([f"data.path={prepared}", "model.vocab_multiple=128"])
    found = vocabulary.words(config)
    assert 257 <= found <= 300 and "padded to 384 rows" in vocabulary.padding_note(config, found)
    assert vocabulary.padding_note(compose(["model.vocab_multiple=1"]), found) is None
    assert vocabulary.words(compose()) is None


def test_a_model_with_fewer_words_than_the_tokenizer_is_refused(prepared):
    with pytest.raises(UserError, match=r"model\.vocab_size=100: is below the"):
        vocabulary.words(compose([f"data.path={prepared}", "model.vocab_size=100"]))
    with pytest.raises(UserError, match=r"data\.path=/no/such"):
        vocabulary.words(compose(["data.path=/no/such"]))
