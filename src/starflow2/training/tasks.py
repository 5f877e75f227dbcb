"""Stages as data, and what each trains: its `Task` draws items and says what they cost. No loops, no files here.

Every random choice is a pure function of (seed, stage, index or step).
Letters: B documents, T positions, N latents, P pictures.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.data.mixture import BatchConfig, Batches, Spelling, read_mixture
from starflow2.errors import ConfigError, DataError
from starflow2.flow.affine import Affine
from starflow2.flow.noise import add_noise
from starflow2.models.components import Components
from starflow2.models.context import drawing_context
from starflow2.models.pretzel import Output
from starflow2.models.sequence import IGNORE, Batch, length_groups, with_pictures
from starflow2.training.codec_tasks import FaeTask, FeaturesTask
from starflow2.training.config import StageConfig
from starflow2.training.datasets import Captions, Documents, joint_dialogue
from starflow2.training.initialise import match_tower_scale, whiten_text_states, world_captions
from starflow2.training.losses import (
    count_replies,
    joint_loss,
    last_edits,
    lone_drawings,
    ngp_loss,
    ntp_loss,
)
from starflow2.training.task import WHOLE, LossAndMetrics, LossWeights, Task
from starflow2.world.conversations import understanding_dialogue

__all__ = [
    "TASKS",
]


# -- tasks --------------------------------------------------------------------------------------------


class _Packed:
    """A task that takes packed documents as they are."""

    def initialise(self) -> None:
        pass

    def from_documents(self, images: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
        return images, batch


class VlmTask(_Packed):
    """Conversations about drawn pictures, seen through the model's own vision tower, and about words."""

    def __init__(self, components: Components, stage: StageConfig, seed: int) -> None:
        self.components = components
        dialogue = partial(understanding_dialogue, seed)
        self.make_batch: Callable[[range], Any] = Documents.of(components, dialogue, components.tower_layout)
        self.trained = nn.ModuleDict({"vlm": components.vlm})

    def counts(self, data: tuple[Tensor, Batch]) -> dict[str, int]:
        return {"text": count_replies(data[1].labels)}

    def loss(
        self, data: tuple[Tensor, Batch], generator: torch.Generator, share: LossWeights = WHOLE
    ) -> LossAndMetrics:
        images, batch = data[0].to(self.components.device), data[1].to(self.components.device)
        return share.of("text", _reading_loss(self.components, self.components.vlm.see(images), batch)), {}


class T2iTask:
    """Paper stage 1: the flow's exact NLL given the frozen VLM's states of the caption.

    With `codec_weight` the FAE trains, too: on its own losses, and through its latents on the flow's. Those stay
    standardised over the batch, so that no scale of them makes them likelier (docs/choices.md#end-to-end).
    """

    def __init__(self, components: Components, stage: StageConfig, seed: int) -> None:
        self.components, self.stage, self.seed = components, stage, seed
        assert components.tokenizer is not None
        self.make_batch: Callable[[range], Any] = Captions(
            components.tokenizer, seed, stage.caption_drop, stage.captions
        )
        self.trained = nn.ModuleDict({"flow": components.flow})
        self.codec = FaeTask(components, stage, seed) if stage.codec_weight else None
        if self.codec is not None:
            self.trained.update(dict(self.codec.trained.items()))

    def initialise(self) -> None:
        whiten_text_states(self.components, self.whitening_prompts())

    def whitening_prompts(self) -> list[list[int]]:
        """Token ids of the first `whitening_captions` captions of the mixture, or of the drawn world without one."""
        components, corpus, count = self.components, self.stage.corpus, self.stage.whitening_captions
        if not corpus.mixture:
            return world_captions(components, self.seed, count)
        assert components.tokenizer is not None
        spelling = Spelling(components.tokenizer, components.layout, components.cfg.fae.image_size)
        config = BatchConfig(rows=corpus.rows, width=corpus.width, caption_drop=0.0)
        rows = list[list[int]]()
        for images, batch in Batches(read_mixture(corpus.mixture), spelling, config):  # without end
            rows += self.from_documents(images, batch)[1]
            if len(rows) >= count:
                break
        return rows[:count]

    def counts(self, data: tuple[Tensor, list[list[int]]]) -> dict[str, int]:
        return {"pictures": len(data[0])}

    def from_documents(self, images: Tensor, batch: Batch) -> tuple[Tensor, list[list[int]]]:
        """Every drawn picture with the words in front of it. Raises DataError where that is more than words."""
        if not len(images) or not bool(lone_drawings(batch).all()):
            raise DataError("stage t2i takes words with one drawn picture; leave other sources to stage joint.")
        return images, _words_before(batch, range(len(images)))

    def loss(
        self, data: tuple[Tensor, list[list[int]]], generator: torch.Generator, share: LossWeights = WHOLE
    ) -> LossAndMetrics:
        images, rows = data
        latents, loss, extra = self._encoded(images.to(self.components.device), generator)
        nats = latents.new_zeros(())
        picture = self.components.cfg.flow.deep.num_latents
        lengths = [len(r) for r in rows]
        # sharded layers are gathered by all processes at once, so all must read as many groups
        groups = length_groups(lengths, picture) if self.stage.shard.mode == "none" else [list(range(len(rows)))]
        for group in groups:
            context = drawing_context(self.components, [rows[i] for i in group])
            terms = ngp_loss(self.components.flow, latents[group], context, generator)
            part = len(group) / len(rows)
            loss, nats = loss + part * terms[0], nats + part * terms[1]
        return share.of("pictures", loss), {"nats_per_dim": nats, **extra}

    def _encoded(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents (B, N, D), and what the FAE itself pays for them where it trains."""
        if self.codec is None:
            with torch.no_grad():
                latents = self.components.codec.encode(images).float()
            return latents, latents.new_zeros(()), {}
        loss, extra, latents = self.codec.terms(images, generator)
        return latents, self.stage.codec_weight * loss, extra


def _words_before(batch: Batch, pictures: Sequence[int]) -> list[list[int]]:
    """Token ids of the documents of some pictures, up to the slots that begin them."""
    rows, places = [], list(zip(batch.pictures.row.tolist(), batch.pictures.begin.tolist(), strict=True))
    for row, begin in (places[i] for i in pictures):
        own = batch.document[row, : begin + 1] == batch.document[row, begin]
        rows.append(batch.ids[row, : begin + 1][own].tolist())
    return rows


class AdapterTask(_Packed):
    """Paper stage 2: answers about pictures that the language model sees through the adapter; nothing else trains."""

    def __init__(self, components: Components, stage: StageConfig, seed: int) -> None:
        self.components, self.stage = components, stage
        self.make_batch: Callable[[range], Any] = Documents.of(components, partial(understanding_dialogue, seed))
        self.trained = nn.ModuleDict({"adapter": components.joints.adapter})
        seen, latents = components.cfg.vlm.image_grid, components.cfg.flow.deep.grid
        if stage.distill and seen != latents:
            raise ConfigError(f"distill is {stage.distill}, but the tower sees {seen}, latents are {latents}; use 0.")
        self.seed = seed

    def initialise(self) -> None:
        match_tower_scale(self.components, self.seed)

    def counts(self, data: tuple[Tensor, Batch]) -> dict[str, int]:
        return {"text": count_replies(data[1].labels), "distance": len(data[0])}

    def loss(
        self, data: tuple[Tensor, Batch], generator: torch.Generator, share: LossWeights = WHOLE
    ) -> LossAndMetrics:
        images, batch = data[0].to(self.components.device), data[1].to(self.components.device)
        pretzel = self.components.pretzel
        level = _source_levels(self.components, len(images), generator)
        with torch.no_grad():
            latents = self.components.codec.encode(images).float()
            u, _ = self.components.flow.shallow(add_noise(latents, level, generator), level)
        adapted = pretzel.adapted(u, level)
        loss = share.of("text", _reading_loss(self.components, adapted, batch))
        if not self.stage.distill:
            return loss, {}
        with torch.no_grad():
            seen = self.components.vlm.see(images)
        far = (adapted - seen).square().mean() / seen.square().mean() if len(images) else adapted.sum()
        far = share.of("distance", far)  # over shares a mean of ratios, by pictures, not the ratio of means
        return loss + self.stage.distill * far, {"distance": far}


class JointTask(_Packed):
    """Paper stage 3: everything at once, with the skips open; the language model and the FAE stay frozen."""

    def __init__(self, components: Components, stage: StageConfig, seed: int) -> None:
        self.components, self.stage, self.pretzel = components, stage, components.pretzel
        # layers that all processes gather at once, or that run again in the backward pass, run once for each batch
        is_sharded = stage.shard.mode != "none" and stage.shard.frozen == "sharded"
        self.pretzel.two_pass_prefix = not is_sharded and stage.checkpoint_activations != "all"
        self.make_batch: Callable[[range], Any] = Documents.of(components, partial(joint_dialogue, stage, seed))
        self.before = FrozenReferenceFlow(components) if stage.kl_to_t2i else None
        self.trained = components.joined_above if stage.kl_to_t2i else components.joined

    def counts(self, data: tuple[Tensor, Batch]) -> dict[str, int]:
        return {"text": count_replies(data[1].labels), "flow": int(data[1].pictures.is_target.sum())}

    def loss(
        self, data: tuple[Tensor, Batch], generator: torch.Generator, share: LossWeights = WHOLE
    ) -> LossAndMetrics:
        images, batch = data[0].to(self.components.device), data[1].to(self.components.device)
        noise = self.components.cfg.flow.noise
        assert noise is not None
        with torch.no_grad():
            latents = self.components.codec.encode(images).float()
        drawn = noise.sample_levels(len(images), generator).to(latents.device)
        level = torch.where(batch.pictures.is_target, drawn, _source_levels(self.components, len(images), generator))
        blind = self._blind(batch, generator)
        terms = joint_loss(self.pretzel, batch, (add_noise(latents, level, generator), level), noise, blind)
        told = {"flow": share.of("flow", terms.flow), "text": share.of("text", terms.text)}
        loss = told["flow"] + self.stage.text_weight * told["text"]
        if blind is not None:
            told["blind"] = share.of("flow", terms.blind)
            loss = loss + told["blind"]
        if self.before is not None:
            told["kept"] = share.of("flow", self.before.distance(terms.out, batch, level))
            loss = loss + self.stage.kl_to_t2i * told["kept"]
        return loss, told

    def _blind(self, batch: Batch, generator: torch.Generator) -> Tensor | None:
        """Which edits are predicted without sight of their own latents, (P,) bool; None where none are asked for."""
        if not self.stage.hidden_latents_share:
            return None
        drawn = torch.rand(len(batch.pictures.is_target), generator=generator).to(batch.pictures.is_target.device)
        return (drawn < self.stage.hidden_latents_share) & last_edits(batch)


class FrozenReferenceFlow:
    """The deep flow as stage t2i left it, which stage joint is kept near where it draws from words alone.

    Distances are of Gaussians of the same intermediate latents, so the shallow blocks stay as they are:
    `Components.joined_above` trains (docs/choices.md#what-stage-3-keeps).
    """

    def __init__(self, components: Components) -> None:
        self.components, self.is_late = components, "joint" in components.finished_stages
        self.deep = copy.deepcopy(components.flow.deep).requires_grad_(False)

    def distance(self, out: Output, batch: Batch, level: Tensor) -> Tensor:
        """Weighted KL per dim, summed over pictures alone in their documents, over all drawings of the batch."""
        if self.is_late:
            raise ConfigError(
                "kl_to_t2i > 0 compares with the flow after stage t2i, but this model has finished stage joint. "
                "Start joint again from a copy of the t2i model folder, or set --kl-to-t2i 0."
            )
        noise = self.components.cfg.flow.noise
        assert noise is not None
        total, alone = out.u.new_zeros(()), lone_drawings(batch).nonzero()[:, 0]
        rows = _words_before(batch, alone.tolist())
        for group in length_groups([len(row) for row in rows], out.u.shape[1]):
            index = alone[group]
            was = self._affine([rows[i] for i in group], out.u[index].detach(), level[index])
            far = was.kl(Affine(out.affine.mu[index], out.affine.log_scale[index])).mean((1, 2))
            total = total + (noise.loss_weight(level[index]) * far).sum()
        return total / max(1, int(batch.pictures.is_target.sum()))

    @torch.no_grad()
    def _affine(self, rows: list[list[int]], u: Tensor, level: Tensor) -> Affine:
        deep = self.deep.to(u.device)
        run = deep.begin(len(u), drawing_context(self.components, rows), level)
        return deep.predict(F.pad(u, (0, 0, 0, 1)), (0, u.shape[1]), run)


def _reading_loss(components: Components, seen: Tensor, batch: Batch) -> Tensor:
    """Next-token loss of the language model alone, pictures read as `seen` (P, N, E)."""
    embeds = with_pictures(components.vlm.embed(batch.ids), seen, batch)
    h = components.vlm.states(embeds, batch.mrope, attend=batch.attend)
    return ntp_loss(components.vlm.logits, (h[batch.labels != IGNORE],), batch.labels)


def _source_levels(components: Components, count: int, generator: torch.Generator) -> Tensor:
    """Noise levels (count,) of pictures that are read: often clean as uploads are, often at the level of drawing."""
    noise = components.cfg.flow.noise
    assert noise is not None
    kind, uniform = torch.rand(2, count, generator=generator)
    level = noise.noise_min + (noise.noise_max - noise.noise_min) * uniform
    level = torch.where(kind < 0.4, torch.full_like(level, noise.noise_min), level)
    return torch.where(kind > 0.7, torch.full_like(level, noise.noise_max), level).to(components.device)


TASKS: dict[str, Callable[[Components, StageConfig, int], Task]] = {
    "features": FeaturesTask,
    "fae": FaeTask,
    "vlm": VlmTask,
    "t2i": T2iTask,
    "adapter": AdapterTask,
    "joint": JointTask,
}
