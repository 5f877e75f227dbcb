"""Heat maps: one number per patch, shown over the image. Not here: where the numbers come from, files."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from starflow2.errors import ShapeError

__all__ = ["heat_map"]

# from the smallest value to the largest: night blue, violet, orange, pale yellow; red, green, blue in [-1, 1]
COLOURS = ((-0.9, -0.9, -0.4), (0.1, -0.7, 0.1), (0.9, 0.1, -0.6), (1.0, 1.0, 0.4))
SIDE = 512  # pixels, least length of the longer side


def heat_map(image: Tensor, values: Tensor, strength: float = 0.6) -> Tensor:
    """Blend `image` (3, height, width) in [-1, 1] with the colours of `values` (rows, columns), enlarged.

    The smallest value is night blue, the largest pale yellow; equal values are all blue. The image grows by a whole
    factor. strength: weight of the colours, 0 to 1. Raises ShapeError for other shapes and for values that are not
    finite.
    """
    if image.ndim != 3 or image.shape[0] != 3 or values.ndim != 2 or not bool(values.isfinite().all()):
        raise ShapeError(
            f"heat_map got image {tuple(image.shape)} and values {tuple(values.shape)}; "
            "expected (3, height, width) and finite (rows, columns)."
        )
    height, width = (max(1, -(-SIDE // max(image.shape[1:]))) * side for side in image.shape[1:])
    low, high = values.min(), values.max()
    share = ((values - low) / (high - low).clamp(min=1e-12)).float()  # (rows, columns) in [0, 1]
    colours = F.interpolate(_coloured(share)[None], (height, width), mode="nearest-exact")[0]
    large = F.interpolate(image[None].float(), (height, width), mode="nearest-exact")[0]
    return (1 - strength) * large + strength * colours.to(large)


def _coloured(share: Tensor) -> Tensor:
    """Interpolate COLOURS linearly: (rows, columns) in [0, 1] -> (3, rows, columns)."""
    stops = torch.tensor(COLOURS, device=share.device)  # (S, 3)
    place = share * (len(stops) - 1)
    below = place.floor().long().clamp(max=len(stops) - 2)
    part = (place - below)[..., None]
    return ((1 - part) * stops[below] + part * stops[below + 1]).permute(2, 0, 1)
