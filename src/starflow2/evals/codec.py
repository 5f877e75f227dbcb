"""How well a codec gives pictures back: PSNR, SSIM and Fréchet distances, at every noise level of its latents.

The Fréchet distance of features is in those of the model's own frozen extractor, so it needs no download and compares
with nothing but itself. rFID proper (Inception features) comes from torch-fidelity where that is installed.
Letters: B pictures, N latents, D latent dim, F feature dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from starflow2.core.images import read_picture, to_floats
from starflow2.errors import ConfigError, DataError
from starflow2.models.protocols import Codec, FeatureExtractor
from starflow2.world.captions import FAMILIES, suite_drawings
from starflow2.world.scene import Split, render

__all__ = ["codec_pictures", "codec_table", "evaluate_codec", "frechet_distance"]

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_BATCH = 64


@torch.no_grad()
def evaluate_codec(
    codec: Codec, extractor: FeatureExtractor | None, images: Tensor, levels: Sequence[float] = (0.0, 0.3, 0.5)
) -> dict[str, Any]:
    """One row per noise level: psnr in dB, ssim, feature_fd, and rfid (None without torch-fidelity).

    extractor: None where a model has none; then feature_fd is None. images: (B, 3, s, s) in [-1, 1], s =
    codec.image_size. Raises DataError for fewer than two, ConfigError where torchmetrics is missing.
    """
    if len(images) < 2:
        raise DataError(f"{len(images)} pictures; expected at least two to compare distributions.")
    if find_spec("torchmetrics") is None:
        raise ConfigError("eval fae needs torchmetrics; install it with pip install 'starflow2[eval]'.")
    truth = None if extractor is None else _features(extractor, images)
    rows = []
    for level in levels:
        given = _roundtrip(codec, images, level)
        rows.append(
            {
                "noise_level": level,
                **_distances(given, images),
                "feature_fd": _feature_distance(extractor, given, truth),
                "rfid": _rfid(given, images),
            }
        )
    return {"suite": "fae", "pictures": len(images), "rows": rows}


def codec_pictures(folder: Path | None, size: int, split: Split, count: int) -> Tensor:
    """Pictures (B, 3, size, size) in [-1, 1]: at most `count` of a folder by name, or of the drawn world.

    Raises DataError for a folder without pictures and for a picture that cannot be read.
    """
    if folder is None:
        drawings = suite_drawings("geneval", split, "id", -(-count // len(FAMILIES)))
        return to_floats(np.stack([render(drawing.scene) for drawing in drawings[:count]]))
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS) if folder.is_dir() else []
    if not found:
        raise DataError(f"{folder} holds no pictures; expected a folder with files that end in {', '.join(ENDINGS)}.")
    return torch.stack([read_picture(path, size) for path in found[:count]])


def codec_table(report: dict[str, Any]) -> Table:
    """For the terminal."""
    grid = Table(title=f"codec, {report['pictures']} pictures")
    for heading in ("noise", "PSNR dB", "SSIM", "feature FD", "rFID"):
        grid.add_column(heading, justify="right")
    for row in report["rows"]:
        rfid = "needs torch-fidelity" if row["rfid"] is None else f"{row['rfid']:.2f}"
        distance = "no features" if row["feature_fd"] is None else f"{row['feature_fd']:.4f}"
        cells = (f"{row['noise_level']:.2f}", f"{row['psnr']:.2f}", f"{row['ssim']:.4f}")
        grid.add_row(*cells, distance, rfid)
    return grid


def _roundtrip(codec: Codec, images: Tensor, level: float) -> Tensor:
    """Through the codec, with noise of that standard deviation on the latents; the same noise every time."""
    generator, out = torch.Generator().manual_seed(0), list[Tensor]()
    for chunk in images.split(_BATCH):
        latents = codec.encode(chunk)
        out.append(codec.decode(latents + level * torch.randn(latents.shape, generator=generator).to(latents)))
    return torch.cat(out)


def _distances(given: Tensor, truth: Tensor) -> dict[str, float]:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    psnr = peak_signal_noise_ratio(given, truth, data_range=(-1.0, 1.0), reduction="elementwise_mean", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(given, truth, data_range=(-1.0, 1.0))
    return {"psnr": float(psnr), "ssim": float(ssim)}  # type: ignore[arg-type]  # a tuple only with return_full_image


def _feature_distance(
    extractor: FeatureExtractor | None, given: Tensor, truth: NDArray[np.float64] | None
) -> float | None:
    return None if extractor is None or truth is None else frechet_distance(_features(extractor, given), truth)


def _features(extractor: FeatureExtractor, images: Tensor) -> NDArray[np.float64]:
    """Mean features of each picture (B, F)."""
    return torch.cat([extractor.features(c).mean(1) for c in images.split(_BATCH)]).double().cpu().numpy()


def frechet_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Of the Gaussians with the means and covariances of two samples (B, F), (B', F).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)); the root's trace from the eigenvalues of a symmetric product.
    """
    covs = [np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1]) for x in (a, b)]
    values, vectors = np.linalg.eigh(covs[0])
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ covs[1] @ root).clip(min=0)
    mean = a.mean(0) - b.mean(0)
    return float(mean @ mean + np.trace(covs[0]) + np.trace(covs[1]) - 2 * np.sqrt(cross).sum())


def _rfid(given: Tensor, truth: Tensor) -> float | None:
    """Inception's distance; None without torch-fidelity, whose weights come from the network."""
    if find_spec("torch_fidelity") is None:
        return None
    from torchmetrics.image.fid import FrechetInceptionDistance

    fid = FrechetInceptionDistance(normalize=True).to(given.device)
    for images, is_real in ((truth, True), (given, False)):
        for chunk in images.split(_BATCH):
            fid.update((chunk + 1) / 2, real=is_real)
    return float(fid.compute())
