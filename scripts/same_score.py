"""Scores of one picture and one answer by nano under everything that a caller can set in torch: a Markdown table.

    python scripts/same_score.py

Under each setting the model scores, and where it can matter is loaded, too. A difference of more than 1e-6 nats from
the plain score is an error. The tests do the same for every public call on a small model (tests/test_gates.py).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from starflow2.pipeline import StarFlow2

__all__ = ["SETTINGS", "difference", "main"]

BOUND = 1e-6  # nats
WORDS, QUESTION, ANSWER = "a red circle", "what color is the circle?", "red"
Setting = Callable[[StarFlow2], AbstractContextManager[object]]


@contextlib.contextmanager
def _with(change: Callable[[], object], back: Callable[[], object]) -> Iterator[None]:
    change()
    try:
        yield
    finally:
        back()


def _dtype(dtype: torch.dtype) -> Setting:
    return lambda _: _with(lambda: torch.set_default_dtype(dtype), lambda: torch.set_default_dtype(torch.float32))


def _threads(count: int) -> Setting:
    before = torch.get_num_threads()
    return lambda _: _with(lambda: torch.set_num_threads(count), lambda: torch.set_num_threads(before))


def _train(model: StarFlow2) -> AbstractContextManager[object]:
    return _with(model.components.train, model.components.eval)


def _precision(_: StarFlow2) -> AbstractContextManager[object]:
    return _with(
        lambda: torch.set_float32_matmul_precision("medium"), lambda: torch.set_float32_matmul_precision("highest")
    )


SETTINGS: dict[str, Setting] = {
    "autocast bfloat16": lambda _: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda _: torch.autocast("cpu", dtype=torch.float16),
    "default type float64": _dtype(torch.float64),
    "default type bfloat16": _dtype(torch.bfloat16),
    "inference mode": lambda _: torch.inference_mode(),
    "gradients on": lambda _: torch.enable_grad(),
    "train() by the user": _train,
    "medium precision of products": _precision,
    **{f"{count} threads of torch": _threads(count) for count in (1, 2, 3, 4)},
}
LOADED = ("default type float64", "default type bfloat16", "inference mode")  # the model is loaded under these, too


def _scores(model: StarFlow2, image: torch.Tensor) -> list[float]:
    """Nats of the picture given words, and of an answer given the picture."""
    return [model.score([WORDS], [image]).log_prob, model.score([image, QUESTION], [ANSWER]).log_prob]


def difference(found: list[float], usual: list[float]) -> float:
    """The largest difference of two lists of scores.

    >>> difference([1.0, 2.0], [1.0, 2.5])
    0.5
    """
    return max(abs(a - b) for a, b in zip(found, usual, strict=True))


def _in_threads(model: StarFlow2, image: torch.Tensor, count: int) -> list[list[float]]:
    """Scores by so many Python threads at once."""
    found: list[list[float]] = []
    workers = [threading.Thread(target=lambda: found.append(_scores(model, image))) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == count
    return found


def main() -> int:
    """Print the table; 1 where a score moved."""
    model = StarFlow2.from_pretrained("nano", device="cpu")
    image = (
        torch.linspace(-1, 1, 64 * 64).view(1, 64, 64).expand(3, -1, -1) * torch.tensor([1.0, 0.5, -1.0])[:, None, None]
    )
    usual = _scores(model, image)
    print(f"plain: {usual[0]:.9f} and {usual[1]:.9f} nats\n\n| setting | largest difference, nats |\n|---|---|")
    worst = 0.0
    rows: list[tuple[str, float]] = []
    for name, setting in SETTINGS.items():
        with setting(model):
            rows.append((name, difference(_scores(model, image), usual)))
            if name in LOADED:
                fresh = StarFlow2.from_pretrained("nano", device="cpu")
                rows.append((f"loaded and scored under {name}", difference(_scores(fresh, image), usual)))
        rows.append((f"after {name}", difference(_scores(model, image), usual)))
    rows += [
        (f"4 threads of Python, thread {i}", difference(s, usual)) for i, s in enumerate(_in_threads(model, image, 4))
    ]
    for name, apart in rows:
        worst = max(worst, apart)
        print(f"| {name} | {apart:.1e} |")
    print(f"\nlargest {worst:.1e}, bound {BOUND:.0e}")
    return int(not worst <= BOUND)


if __name__ == "__main__":
    sys.exit(main())
