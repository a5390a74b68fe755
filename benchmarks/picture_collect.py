"""docs/images/collect.png: the page of `collect serve` as it is, in Chromium, with an order made.

    python benchmarks/picture_collect.py [docs/images/collect.png]

It starts the server on a folder of its own, lets two people order fifteen tasks over HTTP so that progress and agreement are known, opens the link of one
of them, orders its answers by keys, and takes the picture (tests/browser.py).
"""
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

ANSWERS = (
    "Yes. A resident who moves within the city reports the new address to the community centre within 14 days of moving in. The form takes ten minutes; bring an identity card.",
    ("Report it within 14 days of moving in, at the community centre of the new address or online. Who is late without a reason may be fined up to 50,000 won.\n\n"
     "You need:\n1. an identity card\n2. the lease, where the landlord asks for a fixed date on it"),
    "You should contact the relevant authorities, as rules may vary.",
    "Address changes are handled by the tax office once a year. <b>No report is needed.</b>",
)


def main() -> None:
    from browser import Browser
    from collecting import Serving, call, task, write_tasks

    from rlhf.collect.tasks import Answer, Task

    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images" / "collect.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    prompt = ({"role": "user", "content": "I moved to another district last week. Do I have to report my new address, and where?"},)
    shown = Task("shown", prompt, tuple(Answer(f"a{number}", text, "m") for number, text in enumerate(ANSWERS)), "welfare", "en", {})
    others = [task(number, answers=3, domain=("education", "health", "welfare")[number % 3]) for number in range(15)]
    words = ("collect.annotators=[kim,lee]", "collect.shared=1", "collect.shared_votes=2", "collect.target=40", "collect.domain_target=20", "collect.targets=[welfare:15]")
    with tempfile.TemporaryDirectory() as place:
        folder = write_tasks(Path(place) / "tasks", [*others, shown])
        with Serving(folder, *words, fork=False) as server:
            for name in ("kim", "lee"):
                state = call(server, "GET", "/api/state", name=name)[2]
                while state["task"] is not None and state["task"]["id"] != "shown":
                    order = [["a0"], ["a1"], ["a2"]] if name == "kim" or state["done"] % 4 else [["a1"], ["a0"], ["a2"]]
                    state = call(server, "POST", "/api/decide", {"task": state["task"]["id"], "order": order}, name=name)[2]
            browser = Browser(Path(place) / "profile")
            try:
                page = browser.page(server.link("kim"))
                page.wait("!document.getElementById('work').hidden && document.querySelectorAll('#answers li').length > 0")
                page.send("Emulation.setDeviceMetricsOverride", width=1100, height=830, deviceScaleFactor=1, mobile=False)
                places = page.js("[...document.querySelectorAll('#answers li')].map(one => one.dataset.id)")
                page.key(str(places.index("a1") + 1), "=", str(places.index("a0") + 1), str(places.index("a2") + 1))  # what is left places itself
                page.picture(target)
            finally:
                browser.close()
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
