"""The page that sets results beside the paper's numbers, and the density of images that one of them is about."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmark_cases import tiny_model
from starflow2.benchmarks.likelihood import gaussian_nats, score_density
from starflow2.benchmarks.measuring import DRAWING, TALKING, measure
from starflow2.benchmarks.paper import PAPER
from starflow2.benchmarks.report import Found, markdown, read_results, write_report
from starflow2.benchmarks.results import Result, number_form, read_result
from starflow2.cli.app import main
from starflow2.core.images import read_pixels, save_png
from starflow2.core.serialize import to_dict
from starflow2.errors import DataError, StateError
from starflow2.evals.codec import CodecReport, CodecRow
from starflow2.evals.mme import MmeSuite
from starflow2.evals.report import write_json
from starflow2.evals.statistics import Score
from starflow2.evals.suite import evaluate
from starflow2.evals.tables import lines as table_lines
from starflow2.evals.tables import title
from starflow2.inference.likelihood import score
from starflow2.models.checkpoint import save_components, weights_digest
from starflow2.training.datasets import to_images
from starflow2.world.captions import caption_task


def result(benchmark: str = "geneval", model: str = "tiny", judge: str = "geneval") -> Result:
    return Result(
        benchmark=benchmark,
        model=model,
        judge=judge,
        columns={"counting": Score(0.25, 0.1, 0.4), "position": Score(None), "overall": Score(0.5, 0.4, 0.6)},
        more={"a further one": Score(12.5)},
        counts={"prompts": 3},
        made={"weights": "0123456789abcdef", "commit": "abc"},
        notes=("A note.",),
    )


def test_a_result_survives_its_file(tmp_path):
    write_json(result().to_json(), tmp_path / "r.json")
    assert read_result(tmp_path / "r.json") == result()


def test_a_codecs_report_stands_in_the_page_too(tmp_path):
    row = CodecRow(noise_level=0.5, psnr=32.5, ssim=0.97, feature_fd=0.1, rfid=None)
    write_json(to_dict(CodecReport(pictures=64, rows=(row,), model="tiny")), tmp_path / "fae.json")
    found = read_result(tmp_path / "fae.json")
    assert found.columns["PSNR at noise 0.5"].score == 32.5 and found.columns["rFID at noise 0.5"].score is None
    page = markdown(Found([found]))
    assert "## Codec" in page and "- not measured: rFID at noise 0.5\n" in page and "| rFID" not in page


def test_the_papers_rows_stand_first_and_ours_in_the_same_columns():
    lines = markdown(Found([result()])).splitlines()
    start = lines.index("## GenEval")
    head, _, paper, stage_1, ours = lines[start + 2 : start + 7]
    assert head.split(" | ")[:4] == ["| row", "judge", "single_object", "two_object"]
    assert paper == "| paper, STARFlow2 |  | 0.99 | 0.89 | 0.84 | 0.8 | 0.86 | 0.56 | 0.82 |"
    assert stage_1.endswith("|  | 0.51 |")
    assert ours == "| tiny | geneval | – | – | 0.250 (0.100–0.400) | – | – | – | 0.500 (0.400–0.600) |"
    assert "0123456789abcdef" in lines[start + 8] and lines[start + 8].startswith("- **tiny**, judged by geneval: ")
    assert "  - A note." in lines and "  - a further one: 12.50" in lines


def test_every_benchmark_of_the_paper_stands_at_the_top_measured_or_not():
    lines = markdown(Found([result(), result("dpg", judge="other")])).splitlines()[2:12]
    assert len(lines) == 2 + len(PAPER)
    assert lines[2] == "| GenEval, overall | 0.82 |  | tiny 0.500 (0.400–0.600), geneval, of 3 prompts |"
    assert lines[4] == "| MME, perception | 1528.8 | 1677.9 | – |"
    assert [line.split(" | ")[0] for line in lines[6:]] == [
        f"| {name}, accuracy" for name in ("SEED-Bench", "MMBench-en", "MMMU", "AI2D")
    ]


def test_suites_of_the_drawn_world_have_tables_of_their_own_and_a_column_at_the_top(tmp_path):
    report = evaluate(MmeSuite(images=2), lambda images, questions: ["yes"] * len(questions), "dev")
    write_json(replace(report, model="nano", weights="0123").to_json(), tmp_path / "mme.json")
    write_json(result().to_json(), tmp_path / "a.json")
    page = markdown(read_results([tmp_path / "mme.json", tmp_path / "a.json"]))
    assert page.index("## GenEval") < page.index("## The drawn world") < page.index(f"### {title(report)}")
    (total, *_) = table_lines(report)
    id_, cg = (cell.split(" ")[0] for cell in total[1:3])
    assert f"| MME, perception | 1528.8 | 1677.9 | – | {id_} / {cg} of 1,200 |" in page
    assert f"| {' | '.join(total)} |" in page and "weights 0123" in page
    with pytest.raises(DataError, match="both of W-MME-p, nano, dev"):
        read_results([tmp_path / "mme.json"] * 2)
    broken = json.loads((tmp_path / "mme.json").read_text()) | {"suite": "x"}
    (tmp_path / "b.json").write_text(json.dumps(broken))
    with pytest.raises(DataError, match=r"b\.json is no whole report"):
        read_results([tmp_path / "b.json"])


def test_a_table_of_many_columns_is_turned_and_negative_bounds_are_no_minus_signs_in_a_row():
    columns = {f"column {i}": Score(-1.5, -2.0, -1.0) for i in range(8)}
    page = markdown(Found([replace(result("likelihood"), columns=columns)])).splitlines()
    assert "| row | tiny |" in page and "| judge | geneval |" in page
    assert "| column 7 | -1.50 (-2.00 to -1.00) |" in page


def test_small_numbers_keep_their_first_digit():
    assert [f"{x:{number_form(x)}}" for x in (0.0, 2e-9, 0.5, -3.0)] == ["0.000", "2.0e-09", "0.500", "-3.00"]


def test_the_papers_mean_of_six_is_its_overall_and_its_tables_are_quoted():
    *six, overall = PAPER["geneval"][0].columns.values()
    assert np.mean(six) == pytest.approx(overall, abs=0.005) and len(six) == 6
    assert PAPER["dpg"][0].columns["overall"] == 84.94 and PAPER["mme"][1].columns["perception"] == 1677.9


def test_a_report_has_a_page_numbers_and_pictures(tmp_path):
    for name, found in (("a", result("dpg")), ("b", result())):
        write_json(found.to_json(), tmp_path / f"{name}.json")
    (tmp_path / "drawn" / "00000").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "drawn" / "00000" / "0000.png")
    files = write_report([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "out", [tmp_path / "drawn"])
    assert [path.name for path in files] == ["report.md", "report.json", "drawn.png"] and all(map(Path.is_file, files))
    page = files[0].read_text()
    assert page.index("## GenEval") < page.index("## DPG-Bench") and "(drawn.png)" in page
    data = json.loads(files[1].read_text())["results"]
    assert data[0]["paper"][0]["columns"]["overall"] == 0.82 and data[0]["columns"]["overall"]["score"] == 0.5


def test_folders_of_one_name_get_sheets_of_their_own_with_prompts_beneath(tmp_path):
    write_json(result().to_json(), tmp_path / "a.json")
    for i in (1, 2):
        folder = tmp_path / str(i) / "drawn"
        save_png(Image.new("RGB", (64, 64), (90 * i, 0, 0)), folder / "0.png", {"prompt": "a red star"})
    sources = [tmp_path / str(i) / "drawn" for i in (1, 2)]
    files = write_report([tmp_path / "a.json"], tmp_path / "out", sources)
    assert [path.name for path in files[2:]] == ["drawn.png", "drawn-2.png"]
    first, second = (read_pixels(path) for path in files[2:])
    assert first.shape == second.shape and (first - second).abs().max() > 0.3
    assert first.shape[2] > 128, "images of 64 pixels are shown at twice their size"


def test_a_model_is_measured_once_and_what_is_there_is_kept(tmp_path):
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed; it comes with the extra eval")
    model, seen = tiny_model(), list[str]()
    place = tmp_path / "measured" / weights_digest(model.components)
    place.mkdir(parents=True)
    names = [f"world-{suite}" for suite in (*DRAWING, *TALKING)] + ["codec", "likelihood"]
    for name in {*names} - {"codec"}:
        (place / f"{name}.json").write_text("{}")
    files = measure(model, tmp_path, seen.append).files
    assert [path.stem for path in files] == names and seen == ["codec"]
    (codec,) = read_results([path for path in files if path.stem == "codec"]).results
    assert codec.benchmark == "codec" and codec.model == model.components.cfg.name
    before = {path: path.read_bytes() for path in files}
    measure(model, tmp_path, seen.append)
    assert {path: path.read_bytes() for path in files} == before and seen == ["codec"]


@pytest.mark.slow
def test_the_command_measures_a_model_and_shows_what_it_draws(tmp_path, capsys):
    components = tiny_model().components
    components.vocabulary -= {"take"}  # a word of edits, for which there is no other
    save_components(components, tmp_path / "model")
    argv = ["eval", "report", "--measure", str(tmp_path / "model"), "--out", str(tmp_path / "r"), "--device", "cpu"]
    assert main(argv) == 0
    page = (tmp_path / "r" / "report.md").read_text()
    assert all(f"### {name}" in page for name in ("W-GenEval", "W-DPG", "W-MME-p", "W-GQA", "W-MCQ", "W-Story"))
    assert all(f"({name}.png)" in page for name in ("drawings", "edits", "stories"))
    assert "## Codec" in page and "## Likelihood" in page
    assert "world-sessions is left out: this model never learnt 'take'" in capsys.readouterr().err


def test_a_report_about_nothing_is_refused(tmp_path, capsys):
    assert main(["eval", "report", "--out", str(tmp_path / "r")]) == 2
    assert "--measure MODEL" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_a_model_that_does_not_draw_the_world_is_not_measured(tmp_path):
    with pytest.raises(StateError, match="measuring needs stage t2i"):
        measure(tiny_model(("features", "fae")), tmp_path)


def test_what_cannot_be_reported_is_refused(tmp_path):
    write_json(result().to_json(), tmp_path / "a.json")
    write_json(result().to_json(), tmp_path / "b.json")
    with pytest.raises(DataError, match=r"b.json and .*a.json are both of geneval, tiny, geneval"):
        read_results([tmp_path / "a.json", tmp_path / "b.json"])
    with pytest.raises(DataError, match="no result to report"):
        read_results([])
    whole = json.loads((tmp_path / "a.json").read_text())
    spoiled = {"judge": 5, "counts": {"images": "x"}, "notes": [None], "columns": {"overall": "x"}, "made": []}
    wrong = [(json.dumps(whole | {name: value}), f"{name}|score is") for name, value in spoiled.items()]
    texts = [("{}", "expected a result"), ('{"format": 1}', "no whole result"), ("[", "is not JSON")]
    for text, says in (*texts, *wrong):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(DataError, match=says):
            read_result(tmp_path / "c.json")
    with pytest.raises(DataError, match="has no images"):
        write_report([tmp_path / "a.json"], tmp_path / "out", [tmp_path / "none"])


# -- density ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return to_images([caption_task(0, i).scene for i in range(3)])


def test_nats_are_those_of_score_and_stand_beside_a_fitted_gaussian(images):
    model = tiny_model()
    found = score_density(model, images, levels=[0.5])
    sampler = model.exact_sampler()
    alone = np.mean([score(sampler, [], [image], noise_level=0.5).pictures[0].nats_per_dim for image in images])
    nats = found.columns["nats per dimension at noise 0.5"].score
    assert nats == pytest.approx(alone) and found.columns["bits per dimension at noise 0.5"].score == pytest.approx(
        alone / math.log(2)
    )
    gaussian = found.more["diagonal Gaussian, nats at noise 0.5"].score
    assert found.more["nats better than the Gaussian at noise 0.5"].score == pytest.approx(gaussian - alone)
    assert found.more["largest error of latents through the prior and back"].score < 1e-6
    assert found.counts["dimensions"] == 64 * 4 and found.made["weights"]


def test_the_gaussians_entropy_is_that_of_its_density():
    latents = torch.randn(64, 100, 2, generator=torch.Generator().manual_seed(0)).double() * torch.tensor([1.0, 3.0])
    flat = latents.flatten(0, 1)
    density = torch.distributions.Normal(flat.mean(0), flat.std(0)).log_prob(flat).mean()
    assert gaussian_nats(latents) == pytest.approx(-float(density), abs=1e-3)


def test_one_image_has_no_variance(images):
    with pytest.raises(DataError, match="at least two"):
        score_density(tiny_model(), images[:1])
