"""EC2's instance metadata service (IMDSv2), as much of it as a trainer meets, on loopback."""

import contextlib
import json
import threading
import time
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

ROLE = "wds-train-role"


class FakeImds:
    """Set `notice` and `rebalance` to what the service shall say; `broken` to a status or to seconds of silence.

    `more`: other documents by their paths, such as `instance-id`. `asked` counts the requests by (method, path, status).
    `keys`: the role's (access key, secret key), which expire `lifetime` seconds after each request for them (boto3 takes it upon itself to use them 15 minutes more).
    """

    def __init__(
        self, keys: tuple[str, str] = ("access", "secret"), lifetime: float = 3600
    ) -> None:
        self.notice: dict[str, str] | None = None
        self.rebalance = False
        self.broken: int | float | None = None
        self.keys = keys
        self.lifetime = lifetime
        self.more: dict[str, str] = {}
        self.asked: Counter[tuple[str, str, int]] = Counter()
        self._tokens: set[str] = set()

    def __enter__(self) -> Self:
        imds = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                imds._answer(self)

            do_GET = do_PUT

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
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
        self._server.shutdown()
        self._server.server_close()

    def give_notice(self, seconds: float = 120) -> None:
        self.notice = {"action": "terminate", "time": _utc(seconds)}

    def expire_tokens(self) -> None:
        self._tokens.clear()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        if isinstance(self.broken, float):
            time.sleep(self.broken)
        status, body = self._say(request) if not isinstance(self.broken, int) else (self.broken, "")
        self.asked[request.command, request.path, status] += 1
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        if "X-aws-ec2-metadata-token-ttl-seconds" in request.headers:
            request.send_header("X-aws-ec2-metadata-token-ttl-seconds", "21600")
        with contextlib.suppress(ConnectionError):  # who waits too long has hung up
            request.end_headers()
            request.wfile.write(body.encode())

    def _say(self, request: BaseHTTPRequestHandler) -> tuple[int, str]:
        if request.command == "PUT":
            if (
                request.path != "/latest/api/token"
                or "X-aws-ec2-metadata-token-ttl-seconds" not in request.headers
            ):
                return 400, ""
            self._tokens.add(token := uuid.uuid4().hex)
            return 200, token
        if request.headers.get("X-aws-ec2-metadata-token") not in self._tokens:
            return 401, ""
        return self._documents().get(
            request.path.removeprefix("/latest/meta-data/").rstrip("/"), (404, "")
        )

    def _documents(self) -> dict[str, tuple[int, str]]:
        credentials = {
            "Code": "Success",
            "Type": "AWS-HMAC",
            "AccessKeyId": self.keys[0],
            "SecretAccessKey": self.keys[1],
            "Token": "",
            "LastUpdated": _utc(0),
            "Expiration": _utc(self.lifetime),
        }
        documents = {
            "instance-type": (200, "g5.2xlarge"),
            "iam/security-credentials": (200, ROLE),
            f"iam/security-credentials/{ROLE}": (200, json.dumps(credentials)),
        }
        documents |= {path: (200, text) for path, text in self.more.items()}
        if self.notice:
            documents["spot/instance-action"] = 200, json.dumps(self.notice)
        if self.rebalance:
            documents["events/recommendations/rebalance"] = 200, json.dumps({"noticeTime": _utc(0)})
        return documents


def _utc(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
