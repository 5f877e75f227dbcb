"""What a corpus holds, before anything is trained on it: documents, pictures, lengths, and what is broken and why.

Behind `starflow2 data check`. Goes the way that training goes (shards, corpora, mix) and keeps nothing but counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from starflow2.data.corpora import Broken, understand
from starflow2.data.mixture import Item, Source, Spelling
from starflow2.data.shards import Samples
from starflow2.models.sequence import Text

__all__ = ["survey"]

EXAMPLES = 3  # broken samples told of each reason


def survey(
    source: Source, spelling: Spelling, limit: int | None = None, progress: Callable[[int], None] = lambda read: None
) -> dict[str, Any]:
    """Counts of one pass over a corpus, or of its first `limit` samples, as JSON.

    `positions` counts all that a document takes in a row, `tokens` its words alone: 10th, 50th and 90th percentile and
    the largest. `progress` hears how many samples are read. Raises DataError where there is nothing to read.
    """
    samples = Samples(source.url, source.format)
    items: list[tuple[str, int, int, int]] = []  # kind, positions, tokens, pictures
    broken: dict[str, list[dict[str, str]]] = {}
    counts, read = Counter[str](), 0
    for sample in islice(samples, limit):
        read += 1
        progress(read)
        try:
            item = spelling.item(understand(source.corpus, sample, source.pictures))
            items.append((item.kind, item.length, _tokens(item), len(item.images)))
        except Broken as error:
            counts[error.reason] += 1
            told = {"source": sample.source, "key": sample.key, "detail": error.detail}
            broken.setdefault(error.reason, []).extend([told] if counts[error.reason] <= EXAMPLES else [])
    return {
        "url": source.url,
        "corpus": source.corpus,
        "format": samples.format,
        "files": len(samples.files),
        "samples": read,
        "documents": len(items),
        "kinds": dict(Counter(kind for kind, *_ in items)),
        "pictures": sum(pictures for *_, pictures in items),
        "positions": _spread([positions for _, positions, _, _ in items]),
        "tokens": _spread([tokens for _, _, tokens, _ in items]),
        "broken": {reason: {"count": count, "examples": broken[reason]} for reason, count in counts.most_common()},
    }


def _tokens(item: Item) -> int:
    return sum(len(segment.ids) for segment in item.document if isinstance(segment, Text))


def _spread(numbers: Sequence[int]) -> dict[str, int]:
    """Percentiles that are numbers of the list; empty for an empty one."""
    if not numbers:
        return {}
    p10, p50, p90 = np.percentile(numbers, [10, 50, 90], method="nearest").tolist()
    return {"p10": p10, "p50": p50, "p90": p90, "max": max(numbers)}
