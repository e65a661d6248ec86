"""The command that ckpt-chaos starts, kills and starts again: a training, or the digest of what it has come to.

It has its work done by `chaos_trainer.Server`, which has PyTorch imported already, and lives and dies with it.
"""

import json
import os
import socket
import sys


def main() -> int:
    """Send the arguments and the environment to the server; print what comes back and return the exit code."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["CHAOS_SOCKET"])
        request = {"arguments": sys.argv[1:], "environment": dict(os.environ)}
        server.sendall(json.dumps(request).encode() + b"\n")
        with server.makefile() as answer:
            told = json.loads(answer.readline())
    print(told["output"], flush=True)
    return told["code"] if told["code"] >= 0 else 128 - told["code"]


if __name__ == "__main__":
    sys.exit(main())
