"""The paper's claims and their verdicts from our results: confirmed, refuted or open.

Verdicts follow from JSON files of a results folder, written by other commands; a claim without its file is open. Our
numbers are of the drawn world at nano's size: they test the direction of a claim, not its size, and "refuted" means
only that it does not hold here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from starflow2.core.files import replacing
from starflow2.errors import DataError
from starflow2.evals.mme import COIN
from starflow2.world.questions import SUBTASKS

__all__ = ["CLAIMS", "Claim", "Finding", "find", "write_claims"]

Verdict = Literal["confirmed", "refuted", "open"]
Results = Mapping[str, Any]  # contents of JSON files by file name without .json
Range = Mapping[str, float]  # mean, low and high of a score over seeds
PRESERVED = 0.95  # share of the language model's own score that counts as kept
SMALL = 0.5  # the text ratio is "far smaller" if below this share of the visual one
FLAT = 0.2  # a cosine that counts as near zero
GENEVAL_FLOOR = 0.04  # W-GenEval of true images of other prompts


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict on a claim, and the measured numbers behind it as text."""

    verdict: Verdict
    measured: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim, its place in the paper, the result files it needs, and the function that decides it from them."""

    text: str
    where: str
    needs: tuple[str, ...]
    decide: Callable[[Results], Finding]


def find(claim: Claim, results: Results) -> Finding:
    """The finding from `results`; open if one of the files that the claim needs is missing."""
    missing = [name for name in claim.needs if name not in results]
    if missing:
        return Finding("open", f"not measured: no {', '.join(f'{name}.json' for name in missing)}")
    return claim.decide(results)


def _is(holds: bool) -> Verdict:
    return "confirmed" if holds else "refuted"


def _total(report: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Our ID score of a suite, and the language model's through its own tower."""
    return report["parts"]["id"][name]["score"], report["vlm"]["id"][name]["score"]


def _understands(results: Results) -> Finding:
    pairs = [_total(results["mme"], "total"), _total(results["gqa"], "accuracy")]
    shares = [ours / own for ours, own in pairs]
    mme = f"W-MME-p {pairs[0][0]:.0f} of {pairs[0][1]:.0f} ({shares[0]:.0%})"
    gqa = f"W-GQA {pairs[1][0]:.3f} of {pairs[1][1]:.3f} ({shares[1]:.0%})"
    return Finding(_is(min(shares) >= PRESERVED), f"{mme}, {gqa}")


def _arms(results: Results, a: str, b: str, score: str, digits: int) -> tuple[Range, Range, str]:
    """A score of two arms over seeds, and both as text."""
    rows = results["compare"]["summary"]
    means = [f"{name} {rows[name][score]['mean']:.{digits}f}" for name in (a, b)]
    ranges = [f"[{rows[n][score]['low']:.{digits}f}, {rows[n][score]['high']:.{digits}f}]" for n in (a, b)]
    return rows[a][score], rows[b][score], f"{means[0]} {ranges[0]}, {means[1]} {ranges[1]}"


def _apart(higher: Range, lower: Range) -> int:
    """1 if all seeds of the first arm are above all of the second, -1 if all are below, 0 if they overlap."""
    return int(higher["low"] > lower["high"]) - int(higher["high"] < lower["low"])


def _verdict(*signs: int) -> Verdict:
    """Confirmed if measures separate the arms in the claim's direction only, refuted if in the other only."""
    if (1 in signs and -1 in signs) or not any(signs):
        return "open"
    return "confirmed" if 1 in signs else "refuted"


def _draws_better(results: Results, better: str, worse: str) -> Finding:
    """Compare arms by W-GenEval and by the loss on unseen drawings; open if neither arm is above the floor."""
    *drawn, scores = _arms(results, better, worse, "geneval", 3)
    *lost, losses = _arms(results, worse, better, "flow", 4)
    measured = f"W-GenEval: {scores}; loss on unseen drawings: {losses}"
    if max(arm["mean"] for arm in drawn) <= GENEVAL_FLOOR:
        return Finding("open", f"{measured}; on this budget neither draws (floor {GENEVAL_FLOOR})")
    return Finding(_verdict(_apart(*drawn), _apart(*lost)), measured)


def _stage_3_draws_better(results: Results) -> Finding:
    return _draws_better(results, "stage 3", "stage 1")


def _skips_help(results: Results) -> Finding:
    return _draws_better(results, "stage 3", "stage 3, skips closed")


def _finetuned_forgets(results: Results) -> Finding:
    frozen, finetuned, measured = _arms(results, "mot frozen", "mot finetuned", "mme", 0)
    coin = COIN * len(SUBTASKS)
    if max(frozen["high"], finetuned["high"]) <= coin:
        return Finding("open", f"W-MME-p: {measured}; on this budget neither reads pictures (a coin has {coin:.0f})")
    return Finding(_verdict(_apart(frozen, finetuned)), f"W-MME-p: {measured}")


def _beats_frozen_mot(results: Results) -> Finding:
    return _draws_better(results, "fresh", "mot frozen")


def _ratios(results: Results) -> Finding:
    skips = results["skips"]
    visual, text = (skips[name]["contribution_ratio"]["mean"] for name in ("visual", "text"))
    return Finding(_is(text < SMALL * visual), f"mean ratio {visual:.3f} visual, {text:.3f} text")


def _cosine(results: Results) -> Finding:
    cosine = results["skips"]["visual"]["cosine"]["mean"]
    return Finding(_is(abs(cosine) < FLAT), f"mean cosine {cosine:+.3f} at latents")


def _no_reencoding(results: Results) -> Finding:
    fourth = results["turns"]["turns"][3]
    start, whole = fourth["slower_to_start"], fourth["slower"]
    measured = f"turn 4 anew: {start:.1f} times slower to start, {whole:.2f} times with the picture that it draws"
    return Finding(_is(min(start, whole) > 1), measured)


CLAIMS: tuple[Claim, ...] = (
    Claim("the language model's understanding is kept", "desideratum 1, table 3", ("mme", "gqa"), _understands),
    Claim("stage 3 draws better than stage 1", "table 4", ("compare",), _stage_3_draws_better),
    Claim("... because of the skips and not of the added data", "not separated there", ("compare",), _skips_help),
    Claim("the visual skip carries much, the text skip far less", "section 5.4, figure 7", ("skips",), _ratios),
    Claim(
        "what the visual skip adds is nearly orthogonal to the latents", "section 5.4, figure 7", ("skips",), _cosine
    ),
    Claim("a finetuned mixture of transformers loses understanding", "section 5.3", ("compare",), _finetuned_forgets),
    Claim("a frozen mixture of transformers draws worse", "section 5.3, figure 6", ("compare",), _beats_frozen_mot),
    Claim("drawn pictures are read from the cache, which saves time", "desideratum 3", ("turns",), _no_reencoding),
)


_READING = (
    "Written by `starflow2 analyze paper` from the JSON files beside it; docs/paper-map.md says where each claim is "
    "tested. All of it is about nano in the drawn world, on ID prompts: refuted means not so here.",
    "",
    f"Kept: at least {PRESERVED:.0%} of the language model's own score (the paper's table 3 has 91 % of MME-P and 92 % "
    f"of GQA). Far less: under {SMALL:g} of it. Nearly orthogonal: |cosine| under {FLAT}. Between arms of one budget: "
    "all seeds of one above all of the other by one measure, and no other measure against it; open otherwise, and open "
    "where neither arm draws or reads yet.",
)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}.") from error


def write_claims(folder: str | Path) -> Path:
    """Write claims.md from the JSON files of a results folder, and into it. Raises DataError if one is not JSON."""
    folder = Path(folder)
    results = {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}
    rows = [(claim, find(claim, results)) for claim in CLAIMS]
    lines = ["# The paper's claims at nano's size", "", "| claim | where | verdict | measured |", "|---|---|---|---|"]
    lines += [f"| {c.text} | {c.where} | **{f.verdict}** | {f.measured} |" for c, f in rows]
    lines += ["", *_READING, ""]
    with replacing(folder / "claims.md") as temp:
        temp.write_text("\n".join(lines), encoding="utf-8")
    return folder / "claims.md"
