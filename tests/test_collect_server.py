"""The server without a browser: who may call, what is refused, headers, many people at once, kills."""
import http.client
import json
import random
import re
import threading
import time

import pytest
from collecting import Serving, call, collect, config, read, task, write, write_tasks

from megatron_ext.errors import UserError
from rlhf.collect import ballots
from rlhf.collect.server import PAGE, policy, serve

pytest.importorskip("fastapi", reason="pip install 'megatron-ext[collect]'")
pytest.importorskip("uvicorn", reason="pip install 'megatron-ext[collect]'")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = write_tasks(tmp_path_factory.mktemp("served"), [task(number) for number in range(50)])
    with Serving(folder, "collect.annotators=[kim,lee]", "collect.shared=0") as server:
        yield server


def test_calls_need_a_token(served):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Authorization": f"Basic {served.tokens['kim']}"}, {"Authorization": served.tokens["kim"]}):
        for method, path in (("GET", "/api/state"), ("POST", "/api/decide"), ("POST", "/api/undo"), ("POST", "/api/skip")):
            status, _, found = call(served, method, path, {} if method == "POST" else None, name=None, **headers)
            assert status == 401 and "link is not known" in found["error"]
    assert call(served, "GET", f"/api/state?token={served.tokens['kim']}", name=None)[0] == 401  # tokens do not belong into addresses


def test_the_page_and_its_headers(served):
    status, headers, content = call(served, "GET", "/", name=None)
    assert status == 200 and content == PAGE.read_bytes() and headers["content-type"] == "text/html; charset=utf-8"
    assert headers["content-security-policy"] == policy(PAGE.read_text(encoding="utf-8")) and "'unsafe-inline'" not in headers["content-security-policy"]
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'sha256-") and "server" not in headers and "set-cookie" not in headers
    for path in ("/api/state", "/nothing", "/docs", "/openapi.json"):
        status, headers, _ = call(served, "GET", path)
        assert status == (200 if path == "/api/state" else 404) and headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function| on\w+=| style=", text)  # nothing from elsewhere, no text as markup


def test_other_names_of_this_machine_are_refused(served):
    assert call(served, "GET", "/api/state", Host="evil.example")[0] == 421  # DNS rebinding
    assert call(served, "GET", "/", Host=f"localhost:{served.port}")[0] == 200


@pytest.mark.parametrize(("raw", "headers", "code"), [
    (b"", {}, 422), (b"[]", {}, 422), (b"{" * 60_000, {}, 422), (b"\xff", {}, 422), (b'{"a":"' + b"x" * 70_000 + b'"}', {}, 413), (b"{}", {"Content-Type": "text/plain"}, 415),
    (b'{"task": {"a": 1}, "order": []}', {}, 404), (b'{"task": "t0000", "order": {"a": 1}}', {}, 422), (b'{"task": "t0000", "order": [["a0"]], "annotator": "lee"}', {}, 422),
])
def test_calls_that_are_none(served, raw, headers, code):
    call(served, "GET", "/api/state")
    before = (served.folder / ballots.FILE).read_bytes()
    status, _, found = call(served, "POST", "/api/decide", raw=raw, **headers)
    assert status == code and set(found) == {"error"} and (served.folder / ballots.FILE).read_bytes() == before


def test_one_cannot_act_for_another(served):
    kim, lee = (call(served, "GET", "/api/state", name=name)[2]["task"]["id"] for name in ("kim", "lee"))
    assert kim != lee
    status, _, _ = call(served, "POST", "/api/decide", {"task": lee, "order": [["a0"], ["a1"], ["a2"]], "annotator": "lee"}, name="kim")
    assert status == 409
    status, _, found = call(served, "POST", "/api/decide", {"task": kim, "order": [["a0"], ["a1"], ["a2"]]}, name="kim")
    assert status == 200 and found["done"] == 1 and found["undo"] and found["task"]["id"] not in (kim, lee) and "origin" not in json.dumps(found["task"])
    assert call(served, "POST", "/api/undo", {}, name="lee")[0] == 409
    status, _, found = call(served, "POST", "/api/undo", {}, name="kim")
    assert status == 200 and found["task"]["id"] == kim and found["task"]["draft"] == [["a0"], ["a1"], ["a2"]]


def test_refusals_of_the_command(served, tmp_path):
    other = write_tasks(tmp_path / "a", [task(0)])
    write(tmp_path / "b" / "tasks.jsonl", [{"id": "t", "prompt": "p", "answers": []}])
    for folder, port, message in ((served.folder, 0, "is in use by another process"), (other, served.port, f"collect.port={served.port}: cannot be listened at"),
                                  (tmp_path, 0, "tasks.jsonl: is not there"), (tmp_path / "b", 0, "tasks.jsonl:1: is no task")):
        with pytest.raises(UserError, match=message):
            serve(config(f"input={folder}", "collect.annotators=[kim]", f"collect.port={port}"))
    assert "error: collect.annotators=[]: name who orders answers" in collect("serve", f"input={other}", code=2, fork=True).stderr


def test_links_are_told_once_and_interrupting_is_clean(tmp_path):
    folder = write_tasks(tmp_path, [task(0)])
    with Serving(folder, "collect.annotators=[kim,lee]", fork=False) as server:
        first = dict(server.tokens)
        assert set(first) == {"kim", "lee"} and server.stop() == 130
    with Serving(folder, "collect.annotators=[kim,lee]", "collect.renew=[lee]", tokens=first) as server:
        assert server.tokens["kim"] == first["kim"] and server.tokens["lee"] != first["lee"]
        assert call(server, "GET", "/api/state", name="lee")[0] == 200
        server.tokens["lee"] = first["lee"]
        assert call(server, "GET", "/api/state", name="lee")[0] == 401


def test_many_people_at_once_and_three_kills_lose_nothing(tmp_path):
    """Four people answer as fast as they can while the server is killed; every decision that was acknowledged is there, and no task got two votes."""
    folder, names = write_tasks(tmp_path, [task(number) for number in range(240)]), ["a", "b", "c", "d"]
    acknowledged: set[tuple[str, str, str]] = set()
    words = (f"collect.annotators=[{','.join(names)}]", "collect.shared=0")
    with Serving(folder, *words) as server:
        port, stop = server.port, threading.Event()

        def work(name: str) -> None:
            draw = random.Random(name)
            state = None
            while not stop.is_set():
                try:
                    if state is None:
                        status, _, state = call(server, "GET", "/api/state", name=name)
                    if state["task"] is None:
                        return
                    order = [[one] for one in draw.sample(["a0", "a1", "a2"], 3)]
                    asked = state["task"]["id"]
                    status, _, found = call(server, "POST", "/api/decide", {"task": asked, "order": order}, name=name)
                    if status == 200:
                        acknowledged.add((name, asked, json.dumps(order)))
                        state = found
                    else:
                        state = None
                except (OSError, http.client.HTTPException):
                    state = None
                    time.sleep(0.02)

        people = [threading.Thread(target=work, args=(name,)) for name in names]
        for person in people:
            person.start()
        for goal in (15, 50, 100):
            deadline = time.monotonic() + 60
            while len(acknowledged) < goal and time.monotonic() < deadline:
                time.sleep(0.005)
            server.kill()
            server.start(port)
        for person in people:
            person.join(300)
        stop.set()
    found = ballots.load(folder)
    assert len(found.choices) == 240 and all(len(choices) == 1 for choices in found.choices.values())
    there = {(name, asked, json.dumps([list(tied) for tied in choice.order])) for asked, choices in found.choices.items() for name, choice in choices.items()}
    assert acknowledged <= there and len(there - acknowledged) <= 3 * len(names)  # answered, and the answer lost with the server
    assert len([action for action in read(folder / ballots.FILE) if action["event"] == "decide"]) == 240
