"""The notebooks run from the first cell to the last, and their last cells show what the text says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed; it comes with the dev extra")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed; it comes with the dev extra")
pytest.importorskip("ipykernel", reason="ipykernel is not installed; it comes with the dev extra")

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "docs" / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def outputs(cells: list[Any]) -> list[dict[str, Any]]:
    """Everything that the cells printed or showed, in order."""
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, list[Any]]:
    """The cells of every notebook after they ran, one notebook after the other in one kernel.

    Between two of them the kernel forgets every name; what it has imported stays, which is most of the price of one.
    """
    cells, ends = [], []
    for path in NOTEBOOKS:
        folder = tmp_path_factory.mktemp(path.stem)
        cells += [nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {folder}"), *read(path).cells]
        ends.append(len(cells))
    for number, cell in enumerate(cells):  # every notebook counts its own from 0
        cell.id = f"cell-{number}"
    whole = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(whole, timeout=240, allow_errors=True).execute()
    return {path: whole.cells[a:b] for path, a, b in zip(NOTEBOOKS, [0, *ends[:-1]], ends, strict=True)}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_pictures(path: Path, ran: dict[Path, list[Any]]) -> None:
    assert not outputs(read(path).cells), "a notebook is committed without its outputs"
    found = outputs(ran[path])
    assert not [output for output in found if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in found)
    text = "".join(output.get("text", "") for output in found)
    if path.stem == "own-density":
        assert float(text.split()[0]) > 0.95  # the share of points that their own moon makes likelier
    if path.stem == "first-pictures":
        assert "yellow" in text  # the answer after the edit
