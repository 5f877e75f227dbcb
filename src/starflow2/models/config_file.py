"""config.json of a model folder: read, checked and brought to the current format, without loading any network.

Each format differs from the one before it by one migration at the end of this file. Writing it is part of saving a
model (`checkpoint`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starflow2.core.json_reader import JsonObject
from starflow2.core.serialize import from_dict, read_json, to_dict
from starflow2.core.text import shown
from starflow2.errors import CheckpointError, ConfigError
from starflow2.models.config import CodecConfig, ExtractorConfig, JointsConfig, ModelConfig

__all__ = ["FORMAT", "KEYS", "MODEL_TYPE", "FolderConfig", "is_model_config", "read_config"]

FORMAT = 9
MODEL_TYPE = "starflow2"  # by which transformers and the Hub recognise a folder (`starflow2.hf`)
KEYS = {"model_type", "format", "stages", "model", "fingerprints", "digests"}  # of a config.json
Json = JsonObject  # an object as config.json holds it, of any format


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """Contents of a model folder's config.json, in the current format."""

    model: ModelConfig
    finished_stages: tuple[str, ...]
    fingerprints: Mapping[str, str]  # of referenced backbones, by name
    digests: Mapping[str, str]  # of the files with weights, by name; {} in folders from before there were any


def read_config(folder: Path) -> FolderConfig:
    """Read config.json of a model folder of any format.

    Raises CheckpointError if it is missing or malformed, and ConfigError for sizes that do not make a model.
    """
    path = folder / "config.json"
    config = _migrated(path)
    model = from_dict(ModelConfig, config["model"])
    _check_class(path, "language model", model.vlm.stream)
    if isinstance(model.fae, CodecConfig):
        _check_class(path, "codec", model.fae.codec)
    if isinstance(model.features, ExtractorConfig):
        _check_class(path, "feature extractor", model.features.extractor)
    return FolderConfig(
        model=model,
        finished_stages=tuple(config["stages"]),
        fingerprints=_texts(path, config, "fingerprints"),
        digests=_texts(path, config, "digests"),
    )


def _check_class(path: Path, what: str, name: str) -> None:
    """Raise CheckpointError for a class of a module that is not ours and that nobody has imported.

    A folder that comes from elsewhere must not decide which code runs.
    """
    module = name.partition(":")[0]
    if module.partition(".")[0] != "starflow2" and module not in sys.modules:
        raise CheckpointError(
            f"{path} names the {what} {name!a}, which is not part of starflow2; if you trust the folder and "
            "have that module, import it first."
        )


def is_model_config(path: Path) -> bool:
    """True for a config.json of a starflow2 model, of whatever format; False for that of another library."""
    try:
        _check_kind(path, read_json(path))
    except (CheckpointError, ConfigError):
        return False
    return True


def _migrated(path: Path) -> Json:
    """JSON of a config.json, checked and brought to the current format."""
    try:
        config = _check_kind(path, read_json(path))
    except ConfigError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise CheckpointError(
                f"{path.parent} has no config.json; expected a starflow2 model folder.{_beside(path)}"
            ) from error
        raise CheckpointError(str(error)) from error
    if type(config["format"]) is not int or not 1 <= config["format"] <= FORMAT:
        raise CheckpointError(f"{path} has format {config['format']!a}; expected at most {FORMAT}: update starflow2.")
    unknown = sorted(set(config) - KEYS)
    if unknown:
        raise CheckpointError(f"{path} has the key {unknown[0]!a}; expected {', '.join(sorted(KEYS))}.")
    try:
        for migrate in _MIGRATIONS[config["format"] - 1 :]:
            config = migrate(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit the format that it names: {error!r}.") from error
    return config


def _check_kind(path: Path, config: Any) -> Json:
    """The JSON of a config.json if it is one of ours. Raises CheckpointError."""
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict) or {"format", "stages"} - set(config):
        raise CheckpointError(f"{path} is not of a starflow2 model (it lacks format, model or stages).")
    if config.get("model_type", MODEL_TYPE) != MODEL_TYPE:
        raise CheckpointError(f"{path} has model_type {shown(config['model_type'])}; expected {MODEL_TYPE!r}.")
    if not isinstance(config["stages"], list) or not all(type(s) is str for s in config["stages"]):
        raise CheckpointError(f"{path} is not of a starflow2 model (stages is not a list of names).")
    return config


def _texts(path: Path, config: Json, name: str) -> Mapping[str, str]:
    """Texts by name under a key of a config.json, {} without it. Raises CheckpointError for anything else."""
    texts = config.get(name, {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise CheckpointError(f"{path}: {name} is {str(texts)[:60]!a}; expected texts by name.")
    return texts


def _beside(path: Path) -> str:
    """A hint at the copies that earlier versions left beside a folder when they were killed while saving it."""
    folder = path.parent.resolve()
    copies = [folder.parent / f".{folder.name}.{end}" for end in ("new", "old")]
    found = [copy for copy in copies if (copy / "config.json").is_file()]
    return f" A killed save left a whole model in {found[0]}: rename it to {folder.name}." if found else ""


def _as_format_2(config: Json) -> Json:
    """Format 1 had no joints. Add those of the only recipe of that time."""
    joints = to_dict(JointsConfig(adapter_width=192, adapter_stencil=True)) | {"reference": True}
    del joints["words"]
    new = {"joints": joints, "max_positions": 4096}
    return {**config, "format": 2, "model": {**config["model"], **new}}


def _as_format_3(config: Json) -> Json:
    """Format 2 had no `words` in joints: the flow read states without token embeddings."""
    model = config["model"]
    return {**config, "format": 3, "model": {**model, "joints": {**model["joints"], "words": False}}}


def _as_format_4(config: Json) -> Json:
    """Format 3 had no pretrained components. All weights are in the folder, and images are not resized."""
    model = config["model"]
    flow = {"latent_penalty": 0.0, **model["flow"], "deep": {"noise_waves": 0, **model["flow"]["deep"]}}
    flow["shallow"] = [{"noise_waves": 0, **block} for block in flow["shallow"]]
    features = {"table_size": 0, "pixels": None, **model["features"]}
    vlm = {"vision_window": 0, "vision_whole": [], "pixels": None, **model["vlm"]}
    new = {"features_from": None, "vlm_from": None, "flow": flow, "features": features, "vlm": vlm}
    return {**config, "format": 4, "model": {**model, **new}}


def _as_format_5(config: Json) -> Json:
    """Format 4 stored `reference` as a bool. Convert it to a window size, 1 or 0."""
    model = config["model"]
    joints = {**model["joints"], "reference": int(model["joints"]["reference"])}
    return {**config, "format": 5, "model": {**model, "joints": joints}}


def _as_format_6(config: Json) -> Json:
    """Format 5 had no guidance schedule and no separate guidance for edits. Use a constant one for all images."""
    new = {"guidance_schedule": "constant", "edit_guidance": None}
    return {**config, "format": 6, "model": {**config["model"], **new}}


def _as_format_7(config: Json) -> Json:
    """Format 6 knew one family of language models, and heads as wide as they divide its width."""
    model = config["model"]
    new = {"vision_deepstack": [], "head_dim": 0, "stream": "starflow2.models.qwen:QwenStream"}
    return {**config, "format": 7, "model": {**model, "vlm": {**new, **model["vlm"]}}}


def _as_format_8(config: Json) -> Json:
    """Format 7 had no questions by which a model checks its own images. It asks none."""
    return {**config, "format": 8, "model": {**config["model"], "self_check": None}}


def _as_format_9(config: Json) -> Json:
    """Format 8 did not say which images are unlike those of training. Nothing was measured."""
    return {**config, "format": 9, "model": {**config["model"], "far_nats": None}}


_MIGRATIONS = (
    _as_format_2,
    _as_format_3,
    _as_format_4,
    _as_format_5,
    _as_format_6,
    _as_format_7,
    _as_format_8,
    _as_format_9,
)
