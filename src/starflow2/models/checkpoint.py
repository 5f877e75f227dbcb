"""Model folders: config.json, our weights, and the backbones in transformers' own layout beside them.

    config.json          format number, sizes, finished stages
    model.safetensors    FAE if there is one, flow and joints
    vlm/  features/      config.json + model.safetensors as transformers writes them
    tokenizer.json       byte-level BPE;  lexicon.txt: the words used in training

Backbones keep their upstream file layout because in-memory names change between releases. Pretrained backbones are
referenced, not copied, and have no folder here: config.json holds source, revision and fingerprint (`pretrained`).
A link vlm or features, to a folder with the same fingerprint, replaces a source that moved.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from starflow2.core.files import replacing
from starflow2.core.serialize import to_dict
from starflow2.errors import CheckpointError, ConfigError, OutputError, nearest
from starflow2.flow import AffineBlock, Flow
from starflow2.models.components import Components
from starflow2.models.config import FaeConfig, ModelConfig
from starflow2.models.config_file import FORMAT, read_config
from starflow2.models.fae import Fae
from starflow2.models.pretrained import Pretrained, fingerprint, locate
from starflow2.models.pretzel import Joints
from starflow2.models.qwen import QwenStream
from starflow2.models.tokenizer import ChatTokenizer, load_tokenizer
from starflow2.models.vision import DinoFeatures, SiglipFeatures
from starflow2.nn import raw_bytes

__all__ = [
    "load_components",
    "load_tensors",
    "load_words",
    "save_components",
    "save_tensors",
    "start_components",
    "weights_digest",
    "write_config",
]

OWN = ("fae.", "flow.", "joints.")  # what model.safetensors holds
BACKBONES = ("vlm", "features")  # what stands beside it, or is referred to


def save_components(components: Components, folder: str | Path) -> Path:
    """Write a model folder; an older one of this name is replaced only after everything is written.

    Files that are not ours, such as a model card, are kept. Raises CheckpointError if the folder cannot
    be written or holds something that is not a model, and ConfigError for components without a tokenizer.
    """
    _ = components.tokenizer  # raises now, before anything is written
    folder = Path(folder).resolve()
    _check_replaceable(folder)
    temp = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temp, ignore_errors=True)
    try:
        temp.mkdir(parents=True)
        _write_folder(components, temp)
        _keep_others(folder, temp)
        _swap(temp, folder)
    except (OSError, SafetensorError, shutil.Error) as error:  # safetensors has its own for a full disk
        shutil.rmtree(temp, ignore_errors=True)
        raise CheckpointError(f"cannot save to {folder}: {error}. Its earlier content is untouched.") from error
    return folder


def _check_replaceable(folder: Path) -> None:
    """Raise CheckpointError for a folder that holds anything but a model."""
    is_foreign = folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()
    if is_foreign or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"cannot save to {folder}: it exists and is not a model folder; give another name.")


def _keep_others(folder: Path, new: Path) -> None:
    """Copy files of the old folder that are not ours, such as a model card, into the new one."""
    for other in folder.iterdir() if folder.is_dir() else ():
        if (new / other.name).exists():
            continue
        if other.is_symlink():
            (new / other.name).symlink_to(os.readlink(other))
        elif other.is_dir():
            shutil.copytree(other, new / other.name)
        else:
            shutil.copy2(other, new / other.name)


def _write_folder(components: Components, folder: Path) -> None:
    for name in _backbones(components.cfg):
        if name not in components.cfg.references:
            getattr(components, name).save(folder / name)
    own = {k: v for k, v in components.state_dict().items() if k.startswith(OWN)}
    save_file({k: v.contiguous().cpu() for k, v in own.items()}, folder / "model.safetensors")
    components.tokenizer.save(folder / "tokenizer.json")
    (folder / "lexicon.txt").write_text("\n".join(sorted(components.vocabulary)) + "\n")
    write_config(components, folder)


def weights_digest(components: Components) -> str:
    """Digest of FAE, flow and joints, with the adapters of a fine-tune, in 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(components.state_dict().items()):
        if name.startswith(OWN):
            digest.update(name.encode() + raw_bytes(value))
    return digest.hexdigest()


def write_config(components: Components, folder: Path) -> None:
    """Write config.json of a model folder: format number and what `FolderConfig` holds."""
    config = {"format": FORMAT, "stages": list(components.finished_stages), "model": to_dict(components.cfg)}
    config |= {"fingerprints": components.fingerprints} if components.fingerprints else {}
    with replacing(folder / "config.json") as temp:
        temp.write_text(json.dumps(config, indent=1) + "\n")


def _swap(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_components(
    folder: str | Path, device: str | torch.device = "cpu", waiting: tuple[str, ...] = ()
) -> Components:
    """Load the components of a model folder. Raises CheckpointError for files that are missing, foreign or truncated.

    waiting: components whose transformer layers stay in the memory-mapped file until they are used or moved, so that a
    sharded run never holds all of them; see `FullyShardedDistributed.prepare`.
    """
    folder = Path(folder)
    config = read_config(folder)
    cfg = config.model
    own = [f"{name}/model.safetensors" for name in _backbones(cfg) if name not in cfg.references]
    for name in ("model.safetensors", *own, "tokenizer.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; expected a complete starflow2 model: copy it again.")
    tokenizer = _tokenizer(folder / "tokenizer.json", cfg)
    with torch.device("meta"):
        components = Components(cfg, tokenizer)
    tensors = load_tensors(folder / "model.safetensors")
    if not any(name.startswith("joints.") for name in tensors) and "adapter" not in config.finished_stages:
        tensors |= _fresh_joints(cfg)
    _fill(components, tensors, folder / "model.safetensors", waiting)
    for name in _backbones(cfg):
        if name in cfg.references:
            place = folder / name if (folder / name).is_dir() else None
            known = config.fingerprints.get(name, "")
            _refer(components, name, place, known, "cpu" if name in waiting else device)
        else:
            _load_backbone(getattr(components, name), folder / name)
    for block in components.flow.modules():
        if isinstance(block, AffineBlock):
            block.rebuild_buffers()
    lexicon = folder / "lexicon.txt"
    components.vocabulary = frozenset(lexicon.read_text().split()) if lexicon.is_file() else frozenset()
    components.finished_stages = config.finished_stages
    for name, module in components.named_modules():
        if not _waits(name, waiting):
            module._apply(lambda value: value.to(device), recurse=False)
    return components.eval()


def _waits(name: str, waiting: tuple[str, ...]) -> bool:
    """True if the module or weight of this name is in a transformer layer of a waiting component."""
    return name.split(".")[0] in waiting and ".layers." in name


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
    with torch.device("meta"):
        components = Components(cfg, tokenizer)
    fresh: dict[str, nn.Module] = {"flow": Flow(cfg.flow), "joints": _new_joints(cfg)}
    if isinstance(cfg.fae, FaeConfig):
        fresh["fae"] = Fae(cfg.fae)
    for name, module in fresh.items():
        setattr(components, name, module)
    for name in _backbones(cfg):
        if name in cfg.references:
            _refer(components, name, None, "", device)
        else:
            getattr(components, name).model = type(getattr(components, name))(getattr(components, name).cfg).model
    return components.to(device).eval()


def _backbones(cfg: ModelConfig) -> tuple[str, ...]:
    """Names of the backbones that a model has."""
    return tuple(name for name in BACKBONES if getattr(cfg, name) is not None)


def _refer(components: Components, name: str, place: Path | None, known: str, device: str | torch.device) -> None:
    """Load a referenced backbone, from its source or from `place`, and move it to `device` at once.

    known: its fingerprint when the model was saved.
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
    components.fingerprints[name] = found


def _load_backbone(
    backbone: DinoFeatures | SiglipFeatures | QwenStream, folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    try:
        backbone.load(folder, dtype)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"cannot load {folder}: {_first_line(error)}") from error


def load_words(folder: str | Path) -> tuple[ChatTokenizer, ModelConfig]:
    """Tokenizer and sizes of a model folder, without its weights. Raises CheckpointError."""
    cfg = read_config(Path(folder)).model
    return _tokenizer(Path(folder) / "tokenizer.json", cfg), cfg


def _tokenizer(path: Path, cfg: ModelConfig) -> ChatTokenizer:
    try:
        tokenizer = load_tokenizer(path)
    except Exception as error:  # tokenizers raises nothing more special than this
        raise CheckpointError(f"cannot load {path}: {_first_line(error)}") from error
    if tokenizer.special != cfg.vlm.special or tokenizer.vocab > cfg.vlm.vocab:
        raise CheckpointError(f"{path} is the tokenizer of another model: its tokens do not fit config.json.")
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


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises CheckpointError for any other, a truncated or pickled one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); only safetensors are read, never pickle."
        ) from error


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, completely or not at all. Raises OutputError; an earlier file then stays as it was."""
    try:
        with replacing(path) as temp:
            save_file(tensors, temp, metadata=metadata)
    except SafetensorError as error:
        raise OutputError(f"cannot write {path}: {error}.") from error


def _fill(components: Components, tensors: dict[str, Tensor], path: Path, waiting: tuple[str, ...]) -> None:
    """Fill FAE, flow and joints, built without weights, with copies of `tensors`; waiting layers with views.

    Raises CheckpointError for tensors that are missing, unknown or of another shape.
    """
    state = {k: v for k, v in components.state_dict().items() if k.startswith(OWN)}
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
        state[name] = value.to(target.dtype, copy=not _waits(name, waiting))
    for prefix in (prefix for prefix in OWN if any(k.startswith(prefix) for k in state)):
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        getattr(components, prefix.removesuffix(".")).load_state_dict(own, assign=True)
