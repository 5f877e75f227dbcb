"""The tasks of the stages: what each trains, its default data, its loss. No loops and no files here.

Every random choice is a pure function of (seed, stage, index or step).
Letters: B documents, T positions, N latents, P images.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starflow2.core.imports import find_object
from starflow2.errors import ConfigError, DataError
from starflow2.flow.affine import Affine
from starflow2.flow.noise import add_noise
from starflow2.models.components import Components
from starflow2.models.context import drawing_context
from starflow2.models.joint_stream import Output, Skip
from starflow2.models.pretzel import ALL_SKIPS
from starflow2.models.sequence import IGNORE, Batch, length_groups, with_pictures
from starflow2.models.token_loss import token_nats
from starflow2.training.codec_tasks import FaeTask, FeaturesTask
from starflow2.training.config import StageConfig
from starflow2.training.datasets import Captions, Documents, corpus_batches, joint_dialogue, talk_dialogue
from starflow2.training.initialise import match_tower_scale, whiten_text_states, world_captions
from starflow2.training.losses import (
    JointTerms,
    Watch,
    count_texts,
    joint_loss,
    last_edits,
    lone_drawings,
    mean_nats,
    ngp_loss,
)
from starflow2.training.task import WHOLE_BATCH, Dataset, LossAndMetrics, LossWeights, Task

__all__ = [
    "TASKS",
    "TOWER_IMAGES",
    "AdapterTask",
    "CaptionBatch",
    "DocumentBatch",
    "FrozenReferenceFlow",
    "JointTask",
    "MakeTask",
    "Prompts",
    "T2iTask",
    "VlmTask",
    "task_maker",
]

TOWER_IMAGES = 16  # images on which the scale of the vision tower's embeddings is measured
CaptionBatch = tuple[Tensor, list[list[int]]]  # images (B, 3, s, s), and their prompts, of a mixture as `Prompts`
DocumentBatch = tuple[Tensor, Batch]  # images (P, 3, s, s) in order, and the packed documents that they stand in


class Prompts(list[list[int]]):
    """Prompts as token ids, with the number of the source of each in its mixture."""

    def __init__(self, rows: Iterable[list[int]], sources: tuple[int, ...]) -> None:
        super().__init__(rows)
        self.sources = sources


class _DocumentTask(Task):
    """A task on packed documents."""

    def from_documents(self, images: Tensor, batch: Batch) -> DocumentBatch:
        return images, batch

    def add_by_source(
        self, term: str, batch: Batch, documents: Tensor, values: Tensor, counts: Tensor | None = None
    ) -> None:
        """Add values (n,) of a term of the loss, those that count, to the sources of their documents (n,)."""
        if batch.sources:
            sources = torch.tensor(batch.sources, device=documents.device)
            self.by_source.add(term, sources[documents], values, counts)

    def reply_loss(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Next-token loss of the language model alone, which reads images as `embeddings` (P, N, E)."""
        vlm, has_label = self.components.vlm, batch.labels != IGNORE
        embeds = with_pictures(vlm.embed(batch.ids), embeddings, batch)
        h = vlm.states(embeds, batch.mrope, attend=batch.attend)
        nats = token_nats(vlm.logits, (h[has_label],), batch.labels[has_label])
        self.add_by_source("text", batch, batch.document[has_label], nats)
        return mean_nats(nats, batch.labels, self.stage.text_mean)

    def _to_device(self, data: DocumentBatch) -> DocumentBatch:
        (images, batch), device = data, self.components.device
        if device.type == "cuda" and getattr(self.components.vlm, "attends_by_document", False):
            batch = batch.by_document()  # worked out before it is moved, so that nothing waits for the device
        return images.to(device), batch.to(device)


class VlmTask(_DocumentTask):
    """Conversations about drawn images, which the model's own vision tower reads, and about words."""

    def default_dataset(self) -> Dataset:
        dialogue = partial(talk_dialogue, self.stage, self.seed)
        return Documents.of(self.components, dialogue, self.components.tower_layout)

    def default_trained(self) -> nn.ModuleDict:
        return nn.ModuleDict({"vlm": self.components.vlm})

    def counts(self, data: DocumentBatch) -> dict[str, int]:
        return {"text": count_texts(data[1].labels, self.stage.text_mean)}

    def loss(
        self, data: DocumentBatch, generator: torch.Generator, weights: LossWeights = WHOLE_BATCH
    ) -> LossAndMetrics:
        images, batch = self._to_device(data)
        loss = self.reply_loss(self.components.vlm.see(images), batch)
        return weights.apply("text", loss), {}


class T2iTask(Task):
    """Paper stage 1: the flow's exact NLL given the frozen VLM's states of the caption.

    With `codec_weight` the FAE trains, too: on its own losses, and through its latents on the flow's. Those stay
    standardised over the batch, so that no scale of them makes them likelier (docs/choices.md#end-to-end).
    """

    def __init__(
        self,
        components: Components,
        stage: StageConfig,
        seed: int,
        *,
        dataset: Dataset | None = None,
        trained: nn.ModuleDict | None = None,
    ) -> None:
        self.codec = FaeTask(components, stage, seed) if stage.codec_weight else None
        super().__init__(components, stage, seed, dataset=dataset, trained=trained)

    def default_dataset(self) -> Dataset:
        return Captions(self.components.tokenizer, self.seed, self.stage.caption_drop, self.stage.captions)

    def default_trained(self) -> nn.ModuleDict:
        codec = {} if self.codec is None else dict(self.codec.trained.items())
        return nn.ModuleDict({"flow": self.components.flow, **codec})

    def initialise(self) -> None:
        """Whiten the text states that a fresh flow reads (docs/choices.md#whitened-context)."""
        whiten_text_states(self.components, self.whitening_prompts())

    def whitening_prompts(self) -> list[list[int]]:
        """Token ids of the first `whitening_captions` captions of the mixture, or of the drawn world without one."""
        components, count = self.components, self.stage.whitening_captions
        if not self.stage.corpus.mixture:
            return world_captions(components, self.seed, count)
        batches = corpus_batches(components, replace(self.stage, caption_drop=0.0), lists_broken=False)
        rows = list[list[int]]()
        for images, batch in batches:  # an endless stream
            rows += self.from_documents(images, batch)[1]
            if len(rows) >= count:
                break
        return rows[:count]

    def counts(self, data: CaptionBatch) -> dict[str, int]:
        return {"images": len(data[0])}

    def from_documents(self, images: Tensor, batch: Batch) -> CaptionBatch:
        """Every drawn image with the words before it. Raises DataError for documents of another form."""
        if not len(images) or not bool(lone_drawings(batch).all()):
            raise DataError("stage t2i takes words followed by one drawn image; leave other sources to stage joint.")
        document = batch.document[batch.pictures.row, batch.pictures.begin].tolist()
        sources = tuple(batch.sources[i] for i in document) if batch.sources else ()
        return images, Prompts(_words_before(batch, range(len(images))), sources)

    def loss(
        self, data: CaptionBatch, generator: torch.Generator, weights: LossWeights = WHOLE_BATCH
    ) -> LossAndMetrics:
        images, rows = data
        latents, loss, metrics = self._encode(images.to(self.components.device), generator)
        nats = latents.new_zeros(())
        for group in self.caption_groups(rows):
            context = drawing_context(self.components, [rows[i] for i in group])
            terms = ngp_loss(self.components.flow, latents[group], context, generator, self._watch(rows, group))
            part = len(group) / len(rows)
            loss, nats = loss + part * terms[0], nats + part * terms[1]
        return weights.apply("images", loss), {"nats_per_dim": nats, **metrics}

    def _watch(self, rows: Sequence[Sequence[int]], group: Sequence[int]) -> Watch | None:
        """Adds the nats of a group of images to those of their sources, where they come from a mixture."""
        if not isinstance(rows, Prompts) or not rows.sources:
            return None
        return partial(self.by_source.add, "flow", torch.tensor([rows.sources[i] for i in group]))

    def caption_groups(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Which captions are read together: one or two groups of similar length, to save padding."""
        if self.stage.shard.mode != "none":  # all processes gather a layer at the same time, so equally often
            return [list(range(len(rows)))]
        return length_groups([len(row) for row in rows], self.components.cfg.flow.deep.num_latents)

    def _encode(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents (B, N, D), the weighted loss of an FAE that trains (0 for a frozen one), and its metrics."""
        if self.codec is None:
            with torch.no_grad():
                latents = self.components.codec.encode(images).float()
            return latents, latents.new_zeros(()), {}
        loss, metrics, latents = self.codec.terms(images, generator)
        return latents, self.stage.codec_weight * loss, metrics


def _words_before(batch: Batch, images: Sequence[int]) -> list[list[int]]:
    """Token ids of the documents of some images, up to and including the slots that begin these."""
    rows, slots = [], list(zip(batch.pictures.row.tolist(), batch.pictures.begin.tolist(), strict=True))
    for row, begin in (slots[i] for i in images):
        own = batch.document[row, : begin + 1] == batch.document[row, begin]
        rows.append(batch.ids[row, : begin + 1][own].tolist())
    return rows


class AdapterTask(_DocumentTask):
    """Paper stage 2: answers about images that the language model reads through the adapter; nothing else trains."""

    def __init__(
        self,
        components: Components,
        stage: StageConfig,
        seed: int,
        *,
        dataset: Dataset | None = None,
        trained: nn.ModuleDict | None = None,
    ) -> None:
        super().__init__(components, stage, seed, dataset=dataset, trained=trained)
        tower, latents = components.cfg.vlm.image_grid, components.cfg.flow.deep.grid
        if stage.distill and not components.vlm.has_tower:
            raise ConfigError(
                f"distill is {stage.distill}, but {components.cfg.vlm.stream} has no vision tower; set distill to 0."
            )
        if stage.distill and tower != latents:
            raise ConfigError(
                f"distill is {stage.distill}, but the vision tower gives {tower} embeddings of an image and the flow "
                f"{latents} latents; set distill to 0."
            )

    def default_dataset(self) -> Dataset:
        return Documents.of(self.components, partial(talk_dialogue, self.stage, self.seed))

    def default_trained(self) -> nn.ModuleDict:
        return nn.ModuleDict({"adapter": self.components.joints.adapter})

    def initialise(self) -> None:
        """Start a fresh adapter at the scale of the vision tower's embeddings."""
        match_tower_scale(self.components, self.first_images(TOWER_IMAGES))

    def counts(self, data: DocumentBatch) -> dict[str, int]:
        return {"text": count_texts(data[1].labels, self.stage.text_mean), "distance": len(data[0])}

    def loss(
        self, data: DocumentBatch, generator: torch.Generator, weights: LossWeights = WHOLE_BATCH
    ) -> LossAndMetrics:
        images, batch = self._to_device(data)
        level = _source_levels(self.components, len(images), generator)
        with torch.no_grad():
            latents = self.components.codec.encode(images).float()
            u, _ = self.components.flow.shallow(add_noise(latents, level, generator), level)
        adapted = self.components.pretzel.adapted(u, level)
        loss = weights.apply("text", self.reply_loss(adapted, batch))
        if not self.stage.distill:
            return loss, {}
        # over microbatches a mean of ratios, by images, rather than the ratio of means
        distance = weights.apply("distance", self._distance_to_tower(adapted, images))
        return loss + self.stage.distill * distance, {"distance": distance}

    def _distance_to_tower(self, adapted: Tensor, images: Tensor) -> Tensor:
        """Mean square of the difference to the vision tower's embeddings, relative to theirs; a scalar."""
        with torch.no_grad():
            tower = self.components.vlm.see(images)
        if not len(images):
            return adapted.sum()  # 0, with a gradient
        return (adapted - tower).square().mean() / tower.square().mean()


class JointTask(_DocumentTask):
    """Paper stage 3: all kinds of documents, with the skips open; the language model and the FAE stay frozen."""

    def __init__(
        self,
        components: Components,
        stage: StageConfig,
        seed: int,
        *,
        dataset: Dataset | None = None,
        trained: nn.ModuleDict | None = None,
        skips: Collection[Skip] = ALL_SKIPS,
    ) -> None:
        """skips: those between the streams that are open while it trains."""
        super().__init__(components, stage, seed, dataset=dataset, trained=trained)
        # layers that are gathered by all processes, or recomputed in the backward pass, run once for each batch
        is_sharded = stage.shard.mode != "none" and stage.shard.frozen == "sharded"
        stream = components.pretzel.with_skips(skips)
        self.pretzel = stream.in_one_pass() if is_sharded or stage.checkpoint_activations == "all" else stream
        self.reference = FrozenReferenceFlow(components) if stage.kl_to_t2i else None

    def default_dataset(self) -> Dataset:
        return Documents.of(self.components, partial(joint_dialogue, self.stage, self.seed))

    def default_trained(self) -> nn.ModuleDict:
        modules = self.components.joint_modules
        if self.stage.kl_to_t2i:  # the distance is between Gaussians of the same u, so the shallow blocks stay
            modules = modules | {"flow": nn.ModuleDict({"deep": self.components.flow.deep})}
        return nn.ModuleDict(modules)

    def counts(self, data: DocumentBatch) -> dict[str, int]:
        return {
            "text": count_texts(data[1].labels, self.stage.text_mean),
            "flow": int(data[1].pictures.is_target.sum()),
        }

    def loss(
        self, data: DocumentBatch, generator: torch.Generator, weights: LossWeights = WHOLE_BATCH
    ) -> LossAndMetrics:
        images, batch = self._to_device(data)
        noise = self.components.cfg.noise
        with torch.no_grad():
            latents = self.components.codec.encode(images).float()
        level = self.noise_levels(batch, generator)
        blind = self._blind_targets(batch, generator)
        noisy = add_noise(latents, level, generator)
        terms = joint_loss(self.pretzel, batch, (noisy, level), noise, blind, self.stage.text_mean)
        self._add_by_source(batch, terms, blind)
        metrics = {"flow": weights.apply("flow", terms.flow), "text": weights.apply("text", terms.text)}
        loss = metrics["flow"] + self.stage.text_weight * metrics["text"]
        if blind is not None:
            metrics["blind"] = weights.apply("flow", terms.blind)
            loss = loss + metrics["blind"]
        if self.reference is not None:
            metrics["kept"] = weights.apply("flow", self.reference.distance(terms.out, batch, level))
            loss = loss + self.stage.kl_to_t2i * metrics["kept"]
        return loss, metrics

    def _add_by_source(self, batch: Batch, terms: JointTerms, blind: Tensor | None) -> None:
        images = batch.pictures
        counts = images.is_target if blind is None else images.is_target & ~blind
        self.add_by_source("flow", batch, batch.document[images.row, images.begin], terms.image_nats, counts)
        self.add_by_source("text", batch, terms.documents, terms.token_nats)

    def noise_levels(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Noise levels (P,) of the images of a batch: as the flow trains for targets, else as images are read."""
        noise = self.components.cfg.noise
        targets = noise.sample_levels(len(batch.pictures), generator).to(self.components.device)
        sources = _source_levels(self.components, len(batch.pictures), generator)
        return torch.where(batch.pictures.is_target, targets, sources)

    def _blind_targets(self, batch: Batch, generator: torch.Generator) -> Tensor | None:
        """The edits that are predicted without sight of their own latents, (P,) bool; None if the stage has none."""
        if not self.stage.hidden_latents_share:
            return None
        chance = torch.rand(len(batch.pictures.is_target), generator=generator).to(batch.pictures.is_target.device)
        return (chance < self.stage.hidden_latents_share) & last_edits(batch)


class FrozenReferenceFlow:
    """A frozen copy of the deep flow that stage t2i left; stage joint stays near it on drawings from words alone.

    Distances are between Gaussians of the same intermediate latents, so the shallow blocks must not change:
    `JointTask.default_trained` leaves them out (docs/choices.md#what-stage-3-keeps).
    """

    def __init__(self, components: Components) -> None:
        self.components, self.is_late = components, "joint" in components.finished_stages
        self.deep = copy.deepcopy(components.flow.deep).requires_grad_(False)

    def distance(self, out: Output, batch: Batch, level: Tensor) -> Tensor:
        """Weighted KL per dim, summed over the only images of their documents, divided by all drawings of the batch."""
        if self.is_late:
            raise ConfigError(
                "kl_to_t2i > 0 compares with the flow after stage t2i, but this model has finished stage joint. "
                "Start joint again from a copy of the t2i model folder, or set --kl-to-t2i 0."
            )
        noise = self.components.cfg.noise
        total, alone = out.u.new_zeros(()), lone_drawings(batch).nonzero()[:, 0]
        rows = _words_before(batch, alone.tolist())
        for group in length_groups([len(row) for row in rows], out.u.shape[1]):
            index = alone[group]
            reference = self._affine([rows[i] for i in group], out.u[index].detach(), level[index])
            kl = reference.kl(Affine(out.affine.mu[index], out.affine.log_scale[index])).mean((1, 2))
            total = total + (noise.loss_weight(level[index]) * kl).sum()
        return total / max(1, int(batch.pictures.is_target.sum()))

    @torch.no_grad()
    def _affine(self, rows: list[list[int]], u: Tensor, level: Tensor) -> Affine:
        deep = self.deep.to(u.device)
        run = deep.begin(len(u), drawing_context(self.components, rows), level)
        return deep.predict(F.pad(u, (0, 0, 0, 1)), (0, u.shape[1]), run)


def _source_levels(components: Components, count: int, generator: torch.Generator) -> Tensor:
    """Noise levels (count,) of images that are read: 40 % as clean as uploads, 30 % as noisy as samples, or between."""
    noise = components.cfg.noise
    kind, uniform = torch.rand(2, count, generator=generator)
    level = noise.noise_min + (noise.noise_max - noise.noise_min) * uniform
    level = torch.where(kind < 0.4, torch.full_like(level, noise.noise_min), level)
    return torch.where(kind > 0.7, torch.full_like(level, noise.noise_max), level).to(components.device)


class MakeTask(Protocol):
    """A task class, or anything that makes a task as one does."""

    def __call__(
        self,
        components: Components,
        stage: StageConfig,
        seed: int,
        *,
        dataset: Dataset | None = None,
        trained: nn.ModuleDict | None = None,
    ) -> Task: ...


TASKS: dict[str, MakeTask] = {
    "features": FeaturesTask,
    "fae": FaeTask,
    "vlm": VlmTask,
    "t2i": T2iTask,
    "adapter": AdapterTask,
    "joint": JointTask,
    "end": JointTask,
    "final": JointTask,
}


def task_maker(stage: StageConfig) -> MakeTask:
    """The class of a stage's task: its own, or the one that the stage names.

    Raises ConfigError for a name that cannot be imported, or that is no subclass of Task.
    """
    if not stage.task:
        return TASKS[stage.name]
    found = find_object(stage.task, f"the task of stage {stage.name}")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(
            f"task is {stage.task!r}, a {type(found).__name__}; expected a subclass of training.task.Task."
        )
    return found
