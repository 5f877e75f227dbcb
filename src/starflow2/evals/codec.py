"""Reconstruction by a codec: PSNR, SSIM and Fréchet distances, at every noise level of its latents.

The Fréchet distance of features uses the model's own frozen extractor, so it needs no download and can only be compared
with itself. rFID proper (Inception features) comes from torch-fidelity where that is installed.
Letters: B images, N latents, D latent dim, F feature dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from starflow2.core.images import PICTURE_ENDINGS, picture_files, read_files, read_picture, to_floats
from starflow2.core.torch_defaults import inference_defaults
from starflow2.errors import ConfigError, DataError
from starflow2.models.protocols import Codec, FeatureExtractor
from starflow2.world.captions import suite_drawings
from starflow2.world.grammar import FAMILIES
from starflow2.world.scene import IMAGE_SIZE, Split, render

__all__ = ["CodecReport", "CodecRow", "codec_pictures", "codec_table", "evaluate_codec", "frechet_distance"]

_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecRow:
    """Scores at one noise level."""

    noise_level: float
    psnr: float  # dB
    ssim: float
    feature_fd: float | None  # None without an extractor
    rfid: float | None  # None without torch-fidelity


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecReport:
    """Scores of a codec on a number of images."""

    suite: str = "fae"
    pictures: int
    rows: tuple[CodecRow, ...]
    model: str = ""


@inference_defaults()
def evaluate_codec(
    codec: Codec, extractor: FeatureExtractor | None, images: Tensor, levels: Sequence[float] = (0.0, 0.3, 0.5)
) -> CodecReport:
    """Scores of a codec's round trip, one row per noise level.

    images: (B, 3, s, s) in [-1, 1], s = codec.image_size. Raises DataError for fewer than two images, ConfigError
    where torchmetrics is missing.
    """
    if len(images) < 2:
        raise DataError(f"images: expected at least two to compare distributions, got {len(images)}.")
    if find_spec("torchmetrics") is None:
        raise ConfigError("eval fae needs torchmetrics; install it with pip install 'starflow2[eval]'.")
    truth = None if extractor is None else _features(extractor, images)
    rows = []
    for level in levels:
        decoded = _roundtrip(codec, images, level)
        psnr, ssim = _pixel_scores(decoded, images)
        distance = _feature_distance(extractor, decoded, truth)
        rfid = _rfid(decoded, images)
        rows.append(CodecRow(noise_level=level, psnr=psnr, ssim=ssim, feature_fd=distance, rfid=rfid))
    return CodecReport(pictures=len(images), rows=tuple(rows))


def codec_pictures(folder: Path | None, size: int, split: Split, count: int) -> Tensor:
    """(B, 3, size, size) in [-1, 1]: the first `count` images of a folder by name, or of the drawn world.

    Raises DataError for a folder without images and for an image that cannot be read, ConfigError for drawn images of
    another size than theirs.
    """
    if folder is None:
        if size != IMAGE_SIZE:
            raise ConfigError(
                f"this model's images have {size} pixels a side, those of the drawn world {IMAGE_SIZE}; give yours "
                "with --images FOLDER."
            )
        drawings = suite_drawings("geneval", split, "id", -(-count // len(FAMILIES)))
        return to_floats(np.stack([render(drawing.scene) for drawing in drawings[:count]]))
    found = picture_files(folder) if folder.is_dir() else []
    if not found:
        endings = ", ".join(PICTURE_ENDINGS)
        raise DataError(f"{folder} has no images; expected a folder with files that end in {endings}.")
    return torch.stack(read_files(lambda path: read_picture(path, size), found[:count]))


def codec_table(report: CodecReport) -> Table:
    """The report as a table for the terminal."""
    grid = Table(title=f"codec, {report.pictures} images")
    for heading in ("noise", "PSNR dB", "SSIM", "feature FD", "rFID"):
        grid.add_column(heading, justify="right")
    for row in report.rows:
        rfid = "needs torch-fidelity" if row.rfid is None else f"{row.rfid:.2f}"
        distance = "no features" if row.feature_fd is None else f"{row.feature_fd:.4f}"
        grid.add_row(f"{row.noise_level:.2f}", f"{row.psnr:.2f}", f"{row.ssim:.4f}", distance, rfid)
    return grid


def _roundtrip(codec: Codec, images: Tensor, level: float) -> Tensor:
    """Images after the codec, with noise of standard deviation `level` on the latents, the same in every call."""
    generator, out = torch.Generator().manual_seed(0), list[Tensor]()
    for chunk in images.split(_BATCH):
        latents = codec.encode(chunk)
        out.append(codec.decode(latents + level * torch.randn(latents.shape, generator=generator).to(latents)))
    return torch.cat(out)


def _pixel_scores(decoded: Tensor, truth: Tensor) -> tuple[float, float]:
    """PSNR in dB and SSIM."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    psnr = peak_signal_noise_ratio(decoded, truth, data_range=(-1.0, 1.0), reduction="elementwise_mean", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(decoded, truth, data_range=(-1.0, 1.0))
    return float(psnr), float(ssim)  # type: ignore[arg-type]  # a tuple only with return_full_image


def _feature_distance(
    extractor: FeatureExtractor | None, decoded: Tensor, truth: NDArray[np.float64] | None
) -> float | None:
    return None if extractor is None or truth is None else frechet_distance(_features(extractor, decoded), truth)


def _features(extractor: FeatureExtractor, images: Tensor) -> NDArray[np.float64]:
    """Mean features of each image (B, F)."""
    return torch.cat([extractor.features(c).mean(1) for c in images.split(_BATCH)]).double().cpu().numpy()


def frechet_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Fréchet distance of the Gaussians with the means and covariances of two samples (B, F), (B', F).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)); the root's trace from the eigenvalues of a symmetric product.
    """
    covs = [np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1]) for x in (a, b)]
    values, vectors = np.linalg.eigh(covs[0])
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ covs[1] @ root).clip(min=0)
    mean = a.mean(0) - b.mean(0)
    return float(mean @ mean + np.trace(covs[0]) + np.trace(covs[1]) - 2 * np.sqrt(cross).sum())


def _rfid(decoded: Tensor, truth: Tensor) -> float | None:
    """Fréchet distance of Inception's features; None without torch-fidelity, whose weights come from the network."""
    if find_spec("torch_fidelity") is None:
        return None
    from torchmetrics.image.fid import FrechetInceptionDistance

    fid = FrechetInceptionDistance(normalize=True).to(decoded.device)
    for images, is_real in ((truth, True), (decoded, False)):
        for chunk in images.split(_BATCH):
            fid.update((chunk + 1) / 2, real=is_real)
    return float(fid.compute())
