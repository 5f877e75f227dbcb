"""The notebooks run from the first cell to the last, and their last cells show what the text says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed; it comes with the dev extra")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed; it comes with the dev extra")
pytest.importorskip("ipykernel", reason="ipykernel is not installed; it comes with the dev extra")

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "docs" / "notebooks").glob("*.ipynb"))


def outputs(notebook: Any) -> list[dict[str, Any]]:
    """Everything that the cells printed or showed, in order."""
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_pictures(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert not outputs(notebook), "a notebook is committed without its outputs"
    ran = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any("image/png" in output.get("data", {}) for output in outputs(ran))
    text = "".join(output.get("text", "") for output in outputs(ran))
    if path.stem == "own-density":
        assert float(text.split()[0]) > 0.95  # the share of points that their own moon makes likelier
    if path.stem == "first-pictures":
        assert "yellow" in text  # the answer after the edit
