"""The Pretzel: it starts from two models that work, reads documents causally and alone, and keeps exact likelihoods."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from helpers import wake
from model_cases import LATENT, STAGES, tiny_components, tiny_model, tiny_tokenizer
from starflow2.core.dialogue import Turn
from starflow2.errors import ConfigError, ShapeError
from starflow2.flow.affine import standard_normal_log_prob
from starflow2.models.components import Components
from starflow2.models.config import JointsConfig
from starflow2.models.context import drawing_context
from starflow2.models.joint_stream import Output, States, read_documents
from starflow2.models.pretzel import Adapter, Pretzel
from starflow2.models.sequence import IGNORE, Batch, Document, Image, Text, pack
from starflow2.training.config import StageConfig
from starflow2.training.losses import joint_loss, ngp_loss
from starflow2.training.tasks import AdapterTask, with_pictures
from starflow2.world.captions import caption_task
from stream_cases import Recording

LEVELS = (0.05, 0.5, 0.3)
# words, a picture that is shown, words, a picture that is drawn, words, another one that is drawn
LONG: Document = (
    Text((1, 30, 31)), Image(), Text((40, 41, 2)), Image(is_target=True), Text((50, 51, 3), is_target=True),
    Text((1, 60, 2)), Image(is_target=True), Text((3,), is_target=True),
)  # fmt: skip
CAPTION: Document = (Text((1, 30, 31, 32, 2)), Image(is_target=True), Text((3,), is_target=True))
ANSWER: Document = (Text((1,)), Image(), Text((44, 45, 2)), Text((70, 71, 72, 3), is_target=True))
WORDS: Document = (Text((1, 80, 81, 2)), Text((90, 3), is_target=True))


@pytest.fixture(scope="module")
def components() -> Components:
    return tiny_components(STAGES)


def pictures(count: int, seed: int = 1) -> Tensor:
    """Noisy latents (P, N, D)."""
    return torch.randn(count, 64, LATENT, generator=torch.Generator().manual_seed(seed))


def levels(count: int) -> Tensor:
    return torch.tensor([LEVELS[i % 3] for i in range(count)])


def read(pretzel: Pretzel, batch: Batch, x: Tensor, level: Tensor) -> tuple[Output, States]:
    """A forward pass and the states behind it."""
    stream = Recording(pretzel)
    with torch.no_grad():
        out = read_documents(stream, batch, x, level)
    return out, stream.states(None)[0]


def closed(components: Components) -> Components:
    """The same parts with all that stage 3 opens at its zero start."""
    with torch.no_grad():
        for linear in (components.joints.visual_skip, components.joints.text_skip, components.joints.reference):
            linear.weight.zero_()
    return components


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


# -- it starts from what the two streams can do


def test_fresh_skips_are_zero_and_woken_ones_are_not():
    torch.manual_seed(0)
    fresh = Components(tiny_model()).joints
    assert not fresh.visual_skip.weight.any() and not fresh.text_skip.weight.any() and not fresh.reference.weight.any()
    woken = tiny_components(STAGES).joints
    assert min(gap(w, 0 * w) for w in (woken.visual_skip.weight, woken.text_skip.weight, woken.reference.weight)) > 0.01


def test_with_both_skips_closed_the_text_logits_are_bit_for_bit_those_of_the_language_model(components):
    batch, x, level = pack([LONG], components.layout), pictures(3), levels(3)
    pretzel = components.pretzel
    open_logits = read(pretzel, batch, x, level)[0].logits
    logits = read(pretzel.with_skips(()), batch, x, level)[0].logits
    with torch.no_grad():
        u, _ = components.flow.shallow(x, level)
        embeds = with_pictures(components.vlm.embed(batch.ids), pretzel.adapted(u, level), batch)
        h = components.vlm.states(embeds, batch.mrope)
        bare = components.vlm.logits(h[batch.labels != IGNORE])
    assert torch.equal(logits, bare)
    assert gap(open_logits, bare) > 1e-3, "an open skip is to matter"


def test_each_skip_can_be_closed_by_itself(components):
    batch, x, level = pack([LONG], components.layout), pictures(3), levels(3)
    outputs = {}
    for skips in ((), ("visual",), ("text",), ("visual", "text")):
        outputs[skips] = read(components.pretzel.with_skips(skips), batch, x, level)[0]
    assert torch.equal(outputs[()].logits, outputs[("visual",)].logits)
    assert torch.equal(outputs[()].log_prob, outputs[("text",)].log_prob)
    assert gap(outputs[("visual",)].log_prob, outputs[()].log_prob) > 1e-2
    assert gap(outputs[("text",)].logits, outputs[()].logits) > 1e-3
    assert torch.equal(outputs[("visual",)].log_prob, outputs[("visual", "text")].log_prob)


@pytest.mark.parametrize("seed", [0, 1])
def test_with_zero_skips_a_caption_and_its_picture_have_the_likelihood_of_stage_one(seed):
    components = closed(tiny_components(STAGES))
    task = caption_task(0, seed)
    document = components.tokenizer.document([Turn((task.prompt,), (task.scene,))])
    x, level = pictures(1, seed), torch.tensor([0.3])
    out, _ = read(components.pretzel, pack([document], components.layout), x, level)
    with torch.no_grad():
        context = drawing_context(components, [components.tokenizer.drawing_prompt(task.prompt)])
        stage_one = components.flow.log_prob(x, context, level)
    assert gap(out.log_prob, stage_one) / x.numel() <= 1e-5
    assert abs(float(stage_one)) > 10, "a likelihood of nothing would agree with everything"


def test_with_zero_skips_the_joint_loss_of_captioned_pictures_is_the_ngp_loss_of_stage_one():
    components = closed(tiny_components(STAGES))
    tasks = [caption_task(0, i) for i in range(3)]
    documents = [components.tokenizer.document([Turn((t.prompt,), (t.scene,))]) for t in tasks]
    clean, noise = pictures(3), components.cfg.noise
    generator = torch.Generator().manual_seed(4)
    level = noise.sample_levels(3, generator)
    noisy = clean + level[:, None, None] * torch.randn(clean.shape, generator=generator)
    with torch.no_grad():
        joint = joint_loss(components.pretzel, pack(documents, components.layout), (noisy, level), noise).flow
        context = drawing_context(components, [components.tokenizer.drawing_prompt(t.prompt) for t in tasks])
        alone, _ = ngp_loss(components.flow, clean, context, torch.Generator().manual_seed(4))
    assert joint.item() == pytest.approx(alone.item(), abs=1e-5)


def test_with_zero_skips_answers_have_the_logits_of_stage_two():
    components = closed(tiny_components(STAGES))
    task = AdapterTask(components, StageConfig(name="adapter", steps=1, batch=4), 0)
    data = task.make_batch(range(4))
    seen: list[tuple[Tensor, Tensor]] = []
    right = components.vlm.logits
    components.vlm.logits = lambda h: seen.append((h, right(h))) or seen[-1][1]  # type: ignore[method-assign, func-returns-value]
    noisy: list[tuple[Tensor, Tensor]] = []
    shallow = components.flow.shallow.forward
    components.flow.shallow.forward = lambda x, level: noisy.append((x, level)) or shallow(x, level)  # type: ignore[method-assign, func-returns-value]
    with torch.no_grad():
        task.loss(data, torch.Generator().manual_seed(2))
        out = read_documents(components.pretzel, data[1], *noisy[0])
    logits = next(logits for _, logits in seen if len(logits))
    assert len(logits) > 10
    assert gap(out.head(out.h, out.g), logits) <= 1e-5


def test_zero_skips_add_exactly_nothing_and_woken_ones_are_traced_at_every_latent_and_every_label(components):
    batch, x, level = pack([LONG, ANSWER], components.layout), pictures(4), levels(4)
    for some, is_zero in ((closed(tiny_components(STAGES)), True), (components, False)):
        trace: list[tuple[str, Tensor, Tensor]] = []
        out, _ = read(some.pretzel.traced(trace), batch, x, level)
        assert out.logits.isfinite().all()
        assert [name for name, _, _ in trace] == ["visual", "text"]
        (_, base, injected), (_, text_base, text_injected) = trace
        assert base.shape == injected.shape == (4 * 64, 40)
        assert text_base.shape == text_injected.shape == (len(out.labels), 40)
        assert bool(injected.eq(0).all()) == bool(text_injected.eq(0).all()) == is_zero
        assert bool(base.any()) and bool(text_base.any())


def test_a_pretzel_cannot_be_changed_so_that_no_skip_closes_in_secret(components):
    """Closing them on what `components.pretzel` gave used to be forgotten at the next access, without a word."""
    pretzel = components.pretzel
    for name, value in (("skips", frozenset()), ("trace", []), ("two_pass_prefix", False)):
        with pytest.raises(FrozenInstanceError):
            setattr(pretzel, name, value)
    closed = pretzel.with_skips(())
    assert closed.skips == frozenset() and components.pretzel.skips == pretzel.skips == {"visual", "text"}
    assert closed.vlm is pretzel.vlm and closed.flow is pretzel.flow and components.pretzel == pretzel


def test_a_skip_that_does_not_exist_is_refused_by_name(components):
    with pytest.raises(ConfigError, match=r"skips holds 'visul'.*Did you mean"):
        components.pretzel.with_skips(("visul",))


# -- likelihoods


def test_the_log_probability_is_that_of_z_and_of_every_patch(components):
    out, _ = read(components.pretzel, pack([LONG], components.layout), pictures(3), levels(3))
    assert gap(out.affine.log_prob(out.u).sum(1) + out.shallow_logdet, out.log_prob) <= 1e-3
    volume = -out.affine.log_scale.sum((1, 2)) + out.shallow_logdet
    assert gap(standard_normal_log_prob(out.z) + volume, out.log_prob) <= 1e-3


def small_parts(rows: int, cols: int) -> Components:
    """Woken parts with open skips over a smaller grid, in float64."""
    cfg = tiny_model()
    cut = {"grid": (rows, cols)}
    stack = replace(cfg.flow.deep.stack, activation="gelu")
    flow = replace(
        cfg.flow,
        deep=replace(cfg.flow.deep, stack=stack, **cut),
        shallow=tuple(replace(b, stack=stack, **cut) for b in cfg.flow.shallow),
    )
    torch.manual_seed(3)
    return wake(Components(replace(cfg, flow=flow, fae=replace(cfg.fae, **cut))), 0.15).double().eval()


def slopes(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """The Jacobian (outputs, inputs) by central differences.

    Not by autograd: the language stream's view of a latent carries no gradient, so that autograd would miss whatever
    reaches the flow by way of it, and just that is what could leak. Differences through that stream are coarse, since
    its norms round to float32, but they stand below the diagonal.
    """
    columns = []
    with torch.no_grad():
        for i in range(at.numel()):
            shift = torch.zeros_like(at)
            shift[i] = step
            columns.append((function(at + shift) - function(at - shift)) / (2 * step))
    return torch.stack(columns, 1)


def test_u_to_z_is_lower_triangular_with_the_reported_log_determinant():
    """The trap: were the visual skip to use h of the latent to come, the diagonal would hold more than the affine."""
    components = small_parts(2, 3)
    components.flow.shallow.forward = lambda u, level: (u, u.new_zeros(len(u)))  # type: ignore[method-assign]
    document: Document = (Text((1, 30)), Image(), Text((2,)), Image(is_target=True), Text((3,), is_target=True))
    batch, u = pack([document], components.layout), torch.randn(2, 6, LATENT, dtype=torch.float64)
    level = torch.tensor([0.1, 0.4], dtype=torch.float64)

    def to_z(picture: Tensor) -> Tensor:
        return (
            read_documents(components.pretzel, batch, torch.stack([u[0], picture.view(6, LATENT)]), level)
            .z[1]
            .flatten()
        )

    matrix = slopes(to_z, u[1].flatten())  # (N D, N D)
    out = read_documents(components.pretzel, batch, u, level)
    blocks = matrix.view(6, LATENT, 6, LATENT).permute(0, 2, 1, 3)  # (N, N, D, D): z_i by u_j
    for i in range(6):
        assert not blocks[i, i + 1 :].any(), f"z_{i} depends on a later latent"
        assert torch.equal(blocks[i, i], torch.diag(blocks[i, i].diagonal())), "a latent is moved by itself alone"
        assert all(blocks[i, j].abs().max() > 1e-6 for j in range(i)), "and depends on every earlier one"
    logdet = (out.log_prob - standard_normal_log_prob(out.z))[1]
    assert torch.linalg.slogdet(matrix).logabsdet.item() == pytest.approx(logdet.item(), abs=1e-6)


def test_x_to_z_of_two_pictures_of_one_document_has_the_reported_log_determinants():
    """By autograd: what it misses, see `slopes`, stands below the diagonal of u to z and leaves determinants alone."""
    components = small_parts(2, 2)
    document: Document = (Text((1, 30, 2)), Image(is_target=True), Text((40,)), Image(is_target=True), Text((3,)))
    batch, x = pack([document], components.layout), torch.randn(2, 4, LATENT, dtype=torch.float64)
    level = torch.tensor([0.1, 0.4], dtype=torch.float64)

    def to_z(both: Tensor) -> Tensor:
        return read_documents(components.pretzel, batch, both.view(2, 4, LATENT), level).z.flatten()

    matrix = jacobian(to_z, x.flatten())
    out = read_documents(components.pretzel, batch, x, level)
    half = 4 * LATENT
    assert not matrix[:half, half:].any() and matrix[half:, :half].abs().max() > 1e-6
    stated = out.log_prob - standard_normal_log_prob(out.z)
    for i, block in enumerate((matrix[:half, :half], matrix[half:, half:])):
        assert torch.linalg.slogdet(block).logabsdet.item() == pytest.approx(stated[i].item(), abs=1e-9)


# -- what a position may see


@pytest.mark.parametrize("picture", [0, 1, 2])
@pytest.mark.parametrize("latent", [0, 9, 63])
def test_a_latent_is_seen_from_its_own_slot_on_and_never_before(components, picture, latent):
    """A shown, a drawn and another drawn picture; u is changed, since x becomes u by blocks that look both ways."""
    some = tiny_components(STAGES)
    some.flow.shallow.forward = lambda u, level: (u, u.new_zeros(len(u)))  # type: ignore[method-assign]
    batch, u = pack([LONG], components.layout), pictures(3)
    other = u.clone()
    other[picture, latent] += 1.0
    (_, before), (_, after) = (read(some.pretzel, batch, v, levels(3)) for v in (u, other))
    at = int(batch.pictures.begin[picture]) + 1 + latent
    assert torch.equal(before.h[:, :at], after.h[:, :at]) and torch.equal(before.g[:, :at], after.g[:, :at])
    assert (before.h[:, at] != after.h[:, at]).any() and (before.g[:, at] != after.g[:, at]).any()
    assert (before.g[:, -1] != after.g[:, -1]).any(), "and it matters to the very end"


@pytest.mark.parametrize("at", [1, 70, 139, 141, 210])
def test_a_token_is_seen_from_its_own_slot_on_and_never_before(components, at):
    batch, x = pack([LONG], components.layout), pictures(3)
    assert batch.ids[0, at] not in (components.layout.latent, components.layout.begin, components.layout.end)
    ids = batch.ids.clone()
    ids[0, at] += 5
    (_, before), (_, after) = (read(components.pretzel, b, x, levels(3)) for b in (batch, replace(batch, ids=ids)))
    assert torch.equal(before.h[:, :at], after.h[:, :at]) and torch.equal(before.g[:, :at], after.g[:, :at])
    assert (before.h[:, at] != after.h[:, at]).any() and (before.g[:, at] != after.g[:, at]).any()


@pytest.mark.parametrize("at", [72, 138, 139, 140, 144, 210])
def test_what_is_predicted_at_a_position_is_not_known_there(components, at):
    """A text skip that read the flow one slot too late would see the answer."""
    batch, x = pack([LONG], components.layout), pictures(3)
    ids = batch.ids.clone()
    ids[0, at] += 5
    before, after = (read(components.pretzel, b, x, levels(3))[0].logits for b in (batch, replace(batch, ids=ids)))
    where = (batch.labels[0] != IGNORE).nonzero().flatten()
    assert torch.equal(before[where < at], after[where < at])
    assert (before[where >= at] != after[where >= at]).any() == bool((where >= at).any())


def test_the_noise_level_of_a_picture_is_known_from_its_begin_slot_on(components):
    batch, x, level = pack([LONG], components.layout), pictures(3), levels(3)
    other = level.clone()
    other[1] = 0.2
    (_, before), (_, after) = (read(components.pretzel, batch, x, v) for v in (level, other))
    at = int(batch.pictures.begin[1])
    assert torch.equal(before.h[:, : at + 1], after.h[:, : at + 1]), "the language model has no begin slot of levels"
    assert torch.equal(before.g[:, :at], after.g[:, :at]) and (before.g[:, at] != after.g[:, at]).any()


def reads(pretzel: Pretzel, targets: Tensor, reference: Tensor | None, *, has: bool = True) -> Tensor:
    """What the flow reads in front of targets (1, n) of a picture that is the same everywhere: (n, C)."""
    buffer = pictures(1)[:, :1].repeat(1, 65, 1)
    buffer[:, -1] = 0
    _, base = pretzel.latents(buffer, targets, torch.tensor([0.3]), reference, torch.tensor([has]))
    return base[0]


@pytest.mark.parametrize(("side", "near"), [(1, {27}), (3, {18, 19, 20, 26, 27, 28, 34, 35, 36})])
def test_the_flow_reads_the_picture_before_around_the_targets_place(side, near):
    cfg = tiny_model()
    components = wake(Components(replace(cfg, joints=replace(cfg.joints, reference=side)), tiny_tokenizer()))
    before = pictures(1, 7)[:, :1].repeat(1, 65, 1)
    target, seen = torch.tensor([[27]]), set()
    for place in range(64):
        changed = before.clone()
        changed[:, place] += 1
        if not torch.equal(reads(components.pretzel, target, before), reads(components.pretzel, target, changed)):
            seen.add(place)
    assert seen == near, "row 3, column 3 of an 8x8 picture"
    alone = reads(components.pretzel, target, None)
    assert torch.equal(alone, reads(components.pretzel, target, before, has=False))
    assert not torch.equal(alone, reads(components.pretzel, target, before))


def test_a_window_ends_where_the_picture_ends_and_is_empty_behind_its_last_latent():
    components = tiny_components(STAGES)
    window = components.pretzel.inputs.window(torch.tensor([[0, 15, 64]]))[0].view(3, 5, 5)
    assert window[0, 2:, 2:].tolist() == [[0, 1, 2], [8, 9, 10], [16, 17, 18]] and int((window[0] == 64).sum()) == 16
    assert window[1, 1:4, :3].tolist() == [[5, 6, 7], [13, 14, 15], [21, 22, 23]] and (window[1, :, 3:] == 64).all()
    assert (window[2] == 64).all()


@pytest.mark.parametrize("side", [-1, 2])
def test_a_window_without_a_middle_is_refused(side):
    with pytest.raises(ConfigError, match=f"reference is {side}; expected"):
        JointsConfig(adapter_width=16, reference=side)


def nats(
    components: Components, documents: Sequence[Document], x: Tensor, level: Tensor, width: int = 0
) -> tuple[Tensor, Tensor]:
    """Losses of packed documents: of every picture (P,), and of the words of every document (documents,)."""
    batch = pack(documents, components.layout, width)
    out = read_documents(components.pretzel, batch, x, level)
    surprise = -out.logits.log_softmax(-1).gather(-1, out.labels[:, None])[:, 0]
    words = torch.zeros(len(documents)).index_add(0, out.documents, surprise)
    return -out.log_prob / math.prod(x.shape[1:]), words


@pytest.mark.parametrize("width", [0, 400], ids=["rows as long as the longest", "all in one row or two"])
def test_documents_packed_with_others_give_the_losses_and_gradients_they_have_alone(width):
    components = tiny_components(STAGES)
    documents = [ANSWER, CAPTION, LONG, WORDS, CAPTION]
    counts = [sum(isinstance(s, Image) for s in d) for d in documents]
    x, level = pictures(sum(counts)), levels(sum(counts))
    trained = [*components.flow.parameters(), *components.joints.parameters()]
    together = nats(components, documents, x, level, width)
    grads = torch.autograd.grad(together[0].sum() + together[1].sum(), trained, allow_unused=True)
    summed = [torch.zeros_like(p) for p in trained]
    first = 0
    for i, (document, count) in enumerate(zip(documents, counts, strict=True)):
        own = slice(first, first + count)
        alone = nats(components, [document], x[own], level[own])
        if count:
            assert gap(alone[0], together[0][own]) <= 1e-4
        assert gap(alone[1][0], together[1][i]) <= 1e-4
        for total, grad in zip(
            summed, torch.autograd.grad(alone[0].sum() + alone[1].sum(), trained, allow_unused=True), strict=True
        ):
            total += 0 if grad is None else grad
        first += count
    largest = max(float(s.abs().max()) for s in summed)
    assert largest > 1
    for a, b in zip(grads, summed, strict=True):
        assert a is None or gap(a, b) <= 1e-4 * largest


def test_no_position_sees_another_document_of_its_row(components):
    documents = [LONG, ANSWER, WORDS]
    batch, x = pack(documents, components.layout, 400), pictures(4)
    assert len(batch.ids) == 1
    ids, other = batch.ids.clone(), x.clone()
    mine = batch.document[0] == 1
    ids[0, mine & (batch.ids[0] > 20)] += 3
    other[3] += 1
    (_, before), (_, after) = (
        read(components.pretzel, b, v, levels(4)) for b, v in ((batch, x), (replace(batch, ids=ids), other))
    )
    assert torch.equal(before.h[0, ~mine], after.h[0, ~mine]) and torch.equal(before.g[0, ~mine], after.g[0, ~mine])
    assert (before.h[0, mine] != after.h[0, mine]).any(1).sum() > 60


def test_words_without_any_picture_are_read_and_give_no_picture(components):
    out, _ = read(components.pretzel, pack([WORDS, WORDS], components.layout), pictures(0), levels(0))
    assert out.logits.shape == (4, 320) and out.z.shape == (0, 64, LATENT) and out.log_prob.shape == (0,)


def test_latents_of_another_number_of_pictures_or_another_grid_are_refused(components):
    batch = pack([LONG], components.layout)
    for x in (pictures(2), pictures(3)[:, :63], pictures(3)[..., :3]):
        with pytest.raises(ShapeError, match=r"x has shape .*P=3 N=64 D=4"):
            read_documents(components.pretzel, batch, x, levels(len(x)))


# -- the joints by themselves, against formulas written out


def test_the_flow_reads_its_latents_plus_the_visual_skip_of_the_states_there(components):
    """Eq. 3.1, base + W_v h: a closed skip over inputs to which that sum was added by hand reads the same."""
    stream = Recording(components.pretzel)
    with torch.no_grad():
        read_documents(stream, pack([LONG], components.layout), pictures(3), levels(3))
        slots, _, states = stream.calls[0]
        latent = slots.latent
        injected = states.h[latent.row, latent.position] @ components.joints.visual_skip.weight.T
        by_hand = replace(slots, latent=replace(latent, base=latent.base + injected))
        expected = components.pretzel.with_skips(("text",)).read(by_hand)
    assert float(injected.abs().max()) > 1e-2
    assert gap(states.g, expected.g) <= 1e-4  # the product may be summed in another order


def test_the_language_head_reads_its_states_plus_the_text_skip_of_the_flow(components):
    """Eq. 3.2, h + W_t g."""
    generator = torch.Generator().manual_seed(2)
    h, g = (torch.randn(5, 40, generator=generator) for _ in range(2))
    with torch.no_grad():
        injected = g @ components.joints.text_skip.weight.T
        assert float(injected.abs().max()) > 1e-2
        # the product may be summed in another order
        assert gap(components.pretzel.logits(h, g), components.vlm.logits(h + injected)) <= 1e-4


def test_the_adapter_reads_a_latent_and_its_neighbours_left_and_above_within_the_image():
    rows, columns = 4, 3
    pretzel = small_parts(rows, columns).pretzel
    assert pretzel.joints.cfg.adapter_stencil
    count = rows * columns
    buffer = torch.randn(2, count + 1, LATENT, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    buffer[:, -1] = 0
    inputs = pretzel.adapter_inputs(buffer, torch.arange(count).expand(2, -1))
    for image in range(2):
        grid = buffer[image, :count].view(rows, columns, LATENT)
        for row in range(rows):
            for column in range(columns):
                places = [(row, column), (row, column - 1), *((row - 1, column + step) for step in (-1, 0, 1))]
                is_inside = [r >= 0 and 0 <= c < columns for r, c in places]
                expected = torch.cat(
                    [grid[r, c] if ok else grid.new_zeros(LATENT) for (r, c), ok in zip(places, is_inside, strict=True)]
                )
                assert torch.equal(inputs[image, row * columns + column], expected), (row, column)  # copies


# -- the adapter


def test_the_adapter_has_the_scale_that_was_set_and_hears_the_noise_level():
    torch.manual_seed(0)
    adapter = Adapter(JointsConfig(adapter_width=16), LATENT, 40)
    adapter.set_scale(0.02)
    u = pictures(2)
    calm, loud = (adapter(u, torch.full((2,), level)) for level in (0.01, 0.5))
    assert calm.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.01)
    wake(adapter)
    assert gap(adapter(u, torch.full((2,), 0.01)), adapter(u, torch.full((2,), 0.5))) > 1e-3
    assert torch.equal(calm, loud), "fresh FiLM layers change nothing"


def test_what_the_language_model_sees_of_a_picture_sends_no_gradient_into_the_flow(components):
    u = pictures(1).requires_grad_()
    components.pretzel.adapted(u, levels(1)).sum().backward()
    assert u.grad is None
