"""The paper's claims from files of results: never confirmed by a gap that is noise, nor by a choice of measures."""

from __future__ import annotations

import json

import pytest

from starflow2.errors import DataError
from starflow2.research.paper_claims import CLAIMS, find, permutation_test, write_claims


def arm(name: str, *geneval: float, mme: float = 700.0) -> list[dict[str, object]]:
    """An arm of a comparison with one row for each seed."""
    return [{"arm": name, "seed": i, "geneval": g, "mme": mme + i, "flow": -g} for i, g in enumerate(geneval)]


def suite(ours: float, own: float, name: str) -> dict[str, object]:
    return {"parts": {"id": {"n": 384, name: {"score": ours}}}, "vlm": {"id": {name: {"score": own}}}}


GOOD, FAIR, POOR = (0.40, 0.42, 0.44, 0.46), (0.39, 0.41, 0.43, 0.45), (0.20, 0.22, 0.24, 0.26)
RESULTS = {
    "mme": suite(960, 1000, "total"),
    "gqa": suite(0.78, 0.8, "accuracy"),
    "skips": {
        "visual": {
            "positions": 64,
            "contribution_ratio": {"mean": 0.3},
            "cosine": {"mean": 0.34},
            "centred_cosine": {"mean": 0.05},
        },
        "text": {"positions": 16, "contribution_ratio": {"mean": 0.1}},
    },
    "compare": {
        "rows": [
            *arm("stage 1", *POOR),
            *arm("stage 3", *GOOD),
            *arm("stage 3, skips closed", *FAIR),
            *arm("fresh", *GOOD[:3]),
            *arm("mot frozen", *POOR[:3]),
            *arm("mot finetuned", *POOR[:3], mme=500.0),
        ]
    },
    "understanding": {
        "comparisons": [
            {"name": "skips", "arms": {"open": 0.8, "closed": 0.79}, "prompts": 99, "wins": 9, "losses": 7, "p": 0.8},
            {"name": "self-check", "arms": {"two": 0.9, "one": 0.8}, "prompts": 99, "wins": 20, "losses": 2, "p": 0.01},
        ]
    },
    "turns": {"turns": [{"slower_to_start": 1.0, "slower": 1.0}] * 3 + [{"slower_to_start": 3.2, "slower": 1.1}]},
}
VERDICTS = {
    "the language model's understanding is kept": "confirmed",
    "stage 3 draws better than stage 1": "confirmed",
    "... because of the skips and not of the added data": "no difference found",
    "the visual skip carries much, the text skip far less": "confirmed",
    "what the visual skip adds is nearly orthogonal to the latents": "confirmed",
    "a finetuned mixture of transformers loses understanding": "not testable at this budget",  # 3 seeds against 3
    "a frozen mixture of transformers draws worse": "not testable at this budget",
    "drawn pictures are read from the cache, which saves time": "confirmed",
    "understanding improves drawing: the self-check": "confirmed",
    "... the skips, closed in use": "no difference found",
}


def verdict(name: str, **changes: object) -> str:
    (claim,) = (claim for claim in CLAIMS if claim.text == name)
    return find(claim, RESULTS | changes).verdict


def test_every_claim_is_not_measured_without_its_files():
    findings = [find(claim, {}) for claim in CLAIMS]
    assert {f.verdict for f in findings} == {"not measured"}
    assert all(".json" in f.measured for f in findings)


def test_verdicts_follow_the_numbers():
    assert {claim.text: find(claim, RESULTS).verdict for claim in CLAIMS} == VERDICTS
    assert all("n = " in find(claim, RESULTS).measured for claim in CLAIMS[:-1])
    assert verdict(CLAIMS[0].text, gqa=suite(0.7, 0.8, "accuracy")) == "contrary here"


def test_an_arm_that_is_worse_in_every_seed_is_contrary_to_the_claim():
    rows = [*arm("stage 3", *POOR), *arm("stage 1", *GOOD)]
    assert verdict("stage 3 draws better than stage 1", compare={"rows": rows}) == "contrary here"


def test_the_loss_decides_nothing():
    """A lower loss in every seed beside pictures that are no better: no difference found."""
    rows = [row | {"flow": -9.0} for row in arm("stage 3", *GOOD)] + arm("stage 1", *GOOD)
    assert verdict("stage 3 draws better than stage 1", compare={"rows": rows}) == "no difference found"


def test_arms_that_do_not_draw_or_read_tell_nothing():
    rows = [*arm("fresh", *[0.02] * 4), *arm("mot frozen", *[0.01] * 4, mme=430), *arm("mot finetuned", *GOOD, mme=410)]
    assert verdict("a frozen mixture of transformers draws worse", compare={"rows": rows}).startswith("not testable")
    assert verdict("a finetuned mixture of transformers loses understanding", compare={"rows": rows}).startswith("not")


@pytest.mark.parametrize(
    ("higher", "lower", "p", "smallest"),
    [
        ([5, 6, 7, 8], [1, 2, 3, 4], 2 / 70, 2 / 70),  # the two extreme deals of 70
        ([10], [1, 2, 3], 1 / 4, 1 / 4),
        ([1, 4], [2, 3], 1.0, 2 / 6),  # equal means: every deal is at least as far apart
        ([4, 3], [2, 1], 2 / 6, 2 / 6),
        ([5, 5, 5], [5, 5, 5], 1.0, 2 / 20),
    ],
)
def test_the_exact_test_counts_the_deals(higher, lower, p, smallest):
    assert permutation_test(higher, lower) == pytest.approx((p, smallest))


def test_write_claims_reads_what_is_there_and_refuses_what_is_no_json(tmp_path):
    for name, value in RESULTS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    text = write_claims(tmp_path).read_text()
    assert text.count("**confirmed**") == 6 and text.count("**no difference found**") == 2
    (tmp_path / "mme.json").write_text("{")
    with pytest.raises(DataError, match=r"mme\.json is not JSON"):
        write_claims(tmp_path)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "5", "null", '{"summary": 1}', '{"turns": []}', '{"text": {"a": "b"}}']
)
@pytest.mark.parametrize("name", ["compare", "skips", "turns", "mme"])
def test_results_of_another_kind_are_refused_by_their_file(tmp_path, name, content):
    for other, value in RESULTS.items():
        (tmp_path / f"{other}.json").write_text(json.dumps(value))
    (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(DataError, match=rf"{name}\.json"):
        write_claims(tmp_path)
