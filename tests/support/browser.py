"""A headless Chromium, told by its own protocol over a pipe what to open and to measure."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


class Browser:
    """`events` are all that Chromium reported."""

    def __init__(self, profile: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._profile, self._number, self._rest = profile, 0, b""

    def __enter__(self) -> Self:
        (down_read, self._write), (self._read, up_write) = os.pipe(), os.pipe()
        # It reads from descriptor 3, and writes to 4: neither may be a pipe's own, nor anything of this process be closed.
        moved = [fcntl.fcntl(end, fcntl.F_DUPFD, 5) for end in (down_read, up_write)]
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile}",
        ]
        command = " ".join([f"exec {CHROMIUM}", *flags, f"3<&{moved[0]} 4>&{moved[1]}"])
        self._process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=moved, stderr=subprocess.DEVNULL
        )
        for end in (down_read, up_write, *moved):
            os.close(end)
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = ""
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command."""
        self._number += 1
        session = {"sessionId": self._session} if getattr(self, "_session", "") else {}
        message = {"id": self._number, "method": method, "params": params} | session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda found: found.get("id") == self._number)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str, width: int, *, dark: bool) -> None:
        mobile = width < 600
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=url)
        self._until(lambda found: found.get("method") == "Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)[
            "result"
        ].get("value")

    def press(self, key: str, number: int) -> None:
        """A key, by its name and its number, as a keyboard sends it."""
        for kind in ("keyDown", "keyUp"):
            self.ask(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=number,
                text="\r" * (key == "Enter" and kind == "keyDown"),
            )

    def screenshot(self, path: Path) -> None:
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            while b"\0" not in self._rest:
                read = os.read(self._read, 1 << 20)
                assert read, "Chromium has ended"
                self._rest += read
            text, _, self._rest = self._rest.partition(b"\0")
            found = json.loads(text)
            self.events.append(found)
            if wanted(found):
                return found
