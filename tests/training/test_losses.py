"""Objectives against a second way of computing each."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import wake
from model_cases import STAGES, WIDTH, tiny_components, tiny_model
from starflow2.flow import Context, Flow
from starflow2.models import token_loss
from starflow2.models.components import Components
from starflow2.models.joint_stream import read_documents
from starflow2.models.sequence import IGNORE, Document, Image, Text, pack
from starflow2.training import losses
from starflow2.training.losses import (
    FeatureDiscriminator,
    JointTerms,
    adversarial_losses,
    count_texts,
    joint_loss,
    last_edits,
    masked_image_loss,
    ngp_loss,
    ntp_loss,
    perceptual_loss,
)

HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


def a_flow(weight: str = "level") -> Flow:
    cfg = tiny_model().flow
    return Flow(replace(cfg, noise=replace(cfg.noise, weight=weight)))


def some_latents(rows: int = 5) -> tuple[torch.Tensor, Context]:
    return torch.randn(rows, 64, 4), Context(torch.randn(rows, 3, 2 * WIDTH))


@pytest.mark.parametrize("weight", ["level", "one"])
def test_ngp_loss_is_the_weighted_mean_of_the_rows_without_the_constant_and_nats_keep_it(weight):
    flow = wake(a_flow(weight))
    latents, context = some_latents()
    loss, nats = ngp_loss(flow, latents, context, torch.Generator().manual_seed(5))
    again = torch.Generator().manual_seed(5)
    levels = flow.cfg.noise.sample_levels(5, again)
    noisy = latents + levels[:, None, None] * torch.randn(latents.shape, generator=again)
    rows = -flow.log_prob(noisy, context, levels) / (64 * 4)
    weights = levels if weight == "level" else torch.ones(5)
    assert loss.item() == pytest.approx((weights * (rows - HALF_LOG_TAU)).mean().item(), abs=1e-6)
    assert nats.item() == pytest.approx(rows.mean().item(), abs=1e-6)


def test_an_untrained_flow_is_a_standard_normal_and_its_ngp_loss_says_so():
    latents, context = some_latents()
    _, nats = ngp_loss(a_flow(), latents, context, torch.Generator().manual_seed(5))
    again = torch.Generator().manual_seed(5)
    levels = a_flow().cfg.noise.sample_levels(5, again)
    noisy = latents + levels[:, None, None] * torch.randn(latents.shape, generator=again)
    assert nats.item() == pytest.approx(-Normal(0, 1).log_prob(noisy).mean().item(), abs=1e-5)


def test_ngp_loss_is_a_function_of_its_generator_alone():
    flow = wake(a_flow())
    latents, context = some_latents()
    draws = []
    for seed in (1, 1, 2):
        torch.randn(3)  # the global generator moves on and must not matter
        draws.append(ngp_loss(flow, latents, context, torch.Generator().manual_seed(seed))[0].item())
    assert draws[0] == draws[1] != draws[2]


def test_the_penalty_on_intermediate_latents_is_their_mean_square_times_its_weight():
    """A mean over images, latents and channels: it does not grow with any of them."""
    flow = Flow(replace(tiny_model().flow, latent_penalty=0.5))
    u = torch.randn(3, 64, 4)
    expected = 0.5 * sum(float(v) ** 2 for v in u.flatten()) / u.numel()
    assert losses.latent_penalty(flow, u).item() == pytest.approx(expected, rel=1e-5)
    assert losses.latent_penalty(flow, u.repeat(2, 1, 1)).item() == pytest.approx(expected, rel=1e-5)
    assert losses.latent_penalty(flow, u[:0]) == losses.latent_penalty(a_flow(), u) == 0


def labelled(*rows: str) -> torch.Tensor:
    """Labels (B, T): a letter is a label, a dot is none."""
    return torch.tensor([[IGNORE if c == "." else ord(c) - ord("a") for c in row] for row in rows])


def as_is(logits: torch.Tensor) -> torch.Tensor:
    """A head whose states are logits already."""
    return logits


def surprises(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Nats of every label, in order."""
    targets = labels[labels != IGNORE]
    return [-row.log_softmax(-1)[label].item() for row, label in zip(logits, targets, strict=True)]


def test_ntp_loss_is_the_mean_over_replies_of_their_mean_surprise_or_the_mean_over_tokens():
    labels = labelled("..abcdef", "a..bc...")
    logits = torch.randn(9, 11)
    nats = surprises(logits, labels)
    replies = [nats[:6], nats[6:7], nats[7:]]
    expected = sum(sum(r) / len(r) for r in replies) / 3
    assert ntp_loss(as_is, (logits,), labels).item() == pytest.approx(expected, abs=1e-6)
    assert expected != pytest.approx(sum(nats) / 9, abs=1e-3)
    assert ntp_loss(as_is, (logits,), labels, "token").item() == pytest.approx(sum(nats) / 9, abs=1e-6)
    assert (count_texts(labels), count_texts(labels, "token")) == (3, 9)


def test_a_long_reply_pulls_no_harder_than_a_short_one():
    labels = labelled("abcdefgh", "a.......")
    logits = torch.zeros(9, 11, requires_grad=True)
    (grad,) = torch.autograd.grad(ntp_loss(as_is, (logits,), labels), logits)
    per_label = grad.norm(dim=1)
    assert per_label[:8].sum().item() == pytest.approx(per_label[8].item(), rel=1e-5)


def test_replies_that_end_and_begin_with_a_row_are_two():
    logits = torch.randn(4, 11)
    apart = ntp_loss(as_is, (logits,), labelled("..abc", "d....")).item()
    nats = surprises(logits, labelled("..abc", "d...."))
    assert apart == pytest.approx((sum(nats[:3]) / 3 + nats[3]) / 2, abs=1e-6)


def test_ntp_loss_is_in_float32_and_zero_with_a_gradient_where_there_is_no_label():
    labels, logits = labelled("..abc", "d...."), torch.randn(4, 11)
    half = ntp_loss(as_is, (logits.bfloat16(),), labels)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(ntp_loss(as_is, (logits.bfloat16().float(),), labels).item(), abs=1e-6)
    nothing = torch.zeros(0, 11, requires_grad=True)
    loss = ntp_loss(as_is, (nothing,), labelled("....."))
    loss.backward()
    assert loss.item() == 0 and nothing.grad is not None


# -- a large vocabulary in chunks


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside have held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_in_chunks_the_gradients_are_those_of_all_logits_at_once(monkeypatch):
    labels, weight = labelled("..abcdef", "a..bc...", "abcd...."), torch.randn(11, 5, requires_grad=True)
    h = torch.randn(13, 5, requires_grad=True)
    whole = torch.autograd.grad(ntp_loss(lambda s: s @ weight.T, (h,), labels), (h, weight))
    monkeypatch.setattr(token_loss, "LOGITS_AT_ONCE", 3 * 11)
    chunked = torch.autograd.grad(ntp_loss(lambda s: s @ weight.T, (h,), labels), (h, weight))
    assert whole[0].abs().max() > 1e-3
    assert all((a - b).abs().max() <= 1e-6 for a, b in zip(whole, chunked, strict=True))


# A gradient sums 152k terms. In float32 that sum alone is off by 2e-4 of the largest gradient, in an order that depends
# on the rows of the matrix product; in float64 the bound can be strict.
@pytest.mark.parametrize(
    ("dtype", "positions", "bound"),
    [(torch.float32, 512, 1e-3), (torch.float64, 64, 1e-11)],
    ids=["float32", "float64"],
)
def test_a_vocabulary_of_152k_takes_a_tenth_of_the_memory_in_chunks_and_gives_the_same_gradient(
    monkeypatch, dtype, positions, bound
):
    torch.manual_seed(0)
    vocab, chunk = 152_064, positions // 20
    weight, h = torch.randn(vocab, 8, dtype=dtype), torch.randn(positions, 8, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocab, (1, positions))
    peaks, grads = [], []
    for at_once in (vocab * positions, vocab * chunk):
        monkeypatch.setattr(token_loss, "LOGITS_AT_ONCE", at_once)
        with PeakBytes() as memory:
            grads += torch.autograd.grad(ntp_loss(lambda s: s @ weight.T, (h,), labels), h)
        peaks.append(memory.peak)
    assert (grads[0] - grads[1]).abs().max() <= bound * grads[0].abs().max()
    assert peaks[1] <= 0.1 * peaks[0], f"{peaks[1] / 2**20:.0f} of {peaks[0] / 2**20:.0f} MiB"
    assert peaks[0] >= 2 * dtype.itemsize * vocab * positions, "the slow twin holds logits and their gradient"


# -- both at once


@pytest.fixture(scope="module")
def components() -> Components:
    return tiny_components(STAGES)


def joint(components: Components, documents: list[Document], count: int, seed: int = 0) -> JointTerms:
    generator = torch.Generator().manual_seed(seed)
    x, level = torch.randn(count, 64, 4, generator=generator), 0.1 + 0.3 * torch.rand(count, generator=generator)
    return joint_loss(components.pretzel, pack(documents, components.layout), (x, level), components.cfg.noise)


SHOWN: Document = (Text((1,)), Image(), Text((40, 2)), Text((41, 42, 3), is_target=True))
DRAWN: Document = (Text((1, 30, 2)), Image(is_target=True), Text((3,), is_target=True))
WORDS: Document = (Text((1, 30, 2)), Text((50, 51, 3), is_target=True))


def test_a_picture_that_is_only_shown_does_not_count_in_the_loss_of_pictures(components):
    assert joint(components, [SHOWN], 1).flow.item() == 0
    assert joint(components, [SHOWN], 1).text.item() > 0
    alone = joint(components, [DRAWN], 1)
    generator = torch.Generator().manual_seed(0)
    x, level = torch.randn(1, 64, 4, generator=generator), 0.1 + 0.3 * torch.rand(1, generator=generator)
    both = torch.cat([x, torch.randn(1, 64, 4)]), torch.cat([level, torch.tensor([0.2])])
    together = joint_loss(components.pretzel, pack([DRAWN, SHOWN], components.layout), both, components.cfg.noise)
    assert together.flow.item() == pytest.approx(alone.flow.item(), abs=1e-5)


def test_the_loss_of_pictures_weighs_each_by_its_noise_level_and_leaves_the_constant_out(components):
    batch = pack([DRAWN, DRAWN], components.layout)
    x, level = torch.randn(2, 64, 4), torch.tensor([0.1, 0.5])
    terms = joint_loss(components.pretzel, batch, (x, level), components.cfg.noise)
    nats = -read_documents(components.pretzel, batch, x, level).log_prob / 256 - HALF_LOG_TAU
    assert terms.flow.item() == pytest.approx((level * nats).mean().item(), abs=1e-6)


def test_documents_of_words_alone_have_no_loss_of_pictures_and_can_still_be_trained_on(components):
    terms = joint(components, [WORDS], 0)
    assert terms.flow.item() == 0
    (grad,) = torch.autograd.grad(terms.flow + terms.text, components.joints.text_skip.weight)
    assert grad.abs().max() > 0


def test_each_loss_reaches_the_joints_in_front_of_it(components):
    terms = joint(components, [(*SHOWN, *DRAWN)], 2)
    skips = (
        components.joints.visual_skip.weight,
        components.joints.text_skip.weight,
        components.joints.reference.weight,
    )
    of_flow = torch.autograd.grad(terms.flow, skips, allow_unused=True, retain_graph=True)
    of_text = torch.autograd.grad(terms.text, skips, allow_unused=True)
    assert of_flow[0].abs().max() > 0 and of_flow[2].abs().max() > 0
    assert of_flow[1] is None or not of_flow[1].any(), "the text skip is behind the pictures"
    assert all(g.abs().max() > 0 for g in of_text[:2])


def test_masked_image_loss_reads_the_patches_row_by_row_channel_first():
    images = torch.randn(2, 3, 8, 12)
    patches = [images[:, :, r : r + 4, c : c + 4].flatten(1) for r in (0, 4) for c in (0, 4, 8)]
    feats = torch.stack(patches, dim=1)  # (B, N, 3 * 4 * 4)
    head = torch.nn.Linear(48, 48)
    torch.nn.init.eye_(head.weight)
    torch.nn.init.zeros_(head.bias)
    assert masked_image_loss(feats, head, images, 4).item() == 0
    assert masked_image_loss(feats + 0.5, head, images, 4).item() == pytest.approx(0.25)


# -- pixel decoders


def test_each_player_of_the_adversarial_game_pays_for_itself_alone():
    discriminator = FeatureDiscriminator(6)
    decoded, true = torch.randn(4, 3, 6, requires_grad=True), torch.randn(4, 3, 6, requires_grad=True)
    decoder_loss, discriminator_loss = adversarial_losses(discriminator, decoded, true)
    weights = list(discriminator.parameters())
    assert torch.autograd.grad(decoder_loss, decoded, retain_graph=True)[0].abs().max() > 0
    assert all(g is None for g in torch.autograd.grad(decoder_loss, weights, retain_graph=True, allow_unused=True))
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(discriminator_loss, weights[:-1], retain_graph=True))
    assert torch.autograd.grad(discriminator_loss, (decoded, true), allow_unused=True) == (None, None)


def test_a_discriminator_learns_to_tell_images_apart_and_pulls_the_decoder_to_the_true_ones():
    torch.manual_seed(0)
    discriminator = FeatureDiscriminator(6)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=0.01)
    true, decoded = (torch.randn(64, 3, 6) + shift * torch.eye(6)[0] for shift in (2.0, -2.0))
    for _ in range(60):
        optimizer.zero_grad()
        adversarial_losses(discriminator, decoded, true)[1].backward()
        optimizer.step()
    assert discriminator(true).mean() > 0.5 and discriminator(decoded).mean() < -0.5
    start = decoded.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(adversarial_losses(discriminator, start, true)[0], start)
    assert (-grad)[..., 0].mean() > 0


def test_the_perceptual_loss_is_zero_for_equal_features_and_blind_to_their_scale():
    a, b = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    assert perceptual_loss(a, a).item() == 0 and perceptual_loss(3 * a, a).item() == pytest.approx(0, abs=1e-4)
    assert perceptual_loss(a, b).item() > 0.5


# -- what an edit changes

EDITED: Document = (Text((1,)), Image(), Text((40, 2)), Image(is_target=True), Text((3,), is_target=True))


def test_last_edits_have_a_picture_before_them_and_none_behind(components):
    chain = (*EDITED, Text((1,)), Image(is_target=True), Text((3,), is_target=True))
    batch = pack([EDITED, DRAWN, SHOWN, chain], components.layout)  # pictures: 0 1, 2, 3, 4 5 6
    assert last_edits(batch).nonzero().flatten().tolist() == [1, 6]


def test_a_hidden_image_counts_by_the_deep_flows_gaussians_and_leaves_others_as_they_are(components):
    batch, level = pack([EDITED, DRAWN], components.layout), torch.tensor([0.1, 0.3, 0.5])
    x = torch.randn(3, 64, 4)
    for edited, drawn in ((True, False), (False, True)):
        blind = torch.tensor([False, edited, drawn])
        terms = joint_loss(components.pretzel, batch, (x, level), components.cfg.noise, blind)
        sighted, out = (
            read_documents(components.pretzel, batch, x, level),
            read_documents(components.pretzel, batch, x, level, blind),
        )
        z = (out.u - out.affine.mu) / out.affine.scale
        hidden = (0.5 * z.square() + out.affine.log_scale).sum((1, 2)) / 256  # without the constant, of 256 numbers
        exact = -sighted.log_prob / 256 - HALF_LOG_TAU
        hidden_one, counted = (1, 2) if edited else (2, 1)
        assert terms.blind.item() == pytest.approx(level[hidden_one].item() * hidden[hidden_one].item() / 2, rel=1e-4)
        assert terms.flow.item() == pytest.approx(level[counted].item() * exact[counted].item() / 2, abs=1e-6)


def test_without_hidden_images_all_likelihoods_are_exact(components):
    batch, level = pack([EDITED, DRAWN], components.layout), torch.tensor([0.1, 0.3, 0.5])
    given = components.pretzel, batch, (torch.randn(3, 64, 4), level), components.cfg.noise
    plain, none = joint_loss(*given), joint_loss(*given, torch.zeros(3, dtype=torch.bool))
    # masks of nothing change no operand of any sum, so the bits are the same
    assert (plain.flow, plain.text, plain.blind) == (none.flow, none.text, none.blind) and plain.blind == 0


def test_positions_after_an_image_are_those_behind_its_begin_slot_in_its_document(components):
    """Against every position looked at by hand, for each set of chosen images."""
    batch = pack([EDITED, DRAWN, SHOWN, WORDS], components.layout, 300)
    begins = list(zip(batch.pictures.row.tolist(), batch.pictures.begin.tolist(), strict=True))
    for chosen in ([False] * 4, [True, False, False, False], [False, True, True, False], [True] * 4):
        expected = torch.zeros_like(batch.ids, dtype=torch.bool)
        for (row, begin), is_chosen in zip(begins, chosen, strict=True):
            for position in range(batch.ids.shape[1]):
                same = batch.document[row, position] == batch.document[row, begin]
                if is_chosen and same and position > begin:
                    expected[row, position] = True
        assert torch.equal(losses.after_images(batch, torch.tensor(chosen)), expected)
    assert len(batch.ids) < 4 and bool(losses.after_images(batch, torch.ones(4, dtype=torch.bool)).any())


def test_words_after_a_hidden_image_do_not_count_and_all_others_count_as_before(components):
    cut: Document = (Text((1,)), Image(), Text((40, 2)), Image(is_target=True))
    asked: Document = (*cut, Text((3,), is_target=True), Text((7,)), Text((6, 3), is_target=True))
    drawn: Document = (Text((40, 2)), Image(is_target=True), Text((1,)), Text((5, 3), is_target=True))
    x, level = torch.randn(3, 64, 4), torch.tensor([0.1, 0.3, 0.5])

    def text(documents: list[Document], which: slice, blind: list[bool]) -> float:
        batch, noise = pack(documents, components.layout), components.cfg.noise
        given = components.pretzel, batch, (x[which], level[which]), noise, torch.tensor(blind)
        return joint_loss(*given).text.item()

    both = text([asked, drawn], slice(3), [False, True, False])
    begin, alone = text([cut], slice(2), [False, True]), text([drawn], slice(2, 3), [False])
    assert both == pytest.approx((begin + 2 * alone) / 5, rel=1e-5), "of five replies, two stand behind what is hidden"
    sighted = text([asked, drawn], slice(3), [False, False, False])
    assert both < 0.9 * sighted


def test_neither_stream_sees_the_latents_of_a_hidden_image_but_both_see_the_one_before(components):
    batch, blind = pack([EDITED], components.layout), torch.tensor([False, True])
    x, level = torch.randn(2, 64, 4), torch.tensor([0.1, 0.3])
    predicted = []
    for changed in (None, 0, 1):
        other = x.clone()
        if changed is not None:
            other[changed] += 1.0
        predicted.append(read_documents(components.pretzel, batch, other, level, blind).affine.mu[1])
    assert torch.equal(predicted[0], predicted[2]) and not torch.equal(predicted[0], predicted[1])
    assert not torch.equal(predicted[0], read_documents(components.pretzel, batch, x, level).affine.mu[1])


def test_a_blind_prediction_cannot_be_had_cheaper_by_shrinking_what_is_predicted(components):
    batch, blind = pack([EDITED], components.layout), torch.tensor([False, True])
    out = read_documents(components.pretzel, batch, torch.randn(2, 64, 4), torch.tensor([0.01, 0.2]), blind)
    (grad,) = torch.autograd.grad(losses._gaussian_nats(out)[1], out.u)
    assert grad[1].abs().max() == 0 and grad[0].abs().max() > 0
