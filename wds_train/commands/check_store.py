"""`wds-train check-store URL`: what a store does of all that wds-train asks of one."""

import argparse
import json
from dataclasses import asdict

from wds_train.storage.address import checked
from wds_train.storage.open import open_store
from wds_train.storage.survey import check

SIGNS = {"ok": "ok", "note": "note", "fail": "FAIL"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="s3://bucket/prefix, where objects may be written, or a directory")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    store = open_store(checked(args.url, "URL"))
    found = []
    for finding in check(store):
        found.append(finding)
        if not args.json:
            print(f"{finding.name:22}{SIGNS[finding.state]:6}{finding.text}", flush=True)
    usable = not any(finding.state == "fail" for finding in found)
    if args.json:
        print(json.dumps({"url": store.url, "usable": usable, "found": [asdict(each) for each in found]}, indent=1))
    else:
        print(f"{store.url} {'can be used' if usable else 'cannot be used'} for runs and datasets")
    return 0 if usable else 1
