"""The page in a real browser: choose, order, tie, undo, reload, two people at once, a server that dies, hostile text.

Debian: apt-get install --no-install-recommends chromium. Where there is no Chromium, or no FastAPI, the file is skipped; with
MEGATRON_EXT_BROWSER=required (.ci/run) it fails.
"""
import json
import time

import pytest
from browser import REQUIRED, Browser, Failed, find
from collecting import HOSTILE, Serving, read, task, write_tasks

from rlhf.collect import ballots
from rlhf.collect.tasks import Answer, Task

if not REQUIRED:
    pytest.importorskip("fastapi", reason="pip install 'megatron-ext[collect]'")
    pytest.importorskip("uvicorn", reason="pip install 'megatron-ext[collect]'")
pytestmark = pytest.mark.skipif(find() is None and not REQUIRED, reason="no Chromium here (apt-get install --no-install-recommends chromium)")

READY = "!document.getElementById('work').hidden && document.querySelectorAll('#answers li').length > 0"
TASK = "state.task.id"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert find() is not None, "MEGATRON_EXT_BROWSER=required, and there is no Chromium (.ci/browser says why it could not be installed)"
    found = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield found
    found.close()


@pytest.fixture
def opened(tmp_path, browser):
    """opened(tasks, *words) starts a server and returns it; every tab and server is closed afterwards."""
    servers = []

    def start(tasks: list[Task], *words: str) -> Serving:
        servers.append(Serving(write_tasks(tmp_path / "tasks", tasks), *(words or ("collect.annotators=[kim]", "collect.shared=0"))))
        return servers[-1]

    yield start
    for server in servers:  # first: a browser that has ended must not leave them behind
        server.__exit__()
    for target in browser.send("Target.getTargets")["targetInfos"]:
        if target["type"] == "page":
            browser.send("Target.closeTarget", targetId=target["targetId"])


def shown(page) -> list[str]:
    """Ids of the answers, from the top."""
    return page.js("[...document.querySelectorAll('#answers li')].map(one => one.dataset.id)")


def decisions(server: Serving) -> list[dict]:
    return [action for action in read(server.folder / ballots.FILE) if action["event"] != "open"]


def saved(page, before: str) -> None:
    page.wait(f"!busy && (!state.task || {TASK} !== {json.dumps(before)})")


def test_order_tie_undo_and_skip_by_keyboard(opened, browser):
    server = opened([task(number, answers=4) for number in range(5)])
    page = browser.page(server.link("kim"))
    page.wait(READY)
    assert "token" not in page.js("location.href") and page.text("#who") == "kim" and "Question 0?" in page.text("#prompt")
    first, ids = page.js(TASK), shown(page)
    page.key("Enter")
    page.wait("document.getElementById('said').textContent.includes('best answer first')")
    page.key("3", "1")
    page.key("Enter")
    page.wait("document.getElementById('said').textContent.includes('Order all answers')")
    assert decisions(server) == []
    page.key("4")  # the one that is left places itself
    assert page.text("#order") == "Order: 3 > 1 > 4 > 2"
    page.key("Enter")
    saved(page, first)
    assert decisions(server)[-1] | {"at": 0, "seconds": 0} == {"event": "decide", "annotator": "kim", "task": first, "at": 0, "order": [[ids[2]], [ids[0]], [ids[3]], [ids[1]]],
                                                               "shown": ids, "seconds": 0, "of": task(int(first[1:]), answers=4).digest}
    assert page.text("#mine") == "1 done" and "1 / 50,000" in page.text("#progress")
    # undo: the same task, with the order as it was
    page.key("u")
    page.wait(f"!busy && {TASK} === {json.dumps(first)}")
    assert shown(page) == ids and page.text("#order") == "Order: 3 > 1 > 4 > 2" and page.text("#mine") == "0 done"
    page.key("Backspace", "Backspace", "=", "4", "=", "2")
    assert page.text("#order") == "Order: 3 > 1 = 4 = 2"
    page.key("Enter")
    saved(page, first)
    assert [action["event"] for action in decisions(server)] == ["decide", "undo", "decide"] and decisions(server)[-1]["order"] == [[ids[2]], [ids[0], ids[3], ids[1]]]
    second = page.js(TASK)
    page.key("s")
    page.wait("!document.getElementById('reasons').hidden")
    page.key("2")
    saved(page, second)
    assert decisions(server)[-1]["event"] == "skip" and decisions(server)[-1]["reason"] == "all_bad"
    page.key("z", modifiers=2)  # Ctrl-Z is undo too, of a skip as well
    page.wait(f"!busy && {TASK} === {json.dumps(second)}")
    assert page.complaints() == []


def test_all_tie_when_the_last_one_is_as_good(opened, browser):
    server = opened([task(0, answers=2)])
    page = browser.page(server.link("kim"))
    page.wait(READY)
    page.key("1", "=")
    assert page.text("#order") == "Order: 1 = 2"
    page.key("Enter")
    page.wait("!document.getElementById('none').hidden")
    assert "Thank you" in page.text("#none") and sorted(decisions(server)[-1]["order"][0]) == ["a0", "a1"]
    page.click("#undo-none")
    page.wait(READY)


def test_choose_the_best_with_the_mouse_and_by_focus(opened, browser):
    server = opened([task(number) for number in range(3)], "collect.annotators=[kim]", "collect.shared=0", "collect.choose=best")
    page = browser.page(server.link("kim"))
    page.wait(READY)
    first, ids = page.js(TASK), shown(page)
    page.click("#answers li:nth-child(2)")
    page.wait("order.length === 1")
    page.click("#save")
    saved(page, first)
    assert decisions(server)[-1]["order"] == [[ids[1]], [ids[0], ids[2]]]
    second, ids = page.js(TASK), shown(page)
    page.js("document.querySelector('#answers li:nth-child(3)').focus()")
    page.key(" ", "Enter")
    saved(page, second)
    assert decisions(server)[-1]["order"] == [[ids[2]], [ids[0], ids[1]]]


def test_reload_keeps_the_place_and_the_half_made_order(opened, browser):
    server = opened([task(number, answers=4) for number in range(3)])
    page = browser.page(server.link("kim"))
    page.wait(READY)
    page.key("2", "4")
    before = page.js(TASK), shown(page), page.text("#order")
    page.reload()
    page.wait(READY)
    assert (page.js(TASK), shown(page), page.text("#order")) == before == (before[0], before[1], "Order: 2 > 4")
    page.key("1", "Enter")
    saved(page, before[0])
    # Another tab, another machine: the place is the server's, and nothing half made is there.
    other = browser.page(server.link("kim"))
    other.wait(READY)
    assert other.js(TASK) == page.js(TASK) and other.text("#order") == ""
    # What the one tab saves, the other one is told when it saves too, and goes on from there.
    stale = other.js(TASK)
    page.key("1", "2", "3", "Enter")
    saved(page, stale)
    other.key("4", "3", "2", "Enter")
    other.wait("document.getElementById('said').textContent.includes('another window went on')")
    assert other.js(TASK) == page.js(TASK) and len(decisions(server)) == 2


def test_two_people_at_once(opened, browser):
    server = opened([task(number) for number in range(6)], "collect.annotators=[kim,lee]", "collect.shared=0.5", "collect.shared_votes=2")
    kim, lee = browser.page(server.link("kim")), browser.page(server.link("lee"))
    for _ in range(12):
        for page in (kim, lee):
            page.wait("!busy && state")
            if page.js("!!state.task"):
                before = page.js(TASK)
                place = {answer: number + 1 for number, answer in enumerate(shown(page))}
                page.key(str(place["a0"]), str(place["a1"]), "Enter")
                saved(page, before)
            else:
                page.click("#again")
                time.sleep(0.05)
    found = ballots.load(server.folder)
    votes = [len(found.choices[f"t{number:04d}"]) for number in range(6)]
    assert set(votes) <= {1, 2} and 2 in votes and {"kim", "lee"} == {name for people in found.choices.values() for name in people}
    assert len(decisions(server)) == sum(votes)  # nobody did a task that had its votes
    kim.click("#again")
    kim.wait("!busy && state.agreement.tasks > 0")
    assert "alpha 1.000 (order)" in kim.text("#agreement") and "100 % of pairs alike" in kim.text("#agreement")


def test_a_server_that_is_killed_and_comes_back(opened, browser):
    server = opened([task(number) for number in range(3)])
    page = browser.page(server.link("kim"))
    page.wait(READY)
    before, port = page.js(TASK), server.port
    page.key("2", "1")
    server.kill()
    page.key("Enter")
    page.wait("document.getElementById('said').textContent.includes('nothing is lost')")
    assert page.text("#order") == "Order: 2 > 1 > 3"
    server.start(port)
    page.key("Enter")
    saved(page, before)
    assert len(decisions(server)) == 1


def test_hostile_text_is_shown_as_text(opened, browser):
    one = Task("evil", ({"role": "system", "content": HOSTILE}, {"role": "user", "content": HOSTILE + "?"}), (Answer("a0", HOSTILE, "m"), Answer("a1", HOSTILE + " 2", "m")), HOSTILE, "ko", {})
    server = opened([one])
    page = browser.page(server.link("kim"))
    page.wait(READY)
    time.sleep(0.3)
    assert page.js("window.hacked") is None
    assert set(page.js("[...document.querySelectorAll('#answers .text')].map(one => one.textContent)")) == {HOSTILE, HOSTILE + " 2"}
    assert page.js("[...document.querySelectorAll('#prompt .text')].map(one => one.textContent)") == [HOSTILE, HOSTILE + "?"]
    assert page.js("document.getElementById('domain').textContent") == HOSTILE
    assert page.js("document.querySelectorAll('script').length + document.querySelectorAll('img, iframe, b, body style').length") == 1
    assert page.complaints() == []
    # What the policy of the page would do if its script made a mistake:
    with pytest.raises(Failed, match="TrustedHTML"):
        page.js("document.querySelector('#prompt').innerHTML = '<b>x</b>'")
    page.js("(() => { const one = document.createElement('img'); one.src = 'http://127.0.0.1:9/x.png'; document.body.append(one); })()")
    with pytest.raises(Failed):
        page.js("fetch('http://127.0.0.1:9/steal', {mode: 'no-cors'})")
    with pytest.raises(Failed, match="TrustedScript|unsafe-eval|Content Security Policy"):
        page.js("(() => setTimeout('window.hacked = 1', 0))()")
    page.js("(() => { const one = document.createElement('button'); try { one.setAttribute('onclick', 'window.hacked = 1'); } catch (error) {} document.body.append(one); one.click(); one.remove(); })()")
    assert page.js("window.hacked") is None
    assert any("Content Security Policy" in said for said in page.complaints())
    page.key("1", "Enter")
    page.wait("!document.getElementById('none').hidden")


def test_texts_that_are_large_or_odd_are_shown_whole_and_disturb_nothing(opened, browser):
    """A megabyte, one word of 20,000 letters, families of emoji, stacked accents, letters that turn the reading direction and never turn it back."""
    texts = ["길고 긴 답변입니다.\n" * 40_000, "가" * 20_000, "👨‍👩‍👧‍👦🏳️‍🌈👩🏽‍🚀 e\u0301" + "\u0300\u0316" * 300, "\u202e\u2066\u2067 reversed \u0627\u0644\u0633\u0644\u0627\u0645\n" * 3]
    assert len(texts[0].encode()) > 1_000_000
    one = Task("odd", ({"role": "user", "content": "\u202eWhich?"},), tuple(Answer(f"a{number}", text, "m") for number, text in enumerate(texts)), "\u202ewal", "ko", {})
    server = opened([one])
    page = browser.page(server.link("kim"))
    page.wait(READY)
    assert page.js("Object.fromEntries([...document.querySelectorAll('#answers li')].map(one => [one.dataset.id, one.querySelector('.text').textContent]))") == {f"a{number}": text for number, text in enumerate(texts)}
    # Each stands inside its own box, no box is higher than the window or wider than the page, and what stands beside a text is read as it was.
    boxes = page.js("[...document.querySelectorAll('#answers li, #prompt')].map(one => { const r = one.getBoundingClientRect(); return [r.left, r.right, r.height]; })")
    width, height = page.js("[document.documentElement.clientWidth, innerHeight]")
    assert all(left >= 0 and right <= width and tall <= height for left, right, tall in boxes) and page.js("document.documentElement.scrollWidth") <= width
    assert page.js("['.text', '#domain', '#who', 'th'].map(one => getComputedStyle(document.querySelector(one)).unicodeBidi)") == ["isolate"] * 4
    start = time.monotonic()
    page.key("4", "3", "2", "Enter")
    page.wait("!document.getElementById('none').hidden")
    assert time.monotonic() - start < 10 and decisions(server)[-1]["event"] == "decide" and page.complaints() == []


def test_without_a_token_and_in_korean(opened, browser):
    server = opened([task(0)])
    page = browser.page(server.url, language="ko-KR")
    page.wait("!document.getElementById('enter').hidden")
    assert "토큰을 입력하세요" in page.text("#enter")
    page.js("document.getElementById('token').value = 'wrong'")
    page.click("#enter-go")
    page.wait("document.getElementById('said').className === 'bad'")
    page.js(f"document.getElementById('token').value = {json.dumps(server.tokens['kim'])}")
    page.click("#enter-go")
    page.wait(READY)
    assert page.text("#title") == "답변 순서 정하기" and page.js("document.documentElement.lang") == "ko"
    # The S key under a Korean input method has another letter; its place is what counts.
    page.send("Input.dispatchKeyEvent", type="keyDown", key="ㄴ", code="KeyS", windowsVirtualKeyCode=83)
    page.wait("!document.getElementById('reasons').hidden")
    assert "모든 답변이 나쁨" in page.text("#reasons")
