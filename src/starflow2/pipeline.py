"""StarFlow2, the public face: load a model by name, folder or Hub id, draw, save, share.

Everything it does is a call into generate and checkpoint. Not here: training and scoring.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow2.core.fields import SEEDS, Range, number, of_kind, whole
from starflow2.core.files import named_place, replacing
from starflow2.core.images import PictureSource, PILImage, checked_pixels, is_same_image, read_picture, to_pil
from starflow2.core.text import shown
from starflow2.core.torch_defaults import inference_defaults, torch_defaults
from starflow2.errors import ConfigError, OutputError, ShapeError, StateError
from starflow2.inference.cleanup import denoised
from starflow2.inference.config import DrawConfig, Precision, ReplyLimits
from starflow2.inference.conversations import generate_replies, reply_after
from starflow2.inference.events import DecodedImage, Event, Made, RowEvent, Stepped, Wrote
from starflow2.inference.likelihood import Code, Score, decode_code, image_nats, invert, score
from starflow2.inference.reading import PastTurn
from starflow2.inference.sampler import Sampler
from starflow2.inference.self_check import (
    CONFIRMED,
    Attempt,
    Request,
    attempts,
    best,
    checked_tries,
    choice_of,
)
from starflow2.inference.session import Said, Session, checked_part
from starflow2.inference.vlm_answer import answer
from starflow2.models.checkpoint import load_components, save_components
from starflow2.models.components import Components
from starflow2.models.hub import find_model, pick_device
from starflow2.models.prompts import check_words, listed_prompts, normalized
from starflow2.models.trained_wordings import Form, nearest_trained

__all__ = ["Drawing", "Images", "StarFlow2"]

MAX_IMAGES = 2**16  # of a prompt in one call


@dataclass(frozen=True, slots=True)
class Drawing:
    """An image that the model drew, its prompt, and the seed that draws it again with one try."""

    image: PILImage
    prompt: str
    seed: int
    settings: dict[str, Any]
    gain: float | None = None  # nats by which the prompt makes the picture likelier than no prompt, if it was measured
    confidence: float | None = None  # with which the model confirms it, where it was chosen from several tries
    is_unchanged: bool = False  # an edit after which the image is what it was

    @property
    def is_confirmed(self) -> bool:
        """False if the model itself does not hold any of several tries for what was asked for."""
        return self.confidence is None or self.confidence > CONFIRMED


def _gain(picture: DecodedImage) -> float | None:
    """log p(picture | words) - log p(picture), free of charge where guidance read both."""
    if picture.log_prob is None or picture.unconditional_log_prob is None:
        return None
    return picture.log_prob - picture.unconditional_log_prob


def _counting(progress: Callable[[int, int], None] | None, total: int) -> Callable[[RowEvent], None]:
    """A callback for events that reports how many of all latents are drawn."""
    done = itertools.count(1)
    if progress is not None and not callable(progress):
        raise ConfigError(f"progress is {shown(progress)}; expected a function of (done, total).")

    def watch(event: RowEvent) -> None:
        if progress is not None and isinstance(event, Stepped):
            progress(next(done), total)

    return watch


def _words(blocks: Sequence[str | DecodedImage]) -> str:
    """Words of a reply, without its images."""
    return " ".join(block for block in blocks if isinstance(block, str))


def _blocks(events: Iterable[Event]) -> list[str | Tensor]:
    """Words and images (3, s, s) of a reply in order."""
    blocks: list[str | Tensor] = []
    for event in events:
        if isinstance(event, Made):
            blocks.append(event.picture.image)
        elif isinstance(event, Wrote):
            last = blocks.pop() if blocks and isinstance(blocks[-1], str) else ""
            blocks.append(f"{last}{event.text}")
    return [block.strip() if isinstance(block, str) else block for block in blocks]


def _shown(image: PictureSource) -> PictureSource:
    """An image for a session: a file name becomes a Path there, since a str would be words."""
    return Path(image) if isinstance(image, str) else image


def _listed(**lists: object) -> None:
    """Raise ConfigError unless all of these are lists, tuples or tensors with one entry for each row."""
    counts: dict[str, int] = {}
    for name, entries in lists.items():
        is_rows = isinstance(entries, Tensor) and entries.ndim > 0
        if isinstance(entries, str | bytes | bytearray) or not (is_rows or isinstance(entries, Sequence)):
            raise ConfigError(f"{name} is {shown(entries)} ({type(entries).__name__}); expected a list.")
        counts[name] = len(entries)  # type: ignore[arg-type]
    if len(set(counts.values())) > 1:
        found = " and ".join(f"{count} {name}" for name, count in counts.items())
        raise ConfigError(f"{found}; expected equally many.")


def _batch(images: object) -> Tensor:
    """Images (B, 3, height, width) in [-1, 1]. Raises ShapeError, DataError."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        got = tuple(images.shape) if isinstance(images, Tensor) else shown(images)
        raise ShapeError(f"images is {got}; expected a tensor (B, 3, height, width).")
    return checked_pixels(images, "images")


def _checked_config(config: DrawConfig | None) -> DrawConfig | None:
    """The settings that were given, or None. Raises ConfigError."""
    return None if config is None else of_kind(config, DrawConfig, "config")


@dataclass(frozen=True, slots=True)
class Images:
    """Images of a call in the manner of diffusers' pipelines."""

    images: list[PILImage]


class StarFlow2:
    """A trained model that reads, answers, draws and edits.

    >>> model = StarFlow2.from_pretrained("nano")  # doctest: +SKIP
    >>> model.generate("two pink hearts", n=4)[0].image.save("hearts.png")  # doctest: +SKIP
    """

    def __init__(self, components: Components, config: DrawConfig | None = None) -> None:
        """config: settings of every call that gives none of its own; by default the model's."""
        self.components = of_kind(components, Components, "components", "StarFlow2.from_pretrained(name) loads a model")
        self.config = _checked_config(config)
        self._samplers: dict[Precision, tuple[tuple[tuple[int, int], ...], Sampler]] = {}

    @property
    def device(self) -> torch.device:
        return self.components.device

    # -- pictures -----------------------------------------------------------------------------------

    @inference_defaults()
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int = 0,
        tries: int | None = None,
        config: DrawConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Drawing]:
        """`n` images of each prompt, prompt by prompt; image j of any prompt has seed + j.

        tries: how many are drawn of each, to keep the one that the model's own answer confirms (`self_check`); None:
        the model's own number; 1: the plain sample. Equal prompt, seed and tries give equal images, up to rounding,
        whatever else is in the call. Raises PromptError for an empty, overlong or unknown-word prompt, ConfigError for
        n or tries below 1, StateError for more tries than one of a model that has not learnt to check itself.
        """
        prompts = listed_prompts(prompts)
        n, seed = whole(n, "n", Range(least=1, most=MAX_IMAGES)), whole(seed, "seed", SEEDS)
        whole(seed + n - 1, "the last seed", SEEDS)
        for prompt in prompts:
            self.check_prompt(prompt)
        config = _checked_config(config) or self.settings
        pairs = [(p, seed + j) for p in prompts for j in range(n)]
        settings = {
            "guidance": config.guidance,
            "prior_scale": config.prior_scale,
            "cleanup": config.cleanup,
            "model": self.components.cfg.name,
        }
        count = self._tries(tries, config)
        is_checked = {prompt: count > 1 and self._can_check(prompt, tries) for prompt in prompts}
        total = sum(count if is_checked[prompt] else 1 for prompt, _ in pairs)
        watch = _counting(progress, total * self.components.layout.num_latents)
        checked, plain = ([pair for pair in pairs if is_checked[pair[0]] is wanted] for wanted in (True, False))
        kept = iter(self._checked(checked, count, config, watch) if checked else ())
        drawn = iter(
            self._drawn([p for p, _ in plain], [s for _, s in plain], config, watch) if plain or not pairs else ()
        )
        drawings = []
        for prompt, s in pairs:
            if is_checked[prompt]:
                one = next(kept)
                image, gain = to_pil(one.picture.image), _gain(one.picture)
                drawings.append(Drawing(image, prompt, one.seed, settings, gain, one.confidence))
            else:
                picture = next(drawn)
                drawings.append(Drawing(to_pil(picture.image), prompt, s, settings, _gain(picture)))
        return drawings

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: PictureSource | None = None,
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Images:
        """`model("two pink hearts").images[0]`, for hands used to diffusers; with `image`, that image as edited.

        A generator gives the seed, which is 0 without one. Raises as `generate` and `edit` do.
        """
        config = self.settings
        if guidance_scale is not None:
            config = replace(config, guidance=guidance_scale, edit_guidance=None)
        seed = 0 if generator is None else int(torch.randint(2**31, (), generator=generator))
        if image is None:
            drawn = self.generate(prompt, n=num_images_per_prompt, seed=seed, config=config)
            return Images([drawing.image for drawing in drawn])
        count = whole(num_images_per_prompt, "num_images_per_prompt", Range(least=1, most=MAX_IMAGES))
        wanted = [(text, seed + j) for text in listed_prompts(prompt) for j in range(count)]
        return Images([self.edit(image, text, seed=s, config=config).image for text, s in wanted])

    def _tries(self, tries: int | None, config: DrawConfig) -> int:
        """How many images of each request are drawn; by default the model's own number, if it can check them."""
        cfg = self.components.cfg
        if tries is None and (not self.is_joint or config.cleanup != "none"):
            return 1
        count = checked_tries(cfg, tries)
        if count > 1:
            self._check_stage("joint", f"tries={count}")
        return count

    def _can_check(self, prompt: str, tries: int | None) -> bool:
        """True if the model can ask itself about an image of a prompt. Raises PromptError for tries that are given."""
        read = normalized(self.components, prompt)
        return choice_of(self.components.cfg, read, tries, follows=False)[0] > 1

    def _checked(
        self,
        pairs: Sequence[tuple[str, int]],
        tries: int,
        config: DrawConfig,
        watch: Callable[[RowEvent], None],
    ) -> list[Attempt]:
        """The confirmed image of each (prompt, seed)."""
        sampler = self.sampler(config)
        read = [normalized(self.components, prompt) for prompt, _ in pairs]
        requests = [Request([text], text) for text in read]
        return [best(tried) for tried in attempts(sampler, requests, [seed for _, seed in pairs], tries, watch)]

    @inference_defaults()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        config: DrawConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """One image per (prompt, seed) as a tensor (B, 3, height, width) in [-1, 1], unchecked."""
        _listed(prompts=prompts, seeds=seeds)
        watch = _counting(progress, len(prompts) * self.components.layout.num_latents)
        drawn = self._drawn(prompts, seeds, _checked_config(config) or self.settings, watch)
        return torch.stack([p.image for p in drawn]).cpu()

    @property
    def is_joint(self) -> bool:
        """True if both streams have been trained together, so that the model holds conversations."""
        return "joint" in self.components.finished_stages

    @property
    def settings(self) -> DrawConfig:
        """Settings of calls that give none of their own."""
        return self.config or DrawConfig.for_model(self.components)

    @inference_defaults()
    def sampler(self, config: DrawConfig | None = None) -> Sampler:
        """Both streams ready for sampling with the weights of this moment, which are copied once they have changed."""
        config = _checked_config(config) or self.settings
        now = self._versions()
        then, sampler = self._samplers.get(config.precision, (None, None))
        if sampler is None or then != now or sampler.components is not self.components:
            sampler = Sampler(self.components, config)
            self._samplers[config.precision] = now, sampler
        return sampler.changed(**{f.name: getattr(config, f.name) for f in fields(config)})

    def _versions(self) -> tuple[tuple[int, int], ...]:
        """Address and version of every weight, which differ after any change in place or of the tensor."""
        return tuple((x.data_ptr(), x._version) for x in self.components.state_dict(keep_vars=True).values())

    def exact_sampler(self) -> Sampler:
        """A sampler for likelihoods and codes: in float64 on CPU, where that costs little."""
        config = self.settings
        doubles = self.device.type == "cpu" and config.precision == "auto"
        return self.sampler(replace(config, precision="float64") if doubles else config)

    def _drawn(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        config: DrawConfig,
        watch: Callable[[RowEvent], None],
    ) -> list[DecodedImage]:
        """Images of (prompt, seed), cleaned up if asked. Raises StateError for a model that has not learnt to draw."""
        self._check_stage("t2i", "drawing")
        if len(prompts) != len(seeds) or not prompts:
            raise ConfigError(
                f"{len(prompts)} prompts and {len(seeds)} seeds; expected equally many, and at least one of each."
            )
        seeds = [whole(seed, "seed", SEEDS) for seed in seeds]
        sampler = self.sampler(config)
        prompts = [normalized(self.components, p) for p in prompts]
        limits = ReplyLimits(tokens=0, pictures=1)
        replies = generate_replies(sampler, [[[p]] for p in prompts], seeds, limits, draws=True, watch=watch)
        drawn = [part for ((part, *_),) in replies if isinstance(part, DecodedImage)]
        if config.cleanup == "none":
            return drawn
        x = denoised(sampler, prompts, torch.stack([p.x for p in drawn]))
        images = self.components.codec.decode(x.to(self.components.flow.deep.head.weight.dtype))
        return [replace(p, image=image) for p, image in zip(drawn, images, strict=True)]

    def _check_stage(self, stage: str, verb: str) -> None:
        """Raise StateError for a model that has not finished a stage."""
        done = self.components.finished_stages
        if stage not in done:
            raise StateError(
                f"this model has finished stages {', '.join(done) or 'none'}; {verb} needs {stage}: train it first."
            )

    # -- conversations ------------------------------------------------------------------------------

    @inference_defaults()
    def session(self, *, seed: int = 0, config: DrawConfig | None = None) -> Session:
        """A conversation with this model. Raises StateError if its streams were not trained together."""
        return Session(self.sampler(config), seed)

    @inference_defaults()
    def ask(self, image: PictureSource, question: str) -> str:
        """An answer about an image: a file, bytes, a PIL image, uint8, or a tensor (3, s, s) in [-1, 1].

        Raises PromptError, and DataError and ShapeError, see `core.images.read_picture`.
        """
        return self.session().add(_shown(image), question).write()

    @inference_defaults()
    def edit(
        self,
        image: PictureSource,
        instruction: str,
        *,
        seed: int = 0,
        tries: int | None = None,
        config: DrawConfig | None = None,
    ) -> Drawing:
        """The image, changed by an instruction; image as in `ask`, tries as in `generate`.

        Raises PromptError, DataError, ShapeError, ConfigError, StateError.
        """
        session = self.session(seed=seed, config=config)
        made = session.add(_shown(image), instruction).draw(tries=tries)
        used = session.sampler.config
        settings = {
            "guidance": used.strength(follows=True),
            "prior_scale": used.prior_scale,
            "model": self.components.cfg.name,
        }
        drawn_with = seed if made.seed is None else made.seed
        before = next(piece.picture for piece in session.pieces if piece.picture is not None)
        same = is_same_image(before.image, made.picture.image)
        return Drawing(made.image, instruction, drawn_with, settings, _gain(made.picture), made.confidence, same)

    # -- many at once, for suites

    @inference_defaults()
    def answers(self, images: Sequence[Sequence[Tensor]], questions: Sequence[str], tokens: int = 48) -> list[str]:
        """One answer per (pictures, question), greedy; pictures (3, s, s) in [-1, 1], any number each."""
        _listed(images=images, questions=questions)
        for pictures in images:
            _listed(images=pictures)
        talks: list[list[list[str | Tensor]]] = [
            [[*map(self._picture, pictures), normalized(self.components, q)]]
            for pictures, q in zip(images, questions, strict=True)
        ]
        replies = generate_replies(self.sampler(), talks, [0] * len(talks), ReplyLimits(tokens=tokens, pictures=0))
        return [_words(blocks) for (blocks,) in replies]

    @inference_defaults()
    def answers_after(self, pasts: Sequence[Sequence[PastTurn]], questions: Sequence[str]) -> list[str]:
        """One greedy answer per question, each after past turns (user, assistant) of words and images (3, s, s)."""
        _listed(pasts=pasts, questions=questions)
        for past in pasts:
            _listed(pasts=past)
            for turn in past:
                _listed(turn=turn)
        talks = zip(pasts, questions, strict=True)
        return self.replies([[*(side for turn in past for side in turn), [question]] for past, question in talks])

    @inference_defaults()
    def replies(self, talks: Sequence[Sequence[Sequence[Said]]], *, tokens: int = 48) -> list[str]:
        """One greedy reply in words per conversation; its messages are the user's and the model's in turn.

        A message is a list of words (str) and images, as `score` takes them; the last message is the user's.
        Raises ConfigError for an even number of messages, DataError and ShapeError for images it cannot take.
        """
        _listed(talks=talks)
        for talk in talks:
            _listed(messages=talk)
            for message in talk:
                _listed(message=message)
        counts = {len(talk) for talk in talks}
        if any(count % 2 == 0 for count in counts):
            raise ConfigError(f"talks have {sorted(counts)} messages; expected an odd number: the last is the user's.")
        read = [[[self._read(part) for part in message] for message in talk] for talk in talks]
        pasts = [list(zip(talk[:-1:2], talk[1::2], strict=True)) for talk in read]
        limits = ReplyLimits(tokens=tokens, pictures=0)
        return [_words(blocks) for blocks in reply_after(self.sampler(), pasts, [talk[-1] for talk in read], limits)]

    def _read(self, part: Said) -> str | Tensor:
        """Words or an image as the model reads them."""
        return normalized(self.components, part) if isinstance(part, str) else self._picture(part)

    @inference_defaults()
    def tower_answers(self, images: Tensor, questions: Sequence[str]) -> list[str]:
        """Answers of the language model alone, which sees images (B, 3, s, s) through its own vision tower."""
        _listed(images=images, questions=questions)
        images = _batch(images)
        return answer(self.components, images, [normalized(self.components, q) for q in questions])

    @inference_defaults()
    def edits(self, images: Tensor, instructions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Images (B, 3, s, s) in [-1, 1], each changed by its instruction."""
        _listed(images=images, instructions=instructions, seeds=seeds)
        if not len(images):
            raise ConfigError("images is empty; expected at least one.")
        turns: list[list[list[str | Tensor]]] = [
            [[self._picture(image), normalized(self.components, text)]]
            for image, text in zip(images, instructions, strict=True)
        ]
        seeds = [whole(seed, "seed", SEEDS) for seed in seeds]
        replies = generate_replies(self.sampler(), turns, seeds, ReplyLimits(tokens=0, pictures=1), draws=True)
        return torch.stack([p.image for ((p, *_),) in replies if isinstance(p, DecodedImage)]).cpu()

    @inference_defaults()
    def tried(self, turns: Sequence[Sequence[str | Tensor]], seeds: Sequence[int], tries: int) -> tuple[Tensor, Tensor]:
        """`tries` images (B, T, 3, s, s) of each user turn, and the confidence (B, T) with which the model holds them.

        The first try of a turn is its plain sample. A turn is words, and any images (3, s, s) before them.
        """
        self._check_stage("joint", f"tries={tries}")
        count, seeds = checked_tries(self.components.cfg, tries), [whole(seed, "seed", SEEDS) for seed in seeds]
        requests = []
        for turn in turns:
            parts = [normalized(self.components, p) if isinstance(p, str) else self._picture(p) for p in turn]
            requests.append(Request(parts, " ".join(part for part in parts if isinstance(part, str))))
        rows = attempts(self.sampler(), requests, seeds, count)
        images = torch.stack([torch.stack([a.picture.image for a in row]) for row in rows]).cpu()
        return images, torch.tensor([[a.confidence for a in row] for row in rows], dtype=torch.float64)

    @inference_defaults()
    def tell(self, talks: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[list[list[str | Tensor]]]:
        """Replies to every turn of every conversation: words and images (3, s, s) in the model's own order."""
        _listed(talks=talks, seeds=seeds)
        for talk in talks:
            _listed(talks=talk)
        turns = [[[normalized(self.components, turn)] for turn in talk] for talk in talks]
        seeds = [whole(seed, "seed", SEEDS) for seed in seeds]
        replies = generate_replies(self.sampler(), turns, seeds, ReplyLimits(tokens=64, pictures=1))
        return [[[b if isinstance(b, str) else b.image for b in turn] for turn in talk] for talk in replies]

    @inference_defaults()
    def tell_confirmed(
        self, talks: Sequence[Sequence[str]], seeds: Sequence[int], tries: int
    ) -> list[list[list[str | Tensor]]]:
        """Replies as of `tell`, each the one of `tries` whose image the model confirms, and goes on with."""
        replies = []
        for talk, seed in zip(talks, seeds, strict=True):
            session = self.session(seed=seed)
            replies.append([_blocks(session.add(turn).run(tries=tries)) for turn in talk])
        return replies

    # -- likelihood -----------------------------------------------------------------------------------

    @inference_defaults()
    def score(self, prompt: Sequence[Said], reply: Sequence[Said]) -> Score:
        """Log probability of `reply` after `prompt`, token by token and patch by patch; see `likelihood.score`.

        Either side is a list of words (str) and images: a Path, bytes, a PIL image, uint8, or (3, s, s) in [-1, 1].
        Raises PromptError for words the model does not know, DataError and ShapeError for pictures it cannot take.
        """
        for name, side in (("prompt", prompt), ("reply", reply)):
            if not isinstance(side, list | tuple):
                wanted = "expected a list of words and images"
                raise ConfigError(f"{name} is {shown(side)} ({type(side).__name__}); {wanted}, such as [{name}].")
        before, after = ([checked_part(self.components, part) for part in side] for side in (prompt, reply))
        return score(self.exact_sampler(), before, after)

    @inference_defaults()
    def invert(self, image: PictureSource, prompt: str = "") -> Code:
        """The latent code from which `prompt` draws this image; see `likelihood.invert`. Raises as `score` does."""
        return invert(self.exact_sampler(), self._picture(image), self._prompt(prompt))

    @inference_defaults()
    def nats_of(self, images: Sequence[PictureSource]) -> list[float]:
        """-log density of images without words, in nats per dim, at the noise level at which images are drawn.

        The higher, the less an image is like those of training (docs/choices.md#images-from-elsewhere).

        Raises as `ask` does for an image that it cannot take.
        """
        return image_nats(self.sampler(), [self._picture(_shown(image)) for image in images])

    def is_far(self, image: PictureSource) -> bool:
        """True for an image unlike all that the model was trained on, about which its answers and edits mean little.

        False for a model whose config does not say where that begins (`far_nats`).
        """
        far = self.components.cfg.far_nats
        return far is not None and self.nats_of([image])[0] > far

    def nearest_trained(self, text: str, task: Form) -> str:
        """A sentence of the model's training, the one most like `text`, where that is outside the trained forms.

        task: "draw", "edit" or "ask". "" for a text of a trained form, and for models that read any text. Raises
        PromptError for what is no text.
        """
        return nearest_trained(self.components, text, task)

    @inference_defaults()
    def from_code(self, code: Code, prompt: str = "") -> PILImage:
        """The image that `prompt` draws from a code: with the prompt of `invert` the same one, else an edit.

        Raises PromptError, and ShapeError for a code of another model's size.
        """
        if not isinstance(code, Code):
            raise ConfigError(f"code is {shown(code)} ({type(code).__name__}); expected what invert gave.")
        return to_pil(decode_code(self.exact_sampler(), code.z, self._prompt(prompt)).image)

    def _picture(self, image: PictureSource) -> Tensor:
        """An image as the model reads it, (3, s, s) in [-1, 1]."""
        return read_picture(image, self.components.cfg.fae.image_size)

    def _prompt(self, prompt: str) -> str:
        """The prompt as the model reads it; "" for none."""
        return str(checked_part(self.components, prompt)) if normalized(self.components, prompt).strip() else ""

    @inference_defaults()
    def roundtrip(self, images: Tensor, noise_level: float = 0.0, seed: int = 0) -> Tensor:
        """images (B, 3, h, w) through the codec and back, with noise of that level on the latents."""
        noise_level = number(noise_level, "noise_level", Range(least=0))
        latents = self.components.codec.encode(_batch(images).to(self.device))
        eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(whole(seed, "seed", SEEDS)))
        return self.components.codec.decode(latents + noise_level * eps.to(latents)).cpu()

    @property
    def sampling_noise(self) -> float:
        """Noise level of sampled latents (standard deviation, on standardised latents)."""
        return self.components.cfg.draw_level

    def check_prompt(self, prompt: str) -> None:
        """Raise PromptError for what this model cannot draw: nothing, too much, unknown words."""
        check_words(self.components, prompt)

    # -- files and Hub --------------------------------------------------------------------------------

    @inference_defaults()
    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **hub: Any,
    ) -> str | None:
        """Write the model folder, whole or not at all, and a model card where there is none.

        push_to_hub: upload it, too, as `repo_id` (by default the folder's name) and with the options in `hub`, those of
        huggingface_hub; returns the url of the commit. Raises ConfigError for such options without an upload.
        """
        unused = [name for name, value in hub.items() if value is not None and not push_to_hub]
        if unused:
            raise ConfigError(f"{unused[0]} is an option of push_to_hub, which is False; leave it out, or upload.")
        from starflow2.models.sharing import HubModel  # imported here: it takes longer than all else

        if model_card_kwargs is not None and not isinstance(model_card_kwargs, dict):
            raise ConfigError(f"model_card_kwargs is {shown(model_card_kwargs)}; expected a dictionary.")
        folder = save_components(self.components, named_place(save_directory, "save_directory", OutputError))
        card = self._card_facts() | (model_card_kwargs or {})
        if not (folder / "README.md").exists():
            with replacing(folder / "README.md") as temp:
                HubModel(self.save_pretrained).generate_model_card(**card).save(temp)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=card, **hub)

    def push_to_hub(self, repo_id: str, **hub: Any) -> str:
        """Upload the model folder and a card as `repo_id`, with the options in `hub`, those of huggingface_hub; returns
        the url of the commit."""
        from starflow2.models.sharing import HubModel  # imported here, as above

        return HubModel(self.save_pretrained).push_to_hub(repo_id, **hub)

    def _card_facts(self) -> dict[str, str]:
        """Facts of this model for its card."""
        parameters = sum(p.numel() for p in self.components.parameters())
        count = f"{parameters / 1e6:,.1f} million" if parameters < 1e9 else f"{parameters / 1e9:,.1f} billion"
        return {
            "name": self.components.cfg.name,
            "stages": ", ".join(self.components.finished_stages) or "none",
            "size": str(self.components.cfg.fae.image_size),
            "parameters": count,
            "prompt": "two pink hearts" if self.components.vocabulary else "a kite over the sea",
        }

    @classmethod
    @torch_defaults()
    def from_pretrained(
        cls, name: str | Path = "nano", *, device: str | int | torch.device | None = "auto", **hub: Any
    ) -> StarFlow2:
        """A model by name ("nano"), folder or Hub id; `hub` goes to huggingface_hub's download.

        Raises CheckpointError for anything that is no whole starflow2 model, DeviceError.
        """
        where = pick_device(device)
        return cls(load_components(find_model(name, **hub), where))
