"""Tables put floor and ceiling beside every headline, and say which suite it was."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from starflow2.errors import ConfigError
from starflow2.evals.statistics import Score, Scores
from starflow2.evals.suite import Report
from starflow2.evals.tables import HEADINGS, ledger_record, lines, table


def scores(by_kind=None, **columns):
    made = {name: Score(value, value - 0.1, value + 0.1) for name, value in columns.items()}
    return Scores(8, 8, made, by_kind or {})


def both(found):
    return {"id": found, "cg": found}


MME = Report(
    suite="mme",
    split="test",
    quick=False,
    n=768,
    parts={name: scores({"count": scores(score=150)}, total=total) for name, total in (("id", 900), ("cg", 850))},
    bounds={
        "floor": both(scores(always_yes=300, coin=450)),
        "vlm": both(scores({"count": scores(score=160)}, total=1000)),
    },
)
NAMES = ("success", "applied", "preserved", "overall")
EDIT = Report(
    suite="edit",
    split="dev",
    quick=True,
    n=63,
    parts=both(scores({"move": scores(success=0.25)}, **dict.fromkeys(NAMES, 0.5))),
    bounds={"copy": both(scores(**dict.fromkeys(NAMES, 0))), "ceiling": both(scores(**dict.fromkeys(NAMES, 1)))},
)


def test_lines_put_floor_and_ceiling_beside_every_headline():
    first, second = lines(MME)
    assert first[0] == "total of 1,200" and first[1].startswith("900 [") and first[3] == "50"
    assert "300 always yes" in first[4] and first[5] == "1000 / 1000"
    assert second[0] == "count" and second[5] == "160 / 160"
    success = lines(EDIT)[0]
    assert success[0] == "success" and success[4:] == ("0.000 / 0.000", "1.000 / 1.000")
    assert [line[0] for line in lines(EDIT)[-2:]] == ["move: success", "twins of 100"]


def test_what_was_not_measured_is_a_dash():
    bare = Report(suite="mme", split="dev", quick=True, n=8, parts=MME.parts, bounds={"floor": MME.bounds["floor"]})
    assert lines(bare)[0][5] == "– / –"


def test_tables_say_which_suite_and_whether_it_was_a_quick_run():
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(EDIT))
    text = " ".join(console.export_text().split())
    assert "W-Edit, quick dev, 63 items" in text and all(heading in text for heading in HEADINGS)
    assert "handed back unchanged" in text


def test_a_ledger_record_has_the_cells_of_the_table_and_only_full_test_runs_have_one():
    record = ledger_record(MME)
    assert record["suite"] == "mme" and record["n"] == 768 and "model" not in record
    assert record["lines"]["count"] == {
        "id": lines(MME)[1][1],
        "cg": lines(MME)[1][2],
        "floor": "50 / 75",
        "ceiling": "160 / 160",
    }
    with pytest.raises(ConfigError, match="only full test runs"):
        ledger_record(EDIT)
