"""Answers for harnesses in words and log probabilities, and lmms-eval as a program whose exit status says nothing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmark_cases import tiny_model
from starflow2.benchmarks.answering import Answerer, reworded, without_controls
from starflow2.benchmarks.lmms_run import (
    SUITES,
    HarnessRun,
    find_python,
    newest_results,
    read_results,
    run_suite,
)
from starflow2.cli.app import main
from starflow2.core.images import ImageForm, read_picture, read_upright, to_pil
from starflow2.errors import ConfigError, DataError, StateError
from starflow2.inference.tower_reply import TowerView, tower_reply
from starflow2.models.checkpoint import save_components
from starflow2.pipeline import StarFlow2
from starflow2.training.datasets import to_images
from starflow2.world.captions import caption_task


@pytest.fixture(scope="module")
def model() -> StarFlow2:
    return tiny_model()


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [to_pil(image) for image in to_images([caption_task(0, i).scene for i in range(3)])]


# -- answers ----------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_library_on_the_same_pixels(model, images):
    questions = ["what color is the star?", "is it small?", "list every object."]
    found = Answerer(model).answer([[[image, text]] for image, text in zip(images, questions, strict=True)], "t", 8)
    shown = [[read_picture(image, 64)] for image in images]
    assert found == model.answers(shown, questions, tokens=8)


def test_words_and_images_keep_their_order_and_rounds_build_on_each_other(model, images):
    answerer = Answerer(model)
    mixed = answerer.answer([[["here is", images[0], "and", images[1], "is it red?"]]], "t", 8)
    assert mixed == model.replies([[["here is", images[0], "and", images[1], "is it red?"]]], tokens=8)
    talk = [[images[0], "is it red?"], ["yes"], ["is it small?"]]
    assert answerer.answer([talk], "t", 48) == model.answers_after(
        [[([read_picture(images[0], 64), "is it red?"], ["yes"])]], ["is it small?"]
    )


def test_log_probabilities_are_those_of_score(model, images):
    asked = [images[0], "is it red?"]
    found, is_greedy = Answerer(model).log_prob(asked, " yes", "t")
    assert found == pytest.approx(model.score(asked, ["yes"]).log_prob, abs=1e-5) and not is_greedy


def test_a_continuation_is_greedy_if_the_model_would_write_it_and_end(images):
    model = tiny_model()
    model.components.vocabulary = frozenset()  # what the tiny model writes are no words
    asked, reply = [images[0], "is it red?"], model.replies([[[images[0], "is it red?"]]], tokens=4)[0]
    assert not Answerer(model).log_prob(asked, reply, "t")[1], "it would go on"

    class Ended(StarFlow2):
        def replies(self, talks, *, tokens=48):
            return [reply for _ in talks]

    assert Answerer(Ended(model.components)).log_prob(asked, f" {reply}", "t")[1]


def test_the_frozen_language_model_sees_images_at_their_size_or_squeezed_to_256(model, images):
    wide = images[0].resize((96, 48))
    answers = {
        frozen: Answerer(model, frozen=frozen).answer([[[wide, "is it red?"]]], "t", 6) for frozen in ("native", "256")
    }
    for frozen, view in (("native", TowerView()), ("256", TowerView(square=256))):
        assert answers[frozen] == [
            tower_reply(model.components, [read_upright(wide), "is it red?"], max_tokens=6, view=view)
        ]
    with pytest.raises(ConfigError, match="log probabilities are the joint model's"):
        Answerer(model, frozen="native").log_prob([wide, "is it red?"], "yes", "t")


def test_all_of_an_image_is_kept_unless_another_fit_is_asked_for(model, images):
    wide = images[0].resize((128, 64))
    for fit in ("stretch", "crop", "pad"):
        found = Answerer(model, fit=fit).answer([[[wide, "list every object."]]], "t", 8)
        shown = read_picture(wide, 64, ImageForm(fit=fit, flatten="white"))
        assert found == model.answers([[shown]], ["list every object."], tokens=8)


def test_rules_take_the_harnesss_sentences_away_and_count_them(model, images, tmp_path):
    text = "is it red?\nAnswer the question using a single word or phrase."
    assert reworded(text, "mme") == ("is it red? please answer yes or no.", [text.split("\n")[1]])
    assert reworded(text, "gqa")[0] == "is it red?"
    letter = "a: red, b: blue.\nAnswer with the option's letter from the given choices directly."
    assert reworded(letter, "seedbench")[0] == "a: red, b: blue. answer with the letter."
    assert reworded("is it\n red?", "mme") == ("is it\n red?", [])
    answerer = Answerer(model, notes=str(tmp_path / "n.json"))
    answerer.answer([[[images[0], text]], [[images[1], "is the zebra red?"]]], "mme", 4)
    notes = json.loads((tmp_path / "n.json").read_text())
    assert notes["questions"] == 2 and notes["unknown words"] == {"zebra": 1}
    assert notes["reworded sentences"] == {text.split("\n")[1]: 1}


def test_a_model_with_an_open_vocabulary_reads_questions_as_they_are(images, tmp_path):
    model = tiny_model()
    model.components.vocabulary = frozenset()
    text = "is it red?\nAnswer the question using a single word or phrase."
    answerer = Answerer(model, notes=str(tmp_path / "n.json"))
    assert answerer.answer([[[images[0], text]]], "mme", 8) == model.replies([[[images[0], text]]], tokens=8)
    assert json.loads((tmp_path / "n.json").read_text())["reworded sentences"] == {}


def test_a_reply_keeps_all_but_its_control_characters():
    assert without_controls("\x16 ja, größer\n\u200b2 \ufffd\x00") == " ja, größer\n2 \ufffd"
    whole = "two\tred stars\n猫"
    assert without_controls(whole) == whole


def test_what_cannot_answer_is_refused():
    with pytest.raises(StateError, match="needs a model that has finished stage joint"):
        Answerer(tiny_model(("features", "fae", "vlm", "t2i")))
    with pytest.raises(ConfigError, match="frozen is 'yes'; expected one of no, native, 256"):
        Answerer(tiny_model(), frozen="yes")
    with pytest.raises(ConfigError, match="expected an odd number"):
        tiny_model().replies([[["a star"], ["yes"]]])


# -- the harness ------------------------------------------------------------------------------------------------------

RESULTS = {
    "mme": {"mme_perception_score,none": 1234.5, "mme_cognition_score,none": []},
    "gqa": {"exact_match,none": 0.5},
    "seedbench": {"seed_image,none": 0.25, "seed_video,none": [], "seed_all,none": 0.5},
    "mmbench_en_dev_static": {"gpt_eval_score,none": 57.5},
    "mmmu_val": {"mmmu_acc,none": 0.447},
    "ai2d": {"exact_match,flexible-extract": 0.677},
}
HARNESS = """#!{python}
import json, pathlib, sys
words = sys.argv[1:]
if words[0] == "-c":
    print("/harness/tasks")
    sys.exit()
value = lambda name: words[words.index(name) + 1] if name in words else None
out = pathlib.Path(value("--output_path"))
(out / "argv.json").write_text(json.dumps(words))
results, task = json.loads({results!r}), value("--tasks")
plain = task.removeprefix("starflow2_")
if plain not in results:
    print("ValueError: Tasks not found: " + task, file=sys.stderr)
    sys.exit(0)
(out / "starflow2").mkdir(exist_ok=True)
found = {{"results": {{task: results[plain]}}, "n-samples": {{task: {{"original": 9, "effective": 4}}}}}}
(out / "starflow2" / "20260101_000000_results.json").write_text(json.dumps(found))
args = dict(pair.split("=", 1) for pair in value("--model_args").split(","))
pathlib.Path(args["notes"]).write_text(json.dumps({{"reworded sentences": {{"x": 4}}, "unknown words in all": 2}}))
"""


@pytest.fixture
def python(tmp_path) -> Path:
    """A program that stands in for the harness's interpreter; it ends with 0 whatever happens."""
    path = tmp_path / "python"
    path.write_text(HARNESS.format(python=sys.executable, results=json.dumps(RESULTS)))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("suite", list(SUITES))
def test_scores_of_every_suite_are_read_from_the_harnesss_json_in_the_papers_units(suite, python, tmp_path):
    expected = {"mme": 1234.5, "gqa": 50, "seed": 25, "mmbench": 57.5, "mmmu": 44.7, "ai2d": 67.7}
    result = run_suite(suite, HarnessRun(python=python, model="nano", limit=4), tmp_path / "out")
    assert next(iter(result.columns.values())).score == pytest.approx(expected[suite])
    assert result.counts == {"questions": 4} and result.made["limit"] == 4
    assert any("4 sentences" in note for note in result.notes) and any("2 words" in note for note in result.notes)
    words = json.loads((tmp_path / "out" / "argv.json").read_text())
    assert words[:2] == ["-m", "lmms_eval"] and words[words.index("--model") + 1] == "starflow2"
    assert "frozen=no" in words[words.index("--model_args") + 1] and words[words.index("--limit") + 1] == "4"


def test_local_data_gets_a_task_of_its_own_that_includes_the_published_one(python, tmp_path):
    (tmp_path / "mme.parquet").write_bytes(b"PAR1 and so on")
    run = HarnessRun(python=python, model="nano", data=tmp_path / "mme.parquet", frozen="256")
    result = run_suite("mme", run, tmp_path / "out")
    assert result.model == "nano, language model alone at 256" and result.made["task"] == "starflow2_mme"
    lines = (tmp_path / "out" / "tasks" / "starflow2_mme.yaml").read_text().splitlines()
    task = {name: json.loads(value) for name, value in (line.split(": ", 1) for line in lines)}
    assert task["include"] == "/harness/tasks/mme/mme.yaml" and task["dataset_path"] == "parquet"
    assert task["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / "mme.parquet")}}
    with pytest.raises(DataError, match="none is not there"):
        run_suite("mme", HarnessRun(python=python, model="nano", data=tmp_path / "none"), tmp_path / "out")
    (tmp_path / "mme.jsonl").write_text('{"question": "is it red?"}')
    with pytest.raises(DataError, match=r"mme\.jsonl is no Parquet file"):
        run_suite("mme", HarnessRun(python=python, model="nano", data=tmp_path / "mme.jsonl"), tmp_path / "out")


def test_a_task_that_the_harness_does_not_know_is_an_error_though_it_ends_with_0(python, tmp_path):
    with pytest.raises(DataError, match="wrote no results of task mme2: ValueError: Tasks not found: mme2"):
        run_suite("mme", HarnessRun(python=python, model="nano", task="mme2"), tmp_path / "out")


def test_a_harness_that_does_not_end_is_stopped_and_one_that_is_missing_is_named(tmp_path, monkeypatch):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    with pytest.raises(DataError, match="wrote nothing at all"):
        run_suite("mme", HarnessRun(python=slow, model="nano", seconds=0.2), tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    if "STARFLOW2_LMMS_PYTHON" not in os.environ:
        with pytest.raises(ConfigError, match="make lmms"):
            find_python(tmp_path / "none")
    assert find_python(slow) == slow


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("{}", "no scores of task mme"),
        ('{"results": {"gqa": {}}}', "no scores of task mme"),
        ('{"results": {"mme": {"exact_match,none": 1}}}', "no scores of task mme: KeyError.'mme_perception_score"),
        ('{"results": ', "is not JSON"),
        ('{"results": {"mme": []}}', "no scores of task mme"),
        (json.dumps({"results": RESULTS, "n-samples": []}), "no scores of task mme"),
        (json.dumps({"results": RESULTS, "n-samples": {"mme": {"effective": "x"}}}), "effective is 'x'"),
    ],
)
def test_results_without_the_scores_are_refused(data, says, tmp_path):
    (tmp_path / "20260101_000000_results.json").write_text(data)
    with pytest.raises(DataError, match=says):
        read_results("mme", newest_results(tmp_path))
    with pytest.raises(DataError, match="has no results"):
        newest_results(tmp_path / "none")


def test_a_metric_of_which_no_question_was_asked_is_an_empty_column(tmp_path):
    (tmp_path / "20260101_000000_results.json").write_text('{"results": {"mme": {"mme_cognition_score,none": 350}}}')
    columns = read_results("mme", newest_results(tmp_path)).columns
    assert columns["perception"].score is None and columns["cognition"].score == 350


def test_the_command_writes_three_rows_that_a_report_sets_beside_the_papers(python, model, tmp_path, capsys):
    save_components(model.components, tmp_path / "model")
    argv = ["eval", "ai2d", "--out", str(tmp_path / "o"), "--model", str(tmp_path / "model"), "--python", str(python)]
    assert main([*argv, "--frozen-vlm"]) == 0
    files = [str(tmp_path / "o" / f"{name}.json") for name in ("ai2d", "ai2d-frozen-native", "ai2d-frozen-256")]
    assert main(["eval", "report", *files, "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| paper, Qwen2.5-VL-7B frozen |  | 82.3 |" in page and page.count("| lmms-eval | 67.70 |") == 3
    capsys.readouterr()


def test_the_command_refuses_a_model_without_stage_joint_before_the_harness_starts(python, tmp_path, capsys):
    save_components(tiny_model(("features", "fae", "vlm")).components, tmp_path / "model")
    argv = ["eval", "mme", "--out", str(tmp_path / "o"), "--model", str(tmp_path / "model"), "--python", str(python)]
    assert main(argv) == 2
    assert "eval mme needs a model that has finished stage joint" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
