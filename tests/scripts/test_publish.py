"""Shipping a run's models: pieces that need no weights, and the pages that an example stands on."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Barrier
from typing import ClassVar

import pytest
from publish import Publisher, headlines, main, markdown_of, minutes_of, pages_with, sheet_prompts

from model_cases import STAGES, tiny_components
from starflow2.evals.report import write_json
from starflow2.evals.statistics import Score, Scores
from starflow2.evals.suite import Report
from starflow2.models.checkpoint import load_components, save_components, weights_digest

ROOT = Path(__file__).resolve().parents[2]


def rows(scores: Score) -> Report:
    """A report of W-MME with one score everywhere."""
    found = Scores(4, 4, {"total": scores})
    floor = Scores(4, 4, {"always_yes": Score(300), "coin": Score(450)})
    return Report(
        suite="mme", split="test", quick=False, n=4, parts={"id": found, "cg": found}, bounds={"floor": {"id": floor}}
    )


def test_minutes_of_a_stage_are_its_steps_times_their_seconds(tmp_path):
    steps = [{"step": 10, "seconds": 3.0}, {"step": 20, "seconds": 6.0}, {"step": 20, "held_out": 1.0}]
    (tmp_path / "metrics-fae.jsonl").write_text("\n".join(map(json.dumps, steps)))
    assert minutes_of(tmp_path) == {"fae": pytest.approx((10 * 3 + 10 * 6) / 60)}


def test_a_report_becomes_a_table_and_headlines():
    report = rows(Score(900.0, 850.0, 950.0))
    text = "\n".join(markdown_of(report))
    assert text.startswith("### W-MME-p") and "| total of 1,200 | 900 [850, 950] |" in text and "Ceiling" in text
    assert headlines(report)["id"] == {"total": [900.0, 850.0, 950.0]}
    assert headlines(report)["floor id"]["coin"] == [450]


def test_the_sheet_shows_eight_prompts_of_four_kinds():
    prompts = sheet_prompts()
    assert len(prompts) == len(set(prompts)) == 32 and all(prompts)


def test_pages_with_an_example_are_found():
    assert "README.md" in pages_with(ROOT, "two pink hearts", "")
    assert pages_with(ROOT, "seventeen plaid aardvarks", "") == []


def test_models_of_a_run_replace_the_shipped_ones_whole(tmp_path, capsys):
    run, assets = tmp_path / "run", tmp_path / "assets"
    save_components(tiny_components(STAGES), run / "nano")
    (assets / "nano").mkdir(parents=True)
    (assets / "nano" / "left-over.txt").write_text("of the old model")
    publisher = Publisher(run, tmp_path, assets, images=2)
    publisher.model()
    assert not (assets / "nano" / "left-over.txt").exists() and load_components(assets / "nano").finished_stages
    assert "nano-heldout stays as it is" in capsys.readouterr().out and publisher.models == ["nano"]


def test_a_card_says_by_which_command_and_how_a_run_was_made(tmp_path):
    (tmp_path / "assets" / "nano").mkdir(parents=True)
    (tmp_path / "assets" / "nano" / "config.json").write_text("{}")
    (tmp_path / "docs" / "results").mkdir(parents=True)
    Publisher(
        tmp_path, tmp_path, tmp_path / "assets", command="starflow2 train nano-grown", how="resumed twice."
    ).card()
    card = (tmp_path / "assets" / "nano" / "card.md").read_text()
    assert "One run of `starflow2 train nano-grown`, commit " in card and "resumed twice." in card
    assert "from the start" not in card


class Asked(Publisher):
    """Writes down what it would run, and waits until as many are running."""

    meeting = Barrier(2)
    asked: ClassVar[list[tuple[str, ...]]] = []

    def _starflow2(self, *words: str) -> None:
        self.meeting.wait(timeout=20)
        self.asked.append(words)


def test_reports_that_are_missing_are_made_side_by_side(tmp_path, monkeypatch):
    assets = tmp_path / "assets"
    save_components(tiny_components(STAGES), assets / "nano")
    publisher = Asked(tmp_path, tmp_path, assets, jobs=2)
    monkeypatch.setattr("publish.SUITES", ("mme", "gqa", "mcq"))
    write_json({"weights": weights_digest(load_components(assets / "nano"))}, publisher.report("nano", "gqa"))
    publisher.scores()
    assert {words[3] for words in publisher.asked} == {"mme", "mcq"} and all("test" in w for w in publisher.asked)


def test_a_number_of_jobs_below_one_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--jobs", "0"])
    assert "--jobs is 0" in capsys.readouterr().err


def test_a_run_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["no/such/run"])
    assert "is no folder" in capsys.readouterr().err
