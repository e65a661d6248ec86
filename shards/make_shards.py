"""Convert a dataset to tar shards on S3: `python -m shards.make_shards SOURCE NAME`.

The same command as `wds-train shards`, whose code is in `wds_train/conversion/`.
"""

import sys

from wds_train.cli import main as wds_train


def main() -> int:
    """Run `wds-train shards` with this process's arguments, and return its exit status."""
    return wds_train(["shards", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
