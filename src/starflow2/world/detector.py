"""The drawn world's detector: objects in an image, found by template matching without a network.

Median background, colour distance, connected components, nearest palette colour, then the best soft IoU of the centred,
scale-normalised alpha crop against rendered templates. Objects that touch count as one blob: the world keeps them
apart, so merging is a drawing error. All thresholds are on colours in [0, 1].

Shape letters: B images, M blobs of all B images together, R runs of foreground pixels, S side of a crop, P templates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as nnf

from starflow2.errors import DataError
from starflow2.world.scene import COLORS, IMAGE_SIZE, MAX_ANGLE, PALETTE, RADII, SHAPES, Scene, SceneObject, render

__all__ = ["MIN_PIXELS", "Detection", "Scan", "connected_components", "detect"]

FOREGROUND = 0.2  # colour distance from the background
COLOR_REJECT = 0.3  # colour distance from the nearest palette entry
SHAPE_REJECT = 0.72  # soft IoU with the best template
MIN_PIXELS = 12  # smaller blobs are pixel noise; the smallest object has about seventy
CROP = 24  # S, cells
CROP_REACH = 0.95  # half side of the crop in units of sqrt(area): holds the thinnest star
CHUNK = 64  # images at a time, bounds memory

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Detection:
    """One recognised object. Places in pixels, the left edge of the image is 0 and its right edge 64."""

    shape: int  # index into SHAPES
    color: int | None  # index into COLORS; None if no palette entry is near
    score: float  # soft IoU with the best template
    box: tuple[float, float, float, float]  # x0, y0, x1, y1: centre ± radius, the box that the world's relations use
    center: tuple[float, float]  # x, y of the object in the world's sense, not of its centre of mass
    radius: float
    size: int  # index into RADII

    @property
    def as_object(self) -> SceneObject:
        """The object of a scene that this is; a colour of -1 is no colour of the palette."""
        color, (x, y) = -1 if self.color is None else self.color, self.center
        return SceneObject(shape=self.shape, color=color, size=self.size, x=x, y=y, angle=0.0)


@dataclass(frozen=True, slots=True)
class Scan:
    """Detections in one image by falling score, and the blobs that match no template."""

    detections: tuple[Detection, ...]
    background: tuple[float, float, float]  # RGB in [0, 1]
    unknown_scores: tuple[float, ...] = ()  # best soft IoU of each unrecognised blob

    @property
    def unknown(self) -> int:
        """Number of unrecognised blobs."""
        return len(self.unknown_scores)


class _Blobs(NamedTuple):
    """M foreground components of B images, before they are recognised."""

    image: Ints  # (M,) which image
    color: Floats  # (M, 3) median of the core, [0, 1]
    area: Floats  # (M,) sum of alpha, pixels
    center: Floats  # (M, 2) x, y of the centre of mass
    crops: Tensor  # (M, S*S) alpha


class _Bank(NamedTuple):
    """Rendered templates."""

    crops: Tensor  # (P, S*S)
    shape: Ints  # (P,)
    unit_area: Floats  # (shapes,) area of each shape at radius 1
    offset: Floats  # (P, 2) from the object's place to its centre of mass, at radius 1


def detect(images: Bytes) -> list[Scan]:
    """Detects the objects of each image: one Scan per image.

    images: (B, height, width, 3) uint8. Raises DataError for anything else.

    >>> blank = np.full((1, 64, 64, 3), 230, np.uint8)
    >>> detect(blank)[0].detections
    ()
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise DataError(f"images: expected uint8 (B, height, width, 3), got {images.dtype} {images.shape}")
    return [scan for start in range(0, len(images), CHUNK) for scan in _detect_chunk(images[start : start + CHUNK])]


def _detect_chunk(images: Bytes) -> list[Scan]:
    bank = _bank()
    background = _background(images)  # (B, 3)
    blobs = _find_blobs(images, background)
    iou, best = _soft_iou(blobs.crops, bank.crops).max(dim=1)  # 2 x (M,)
    score, template = iou.numpy(), best.numpy()
    shape = bank.shape[template]
    gap = np.linalg.norm(blobs.color[:, None] - PALETTE / np.float32(255), axis=-1)  # (M, colours)
    color, is_named = gap.argmin(axis=1), gap.min(axis=1) <= COLOR_REJECT
    radius = np.sqrt(blobs.area / bank.unit_area[shape])
    size = np.abs(radius[:, None] - np.array(RADII)).argmin(axis=1)
    place = blobs.center - bank.offset[template] * radius[:, None]  # (M, 2)
    found: list[list[Detection]] = [[] for _ in images]
    unknown: list[list[float]] = [[] for _ in images]
    for m in np.argsort(-score, kind="stable"):
        if score[m] < SHAPE_REJECT:
            unknown[blobs.image[m]].append(float(score[m]))
            continue
        (x, y), half = place[m].tolist(), float(radius[m])
        found[blobs.image[m]].append(
            Detection(
                shape=int(shape[m]),
                color=int(color[m]) if is_named[m] else None,
                score=float(score[m]),
                box=(x - half, y - half, x + half, y + half),
                center=(x, y),
                radius=half,
                size=int(size[m]),
            )
        )
    tints = [(float(r), float(g), float(b)) for r, g, b in background / 255]
    return [Scan(tuple(f), t, tuple(u)) for f, t, u in zip(found, tints, unknown, strict=True)]


def _background(images: Bytes) -> Bytes:
    """Per-channel median of each image: (B, 3)."""
    flat = np.moveaxis(images, -1, 1).reshape(len(images), 3, -1)  # (B, 3, pixels)
    return np.sort(flat, axis=-1, kind="stable")[..., flat.shape[-1] // 2]  # radix sort on bytes


def _find_blobs(images: Bytes, background: Bytes) -> _Blobs:
    difference = images.astype(np.int32) - background[:, None, None]  # (B, height, width, 3)
    mask = np.square(difference).sum(axis=-1) > (255 * FOREGROUND) ** 2
    labels, count = connected_components(_without_specks(mask))  # (B, height, width), 0 is background
    color = _core_colors(images, labels, count)  # (M, 3) bytes
    image = np.zeros(count, np.int64)
    reach = _pool(labels)  # one pixel wider: the anti-aliased rim
    pixels = np.nonzero(reach)  # 3 x (foreground pixels,): image, row, column
    owner = reach[pixels] - 1
    image[owner] = pixels[0]
    axis = color - background[image].astype(np.float32)  # (M, 3) from background to object
    axis /= np.maximum(np.square(axis).sum(axis=1, keepdims=True), 1.0)
    alpha = np.clip((difference[pixels] * axis[owner]).sum(axis=1), 0, 1).astype(np.float32)
    x, y = pixels[2] + 0.5, pixels[1] + 0.5
    area = np.maximum(np.bincount(owner, alpha, count), 1e-6)
    moment = np.stack([np.bincount(owner, alpha * x, count), np.bincount(owner, alpha * y, count)], axis=1)
    center = moment / area[:, None]
    maps = np.zeros((count, *images.shape[1:3]), np.float32)
    maps[owner, pixels[1], pixels[2]] = alpha
    crops = _crop(torch.from_numpy(maps), torch.from_numpy(center), torch.from_numpy(np.sqrt(area)))
    return _Blobs(image, color / np.float32(255), area.astype(np.float32), center.astype(np.float32), crops)


def _pool(labels: Ints) -> Ints:
    """Greatest label in each 3 x 3 neighbourhood."""
    grown = nnf.max_pool2d(torch.from_numpy(labels.astype(np.float32))[:, None], 3, stride=1, padding=1)
    return grown[:, 0].numpy().astype(np.int64)


def _without_specks(mask: Bools) -> Bools:
    """The mask without foreground pixels that have fewer than two foreground neighbours out of eight."""
    around = nnf.avg_pool2d(torch.from_numpy(mask.astype(np.float32))[:, None], 3, 1, 1, divisor_override=1)
    return mask & (around[:, 0].numpy() > 2.5)


def connected_components(mask: Bools) -> tuple[Ints, int]:
    """Labels of the 4-connected components of at least MIN_PIXELS, from 1 over all images together, and their number.

    mask: (B, height, width). Runs of foreground pixels along a row are the nodes and overlaps with the next row the
    edges, so the work grows with the number of runs (about eighty per image) and not with the number of pixels.
    """
    padded = np.pad(mask, ((0, 0), (0, 1), (0, 1)))  # no run and no edge crosses a border
    stride = padded.shape[2]
    steps = np.diff(padded.ravel().astype(np.int8), prepend=0)
    starts, ends = np.nonzero(steps == 1)[0], np.nonzero(steps == -1)[0]  # 2 x (R,)
    first = np.searchsorted(ends, starts + stride, side="right")
    last = np.searchsorted(starts, ends + stride, side="left")
    fanout = np.maximum(last - first, 0)
    upper = np.repeat(np.arange(len(starts)), fanout)
    lower = np.arange(len(upper)) - np.repeat(np.cumsum(fanout) - fanout - first, fanout)
    root = _union(len(starts), upper, lower)
    size = np.bincount(root, ends - starts, len(starts))
    large = np.nonzero(size >= MIN_PIXELS)[0]
    number = np.zeros(len(starts) + 1, np.int64)
    number[large] = np.arange(1, len(large) + 1)
    labels = np.zeros(padded.size, np.int64)
    runs = np.repeat(root, ends - starts)
    labels[np.nonzero(padded.ravel())[0]] = number[runs]
    return labels.reshape(padded.shape)[:, :-1, :-1], len(large)


def _union(count: int, left: Ints, right: Ints) -> Ints:
    """Smallest node that each of `count` nodes is linked to (hooking and pointer jumping)."""
    root = np.arange(count)
    while True:
        low, high = np.minimum(root[left], root[right]), np.maximum(root[left], root[right])
        if np.array_equal(low, high):
            return root
        np.minimum.at(root, high, low)
        while not np.array_equal(root, root[root]):
            root = root[root]


def _core_colors(images: Bytes, labels: Ints, count: int) -> Floats:
    """Per-channel median of each blob's pixels whose 3 x 3 neighbourhood belongs to it: (M, 3) bytes."""
    core = np.where(-_pool(-labels) == labels, labels, 0)
    has_core = np.bincount(core.ravel(), minlength=count + 1) > 0
    core = np.where(has_core[labels], core, labels)  # too thin for a core: all of it
    pixels = np.nonzero(core)
    owner = core[pixels] - 1
    amount = np.bincount(owner, minlength=count)
    middle = np.cumsum(amount) - amount + amount // 2
    keys = owner[:, None] * 256 + images[pixels]  # sorts by blob, then by value
    colors: Floats = (np.sort(keys, axis=0)[middle] & 255).astype(np.float32)
    return colors


def _crop(maps: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    """Each alpha map cut out around its centre and scaled so that all blobs have one area: (M, S*S)."""
    height, width = maps.shape[1:]
    cells = torch.linspace(-1, 1, CROP) * CROP_REACH
    offset = torch.stack(torch.meshgrid(cells, cells, indexing="xy"), dim=-1)  # (S, S, 2) x, y
    place = center[:, None, None] + scale[:, None, None, None] * offset  # (M, S, S, 2) pixels
    grid = (place / torch.tensor([width, height]) * 2 - 1).float()
    return nnf.grid_sample(maps[:, None], grid, align_corners=False).flatten(1)


def _soft_iou(crops: Tensor, templates: Tensor) -> Tensor:
    """Sum of minima over sum of maxima of every crop and template, from their L1 distance: (M, P)."""
    total = crops.sum(dim=1, keepdim=True) + templates.sum(dim=1)  # (M, P)
    distance = torch.cdist(crops, templates, p=1.0)
    return (total - distance) / (total + distance).clamp(min=1e-6)


@cache
def _bank() -> _Bank:
    """Templates of every shape in both sizes, seven rotations and two sub-pixel offsets."""
    angles, offsets = np.linspace(-MAX_ANGLE, MAX_ANGLE, 7).tolist(), (0.0, 0.5)
    rows = list(product(range(len(SHAPES)), range(len(RADII)), angles, offsets))
    middle, black = IMAGE_SIZE / 2, COLORS.index("black")
    objects = [
        SceneObject(shape=shape, color=black, size=size, x=middle + by, y=middle + by, angle=angle)
        for shape, size, angle, by in rows
    ]
    images = np.stack([render(Scene(objects=(obj,), background=0)) for obj in objects])
    blobs = _find_blobs(images, _background(images))
    assert np.array_equal(blobs.image, np.arange(len(objects))), "a template is not one blob"
    shape = np.array([obj.shape for obj in objects])
    radius = np.array([obj.radius for obj in objects], np.float32)
    place = np.array([(obj.x, obj.y) for obj in objects], np.float32)
    unit = blobs.area / np.square(radius)
    unit_area = np.array([unit[shape == k].mean() for k in range(len(SHAPES))], np.float32)
    return _Bank(blobs.crops, shape, unit_area, (blobs.center - place) / radius[:, None])
