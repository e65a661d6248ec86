"""The quickstart's notebook runs, cell after cell.

`make check-notebook` has Jupyter itself run it.
"""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"


def test_every_cell_runs(
    aws_env: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aws_env.chdir(tmp_path)  # the notebook goes to a folder of its own, from which we come back
    aws_env.setenv("TMPDIR", str(tmp_path))
    aws_env.setattr("tempfile.tempdir", None)
    aws_env.setenv("OMP_NUM_THREADS", "1")
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        source = "".join(cell["source"])
        assert not cell.get("outputs"), "the notebook is kept without outputs"
        if cell["cell_type"] != "code":
            continue
        if written := re.fullmatch(r"%%writefile (\S+)\n(.*)", source, re.S):
            assert "epochs=6" in written[2]
            Path(written[1]).write_text(
                written[2].replace("epochs=6", "epochs=2")
            )  # 50 steps will do
        else:
            exec(compile(source, cell["id"], "exec"), names)
    plt.close("all")
    told = capsys.readouterr().out
    assert re.search(r"going on at step [1-9]", told), told
    assert "equal to the last bit: True" in told
    assert re.search(r"\d+ of 179 right", told), told
