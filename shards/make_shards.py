"""Convert a dataset to tar shards on S3: `python -m shards.make_shards SOURCE NAME`.

The same command as `wds-train shards`, whose code is in `wds_train/conversion/`.
"""

import sys

from wds_train.conversion.command import main

if __name__ == "__main__":
    sys.exit(main())
