"""Mixes of nano: conversations, captions of drawings, the end of joint training, and what nano-grown does otherwise."""

from __future__ import annotations

from dataclasses import replace

from starflow2.training.config import (
    CaptionConfig,
    MixConfig,
    OptimConfig,
    StageConfig,
    TalkConfig,
    WarmupMixConfig,
    WarmupTalkConfig,
)

__all__ = ["ENDED", "GROWN", "NANO_DRAWINGS", "NANO_END", "NANO_TALK", "NANO_TALK_EARLY"]

NANO_TALK_EARLY = TalkConfig(  # what an image shows, places of lone objects, letters with two options
    picture=0.56, places=0.14, sides=0.03, details=0.05, pictures=0.05, choice=0.06, reading=0.03, game=0.02, check=0.06
)
NANO_TALK = TalkConfig(  # sides make up a third of yes or no, checks a sixth of the conversations
    picture=0.28, places=0.07, sides=0.19, details=0.09, pictures=0.06, choice=0.08, reading=0.05, game=0.02, check=0.16
)
NANO_DRAWINGS = CaptionConfig(  # edits and stories make the model forget counts and positions first
    single_object=0.03,
    two_object=0.17,
    counting=0.16,
    colors=0.05,
    position=0.20,
    color_attr=0.16,
    dense=0.01,
    mixed=0.08,
    many=0.04,
    placed=0.06,
    sized=0.04,
)


NANO_END = StageConfig(  # without the distance to the flow of t2i: docs/choices.md#the-end-of-stage-joint
    name="end",
    steps=560,
    batch=32,
    optim=OptimConfig(lr=6e-4, matrix_lr=9e-4, decay_share=1.0),
    mix=MixConfig(understand=0.03, check=0.05, draw=0.53, edit=0.24, chain=0.02, beginning=0.08, story=0.05),
    captions=NANO_DRAWINGS,
    talk=NANO_TALK,
    keep_as="nano-heldout",
)

_HALVES = TalkConfig(  # three of four, or columns are never seen; alone, all else is forgotten: docs/LOG.md
    picture=0.15, places=0, sides=0, details=0.07, pictures=0, choice=0, reading=0, game=0, check=0.03, halves=0.75
)
_PLACES = replace(NANO_TALK, picture=0.22, places=0.14, sides=0.22, halves=0.08, check=0.13)
_COUNTED = replace(NANO_DRAWINGS, counting=0.26, placed=0.04, sized=0.02)  # counts are what a new stage forgets first
GROWN: dict[str, dict[str, object]] = {  # by stage, where recipe nano-grown is not nano
    "vlm": {
        "steps": 2400,
        "optim": OptimConfig(lr=2e-3, matrix_lr=4e-3, decay_share=0.8),
        "warmup_talk": WarmupTalkConfig(steps=250, mix=_HALVES),
        "talk": _PLACES,
    },
    "adapter": {"steps": 400},
    "joint": {
        "steps": 3400,
        "optim": OptimConfig(lr=1.2e-3, matrix_lr=1.8e-3, decay_share=0.8),
        "kl_to_t2i": 0.0,
        "hidden_latents_share": 0.3,
        "warmup_mix": WarmupMixConfig(),
        "mix": MixConfig(understand=0.03, check=0.05, draw=0.5, edit=0.2, chain=0.03, beginning=0.12, story=0.07),
        "captions": _COUNTED,
        "keep_as": "nano-heldout",
    },
    "final": {"steps": 500, "captions": _COUNTED},
}

_PLAIN_DRAWINGS = replace(  # GenEval's families: what version 0 draws, before it learns the others
    NANO_DRAWINGS, two_object=0.25, counting=0.2, color_attr=0.22, position=0.17, mixed=0.04, many=0.02, placed=0.02
)
_FIRST_PROMPTS = replace(  # a newcomer asks for places in the picture, several kinds with their counts, three objects
    NANO_DRAWINGS, counting=0.18, position=0.15, color_attr=0.15, mixed=0.1, many=0.06, placed=0.08, sized=0.03
)
_MOSTLY_DRAWN = MixConfig(understand=0.05, check=0.0, draw=0.65, edit=0.18, chain=0.02, beginning=0.05, story=0.05)
ENDED: dict[str, dict[str, object]] = {  # by stage, where recipe nano-final is not nano
    "end": {
        "steps": 560,
        "optim": OptimConfig(lr=5e-4, matrix_lr=7.5e-4, decay_share=1.0),
        "mix": _MOSTLY_DRAWN,
        "captions": _PLAIN_DRAWINGS,
        "keep_as": "",  # nano-heldout stays version 0, which draws what is held out no worse: docs/LOG.md
    },
    "final": {
        "steps": 1100,
        "optim": OptimConfig(lr=6e-4, matrix_lr=9e-4, decay_share=1.0),
        "mix": _MOSTLY_DRAWN,
        "captions": _FIRST_PROMPTS,
        "mean_with": "nano-heldout",  # which takes back what the stage makes worse: docs/LOG.md
    },
}
