"""Scenes of one to four flat objects on a light background: ground truth, rendering, relations, random placement.

Words are in `words`, and `splits` decides which scenes training may show.
Coordinates are pixels of the 64 x 64 canvas, x to the right and y downwards; pixel i covers [i, i + 1).
Nothing here is from the paper; our choice: docs/choices.md#world.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from starflow2.core.dialogue import Dialogue, Turn
from starflow2.errors import ConfigError

__all__ = [
    "BACKGROUNDS",
    "BACKGROUND_NAMES",
    "COLORS",
    "EDGE",
    "IMAGE_SIZE",
    "MARGIN",
    "MAX_ANGLE",
    "MAX_OBJECTS",
    "OPPOSITES",
    "PALETTE",
    "RADII",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Bucket",
    "Cell",
    "Relation",
    "Scene",
    "SceneDialogue",
    "SceneObject",
    "SceneTurn",
    "Split",
    "central_scene",
    "chance",
    "coverage",
    "fits",
    "half_box",
    "pick",
    "relations",
    "render",
    "render_batch",
    "sample_scene",
    "scene_in_cells",
    "shuffled",
    "stream",
]

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Split = Literal["dev", "test"]
Bucket = Literal["train", "dev", "test"]
Relation = Literal["left of", "right of", "above", "below"]
Cell = tuple[int, int]  # row and column of the 3 x 3 grid over an image, from the upper left

SHAPES: Final = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
COLORS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SIZES: Final = ("small", "large")
BACKGROUND_NAMES: Final = ("white", "gray", "cream", "mint", "sky")
RELATIONS: Final[tuple[Relation, ...]] = ("left of", "right of", "above", "below")
OPPOSITES: Final[Mapping[Relation, Relation]] = MappingProxyType(
    {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
)

IMAGE_SIZE: Final = 64  # pixels, square
RADII: Final = (8.0, 11.0)  # pixels, small and large; 6.5 was too small for the auto-encoder
MAX_OBJECTS: Final = 4
MAX_ANGLE: Final = 0.22  # radians, either way
GAP: Final = 3.0  # pixels between any two outlines, so that connected components separate
MARGIN: Final = 1.0  # pixels between an outline and the border
EDGE: Final = 1.5  # pixels from a line of the 3 x 3 grid within which the place of an object is debatable


def _table(rows: Sequence[tuple[int, int, int]]) -> Pixels:
    colors = np.array(rows, dtype=np.uint8)  # (n, 3)
    colors.setflags(write=False)
    return colors


PALETTE: Final[Pixels] = _table(  # any two differ by more than 0.3 on [0, 1], the detector's colour tolerance
    [
        (218, 38, 42),
        (240, 125, 20),
        (246, 216, 44),
        (46, 158, 72),
        (46, 92, 222),
        (134, 52, 176),
        (246, 134, 186),
        (28, 28, 30),
    ]
)
BACKGROUNDS: Final[Pixels] = _table(
    [(250, 250, 250), (214, 214, 214), (250, 241, 212), (218, 245, 226), (214, 232, 250)]
)

_SUPERSAMPLE: Final = 4
_CENTRAL_TRIES: Final = 12  # layouts among which the one with an object nearest to the middle is chosen
_CELL_TRIES: Final = 8  # batches of layouts tried for objects in given cells


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """One object: indices into SHAPES, COLORS and SIZES; centre x, y in pixels; angle in radians."""

    shape: int
    color: int
    size: int
    x: float
    y: float
    angle: float

    @property
    def radius(self) -> float:
        """Half the side of the box by which relations are judged, in pixels."""
        return RADII[self.size]

    def __str__(self) -> str:
        return f"{SIZES[self.size]} {COLORS[self.color]} {SHAPES[self.shape]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Ground truth of an image: its objects, in no meaningful order, and an index into BACKGROUNDS."""

    objects: tuple[SceneObject, ...]
    background: int


SceneTurn = Turn[Scene]
SceneDialogue = Dialogue[Scene]


def stream(*numbers: int) -> np.random.Generator:
    """A random generator seeded by non-negative integers, such as (seed, index): same numbers, same draws.

    >>> stream(0, 7).random() == stream(0, 7).random()
    True
    """
    if min(numbers) < 0:
        raise ConfigError(f"numbers={numbers}: expected seeds and indices of 0 or more")
    return np.random.default_rng(numbers)


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def shuffled(rng: np.random.Generator, options: Sequence[T]) -> list[T]:
    """The options in a random order."""
    return [options[int(index)] for index in rng.permutation(len(options))]


def chance(rng: np.random.Generator, probability: float) -> bool:
    """True with the given probability."""
    return bool(rng.random() < probability)


# ------------------------------------------------------------------------------------------ drawing


def _polar(radii: Floats, turns: Floats) -> Floats:
    """Points at the given radii and fractions of a turn, clockwise from the top; (n, 2)."""
    return np.stack([radii * np.sin(2 * np.pi * turns), -radii * np.cos(2 * np.pi * turns)], axis=-1)


def _heart() -> Floats:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=-1) / 16


def _outlines() -> tuple[tuple[Floats, ...], ...]:
    """Polygons of each shape for radius 1: the outline, then a hole if there is one. Their boxes are centred at 0."""
    round_ = _polar(np.ones(36), np.arange(36) / 36)
    star = _polar(np.tile([1.1, 0.5], 5), np.arange(10) / 10)
    triangle = np.array([(0.0, -0.84), (0.92, 0.8), (-0.92, 0.8)])
    arm, end = 0.33, 1.0
    cross = np.array(
        [
            (-arm, -end), (arm, -end), (arm, -arm), (end, -arm), (end, arm), (arm, arm),
            (arm, end), (-arm, end), (-arm, arm), (-end, arm), (-end, -arm), (-arm, -arm),
        ]
    )  # fmt: skip
    square = 0.82 * np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])
    diamond = np.array([(0.0, -1.12), (0.72, 0.0), (0.0, 1.12), (-0.72, 0.0)])

    def centred(points: Floats) -> Floats:
        low, high = points.min(axis=0), points.max(axis=0)
        return np.asarray(points - (low + high) / 2)

    outer = (round_, square, triangle, star, _heart(), round_, cross, diamond)
    hole = 0.56 * round_
    return tuple((centred(points), hole)[: 1 + (SHAPES[k] == "ring")] for k, points in enumerate(outer))


_OUTLINES: Final = _outlines()
_REACH: Final = tuple(float(np.linalg.norm(polygons[0], axis=1).max()) for polygons in _OUTLINES)  # per unit radius


def _extent(outline: Floats) -> tuple[float, float]:
    """Half the width and height, for radius 1, of the box around the shape at all allowed angles."""
    angles = np.linspace(-MAX_ANGLE, MAX_ANGLE, 23)[:, None]
    turned = (outline[:, 0] + 1j * outline[:, 1]) * np.exp(1j * angles)  # (angles, points)
    return float(np.abs(turned.real).max()), float(np.abs(turned.imag).max())


_EXTENT: Final = tuple(_extent(polygons[0]) for polygons in _OUTLINES)


def _sprite(obj: SceneObject, image_size: int) -> tuple[Pixels, int, int]:
    """Coverage of one object in a small window, 0-255, and the window's left and top pixel."""
    scale = image_size / IMAGE_SIZE
    half = int(np.ceil(_REACH[obj.shape] * obj.radius * scale)) + 1
    left, top = int(obj.x * scale) - half, int(obj.y * scale) - half
    side = _SUPERSAMPLE * (2 * half + 1)
    window = Image.new("L", (side, side))
    draw = ImageDraw.Draw(window)
    cos, sin = np.cos(obj.angle), np.sin(obj.angle)
    turn = np.array([[cos, sin], [-sin, cos]]) * (obj.radius * scale * _SUPERSAMPLE)
    # Pillow cuts vertices to whole sub-pixels and fills both edges: with this 0.5 an outline comes out an eighth of a
    # pixel too far up and left and as much too wide, in all images and all templates of the detector alike.
    centre = np.array([obj.x * scale - left, obj.y * scale - top]) * _SUPERSAMPLE - 0.5
    for fill, polygon in zip((255, 0), _OUTLINES[obj.shape], strict=False):
        draw.polygon((polygon @ turn + centre).ravel().tolist(), fill=fill)
    return np.asarray(window.reduce(_SUPERSAMPLE)), left, top


def _clip(start: int, length: int, image_size: int) -> tuple[slice, slice]:
    """Slices, along one axis, of the canvas that a window covers and of the part of the window inside the canvas."""
    low, high = max(start, 0), min(start + length, image_size)
    return slice(low, high), slice(low - start, high - start)


def coverage(obj: SceneObject, image_size: int = IMAGE_SIZE) -> Pixels:
    """Coverage of each pixel by one object: (image_size, image_size) uint8, 255 = all of it.

    >>> round(coverage(SceneObject(shape=0, color=0, size=1, x=32, y=32, angle=0)).sum() / 255, -1).item()
    380.0
    """
    alpha, left, top = _sprite(obj, image_size)
    canvas = np.zeros((image_size, image_size), dtype=np.uint8)
    (rows, from_rows), (columns, from_columns) = (_clip(start, len(alpha), image_size) for start in (top, left))
    canvas[rows, columns] = alpha[from_rows, from_columns]
    return canvas


def render(scene: Scene, image_size: int = IMAGE_SIZE) -> Pixels:
    """The anti-aliased image of a scene: (image_size, image_size, 3) uint8 RGB."""
    canvas = np.empty((image_size, image_size, 3), dtype=np.uint8)
    canvas[:] = BACKGROUNDS[scene.background]
    for obj in scene.objects:
        alpha, left, top = _sprite(obj, image_size)
        (rows, from_rows), (columns, from_columns) = (_clip(start, len(alpha), image_size) for start in (top, left))
        weight = alpha[from_rows, from_columns, None].astype(np.uint16)  # (h, w, 1)
        below = canvas[rows, columns]  # (h, w, 3), a view
        below[:] = (below * (255 - weight) + PALETTE[obj.color] * weight + 127) // 255
    return canvas


def render_batch(scenes: Sequence[Scene], image_size: int = IMAGE_SIZE) -> Pixels:
    """Images of one scene or more: (B, image_size, image_size, 3) uint8 RGB."""
    return np.stack([render(scene, image_size) for scene in scenes])


# ---------------------------------------------------------------------------------------- relations


def relations(a: SceneObject, b: SceneObject) -> frozenset[Relation]:
    """Relations of a to b: none, one or two of RELATIONS, by GenEval's box rule (shrink 0.1, threshold 0.5).

    Boxes are centre +- radius. Each axis of the offset is shortened by 0.1 of the two widths, then divided by the
    length of the unshortened offset.
    """
    dx, dy = a.x - b.x, a.y - b.y
    shrink, length = 0.2 * (a.radius + b.radius), float(np.hypot(dx, dy))
    threshold = 0.5 * length + shrink
    found: list[Relation] = []
    if abs(dx) > threshold:
        found.append("left of" if dx < 0 else "right of")
    if abs(dy) > threshold:
        found.append("above" if dy < 0 else "below")
    return frozenset(found)


# ----------------------------------------------------------------------------------------- sampling


@functools.cache
def _pairs(num_objects: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    return np.triu_indices(num_objects, k=1)


def _stands(places: Floats, radii: Floats, relation: Relation) -> npt.NDArray[np.bool_]:
    """Mask (n,) of candidates (n, objects, 2) whose first object is in `relation` to the second, by the box rule."""
    offset = places[:, 0] - places[:, 1]  # (n, 2)
    axis = 0 if relation in ("left of", "right of") else 1
    sign = -1.0 if relation in ("left of", "above") else 1.0
    threshold = 0.5 * np.hypot(offset[:, 0], offset[:, 1]) + 0.2 * (radii[0] + radii[1])
    return np.asarray(sign * offset[:, axis] > threshold)


@dataclass(frozen=True, slots=True)
class _Room:
    """Room for objects of these shapes and sizes: radii (objects,), half boxes (objects, 2), distances of pairs."""

    radii: Floats
    extent: Floats
    apart: Floats  # (pairs,), between circles around the two
    beside: Floats  # (pairs, 2), between boxes around the two, on either axis

    @classmethod
    def of(cls, shapes: Sequence[int], sizes: Sequence[int]) -> _Room:
        return _room(tuple(shapes), tuple(sizes))

    @property
    def batch(self) -> int:
        """How many layouts to try at once."""
        return (1, 8, 32, 128)[len(self.radii) - 1]

    def fits(self, places: Floats) -> npt.NDArray[np.bool_]:
        """Mask (n,) of layouts (n, objects, 2) in which no two objects touch."""
        if len(self.radii) == 1:
            return np.ones(len(places), dtype=np.bool_)
        first, second = _pairs(len(self.radii))
        offset = np.abs(places.take(first, axis=1) - places.take(second, axis=1))  # (n, pairs, 2)
        across, down = offset[..., 0], offset[..., 1]
        clear = (across >= self.beside[:, 0]) | (down >= self.beside[:, 1]) | (np.hypot(across, down) >= self.apart)
        return np.asarray(clear.all(axis=-1))


@functools.lru_cache(maxsize=4096)
def _room(shapes: tuple[int, ...], sizes: tuple[int, ...]) -> _Room:
    radii = np.array([RADII[size] for size in sizes])
    reach = radii * [_REACH[shape] for shape in shapes]
    extent = radii[:, None] * [_EXTENT[shape] for shape in shapes]
    first, second = _pairs(len(shapes))
    return _Room(radii, extent, reach[first] + reach[second] + GAP, extent[first] + extent[second] + GAP)


def _place(
    rng: np.random.Generator,
    shapes: Sequence[int],
    sizes: Sequence[int],
    relation: Relation | None = None,
    cells: Sequence[Cell | None] | None = None,
) -> Floats | None:
    """Centres (objects, 2), uniform over all layouts that fit, by rejection of many candidates at a time.

    With cells, which may leave too little room, None after some candidates; without, a layout is always found.
    """
    room = _Room.of(shapes, sizes)
    low = room.extent + MARGIN
    span = IMAGE_SIZE - 2 * low
    if cells is not None:
        low, span = _within_cells(low, cells)
    for _ in itertools.count() if cells is None else range(_CELL_TRIES):
        places = rng.random((room.batch, len(shapes), 2)) * span + low
        fits = room.fits(places)
        if relation is not None:
            fits &= _stands(places, room.radii, relation)
        winner = int(fits.argmax())
        if fits[winner]:
            return np.asarray(places[winner])
    return None


def central_scene(rng: np.random.Generator, shapes: Sequence[int], sizes: Sequence[int], centre: float) -> Scene:
    """A random scene whose first object is near (centre, centre), pixels: of some layouts the one that comes nearest.

    The objects are otherwise in the order of their shapes.
    """
    room = _Room.of(shapes, sizes)
    low = room.extent + MARGIN
    found: list[Floats] = []
    while sum(map(len, found)) < _CENTRAL_TRIES:
        places = rng.random((2 * room.batch, len(shapes), 2)) * (IMAGE_SIZE - 2 * low) + low
        found.append(places[room.fits(places)])
    layouts = np.concatenate(found)[:_CENTRAL_TRIES]  # (n, objects, 2)
    layout, first = np.unravel_index(int(np.abs(layouts - centre).max(axis=-1).argmin()), layouts.shape[:2])
    order = [int(first), *(i for i in range(len(shapes)) if i != first)]
    looks = [shapes[i] for i in order], rng.integers(len(COLORS), size=len(shapes)).tolist(), [sizes[i] for i in order]
    return _placed(rng, looks, layouts[layout][order], int(rng.integers(len(BACKGROUND_NAMES))))


def _within_cells(low: Floats, cells: Sequence[Cell | None]) -> tuple[Floats, Floats]:
    """Lowest centres and spans (objects, 2), of those that stay clear of the border, inside each object's cell."""
    high, third = IMAGE_SIZE - low, IMAGE_SIZE / 3
    low = low.copy()
    for index, cell in enumerate(cells):
        if cell is not None:
            corner = third * np.array(cell[::-1])  # x, y
            low[index] = np.maximum(low[index], corner + EDGE)
            high[index] = np.minimum(high[index], corner + third - EDGE)
    return low, high - low


def half_box(obj: SceneObject) -> tuple[float, float]:
    """Half the width and height of the box around the object at all allowed angles, in pixels."""
    width, height = _EXTENT[obj.shape]
    return width * obj.radius, height * obj.radius


def fits(scene: Scene) -> bool:
    """True if nothing overlaps or touches the border, by the rule by which `sample_scene` places objects.

    >>> fits(sample_scene(stream(0), shapes=[0, 3, 5]))
    True
    """
    boxes = [half_box(obj) for obj in scene.objects]
    for obj, (width, height) in zip(scene.objects, boxes, strict=True):
        if min(obj.x, IMAGE_SIZE - obj.x) < width + MARGIN or min(obj.y, IMAGE_SIZE - obj.y) < height + MARGIN:
            return False
    for (a, box_a), (b, box_b) in itertools.combinations(zip(scene.objects, boxes, strict=True), 2):
        dx, dy = abs(a.x - b.x), abs(a.y - b.y)
        apart = _REACH[a.shape] * a.radius + _REACH[b.shape] * b.radius + GAP
        if dx < box_a[0] + box_b[0] + GAP and dy < box_a[1] + box_b[1] + GAP and float(np.hypot(dx, dy)) < apart:
            return False
    return True


def sample_scene(
    rng: np.random.Generator,
    *,
    shapes: Sequence[int],
    colors: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    background: int | None = None,
    relation: Relation | None = None,
) -> Scene:
    """A random scene with objects of these shapes, in this order; arguments that are None are drawn uniformly.

    relation: of the first object to the second. Nothing overlaps or touches the border. Raises ConfigError for a number
    of objects that is not possible. Splits are not looked at: callers reject with `is_trainable` or `held_out`.

    >>> scene = sample_scene(stream(0), shapes=[3, 5], relation="left of")
    >>> "left of" in relations(*scene.objects)
    True
    """
    count = len(shapes)
    if not 1 <= count <= MAX_OBJECTS or (relation is not None and count < 2):
        raise ConfigError(f"shapes={list(shapes)}: expected 1 to {MAX_OBJECTS} objects, and 2 or more with a relation")
    colors = rng.integers(len(COLORS), size=count).tolist() if colors is None else colors
    sizes = rng.integers(len(SIZES), size=count).tolist() if sizes is None else sizes
    background = int(rng.integers(len(BACKGROUND_NAMES))) if background is None else background
    places = _place(rng, shapes, sizes, relation)
    assert places is not None  # without cells there is room
    return _placed(rng, (shapes, colors, sizes), places, background)


def scene_in_cells(
    rng: np.random.Generator,
    *,
    shapes: Sequence[int],
    colors: Sequence[int],
    sizes: Sequence[int],
    background: int,
    cells: Sequence[Cell | None],
) -> Scene | None:
    """A random scene with objects in given cells of the 3 x 3 grid, None for anywhere; None if they do not fit there.

    >>> cells = [(0, 0), None]
    >>> scene = scene_in_cells(stream(0), shapes=[3, 5], colors=[0, 0], sizes=[0, 0], background=0, cells=cells)
    >>> max(scene.objects[0].x, scene.objects[0].y) < IMAGE_SIZE / 3
    True
    """
    places = _place(rng, shapes, sizes, cells=cells)
    return None if places is None else _placed(rng, (shapes, colors, sizes), places, background)


def _placed(
    rng: np.random.Generator, looks: tuple[Sequence[int], Sequence[int], Sequence[int]], places: Floats, background: int
) -> Scene:
    """The scene with objects of these shapes, colours and sizes at these centres (objects, 2), slightly turned."""
    angles = rng.uniform(-MAX_ANGLE, MAX_ANGLE, size=len(places)).tolist()
    rows = zip(*looks, places.tolist(), angles, strict=True)
    objects = tuple(SceneObject(shape=s, color=c, size=z, x=x, y=y, angle=w) for s, c, z, (x, y), w in rows)
    return Scene(objects=objects, background=background)
