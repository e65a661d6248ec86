"""W&B's server, as much of its API as a run meets, on loopback; and what is in the files of an offline run."""

import gzip
import json
import re
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

DELETED = "run {} was previously created and deleted; try a new run name"


class FakeWandb:
    """Set `broken` to a status to answer with, or to seconds of silence; `stopped`: whether somebody has pressed Stop.

    `history` is what each run's page shows, and `said` every GraphQL request: (name, variables).
    `places` holds where each page is, as (entity, project). `deleted` holds the ids of pages that a
    person deleted, and `refusal` a status and message to refuse to open any page with.
    """

    def __init__(self) -> None:
        self.broken: int | float | None = None
        self.stopped, self._dead = False, False
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.ends: list[dict[str, Any]] = []
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.places: dict[str, set[tuple[str, str]]] = {}
        self.deleted: set[str] = set()
        self.refusal: tuple[int, str] | None = None

    def __enter__(self) -> Self:
        wandb = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                wandb._answer(
                    self,
                    gzip.decompress(body)
                    if self.headers.get("Content-Encoding") == "gzip"
                    else body,
                )

            do_GET = do_PUT = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads, self._server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {
            "WANDB_MODE": "online",
            "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": self.url,
        }
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.die()

    def die(self) -> None:
        self._dead = True  # on connections that are open, too, as a process that is gone
        self._server.shutdown()
        self._server.server_close()

    def delete(self, run: str) -> None:
        """Delete a page, as a person does."""
        self.deleted.add(run)
        del self.history[run]

    def alerts(self) -> list[str]:
        return [values["title"] for name, values in self.said if name == "NotifyScriptableRunAlert"]

    def _answer(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        if self._dead:
            request.close_connection = True
            return
        if isinstance(self.broken, float):
            time.sleep(self.broken)
        asked = json.loads(body or b"{}")
        status, message = self._refused(request.path, asked)
        if status == 200:
            answer = json.dumps(self._say(request.path, asked)).encode()
        else:
            answer = json.dumps({"errors": [{"message": message}]} if message else {}).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(answer)))
        request.end_headers()
        request.wfile.write(answer)

    def _refused(self, path: str, asked: dict[str, Any]) -> tuple[int, str]:
        """The status to answer with, and the message of an error."""
        if isinstance(self.broken, int):
            return self.broken, ""
        if self.refusal is not None and (
            "UpsertBucket" in asked.get("query", "") or self.refusal[0] == 401
        ):
            return self.refusal
        name = (asked.get("variables") or {}).get("name")
        if name in self.deleted and "UpsertBucket" in asked.get("query", ""):
            return 409, DELETED.format(name)
        if path.endswith("/file_stream") and path.split("/")[-2] in self.deleted:
            return 404, "run not found"
        return 200, ""

    def _say(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            return self._stream(path.split("/")[-2], asked)
        name = re.findall(r"(?:query|mutation)\s+(\w+)", asked.get("query", ""))
        if not name:
            return {}
        values = asked.get("variables") or {}
        self.said.append((name[0], values))
        known = self.history.get(values.get("name"))
        entity = {"id": "e", "name": values.get("entity") or "me"}
        project = {"id": "p", "name": values.get("project") or "uncategorized", "entity": entity}
        bucket = None if known is None else _bucket(values.get("name"), known, project)
        new = _bucket(values.get("name"), [], project)
        found: dict[str, Any] = {
            "RunResumeStatus": {"model": project | {"bucket": bucket}},
            "UpsertBucket": {"upsertBucket": {"bucket": new, "inserted": known is None}},
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "Viewer": {
                "viewer": {
                    "id": "v",
                    "entity": "me",
                    "username": "me",
                    "flags": "{}",
                    "teams": {"edges": []},
                }
            },
            "CreateRunFiles": {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []}},
            "NotifyScriptableRunAlert": {"notifyScriptableRunAlert": {"success": True}},
        }
        if name[0] == "UpsertBucket" and values.get("name"):
            self.history.setdefault(values["name"], [])
            if values.get("project"):  # W&B leaves both out when it changes a run that is open
                self.places.setdefault(values["name"], set()).add((entity["name"], project["name"]))
        return (
            {"data": found[name[0]]}
            if name[0] in found
            else {"errors": [{"message": f"no {name[0]}"}]}
        )

    def _stream(self, run: str, asked: dict[str, Any]) -> dict[str, Any]:
        file = asked.get("files", {}).get("wandb-history.jsonl")
        if file:
            rows = self.history.setdefault(run, [])
            rows[file["offset"] :] = map(json.loads, file["content"])
        if "exitcode" in asked:
            self.ends.append(asked)
        return {"stopped": self.stopped}


def _bucket(
    run: str | None, history: list[dict[str, Any]], project: dict[str, Any]
) -> dict[str, Any]:
    lines = {
        "historyLineCount": len(history),
        "eventsLineCount": 0,
        "logLineCount": 0,
        "eventsTail": "[]",
    }
    last = json.dumps(history[-1]) if history else "{}"
    texts = {
        "summaryMetrics": last,
        "config": "{}",
        "wandbConfig": '{"t": {}}',
        "historyTail": json.dumps([last]),
    }
    names = {"id": "x", "name": run, "displayName": "d", "sweepName": None, "tags": []}
    return names | lines | texts | {"project": project}


def offline_records(folder: Path) -> list[Any]:
    """The records of an offline run's file: a header, then LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("run-*.wandb")
    data, at, whole, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole, or its last part
            records.append(Record.FromString(whole))
            whole = b""
    return records


def offline_history(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in offline_records(folder)
        if record.HasField("history")
    ]
