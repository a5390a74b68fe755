"""A real browser (Chromium) for tests, driven by its DevTools protocol over a pipe: no port, no driver, no package.

Chromium reads commands from file descriptor 3 and writes answers and events to 4, each JSON behind which a zero byte stands
(https://chromedevtools.github.io/devtools-protocol/, --remote-debugging-pipe).
"""
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REQUIRED = os.environ.get("MEGATRON_EXT_BROWSER") == "required"  # .ci/run: what needs a browser fails where there is none, instead of being skipped
KEYS = {"Enter": ("Enter", 13, "\r"), "Backspace": ("Backspace", 8, ""), "Tab": ("Tab", 9, ""), "Escape": ("Escape", 27, ""), " ": ("Space", 32, " ")}


def find() -> str | None:
    return os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


class Failed(Exception):
    """What the browser says went wrong."""


class Browser:
    """A headless browser with a profile of its own in `folder`."""

    def __init__(self, folder: Path, *words: str):
        (read, self._out), (self._in, write) = os.pipe(), os.pipe()
        commands, answers = (fcntl.fcntl(file, fcntl.F_DUPFD, 10) for file in (read, write))  # not 3 or 4 themselves
        words = (find(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--window-size=1200,900", *words)
        # bash puts the two pipes where the browser looks for them (dash knows no descriptor above 9).
        self.process = subprocess.Popen(["bash", "-c", f'exec 3<&{commands} 4>&{answers}; exec "$@"', "bash", *words], pass_fds=(commands, answers), stdout=subprocess.DEVNULL,
                                        stderr=(folder.parent / "browser.log").open("wb"))
        for file in (read, write, commands, answers):
            os.close(file)
        self._held, self._number = b"", 0
        self.events: list[dict] = []

    def send(self, method: str, session: str | None = None, timeout: float = 120, **params: object) -> dict:
        """A command's result. Raises Failed."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        deadline = time.monotonic() + timeout
        while True:
            found = self._next(deadline)
            if found.get("id") == self._number:
                if "error" in found:
                    raise Failed(f"{method}: {found['error']['message']}")
                return found["result"]
            if "method" in found:
                self.events.append(found)

    def _next(self, deadline: float) -> dict:
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Failed("the browser does not answer")
            chunk = os.read(self._in, 1 << 20)
            if not chunk:
                raise Failed("the browser has ended")
            self._held += chunk
        line, _, self._held = self._held.partition(b"\0")
        return json.loads(line)

    def page(self, url: str, *, language: str | None = None) -> "Page":
        """A tab. language: what the page is told that its reader speaks."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log"):
            page.send(f"{domain}.enable")
        page.send("Emulation.setFocusEmulationEnabled", enabled=True)
        if language:
            page.send("Emulation.setUserAgentOverride", userAgent="tests", acceptLanguage=language)
        page.go(url)
        return page

    def close(self) -> None:
        for file in (self._out, self._in):
            os.close(file)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str, target: str):
        self._browser, self._session, self._target = browser, session, target

    def send(self, method: str, **params: object) -> dict:
        return self._browser.send(method, self._session, **params)

    def go(self, url: str) -> None:
        found = self.send("Page.navigate", url=url)
        if found.get("errorText"):
            raise Failed(f"{url}: {found['errorText']}")
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def reload(self) -> None:
        self.js("window.before = true")
        self.send("Page.reload")
        self.wait("document.readyState === 'complete' && !window.before")

    def js(self, expression: str) -> object:
        """The value of an expression (a promise's, when it has come). Raises Failed with what it throws."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise Failed(found["exceptionDetails"].get("exception", {}).get("description", found["exceptionDetails"]["text"]))
        return found["result"].get("value")

    def wait(self, expression: str, timeout: float = 60) -> object:
        """Until the expression is true."""
        deadline, said = time.monotonic() + timeout, None
        while time.monotonic() < deadline:
            try:
                if value := self.js(expression):
                    return value
            except Failed as error:  # the document is being replaced
                said = error
            time.sleep(0.03)
        raise AssertionError(f"{expression} did not become true in {timeout:g} s; {said or ''} the page shows: {self.text('body')[:600]}")

    def text(self, selector: str) -> str:
        return self.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def key(self, *keys: str, modifiers: int = 0) -> None:
        """Presses keys, one after the other, as a person does. modifiers: 2 is Ctrl."""
        for key in keys:
            code, number, text = KEYS.get(key) or (f"Key{key.upper()}" if key.isalpha() else f"Digit{key}" if key.isdigit() else "", ord(key.upper()), key)
            pressed = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
            self.send("Input.dispatchKeyEvent", type="keyDown", **pressed, **({"text": text} if text and not modifiers else {}))
            self.send("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def click(self, selector: str) -> None:
        """In the middle of an element, with the mouse."""
        x, y = self.js(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def complaints(self) -> list[str]:
        """What the browser wrote to its console for this tab: errors, and what the page's policy refused."""
        self.js("1")
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            if event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] in ("error", "warning"):
                found.append(event["params"]["entry"]["text"])
            if event["method"] == "Runtime.exceptionThrown":
                found.append(event["params"]["exceptionDetails"]["text"])
        return found

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self._browser.send("Target.closeTarget", targetId=self._target)
