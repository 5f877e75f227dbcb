"""Likelihood as a tool: parts add up to the whole, a code is its picture, and words move it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model_cases import STAGES, tiny_components
from starflow2.core.dialogue import Turn
from starflow2.errors import ConfigError
from starflow2.flow.affine import standard_normal_log_prob
from starflow2.inference.config import DrawConfig, ReplyLimits
from starflow2.inference.conversations import generate_replies
from starflow2.inference.events import DecodedImage, Token
from starflow2.inference.likelihood import decode_code, invert, score
from starflow2.inference.sampler import Sampler
from starflow2.inference.session import Session
from starflow2.models.joint_stream import read_documents
from starflow2.models.sequence import Image as Slot
from starflow2.models.sequence import Text, pack
from starflow2.pipeline import StarFlow2
from starflow2.training.losses import joint_loss, ntp_loss

SIDE, SIZE, DIMS = 2, 16, 16


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(tiny_components(STAGES, side=SIDE), DrawConfig(guidance=1.0, prior_scale=0.8, precision="float64"))


def photo(seed: int = 0) -> Tensor:
    return torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noisy(sampler: Sampler, image: Tensor, level: float) -> Tensor:
    """Latents (1, N, D) of a picture with noise of seed 0."""
    x = sampler.components.codec_in_float64().encode(image[None].double())
    return x + level * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


# -- adding up


def test_patches_and_the_shallow_volume_add_up_to_a_picture_and_parts_to_a_reply(sampler):
    found = score(sampler, ["a red circle"], ["two red hearts", photo(0), "a blue star", photo(1)])
    assert len(found.pictures) == 2
    for picture in found.pictures:
        assert picture.patches.shape == (SIDE, SIDE) and picture.dims == DIMS
        assert float(picture.patches.sum()) + picture.shallow_logdet == pytest.approx(picture.log_prob, abs=1e-8)
        assert picture.nats_per_dim == pytest.approx(-picture.log_prob / DIMS)
    parts = [t.log_prob for t in found.tokens] + [p.log_prob for p in found.pictures]
    assert found.log_prob == pytest.approx(sum(parts))


def test_tokens_are_those_of_the_reply_with_each_picture_as_its_begin_and_an_end_at_last(sampler):
    found = score(sampler, ["a red circle", photo(2)], ["two red hearts", photo(0), "a blue star"])
    tokenizer = sampler.components.tokenizer
    words = [tokenizer.encode(text) for text in ("two red hearts", "a blue star")]
    expected = [*words[0], sampler.layout.begin, *words[1], sampler.components.cfg.vlm.special.end]
    assert [t.text for t in found.tokens] == [tokenizer.tokenizer.id_to_token(i) for i in expected]
    assert len(found.pictures) == 1, "what the user shows is not part of the reply"


def test_a_reply_of_words_scores_what_the_next_token_loss_says(sampler):
    found = score(sampler, ["a red circle"], ["two red hearts"])
    batch = pack(
        [sampler.components.tokenizer.document([Turn(("a red circle",), ("two red hearts",))])], sampler.layout
    )
    with torch.no_grad():
        out = read_documents(sampler.pretzel, batch, torch.zeros(0, 4, 4, dtype=torch.float64), torch.zeros(0))
    assert -found.log_prob == pytest.approx(
        len(found.tokens) * ntp_loss(out.head, (out.h, out.g), batch.labels).item(), abs=1e-4
    )


@pytest.mark.parametrize("level", [None, 0.5])
def test_a_drawn_picture_scores_what_the_loss_of_pictures_says(sampler, level):
    found = score(sampler, ["a red circle"], [photo()], noise_level=level).pictures[0]
    used = 0.01 if level is None else level
    assert found.noise_level == used
    batch = pack([sampler.components.tokenizer.document([Turn(("a red circle",), (photo(),))])], sampler.layout)
    levels = torch.tensor([used], dtype=torch.float64)
    with torch.no_grad():
        noise = sampler.components.cfg.noise
        loss = joint_loss(sampler.pretzel, batch, (noisy(sampler, photo(), used), levels), noise).flow
    assert found.nats_per_dim == pytest.approx(loss.item() / used + 0.5 * math.log(2 * math.pi), abs=1e-8)


def test_the_chain_rule_holds_word_by_word(sampler):
    """log p(a b) = log p(a) + log p(b | a): each token given all before it, however the reply goes on."""
    long = score(sampler, ["a red circle"], ["two red hearts left of a blue star"]).tokens
    short = score(sampler, ["a red circle"], ["two red hearts"]).tokens
    assert [t.log_prob for t in long[: len(short) - 1]] == pytest.approx([t.log_prob for t in short[:-1]], abs=1e-9)
    assert all(t.log_prob < 0 for t in long)


def test_words_written_without_chance_are_the_likeliest_at_every_step_of_one_pass(sampler):
    """Step by step through the cache, and all at once: both skips open, each token from what stands before it."""
    seen: list[int] = []
    generate_replies(
        sampler, [[["a red circle", photo()]]], [0], ReplyLimits(tokens=6, pictures=0),
        watch=lambda event: seen.append(event.id) if isinstance(event, Token) else None,
    )  # fmt: skip
    s = sampler.components.cfg.vlm.special
    said = Text((s.user, *sampler.components.tokenizer.encode("a red circle")))
    document = [said, Slot(), Text((s.assistant,)), Text(tuple(seen), is_target=True)]
    level = torch.tensor([0.01], dtype=torch.float64)
    with torch.no_grad():
        logits = read_documents(
            sampler.pretzel, pack([document], sampler.layout), noisy(sampler, photo(), 0.01), level
        ).logits
    logits[:, [s.pad, s.user, s.assistant, s.vision_start, s.vision_end, s.image_pad]] = -torch.inf
    logits[:, sampler.components.tokenizer.vocab :] = -torch.inf
    assert len(seen) > 2 and logits.argmax(1).tolist() == seen


def test_the_chances_of_all_next_tokens_are_one(sampler):
    base = score(sampler, ["a red circle"], ["two"]).tokens[0].log_prob
    batch = pack([sampler.components.tokenizer.document([Turn(("a red circle",), ("two",))])], sampler.layout)
    with torch.no_grad():
        out = read_documents(sampler.pretzel, batch, torch.zeros(0, 4, 4, dtype=torch.float64), torch.zeros(0))
    chances = out.logits[0].detach().softmax(-1)
    assert float(chances.sum()) == pytest.approx(1) and base == pytest.approx(float(chances[out.labels[0]].log()))


def test_a_picture_scores_the_same_whatever_was_said_after_it_and_not_whatever_was_said_before(sampler):
    first, other = (
        score(sampler, ["a red circle"], [photo(), words]).pictures[0].log_prob
        for words in ("a ring", "two red hearts")
    )
    assert first == pytest.approx(other, abs=1e-9)  # rows of different lengths: not the same computation
    assert abs(score(sampler, ["a blue star"], [photo()]).pictures[0].log_prob - first) > 1e-3
    assert abs(score(sampler, ["a red circle", photo(5)], [photo()]).pictures[0].log_prob - first) > 1e-3


def test_what_a_picture_scores_does_not_depend_on_how_many_there_are_before_it(sampler):
    """The noise of a picture is its own: a reply of the same picture twice scores each at the same latents."""
    one, two = score(sampler, [], [photo(), photo()]).pictures
    # the codec encodes both rows in one batch and in float32: kernels may round them differently
    assert one.shallow_logdet == pytest.approx(two.shallow_logdet, abs=1e-5) and one.log_prob != two.log_prob


def test_the_levels_of_what_is_shown_and_what_is_drawn_are_their_own(sampler):
    low, high = (score(sampler, [photo(1)], [photo()], noise_level=level).pictures[0] for level in (None, 0.5))
    assert (low.noise_level, high.noise_level) == (0.01, 0.5) and low.log_prob != high.log_prob


def test_an_empty_reply_is_refused(sampler):
    with pytest.raises(ConfigError, match="the reply is empty"):
        score(sampler, ["a red circle"], [])


def test_the_face_of_a_model_scores_what_scoring_does_and_hears_capitals_like_everything_else(sampler):
    model = StarFlow2(sampler.components)
    plain = model.score(["a red circle"], ["two red hearts", photo()])
    assert plain.log_prob == pytest.approx(score(sampler, ["a red circle"], ["two red hearts", photo()]).log_prob)
    assert model.score(["A  RED circle"], ["two Red hearts", photo()]).log_prob == plain.log_prob


# -- codes


def test_a_code_gives_the_picture_back_that_the_codec_would(sampler):
    code = invert(sampler, photo(), "a red circle")
    again = decode_code(sampler, code.z, "a red circle")
    x = noisy(sampler, photo(), 0.5)
    assert (again.x - x[0]).abs().max() <= 1e-6
    assert (again.image - sampler.components.codec.decode(x.float())[0]).abs().max() <= 1e-4
    assert code.log_prob == pytest.approx(float(standard_normal_log_prob(code.z[None])[0]))


def test_another_prompt_makes_another_picture_of_a_code_and_another_code_of_a_picture(sampler):
    code = invert(sampler, photo(), "a red circle")
    same, other, none = (decode_code(sampler, code.z, prompt) for prompt in ("a red circle", "two red hearts", ""))
    assert (same.u - other.u).abs().max() > 1e-3 and (same.u - none.u).abs().max() > 1e-3
    assert (invert(sampler, photo(), "two red hearts").z - code.z).abs().max() > 1e-3
    assert (invert(sampler, photo(1), "a red circle").z - code.z).abs().max() > 1e-3


def test_a_picture_can_be_inverted_without_words(sampler):
    code = invert(sampler, photo(), "")
    assert (decode_code(sampler, code.z, "").x - noisy(sampler, photo(), 0.5)[0]).abs().max() <= 1e-6


def test_the_code_of_a_drawn_picture_is_what_it_was_drawn_from(sampler):
    """Without guidance a drawing is the flow's inverse; its z comes back from u."""
    plain = Sampler(sampler.components, DrawConfig(guidance=0.0, prior_scale=0.8, precision="float64"))
    (((picture,),),) = generate_replies(plain, [[["a red circle"]]], [5], ReplyLimits(tokens=0, pictures=1), draws=True)
    assert isinstance(picture, DecodedImage)
    batch = pack([sampler.components.tokenizer.document([Turn(("a red circle",), (photo(),))])], sampler.layout)
    with torch.no_grad():
        out = read_documents(plain.pretzel, batch, picture.x[None], torch.tensor([0.5], dtype=torch.float64))
    z = 0.8 * torch.randn(4, 4, generator=torch.Generator().manual_seed(5))
    assert (out.z[0] - z).abs().max() <= 1e-6


def test_a_sampler_with_a_code_leaves_the_one_it_came_from_alone(sampler):
    before = Session(sampler).add("a red circle").draw().picture.u
    twin = sampler.with_code(torch.zeros(4, 4))
    assert twin.config.guidance == 0 and sampler.config.guidance == 1
    assert torch.equal(Session(sampler).add("a red circle").draw().picture.u, before)
