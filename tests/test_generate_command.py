"""`generate` and `evaluate` from a checkpoint, as a person types them: one tiny training, read back at other layouts; what is refused."""
import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small import command, environment

from megatron_ext.cli.main import main

KEYS = {"prompt", "completion", "text", "stop", "sample", "seed", "prompt_tokens", "tokens", "logprobs", "raw_logprobs"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_data) -> Path:
    """A run directory with one checkpoint, written in two pipeline stages of two chunks each; its data and tokenizer lie elsewhere."""
    directory = tmp_path_factory.mktemp("generate") / "run"
    words = ("model.num_layers=4", "parallel.pp=2", "parallel.vpp=2", "launch.ranks=2", "launch.timeout=60", "log.wandb=disabled")
    train = command(directory, small_data, *words)
    done = subprocess.run(train, env=environment(), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def here(*words: str) -> str:
    """What a command of one rank prints: it runs in this process."""
    out, threads = io.StringIO(), os.environ.get("OMP_NUM_THREADS")
    try:
        with contextlib.redirect_stdout(out):
            assert main(words) == 0
    finally:
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = threads
    return out.getvalue()


def in_two_ranks(*words: str, stdin: str | None = None) -> str:
    done = subprocess.run([sys.executable, "-m", "megatron_ext", *words], env=environment(), capture_output=True, text=True, timeout=500,
                          check=False, input=stdin or "")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def printed(run, tmp_path_factory) -> dict[str, str]:
    """What each command printed."""
    file = tmp_path_factory.mktemp("prompts") / "한국어, prompts.txt"
    file.write_text("def f(\n\n대한민국의 수도는?\n", encoding="utf-8")
    prompts = ("--prompt", "def main(", "--prompt", "대한민국의 수도는?")
    load, validation = f"checkpoint.load={run}", "evaluate.split=validation"
    some = ("generate.max_tokens=6", "generate.temperature=0.8", "generate.samples=2", "generate.seed=3")
    return {
        "json": here("generate", load, *some, *prompts, "--json"),
        "text": here("generate", load, *some, "--prompt", "def main("),
        "file": here("generate", load, *some, "--prompt-file", str(file), "--json"),
        "evaluate": here("evaluate", load, validation, "--json"),
        "evaluate/text": here("evaluate", load, "evaluate.samples=5"),
        "tp2": in_two_ranks("generate", load, *some, *prompts, "--json", "parallel.tp=2", "generate.batch_size=3"),
        "stdin": in_two_ranks("generate", load, *some, "--json", "launch.ranks=2", stdin="def f(\n대한민국의 수도는?\n"),
        "evaluate/tp2": in_two_ranks("evaluate", load, validation, "evaluate.batch_size=3", "parallel.tp=2", "parallel.sp=true", "--json"),
    }


def test_generate_prints_one_object_with_everything(printed, run):
    found = json.loads(printed["json"])
    assert found["checkpoint"].endswith("step_00000008") and found["step"] == 8 and found["seed"] == 3
    assert [one["prompt"] for one in found["completions"]] == ["def main("] * 2 + ["대한민국의 수도는?"] * 2
    for number, one in enumerate(found["completions"]):
        assert set(one) == KEYS and one["sample"] == number
        assert one["text"] == one["prompt"] + one["completion"] and one["stop"] in ("max_tokens", "eod")
        assert len(one["tokens"]) == len(one["logprobs"]) == len(one["raw_logprobs"]) <= 6
        assert all(value <= 0 for value in one["logprobs"] + one["raw_logprobs"])


def test_generate_reads_an_interleaved_checkpoint_at_other_layouts(printed):
    one, other = (json.loads(printed[name])["completions"] for name in ("json", "tp2"))
    assert [c["tokens"] for c in one] == [c["tokens"] for c in other]
    assert json.loads(printed["tp2"])["layout"]["tp"] == 2


def test_generate_prints_text(printed):
    samples = [one["text"] for one in json.loads(printed["json"])["completions"][:2]]
    assert printed["text"] == "\n\n".join(samples) + "\n"


def test_prompts_come_from_a_file_or_standard_input(printed):
    """A prompt a line, read once for all ranks; two ranks share the prompts out."""
    one, other = (json.loads(printed[name])["completions"] for name in ("file", "stdin"))
    assert [c["prompt"] for c in one] == ["def f("] * 2 + ["대한민국의 수도는?"] * 2
    assert [(c["prompt"], c["tokens"]) for c in one] == [(c["prompt"], c["tokens"]) for c in other]


def test_evaluate_prints_what_was_found(printed):
    found = json.loads(printed["evaluate"])
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2) / found["bytes_per_token"])
    assert found["tokens"] == found["sequences"] * found["sequence_length"] and found["sequence_length"] == 32
    other = json.loads(printed["evaluate/tp2"])
    assert (other["tokens"], other["layout"]["tp"]) == (found["tokens"], 2)
    assert other["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert "on test: loss" in printed["evaluate/text"] and "(160 tokens in 5 sequences)" in printed["evaluate/text"]


# ---- what is refused: exit code 2, one line -----------------------------------------------------------------------------------------


def refused(capsys, *words: str) -> str:
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", ""), "--prompt=: is empty"),
        (("--prompt-file", "/no/such"), "--prompt-file=/no/such: cannot be read"),
        (("--prompt", "x", "generate.top_p=1.5"), "generate.top_p=1.5: must be greater than 0 and at most 1"),
        (("--prompt", "x", "generate.temperature=-1"), "generate.temperature=-1"),
        (("--prompt", "x", "parallel.pp=3"), "parallel.pp=3: must divide model.num_layers=4"),
        (("--prompt", "x", "parallel.tp=8"), "parallel.tp=8: must divide"),
        (("--prompt", "x", "parallel.pp=2", "parallel.vpp=2"), "parallel.vpp=2: generation runs without interleaved stages"),
        (("--prompt", "x", "model.hidden_size=128"), "model.hidden_size=128: the model of .* has 64; leave model keys out"),
        (("--prompt", "x " * 40, "model.max_sequence_length=20"), r"prompt=x x .*\.\.\.: has \d+ tokens; .*at most 19"),
        (("--prompt", "x", "launch.ranks=2", "parallel.tp=4"), "launch.ranks=2: must be a multiple"),
    ],
)
def test_what_generate_refuses(run, capsys, words, message):
    import re

    error = refused(capsys, "generate", f"checkpoint.load={run}", *words)
    assert re.search(message, error), error


def test_prompts_that_are_no_text(run, capsys, tmp_path):
    (tmp_path / "latin").write_bytes("caf\xe9".encode("latin-1"))
    assert "is not UTF-8 text (byte 3)" in refused(capsys, "generate", f"checkpoint.load={run}", "--prompt-file", str(tmp_path / "latin"))
    (tmp_path / "blank").write_text("\n  \n")
    assert "holds no prompt" in refused(capsys, "generate", f"checkpoint.load={run}", "--prompt-file", str(tmp_path / "blank"))
    assert "is not UTF-8 text" in refused(capsys, "generate", f"checkpoint.load={run}", "--prompt", "\udcff")


def test_checkpoints_that_are_not_there(capsys, tmp_path):
    for verb in ("generate", "evaluate"):
        prompt = ("--prompt", "x") if verb == "generate" else ()
        assert "checkpoint.load=null" in refused(capsys, verb, *prompt)
        assert "checkpoint.load=/no/such" in refused(capsys, verb, "checkpoint.load=/no/such", *prompt)
        assert "holds no complete checkpoint" in refused(capsys, verb, f"checkpoint.load={tmp_path}", *prompt)
        assert "holds no complete checkpoint" in refused(capsys, verb, "checkpoint.load=auto", f"run.dir={tmp_path}", *prompt)


def test_a_run_without_its_tokenizer(run, small_data, capsys, tmp_path):
    """It is looked for beside the checkpoint, then in the data; another one is never taken."""
    from megatron_ext.config.compose import compose
    from megatron_ext.train.restored import source

    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    (moved / "tokenizer.json").unlink()
    load = f"checkpoint.load={moved}"
    assert source(compose([load]), [load]).tokenizer().vocab_size == 500, "the training data still has it"
    words = [load, f"data.path={tmp_path}"]
    (tmp_path / "tokenizer.json").write_text((small_data / "tokenizer.json").read_text() + "\n")
    assert "another one; name its file" in refused(capsys, "generate", *words, "--prompt", "x")
    named = [*words, f"data.tokenizer={run / 'tokenizer.json'}"]
    assert source(compose(named), named).tokenizer().vocab_size == 500


def test_data_of_another_tokenizer(run, capsys, tmp_path):
    from small import prepare_text

    other = prepare_text(tmp_path, vocab_size=400)
    error = refused(capsys, "evaluate", f"checkpoint.load={run}", f"data.path={other}")
    assert f"data.path={other}: was made with another tokenizer" in error


def test_a_damaged_checkpoint_is_refused_by_every_reader(run, capsys, tmp_path):
    """One byte of the weights flipped."""
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    shard = max((moved / "checkpoints").glob("step_*/shard_*.bin"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    try:
        assert f"{shard.name} is damaged" in refused(capsys, "generate", f"checkpoint.load={moved}", "--prompt", "x")
        assert f"{shard.name} is damaged" in refused(capsys, "evaluate", f"checkpoint.load={moved}")
    finally:
        from megatron_ext import platform

        platform.disconnect()


def test_what_was_typed_wins_where_it_may(run, tmp_path):
    from megatron_ext.config.compose import compose
    from megatron_ext.train.restored import source

    def merged(*words: str):
        typed = [f"checkpoint.load={run}", *words]
        return source(compose(typed), typed).config

    plain = merged()
    assert (plain.model.hidden_size, plain.data.sequence_length, plain.precision.dtype) == (64, 32, "fp32")
    assert (plain.parallel.pp, plain.parallel.vpp, plain.launch.ranks) == (1, None, 1), "the layout is this command's"
    typed = merged("precision=bf16", "data.sequence_length=16", "generate.seed=9")
    assert (typed.precision.dtype, typed.data.sequence_length, typed.data.path, typed.generate.seed) == ("bf16", 16, plain.data.path, 9)
    assert merged("data.paths=[a,b]").data.path is None, "the two name the data together"
