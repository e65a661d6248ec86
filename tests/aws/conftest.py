"""Make moto and boto3 quick.

Hundreds of machine images for each mocked account, and the models of the services, which each
session reads again, took half of the time.
"""

import functools
import os

from botocore.loaders import JSONFileLoader

os.environ["MOTO_EC2_LOAD_DEFAULT_AMIS"] = "false"
_load = JSONFileLoader().load_file
JSONFileLoader.load_file = staticmethod(functools.cache(_load))
