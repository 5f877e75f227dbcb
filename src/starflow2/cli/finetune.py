"""`starflow2 finetune`: teach a model captioned images, through adapters on its flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from starflow2.cli.options import Device, Model, check_seed, refuse, say, training_bar
from starflow2.cli.parsing import Option, Positional
from starflow2.core.files import check_writable

__all__ = ["Finetune"]


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Teach a model your own images and the words of their captions.

    FOLDER holds image files, each with its caption in a .txt file of the same name. Small adapters on the flow learn
    them, while part of every batch is what the model was trained on, so that it forgets little. The output is a
    complete model folder; it also contains the adapter alone, adapter.safetensors.
    """

    verb: ClassVar[str] = "finetune"

    folder: Positional[Annotated[Path, Option("image files, a .txt caption beside each", metavar="FOLDER")]]
    output: Annotated[Path, Option("where the new model goes", metavar="FOLDER", short="-o")] = (
        Path("out") / "finetuned"
    )
    steps: Annotated[int, Option("optimiser steps")] = 1000
    batch: Annotated[int, Option("images per step")] = 32
    lr: Annotated[float, Option("learning rate")] = 1e-3
    replay: Annotated[float, Option("share of every batch that comes from what the model was trained on")] = 0.5
    mixture: Annotated[
        Path | None, Option("mixture file that replay comes from", metavar="FILE", default="the drawn world")
    ] = None
    rank: Annotated[int, Option("rank of the adapters; a higher one learns more and forgets more")] = 16
    seed: Annotated[int, Option("seed of data order and noise")] = 0
    model: Model = "nano"
    device: Device = "auto"

    def run(self, unknown: Sequence[str]) -> int:
        refuse(unknown, type(self))
        check_seed(self.seed)
        check_writable(self.output / "config.json")
        from starflow2.models.config_file import read_config
        from starflow2.models.hub import find_model, pick_device
        from starflow2.models.lora import LoraConfig
        from starflow2.training.finetune import FinetuneConfig, finetune, read_album

        config = FinetuneConfig(
            steps=self.steps,
            batch=self.batch,
            lr=self.lr,
            replay=self.replay,
            mixture="" if self.mixture is None else str(self.mixture),
            lora=LoraConfig(rank=self.rank),
            seed=self.seed,
        )
        folder = find_model(self.model)
        album = read_album(self.folder, read_config(folder).model.fae.image_size)
        device = pick_device(self.device).type
        with training_bar(config.stage()) as report:
            say(finetune(album, folder, self.output, config, device=device, report=report))
        return 0
