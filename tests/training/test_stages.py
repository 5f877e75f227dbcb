"""The tasks of the stages: their batches, their losses, and what each loss reaches."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch

from helpers import wake
from model_cases import (
    STAGES,
    mix_of,
    tiny_components,
    tiny_folder,
    tiny_model,
    tiny_tokenizer,
)
from run_cases import RUN, TRAINED, modules_of, same, with_stage
from starflow2.core.dialogue import Dialogue, Turn
from starflow2.errors import ConfigError, TrainingError
from starflow2.flow import Context
from starflow2.models.checkpoint import load_components, read_config, save_components
from starflow2.models.components import Components
from starflow2.models.context import drawing_context
from starflow2.models.sequence import IGNORE
from starflow2.training.config import CaptionConfig, ShardConfig, TalkConfig, WarmupMixConfig, WarmupTalkConfig
from starflow2.training.datasets import Documents, drop_words, joint_dialogue, talk_dialogue
from starflow2.training.loop import fit
from starflow2.training.losses import ngp_loss
from starflow2.training.recipes import nano
from starflow2.training.start import unfinished_stages
from starflow2.training.tasks import TASKS, TOWER_IMAGES, JointTask, T2iTask
from starflow2.world.captions import T2I_MIX, caption_task
from starflow2.world.checks import check_dialogue
from starflow2.world.conversations import understanding_dialogue
from starflow2.world.scene import Scene, render, stream
from starflow2.world.splits import WITHHELD
from starflow2.world.stories import story_dialogue, story_task


def t2i_task(components: Components, seed: int = 0, **changes: Any) -> T2iTask:
    return T2iTask(components, replace(RUN.stage("t2i"), **changes), seed)


def test_the_batch_of_a_step_is_a_function_of_seed_and_step_alone():
    components = tiny_components()
    images, rows = t2i_task(components).make_batch(range(8, 16))
    t2i_task(components).make_batch(range(0, 8))
    again, same_rows = t2i_task(components).make_batch(range(8, 16))
    assert torch.equal(images, again) and rows == same_rows
    other, other_rows = t2i_task(components, seed=1).make_batch(range(8, 16))
    assert not torch.equal(images, other) and rows != other_rows


@pytest.mark.parametrize("stage", ["features", "fae", "vlm", "adapter", "joint"])
def test_batches_of_the_other_stages_are_functions_of_seed_and_step_too(stage):
    def flat(data: Any) -> list[torch.Tensor]:
        return [data[0], data[1].ids, data[1].labels] if isinstance(data, tuple) else [data]

    components = tiny_components(STAGES)
    first, again, other = (
        flat(TASKS[stage](components, RUN.stage(stage), seed).make_batch(range(4, 8))) for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[-1].shape != other[-1].shape or not torch.equal(first[-1], other[-1])


@pytest.mark.parametrize(("share", "low", "high"), [(0.1, 0.07, 0.13), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)])
def test_about_a_tenth_of_the_captions_is_dropped_unless_asked_otherwise(share, low, high):
    dataset = t2i_task(tiny_components(), caption_drop=share).make_batch
    count = 1500 if 0 < share < 1 else 60
    captions = [text for first in range(0, count, 60) for _, text in dataset.captioned(range(first, first + 60))]
    assert low <= captions.count("") / count <= high
    assert RUN.stage("t2i").caption_drop == 0.1


def test_captions_in_groups_of_similar_length_have_the_loss_of_captions_padded_to_one_length():
    task = t2i_task(tiny_components())
    images, rows = task.make_batch(range(32))
    groups = task.caption_groups(rows)
    assert len(groups) == 2, "these captions are of very different length"
    loss, metrics = task.loss((images, rows), torch.Generator().manual_seed(1))
    weight = task.components.flow.deep.proj_in.weight
    (grad,) = torch.autograd.grad(loss, weight)

    context, latents = drawing_context(task.components, rows), task.components.codec.encode(images)
    generator, expected, nats = torch.Generator().manual_seed(1), torch.zeros(()), torch.zeros(())
    for group in groups:
        padded = Context(context.states[group], context.positions[group], context.attend[group])
        terms = ngp_loss(task.components.flow, latents[group], padded, generator)
        expected, nats = expected + len(group) / 32 * terms[0], nats + len(group) / 32 * terms[1]
    # other shapes round otherwise
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert metrics["nats_per_dim"].item() == pytest.approx(nats.item(), abs=1e-5)
    assert (grad - torch.autograd.grad(expected, weight)[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("stage", ["vlm", "adapter"])
def test_the_language_stage_and_its_adapter_learn_answers_and_not_questions(stage):
    components = tiny_components(STAGES)
    images, batch = TASKS[stage](components, RUN.stage(stage), 0).make_batch(range(6))
    special = components.tokenizer.special
    dialogues = [understanding_dialogue(0, i) for i in range(6)]
    for index, dialogue in enumerate(dialogues):
        labels = batch.labels[(batch.document == index) & (batch.labels != IGNORE)].tolist()
        assert [components.tokenizer.decode(part) for part in split(labels, special.end)] == [
            " ".join(str(p) for p in turn.assistant) for turn in dialogue.turns
        ]
    scenes = [scene for dialogue in dialogues for scene in dialogue.pictures]
    assert len(images) == len(batch.pictures) == len(scenes) and not batch.pictures.is_target.any()
    assert all(torch.equal(to_bytes(image), to_bytes(render(s))) for image, s in zip(images, scenes, strict=True))


def to_bytes(image: Any) -> torch.Tensor:
    """A rendered scene, or an image of a batch, as bytes (3, height, width)."""
    if isinstance(image, torch.Tensor):
        return ((image + 1) * 127.5).round().byte()
    return torch.from_numpy(image).permute(2, 0, 1)


def split(ids: list[int], end: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for i in ids:
        if i == end:
            parts.append([])
        else:
            parts[-1].append(i)
    assert not parts[-1], "every answer closes with the end token"
    return parts[:-1]


def falls(stage: str, components: Components, rate: float, steps: int = 8) -> list[float]:
    """Losses of a few steps of plain gradient descent on one batch with the same noise every time.

    Conversations are about an image each: those about words alone teach an adapter nothing.
    """
    task = TASKS[stage](components, replace(RUN.stage(stage), talk=talk_of(picture=1.0)), 0)
    data, losses = task.make_batch(range(4)), list[float]()
    optimizer = torch.optim.AdamW(task.trained.parameters(), lr=rate)
    for _ in range(steps):
        loss, _ = task.loss(data, torch.Generator().manual_seed(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", ["adapter", "joint"])
def test_the_loss_of_a_fixed_batch_falls_and_what_is_frozen_stays(stage):
    components = tiny_components(STAGES)
    losses = falls(stage, components, 3e-3)
    assert losses[-1] < 0.98 * losses[0] and all(b < a for a, b in zip(losses, losses[3:], strict=False))
    frozen = {name: part for name, part in modules_of(components).items() if name not in TRAINED[stage]}
    before = modules_of(tiny_components(STAGES))
    assert len(frozen) >= 3 and all(same(part.state_dict(), before[name].state_dict()) for name, part in frozen.items())


def test_stage_three_trains_its_zero_skips_and_everything_before_them():
    components = tiny_components(STAGES)
    with torch.no_grad():
        for skip in (components.joints.visual_skip, components.joints.text_skip, components.joints.reference):
            skip.weight.zero_()
    task = TASKS["joint"](components, RUN.stage("joint"), 0)
    data = task.make_batch(range(8))
    task.loss(data, torch.Generator().manual_seed(1))[0].backward()
    grads = {name: p.grad for name, p in task.trained.named_parameters()}
    for name in ("joints.visual_skip.weight", "joints.text_skip.weight", "joints.reference.weight"):
        assert grads[name].abs().max() > 0, name
    asleep = {name for name, grad in grads.items() if grad is None}
    assert asleep <= {"flow.deep.start"}, "a document always begins with words"


def test_a_fresh_adapter_starts_at_the_scale_of_the_language_models_own_tower():
    components = tiny_components(STAGES[:4])
    task = TASKS["adapter"](components, RUN.stage("adapter"), 0)
    images = task.make_batch(range(40))[0][:TOWER_IMAGES]  # the stage's own
    with torch.no_grad():
        expected = components.vlm.see(images).square().mean().sqrt().item()
    task.initialise()
    assert components.joints.adapter.gain.tolist() == pytest.approx([expected] * 40)


def test_an_adapter_that_was_trained_before_keeps_its_scale_when_its_stage_starts_anew(tmp_path):
    folder = tiny_folder(tmp_path, STAGES[:5])
    gain = load_components(folder / "model").joints.adapter.gain
    still = replace(RUN.stage("adapter").optim, lr=0.0, matrix_lr=0.0)
    fit(with_stage("adapter", steps=1, optim=still), "adapter", folder, resume="none")
    assert torch.equal(load_components(folder / "model").joints.adapter.gain, gain)


def test_the_distance_to_the_tower_counts_and_is_reported_only_with_a_weight():
    cfg = tiny_model()
    components = wake(
        Components(replace(cfg, vlm=replace(cfg.vlm, vision_patch=4)), tiny_tokenizer()), 0.05
    )  # 8 x 8 tokens
    components.finished_stages = STAGES
    losses = {}
    for weight in (0.0, 0.5, 1.0):
        task = TASKS["adapter"](components, replace(RUN.stage("adapter"), distill=weight), 0)
        losses[weight] = task.loss(task.make_batch(range(4)), torch.Generator().manual_seed(1))
    assert losses[0.0][1] == {}
    distance = losses[1.0][1]["distance"].item()
    assert distance > 0
    for weight in (0.5, 1.0):
        assert losses[weight][0].item() == pytest.approx(losses[0.0][0].item() + weight * distance, rel=1e-5)


def test_a_distance_to_a_tower_that_sees_another_grid_is_refused_before_anything_is_trained():
    with pytest.raises(ConfigError, match=r"distill is 1.0.*\(4, 4\).*\(8, 8\)"):
        TASKS["adapter"](tiny_components(STAGES), replace(RUN.stage("adapter"), distill=1.0), 0)


def test_the_joint_loss_is_that_of_pictures_and_a_share_of_that_of_words():
    components = tiny_components(STAGES)
    losses = {}
    for weight in (0.0, 0.25, 2.0):
        task = TASKS["joint"](components, replace(RUN.stage("joint"), text_weight=weight), 0)
        loss, terms = task.loss(task.make_batch(range(4)), torch.Generator().manual_seed(1))
        losses[weight] = loss.item()
        assert loss.item() == pytest.approx((terms["flow"] + weight * terms["text"]).item())
    assert losses[2.0] > losses[0.25] > losses[0.0]
    assert RUN.stage("joint").text_weight == 0.25


def test_as_many_edits_are_predicted_blindly_as_is_asked():
    only_edits = mix_of(edit=0.5, chain=0.5)
    losses: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
    for share in (0.0, 1.0):
        components = tiny_components(STAGES)
        task = TASKS["joint"](
            components, replace(RUN.stage("joint"), hidden_latents_share=share, mix=only_edits, caption_drop=0.0), 0
        )
        losses.append(task.loss(task.make_batch(range(4)), torch.Generator().manual_seed(1)))
    (_, without), (loss, blind) = losses
    assert "blind" not in without and blind["blind"].abs() > 1e-3 and blind["flow"] != without["flow"]
    assert loss.item() == pytest.approx((blind["flow"] + 0.25 * blind["text"] + blind["blind"]).item(), abs=1e-5)


def task_near_t2i(components: Components, weight: float = 2.0) -> JointTask:
    return JointTask(components, replace(RUN.stage("joint"), kl_to_t2i=weight, caption_drop=0.0), 0)


def test_drawings_stay_near_those_of_the_flow_before_the_stage():
    components = tiny_components(STAGES[:5])
    for skip in (components.joints.visual_skip, components.joints.text_skip):
        torch.nn.init.zeros_(skip.weight)
    task = task_near_t2i(components)
    data = task.make_batch(range(8))
    loss, terms = task.loss(data, torch.Generator().manual_seed(1))
    assert abs(terms["kept"].item()) < 1e-6, "nothing has moved yet"
    wake(components.flow.deep, 0.02, seed=3)
    loss, terms = task.loss(data, torch.Generator().manual_seed(1))
    assert terms["kept"].item() > 1e-3
    assert loss.item() == pytest.approx((terms["flow"] + 0.25 * terms["text"] + 2 * terms["kept"]).item(), abs=1e-5)
    (slope,) = torch.autograd.grad(terms["kept"], [components.flow.deep.head.weight])
    with torch.no_grad():
        components.flow.deep.head.weight -= 0.01 * slope / slope.norm()
    assert task.loss(data, torch.Generator().manual_seed(1))[1]["kept"] < terms["kept"]


@pytest.mark.parametrize(("kind", "counts"), [("draw", True), ("story", False), ("edit", False)])
def test_only_images_alone_in_their_documents_stay_near_those_of_t2i(kind, counts):
    """Stage t2i has read captions, not the words a story begins with."""
    components = tiny_components(STAGES[:5])
    stage = replace(RUN.stage("joint"), kl_to_t2i=1.0, mix=mix_of(**{kind: 1.0}), caption_drop=0.0)
    task = TASKS["joint"](components, stage, 0)
    wake(components.flow.deep, 0.02, seed=3)
    _, terms = task.loss(task.make_batch(range(3)), torch.Generator().manual_seed(1))
    assert (terms["kept"].item() > 1e-3) if counts else (terms["kept"].item() == 0)


def test_the_distance_to_the_flow_of_t2i_is_measured_on_intermediate_latents_that_do_not_train():
    components = tiny_components(STAGES[:5])
    names = set(dict(task_near_t2i(components).trained.named_parameters()))
    whole = set(dict(task_near_t2i(components, 0.0).trained.named_parameters()))
    assert whole - names == {f"flow.shallow.{name}" for name, _ in components.flow.shallow.named_parameters()}


def test_a_stage_that_stays_near_the_flow_of_t2i_has_to_come_right_after_it():
    components = tiny_components(STAGES)
    task = task_near_t2i(components)
    with pytest.raises(ConfigError, match="has finished stage joint"):
        task.loss(task.make_batch(range(4)), torch.Generator().manual_seed(1))
    for wrong in ({"kl_to_t2i": -1.0}, {"kl_to_t2i": 1.0, "shard": ShardConfig(mode="fsdp", frozen="sharded")}):
        with pytest.raises(ConfigError, match="kl_to_t2i is"):
            replace(RUN.stage("joint"), **wrong)
    with pytest.raises(ConfigError, match="stage t2i"):
        replace(RUN.stage("t2i"), kl_to_t2i=1.0)


def test_images_that_are_shown_are_often_as_clean_as_uploads_and_often_as_noisy_as_drawings():
    task = JointTask(tiny_components(STAGES), RUN.stage("joint"), 0)
    _, batch = task.make_batch(range(24))
    levels = torch.stack([task.noise_levels(batch, torch.Generator().manual_seed(seed)) for seed in range(20)])
    shown, drawn = levels[:, ~batch.pictures.is_target], levels[:, batch.pictures.is_target]
    assert shown.numel() > 100 and drawn.numel() > 100
    for level, lowest, highest in ((shown, 0.4, 0.3), (drawn, 0.0, 0.5)):
        assert abs(float((level == 0.01).float().mean()) - lowest) < 0.12
        assert abs(float((level == 0.5).float().mean()) - highest) < 0.12
        assert level.min() >= 0.01 and level.max() <= 0.5


def kinds(**mix: float) -> set[str]:
    stage = replace(RUN.stage("joint"), mix=mix_of(**mix))
    return {joint_dialogue(stage, 0, i).kind for i in range(12)}


def test_documents_of_stage_three_are_mixed_as_the_config_says():
    parts = {name: kinds(**{name: 1.0}) for name in ("understand", "draw", "edit", "chain", "story")}
    assert parts["draw"] == {"draw"}
    assert not parts["understand"] & (parts["draw"] | parts["edit"] | parts["story"])
    assert not (parts["edit"] | parts["chain"]) & parts["story"] and not parts["edit"] & parts["chain"]
    assert kinds(draw=0.5, story=0.5) == parts["draw"] | parts["story"]
    for shares, message in (({"draw": -1.0}, "draw is -1.0; expected at least 0"), ({}, "MixConfig is")):
        with pytest.raises(ConfigError, match=message):
            kinds(**shares)


def test_captions_of_drawings_are_about_what_the_config_says_in_both_stages_that_draw():
    components, only = tiny_components(STAGES), CaptionConfig(**{name: float(name == "counting") for name in T2I_MIX})
    wanted = {caption_task(0, i, weights={"counting": 1.0}).prompt for i in range(8)}
    stage = replace(RUN.stage("joint"), mix=mix_of(draw=1.0), captions=only, caption_drop=0.0)
    assert {str(joint_dialogue(stage, 0, i).turns[0].user[0]) for i in range(8)} == wanted
    task = T2iTask(components, replace(RUN.stage("t2i"), captions=only, caption_drop=0.0), 0)
    _, prompts = task.make_batch(range(8))
    assert prompts == [
        components.tokenizer.drawing_prompt(caption_task(0, i, weights={"counting": 1.0}).prompt) for i in range(8)
    ]
    assert asdict(CaptionConfig()) == dict(T2I_MIX)
    with pytest.raises(ConfigError, match=r"counting is -1\.0; expected at least 0"):
        CaptionConfig(counting=-1.0)
    with pytest.raises(ConfigError, match="CaptionConfig is"):
        CaptionConfig(**dict.fromkeys(T2I_MIX, 0.0))


def test_a_conversation_with_words_that_the_model_never_learnt_is_respelled_or_replaced():
    components = tiny_components(STAGES)
    components.vocabulary = frozenset({"a", "red", "large", "star", "heart"})

    def spoken(*texts: str) -> Dialogue[Scene]:
        return Dialogue((Turn(texts, ("a red star",)),), "words")

    texts = {0: "a big red star", 1: "a violet star", 2: "a violet heart"}
    documents = Documents.of(components, lambda i: spoken(texts.get(i, "a red heart" if i % 2 else "a mauve heart")))
    plain = Documents.of(components, lambda i: spoken(("a large red star", "a red heart")[i]))
    assert documents(range(2))[1].ids.tolist() == plain(range(2))[1].ids.tolist()
    with pytest.raises(TrainingError, match="none has only words that the language model learnt \\(5 words\\)"):
        documents(range(2, 3))


def test_the_first_steps_have_a_mix_of_their_own():
    warmup = WarmupMixConfig(steps=2, mix=mix_of(draw=1.0))
    stage = replace(RUN.stage("joint"), mix=mix_of(story=1.0), warmup_mix=warmup)
    assert {joint_dialogue(stage, 0, i).kind for i in range(2 * stage.batch)} == {"draw"}
    assert {joint_dialogue(stage, 0, 2 * stage.batch + i).kind for i in range(2 * stage.batch)} == {"story"}


def test_the_end_of_nano_is_the_control_that_helped_and_its_length_comes_from_joint():
    joint, end, final = (nano().stage(name) for name in ("joint", "end", "final"))
    assert (end.optim.lr, end.optim.matrix_lr, end.optim.decay_share, end.kl_to_t2i) == (6e-4, 9e-4, 1.0, 0)
    assert joint.steps + end.steps == 4200 and end.keep_as == "nano-heldout" and not end.everything
    assert end.mix.draw > joint.mix.draw and end.mix.edit == joint.mix.edit, "edits are held"
    assert sum(asdict(end.mix).values()) == pytest.approx(1) and final.everything


def drawing_dialogue() -> Dialogue:
    """The user shows an image and says something; the model draws, says something and draws again."""
    a, b, c = (caption_task(0, i).scene for i in range(3))
    return Dialogue((Turn((a, "a red circle"), (b,)), Turn(("a blue star",), ("here", c))), "edit")


def test_of_dropped_dialogues_the_words_of_the_user_go_and_half_of_the_time_the_images_too():
    dialogue, counts = drawing_dialogue(), {"whole": 0, "shown": 0, "nothing": 0}
    for index in range(600):
        result = drop_words(dialogue, stream(0, index, 99), 0.5)
        assert result.kind == "edit" and result.pictures[-2:] == dialogue.pictures[-2:]
        user = tuple(turn.user for turn in result.turns)
        images = ((dialogue.turns[0].user[0],), ())
        counts[{user == images: "shown", user == ((), ()): "nothing", result == dialogue: "whole"}[True]] += 1
    assert abs(counts["whole"] - 300) < 50 and abs(counts["shown"] - 150) < 50 and abs(counts["nothing"] - 150) < 50


def test_answers_in_words_are_never_asked_without_their_question_and_no_share_drops_nothing():
    words = Dialogue((Turn((caption_task(0, 0).scene, "a red circle"), ("yes",)),), "picture")
    assert all(drop_words(words, stream(0, i, 99), 1.0) is words for i in range(20))
    story = story_dialogue(story_task(0, 0))  # a question is its last turn
    for dialogue in (drawing_dialogue(), story):
        assert all(drop_words(dialogue, stream(0, i, 99), 0.0) is dialogue for i in range(20))
        for i in range(20):
            turns = drop_words(dialogue, stream(0, i, 99), 1.0).turns
            assert not any(isinstance(part, str) for turn in turns for part in (*turn.user, *turn.assistant))
            assert all(turn.assistant for turn in turns)


def test_a_dropped_drawing_is_read_as_the_unconditional_branch_of_guidance():
    components = tiny_components(STAGES)
    dropped = Dialogue((Turn((), (caption_task(0, 0).scene,)),), "draw")
    (user, assistant, *_), prompt = (
        components.tokenizer.document(dropped.turns),
        components.tokenizer.drawing_prompt(""),
    )
    assert [*user.ids, *assistant.ids, components.layout.begin] == prompt


def test_a_scene_is_shown_and_drawn_as_it_is_rendered():
    components = tiny_components(STAGES)
    stage = replace(RUN.stage("joint"), mix=mix_of(edit=0.5, chain=0.5), caption_drop=0.0)
    images, batch = TASKS["joint"](components, stage, 0).make_batch(range(1, 4))
    scenes = [s for i in range(1, 4) for s in joint_dialogue(stage, 0, i).pictures]
    assert all(isinstance(s, Scene) for s in scenes) and len(images) == len(scenes) == len(batch.pictures)
    assert all(torch.equal(to_bytes(image), to_bytes(render(s))) for image, s in zip(images, scenes, strict=True))
    turns = [len(joint_dialogue(stage, 0, i).turns) for i in range(1, 4)]
    assert max(turns) > 1, "of edits in chains, too"
    assert batch.pictures.is_target.tolist() == [flag for n in turns for flag in (False, *n * (True,))]


def test_the_final_stage_alone_shows_what_dev_and_test_hold_out():
    stage = replace(nano().stage("final"), mix=mix_of(draw=0.5, edit=0.5), caption_drop=0.0)
    scenes = [scene for i in range(150) for scene in joint_dialogue(stage, 0, i).pictures]
    assert set().union(*(WITHHELD["train"].rows_of(scene) for scene in scenes)) >= {"pair", "fact", "shapes"}
    guarded = replace(nano().stage("joint"), mix=stage.mix, warmup_mix=WarmupMixConfig(), caption_drop=0.0)
    scenes = [scene for i in range(60) for scene in joint_dialogue(guarded, 0, i).pictures]
    assert not any(WITHHELD["train"].rows_of(scene) for scene in scenes)
    with pytest.raises(ConfigError, match="expected stage final"):
        replace(guarded, everything=True)


def test_conversations_about_images_begin_with_the_easy_kinds():
    early = WarmupTalkConfig(steps=2, mix=talk_of(places=1.0))
    stage = replace(RUN.stage("vlm"), talk=talk_of(sides=1.0), warmup_talk=early)
    assert {talk_dialogue(stage, 0, i).kind for i in range(2 * stage.batch)} == {"places"}
    assert {talk_dialogue(stage, 0, 2 * stage.batch + i).kind for i in range(8)} == {"sides"}


def talk_of(**shares: float) -> TalkConfig:
    return TalkConfig(**{f.name: 0.0 for f in fields(TalkConfig)} | shares)


def test_a_drawing_that_is_only_read_is_neither_target_nor_label():
    components = tiny_components(STAGES)
    checks = (check_dialogue(3, i) for i in range(40))
    dialogue = next(d for d in checks if not d.turns[0].learns and d.kind == "check")
    _, batch = Documents.of(components, lambda index: dialogue)(range(1))
    assert not batch.pictures.is_target.any() and (batch.labels != IGNORE).sum() < 4 * len(dialogue.turns)
    assert drop_words(dialogue, stream(0), 1.0) == dialogue, "its words stay"


def test_a_model_is_kept_under_the_name_of_its_stage_and_a_run_goes_on_where_it_stopped(tmp_path):
    components = tiny_components(STAGES[:2])
    save_components(components.named("held"), tmp_path / "held")
    assert load_components(tmp_path / "held").cfg.name == "held" and components.cfg.name != "held"
    save_components(components, tmp_path / "model")
    names = [stage.name for stage in nano().stages]
    assert unfinished_stages(nano(), tmp_path) == [name for name in names if name not in STAGES[:2]]
    assert unfinished_stages(nano(), tmp_path / "elsewhere") == names


def test_a_model_is_kept_as_the_mean_with_an_earlier_one(tmp_path):
    run = with_stage(steps=2, keep_as="both", mean_with="before")
    save_components(tiny_components(STAGES[:3]), tmp_path / "model")
    save_components(tiny_components(STAGES[:3], scale=0.02).named("before"), tmp_path / "before")
    fit(run, "t2i", tmp_path)
    after, before, both = (dict(load_components(tmp_path / n).named_parameters()) for n in ("model", "before", "both"))
    moved = [name for name in both if not torch.equal(before[name], after[name])]
    assert any(name.startswith("flow.") for name in moved) and read_config(tmp_path / "both").model.name == "both"
    for name, mean in both.items():
        assert torch.equal(mean, ((before[name].double() + after[name].double()) / 2).float()), name


def test_a_mean_without_its_other_model_is_refused_before_training(tmp_path):
    save_components(tiny_components(STAGES[:3]), tmp_path / "model")
    run = with_stage(steps=2, keep_as="both", mean_with="before")
    with pytest.raises(TrainingError, match=r"keeps the mean with before, but there is no .*before; put that model"):
        fit(run, "t2i", tmp_path)
    other = replace(run.model, flow=replace(run.model.flow, latent_penalty=0.5))
    save_components(Components(other, tiny_tokenizer()), tmp_path / "before")
    with pytest.raises(TrainingError, match="another flow"):
        fit(run, "t2i", tmp_path)
    assert not (tmp_path / "metrics-t2i.jsonl").exists()
    with pytest.raises(ConfigError, match="mean_with is 'before' without keep_as"):
        with_stage(mean_with="before")
