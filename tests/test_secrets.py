"""Secrets reach no file and no message; run directories belong to their owner alone."""
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from small import ROOT, records, train

from megatron_ext.config.build import key_types
from megatron_ext.config.compose import compose, from_yaml, to_yaml
from megatron_ext.errors import UserError
from megatron_ext.observe.events import Events, read_events
from megatron_ext.private import make_directory, own_files, umask
from megatron_ext.redact import MARK, Redactor, environment_secrets, is_secret_key

KEY = "0123456789abcdef0123456789abcdef01234567"
HELD = {  # what an environment may hold; the first four are secrets
    "WANDB_API_KEY": KEY, "DATABASE_URL": "postgres://bob:s3cret%2Fpw@db/x", "SERVICE_KEY": "zz top/key+1=", "ACCOUNT_PAT": "12345678901234567890",
    "TOKENIZERS_PARALLELISM": "false", "PASSWORD": "abc", "HF_TOKEN_PATH": "/home/bob/token", "NOTHING_SECRET": "", "API_KEY": "true", "MASTER_PORT": "29500",
}


# --- what is a secret

@pytest.mark.parametrize(("text", "written"), [
    (f"POST failed: {KEY}.", f"POST failed: {MARK}."),
    ("login s3cret%2Fpw", f"login {MARK}"),
    ("?q=zz%20top%2Fkey%2B1%3D", f"?q={MARK}"),
    ("postgres://bob:other@db/x", f"postgres://{MARK}@db/x"),
    ("https://abcdefghij0123456789@github.com/a.git", f"https://{MARK}@github.com/a.git"),
    ("password=hunter2, tries=1", f"password={MARK}, tries=1"),
    ("passwd: 1234", f"passwd: {MARK}"),
    ("judge:api_key=abc", f"judge:api_key={MARK}"),
    ("judge:API_KEY='a b c'", f"judge:API_KEY='{MARK}'"),
    ("{'password': 'a, b', 'n': 2}", f"{{'password': '{MARK}', 'n': 2}}"),
    ('{"clientSecret": "x\\"y", "n": 2}', f'{{"clientSecret": "{MARK}", "n": 2}}'),
    (repr("line\npassword=x\nline"), repr(f"line\npassword={MARK}\nline")),
    ("export HF_TOKEN=abcdefgh1", f"export HF_TOKEN={MARK}"),
    ("Authorization: Bearer abcdef123456.x", f"Authorization: {MARK}"),
    ("sent Bearer abcdef123456.x", f"sent Bearer {MARK}"),
    ("https://s3/x?X-Amz-Signature=dead&b=2", f"https://s3/x?X-Amz-Signature={MARK}&b=2"),
    ("https://h/x?sig=dead&key=k", f"https://h/x?sig={MARK}&key={MARK}"),
    ("cluster.api_key=xyz: must be shorter", f"cluster.api_key={MARK}: must be shorter"),
    ("with hf_abcdefghijklmnopqrst", f"with {MARK}"), ("ghp_abcdefghijklmnopqrst0123", MARK), ("sk-proj-abcdefghij0123456789", MARK),
    ("AKIAABCDEFGHIJKLMNOP", MARK), ("xoxb-1234567890-abc", MARK), ("nvapi-abcdefghij0123456789", MARK), ("eyJhbGciOiJI.eyJzdWIiOiIx.SflKxw", MARK),
    ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----\nend", f"{MARK}\nend"),
    ("-----BEGIN PRIVATE KEY-----\nMII", MARK),
])
def test_secrets_are_taken_out(text, written):
    redactor = Redactor(HELD)
    assert redactor.text(text) == written and redactor.text(written) == written


@pytest.mark.parametrize("text", [
    "data.tokenizer=/x/tokenizer.json: is not a file", "train.tokens=100000000, generate.max_tokens=64", "bytes_per_token=3.2876543210",
    "kl_per_token: 1.234567890e-05", "the end-of-document token: <|endoftext|>", "first token: hello", "token_file=/run/x1234567", "text_key=prompt",
    "sha256 " + "ab" * 32, "ssh://git@github.com/x.git", "task-generalisation-2-of-a-long-name", "Basic understanding", "https://host:8080/x?page=2",
    "secret_name: foo", "password: null", "password=", "user@host:/path/to", "09:15:00 step=3 loss=2.5", "", "abc", "false", "대한민국: 수도=서울",
])
def test_the_rest_stays(text):
    assert Redactor(HELD).text(text) == text


def test_values_of_the_environment():
    found = environment_secrets(HELD)
    assert set(found) == {KEY, "s3cret%2Fpw", "s3cret%252Fpw", "zz top/key+1=", "zz%20top%2Fkey%2B1%3D", "12345678901234567890"}
    assert list(found) == sorted(found, key=len, reverse=True)
    assert is_secret_key("SERVICE_KEY", environment=True) and not is_secret_key("service_key")


def test_a_file_that_a_variable_names_is_no_secret(tmp_path):
    (tmp_path / "credentials").write_text("")
    assert environment_secrets({"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "credentials")}) == ()
    assert "/abc/def+ghi" in environment_secrets({"AWS_SECRET_ACCESS_KEY": "/abc/def+ghi"})


def test_structures_keep_their_form():
    value = {"loss": 2.5, "tokens": 8192, "applied": True, "none": None, "token": 5, "eos_token": "<|endoftext|>", "prompt_key": "prompt",
             "nested": [{"api_key": "x", "url": "ftp://a:b@h"}, ("y", 1)], "password": "1234", "keys": ["a"], "path": Path("/a/b"),
             "secrets": ["one", "two"], f"at {KEY}": 1}
    got = Redactor(HELD)(value)
    assert got == {"loss": 2.5, "tokens": 8192, "applied": True, "none": None, "token": 5, "eos_token": "<|endoftext|>", "prompt_key": "prompt",
                   "nested": [{"api_key": MARK, "url": f"ftp://{MARK}@h"}, ("y", 1)], "password": MARK, "keys": ["a"], "path": "/a/b",
                   "secrets": [MARK, MARK], f"at {MARK}": 1}
    assert value["password"] == "1234", "the original stays"


def test_no_key_of_ours_is_taken_for_a_secret():
    assert [key for key in key_types() if is_secret_key(key)] == []
    config = compose(["run.dir=/scratch/bob/run-7", "data.tokenizer=/x/tokenizer.json", "chat.system='You answer: briefly.'", "rewards.functions=[length,format]"])
    assert from_yaml(to_yaml(config)) == config


def test_what_models_say_is_not_changed_unless_it_is_ours():
    redactor = Redactor(HELD, shapes=False)
    said = "def f(password='hunter2', url='http://a:b@c'): ..."
    assert redactor(said) == said and redactor({"password": said}) == {"password": said} and redactor(f"x {KEY}") == f"x {MARK}"


def test_events_are_written_without(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    events = Events(tmp_path / "events.jsonl")
    events.write("warning", text=f"401 for {KEY}", url="https://me:pw@host/x", step=3)
    assert {key: value for key, value in read_events(tmp_path / "events.jsonl")[0].items() if key != "time"} == {
        "kind": "warning", "text": f"401 for {MARK}", "url": f"https://{MARK}@host/x", "step": 3}


# --- messages of failed ranks

def test_what_a_failed_command_says(tmp_path):
    code = ("import os, sys; from megatron_ext.parallel.launch import guarded\n"
            "def body(): raise RuntimeError('cannot reach https://me:pa55@host with ' + os.environ['HF_TOKEN'])\n"
            "sys.exit(guarded(body))")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "SLURM_PROCID")} | {"HF_TOKEN": "hf_veryownsecret"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr and f"cannot reach https://{MARK}@host with {MARK}" in done.stderr
    assert "veryown" not in done.stderr + done.stdout and "pa55" not in done.stderr + done.stdout
    done = subprocess.run([sys.executable, "-m", "megatron_ext", "check", "checkpoint.load=https://me:pa55@host/run"], capture_output=True, text=True, cwd=ROOT,
                          env=environment, check=False)
    assert done.returncode == 2 and f"checkpoint.load=https://{MARK}@host/run: is not there" in done.stderr and "pa55" not in done.stderr + done.stdout


def test_the_chain_keeps_its_words_without_secrets(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from megatron_ext import pipeline

    words = (f"run.dir={tmp_path}", "rewards.functions=['code:api_key=abcdef']", "run.stages=[pretrain]")
    ran = []
    monkeypatch.setattr(pipeline, "command", lambda *told, **_: ran.append(told))
    job = pipeline.Job(compose(words), words, (), lambda finished: tmp_path)
    (tmp_path / "pretrain" / "checkpoints").mkdir(parents=True)
    for _ in range(2):
        job._stage("pretrain", SimpleNamespace(directory=tmp_path))
    assert len(ran) == 1 and "rewards.functions=['code:api_key=abcdef']" in ran[0], "the stage itself is told, once"
    assert "abcdef" not in (tmp_path / "chain.json").read_text() and MARK in (tmp_path / "chain.json").read_text()


# --- directories

def mode(path: Path) -> str:
    return f"{stat.S_IMODE(path.stat().st_mode):o}"


def test_directories_are_private_and_their_parents_are_not(tmp_path):
    before = os.umask(0o022)
    try:
        make_directory(tmp_path / "team" / "run", private=True)
        make_directory(tmp_path / "team" / "shared", private=False)
        (tmp_path / "there").mkdir(0o775)
        (tmp_path / "there").chmod(0o775)
        make_directory(tmp_path / "there", private=True)
        assert [mode(tmp_path / name) for name in ("team", "team/run", "team/shared", "there")] == ["755", "700", "755", "775"]
        assert own_files(private=False) == 0o022
        (tmp_path / "team" / "shared" / "file").write_text("")
        assert own_files(private=True) == 0o022
        (tmp_path / "there" / "file").write_text("")
        (tmp_path / "there" / "folder").mkdir()
        with umask(0o022):
            (tmp_path / "team" / "cache").write_text("")
        (tmp_path / "there" / "later").write_text("")
        made = ("team/shared/file", "there/file", "there/folder", "team/cache", "there/later")
        assert [mode(tmp_path / name) for name in made] == ["644", "600", "700", "644", "600"]
        with pytest.raises(UserError, match="run.dir=.*/there/file: cannot be written: File exists"):
            make_directory(tmp_path / "there" / "file", private=True)
    finally:
        os.umask(before)


# --- a whole run

def wandb_steps(folder: Path) -> list[int]:
    """The steps of a run's folder, from its transaction log: LevelDB's log format after seven bytes, records in protobuf."""
    from wandb.proto import wandb_internal_pb2

    data, at, record, found = next(folder.glob("*.wandb")).read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            message, record = wandb_internal_pb2.Record.FromString(record), b""
            found += [json.loads(item.value_json) for item in message.history.item if (item.key or item.nested_key[0]) == "step"]
    return found


def test_a_run_of_two_lives_with_planted_secrets(small_data, tmp_path, monkeypatch):
    """Two lives, with wandb: no byte of the planted secrets anywhere, all files private, one run in wandb."""
    pytest.importorskip("wandb")
    planted = {"WANDB_API_KEY": KEY, "HF_TOKEN": "hf_plantedplantedplanted1", "AWS_SECRET_ACCESS_KEY": "planted/aws+secret1",
               "ARTIFACT_URL": "https://bob:plantedpw99@artifacts/x", "http_proxy": "http://me:plantedproxy1@127.0.0.1:9"}
    typed = ["https://al:typedpw1@judge/x", "sk-typed0123456789abcdef", "typedpassword2"]
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tmp_path / "team" / "run"
    words = ["train.steps=2", "optim.warmup_steps=1", "log.wandb=offline", f"chat.system='ask {typed[0]} with {typed[1]}'",
             f"rewards.functions=['judge:password={typed[2]}']", "log.report=true", "validation.at_end=true", "validation.samples=8"]
    before = os.umask(0o022)
    try:
        said = [train(run, small_data, *words), train(run, small_data, *words, "train.steps=4", "checkpoint.load=auto")]
    finally:
        os.umask(before)
    secret = [KEY, "hf_planted", "planted/aws", "plantedpw99", "plantedproxy1", "typedpw1", "sk-typed", "typedpassword2"]
    files = [path for path in run.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {"config.yaml", "events.jsonl", "metrics.jsonl", "metrics.prom", "report.md", "manifest.json"} <= {path.name for path in files}
    leaks = [(str(path.relative_to(run)), one) for path in files for one in secret if one.encode() in path.read_bytes()]
    leaks += [("printed", one) for done in said for one in secret if one in done.stdout + done.stderr]
    assert leaks == []
    assert MARK in (run / "config.yaml").read_text() and [r["step"] for r in records(run)] == [1, 2, 3, 4]
    assert mode(run.parent) == "755" and mode(run) == "700"
    assert {str(path.relative_to(run)): mode(path) for path in run.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o077} == {}

    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({folder.name.rsplit("-", 1)[1] for folder in folders}) == 1, "one id"
    assert (run / "wandb" / "latest-run").resolve() == folders[1]
    assert wandb_steps(folders[0]) == [1, 2] and wandb_steps(folders[1]) == [1, 2, 3, 4]
    listed = subprocess.run([sys.executable, "-m", "wandb", "sync", "--dry-run", str(run / "wandb" / "latest-run")], capture_output=True, text=True, check=False,
                            cwd=tmp_path)
    assert "Would sync 1 run" in listed.stdout + listed.stderr, listed
