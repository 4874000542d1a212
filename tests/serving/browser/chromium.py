"""A headless Chromium, driven over its DevTools protocol: just what the tests of the page need."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--disable-extensions", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
    "--autoplay-policy=no-user-gesture-required", "--allow-loopback-in-peer-connection", "--mute-audio",
    "--hide-scrollbars", "--remote-debugging-port=0",
]  # fmt: skip
DESKTOP, PHONE = (1280, 860), (390, 844)
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40}


class PageError(AssertionError):
    """JavaScript that was evaluated threw."""


class Page:
    """One tab. `requests` and `complaints` collect what it asked for, and what its console says."""

    def __init__(self, socket: ClientConnection, downloads: Path) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.downloads = downloads
        self.requests: list[str] = []
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        about = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])
            case "Network.webSocketCreated":
                self.requests.append(about["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(about["exceptionDetails"])[:500])
            case "Log.entryAdded" if about["entry"]["level"] == "error":
                self.complaints.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")

    # ---- looking -------------------------------------------------------------------------------------------

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, which may be a promise."""
        answer = self.command(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise PageError(f"{expression}: {json.dumps(answer['exceptionDetails'])[:500]}")
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 30.0) -> Any:
        """Until an expression is true; its value."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if value := self.evaluate(condition):
                return value
            time.sleep(0.05)
        raise AssertionError(f"not in {seconds} s: {condition}; the page says {self.evaluate(SAYS)!r}")

    def text(self, selector: str) -> str:
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def screenshot(self, name: str) -> None:
        """Kept in the folder BROWSER_SCREENSHOTS, if there is one: for people to look at."""
        folder = os.environ.get("BROWSER_SCREENSHOTS")
        if not folder:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        picture = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(picture))

    # ---- doing ---------------------------------------------------------------------------------------------

    def open(
        self, url: str, size: tuple[int, int] = DESKTOP, *, dark: bool = False, still: bool = False
    ) -> None:
        """`still`: for somebody who wants less motion."""
        self.show(size, dark=dark, still=still)
        self.command("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && document.getElementById('start') !== null")

    def show(self, size: tuple[int, int], *, dark: bool = False, still: bool = False) -> None:
        width, height = size
        mobile = width < 600
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        self.command("Emulation.setEmulatedMedia", features=features)

    def before_loading(self, script: str) -> None:
        self.command("Page.addScriptToEvaluateOnNewDocument", source=script)

    def click(self, selector: str) -> None:
        """Where it is, as a mouse does: what covers it would get the click."""
        found = json.dumps(selector)
        x, y = self.evaluate(
            f"(() => {{ const e = document.querySelector({found}); e.scrollIntoView({{block: 'center'}});"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, *names: str, shift: bool = False) -> None:
        for name in names:
            text = {"Enter": "\r"}.get(name, name if len(name) == 1 else "")
            code = KEYS.get(name, ord(name[0].upper()))
            about = {"key": name, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
            self.command(
                "Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {})
            )
            self.command("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        self.command("Input.insertText", text=text)

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.command("DOM.getDocument")["root"]["nodeId"]
        node = self.command("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.command("DOM.setFileInputFiles", nodeId=node, files=[str(path)])


SAYS = "[document.body.dataset.state, document.body.innerText.slice(0, 400)]"


class Browser:
    def __init__(self, port: int, root: ClientConnection) -> None:
        self._port, self._root = port, root

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._root.send(json.dumps({"id": 1, "method": method, "params": params}))
        while "id" not in (message := json.loads(self._root.recv(timeout=30))):
            pass
        assert "error" not in message, message
        return message["result"]

    @contextlib.contextmanager
    def page(self) -> Iterator[Page]:
        """A tab with storage and permissions of its own."""
        context = self._ask("Target.createBrowserContext")["browserContextId"]
        target = self._ask("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        address = f"ws://127.0.0.1:{self._port}/devtools/page/{target}"
        try:
            with tempfile.TemporaryDirectory() as folder, connect(address, max_size=None) as socket:
                where = {"behavior": "allow", "downloadPath": folder, "browserContextId": context}
                self._ask("Browser.setDownloadBehavior", **where)
                yield Page(socket, Path(folder))
        finally:
            self._ask("Target.disposeBrowserContext", browserContextId=context)


@contextlib.contextmanager
def chromium(microphone: Path) -> Iterator[Browser]:
    """A browser whose microphone plays a WAV file again and again."""
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = [*FLAGS, f"--use-file-for-fake-audio-capture={microphone}", f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            [PROGRAM, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            port, path = _debugger(Path(profile) / "DevToolsActivePort", process)
            with connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as root:
                yield Browser(port, root)
        finally:
            process.kill()
            process.wait()


def _debugger(file: Path, process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Where the browser listens."""
    for _ in range(600):
        assert process.poll() is None, "chromium ended at once"
        if file.exists() and len(lines := file.read_text().split("\n")) == 2:
            return int(lines[0]), lines[1]
        time.sleep(0.05)
    raise AssertionError("chromium does not start")
