"""The paper's claims from files of results: open where nothing was measured, never confirmed by a gap that is noise."""

from __future__ import annotations

import json

import pytest

from starflow2.errors import DataError
from starflow2.research.paper_claims import CLAIMS, find, write_claims


def arm(low: float, mean: float, high: float) -> dict[str, object]:
    """An arm of a comparison whose drawings lose the better the more of them are right."""
    drawn = {name: {"mean": mean, "low": low, "high": high} for name in ("geneval", "mme", "text")}
    return drawn | {"flow": {"mean": -mean, "low": -high, "high": -low}}


def suite(ours: float, own: float, name: str) -> dict[str, object]:
    return {"parts": {"id": {name: {"score": ours}}}, "vlm": {"id": {name: {"score": own}}}}


RESULTS = {
    "mme": suite(960, 1000, "total"),
    "gqa": suite(0.78, 0.8, "accuracy"),
    "skips": {
        "visual": {"contribution_ratio": {"mean": 0.3}, "cosine": {"mean": 0.05}},
        "text": {"contribution_ratio": {"mean": 0.1}},
    },
    "compare": {
        "summary": {
            "stage 1": arm(0.2, 0.25, 0.3),
            "stage 3": arm(0.35, 0.4, 0.45),
            "stage 3, skips closed": arm(0.3, 0.36, 0.4),
            "fresh": arm(0.6, 0.8, 0.9),
            "mot frozen": arm(0.3, 0.4, 0.5) | {"mme": {"mean": 700, "low": 650, "high": 750}},
            "mot finetuned": arm(0.1, 0.15, 0.2) | {"mme": {"mean": 500, "low": 480, "high": 510}},
        }
    },
    "turns": {"turns": [{"slower_to_start": 1.0, "slower": 1.0}] * 3 + [{"slower_to_start": 3.2, "slower": 1.1}]},
}


def test_every_claim_is_open_where_nothing_was_measured():
    findings = [find(claim, {}) for claim in CLAIMS]
    assert {f.verdict for f in findings} == {"open"}
    assert all(".json" in f.measured for f in findings)


def test_verdicts_follow_the_numbers_and_overlapping_seeds_leave_a_claim_open():
    verdicts = {claim.text: find(claim, RESULTS).verdict for claim in CLAIMS}
    assert verdicts["stage 3 draws better than stage 1"] == "confirmed"
    assert verdicts["... because of the skips and not of the added data"] == "open"
    assert verdicts["a frozen mixture of transformers draws worse"] == "confirmed"
    assert verdicts["the language model's understanding is kept"] == "confirmed"
    lost = RESULTS | {"gqa": suite(0.7, 0.8, "accuracy")}
    assert find(CLAIMS[0], lost).verdict == "refuted"


FLAT = {"mean": 0.8, "low": 0.7, "high": 0.9}
LOW, HIGH = ({"mean": mean, "low": mean - 0.01, "high": mean + 0.01} for mean in (0.1, 0.2))


@pytest.mark.parametrize(
    ("drawn", "lost", "verdict"),
    [
        ((FLAT, FLAT), (HIGH, LOW), "confirmed"),  # what pictures cannot tell apart, the loss can
        ((FLAT, FLAT), (LOW, HIGH), "refuted"),
        ((HIGH, LOW), (LOW, HIGH), "open"),  # two measures that contradict each other
        ((HIGH, LOW), (FLAT, FLAT), "confirmed"),
        ((LOW, HIGH), (FLAT, FLAT), "refuted"),
        (({"mean": 0.02, "low": 0.0, "high": 0.05}, {"mean": 0.0, "low": 0.0, "high": 0.0}), (HIGH, LOW), "open"),
    ],
)
def test_arms_are_judged_by_pictures_and_by_loss_alike(drawn, lost, verdict):
    rows = {}
    for better, worse in (("stage 3", "stage 1"), ("stage 3", "stage 3, skips closed"), ("fresh", "mot frozen")):
        rows[better] = {"geneval": drawn[0], "flow": lost[1]}
        rows[worse] = {"geneval": drawn[1], "flow": lost[0]}
    claims = [claim for claim in CLAIMS if claim.needs == ("compare",) and "finetuned" not in claim.text]
    assert [find(claim, {"compare": {"summary": rows}}).verdict for claim in claims] == [verdict] * 3


@pytest.mark.parametrize(
    ("frozen", "finetuned", "verdict"), [(700, 500, "confirmed"), (500, 700, "refuted"), (430, 410, "open")]
)
def test_what_neither_learnt_tells_nothing_about_forgetting(frozen, finetuned, verdict):
    rows = {"mot frozen": arm(frozen, frozen, frozen), "mot finetuned": arm(finetuned, finetuned, finetuned)}
    claims = [claim for claim in CLAIMS if "finetuned" in claim.text]
    assert [find(claim, {"compare": {"summary": rows}}).verdict for claim in claims] == [verdict]


def test_write_claims_reads_what_is_there_and_refuses_what_is_no_json(tmp_path):
    for name, value in RESULTS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    text = write_claims(tmp_path).read_text()
    assert text.count("**confirmed**") == 7 and text.count("**refuted**") == 0 and text.count("**open**") == 1
    (tmp_path / "mme.json").write_text("{")
    with pytest.raises(DataError, match=r"mme\.json is not JSON"):
        write_claims(tmp_path)
