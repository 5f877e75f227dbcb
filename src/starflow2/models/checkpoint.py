"""Model folders: config.json, our weights, and the backbones in transformers' own layout beside them.

    config.json          format number, sizes, finished stages, digests of the files with weights
    model.safetensors    FAE if there is one, flow and joints
    vlm/  features/      config.json + model.safetensors as transformers writes them
    tokenizer.json       byte-level BPE;  lexicon.txt: the words used in training

Backbones keep their upstream file layout because in-memory names change between releases. Pretrained backbones are
referenced, not copied, and have no folder here: config.json holds source, revision and fingerprint (`pretrained`).
A link vlm or features, to a folder with the same fingerprint, replaces a source that moved. A folder that is being
replaced holds one whole model at any instant (`core.folders`). Weights are finite, in the file as in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from starflow2.core.files import file_digest, named_place
from starflow2.core.folders import is_ours, replacing_content, stamp, whole
from starflow2.core.serialize import to_dict
from starflow2.core.text import read_text
from starflow2.core.torch_defaults import torch_defaults
from starflow2.errors import CheckpointError, ConfigError, DataError, OutputError, StarFlowError, nearest
from starflow2.flow import AffineBlock, Flow
from starflow2.models.components import Components, without_values
from starflow2.models.config import CodecConfig, ExtractorConfig, FaeConfig, ModelConfig
from starflow2.models.config_file import FORMAT, MODEL_TYPE, is_model_config, read_config
from starflow2.models.fae import Fae
from starflow2.models.huggingface import Backbone, stream_class
from starflow2.models.own_codec import build_codec, build_extractor
from starflow2.models.pretrained import Pretrained, fingerprint, inventory, locate
from starflow2.models.pretzel import Joints
from starflow2.models.tensor_file import load_tensors
from starflow2.models.tokenizer import ChatTokenizer, QwenTokenizer, load_tokenizer
from starflow2.nn import raw_bytes

__all__ = [
    "load_components",
    "load_words",
    "save_components",
    "save_words",
    "start_components",
    "weights_digest",
]

OWN = ("fae.", "flow.", "joints.", "own_codec.")  # what model.safetensors holds, beside an extractor of a user's class
BACKBONES = ("vlm", "features")  # what stands beside it, or is referred to
FEW_LAYERS = 256  # as many are built in a moment, and compared with the file by name
READINGS = 20  # of a folder that is being saved to, before the last result counts
FLOATS = ("F64", "F32", "F16", "BF16")  # number formats of weights, as safetensors names them


def save_components(components: Components, folder: str | Path) -> Path:
    """Write a model folder; an older one of this name is replaced only after everything is written.

    Files that are not ours, such as a model card, are kept. Raises CheckpointError if the folder cannot
    be written, holds something that is not a model or is being written by somebody else, and for weights that are not
    finite; ConfigError for components without a tokenizer.
    """
    _ = components.tokenizer  # raises now, before anything is written
    folder = named_place(folder, "folder", OutputError).resolve()
    _check_finite(components, f"cannot save to {folder}")
    try:
        _check_replaceable(folder)
        with replacing_content(folder, CheckpointError, "saving a model") as new:
            _write_folder(components, new)
    except (OSError, SafetensorError, shutil.Error) as error:  # safetensors has its own for a full disk
        left = "Its earlier content is untouched." if whole(folder) == folder else "The new model is there, whole."
        raise CheckpointError(f"cannot save to {folder}: {str(error).rstrip('.')}. {left}") from error
    return folder


def _check_replaceable(folder: Path) -> None:
    """Raise CheckpointError for a folder that holds anything but a model of ours."""
    is_foreign = folder.is_dir() and any(not is_ours(p.name) for p in folder.iterdir())
    if (is_foreign and not is_model_config(whole(folder) / "config.json")) or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"cannot save to {folder}: it exists and is not a model folder; give another name.")


def _check_finite(components: Components, doing: str) -> None:
    """Raise CheckpointError if a weight that the folder holds is NaN or infinite."""
    own = {k: v for k, v in components.state_dict().items() if k.split(".")[0] not in components.cfg.references}
    _check_values(own, doing)


def _check_values(weights: Mapping[str, Tensor], doing: str) -> None:
    """Raise CheckpointError if a weight is NaN or infinite."""
    for name, value in weights.items():
        if not value.is_floating_point() or not value.numel():
            continue
        low, high = value.aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise CheckpointError(f"{doing}: {name} holds NaN or infinity; expected finite weights.")


def _write_folder(components: Components, folder: Path) -> None:
    for name in _backbones(components.cfg):
        if name not in components.cfg.references:
            getattr(components, name).save(folder / name)
    own = {k: v for k, v in components.state_dict().items() if k.startswith(_own(components.cfg))}
    save_file({k: v.contiguous().cpu() for k, v in own.items()}, folder / "model.safetensors")
    _write_words(components, folder)


def _write_words(components: Components, folder: Path) -> None:
    """Write all of a model folder but the weights, which are there."""
    components.tokenizer.save(folder / "tokenizer.json")
    (folder / "lexicon.txt").write_text("\n".join(sorted(components.vocabulary)) + "\n", encoding="utf-8")
    _write_config(components, folder)


def weights_digest(components: Components) -> str:
    """Digest of FAE, flow and joints, with the adapters of a fine-tune, in 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(components.state_dict().items()):
        if name.startswith(_own(components.cfg)):
            digest.update(name.encode() + raw_bytes(value))
    return digest.hexdigest()


def _write_config(components: Components, folder: Path) -> None:
    """Write config.json of a model folder whose weights are there: format number and what `FolderConfig` holds."""
    config: dict[str, object] = {"model_type": MODEL_TYPE, "format": FORMAT}
    config |= {"stages": list(components.finished_stages), "model": to_dict(components.cfg)}
    config |= {"fingerprints": components.fingerprints} if components.fingerprints else {}
    weights = sorted(folder.rglob("*.safetensors"))
    config["digests"] = {path.relative_to(folder).as_posix(): file_digest(path) for path in weights}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


@torch_defaults()
def load_components(
    folder: str | Path, device: str | torch.device = "cpu", waiting: tuple[str, ...] = ()
) -> Components:
    """Load the components of a model folder. Raises CheckpointError for files that are missing, foreign or truncated.

    waiting: components whose transformer layers stay in the memory-mapped file until they are used or moved, so that a
    sharded run never holds all of them; see `FullyShardedDistributed.prepare`. A folder that somebody saves to
    meanwhile is read again.
    """
    folder = Path(folder)
    return _settled(folder, lambda: _load_once(folder, device, waiting))


def _settled(folder: Path, read: Callable[[], Components]) -> Components:
    """Call `read`, again where somebody saved to `folder` meanwhile. Raises CheckpointError, also for an OSError."""
    for tries_left in reversed(range(READINGS)):
        before = stamp(folder)
        try:
            components = read()
        except (CheckpointError, ConfigError, OSError) as error:
            if tries_left and stamp(folder) != before:
                continue
            if isinstance(error, OSError):
                raise CheckpointError(f"cannot load {folder}: {_first_line(error)}.") from error
            raise
        if not tries_left or stamp(folder) == before:
            return components
    raise AssertionError("the last try returns or raises")


def _load_once(folder: Path, device: str | torch.device, waiting: tuple[str, ...]) -> Components:
    source = whole(folder)
    config = read_config(source)
    cfg = config.model
    own = [f"{name}/model.safetensors" for name in _backbones(cfg) if name not in cfg.references]
    _check_files(source, ["model.safetensors", *own, "tokenizer.json"])
    tokenizer = _tokenizer(source / "tokenizer.json", cfg)
    tensors = load_tensors(source / "model.safetensors")
    _check_depths(source, cfg, tensors)
    components = _without_weights(cfg, tokenizer, source)
    if isinstance(cfg.fae, CodecConfig):
        components.own_codec = build_codec(cfg.fae)  # of a user's class, which may need real memory
    if isinstance(cfg.features, ExtractorConfig):
        components.add_module("features", build_extractor(cfg.features))
    if not any(name.startswith("joints.") for name in tensors) and "adapter" not in config.finished_stages:
        tensors |= _fresh_joints(cfg)
    _fill(components, tensors, source / "model.safetensors", waiting)
    for name in _backbones(cfg):
        if name in cfg.references:
            place = folder / name if (folder / name).is_dir() else None
            known = config.fingerprints.get(name, "")
            _refer(components, name, place, known, "cpu" if name in waiting else device, waiting)
        else:
            _load_backbone(getattr(components, name), source / name)
    _check_finite(components, f"cannot load {folder}")
    _check_digests(source, ["model.safetensors", *own], config.digests)
    for block in components.flow.modules():
        if isinstance(block, AffineBlock):
            block.rebuild_buffers()
    components.vocabulary = _lexicon(source / "lexicon.txt")
    components.finished_stages = config.finished_stages
    for name, module in components.named_modules():
        if not _waits(name, waiting):
            module._apply(lambda value: value.to(device), recurse=False)
    return components.eval()


def _without_weights(cfg: ModelConfig, tokenizer: ChatTokenizer, folder: Path) -> Components:
    """Components that hold no weights yet. Raises CheckpointError for sizes that torch or transformers refuse."""
    try:
        with without_values():
            return Components(cfg, tokenizer)
    except StarFlowError:
        raise
    except (ValueError, RuntimeError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder}/config.json: its sizes make no model: {_first_line(error)}") from error


def _check_files(folder: Path, names: list[str]) -> None:
    """Raise CheckpointError for the first of these files that is not there."""
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; expected a complete starflow2 model: copy it again.")


def _check_depths(folder: Path, cfg: ModelConfig, tensors: Collection[str]) -> None:
    """Raise CheckpointError if a config asks for more layers than there are tensors: building them might never end."""
    parts = {"model.safetensors": (to_dict(cfg.fae) | {"flow": to_dict(cfg.flow)}, len(tensors))}
    for name in set(_backbones(cfg)) - set(cfg.references):
        parts[name] = to_dict(getattr(cfg, name)), len(inventory(folder / name))
    for name, (config, count) in parts.items():
        if _layers(config) > max(count, FEW_LAYERS):
            raise CheckpointError(
                f"{folder / name} has {count} tensors, too few for the {_layers(config)} layers in config.json."
            )


def _layers(config: object) -> int:
    """All layers in a config: the sum of its depths."""
    if isinstance(config, list):
        return sum(map(_layers, config))
    if not isinstance(config, dict):
        return 0
    return sum(value if key.endswith("depth") else _layers(value) for key, value in config.items())


def _check_digests(folder: Path, names: list[str], digests: Mapping[str, str]) -> None:
    """Raise CheckpointError for a file whose bytes are not those that were written; older folders know no digests."""
    for name in names if digests else ():
        if digests.get(name) != file_digest(folder / name):
            raise CheckpointError(f"{folder / name} is damaged: it does not hold what was written; copy it again.")


def _lexicon(path: Path) -> frozenset[str]:
    """The words that prompts may use, none for any. Raises CheckpointError for a file that is no text or is missing."""
    if not os.path.lexists(path):
        return frozenset()
    try:
        text = read_text(path)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    if not text:  # a model that takes any word has an empty line
        raise CheckpointError(f"{path} is empty; expected a word on each line: copy the model again.")
    return frozenset(text.split())


def _waits(name: str, waiting: tuple[str, ...]) -> bool:
    """True if the module or weight of this name is in a transformer layer of a waiting component."""
    return name.split(".")[0] in waiting and ".layers." in name


@torch_defaults()
def start_components(cfg: ModelConfig, device: str | torch.device = "cpu") -> Components:
    """Components for the first stage of a model with pretrained backbones: these loaded, everything else fresh.

    The tokenizer is that of the language model's folder. Raises CheckpointError for weights that are missing, damaged
    or of another model, and ConfigError for a config without a pretrained language model.
    """
    if cfg.vlm_from is None:
        raise ConfigError(
            f"vlm_from of model {cfg.name} is None; expected pretrained weights: train this model from its first stage."
        )
    tokenizer = _tokenizer(locate(cfg.vlm_from) / "tokenizer.json", cfg)
    with without_values():
        components = Components(cfg, tokenizer)
    fresh: dict[str, nn.Module] = {"flow": Flow(cfg.flow), "joints": _new_joints(cfg)}
    if isinstance(cfg.fae, FaeConfig):
        fresh["fae"] = Fae(cfg.fae)
    if isinstance(cfg.fae, CodecConfig):
        fresh["own_codec"] = build_codec(cfg.fae)
    if isinstance(cfg.features, ExtractorConfig):
        fresh["features"] = build_extractor(cfg.features)
    for name, module in fresh.items():
        setattr(components, name, module)
    for name in _backbones(cfg):
        if name in cfg.references:
            _refer(components, name, None, "", device)
        else:
            getattr(components, name).model = type(getattr(components, name))(getattr(components, name).cfg).model
    return components.to(device).eval()


def _backbones(cfg: ModelConfig) -> tuple[str, ...]:
    """Names of the backbones that a model has in transformers' layout."""
    return tuple(name for name in BACKBONES if not isinstance(getattr(cfg, name), (type(None), ExtractorConfig)))


def _own(cfg: ModelConfig) -> tuple[str, ...]:
    """Prefixes of the weights in model.safetensors."""
    return (*OWN, "features.") if isinstance(cfg.features, ExtractorConfig) else OWN


def _refer(
    components: Components,
    name: str,
    place: Path | None,
    known: str,
    device: str | torch.device,
    waiting: tuple[str, ...] = (),
) -> None:
    """Load a referenced backbone, from its source or from `place`, and move it to `device` at once.

    known: its fingerprint when the model was saved. Layers that wait in their file are not looked at.
    """
    ref: Pretrained = components.cfg.references[name]
    folder = place or locate(ref)
    found = fingerprint(folder)
    for whose, wanted in (("this model was trained with", known), ("its config asks for", ref.sha256)):
        if wanted and found != wanted:
            raise CheckpointError(
                f"{name} from {folder} has the fingerprint {found}, but {whose} {wanted}; "
                f"give {ref.source} of revision {ref.revision or 'main'}, or link it as {name} in the model folder."
            )
    backbone = getattr(components, name)
    try:
        backbone.check_settings(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load {folder}: {_first_line(error)}") from error
    _load_backbone(backbone, folder, getattr(torch, ref.precision))
    backbone.model.to(device)
    here = {k: v for k, v in backbone.state_dict().items() if not _waits(f"{name}.{k}", waiting)}
    _check_values(here, f"cannot load {name} from {folder}")
    components.fingerprints[name] = found


def _load_backbone(backbone: Backbone, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    entries = inventory(folder)
    whole_numbers = sorted(name for name, entry in entries.items() if entry.dtype not in FLOATS)
    if whole_numbers:
        name = whole_numbers[0]
        raise CheckpointError(f"cannot load {folder}: {name} holds {entries[name].dtype}, expected floating weights.")
    try:
        backbone.load(folder, dtype)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"cannot load {folder}: {_first_line(error)}") from error


def load_words(folder: str | Path) -> Components:
    """Tokenizer, vocabulary and sizes of a model folder, without any module. Raises CheckpointError."""
    folder = Path(folder)
    return _settled(folder, lambda: _load_words_once(folder))


def _load_words_once(folder: Path) -> Components:
    source = whole(folder)
    config = read_config(source)
    words = Components(config.model, _tokenizer(source / "tokenizer.json", config.model), modules={})
    words.vocabulary = _lexicon(source / "lexicon.txt")
    words.finished_stages = config.finished_stages
    return words


def save_words(words: Components, folder: str | Path) -> Path:
    """Write what `load_words` reads, without weights; nothing where a folder has it already, with weights or without.

    Raises CheckpointError for a folder of another model or of something else, and if it cannot be written.
    """
    folder = Path(folder).resolve()
    try:
        if (whole(folder) / "config.json").is_file() and is_model_config(whole(folder) / "config.json"):
            there = load_words(folder)
            if (there.cfg, there.vocabulary) != (words.cfg, words.vocabulary):
                raise CheckpointError(f"cannot save to {folder}: it holds another model; give another folder.")
            return folder
        _check_replaceable(folder)
        with replacing_content(folder, CheckpointError, "saving a processor") as new:
            _write_words(words, new)
    except OSError as error:
        raise CheckpointError(f"cannot save to {folder}: {str(error).rstrip('.')}.") from error
    return folder


def _tokenizer(path: Path, cfg: ModelConfig) -> ChatTokenizer:
    try:
        tokenizer = load_tokenizer(path)
    except Exception as error:  # tokenizers raises nothing more special than this
        raise CheckpointError(f"cannot load {path}: {_first_line(error)}") from error
    if tokenizer.special != cfg.vlm.special or tokenizer.vocab > cfg.vlm.vocab:
        raise CheckpointError(f"{path} is the tokenizer of another model: its tokens do not fit config.json.")
    if isinstance(tokenizer, QwenTokenizer):  # the file is the same for families with different chat templates
        tokenizer.system = stream_class(cfg.vlm).system
    return tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _fresh_joints(cfg: ModelConfig) -> dict[str, Tensor]:
    """Untrained joints for a model without any, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        joints = _new_joints(cfg)
    return {f"joints.{name}": value for name, value in joints.state_dict().items()}


def _new_joints(cfg: ModelConfig) -> Joints:
    return Joints(cfg.joints, cfg.flow.deep.dim, cfg.vlm.width, cfg.flow.deep.stack.width)


def _fill(components: Components, tensors: dict[str, Tensor], path: Path, waiting: tuple[str, ...]) -> None:
    """Fill FAE, flow and joints, built without weights, with copies of `tensors`; waiting layers with views.

    Raises CheckpointError for tensors that are missing, unknown, of another shape or not floating where ours are.
    """
    prefixes = _own(components.cfg)
    state = {k: v for k, v in components.state_dict().items() if k.startswith(prefixes)}
    missing, extra = sorted(set(state) - set(tensors)), sorted(set(tensors) - set(state))
    if missing or extra:
        hint = nearest(missing[0], extra) if missing else ""
        raise CheckpointError(
            f"{path} does not fit its config: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(extra)} unknown {extra[:3]}.{hint}"
        )
    for name, target in state.items():
        value = tensors[name]
        if target.shape != value.shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(value.shape)}, expected {tuple(target.shape)}.")
        if target.is_floating_point() != value.is_floating_point():
            raise CheckpointError(f"{path}: {name} holds {value.dtype}, expected {target.dtype}.")
        state[name] = value.to(target.dtype, copy=not _waits(name, waiting))
    for prefix in (prefix for prefix in prefixes if any(k.startswith(prefix) for k in state)):
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        getattr(components, prefix.removesuffix(".")).load_state_dict(own, assign=True)
