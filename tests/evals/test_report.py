"""Files of results: rows of a long measurement go on where they stopped, and only those of the same measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from starflow2.errors import ConfigError
from starflow2.evals.report import KeptRows

CONFIG = {"steps": 3, "arms": ["a", "b"]}


def test_rows_go_on_where_they_stopped_and_others_are_never_overwritten(tmp_path):
    kept = KeptRows(tmp_path / "rows.json", CONFIG)
    assert kept.read() == []
    kept.write([{"arm": "a"}])
    assert kept.read() == [{"arm": "a"}]
    with pytest.raises(ConfigError, match="another budget"):
        KeptRows(kept.path, CONFIG | {"steps": 4}).read()


@pytest.mark.parametrize("rows", [None, 5, {}, [1], [[]]], ids=str)
def test_a_file_without_rows_is_refused_by_name(tmp_path, rows):
    path = Path(tmp_path) / "rows.json"
    path.write_text(json.dumps({"config": CONFIG} | ({} if rows is None else {"rows": rows})))
    with pytest.raises(ConfigError, match=r"rows\.json has no list of rows"):
        KeptRows(path, CONFIG).read()
