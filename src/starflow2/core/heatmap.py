"""Numbers of patches shown over the picture that they belong to. Not here: where the numbers come from, files."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from starflow2.errors import ShapeError

__all__ = ["heat_map"]

# From the smallest value to the largest: night blue, violet, orange, pale yellow; red, green, blue in [-1, 1].
COLOURS = ((-0.9, -0.9, -0.4), (0.1, -0.7, 0.1), (0.9, 0.1, -0.6), (1.0, 1.0, 0.4))
SIDE = 512  # pixels that the longer side has at least


def heat_map(image: Tensor, values: Tensor, strength: float = 0.6) -> Tensor:
    """`image` (3, height, width) in [-1, 1] under the colours of `values` (rows, columns), enlarged by a whole factor.

    The smallest value is night blue, the largest pale yellow; where all are equal, all are blue. strength: of the
    colours, 0 to 1. Raises ShapeError for other shapes and for values that are not finite.
    """
    if image.ndim != 3 or image.shape[0] != 3 or values.ndim != 2 or not bool(values.isfinite().all()):
        raise ShapeError(
            f"heat_map: expected an image (3, height, width) and finite values (rows, columns), "
            f"got {tuple(image.shape)} and {tuple(values.shape)}."
        )
    height, width = (max(1, -(-SIDE // max(image.shape[1:]))) * side for side in image.shape[1:])
    low, high = values.min(), values.max()
    share = ((values - low) / (high - low).clamp(min=1e-12)).float()  # (rows, columns) in [0, 1]
    colours = F.interpolate(_coloured(share)[None], (height, width), mode="nearest-exact")[0]
    large = F.interpolate(image[None].float(), (height, width), mode="nearest-exact")[0]
    return (1 - strength) * large + strength * colours.to(large)


def _coloured(share: Tensor) -> Tensor:
    """(rows, columns) in [0, 1] -> (3, rows, columns), straight lines between COLOURS."""
    stops = torch.tensor(COLOURS, device=share.device)  # (S, 3)
    at = share * (len(stops) - 1)
    below = at.floor().long().clamp(max=len(stops) - 2)
    part = (at - below)[..., None]
    return ((1 - part) * stops[below] + part * stops[below + 1]).permute(2, 0, 1)
