"""The paper's claims beside our results: confirmed, contrary here, no difference found, or not testable.

Verdicts follow from JSON files of a results folder, written by other commands. Arms of a comparison are told apart by
an exact permutation test over seeds on one measure. Our numbers are of the drawn world at nano's size: they test the
direction of a claim, not its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from starflow2.core.files import named_place, replacing
from starflow2.core.serialize import read_json
from starflow2.errors import ConfigError, DataError, OutputError
from starflow2.evals.mme import COIN
from starflow2.world.questions import SUBTASKS

__all__ = ["CLAIMS", "Claim", "Finding", "find", "permutation_test", "write_claims"]

Verdict = Literal["confirmed", "contrary here", "no difference found", "not testable at this budget", "not measured"]
Results = Mapping[str, Any]  # contents of JSON files by file name without .json
LEVEL = 0.05  # two-sided p up to which two arms differ
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
    """The finding from `results`, "not measured" if one of the files that the claim needs is missing."""
    missing = [name for name in claim.needs if name not in results]
    if missing:
        return Finding("not measured", f"no {', '.join(f'{name}.json' for name in missing)}")
    return claim.decide(results)


def _is(holds: bool) -> Verdict:
    return "confirmed" if holds else "contrary here"


def _total(report: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Our ID score of a suite, and the language model's through its own tower."""
    return report["parts"]["id"][name]["score"], report["vlm"]["id"][name]["score"]


def _understands(results: Results) -> Finding:
    pairs = [_total(results["mme"], "total"), _total(results["gqa"], "accuracy")]
    shares = [ours / own for ours, own in pairs]
    counts = [results[name]["parts"]["id"]["n"] for name in ("mme", "gqa")]
    mme = f"W-MME-p {pairs[0][0]:.0f} of {pairs[0][1]:.0f} ({shares[0]:.0%}, n = {counts[0]} questions)"
    gqa = f"W-GQA {pairs[1][0]:.3f} of {pairs[1][1]:.3f} ({shares[1]:.0%}, n = {counts[1]})"
    return Finding(_is(min(shares) >= PRESERVED), f"{mme}, {gqa}")


# ------------------------------------------------------------------------------------- arms of a comparison


def permutation_test(higher: Sequence[float], lower: Sequence[float]) -> tuple[float, float]:
    """Exact two-sided p of the difference of two means, and the smallest p that so many values can have.

    The share of all ways to deal the values to two groups of these sizes whose means differ at least as much.

    >>> permutation_test([5, 6, 7], [1, 2, 3])
    (0.1, 0.1)
    """
    values, count = [*higher, *lower], len(higher)
    total, observed = sum(values), abs(sum(higher) / count - sum(lower) / len(lower))
    found = ways = 0
    for chosen in combinations(values, count):
        apart = abs(sum(chosen) / count - (total - sum(chosen)) / len(lower))
        found += apart >= observed - 1e-12
        ways += 1
    smallest = (2 if count == len(lower) else 1) / math.comb(len(values), count)
    return found / ways, min(smallest, 1.0)


def _scores(results: Results, arm: str, measure: str) -> list[float]:
    """A measure of an arm, one number for each seed."""
    return [row[measure] for row in results["compare"]["rows"] if row["arm"] == arm]


def _compared(results: Results, better: str, worse: str, measure: str, floor: float) -> Finding:
    """Finding on whether one arm has more of a measure than another; not testable if neither is above `floor`."""
    a, b = (_scores(results, arm, measure) for arm in (better, worse))
    if not a or not b:
        return Finding("not measured", f"compare.json has no seeds of {better if not a else worse}")
    means, (p, smallest) = (sum(a) / len(a), sum(b) / len(b)), permutation_test(a, b)
    digits = 3 if max(means) < 10 else 0
    measured = f"{better} {means[0]:.{digits}f}, {worse} {means[1]:.{digits}f}; n = {len(a)}, {len(b)} seeds"
    if max(means) <= floor:
        return Finding("not testable at this budget", f"{measured}; neither is above the floor of {floor:.{digits}f}")
    if smallest > LEVEL:
        return Finding("not testable at this budget", f"{measured}; so few cannot get below p = {smallest:.2f}")
    found: Verdict = "no difference found" if p > LEVEL else _is(means[0] > means[1])
    return Finding(found, f"{measured}; permutation test, p = {p:.3f}")


def _draws_better(results: Results, better: str, worse: str) -> Finding:
    """Compare two arms by W-GenEval; the loss on unseen drawings is told and decides nothing."""
    finding = _compared(results, better, worse, "geneval", GENEVAL_FLOOR)
    losses = [_scores(results, arm, "flow") for arm in (better, worse)]
    if not all(losses):
        return finding
    means = [sum(values) / len(values) for values in losses]
    return Finding(
        finding.verdict, f"W-GenEval {finding.measured}; loss on unseen drawings {means[0]:.4f}, {means[1]:.4f}"
    )


def _stage_3_draws_better(results: Results) -> Finding:
    return _draws_better(results, "stage 3", "stage 1")


def _skips_help(results: Results) -> Finding:
    return _draws_better(results, "stage 3", "stage 3, skips closed")


def _finetuned_forgets(results: Results) -> Finding:
    finding = _compared(results, "mot frozen", "mot finetuned", "mme", COIN * len(SUBTASKS))
    return Finding(finding.verdict, f"W-MME-p {finding.measured}")


def _beats_frozen_mot(results: Results) -> Finding:
    return _draws_better(results, "fresh", "mot frozen")


def _ratios(results: Results) -> Finding:
    skips = results["skips"]
    visual, text = (skips[name]["contribution_ratio"]["mean"] for name in ("visual", "text"))
    counts = [skips[name]["positions"] for name in ("visual", "text")]
    measured = f"mean ratio {visual:.3f} visual, {text:.3f} text; n = {counts[0]}, {counts[1]} positions"
    return Finding(_is(text < SMALL * visual), measured)


def _cosine(results: Results) -> Finding:
    visual = results["skips"]["visual"]
    raw, centred = visual["cosine"]["mean"], visual["centred_cosine"]["mean"]
    measured = (
        f"mean cosine {centred:+.3f} beside the mean vectors, {raw:+.3f} with them; n = {visual['positions']} latents"
    )
    return Finding(_is(abs(centred) < FLAT), measured)


def _no_reencoding(results: Results) -> Finding:
    fourth = results["turns"]["turns"][3]
    start, whole = fourth["slower_to_start"], fourth["slower"]
    measured = f"turn 4 anew: {start:.1f} times slower to start, {whole:.2f} times with the picture that it draws"
    return Finding(_is(min(start, whole) > 1), measured)


def _helps_drawing(results: Results, name: str) -> Finding:
    """Finding on one of the comparisons of `understanding_and_drawing`, by its sign test over prompts."""
    row = next((row for row in results["understanding"]["comparisons"] if row["name"] == name), None)
    if row is None:
        return Finding("not measured", "the model has not learnt to check itself")
    (better, a), (worse, b) = row["arms"].items()
    measured = (
        f"W-GenEval {better} {a:.3f}, {worse} {b:.3f}; n = {row['prompts']} prompts, better on {row['wins']}, worse on "
        f"{row['losses']}; sign test, p = {row['p']:.3f}"
    )
    return Finding(_is(row["wins"] > row["losses"]) if row["p"] <= LEVEL else "no difference found", measured)


def _self_check_helps(results: Results) -> Finding:
    return _helps_drawing(results, "self-check")


def _open_skips_help(results: Results) -> Finding:
    return _helps_drawing(results, "skips")


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
    Claim("understanding improves drawing: the self-check", "not tested there", ("understanding",), _self_check_helps),
    Claim("... the skips, closed in use", "not tested there", ("understanding",), _open_skips_help),
    Claim("drawn pictures are read from the cache, which saves time", "desideratum 3", ("turns",), _no_reencoding),
)


_READING = (
    "Written by `starflow2 analyze paper` from the JSON files beside it; docs/paper-map.md says where each claim is "
    "tested. All of it is about nano in the drawn world, on ID prompts.",
    "",
    f"Kept: at least {PRESERVED:.0%} of the language model's own score (the paper's table 3 has 91 % of MME-P and 92 % "
    f"of GQA). Far less: under {SMALL:g} of it. Nearly orthogonal: |cosine| under {FLAT}, without the means over "
    "positions, which are the same at every latent. Arms of one budget: confirmed or contrary here if an exact "
    f"permutation test over seeds on the one measure named has p up to {LEVEL}, else no difference found; not testable "
    "where so few seeds cannot reach it, or where neither arm draws or reads yet.",
)


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except ConfigError as error:
        raise DataError(str(error)) from error


def _found(claim: Claim, results: Results, folder: Path) -> Finding:
    try:
        return find(claim, results)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        names = " or ".join(f"{name}.json" for name in claim.needs)
        raise DataError(
            f"{folder}: {names} does not hold the results that the claim {claim.text!r} reads ({error!r}); "
            "measure it again."
        ) from error


def write_claims(folder: str | Path) -> Path:
    """Write claims.md from the JSON files of a results folder, and into it.

    Raises DataError if one is not JSON, or not the results that a claim reads.
    """
    folder = named_place(folder, "folder", OutputError)
    results = {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}
    rows = [(claim, _found(claim, results, folder)) for claim in CLAIMS]
    lines = ["# The paper's claims at nano's size", "", "| claim | where | verdict | measured |", "|---|---|---|---|"]
    lines += [f"| {c.text} | {c.where} | **{f.verdict}** | {f.measured} |" for c, f in rows]
    lines += ["", *_READING, ""]
    with replacing(folder / "claims.md") as temp:
        temp.write_text("\n".join(lines), encoding="utf-8")
    return folder / "claims.md"
