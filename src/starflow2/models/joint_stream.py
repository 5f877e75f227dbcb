"""The interface of a model of one interleaved sequence: slots in, states out, in one pass or with a cache.

`JointStream` is the interface of the Pretzel and of its baseline; `read_documents` reads whole documents in parallel
through any of them, and `LatentInputs` embeds latents for the flow. Not here: language models, skips, sampling loops.
Letters: B rows, T positions, P images, N latents, D latent dim, E language width, C flow width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.errors import ShapeError
from starflow2.flow import Affine, Flow
from starflow2.flow.affine import standard_normal_log_prob
from starflow2.models.protocols import LanguageStream
from starflow2.models.sequence import IGNORE, Batch
from starflow2.nn import ByDocument, Cache, check

__all__ = [
    "JointStream",
    "Latent",
    "LatentInputs",
    "Output",
    "PretzelCache",
    "Skip",
    "Slots",
    "States",
    "Trace",
    "read_documents",
]

Skip = Literal["visual", "text"]
Trace = list[tuple[str, Tensor, Tensor]]  # of every use of a skip: its name, base (M, width), injected (M, width)


@dataclass(frozen=True, slots=True)
class Latent:
    """Latents of new positions: their slots, and the input of both streams there."""

    row: Tensor  # (M,)
    position: Tensor  # (M,) among the new positions of its row
    adapted: Tensor  # (M, E) for the language model
    base: Tensor  # (M, C) for the flow, without the skip


@dataclass(frozen=True, slots=True)
class Slots:
    """Input at T new positions of B rows: token ids, positions, and latents for slots that hold no token."""

    ids: Tensor  # (B, T)
    mrope: Tensor  # (3, B, T)
    places: Tensor  # (B, T, 3)
    latent: Latent | None = None
    begin: tuple[Tensor, Tensor, Tensor] | None = None  # rows (P,), positions (P,), added at a begin slot (P, C)
    attend: Tensor | ByDocument | None = None  # (B, Tk) or (B, T, Tk) bool, or documents


@dataclass(frozen=True, slots=True)
class States:
    """Both streams at the new positions. h: (B, T, E) language, g: (B, T, C) flow."""

    h: Tensor
    g: Tensor


@dataclass(frozen=True, slots=True)
class Output:
    """A whole batch read in parallel.

    affine, u: Gaussians and intermediate latents (P, N, D) of every image; z: (P, N, D) and log_prob: (P,) nats of
    its noisy latents x, shallow_logdet: (P,) nats, the part of the shallow blocks in it; h: (M, E) and g: (M, C) of the
    M positions with a label, labels: (M,), documents: (M,). head: states of such positions, to logits (M, V).
    """

    affine: Affine
    u: Tensor
    z: Tensor
    log_prob: Tensor
    shallow_logdet: Tensor
    h: Tensor
    g: Tensor
    labels: Tensor
    documents: Tensor
    head: Callable[[Tensor, Tensor], Tensor]

    @property
    def logits(self) -> Tensor:
        """(M, V), all at once; a loss over a large vocabulary takes them in chunks (`token_loss.token_nats`)."""
        return self.head(self.h, self.g)


class PretzelCache:
    """The caches of both streams, always equally long; `read` appends to them and `truncate` rewinds them."""

    def __init__(self, vlm: Cache, flow: Cache) -> None:
        self.vlm, self.flow = vlm, flow

    @property
    def length(self) -> int:
        if self.vlm.length != self.flow.length:
            raise ShapeError(
                f"the language model's cache has {self.vlm.length} positions and the flow's {self.flow.length}; "
                "expected equally many."
            )
        return self.flow.length

    @property
    def nbytes(self) -> int:
        """Bytes of memory, spare capacity included."""
        return self.vlm.nbytes + self.flow.nbytes

    def truncate(self, length: int) -> None:
        """Drop all positions from `length` on; those before stay bit-equal."""
        self.vlm.truncate(length)
        self.flow.truncate(length)

    def fork(self, copies: int = 1) -> PretzelCache:
        """A cache of its own with each row repeated `copies` times."""
        return PretzelCache(self.vlm.fork(copies), self.flow.fork(copies))


class JointStream(Protocol):
    """A model of one interleaved sequence: language and latents under one causal mask. Immutable; owns no weights."""

    @property
    def flow(self) -> Flow: ...

    @property
    def skips(self) -> frozenset[Skip]:
        """Skips between the streams that are open."""
        ...

    @property
    def vlm(self) -> LanguageStream:
        """The language model alone."""
        ...

    @property
    def inputs(self) -> LatentInputs:
        """Embeds latents for the flow."""
        ...

    def new_cache(self) -> PretzelCache: ...

    def in_float64(self) -> Self:
        """A twin over copies of the weights in double precision."""
        ...

    def with_skips(self, skips: Collection[Skip]) -> Self:
        """This stream with only these skips open; nothing is copied."""
        ...

    def traced(self, trace: Trace) -> Self:
        """This stream, adding every use of a skip to `trace` (eq. 5.1, 5.2)."""
        ...

    def in_one_pass(self) -> Self:
        """This stream, reading every batch in one pass of the language model (see `prefix`)."""
        ...

    def read(self, slots: Slots, cache: PretzelCache | None = None) -> States:
        """States at new positions, after those in `cache`, which grows by them."""
        ...

    def logits(self, h: Tensor, g: Tensor) -> Tensor:
        """Next-token logits of text positions: h (..., E), g (..., C) -> (..., V)."""
        ...

    def adapted(self, u: Tensor, noise_level: Tensor) -> Tensor:
        """Whole images as the language model reads them: u (P, N, D), noise_level (P,) -> (P, N, E)."""
        ...

    def latents(
        self,
        buffer: Tensor,
        targets: Tensor,
        noise_level: Tensor,
        reference: Tensor | None,
        has_reference: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Latents before `targets`, as the language model (P, n, E) and the flow (P, n, C) read them.

        buffer: (P, N + 1, D), its last row zero; nothing after a target's own predecessor is read. targets: (P, n)
        from 1 to N. reference: (P, N + 1, D), the previous image, where `has_reference` (P,) says there is one.
        """
        ...


@dataclass(frozen=True)
class LatentInputs:
    """Inputs of the flow at the slots of an image: latents, noise level, and the previous image around a target.

    side: odd side of the window of the previous image's latents that is read, 0 = none; projection: (side^2 D -> C).
    """

    flow: Flow
    side: int = 0
    projection: nn.Linear | None = None

    def begins(self, noise_level: Tensor, reference: Tensor | None, has_reference: Tensor | None) -> Tensor:
        """Vectors added at begin slots, (P, C): the noise level to come and the previous image's first latents."""
        added = self.flow.deep.noise_embedding(noise_level)
        return added + self._reference(reference, has_reference, torch.zeros_like(noise_level[:, None]).long())[:, 0]

    def base(
        self,
        buffer: Tensor,
        targets: Tensor,
        noise_level: Tensor,
        reference: Tensor | None,
        has_reference: Tensor | None,
    ) -> Tensor:
        """The flow's input before `targets` without a skip, (P, n, C); arguments as in `JointStream.latents`."""
        base = self.flow.deep.embed_at(buffer, targets) + self.flow.deep.noise_embedding(noise_level)[:, None]
        return base + self._reference(reference, has_reference, targets)

    def _reference(self, reference: Tensor | None, has_reference: Tensor | None, targets: Tensor) -> Tensor:
        """The previous image's latents around the targets' places, projected: (P, n, C)."""
        if reference is None or has_reference is None or self.projection is None:
            return torch.zeros(*targets.shape, self.flow.deep.cfg.stack.width, device=targets.device)
        rows = torch.arange(len(reference), device=reference.device)[:, None, None]
        window = reference[rows, self.window(targets)].flatten(2)  # (P, n, side^2 D)
        return self.projection(window.to(self.projection.weight.dtype)) * has_reference[:, None, None]

    def window(self, targets: Tensor) -> Tensor:
        """Latents around targets (P, n) in reading order, N where there is none: (P, n, side^2)."""
        height, width = self.flow.deep.cfg.grid
        reach = self.side // 2
        steps = torch.arange(-reach, reach + 1, device=targets.device)
        target = targets[..., None, None]
        row, column = target // width + steps[:, None], target % width + steps
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (target < height * width)
        return torch.where(inside, row * width + column, height * width).flatten(-2)


def read_documents(
    stream: JointStream, batch: Batch, x: Tensor, noise_level: Tensor, hidden: Tensor | None = None
) -> Output:
    """Read whole documents in one pass, for training and scoring.

    x: (P, N, D) noisy latents of the batch's images in order, noise_level: (P,) their levels. hidden: (P,) bool,
    images whose own latents neither stream sees, for training: their `log_prob` is not that of an exact density.
    """
    flow = stream.flow
    check(x, "P N D", P=len(batch.pictures), N=flow.deep.cfg.num_latents, D=flow.deep.cfg.dim)
    u, shallow_logdet = flow.shallow(x, noise_level)
    states = stream.read(_slots(stream, batch, u, noise_level, hidden))
    index = batch.pictures.begin[:, None] + torch.arange(u.shape[1], device=u.device)
    affine = flow.deep.affine(states.g[batch.pictures.row[:, None], index])
    z, logdet = affine.normalize(u)
    has_label = batch.labels != IGNORE
    return Output(
        affine=affine,
        u=u,
        z=z,
        log_prob=standard_normal_log_prob(z) + logdet + shallow_logdet,
        shallow_logdet=shallow_logdet,
        h=states.h[has_label],
        g=states.g[has_label],
        head=stream.logits,
        labels=batch.labels[has_label],
        documents=batch.document[has_label],
    )


def _slots(stream: JointStream, batch: Batch, u: Tensor, noise_level: Tensor, hidden: Tensor | None) -> Slots:
    slots = Slots(batch.ids, batch.mrope, batch.places, attend=batch.attend)
    images, count = batch.pictures, u.shape[1]
    if not len(images):
        return slots
    buffer = F.pad(u, (0, 0, 0, 1))  # (P, N + 1, D)
    reference, has_reference = buffer[images.previous], images.previous >= 0
    targets = torch.arange(1, count + 1, device=u.device).expand(len(u), -1)
    own = buffer if hidden is None else buffer.masked_fill(hidden[:, None, None], 0)
    adapted, base = stream.latents(own, targets, noise_level, reference, has_reference)
    row = images.row[:, None].expand(-1, count).flatten()
    position = (images.begin[:, None] + targets).flatten()
    begins = stream.inputs.begins(noise_level, reference, has_reference)
    latent = Latent(row, position, adapted.flatten(0, 1), base.flatten(0, 1))
    return replace(slots, latent=latent, begin=(images.row, images.begin, begins))
