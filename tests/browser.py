"""Chromium without a window, driven by its own protocol (CDP) over a pipe: no driver or library has to be installed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WAIT_S = 60.0


def program() -> str | None:
    """Return Chromium's path, or None: `ORRERY_CHROMIUM`, or the first of its names on PATH."""
    return os.environ.get("ORRERY_CHROMIUM") or next((found for n in NAMES if (found := shutil.which(n))), None)


class Pipe:
    """Chromium's end of the protocol: JSON with a zero byte behind it, in by one pipe, out by another."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._come = write, read, b""

    def send(self, message: dict[str, Any]) -> None:
        """Send one message."""
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]

    def receive(self, seconds: float) -> dict[str, Any]:
        """Return the next message. Raises `TimeoutError`; `EOFError` when Chromium has ended."""
        end = time.monotonic() + seconds
        while b"\0" not in self._come:
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            piece = os.read(self._read, 1 << 20)
            if not piece:
                raise EOFError("Chromium has ended")
            self._come += piece
        line, _, self._come = self._come.partition(b"\0")
        return dict(json.loads(line))


class Page:
    """One tab. Everything it says on its console and every error in it is kept in `said`."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._number = 0
        self._session: dict[str, str] = {}
        self.said: list[str] = []
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=tab, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and return its answer; what comes in between is looked at."""
        self._number += 1
        mine = self._number
        self._pipe.send({"id": mine, "method": method, "params": params, **self._session})
        while True:
            message = self._pipe.receive(WAIT_S)
            if message.get("id") == mine:
                if "error" in message:
                    raise AssertionError(f"{method}: {message['error']}")
                return dict(message.get("result", {}))
            self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.said.append(str(details.get("exception", {}).get("description") or details.get("text")))
        if message.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.said.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        if message.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.said.append(" ".join(str(a.get("value", a.get("description", ""))) for a in params["args"]))

    def js(self, expression: str) -> Any:
        """Return the value of an expression; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression[:200]}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, expression: str, what: str = "", seconds: float = WAIT_S) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while True:
            try:
                found = self.js(f"!!({expression})")  # an element is no value, but it is there
            except AssertionError:  # between two documents there is none
                found = None
            if found:
                return
            assert time.monotonic() < end, f"{what or expression} did not come; the page said {self.said}"
            time.sleep(0.1)

    def open(self, url: str) -> None:
        """Go to a page and wait until it is loaded."""
        self.call("Page.navigate", url=url)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'", url)

    def reload(self) -> None:
        """Load the page anew, and wait until the new document is there: the old one answers until then."""
        self.js("window.old = true")
        self.call("Page.reload")
        self.wait("!window.old && document.readyState === 'complete'", "the page, loaded anew")

    def look(self, width: int, dark: bool, height: int = 900) -> None:
        """Set the size of the window and the system's theme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def shoot(self, file: Path, whole: bool = True) -> None:
        """Write a screenshot of the (whole) page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))

    def click(self, selector: str) -> None:
        """Click in the middle of an element, as a person does."""
        box = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press one named key."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27}
        text = {"text": "\r"} if key == "Enter" else {}
        common = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)


@contextmanager
def chromium() -> Iterator[Page]:
    """Run Chromium with a profile of its own and yield its tab; all its processes are ended."""
    binary = program()
    assert binary is not None
    profile = Path(tempfile.mkdtemp(prefix="orrery-chromium-"))
    argv = [
        binary, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--hide-scrollbars", "--disable-extensions", "--disable-background-networking", "--no-proxy-server",
        "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank",
    ]  # fmt: skip
    # It reads descriptor 3 and writes 4, which this process has for something else: a small one puts ours there.
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    given = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
    become = f"import os, sys; os.dup2({given[0]}, 3); os.dup2({given[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])"
    argv = [sys.executable, "-I", "-S", "-c", become, *argv]
    with (profile / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True, pass_fds=given)
    for fd in (theirs_in, theirs_out, *given):
        os.close(fd)
    try:
        try:
            page = Page(Pipe(ours_out, ours_in))
        except (OSError, EOFError) as e:
            raise AssertionError(f"{e}: {(profile / 'log').read_text()[-2000:]}") from None
        yield page
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(ours_out)
        os.close(ours_in)
        shutil.rmtree(profile, ignore_errors=True)
