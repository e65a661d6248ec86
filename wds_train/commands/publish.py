"""`wds-train publish`: write a run's model repository and its demo page."""

import argparse
from pathlib import Path

from wds_train.checkpoint.find import find_run
from wds_train.commands.flags import add_run, resolve_run
from wds_train.console import loading
from wds_train.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet"
    )
    parser.add_argument(
        "--licence",
        required=True,
        metavar="ID",
        help="licence of the model, which you choose, as the hub calls it: apache-2.0, mit, "
        "cc-by-nc-4.0, other, ...",
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload both to the Hugging Face hub under this name"
    )


def run(args: argparse.Namespace) -> int:
    loading()
    try:
        from wds_train.serving import publishing
    except ImportError as error:
        raise UsageError(f"publish needs {error.name}: install wds-train[serve]") from error
    from wds_train.checkpoint.restore import from_newest
    from wds_train.evaluation.per_class import describe_weights
    from wds_train.serving.calibrated_weights import load_both_kinds
    from wds_train.training.ranks import Ranks

    publishing.refuse_arguments(args.to, args.licence, args.push)
    manifest, store = find_run(resolve_run(args.run, args.bucket))
    device = Ranks().device
    choices = from_newest(store, manifest, lambda newest: load_both_kinds(store, newest, device))
    publishing.write_repositories(
        args.to, manifest, choices, args.licence, args.push, device=device
    )
    print(f"{args.to}/model: the {describe_weights(choices[0])}; ONNX file and card")
    space = f"{args.to}/space"
    print(
        f"{space}: the page; try it: pip install -r {space}/requirements.txt, python {space}/app.py"
    )
    if args.push:
        print("\n".join(publishing.push(args.to, args.push)))
    else:
        print(f"to upload it, type\n{publishing.upload_commands(args.to, 'OWNER/NAME')}")
    return 0
