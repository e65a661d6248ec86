"""`python -m wds_train.aws.log_shipper GROUP STREAM`: lines from stdin to CloudWatch Logs, and to stdout as they come.

Whatever CloudWatch does, the writer of the lines never waits for it: beyond KEPT lines the oldest are left out, and counted.
"""

import sys
import threading
import time
from collections import deque
from typing import IO, Any

from botocore.exceptions import BotoCoreError, ClientError

EVERY_SECONDS = 5.0
KEPT = 5000  # lines that wait
LINES, LONGEST = (
    200,
    1000,
)  # characters, of up to 4 bytes: a request takes 1 MiB; what is longer is cut


class Shipper:
    """Lines on their way to a log stream. `lost` counts those that were left out."""

    def __init__(self, client: Any, group: str, stream: str) -> None:
        self.lost = 0
        self._client, self._place = client, {"logGroupName": group, "logStreamName": stream}
        self._waiting: deque[dict[str, Any]] = deque()
        self._made = False

    def add(self, line: str) -> None:
        if len(self._waiting) >= KEPT:
            self._waiting.popleft()
            self.lost += 1
        self._waiting.append(
            {"timestamp": int(time.time() * 1000), "message": line.rstrip("\n")[:LONGEST] or " "}
        )

    def flush(self) -> None:
        """Send what waits; what fails stays for the next time."""
        try:
            if not self._made:
                self._client.create_log_stream(**self._place)
                self._made = True
            while self._waiting:
                part = [self._waiting.popleft() for _ in range(min(LINES, len(self._waiting)))]
                try:
                    self._client.put_log_events(**self._place, logEvents=part)
                except (BotoCoreError, ClientError):
                    self._waiting.extendleft(reversed(part))
                    raise
        except (BotoCoreError, ClientError) as error:
            print(
                f"wds-train: CloudWatch took no log ({str(error)[:200]}); trying again",
                file=sys.stderr,
                flush=True,
            )


def ship(lines: IO[str], shipper: Shipper, every: float = EVERY_SECONDS) -> None:
    """Send `lines` on until they end."""
    ended = threading.Event()

    def read() -> None:
        for line in lines:
            print(line, end="", flush=True)
            shipper.add(line)
        ended.set()

    threading.Thread(target=read, daemon=True).start()
    while not ended.wait(every):
        shipper.flush()
    shipper.flush()


if __name__ == "__main__":
    import boto3
    from botocore.config import Config

    patience = Config(
        connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 2, "mode": "standard"}
    )
    ship(sys.stdin, Shipper(boto3.client("logs", config=patience), *sys.argv[1:3]))
