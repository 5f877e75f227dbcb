"""Conversations side by side: every row is what a session alone would be, whatever its neighbours do."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model_cases import STAGES, tiny_components
from starflow2.core.dialogue import Turn
from starflow2.errors import ConfigError, PromptError
from starflow2.inference.config import DrawConfig, ReplyLimits
from starflow2.inference.conversations import ReplyPart, UserTurns, generate_replies, reply_after
from starflow2.inference.events import Completed, DecodedImage, Ended, RowEvent, Stepped
from starflow2.inference.reading import Part, PastTurn
from starflow2.inference.sampler import Sampler
from starflow2.inference.session import Session
from starflow2.models.joint_stream import read_documents
from starflow2.models.sequence import pack

SIDE, SIZE = 2, 16


def sampler_of(batch: int = 32, guidance: float = 1.0) -> Sampler:
    config = DrawConfig(guidance=guidance, prior_scale=0.8, batch=batch, precision="float64")
    return Sampler(tiny_components(STAGES, side=SIDE), config)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return sampler_of()


def photo(seed: int) -> Tensor:
    return torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


TALKS: list[UserTurns] = [
    [["a red circle"], ["a small black diamond left of two blue stars"], ["a blue star"]],
    [[photo(0), "a green ring"], ["a blue star", photo(1)]],
    [["two red hearts", photo(2), "a red circle", photo(3)]],
    [["a photo of a large blue star left of a small green ring on a gray background"], []],
]
SEEDS = [3, 0, 11, 4]


def alone(
    sampler: Sampler, talk: UserTurns, seed: int, replying: ReplyLimits, draws: bool = False
) -> list[list[ReplyPart]]:
    """The same talk through a session of its own."""
    session = Session(sampler, seed)
    told: list[list[ReplyPart]] = []
    for turn in talk:
        if turn:
            session.add(*turn)
        before = len(session.pieces)
        if draws:
            session.draw()
        else:
            list(session.run(tokens=replying.tokens, pictures=replying.pictures, temperature=replying.temperature))
        told.append([p.text if p.picture is None else p.picture for p in session.pieces[before:]])  # type: ignore[misc]
    return told


def assert_equal(mine: Sequence[Sequence[ReplyPart]], theirs: Sequence[Sequence[ReplyPart]]) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip((b for turn in mine for b in turn), (b for turn in theirs for b in turn), strict=True):
        if isinstance(a, str):
            assert a == b
        else:
            assert isinstance(b, DecodedImage)
            assert (a.u - b.u).abs().max() <= 1e-4 and (a.image - b.image).abs().max() <= 1e-4
            assert a.log_prob == pytest.approx(b.log_prob, abs=1e-3)
            assert a.unconditional_log_prob == pytest.approx(b.unconditional_log_prob, abs=1e-3)


def mixed(sampler: Sampler) -> Sampler:
    """A sampler with which some states of the conversation call for an image and others for words."""
    begin, twin = sampler.layout.begin, copy.copy(sampler)

    def change(logits: Tensor) -> Tensor:
        logits[:, begin] += torch.where(logits[:, 40] > logits[:, 41], 50.0, -50.0)
        return logits

    twin.adjust_logits = change
    return twin


def test_rows_that_draw_are_sessions_that_draw(sampler):
    told = generate_replies(sampler, TALKS, SEEDS, ReplyLimits(tokens=0, pictures=1), draws=True)
    assert [[len(turn) for turn in talk] for talk in told] == [[1, 1, 1], [1, 1], [1], [1, 1]]
    for talk, seed, mine in zip(TALKS, SEEDS, told, strict=True):
        assert_equal(mine, alone(sampler, talk, seed, ReplyLimits(tokens=0, pictures=1), draws=True))


def test_linear_guidance_leaves_the_first_latent_of_every_picture_alone_and_guides_the_rest(sampler):
    def drawn(**changes: object) -> Tensor:
        at = Sampler(sampler.components, replace(sampler.config, **changes))  # type: ignore[arg-type]
        told = generate_replies(at, TALKS[:1], SEEDS[:1], ReplyLimits(pictures=1), draws=True)
        return torch.stack([turn[0].u for turn in told[0]])  # type: ignore[union-attr]

    free, guided = drawn(guidance=0.0), drawn(guidance=2.0, schedule="linear")
    assert (guided[0, 0] - free[0, 0]).abs().max() <= 1e-9
    assert ((guided - free)[0, 1:].abs().amax(-1) > 1e-3).all()
    constant = drawn(guidance=2.0)
    assert (constant[:, 0] - free[:, 0]).abs().max() > 1e-3 and (constant - guided).abs().max() > 1e-2


def test_a_picture_that_follows_another_has_a_guidance_of_its_own(sampler):
    def drawn(talk: UserTurns, **changes: object) -> list[DecodedImage]:
        at = Sampler(sampler.components, replace(sampler.config, **changes))  # type: ignore[arg-type]
        told = generate_replies(at, [talk], [3], ReplyLimits(tokens=0, pictures=1), draws=True)[0]
        return [turn[0] for turn in told]  # type: ignore[misc]

    both, strong, weak = ({"guidance": 2.0, "edit_guidance": 0.5}, {"guidance": 2.0}, {"guidance": 0.5})
    assert torch.equal(drawn([[photo(0), "a ring"]], **both)[0].u, drawn([[photo(0), "a ring"]], **weak)[0].u)
    first, second = drawn(TALKS[0][:2], **both)
    assert torch.equal(first.u, drawn(TALKS[0][:1], **strong)[0].u)
    assert (second.u - drawn(TALKS[0][:2], **strong)[1].u).abs().max() > 1e-3
    off = drawn([[photo(0), "a ring"]], guidance=2.0, edit_guidance=0.0)[0]
    assert (off.u - drawn([[photo(0), "a ring"]], guidance=0.0)[0].u).abs().max() <= 1e-9


def test_a_guidance_that_is_given_guides_edits_too(sampler):
    components = copy.copy(sampler.components)
    components.cfg = replace(components.cfg, guidance=2.0, edit_guidance=1.0)
    strengths = [DrawConfig.for_model(components).strength(follows=f) for f in (False, True)]
    assert strengths == [2.0, 1.0]
    assert DrawConfig.for_model(components, guidance=3.0).strength(follows=True) == 3.0
    assert DrawConfig.for_model(components, guidance=3.0, edit_guidance=0.5).strength(follows=True) == 0.5
    with pytest.raises(ConfigError, match="edit_guidance is -1"):
        DrawConfig(edit_guidance=-1.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_in_which_the_model_decides_are_sessions_in_which_it_decides(sampler, temperature):
    sampler = mixed(sampler)
    replying = ReplyLimits(tokens=5, pictures=1, temperature=temperature)
    told = generate_replies(sampler, TALKS, SEEDS, replying)
    kinds = {tuple(type(b).__name__ for b in turn) for talk in told for turn in talk}
    assert len(kinds) > 1 and any("DecodedImage" in kind for kind in kinds) and any("str" in kind for kind in kinds)
    for talk, seed, mine in zip(TALKS, SEEDS, told, strict=True):
        assert_equal(mine, alone(sampler, talk, seed, replying))


def test_the_size_of_a_batch_and_the_order_of_its_rows_change_nothing(sampler):
    replying = ReplyLimits(tokens=0, pictures=1)
    whole = generate_replies(sampler, TALKS, SEEDS, replying, draws=True)
    for parts, order in ((sampler_of(batch=2), range(4)), (sampler, (3, 1, 0, 2))):
        told = generate_replies(parts, [TALKS[i] for i in order], [SEEDS[i] for i in order], replying, draws=True)
        for i, mine in zip(order, told, strict=True):
            assert_equal(mine, whole[i])


def test_a_row_hears_its_own_words_pictures_and_seed_and_nothing_else(sampler):
    replying = ReplyLimits(tokens=0, pictures=1)
    (first,), (again,), (words,), (shown,), (seed,) = generate_replies(
        sampler,
        [[["a red circle", photo(0)]], [["a red circle", photo(0)]], [["a blue star", photo(0)]],
         [["a red circle", photo(1)]], [["a red circle", photo(0)]]],
        [1, 1, 1, 1, 2],
        replying,
        draws=True,
    )  # fmt: skip
    assert_equal([first], [again])
    for other in (words, shown, seed):
        assert (other[0].u - first[0].u).abs().max() > 1e-3


def test_watch_hears_every_event_of_every_row(sampler):
    heard: list[RowEvent] = []
    generate_replies(sampler, TALKS, SEEDS, ReplyLimits(tokens=0, pictures=1), draws=True, watch=heard.append)
    turns = [len(talk) for talk in TALKS]
    for row, count in enumerate(turns):
        mine = [e for e in heard if e.row == row]
        assert sum(isinstance(e, Completed) for e in mine) == sum(isinstance(e, Ended) for e in mine) == count
        assert [e.done for e in mine if isinstance(e, Stepped)] == [1, 2, 3, 4] * count


def test_words_alone_give_words_alone(sampler):
    told = generate_replies(sampler, TALKS[:2], [0, 0], ReplyLimits(tokens=4, pictures=0))
    assert all(isinstance(b, str) for talk in told for turn in talk for b in turn)


def test_no_talks_give_no_replies_and_unequal_numbers_are_refused(sampler):
    assert generate_replies(sampler, [], [], ReplyLimits()) == []
    with pytest.raises(ConfigError, match="4 conversations and 1 seeds"):
        generate_replies(sampler, TALKS, [1], ReplyLimits())


def test_a_reply_that_begins_with_a_picture_needs_room_for_one(sampler):
    with pytest.raises(ConfigError, match="pictures is 0"):
        generate_replies(sampler, TALKS, SEEDS, ReplyLimits(tokens=3, pictures=0), draws=True)


@pytest.mark.parametrize("limits", [{"tokens": -1}, {"tokens": 0, "pictures": 0}, {"temperature": -0.5}], ids=str)
def test_limits_that_leave_nothing_to_say_are_refused(limits):
    with pytest.raises(ConfigError, match=r"expected (at least 0|room)"):
        ReplyLimits(**limits)


# -- after a past that others made


def likeliest(sampler: Sampler, past: list[PastTurn], question: list[Part]) -> str:
    """The first word of a reply, from one pass over the whole conversation with some word in its place."""
    word, tokenizer = "star", sampler.components.tokenizer
    turns = [Turn(tuple(asked), tuple(told)) for asked, told in (*past, (question, [word]))]  # type: ignore[type-var]
    images = [part for turn in turns for part in (*turn.user, *turn.assistant) if not isinstance(part, str)]
    levels = torch.full((len(images),), sampler.upload_level, dtype=sampler.dtype)
    deep = sampler.components.cfg.flow.deep
    x = sampler.noisy(torch.stack(images), levels) if images else torch.zeros(0, deep.num_latents, deep.dim)
    with torch.no_grad():
        out = read_documents(
            sampler.pretzel, pack([tokenizer.document(turns)], sampler.layout), x.to(sampler.dtype), levels
        )
        logits = out.head(out.h, out.g)[-1 - len(tokenizer.encode(word))]
    s = sampler.components.cfg.vlm.special
    logits[[s.pad, s.user, s.assistant, s.end, s.vision_end, s.image_pad, sampler.layout.begin]] = -torch.inf
    logits[tokenizer.vocab :] = -torch.inf
    logits[unsayable(sampler)] = -torch.inf
    return tokenizer.decode([int(logits.argmax())]).rstrip("\ufffd \n")


def unsayable(sampler: Sampler) -> list[int]:
    """Tokens that are no text on their own: parts of characters and blanks."""
    tokenizer = sampler.components.tokenizer
    return [i for i in range(tokenizer.vocab) if not tokenizer.decode([i]).rstrip("\ufffd \n")]


def speaking(sampler: Sampler) -> Sampler:
    """A sampler whose replies do not end by themselves, so that every one has a word to compare."""
    twin, silent = copy.copy(sampler), [sampler.components.cfg.vlm.special.end, *unsayable(sampler)]

    def change(logits: Tensor) -> Tensor:
        logits[:, silent] = -torch.inf
        return logits

    twin.adjust_logits = change
    return twin


def test_a_reply_after_a_past_is_what_one_pass_over_it_all_finds_likeliest(sampler):
    pasts: list[list[PastTurn]] = [
        [(["a red circle"], ["two red hearts", photo(0)]), (["a blue star"], [photo(1)])],
        [],
        [(["a green ring", photo(2)], ["a blue star"])],
        [(["a red circle"], ["a blue star"])] * 3,
    ]
    asked: list[list[Part]] = [["a blue star"], ["a red circle", photo(3)], ["two red hearts"], ["a green ring"]]
    replying = ReplyLimits(tokens=1, pictures=0)
    told = ["".join(map(str, blocks)) for blocks in reply_after(speaking(sampler), pasts, asked, replying)]
    assert told == [likeliest(sampler, past, question) for past, question in zip(pasts, asked, strict=True)]
    assert len(set(told)) > 1 and "" not in told
    two = speaking(Sampler(sampler.components, replace(sampler.config, batch=2)))
    chunks = reply_after(two, pasts, asked, replying)
    assert ["".join(map(str, blocks)) for blocks in chunks] == told


def test_as_many_pasts_as_questions(sampler):
    with pytest.raises(ConfigError, match="1 pasts and 2 questions"):
        reply_after(sampler, [[]], [["a star"], ["a ring"]], ReplyLimits(tokens=1, pictures=0))


def test_a_talk_longer_than_the_model_reads_is_refused_before_anything_is_read(sampler):
    small = copy.copy(sampler)
    small.components = copy.copy(sampler.components)
    small.components.cfg = replace(sampler.components.cfg, max_positions=40)
    with pytest.raises(PromptError, match="conversation 1 has 1 positions, this needs"):
        generate_replies(small, [[["a star"]], [["a blue star " * 20]]], [0, 0], ReplyLimits(tokens=2, pictures=0))
    assert generate_replies(small, [[["a star"]]], [0], ReplyLimits(tokens=2, pictures=0))
