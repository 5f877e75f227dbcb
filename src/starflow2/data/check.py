"""Check a corpus before training: count its documents, images and lengths, and its broken samples by reason.

Behind `starflow2 data check`. Reads as training does (shards, corpora, mixture) and keeps nothing but counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np

from starflow2.core.serialize import JsonObject
from starflow2.data.mixture import Item, Source, Spelling
from starflow2.data.records import Broken
from starflow2.data.shards import Samples
from starflow2.models.sequence import Text

__all__ = ["check_corpus"]

EXAMPLES = 3  # broken samples that are listed for each reason


def check_corpus(
    source: Source, spelling: Spelling, limit: int | None = None, progress: Callable[[int], None] = lambda read: None
) -> JsonObject:
    """Counts of one pass over a corpus, or of its first `limit` samples, as JSON.

    `positions` are all slots of a document in a row, `tokens` those of its words: 10th, 50th and 90th percentile and
    maximum. `progress` is called with the number of samples read. Raises DataError where there is nothing to read.
    """
    samples = Samples(source.url, source.format)
    items: list[tuple[str, int, int, int]] = []  # kind, positions, tokens, images
    broken: dict[str, list[dict[str, str]]] = {}
    counts, read = Counter[str](), 0
    for sample in islice(samples, limit):
        read += 1
        progress(read)
        try:
            conversation = source.dialogue(sample)
            item = spelling.item(conversation, form=source.form(conversation))
            items.append((item.kind, item.length, _tokens(item), len(item.images)))
        except Broken as error:
            counts[error.reason] += 1
            example = {"source": sample.source, "key": sample.key, "detail": error.detail}
            broken.setdefault(error.reason, []).extend([example] if counts[error.reason] <= EXAMPLES else [])
    return {
        "url": source.url,
        "corpus": source.corpus,
        "format": samples.format,
        "files": len(samples.files),
        "samples": read,
        "documents": len(items),
        "kinds": dict(Counter(kind for kind, *_ in items)),
        "pictures": sum(images for *_, images in items),
        "positions": _percentiles([positions for _, positions, _, _ in items]),
        "tokens": _percentiles([tokens for _, _, tokens, _ in items]),
        "broken": {reason: {"count": count, "examples": broken[reason]} for reason, count in counts.most_common()},
    }


def _tokens(item: Item) -> int:
    return sum(len(segment.ids) for segment in item.document if isinstance(segment, Text))


def _percentiles(numbers: Sequence[int]) -> dict[str, int]:
    """Percentiles, each of them a number of the list; none for an empty list."""
    if not numbers:
        return {}
    p10, p50, p90 = np.percentile(numbers, [10, 50, 90], method="nearest").tolist()
    return {"p10": p10, "p50": p50, "p90": p90, "max": max(numbers)}
