"""Standardisation of data as the first step of a density: (x - mean) / scale, and what data no density can have.

Letters: B rows, ... the axes of one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from starflow2.core.fields import described
from starflow2.errors import DataError, ShapeError
from starflow2.nn import check_floating

__all__ = ["Standardize", "as_numbers", "as_rows", "check_continuous"]

ROWS_PER_VALUE = 20  # a feature with fewer distinct values than one for so many rows is discrete
LISTED = 4  # features or rows that a message names


class Standardize(nn.Module):
    """z = (x - mean) / scale for each feature, with log|dz/dx|; a new one leaves x as it is.

    >>> step = Standardize((2,))
    >>> step.set_from(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
    >>> step(torch.tensor([[1.0, 30.0]]))[0]
    tensor([[0., 1.]])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(*shape))
        self.register_buffer("scale", torch.ones(*shape))

    @torch.no_grad()
    def set_from(self, data: Tensor) -> None:
        """Take mean and standard deviation of `data`, (B, ...), feature by feature. Raises DataError."""
        data = as_rows(data, self.mean.shape, "data")
        scale, mean = torch.std_mean(data.double(), dim=0, correction=0)
        _refuse((scale <= 1e-12 * (1 + mean.abs())).flatten(), "constant", "drop them", len(data))
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, ...) -> z of the same shape and log|dz/dx|: (B,) nats."""
        z = (x - self.mean) / self.scale
        return z, -self.scale.log().sum().expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        """z -> x, both (B, ...)."""
        return self.mean + self.scale * z


def as_numbers(x: object, name: str) -> Tensor:
    """A tensor of a tensor, an array or nested lists. Raises ShapeError for anything that holds no numbers."""
    try:
        numbers = torch.as_tensor(x)
    except Exception as error:  # of the conversion of any object
        raise ShapeError(f"{name} is {described(x)}; expected a tensor of numbers.") from error
    if numbers.layout != torch.strided or numbers.is_quantized or numbers.device.type == "meta":
        raise ShapeError(
            f"{name} is a tensor of {numbers.dtype}, {numbers.layout}, on {numbers.device}; expected a dense one with "
            "its values."
        )
    return numbers


def as_rows(x: object, shape: Sequence[int], name: str = "x") -> Tensor:
    """Rows (B, *shape) of finite floats, as a tensor; from what `as_numbers` takes.

    Raises ShapeError for another shape or dtype, and DataError, naming the rows, where values are not finite.
    """
    rows = as_numbers(x, name)
    if rows.ndim != len(shape) + 1 or tuple(rows.shape[1:]) != tuple(shape):
        raise ShapeError(f"{name} has shape {tuple(rows.shape)}; expected (B, {', '.join(map(str, shape))}).")
    check_floating(rows, name)
    bad = (~rows.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"{name} has NaN or infinite values in {_listed(bad, 'row')}; expected finite numbers: "
            "drop these rows, or fill the values in."
        )
    return rows


def check_continuous(data: Tensor) -> None:
    """Raise DataError for features of which few values are distinct: the density of discrete data has no upper bound.

    data: (B, ...).
    """
    rows = len(data)
    few = max(2, rows // ROWS_PER_VALUE)
    if rows < 10:
        return
    counts = torch.tensor([len(column.unique()) for column in data.flatten(1).T])
    _refuse(counts == 1, "constant", "drop them, or give the spacing of the values, spacing=1 for whole numbers", rows)
    _refuse(
        counts <= few,
        f"discrete (at most {few} distinct values)",
        "give the spacing of the values, spacing=1 for whole numbers, or spacing=0 to take them as they are",
        rows,
    )


def _refuse(which: Tensor, kind: str, remedy: str, rows: int) -> None:
    """Raise DataError, naming the features, if any is of this kind."""
    found = which.nonzero().flatten().tolist()
    if found:
        raise DataError(
            f"data has {_listed(found, 'feature')} {kind} in {rows} rows; expected continuous values, "
            f"or the likelihood has no bound: {remedy}."
        )


def _listed(numbers: Sequence[int], noun: str) -> str:
    """'feature 3', 'features 3, 5', 'features 0, 1, 2, 3 and 7 more'."""
    shown = ", ".join(map(str, numbers[:LISTED]))
    more = f" and {len(numbers) - LISTED} more" if len(numbers) > LISTED else ""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {shown}{more}"
