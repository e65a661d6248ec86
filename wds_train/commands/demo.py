"""`wds-train demo`: try a model in the browser."""

import argparse

from wds_train.commands.flags import add_bucket, resolve_model
from wds_train.config.numbers import Number
from wds_train.console import loading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="RUN_OR_FILE", help="a run as elsewhere, or a file of `wds-train export`"
    )
    add_bucket(parser, "runs/ lives")
    parser.add_argument(
        "--port",
        type=Number(int, 1, 65535),
        default=7860,
        metavar="N",
        help="the port on this machine (default: %(default)s)",
    )
    parser.add_argument(
        "--python",
        metavar="FILE",
        help="a Python that has gradio and onnxruntime (default: this one; make demo: its own)",
    )


def run(args: argparse.Namespace) -> int:
    loading()
    from wds_train.serving.demo_page import serve

    return serve(resolve_model(args.model, args.bucket), args.python, args.port)
