"""`wds-train demo`: try a model in the browser."""

import argparse
from pathlib import Path

from wds_train.commands.arguments import add_bucket, count, run_url
from wds_train.models.weights import SUFFIX


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_FILE", help="a run as elsewhere, or a file of `wds-train export`")
    add_bucket(parser, "runs/ lives")
    parser.add_argument("--port", type=count, default=7860, metavar="N", help="on this machine (%(default)s)")
    parser.add_argument(
        "--python",
        type=Path,
        metavar="FILE",
        help="one that has gradio and onnxruntime (default: this one; make demo: its own)",
    )


def run(args: argparse.Namespace) -> int:
    from wds_train.serving.demo import serve  # of the extra `serve`, and slow to import

    source = args.model if args.model.endswith(SUFFIX) else run_url(args.model, args.bucket)
    return serve(source, args.python, args.port)
