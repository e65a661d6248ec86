"""The demo's page as a process, and visitors who speak HTTP to it without a browser's manners."""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("WDS_DEMO_PYTHON", ROOT / ".venv-demo" / "bin" / "python"))


class Page:
    """The page at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=120, trust_env=False)
        config = self.http.get("/config").json()
        ids = {
            entry["type"]: entry["id"]
            for entry in config["components"]
            if entry["type"] in ("radio", "button")
        }
        self.choice = next(e for e in config["components"] if e["type"] == "radio")["props"][
            "value"
        ]
        self.answers = next(e["id"] for e in config["dependencies"] if ids["radio"] in e["inputs"])
        pressed = [
            e["id"] for e in config["dependencies"] if [ids.get("button"), "click"] in e["targets"]
        ]
        self.learned = pressed[0] if pressed else None

    def upload(self, name: str, data: bytes, kind: str = "image/jpeg") -> httpx.Response:
        return self.http.post("/gradio_api/upload", files={"files": (name, data, kind)})

    def ask(self, path: Any, name: str = "photo.jpg") -> dict[str, Any]:
        """Ask about an uploaded file, and return the event that ends the call."""
        image = (
            path
            if isinstance(path, dict)
            else {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        )
        return self.call(self.answers, [image, self.choice])

    def call(self, function: int, data: list[Any]) -> dict[str, Any]:
        session = secrets.token_hex(6)
        body = {"data": data, "fn_index": function, "session_hash": session}
        joined = self.http.post("/gradio_api/queue/join", json=body)
        if joined.status_code != 200:
            return {"success": False, "output": {"error": joined.text}}
        with self.http.stream(
            "GET", "/gradio_api/queue/data", params={"session_hash": session}
        ) as events:
            for line in events.iter_lines():
                event = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if event.get("msg") in ("process_completed", "unexpected_error"):
                    return event
        raise AssertionError("the call never ended")

    def answer(self, name: str, data: bytes) -> dict[str, Any]:
        uploaded = self.upload(name, data)
        if uploaded.status_code != 200:
            return {"success": False, "output": {"error": uploaded.text}}
        return self.ask(uploaded.json()[0], name)


@contextlib.contextmanager
def served_page(command: list[str], folder: Path, port: int) -> Iterator[tuple[Page, int]]:
    """Run `command`, which serves the page at `port`; yield the page and the process's id.

    The output goes to `folder`/log.
    """
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env=os.environ, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 120
            while not _answers(url):
                log_text = (folder / "log").read_text()
                assert process.poll() is None and time.monotonic() < deadline, log_text
                time.sleep(0.1)
            yield Page(url), process.pid
        finally:
            # Ctrl-C, by somebody who cannot wait.
            for number in (signal.SIGINT, *[signal.SIGTERM] * 100):
                os.killpg(process.pid, number)
                time.sleep(0.01)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(120)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/config", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def demo_command(run: str, port: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "wds_train.cli",
        "demo",
        run,
        "--python",
        str(PYTHON),
        "--port",
        str(port),
    ]


def leaks(text: str) -> list[str]:
    """Return the parts of `text` that tell where files are on the server."""
    return re.findall(r"/(?:tmp|home|work|root|usr|var)/[^\s\"']*", text)
