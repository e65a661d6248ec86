"""A person's script that uses the public names passes `mypy --strict`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wds_train import Batch, DataError, EvalLoader, SampleLoader, TrainLoader, keyed


def crop(image: NDArray[np.uint8], key: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    with keyed(rng):
        top = int(rng.integers(0, 3))
    return image[top : top + 8, :8]


def first(folder: Path) -> Batch:
    loader = TrainLoader(folder, 16, epochs=1, transform=crop, workers=0)
    for batch in loader:
        return batch
    raise DataError(f"{len(EvalLoader(folder, 16))} batches to evaluate")


for samples in SampleLoader("captions", 16, epochs=1, fields=("jpg", "txt")):
    print(samples.keys[0], samples.step + 1)
"""


def check(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    # As for an installed package, what is found in it is not reported. PyTorch takes half a minute.
    config = "[mypy]\nfollow_imports = silent\n[mypy-torch.*]\nfollow_imports = skip\n"
    (folder / "mypy.ini").write_text(config)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "mypy.ini", "script.py"]
    environment = {"MYPYPATH": str(ROOT), "PATH": ""}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_script_of_a_person_passes_and_its_mistake_is_found(tmp_path: Path) -> None:
    checked = check(tmp_path, SCRIPT)
    assert checked.returncode == 0, checked.stdout
    checked = check(tmp_path, SCRIPT.replace("epochs=1, transform", 'epochs="1", transform'))
    assert checked.returncode == 1
    assert 'Argument "epochs" to "TrainLoader" has incompatible type "str"' in checked.stdout


def test_the_package_says_that_it_has_types() -> None:
    assert (ROOT / "wds_train" / "py.typed").is_file()
