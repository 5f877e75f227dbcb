"""The baseline: with frozen text experts it still is the language model, and its likelihoods are as exact as ours."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from helpers import wake
from model_cases import LATENT, STAGES, tiny_components, tiny_tokenizer
from starflow2.errors import ConfigError
from starflow2.flow import NoiseConfig
from starflow2.inference.config import DrawConfig, ReplyLimits
from starflow2.inference.engine import Engine
from starflow2.inference.events import Completed, Token
from starflow2.inference.sampler import Sampler
from starflow2.models.components import Components
from starflow2.models.joint_stream import States, read_documents
from starflow2.models.sequence import Batch, Document, Image, Text, pack
from starflow2.nn import num_parameters
from starflow2.research.mot import Mot, MotComponents, Trains, matched_width
from starflow2.training.losses import joint_loss
from starflow2.training.recipes import nano_model
from stream_cases import Recording

LONG: Document = (
    Text((1, 30, 31)), Image(), Text((40, 41, 2)), Image(is_target=True), Text((50, 51, 3), is_target=True),
    Text((1, 60, 2)), Image(is_target=True), Text((3,), is_target=True),
)  # fmt: skip
CAPTION: Document = (Text((1, 30, 31, 32, 2)), Image(is_target=True), Text((3,), is_target=True))
WORDS: Document = (Text((1, 80, 81, 2)), Text((90, 91, 3), is_target=True))


SIDE = 4
COUNT = SIDE * SIDE


def a_mot(text: Trains = "frozen", scale: float = 0.05, side: int = SIDE) -> MotComponents:
    """A woken baseline whose text experts still are the language model."""
    components = MotComponents(tiny_components(STAGES, side=side), text)
    for i, module in enumerate((components.vlm.visual, components.flow, components.joints)):
        wake(module, scale, seed=i)
    components.finished_stages = STAGES
    return components.eval()


def pictures(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Noisy latents (P, N, D) and their levels (P,)."""
    x = torch.randn(count, COUNT, LATENT, generator=torch.Generator().manual_seed(seed))
    return x, torch.linspace(0.1, 0.5, count)


def states_of(mot: Mot, batch: Batch, x: Tensor, levels: Tensor) -> States:
    stream = Recording(mot)
    with torch.no_grad():
        read_documents(stream, batch, x, levels)
    return stream.states(None)[0]


# -- text ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_without_pictures_the_logits_are_those_of_the_language_model():
    components, mot = tiny_components(STAGES, side=SIDE), a_mot()
    batch = pack([WORDS, (Text(tuple(range(20, 60)), is_target=True),)], components.layout)
    out = read_documents(mot.pretzel, batch, *pictures(0))
    real = components.vlm.states(components.vlm.embed(batch.ids), batch.mrope)
    wanted = components.vlm.logits(real)[batch.labels != -100]
    assert wanted.std() > 0.1
    assert (out.logits - wanted).abs().max() <= 1e-5


@torch.no_grad()
def test_text_experts_rotate_every_axis_of_positions_as_the_language_model_does():
    components, mot = tiny_components(STAGES, side=SIDE), a_mot()
    positions = torch.randint(0, 50, (3, 2, 17))
    embeds = components.vlm.embed(torch.randint(7, 300, (2, 17)))
    assert (mot.vlm.states(embeds, positions) - components.vlm.states(embeds, positions)).abs().max() <= 1e-5


def test_frozen_text_experts_stay_and_finetuned_ones_move_and_all_else_that_trains_does():
    for text in ("frozen", "finetuned"):
        components = a_mot(text)
        batch = pack([LONG, WORDS], components.layout)
        terms = joint_loss(components.pretzel, batch, pictures(3), NoiseConfig())
        (terms.flow + terms.text).backward()
        idle = [name for name, p in nn.ModuleDict(components.joint_modules).named_parameters() if p.grad is None]
        assert not idle
        moved = [p for p in components.vlm.text.parameters() if p.grad is not None]
        assert bool(moved) == (text == "finetuned")


# -- pictures --------------------------------------------------------------------------------------------------


def test_what_words_and_latents_see_is_behind_them_and_every_kind_sees_the_other():
    components = a_mot()
    x, levels = pictures(3)
    batch = pack([LONG], components.layout)
    before = states_of(components.pretzel, batch, x, levels)
    begin = batch.pictures.begin[1]
    changed = x.clone()
    changed[1, 9] += 1.0  # shallow blocks scan both ways: all of u may move, so the begin slot is the border
    after = states_of(components.pretzel, batch, changed, levels)
    moved = (after.g - before.g).abs().amax(-1)[0] > 0
    assert not moved[: begin + 1].any()
    assert moved[begin + COUNT + 2 :].all(), "words behind a picture must see it"
    other = replace(batch, ids=batch.ids.clone())
    other.ids[0, 1] = 99
    assert ((states_of(components.pretzel, other, x, levels).g - before.g).abs().amax(-1)[0, 1:] > 0).all()


def test_the_deep_jacobian_is_triangular_and_its_determinant_the_reported_one():
    components = a_mot(scale=0.1, side=2).double()
    mot, count = components.pretzel, 4
    components.flow.shallow.blocks = torch.nn.ModuleList()  # so that x is u
    batch = pack([CAPTION], components.layout)
    x = torch.randn(1, count, LATENT, dtype=torch.float64)
    level = torch.tensor([0.3], dtype=torch.float64)
    out = read_documents(mot, batch, x, level)
    jac = jacobian(lambda v: read_documents(mot, batch, v[None], level).z.flatten(), x[0]).view(count * LATENT, -1)
    assert jac.triu(1).abs().max() == 0
    blocks = jac.view(count, LATENT, count, LATENT).movedim(1, 2)
    assert blocks[3, 0].abs().max() > 1e-4, "later latents must see earlier ones"
    logdet = -out.affine.log_scale.detach().sum()
    assert abs(logdet) > 1e-3
    assert torch.linalg.slogdet(jac).logabsdet == pytest.approx(float(logdet), abs=1e-9)
    normal = -0.5 * (out.z.detach().square() + math.log(2 * math.pi)).sum()
    assert float(out.log_prob.detach()) == pytest.approx(float(normal + logdet), abs=1e-9)


def test_documents_packed_in_one_row_equal_each_alone():
    components = a_mot()
    x, levels = pictures(4)
    documents = [CAPTION, LONG, WORDS]
    with torch.no_grad():
        together = read_documents(components.pretzel, pack(documents, components.layout, width=400), x, levels)
        alone = [
            read_documents(components.pretzel, pack([document], components.layout), x[own], levels[own])
            for document, own in zip(documents, (slice(0, 1), slice(1, 4), slice(0, 0)), strict=True)
        ]
    assert (torch.cat([o.log_prob for o in alone]) - together.log_prob).abs().max() <= 1e-3
    for i, single in enumerate(alone):
        assert (single.logits - together.logits[together.documents == i]).abs().max() <= 1e-4


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_cached_steps_equal_one_full_pass_for_guided_pictures_and_words(precision):
    """Through the rows that sample, unchanged: what they leave in the cache is what the parallel pass makes of it."""
    sampler = Sampler(a_mot(), DrawConfig(guidance=1.5, prior_scale=0.7, precision=precision))
    engine = Engine(sampler)
    row = engine.open()
    x, _ = pictures(1)
    engine.feed(row, [1, 30, 31])
    engine.see(row, x[0], 0.2)
    engine.feed(row, [40, 2])
    drawn = completed(engine, row, 5)
    engine.feed(row, [1, 50, 2])
    engine.begin(row, ReplyLimits(tokens=3, pictures=0), 0)
    words = [e.id for e in engine.run() if isinstance(e, Token)]
    last = engine.states(row)
    document = (
        Text((1, 30, 31)), Image(), Text((40, 2)), Image(is_target=True), Text((3, 1, 50, 2)), Text((*words, 3)),
    )  # fmt: skip
    both = torch.stack([x[0].to(sampler.dtype), drawn.picture.x])
    levels = torch.tensor([0.2, 0.5], dtype=sampler.dtype)
    full = states_of(sampler.pretzel, pack([document], sampler.layout), both, levels)  # type: ignore[arg-type]
    assert engine.length(row) == full.h.shape[1]
    for mine, theirs in zip(last, (full.h[0, -1], full.g[0, -1]), strict=True):
        assert (mine - theirs).abs().max() <= 1e-4
    with torch.no_grad():
        log_prob = read_documents(sampler.pretzel, pack([document], sampler.layout), both, levels).affine
    assert float(log_prob.log_prob(drawn.picture.u[None]).sum(1)[1]) == pytest.approx(drawn.picture.log_prob, abs=1e-2)


def completed(engine: Engine, row: int, seed: int) -> Completed:
    engine.begin(row, ReplyLimits(tokens=0, pictures=1), seed, draws=True)
    return next(e for e in list(engine.run()) if isinstance(e, Completed))


# -- start and size ---------------------------------------------------------------------------------------------


def test_what_is_new_comes_from_the_seed_alone_and_is_the_same_in_both_variants():
    components = tiny_components(STAGES)
    torch.manual_seed(1)
    first = MotComponents(components, seed=3)
    torch.manual_seed(2)
    second, other = MotComponents(components, "finetuned", seed=3), MotComponents(components, seed=4)
    mine, same, new = (p.vlm.visual.layers[0].mlp.up_proj.weight for p in (first, second, other))
    assert torch.equal(mine, same) and not torch.equal(mine, new)


def test_the_baseline_adds_as_many_parameters_as_the_pretzel():
    components = tiny_components(STAGES)
    one_wider = 3 * components.cfg.vlm.width * components.cfg.vlm.depth
    ours = num_parameters(components.flow, components.joints)
    for text in ("frozen", "finetuned"):
        mot = MotComponents(components, text)
        added = num_parameters(mot.vlm.visual, mot.flow, mot.joints)
        assert abs(added - ours) <= one_wider / 2
        assert num_parameters(*mot.joint_modules.values()) == added + (
            num_parameters(mot.vlm.text) if text == "finetuned" else 0
        )


def test_nano_matches_within_a_thousandth():
    components = Components(nano_model(), tiny_tokenizer())
    mot = MotComponents(components)
    ours = num_parameters(components.flow, components.joints)
    assert abs(num_parameters(*mot.joint_modules.values()) / ours - 1) < 1e-3


def test_a_model_with_next_to_no_flow_has_no_baseline_of_its_size():
    components = tiny_components(STAGES)
    components.flow = torch.nn.Linear(1, 1)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="smallest baseline"):
        matched_width(components)
