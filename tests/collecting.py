"""What tests of `collect` share: documents, records, tasks, an endpoint that speaks as OpenAI's does, and the command line."""
import contextlib
import copy
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import forked
import yaml
from small import ROOT, environment

from megatron_ext.config.build import from_dict, to_dict
from megatron_ext.config.compose import compose
from megatron_ext.config.schema import Config
from rlhf.collect import ballots
from rlhf.collect.desk import Desk
from rlhf.collect.log import AppendLog
from rlhf.collect.tasks import Answer, Task

LAW = """시험법

       제1장 총칙
  제1조(목적) 이 법은 시험에 관한 사항을 정함을 목적으로 한다.
  제2조(정의) 이 법에서 "시험"이란 프로그램의 시험을 말한다.
② 제1조에 따른 사항은 대통령령으로 정한다.
  제3조의2 시험은 매일 한다.

       제2장 벌칙
  제4조(과태료) 시험을 거른 자에게는 과태료를 부과한다.
부칙
  제1조(시행일) 이 법은 공포한 날부터 시행한다.
"""
HOSTILE = ('<img src=x onerror="window.hacked=1"><script>window.hacked=1</script></div></li><b>굵게</b> &lt;i&gt; javascript:alert(1) \u202egnp.exe\u202c '
           '{{7*7}} ${window.hacked=1} <iframe srcdoc="<script>parent.hacked=1</script>"></iframe> <style>*{display:none}</style>\u0000\u2028end')


def write(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@cache
def _plain() -> dict:
    return to_dict(compose(()))


@cache
def config(*words: str) -> Config:
    """As Hydra composes it from simple KEY=VALUE words, a thirtieth of the time."""
    found = copy.deepcopy(_plain())
    for word in words:
        key, _, value = word.partition("=")
        *groups, name = key.split(".")
        inner = found
        for group in groups:
            inner = inner[group]
        inner[name] = yaml.safe_load(value) if value else ""
    return from_dict(found)


def document(text: str, name: str = "law/1", **metadata: object) -> dict:
    """As datatrove writes one."""
    return {"text": text, "id": name, "metadata": metadata}


def task(number: int, answers: int = 3, domain: str = "education") -> Task:
    """Answers whose texts say how good they are: `good 0` is best."""
    return Task(f"t{number:04d}", ({"role": "user", "content": f"Question {number}?"},), tuple(Answer(f"a{place}", f"good {place}", f"model{place}") for place in range(answers)),
                domain, "en", {"id": f"doc{number}", "file": "x.jsonl", "line": number})


def write_tasks(folder: Path, tasks: list[Task]) -> Path:
    write(folder / "tasks.jsonl", [one.record() for one in tasks])
    return folder


ORDER = [["a0"], ["a1", "a2"]]


class Clock:
    """Stands until it is moved."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def desk(folder: Path, tasks: Iterable[Task], *words: str, clock: Callable[[], float] | None = None) -> Desk:
    """A desk on the folder's log, which stays open."""
    return Desk({one.id: one for one in tasks}, AppendLog(folder / ballots.FILE, key="input"), config(*words).collect, clock or Clock(), clock or Clock())


# ---- the command line --------------------------------------------------------------------------------------------------------------

def collect(*words: str, code: int = 0, fork: bool = False, **more: str) -> subprocess.CompletedProcess:
    """The command; its exit code must be `code`. fork: from a process that has imported torch (tests/forked.py)."""
    if fork:
        done = forked.run(["collect", *words], env=environment() | more, timeout=300)
    else:
        done = subprocess.run([sys.executable, "-m", "megatron_ext", "collect", *words], cwd=ROOT, env=environment() | more, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stderr
    return done


class Serving:
    """`collect serve` as a process of its own. Attributes: url, tokens {annotator: token} (of this start and earlier ones).

    Args:
        fork: from a process that has imported what it needs (tests/forked.py); False: the command as it is typed.
    """

    def __init__(self, folder: Path, *words: str, port: int = 0, tokens: dict[str, str] | None = None, fork: bool = True):
        self.folder, self.words, self.tokens, self.fork = folder, words, dict(tokens or {}), fork
        self._said = tempfile.TemporaryDirectory()
        self.start(port)

    def start(self, port: int = 0) -> None:
        words = ["-m", "megatron_ext", "collect", "serve", f"input={self.folder}", f"collect.port={port}", *self.words]
        said = Path(tempfile.mkdtemp(dir=self._said.name))
        if self.fork:
            self.process = forked.start(words, env=environment(), out=said / "out", error=said / "error")
        else:
            with (said / "out").open("w") as outs, (said / "error").open("w") as errors:
                # A shell that started the tests by `&` has them ignore SIGINT, and all that they start.
                self.process = subprocess.Popen(["env", "--default-signal=INT", sys.executable, *words], cwd=ROOT, env=environment(), stdout=outs, stderr=errors)
        names = next(word for word in self.words if word.startswith("collect.annotators="))[20:-1].split(",")
        deadline, lines = time.monotonic() + 240, []
        while len(lines) < 1 + len(names):  # the address, and a line for each annotator
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError("".join(path.read_text(encoding="utf-8") for path in said.iterdir()))
            time.sleep(0.01)
            text = (said / "out").read_text(encoding="utf-8") if (said / "out").exists() else ""
            lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n") and not line.startswith("note: ")]
        self.url = next(line for line in lines if "The page: " in line).rsplit(" ", 1)[1].strip()
        self.tokens |= {line.split()[0]: line.strip().partition("#token=")[2] for line in lines if "#token=" in line}

    @property
    def port(self) -> int:
        return int(self.url.rstrip("/").rsplit(":", 1)[1])

    def link(self, name: str) -> str:
        return f"{self.url}#token={self.tokens[name]}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """As Ctrl-C. Returns the exit code."""
        os.kill(self.process.pid, signal.SIGINT)
        return self.process.wait(timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.kill()
        self._said.cleanup()


def call(server: Serving, method: str, path: str, body: object = None, *, name: str | None = "kim", raw: bytes | None = None, **headers: str) -> tuple[int, dict, object]:
    """What a server answers to somebody: (status, headers, what came)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    sent = {"Authorization": f"Bearer {server.tokens[name]}"} if name else {}
    if method == "POST":
        sent["Content-Type"] = "application/json"
    sent |= {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request(method, path, raw if raw is not None else None if body is None else json.dumps(body), sent)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    try:
        return response.status, {key.lower(): value for key, value in response.getheaders()}, json.loads(content)
    except ValueError:
        return response.status, {key.lower(): value for key, value in response.getheaders()}, content


# ---- an endpoint -------------------------------------------------------------------------------------------------------------------

class FakeEndpoint:
    """An OpenAI-compatible server. reply(body, number) returns text, or (status, headers, bytes or an iterator of them), or raises ConnectionError to hang up.

    Attributes: asked: bodies in the order in which they came. headers: of each. most: requests under way at a time, at most.
    """

    def __init__(self, reply: Callable[[dict, int], object]):
        self.asked: list[dict] = []
        self.headers: list[dict] = []
        self.now = self.most = 0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    number = len(outer.asked)
                    outer.asked.append(body)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()} | {"path": self.path})
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    found = reply(body, number)
                except ConnectionError:
                    self.close_connection = True
                    return
                finally:
                    with lock:
                        outer.now -= 1
                status, headers, content = found if isinstance(found, tuple) else (200, {}, completion(found, body))
                with contextlib.suppress(OSError):  # who asked may be gone
                    self.send_response(status)
                    whole = isinstance(content, bytes)
                    self.close_connection = not whole
                    for name, value in {"Content-Type": "application/json", **({"Content-Length": str(len(content))} if whole else {}), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    for part in [content] if whole else content:
                        self.wfile.write(part)

            def log_message(self, *_) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def passages(tmp_path: Path, count: int = 6) -> Path:
    return write(tmp_path / "in" / "passages.jsonl", [{"id": f"p{number}", "passage": f"도서관 {number}은 아홉 시에 엽니다. 토요일에 쉽니다.", "title": "안내", "language": "ko", "domain": "library",
                                                       "source": {"id": f"doc{number}", "file": "x", "line": number}} for number in range(count)])


def augmented(tmp_path: Path, endpoint: "FakeEndpoint", *words: str, name: str = "out") -> dict:
    """What `collect augment` makes of the passages; a later word replaces an earlier one."""
    last = {word.split("=")[0]: word for word in (f"input={tmp_path / 'in'}", f"output={tmp_path / name}", f"collect.endpoint={endpoint.url}", "collect.model=m", "collect.concurrency=3", "collect.retries=2", "collect.timeout=120", *words)}
    from rlhf.collect.augment import Augmentation, augment
    from rlhf.collect.endpoint import Endpoint

    made = config(*last.values())
    return augment(Augmentation.of(made, tuple(last.values())), "m", lambda: Endpoint(made.collect))


def numbered(body: dict, number: int) -> str:
    """Other pairs for each passage."""
    which = body["messages"][-1]["content"].split("도서관 ")[1].split("은")[0]
    return json.dumps([{"question": f"도서관 {which}은 몇 시에 여나요?", "answer": "아홉 시에 엽니다."}], ensure_ascii=False)


def completion(text: object, body: dict) -> bytes:
    said = sum(len(message["content"]) for message in body["messages"]) // 4
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                       "usage": {"prompt_tokens": said, "completion_tokens": len(str(text)) // 4}}, ensure_ascii=False).encode()


def error(status: int, text: str = "no", **headers: str) -> tuple[int, dict, bytes]:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps({"error": {"message": text}}).encode()


@contextlib.contextmanager
def variable(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before
