"""`wds-train check-store URL`: test whether a store does all that wds-train needs."""

import argparse
import json
from dataclasses import asdict

from wds_train.storage.address import check_address
from wds_train.storage.open import open_store
from wds_train.storage.survey import check

SIGNS = {"ok": "ok", "note": "note", "fail": "FAIL"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url",
        metavar="URL",
        help="s3://bucket/prefix, where objects may be written, or a directory",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    store = open_store(check_address(args.url, "URL"))
    found = []
    for finding in check(store):
        found.append(finding)
        if not args.json:
            # Each is printed when it is known, so the columns' widths are fixed.
            print(f"{finding.name:22}{SIGNS[finding.state]:6}{finding.text}", flush=True)
    usable = not any(finding.state == "fail" for finding in found)
    if args.json:
        rows = [asdict(finding) for finding in found]
        print(json.dumps({"url": store.url, "usable": usable, "found": rows}, indent=1))
    else:
        verdict = "can be used" if usable else "cannot be used"
        print(f"{store.url} {verdict} for runs and datasets")
    return 0 if usable else 1
