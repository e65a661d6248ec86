"""Send the log of an instance to CloudWatch Logs.

`python -m wds_train.aws.log_shipper GROUP STREAM` passes lines from stdin on, and prints them to
stdout as they come; `infra/run.sh` pipes the training into it. The training never waits for
CloudWatch: of more than KEPT lines, the oldest are left out and counted.
"""

import sys
import threading
import time
from collections import deque
from typing import IO, Any

from botocore.exceptions import BotoCoreError, ClientError

EVERY_SECONDS = 5.0  # between two requests
KEPT = 5000  # lines that wait
# The lines of a request, and the characters of a line, of up to 4 bytes: a request takes 1 MiB.
LINES = 200
LONGEST = 1000  # a longer line is cut


class Shipper:
    """Lines on their way to a log stream.

    Args:
        client: The client of CloudWatch Logs.
        group: The log group's name.
        stream: The log stream's name; it is made.

    Attributes:
        lost: The lines that were left out.
    """

    def __init__(self, client: Any, group: str, stream: str) -> None:
        self.lost = 0
        self._client = client
        self._place = {"logGroupName": group, "logStreamName": stream}
        self._waiting: deque[dict[str, Any]] = deque()
        self._made = False

    def add(self, line: str) -> None:
        """Take a line, which is sent with the next `flush`."""
        if len(self._waiting) >= KEPT:
            self._waiting.popleft()
            self.lost += 1
        # CloudWatch takes no empty line.
        message = line.rstrip("\n")[:LONGEST] or " "
        self._waiting.append({"timestamp": int(time.time() * 1000), "message": message})

    def flush(self) -> None:
        """Send the lines that wait. If that fails, they stay for the next time."""
        try:
            if not self._made:
                self._client.create_log_stream(**self._place)
                self._made = True
            while self._waiting:
                self._send_some()
        except (BotoCoreError, ClientError) as error:
            print(
                f"wds-train: CloudWatch took no log ({str(error)[:200]}); trying again",
                file=sys.stderr,
                flush=True,
            )

    def _send_some(self) -> None:
        # Taken out first: meanwhile `add` may drop the oldest of those that wait.
        part: list[dict[str, Any]] = []
        while self._waiting and len(part) < LINES:
            part.append(self._waiting.popleft())
        try:
            self._client.put_log_events(**self._place, logEvents=part)
        except (BotoCoreError, ClientError):
            self._waiting.extendleft(reversed(part))
            raise


def ship(lines: IO[str], shipper: Shipper, every: float = EVERY_SECONDS) -> None:
    """Print lines and send them on, until they end.

    Args:
        lines: The lines.
        shipper: Sends them.
        every: Seconds between two requests.
    """
    ended = threading.Event()

    # A thread reads: CloudWatch may be slow, and a full pipe would stop the training.
    def read() -> None:
        for line in lines:
            print(line, end="", flush=True)
            shipper.add(line)
        ended.set()

    threading.Thread(target=read, daemon=True).start()
    # Once more at the end, for the last lines.
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
