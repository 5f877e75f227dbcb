"""The plug-in inside lmms-eval, end to end, in the environment of `make lmms`; elsewhere these tests are skipped.

Results are read from the harness's JSON: its exit status is 0 after errors.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own: make lmms")

import datasets
from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.models.registry_v2 import ModelRegistryV2
from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator, mmbench_process_results
from lmms_eval.tasks.mme.utils import mme_aggregate_results, mme_process_results

from benchmark_cases import tiny_model
from model_cases import STAGES
from pretrained_cases import paper_in_miniature, write_upstream
from starflow2.benchmarks.choices import score_mmbench
from starflow2.benchmarks.lmms import ChatModel, SimpleModel
from starflow2.benchmarks.lmms_run import SUITES, HarnessRun, newest_results, run_suite
from starflow2.cli.app import main
from starflow2.evals.mcq import AskedChoice, McqSuite, choice_items
from starflow2.evals.mme import MmeSuite, score_mme
from starflow2.evals.runner import ByteModel
from starflow2.models.checkpoint import save_components, start_components
from starflow2.pipeline import StarFlow2
from starflow2.world.scene import render

PYTHON = Path(sys.executable)
GREEDY = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
YES_NO_TASK = """
task: shapes_yesno
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function shapes.visual
doc_to_text: !function shapes.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 48, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: true}}
metadata:
  - version: 0.0
"""
CHOICE_TASK = YES_NO_TASK.replace("shapes_yesno", "shapes_choice")
LIKELIHOOD_TASK = """
task: shapes_likely
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_visual: !function shapes.visual
doc_to_text: !function shapes.text
doc_to_target: answer
doc_to_choice: !function shapes.choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata:
  - version: 0.0
"""
FUNCTIONS = """
def visual(doc):
    return [doc["image"].convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def choices(doc):
    return ["a", "b", "c", "d"]
"""


def write_parquet(path: Path, rows: list[dict[str, Any]], **features: Any) -> Path:
    """A Parquet file whose columns of images are encoded as the Hub's are."""
    table = datasets.Dataset.from_list(rows)
    for name, feature in features.items():
        table = table.cast_column(name, feature)
    table.to_parquet(str(path))
    return path


def picture(scene: Any) -> Image.Image:
    return Image.fromarray(np.asarray(render(scene)))


def harness(folder: Path, task: str, *options: str, arguments: str = "") -> dict[str, Any]:
    """Scores of a task of ours, run by the harness itself on nano."""
    given = f"pretrained=nano,device=cpu{arguments}"
    command = [sys.executable, "-m", "lmms_eval", "--model", "starflow2", "--model_args", given]
    command += ["--tasks", task, "--include_path", str(folder), "--output_path", str(folder / task), *options]
    done = subprocess.run([*command, "--log_samples"], capture_output=True, text=True, timeout=280)
    try:
        return json.loads(newest_results(folder / task).read_text())["results"][task]
    except Exception as error:
        raise AssertionError(done.stdout[-2000:] + done.stderr[-4000:]) from error


def responses(folder: Path, name: str, task: str = "") -> list[Any]:
    """The model's answer to each question of a task, in the order of the questions, as the harness logged it.

    A text where a question is one request, a list of what was replied to each where it is several.
    """
    (path,) = (folder / name).rglob(f"*_samples_{task or name}.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    return [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


@pytest.fixture(scope="module")
def nano() -> StarFlow2:
    return StarFlow2.from_pretrained("nano", device="cpu")


@pytest.fixture
def tasks(tmp_path) -> Path:
    (tmp_path / "shapes.py").write_text(FUNCTIONS)
    return tmp_path


def test_both_classes_are_found_by_entry_point():
    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("starflow2") is ChatModel
    assert registry.get_model_class("starflow2", force_simple=True) is SimpleModel


def test_a_yes_or_no_task_scores_exactly_what_our_own_suite_does(nano, tasks):
    items = MmeSuite(images=4).items("dev")["all"]
    rows = [
        {"image": picture(item.scene), "question": item.question.text, "answer": item.question.answer} for item in items
    ]
    data = write_parquet(tasks / "yesno.parquet", rows, image=datasets.Image())
    (tasks / "yesno.yaml").write_text(YES_NO_TASK.format(data=data))
    scores = harness(tasks, "shapes_yesno", "--batch_size", "16")
    images = np.stack([render(item.scene) for item in items])
    own = ByteModel(nano).answer_one(images, [item.question.text for item in items])
    right = [text.strip().lower().strip(".") == item.question.answer for text, item in zip(own, items, strict=True)]
    assert scores["exact_match,none"] == pytest.approx(np.mean(right), abs=1e-12) and np.mean(right) > 0.75


@pytest.fixture(scope="module")
def seed_items() -> list[AskedChoice]:
    """Every 13th question of W-SEED, of both parts and all kinds."""
    return list(choice_items("seed", "dev")[::13])


@pytest.fixture(scope="module")
def own_answers(nano, seed_items) -> list[str]:
    return list(McqSuite().run(ByteModel(nano).answer_many, seed_items))


def choice_rows(items: list[AskedChoice]) -> list[dict[str, Any]]:
    return [{"image": picture(i.choice.scenes[0]), "question": i.choice.text, "answer": i.choice.reply} for i in items]


def test_multiple_choice_by_letters_scores_exactly_what_our_own_suite_does(nano, tasks, seed_items, own_answers):
    data = write_parquet(tasks / "choice.parquet", choice_rows(seed_items), image=datasets.Image())
    (tasks / "choice.yaml").write_text(CHOICE_TASK.format(data=data))
    scores = harness(tasks, "shapes_choice", "--batch_size", "16")
    assert [answer.strip() for answer in responses(tasks, "shapes_choice")] == own_answers
    graded = McqSuite().grade({"seed": list(zip(seed_items, own_answers, strict=True))})
    assert scores["exact_match,none"] == pytest.approx(graded.parts["all"].by_kind["seed"].value("accuracy"), abs=1e-12)
    assert len({item.choice.kind for item in seed_items}) == 6 and set(own_answers) > {"a", "b"}


def test_multiple_choice_by_likelihood_takes_the_option_that_score_takes(nano, tasks, seed_items, own_answers):
    items = seed_items[::2]
    rows = [row | {"answer": "abcd".index(row["answer"])} for row in choice_rows(items)]
    data = write_parquet(tasks / "likely.parquet", rows, image=datasets.Image())
    (tasks / "likely.yaml").write_text(LIKELIHOOD_TASK.format(data=data))
    scores = harness(tasks, "shapes_likely", "--force_simple", arguments=",likelihood=loss")
    shown = [[picture(item.choice.scenes[0]), item.choice.text] for item in items]
    own = np.array([[nano.score(part, [letter]).log_prob for letter in "abcd"] for part in shown])  # (M, 4)
    found = responses(tasks, "shapes_likely")  # both of a pair are logged as text
    assert np.allclose([[-float(loss) for loss, _ in pairs] for pairs in found], own, rtol=0, atol=1e-5)
    best = own.argmax(1)
    assert scores["acc,none"] == pytest.approx(np.mean(best == [row["answer"] for row in rows]), abs=1e-12)
    greedy = [[letter == answer for letter in "abcd"] for answer in own_answers[::2]]
    assert [[is_greedy == "True" for _, is_greedy in pairs] for pairs in found] == greedy
    written = [("abcd"[i], answer) for i, answer in zip(best, own_answers[::2], strict=True) if answer in "abcd"]
    assert all(likeliest == answer for likeliest, answer in written) and written


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny model's folder."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_components(tiny_model().components, folder)
    return folder


@pytest.fixture
def docs() -> list[dict[str, Any]]:
    items = MmeSuite(images=2).items("dev")["all"][:3]
    return [{"image": picture(item.scene), "question": item.question.text} for item in items]


def request(kind: str, index: int, *arguments: object) -> Instance:
    about = {"task": "t", "doc_id": index, "repeats": 1}
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata=about)


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]


def visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [doc["image"]]


def loaded(kind: type[SimpleModel], folder: Path, docs: list[dict[str, Any]], **options: Any) -> SimpleModel:
    model = kind(pretrained=str(folder), device="cpu", **options)
    model.task_dict = {"t": {"test": docs}}
    return model


def test_both_classes_answer_in_the_order_of_requests_and_in_batches_as_alone(folder, docs):
    settings = [GREEDY, GREEDY | {"max_new_tokens": 3}, GREEDY]
    chat = [request("generate_until", i, "", messages, settings[i], i, "t", "test") for i in range(3)]
    simple = [
        request("generate_until", i, d["question"], settings[i], visual, i, "t", "test") for i, d in enumerate(docs)
    ]
    own = tiny_model()
    expected = [
        own.replies([[[d["image"], d["question"]]]], tokens=settings[i]["max_new_tokens"])[0]
        for i, d in enumerate(docs)
    ]
    assert loaded(ChatModel, folder, docs, batch_size=2).generate_until(chat) == expected
    assert loaded(SimpleModel, folder, docs, batch_size="1").generate_until(simple) == expected


def test_log_probabilities_equal_score_and_survive_the_harness(folder, docs):
    model, own = loaded(SimpleModel, folder, docs), tiny_model()
    asked = [request("loglikelihood", i, d["question"], "yes", visual, i, "t", "test") for i, d in enumerate(docs)]
    for found, doc in zip(model.loglikelihood(asked), docs, strict=True):
        (log_prob, is_greedy), _ = unwrap_generation_output(found)
        assert log_prob == pytest.approx(own.score([doc["image"], doc["question"]], ["yes"]).log_prob, abs=1e-5)
        assert is_greedy in (True, False)


def test_rounds_go_on_until_the_task_ends_them(folder, docs):
    def text(doc, previous_output, round_idx, previous_round_info):
        assert len(previous_output) == round_idx
        return None, "is it small?", round_idx == 2, previous_output, {"round": round_idx}

    model, own, first = loaded(SimpleModel, folder, docs), tiny_model(), docs[0]
    asked = [request("generate_until_multi_round", 0, first["question"], GREEDY, visual, text, 0, "t", "test")]
    ((one, two),) = model.generate_until_multi_round(asked)
    talk = [[first["image"], first["question"]]]
    assert one == own.replies([talk], tokens=8)[0]
    assert two == own.replies([[*talk, [one], ["is it small?"]]], tokens=8)[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"frozen": "yes"}, "frozen is 'yes'"),
        ({"fit": "tile"}, "fit is 'tile'"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"likelihood": "nats"}, "likelihood is 'nats'; expected one of log_prob, loss"),
        ({"pretraned": "x"}, 'Did you mean "pretrained"'),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options, says, folder):
    with pytest.raises(Exception, match=says):
        SimpleModel(**{"pretrained": str(folder), "device": "cpu"} | options)


def test_requests_that_cannot_be_answered_are_refused(folder, docs):
    model = loaded(SimpleModel, folder, docs)
    hot = GREEDY | {"do_sample": True, "temperature": 1.0}
    with pytest.raises(Exception, match="answers are greedy"):
        model.generate_until([request("generate_until", 0, "x", hot, visual, 0, "t", "test")])
    video = [request("generate_until", 0, "x", GREEDY, lambda doc: ["film.mp4"], 0, "t", "test")]
    with pytest.raises(Exception, match="reads text and images"):
        model.generate_until(video)


# -- six benchmarks on fixture data -----------------------------------------------------------------------------------


def published_rows(suite: str, images: list[Image.Image]) -> list[dict[str, Any]]:
    """Four rows with the columns of the published dataset."""
    one, other = images
    options = {"A": "red", "B": "blue", "C": "green", "D": "pink"}
    about = {"hint": "nan", "category": "color", "L2-category": "attr", "source": "s", "split": "dev"}
    ask = "is it red? Please answer yes or no."
    return {
        "mme": [
            {"question_id": f"{c}/{i}", "image": one, "question": ask, "answer": a, "category": c}
            for i, c in enumerate(("color", "code_reasoning"))
            for a in ("Yes", "No")
        ],
        "gqa": [
            {"id": str(i), "imageId": "x", "image": one, "question": "what is it?", "answer": "cat"} for i in range(4)
        ],
        "seed": [
            {"question_id": str(i), "image": [one], "question": "what?", "answer": "ABCD"[i], "data_type": "image"}
            | {f"choice_{k.lower()}": v for k, v in options.items()}
            for i in range(4)
        ],
        "mmbench": [
            {"index": i % 2 + i // 2 * 1_000_000, "image": one, "question": "what?", "answer": "A", **options, **about}
            for i in range(4)
        ],
        "mmmu": [
            {
                "id": f"validation_Art_{i}",
                "question": "see <image 1> and <image 2>. which?",
                "options": "['red', 'blue']",
            }
            | {"answer": "A", "question_type": "multiple-choice", "image_1": one, "image_2": other}
            for i in range(4)
        ],
        "ai2d": [
            {"image": one, "question": "what?", "options": ["red", "blue"], "answer": str(i % 2)} for i in range(4)
        ],
    }[suite]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Path:
    """A folder of the paper's model in widths of 64, over backbones in the layout of their published folders."""
    base = tmp_path_factory.mktemp("miniature")
    write_upstream(base, paper_in_miniature(base))
    components = start_components(paper_in_miniature(base))
    components.finished_stages = STAGES
    save_components(components, base / "model")
    return base / "model"


def fixture_rows(suite: str, shared: Path, image: Image.Image) -> list[dict[str, Any]]:
    """Questions of the shared fixtures as rows of the published dataset, with what they predict."""
    if suite == "mme":
        records = json.loads((shared / "fixtures" / "mme_scoring.json").read_text())["records"]
        return [{**record, "image": image, "question": "is it red? Please answer yes or no."} for record in records]
    rows = json.loads((shared / "fixtures" / "mmbench_circular.json").read_text())["rows"]
    return [{**row, "image": image} for row in rows]


@pytest.mark.parametrize("suite", ["mme", "mmbench"])
def test_the_harness_scores_the_fixtures_predictions_as_we_do(suite, shared_dir):
    rows = fixture_rows(suite, shared_dir, Image.new("RGB", (8, 8)))
    if suite == "mme":
        theirs = [mme_process_results(row, [row["pred"]])["mme_perception_score"] for row in rows]
        assert mme_aggregate_results(theirs) == pytest.approx(sum(score_mme(rows).values()), abs=1e-9)
        assert mme_aggregate_results(theirs) == pytest.approx(223.333333, abs=1e-6)
    else:
        theirs = [mmbench_process_results(row, [row["prediction"]])["gpt_eval_score"] for row in rows]
        share, _, _ = mmbench_evaluator.eval_result(theirs, eval_method="static")
        assert share == pytest.approx(score_mmbench(rows).circular, abs=1e-12) and share == pytest.approx(0.575)


@pytest.mark.parametrize("suite", ["mme", "mmbench"])
def test_the_commands_ask_every_question_of_the_fixtures(suite, shared_dir, miniature, tmp_path, capsys):
    rows = fixture_rows(suite, shared_dir, Image.fromarray(np.full((40, 60, 3), 90, np.uint8)))
    data = write_parquet(tmp_path / "data.parquet", rows, image=datasets.Image())
    argv = ["eval", suite, "--out", str(tmp_path / "out"), "--data", str(data), "--model", str(miniature)]
    assert main([*argv, "--device", "cpu", "--python", str(PYTHON)]) == 0
    found = json.loads((tmp_path / "out" / f"{suite}.json").read_text())
    assert found["counts"]["questions"] == len(rows) == {"mme": 240, "mmbench": 160}[suite]
    said = responses(tmp_path / "out", suite, f"starflow2_{SUITES[suite].task}")
    if suite == "mme":
        own = sum(score_mme([{**row, "pred": text} for row, text in zip(rows, said, strict=True)]).values())
        assert found["columns"]["perception"] == pytest.approx(own, abs=1e-9)
    else:  # an untrained model says what only the harness's own rules read as letters
        theirs = [mmbench_process_results(row, [text])["gpt_eval_score"] for row, text in zip(rows, said, strict=True)]
        share, _, _ = mmbench_evaluator.eval_result(theirs, eval_method="static")
        assert found["columns"]["accuracy"] == pytest.approx(100 * share, abs=1e-9)
    capsys.readouterr()


@pytest.mark.parametrize("suite", ["mme", "gqa", "seed", "mmbench", "mmmu", "ai2d"])
def test_every_benchmarks_command_ends_in_a_table_with_the_frozen_rows(suite, miniature, tmp_path, capsys):
    images = [Image.fromarray(np.full((40, 60 + 20 * i, 3), 90 * i, np.uint8)) for i in (1, 2)]
    rows = published_rows(suite, images)
    features = {name: datasets.Image() for name in rows[0] if name.startswith("image") and name != "imageId"}
    if suite == "seed":
        features["image"] = datasets.List(datasets.Image())
    data = write_parquet(tmp_path / "data.parquet", rows, **features)
    argv = ["eval", suite, "--out", str(tmp_path / "out"), "--data", str(data), "--model", str(miniature)]
    assert main([*argv, "--device", "cpu", "--python", str(PYTHON), "--frozen-vlm"]) == 0
    found = [
        json.loads((tmp_path / "out" / f"{suite}{end}.json").read_text())
        for end in ("", "-frozen-native", "-frozen-256")
    ]
    assert [row["model"].partition(", ")[2] for row in found] == [
        "",
        "language model alone",
        "language model alone at 256",
    ]
    assert all(row["counts"]["questions"] == 4 for row in found)
    assert all(next(iter(row["columns"].values())) is not None for row in found)
    capsys.readouterr()


def test_an_unknown_task_is_an_error(miniature, tmp_path):
    run = HarnessRun(python=PYTHON, model=str(miniature), device="cpu", task="no_such_task")
    with pytest.raises(Exception, match="wrote no results of task no_such_task"):
        run_suite("mme", replace(run, limit=1), tmp_path / "out")
