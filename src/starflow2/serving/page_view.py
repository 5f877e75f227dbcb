"""HTML of the page: messages, the strip of tries, clickable examples, the header. Pure functions of what they show.

Everything that a visitor or a model said is escaped here; pictures are in the page itself, as data URLs, so that no
file is written and no address outside is asked. Not here: the conversation (talks), Gradio (page).
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypedDict

from torch import Tensor

from starflow2.core.images import PILImage, to_pil
from starflow2.serving.talks import Desk, Heat, Picture, Talk, Try, Turn
from starflow2.world.examples import Example

__all__ = ["Message", "chips", "header", "messages", "placeholder", "strip", "tabs", "vocabulary"]

MARK = (  # a heart, a square and a star, as the model draws them
    '<svg class="mark" viewBox="0 0 64 24" aria-hidden="true">'
    '<path class="a" d="M11 20.5 3.4 12.8a5 5 0 0 1 7.1-7l.5.5.5-.5a5 5 0 0 1 7.1 7z"/>'
    '<rect class="b" x="25" y="5" width="14" height="14" rx="2.2" transform="rotate(8 32 12)"/>'
    '<path class="c" d="m53 3.2 2.6 5.6 6.1.7-4.5 4.2 1.2 6-5.4-3-5.4 3 1.2-6-4.5-4.2 6.1-.7z"/></svg>'
)


class Message(TypedDict):
    """One message of Gradio's Chatbot."""

    role: str
    content: str


@lru_cache(maxsize=512)
def _url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _source(image: PILImage) -> str:
    """The image as a data URL."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return _url(file.getvalue())


def _escaped(text: str) -> str:
    """Text for HTML within Markdown: neither has signs of its own left, and it stays on one line."""
    safe = html.escape(text, quote=True).replace("\n", "<br>")
    return "".join(f"&#{ord(sign)};" if sign in "*_`~[]()#|\\$!" else sign for sign in safe)


# -- the conversation -----------------------------------------------------------------------------------------------


def messages(desk: Desk) -> list[Message]:
    """All messages of the open conversation, and the notice."""
    found: list[Message] = []
    for turn in desk.talk.turns:
        found.append({"role": "user", "content": _said(turn)})
        if turn.tries:
            found.append({"role": "assistant", "content": _reply(turn)})
    if desk.notice:
        content = f'<div class="sf-notice" role="status">{_escaped(desk.notice)}</div>'
        found.append({"role": "assistant", "content": content})
    return found


def _said(turn: Turn) -> str:
    pictures = "".join(_shown(pixels) for pixels in turn.shown)
    words = f'<span class="sf-words">{_escaped(turn.words)}</span>' if turn.words else ""
    return f'<div class="sf-said">{pictures}{words}</div>'


def _shown(pixels: Tensor) -> str:
    return f'<img class="sf-shown" alt="your picture" src="{_source(to_pil(pixels))}">'


def _reply(turn: Turn) -> str:
    one = turn.reply
    blocks = [
        f'<div class="sf-text">{_escaped(piece)}</div>' if isinstance(piece, str) else _picture(piece, turn, one)
        for piece in one.pieces
        if not isinstance(piece, str) or piece.strip()
    ]
    if not blocks:
        blocks = ['<div class="sf-text sf-quiet">' + ("…" if not one.is_complete else "(no words)") + "</div>"]
    heat = _heat(turn.heat, one) if turn.heat is not None else ""
    return f'<div class="sf-reply">{"".join(blocks)}{heat}</div>'


def _picture(picture: Picture, turn: Turn, one: Try) -> str:
    name = _escaped(f"{turn.words or 'a picture'}, seed {one.seed}")
    if picture.image is None:
        return (
            '<figure class="sf-figure sf-draft"><div class="sf-blank" role="img" aria-label="drawing"></div></figure>'
        )
    image = f'<img alt="{name}" src="{_source(picture.image)}">'
    if picture.is_draft:
        done = round(100 * picture.share)
        return f'<figure class="sf-figure sf-draft">{image}<figcaption>drawing, {done} %</figcaption></figure>'
    return f'<figure class="sf-figure sf-final">{image}</figure>'


def _heat(heat: Heat, one: Try) -> str:
    gains = [picture.gain for picture in one.pictures if picture.gain is not None]
    words = f" What was said makes it {gains[-1]:.0f} nats likelier." if gains else ""
    scale = '<span class="sf-scale">unlikely <i></i> likely</span>'
    return (
        f'<figure class="sf-heat"><img alt="map of the log probability of every patch" src="{_source(heat.image)}">'
        f"<figcaption>{scale}Log probability of every patch after what was said before it: "
        f"{-heat.nats:.2f} nats per dimension.{words}</figcaption></figure>"
    )


# -- around it ------------------------------------------------------------------------------------------------------


def strip(desk: Desk) -> str:
    """The tries of the last turn as buttons; '' where there is nothing to choose from."""
    if not desk.talk.turns or len(desk.talk.turns[-1].tries) < 2:
        return ""
    turn = desk.talk.turns[-1]
    buttons = "".join(_button(i, one, is_chosen=i == turn.chosen) for i, one in enumerate(turn.tries))
    return f'<div class="sf-strip" role="radiogroup" aria-label="pictures to choose from">{buttons}</div>'


def _button(number: int, one: Try, *, is_chosen: bool) -> str:
    last = one.pictures[-1] if one.pictures else None
    image = '<span class="sf-blank"></span>' if last is None or last.image is None else _thumb(last.image)
    state = "sf-draft" if last is None or last.is_draft else "sf-final"
    checked = "true" if is_chosen else "false"
    return (
        f'<button type="button" role="radio" aria-checked="{checked}" class="{state}" data-number="{number}" '
        f'aria-label="go on with seed {one.seed}">{image}<span>seed {one.seed}</span></button>'
    )


def _thumb(image: PILImage) -> str:
    return f'<img alt="" src="{_source(image)}">'


def tabs(desk: Desk) -> str:
    """Buttons of all conversations; '' where there is one only."""
    if len(desk.talks) < 2:
        return ""
    buttons = "".join(_tab(i, talk, is_open=i == desk.open) for i, talk in enumerate(desk.talks))
    return f'<div class="sf-tabs" role="tablist" aria-label="conversations">{buttons}</div>'


def _tab(number: int, talk: Talk, *, is_open: bool) -> str:
    selected = "true" if is_open else "false"
    return (
        f'<button type="button" role="tab" aria-selected="{selected}" data-number="{number}">'
        f"<b>{number + 1}</b> {html.escape(talk.title)}</button>"
    )


def chips(examples: Sequence[Example]) -> str:
    """Examples as buttons, by task."""
    groups = {"draw": "Draw", "edit": "Change", "ask": "Ask"}
    rows = [_group(title, [(i, e) for i, e in enumerate(examples) if e.task == task]) for task, title in groups.items()]
    return f'<div class="sf-chips" aria-label="examples">{"".join(rows)}</div>'


def _group(title: str, numbered: Sequence[tuple[int, Example]]) -> str:
    if not numbered:
        return ""
    buttons = "".join(
        f'<button type="button" data-number="{i}" title="{html.escape(_hint(example), quote=True)}">'
        f"{html.escape(example.text)}</button>"
        for i, example in numbered
    )
    return f'<div class="sf-group"><span>{title}</span><div>{buttons}</div></div>'


def _hint(example: Example) -> str:
    return f"first “{example.about}”, then this" if example.about else "draw this"


def header(model: str, size: str) -> str:
    """Title, one sentence, the model's name, and the switch between light and dark."""
    return (
        f'<header class="sf-header">{MARK}<div><h1>StarFlow2</h1>'
        "<p>One model that draws, changes and answers: words and pictures in one sequence.</p></div>"
        f'<span class="sf-model">{html.escape(model)}<small>{html.escape(size)}</small></span>'
        '<button type="button" class="sf-theme" aria-label="light or dark" title="light or dark">'
        '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M12 3a9 9 0 1 0 9 9A7 7 0 0 1 12 3z"/></svg></button>'
        "</header>"
    )


def placeholder() -> str:
    """Greeting in an empty conversation."""
    return (
        f'<div class="sf-empty">{MARK}<h2>What shall it draw?</h2>'
        "<p>Say it below, or click a sentence. Then change the picture with words, or ask about it.</p></div>"
    )


def vocabulary(words: Mapping[str, Sequence[str]]) -> str:
    """The words that a model knows, by kind."""
    if not words:
        return '<p class="sf-quiet">This model has no fixed vocabulary: say it in your own words.</p>'
    rows = "".join(f"<dt>{html.escape(kind)}</dt><dd>{html.escape(', '.join(w))}</dd>" for kind, w in words.items())
    return f'<dl class="sf-words-known">{rows}</dl>'
