"""A headless Chromium with several windows: real keys, real reloads, sizes, screenshots.

The DevTools protocol over two pipes (``--remote-debugging-pipe``) is JSON objects separated by
zero bytes, so no driver and no web-socket package is needed.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
WAIT = 60.0
_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13,
          "Backspace": 8, "Tab": 9}  # fmt: skip

# The browser wants the pipes as 3 and 4; whatever they are now, out of the way first.
_MOVE = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]
for number, end in zip((3, 4), ends):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""


class BrowserError(AssertionError):
    """The browser answered with an error, or not at all."""


class Chromium:
    """The process; :meth:`tab` opens pages. Everything ends with the ``with`` block."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        numbers = [str(theirs_in), str(theirs_out)]
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", _MOVE, *numbers, *command],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + WAIT
        while (answer := self._message(end)).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _message(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0]:
                raise BrowserError(f"no answer within {WAIT} s")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise BrowserError("the browser has ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def tab(self, width: int = 1200, height: int = 800) -> Tab:
        """A new page in a window of its own, for a page in the background gets no keys."""
        made = self.call("Target.createTarget", url="about:blank", newWindow=True)
        found = self.call("Target.attachToTarget", targetId=made["targetId"], flatten=True)
        tab = Tab(self, found["sessionId"])
        tab.resize(width, height)
        return tab

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.call("Browser.close")
            self.process.wait(20)
        except (BrowserError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self._in)
        os.close(self._out)


class Tab:
    """One page."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self.browser, self.session = browser, session
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command for this page."""
        return self.browser.call(method, self.session, **params)

    def open(self, address: str) -> None:
        """Load an address."""
        self.call("Page.navigate", url=address)

    def errors(self) -> list[str]:
        """What the page complained about: exceptions, refused by policy, failed requests."""
        self.js("0")  # events that came before are read on the way to the answer
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(event["params"]["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded":
                entry = event["params"]["entry"]
                found += [entry["text"]] if entry["level"] == "error" else []
        return found

    def requests(self) -> list[str]:
        """The addresses that the page has asked for."""
        self.js("0")
        own = [e for e in self.browser.events if e.get("sessionId") == self.session]
        return [
            event["params"]["request"]["url"]
            for event in own
            if event["method"] == "Network.requestWillBeSent"
        ]

    def reload(self) -> None:
        """Load the page again, and wait until the old one has gone."""
        self.js("window.old = true")
        self.call("Page.reload")
        self.until("!window.old")

    def js(self, text: str) -> Any:
        """The value of an expression."""
        found = self.call(
            "Runtime.evaluate", expression=text, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise BrowserError(f"{text}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def until(self, text: str, seconds: float = WAIT) -> Any:
        """Wait until an expression is true; its value."""
        end = time.monotonic() + seconds
        while True:
            try:
                value = self.js(text)
            except BrowserError:  # between two pages there is nothing to ask
                value = None
            if value:
                return value
            if time.monotonic() > end:
                shown = self.js("document.body && document.body.innerText")
                raise BrowserError(f"never true: {text}; the page shows {shown!r}")
            time.sleep(0.02)

    def press(self, key: str, repeat: bool = False) -> None:
        """Press and release a key, as the keyboard does; ``repeat`` is a key that is held down."""
        event: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": _CODES.get(key, 0)}
        if len(key) == 1:
            event.update(text=key, windowsVirtualKeyCode=ord(key.upper()))
        elif key == "Enter":
            event["text"] = "\r"
        kind = "keyDown" if "text" in event else "rawKeyDown"
        self.call("Input.dispatchKeyEvent", type=kind, autoRepeat=repeat, **event)
        if not repeat:
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        """Type text."""
        for letter in text:
            self.press(letter)

    def fill(self, selector: str, text: str) -> None:
        """Replace a field's text by typing."""
        self.js(f"(e => {{e.focus(); e.select()}})(document.querySelector({selector!r}))")
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Click in the middle of an element."""
        x, y = self.js(
            "(e => {e.scrollIntoView(); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]})"
            f"(document.querySelector({selector!r}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        """The size of the window, and whether the reader likes it dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def shot(self, path: Path, whole: bool = False) -> None:
        """A screenshot as PNG, of the window or of the whole page."""
        made = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(made["data"]))
