"""A headless Chromium for tests of pages, spoken to over its pipe: no driver and no package is needed.

What it is asked and what it tells are JSON messages of the DevTools protocol, each ended by a zero byte
(``--remote-debugging-pipe``). Everything that a page must not do is kept: messages on the console, exceptions that
nobody caught, breaches of its content security policy, and requests.
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60.0  # seconds that an answer may take on a busy machine


def browser_or_skip() -> str:
    """The browser: $SCARCADE_BROWSER, or one of `NAMES` on PATH; a skip where there is none."""
    found = os.environ.get("SCARCADE_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"needs a headless Chromium ({', '.join(NAMES)} on PATH, or its path in SCARCADE_BROWSER)")
    return found


class Page:
    """One tab. `complaints` is what the page did that it must not, `requests` every address that it asked for."""

    def __init__(self, asks: int, answers: int) -> None:
        self._asks, self._answers = asks, answers
        self._left = b""
        self._last = 0
        self._session: str | None = None
        self._loaded = False
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.tell(f"{domain}.enable")
        self.size(1280, 900)

    def tell(self, method: str, **parameters: Any) -> Any:
        """The result of one command."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._asks, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while True:
            answer = self._next(until)
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, path: Path, anchor: str = "") -> float:
        """Open a file (and go to "#q-3" in it); the seconds until it was loaded and its script was through."""
        self._go("about:blank")
        began = time.monotonic()
        self._go(path.as_uri() + anchor)
        return time.monotonic() - began

    def _go(self, address: str) -> None:
        self._loaded = False
        self.tell("Page.navigate", url=address)
        until = time.monotonic() + PATIENCE
        while not self._loaded:
            self._next(until)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        strict = {"returnByValue": True, "awaitPromise": True, "allowUnsafeEvalBlockedByCSP": False}
        done = self.tell("Runtime.evaluate", expression=script, **strict)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + PATIENCE
        while not self.run(condition):
            assert time.monotonic() < until, f"never true: {condition}; the page said {self.complaints}"
            time.sleep(0.02)

    def size(self, width: int, height: int) -> None:
        self.tell("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, on: bool) -> None:
        value = "dark" if on else "light"
        self.tell("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def scripts(self, on: bool) -> None:
        self.tell("Emulation.setScriptExecutionDisabled", value=not on)

    def point(self, x: float, y: float) -> None:
        """Move the pointer."""
        self.tell("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        shot = self.tell("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser gave no answer"
            part = os.read(self._answers, 1 << 20)
            assert part, "the browser ended"
            self._left += part
        one, self._left = self._left.split(b"\0", 1)
        message: dict[str, Any] = json.loads(one)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, told: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Runtime.consoleAPICalled":
            self.complaints.append(f"console: {[one.get('value') for one in told['args']]}")
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {told['exceptionDetails']}")
        elif event == "Log.entryAdded":
            self.complaints.append(f"log: {told['entry']['text']}")
        elif event == "Audits.issueAdded" and told["issue"]["code"] == "ContentSecurityPolicyIssue":
            self.complaints.append(f"issue: {json.dumps(told['issue'])[:400]}")
        elif event == "Page.javascriptDialogOpening":
            self.complaints.append(f"dialog: {told['message']}")
        elif event == "Network.requestWillBeSent" and told["request"]["url"] != "about:blank":
            self.requests.append(told["request"]["url"])


@contextmanager
def browsing(profile: Path) -> Iterator[Page]:
    """A page in a browser with a fresh profile, which ends with the block; a skip where there is no browser."""
    browser = browser_or_skip()
    asks_out, asks_in = os.pipe()
    answers_out, answers_in = os.pipe()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
    flags += [f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    # The browser reads its descriptor 3 and writes to 4; a shell puts the pipes there.
    shell = f'exec "$0" "$@" 3<&{asks_out} 4>&{answers_in}'
    process = subprocess.Popen(
        ["/bin/bash", "-c", shell, browser, *flags],
        pass_fds=(asks_out, answers_in),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(asks_out)
    os.close(answers_in)
    try:
        yield Page(asks_in, answers_out)
    finally:
        os.close(asks_in)
        os.close(answers_out)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
