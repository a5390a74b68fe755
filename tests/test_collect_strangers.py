"""The server and those who mean it no good: slow and many connections, tricks with paths and names, a thousand wrong tokens, a full disk, two at the same moment."""
import contextlib
import http.client
import json
import re
import resource
import socket
import threading
import time

import pytest
from collecting import Serving, call, read, task, write_tasks

from rlhf.collect import ballots
from rlhf.collect.desk import Desk
from rlhf.collect.log import AppendLog

pytest.importorskip("fastapi", reason="pip install 'megatron-ext[collect]'")
pytest.importorskip("uvicorn", reason="pip install 'megatron-ext[collect]'")
ORDER = [["a0"], ["a1"], ["a2"]]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = write_tasks(tmp_path_factory.mktemp("served"), [task(number) for number in range(50)])
    with Serving(folder, "collect.annotators=[kim,lee]", "collect.shared=1", "collect.shared_votes=2") as server:
        yield server


def raw(port: int, request: bytes, *, end: bool = False) -> bytes:
    """What comes back until the connection ends. end: we end our side of it at once."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as line:
        found = b""
        with contextlib.suppress(OSError):  # it is refused before it is all there
            line.sendall(request)
            if end:
                line.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while part := line.recv(1 << 16):
                found += part
        return found


def head(server: Serving, line: str, *headers: str) -> bytes:
    return "\r\n".join((line, *(headers or (f"Host: 127.0.0.1:{server.port}",)), f"Authorization: Bearer {server.tokens['kim']}", "Connection: close", "", "")).encode("latin-1")


@pytest.mark.parametrize("path", ["/../annotators.yaml", "/..%2f..%2fetc/passwd", "/%2e%2e/tasks.jsonl", "//127.0.0.1/api/state", "/api/state/", "/api//state", "/API/state", "/api/state%00", "/api/state;x",
                                  "/api/decide", "/annotators.yaml", "/tasks.jsonl", "/page.html", "/openapi.json", "/" + "a" * 60_000, "/%ff%fe"])
def test_no_path_leads_anywhere(served, path):
    said = raw(served.port, head(served, f"GET {path} HTTP/1.1"))
    assert re.match(rb"HTTP/1.1 (404|405|400) ", said) and b"\r\nlocation:" not in said.lower(), said[:300]
    assert len(said) < 2000 and b"Traceback" not in said and b"kim" not in said and b"Question" not in said


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "127.0.0.1:80:80", "localhost,evil.example", "[::1", "", "127.0.0.1/evil", "0x7f.1", "127.1"])
def test_other_names_of_this_machine_are_refused(served, host):
    said = raw(served.port, head(served, "GET /api/state HTTP/1.1", f"Host: {host}"))
    assert re.match(rb"HTTP/1.1 (421|400) ", said) and b"Question" not in said
    assert raw(served.port, head(served, "GET /api/state HTTP/1.1", "Host: 127.0.0.1", f"Host: {host}")).startswith(b"HTTP/1.1 400 ")  # two of them


def test_requests_that_are_none(served):
    state = f"Host: 127.0.0.1:{served.port}"
    assert raw(served.port, head(served, "GET /api/state HTTP/1.0", "X: y")).startswith(b"HTTP/1.1 421 ")  # no name at all
    assert raw(served.port, head(served, "GET http://evil.example/api/state HTTP/1.1", state)).split(b" ")[1] in (b"404", b"421", b"400")
    for line in ("TRACE / HTTP/1.1", "OPTIONS /api/state HTTP/1.1", "PUT /api/decide HTTP/1.1", "DELETE / HTTP/1.1"):
        said = raw(served.port, head(served, line))
        assert said.startswith(b"HTTP/1.1 405 ") and b"access-control-allow" not in said.lower() and b"nosniff" in said
    for nonsense in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000, b"\r\n" * 1000, b"GET / HTTP/9.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                     head(served, "GET / HTTP/1.1", state, "X: \x00\x01"), head(served, "POST /api/undo HTTP/1.1", state, "Content-Length: 5", "Content-Length: 6"),
                     head(served, "POST /api/undo HTTP/1.1", state, "Content-Length: -1"), head(served, "GET / HTTP/1.1", state, "Upgrade: websocket", "Connection: Upgrade")):
        assert re.fullmatch(rb"(HTTP/1\.1 [24]\d\d .*)?", raw(served.port, nonsense, end=True), re.DOTALL), nonsense[:60]
    # A call that says it is longer than it is, and goes away.
    raw(served.port, head(served, "POST /api/undo HTTP/1.1", state, "Content-Type: application/json", "Content-Length: 50") + b'{"a":', end=True)
    assert call(served, "GET", "/api/state")[0] == 200


def test_a_thousand_wrong_tokens_change_nothing_and_each_is_told_at_once(served):
    call(served, "GET", "/api/state")
    before = (served.folder / ballots.FILE).read_bytes()
    line, times = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60), []
    for number in range(1000):
        start = time.monotonic()
        kim = served.tokens["kim"]
        token = (f"{'x' * number}{number}", f"{'é' * 20}{number}", kim[:-1] + "~", kim + " ", "\x7f")[number % 5].encode("latin-1")  # "~": in no token
        line.request("GET", "/api/state", headers={"Authorization": b"Bearer " + token})
        response = line.getresponse()
        response.read()
        assert response.status == (200 if number % 5 == 3 else 401)
        times.append(time.monotonic() - start)
    line.close()
    assert (served.folder / ballots.FILE).read_bytes() == before
    assert sorted(times)[100] < 0.03  # not 40 ms, which a body that waits for its head to be acknowledged takes every time


def test_one_task_and_two_people_at_the_same_moment(served):
    """Both have the same one on their screens; each sends three different orders at once: one of each is taken, whole."""
    for _ in range(5):
        asked = {name: call(served, "GET", "/api/state", name=name)[2]["task"]["id"] for name in ("kim", "lee")}
        assert asked["kim"] == asked["lee"]
        gate, codes = threading.Barrier(6), []

        def send(name: str, body: dict, gate=gate, codes=codes) -> None:
            gate.wait()
            codes.append((name, call(served, "POST", "/api/decide", body, name=name)[0]))

        senders = [threading.Thread(target=send, args=(name, {"task": asked["kim"], "order": order})) for name in ("kim", "lee") for order in (ORDER, ORDER[::-1], [["a0", "a1", "a2"]])]
        for one in senders:
            one.start()
        for one in senders:
            one.join()
        assert sorted(codes) == [("kim", 200), ("kim", 409), ("kim", 409), ("lee", 200), ("lee", 409), ("lee", 409)]
        taken = [action["annotator"] for action in read(served.folder / ballots.FILE) if action["event"] == "decide" and action["task"] == asked["kim"]]
        assert sorted(taken) == ["kim", "lee"]


def test_a_disk_that_is_full_and_has_room_again(tmp_path):
    """By a limit on the size of files, in the server's process: what cannot be saved is told, what was said to be saved is there."""
    folder = write_tasks(tmp_path, [task(number) for number in range(40)])
    with Serving(folder, "collect.annotators=[kim]", "collect.shared=0") as server:
        asked = call(server, "GET", "/api/state")[2]["task"]["id"]
        size = (folder / ballots.FILE).stat().st_size
        _, most = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        saved = []
        for room in (30, 250, 430, 700):  # in the middle of a decision; of the task that follows; ...
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size + room, most))
            while (found := call(server, "POST", "/api/decide", {"task": asked, "order": ORDER}))[0] == 200:
                saved.append(asked)
                asked = found[2]["task"]["id"]
            assert found[0] == 507 and "File too large" in found[2]["error"]
            if "this was saved" in found[2]["error"]:
                saved.append(asked)
            content = (folder / ballots.FILE).read_bytes()
            assert content.endswith(b"\n") and [action["task"] for action in read(folder / ballots.FILE) if action["event"] == "decide"] == saved
            assert call(server, "GET", "/", name=None)[0] == 200
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (most, most))
            asked = call(server, "GET", "/api/state")[2]["task"]["id"]
            size = (folder / ballots.FILE).stat().st_size
        assert len(saved) > 3
    assert set(ballots.load(folder).choices) == {*saved} and not (folder / f"{ballots.FILE}.torn").exists()


@pytest.fixture
def impatient(tmp_path):
    """A server in this process that waits 0.6 s for a request and takes eight connections: (port, token)."""
    from collecting import config

    from rlhf.collect.links import ready
    from rlhf.collect.server import application, over_http

    tasks = {one.id: one for one in (task(number) for number in range(5))}
    allowed, made = ready(tmp_path, ["kim"])
    with AppendLog(tmp_path / ballots.FILE, key="x") as log, socket.create_server(("127.0.0.1", 0)) as listening:
        desk = Desk(tasks, log, config().collect)
        desk.current("kim")  # on disk: in 0.6 s an answer that first waits for it may not be read
        server = over_http(application(desk, allowed), patience=0.6, most=8)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield listening.getsockname()[1], made["kim"]
        server.should_exit = True
        thread.join(20)


def ask(port: int, token: str) -> dict:
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    line.request("GET", "/api/state", headers={"Authorization": f"Bearer {token}"})
    found = json.loads(line.getresponse().read())
    line.close()
    return found


@pytest.mark.parametrize("first", [b"", b"GET / HT", b"POST /api/decide HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9000\r\nAuthorization: Bearer TOKEN\r\n\r\n{",
                                   b"POST /api/undo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"])
def test_slow_clients_are_cut_off(impatient, first):
    """Nothing, half a line, half a call, a call without end after it was refused: a byte now and then does not help."""
    port, token = impatient
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        line.sendall(first.replace(b"TOKEN", token.encode()))
        start, gone = time.monotonic(), False
        while not gone and time.monotonic() - start < 60:  # without the cut they stay for ever
            time.sleep(0.1)
            try:
                line.sendall(b"1\r\nx\r\n" if b"chunked" in first else b"x" if first else b"")
                line.settimeout(0.01)
                gone = line.recv(1 << 16) == b""
            except TimeoutError:
                continue
            except OSError:
                gone = True
        assert gone and time.monotonic() - start < 5
    assert ask(port, token)["annotator"] == "kim"


def test_connections_that_only_stay_open_lock_nobody_out(impatient):
    port, token = impatient
    idle = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(40)]
    for one in idle[20:]:
        one.sendall(b"GET /api/state HTTP/1.1\r\nHost: loc")
    start = time.monotonic()
    assert ask(port, token)["annotator"] == "kim" and time.monotonic() - start < 5
    for one in idle:
        one.close()
