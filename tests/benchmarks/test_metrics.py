"""Published arithmetic without weights, to the digit, against numbers made by other programs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from benchmark_cases import write_lines
from starflow2.benchmarks.choices import chosen_letter, read_mmbench, score_mmbench
from starflow2.benchmarks.metrics import BYTE_SCALE, JET_SCALE, bits_per_dim, psnr, ssim
from starflow2.errors import DataError, ShapeError
from starflow2.evals.codec import frechet_distance
from starflow2.evals.mme import score_mme


@pytest.fixture
def expected(shared_dir):
    return json.loads((shared_dir / "fixtures" / "metrics.json").read_text())


@pytest.fixture
def inputs(shared_dir):
    with np.load(shared_dir / "fixtures" / "metric_inputs.npz") as found:
        return dict(found)


def test_psnr_and_ssim_are_those_of_scikit_image(expected, inputs):
    assert psnr(inputs["im2"], inputs["im"]) == pytest.approx(expected["psnr"], rel=1e-12)
    assert ssim(inputs["im2"], inputs["im"]) == pytest.approx(expected["ssim_gauss11_s1.5"], rel=1e-9)
    assert abs(ssim(inputs["im2"], inputs["im"]) - expected["ssim_uniform7_skimage_default"]) > 3e-4


def test_the_frechet_distance_is_that_of_torch_fidelity(expected, inputs):
    found = frechet_distance(inputs["A"], inputs["B"])
    assert found == pytest.approx(expected["fid_16d"], rel=1e-6) and f"{found:.7f}" == "2.5705508"


def test_bits_of_uniform_bytes_are_those_of_the_formula_and_of_samples(expected):
    assert bits_per_dim(1 / 3, 0.0) == pytest.approx(expected["bpd_identity_exact"], rel=1e-12)
    fitted = 0.5 * math.log(3)  # z = x / sigma, sigma^2 = 1/3
    assert bits_per_dim(1.0, fitted) == pytest.approx(expected["bpd_best_gaussian_on_uniform_bytes"], rel=1e-12)
    rng = np.random.default_rng(0)
    x = (rng.integers(256, size=200_000) + rng.random(200_000)) / 256 * 2 - 1
    assert bits_per_dim(float(np.mean(x**2)), 0.0) == pytest.approx(expected["bpd_identity_mc"], abs=3e-3)
    assert bits_per_dim(0, 0, BYTE_SCALE) - bits_per_dim(0, 0, JET_SCALE) == pytest.approx(0.0056, abs=1e-4)


def test_images_that_do_not_compare_are_refused():
    with pytest.raises(ShapeError, match="expected the same"):
        psnr(np.zeros((4, 4)), np.zeros((4, 5)))
    with pytest.raises(ShapeError, match="at least 11"):
        ssim(np.zeros((8, 8, 3)), np.zeros((8, 8, 3)))
    assert psnr(np.ones((2, 2)), np.ones((2, 2))) == math.inf


def test_ssim_is_that_of_a_loop_over_windows():
    rng = np.random.default_rng(1)
    a = rng.random((13, 15, 2))
    b = (a + 0.1 * rng.normal(size=a.shape)).clip(0, 1)
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for row in range(3):
        for column in range(5):
            for channel in range(2):
                x, y = (image[row : row + 11, column : column + 11, channel] for image in (a, b))
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                both = (weights * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + 1e-4) * (2 * both + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(a, b) == pytest.approx(np.mean(values), rel=1e-12)


def test_mmes_total_is_the_official_one(shared_dir):
    official = json.loads((shared_dir / "fixtures" / "mme_scoring.json").read_text())
    assert f"{sum(score_mme(official['records']).values()):.6f}" == "223.333333"


def test_mmbench_is_right_only_if_every_rotation_is(shared_dir, tmp_path):
    official = json.loads((shared_dir / "fixtures" / "mmbench_circular.json").read_text())
    rows = read_mmbench(write_lines(tmp_path / "m.jsonl", official["rows"]))
    score = score_mmbench(rows)
    assert (score.circular, score.first_pass, score.parsed, score.questions) == (0.575, 0.9, 1.0, 40)


def test_what_no_rule_can_read_is_wrong_and_never_guessed():
    options = {"A": "green", "B": "dark green"}
    assert [chosen_letter(text, options) for text in ("C", "", "I do not know", "dark green")] == ["", "", "", ""]
    assert [chosen_letter(text, options) for text in ("(A)", "B, I think", "green")] == ["A", "B", "A"]


ROW = {"index": 0, "answer": "A", "prediction": "A", "A": "red", "B": "blue"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({k: v for k, v in ROW.items() if k != "prediction"}, r"m\.jsonl:2 has no prediction"),
        (ROW, r"m\.jsonl:2: index 0 stands at .*m\.jsonl:1 already"),
        (ROW | {"index": 1, "answer": "C"}, r"m\.jsonl:2: answer is 'C'"),
        (ROW | {"index": "one"}, r"m\.jsonl:2: index is 'one'"),
        (ROW | {"index": 1, "answer": ["A"]}, r"m\.jsonl:2: answer is .*; expected text"),
        (ROW | {"index": 1, "prediction": None}, r"m\.jsonl:2: prediction is None; expected text"),
        (ROW | {"index": -1}, r"m\.jsonl:2: index is -1"),
    ],
)
def test_spoiled_rows_of_mmbench_are_refused_with_file_and_line(row, says, tmp_path):
    with pytest.raises(DataError, match=says):
        read_mmbench(write_lines(tmp_path / "m.jsonl", [ROW, row]))
