"""Every claim of the paper beside what was measured here: confirmed, refuted or open.

Reads the JSON files that other commands left in a results folder and measures nothing itself; a claim whose file is
not there is open. Our numbers are of the drawn world at nano's size: they test a claim's direction, not its size, and
refuted means: not so here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from starflow2.core.files import replacing
from starflow2.core.serialize import JsonObject
from starflow2.errors import DataError
from starflow2.evals.mme import COIN
from starflow2.world.questions import SUBTASKS

__all__ = ["CLAIMS", "Claim", "Finding", "find", "write_claims"]

Verdict = Literal["confirmed", "refuted", "open"]
Results = Mapping[str, Any]  # by file name without .json
KEPT = 0.95  # share of the language model's own score that counts as kept
SMALL = 0.5  # the text ratio is "far smaller" if below this share of the visual one
FLAT = 0.2  # a cosine that counts as near zero
UNDRAWN = 0.04  # W-GenEval of true pictures of other prompts, its floor


@dataclass(frozen=True, slots=True)
class Finding:
    """What was measured, in words, and what it says about the claim."""

    verdict: Verdict
    measured: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim, where the paper makes it, the files it needs and how they decide it."""

    text: str
    where: str
    needs: tuple[str, ...]
    decide: Callable[[Results], Finding]


def find(claim: Claim, results: Results) -> Finding:
    """The finding; open if a file is missing."""
    missing = [name for name in claim.needs if name not in results]
    if missing:
        return Finding("open", f"not measured: no {', '.join(f'{name}.json' for name in missing)}")
    return claim.decide(results)


def _is(holds: bool) -> Verdict:
    return "confirmed" if holds else "refuted"


def _total(report: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Our ID score of a suite, and the language model's through its own tower."""
    return report["parts"]["id"][name]["score"], report["vlm"]["id"][name]["score"]


def _kept(results: Results) -> Finding:
    pairs = [_total(results["mme"], "total"), _total(results["gqa"], "accuracy")]
    shares = [ours / own for ours, own in pairs]
    told = f"W-MME-p {pairs[0][0]:.0f} of {pairs[0][1]:.0f} ({shares[0]:.0%})"
    return Finding(_is(min(shares) >= KEPT), f"{told}, W-GQA {pairs[1][0]:.3f} of {pairs[1][1]:.3f} ({shares[1]:.0%})")


def _arms(
    results: Results, a: str, b: str, score: str, digits: int
) -> tuple[Mapping[str, Any], Mapping[str, Any], str]:
    rows = results["compare"]["summary"]
    told = [f"{name} {rows[name][score]['mean']:.{digits}f}" for name in (a, b)]
    ranges = [f"[{rows[n][score]['low']:.{digits}f}, {rows[n][score]['high']:.{digits}f}]" for n in (a, b)]
    return rows[a][score], rows[b][score], f"{told[0]} {ranges[0]}, {told[1]} {ranges[1]}"


def _apart(higher: Mapping[str, Any], lower: Mapping[str, Any]) -> int:
    """1 if all seeds of the first arm are above all of the second, -1 the other way round, 0 where they overlap."""
    return int(higher["low"] > lower["high"]) - int(higher["high"] < lower["low"])


def _verdict(*signs: int) -> Verdict:
    """Open unless some measure sets the arms apart and no other sets them apart the other way round."""
    if (1 in signs and -1 in signs) or not any(signs):
        return "open"
    return "confirmed" if 1 in signs else "refuted"


def _draws_better(results: Results, better: str, worse: str) -> Finding:
    """By pictures and by the loss of unseen drawings; open where neither arm draws anything yet."""
    *drawn, told = _arms(results, better, worse, "geneval", 3)
    *lost, loss = _arms(results, worse, better, "flow", 4)
    told = f"W-GenEval: {told}; loss on unseen drawings: {loss}"
    if max(arm["mean"] for arm in drawn) <= UNDRAWN:
        return Finding("open", f"{told}; on this budget neither draws (floor {UNDRAWN})")
    return Finding(_verdict(_apart(*drawn), _apart(*lost)), told)


def _stage_3_draws_better(results: Results) -> Finding:
    return _draws_better(results, "stage 3", "stage 1")


def _skips_help(results: Results) -> Finding:
    return _draws_better(results, "stage 3", "stage 3, skips closed")


def _finetuned_forgets(results: Results) -> Finding:
    frozen, finetuned, told = _arms(results, "mot frozen", "mot finetuned", "mme", 0)
    coin = COIN * len(SUBTASKS)
    if max(frozen["high"], finetuned["high"]) <= coin:
        return Finding("open", f"W-MME-p: {told}; on this budget neither reads pictures (a coin has {coin:.0f})")
    return Finding(_verdict(_apart(frozen, finetuned)), f"W-MME-p: {told}")


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
    told = f"turn 4 anew: {start:.1f} times slower to start, {whole:.2f} times with the picture that it draws"
    return Finding(_is(min(start, whole) > 1), told)


CLAIMS: tuple[Claim, ...] = (
    Claim("the language model's understanding is kept", "desideratum 1, table 3", ("mme", "gqa"), _kept),
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
    f"Kept: at least {KEPT:.0%} of the language model's own score (the paper's table 3 has 91 % of MME-P and 92 % of "
    f"GQA). Far less: under {SMALL:g} of it. Nearly orthogonal: |cosine| under {FLAT}. Between arms of one budget: all "
    "seeds of one above all of the other by one measure, and no other measure against it; open otherwise, and open "
    "where neither arm draws or reads yet.",
)


def write_claims(folder: str | Path) -> Path:
    """claims.md in a results folder, from the JSON files in it. Raises DataError for one that is not JSON."""
    folder = Path(folder)
    results: JsonObject = {}
    for path in sorted(folder.glob("*.json")):
        try:
            results[path.stem] = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}.") from error
    rows = [(claim, find(claim, results)) for claim in CLAIMS]
    lines = ["# The paper's claims at nano's size", "", "| claim | where | verdict | measured |", "|---|---|---|---|"]
    lines += [f"| {c.text} | {c.where} | **{f.verdict}** | {f.measured} |" for c, f in rows]
    lines += ["", *_READING, ""]
    with replacing(folder / "claims.md") as temp:
        temp.write_text("\n".join(lines), encoding="utf-8")
    return folder / "claims.md"
