"""The page of `starflow2 serve`: a conversation with pictures, tries to choose from, undo, fork, maps. Gradio only.

It talks to the service in its own process and is mounted in the same app. Fonts and pictures come from the page itself
and Gradio's analytics are off, so that nothing outside is asked. Not here: what buttons do (talks), HTML (page_view).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from starflow2.errors import StarFlowError
from starflow2.models.wording import classes_of
from starflow2.serving import page_view as view
from starflow2.serving.talks import Choice, Desk, examples_of, turn_of

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
import gradio as gr
from fastapi.responses import RedirectResponse

if TYPE_CHECKING:
    from fastapi import FastAPI

    from starflow2.pipeline import StarFlow2
    from starflow2.serving.service import Service

__all__ = ["Page", "Said", "build_page", "mount_page"]

CSS = Path(__file__).with_name("page.css")
QUEUE = 128  # events that wait
KEPT_S = 3600.0  # after its last event a visitor's desk is forgotten
MAX_FILE = "16mb"
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # of the visitor's own machine
MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")
FRAME_S = 0.08  # between two updates of a conversation that is being drawn
PICK = """element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-number]');
  if (button) trigger('click', {number: Number(button.dataset.number)});
});"""
THEME = """element.addEventListener('click', (event) => {
  if (event.target.closest('.sf-theme')) document.body.classList.toggle('dark');
});"""
ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 24 24'%3E%3Cpath fill='%23e5a72a' "
    "d='m12 1 3.4 7.1 7.6 1-5.6 5.4 1.5 7.7-6.9-3.8-6.9 3.8 1.5-7.7L1 9.1l7.6-1z'/%3E%3C/svg%3E"
)
HEAD = f'<link rel="icon" href="{ICON}"><meta name="color-scheme" content="light dark">'


class Said(TypedDict):
    """Contents of the box: words, and the names of pictures that Gradio has received."""

    text: str
    files: list[str]


# -- what happens on an event -----------------------------------------------------------------------------------------

Shown = tuple[Any, ...]  # values of the components that `Page.parts` names


class Page:
    """Handlers of the page's events; each takes a visitor's desk and gives what the components show next."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.examples = examples_of(service)

    async def arrive(self) -> Desk:
        """A desk for a new visitor."""
        return Desk()

    def shown(self, desk: Desk, box: object = None) -> Shown:
        """The desk, the messages, the strip, the tabs and the box, in the order of the components."""
        strip, tabs = view.strip(desk), view.tabs(desk)
        return (
            desk,
            view.messages(desk),
            gr.update(value=strip, visible=bool(strip)),
            gr.update(value=tabs, visible=bool(tabs)),
            gr.update() if box is None else box,
        )

    async def say(self, desk: Desk, typed: Said, seed: float, tries: float, guidance: float) -> AsyncGenerator[Shown]:
        """A turn of the visitor."""
        choice = self._choice(seed, tries, guidance)
        try:
            desk.check_idle()
            turn = turn_of(self.service, typed["text"], _taken(typed["files"]), choice.guidance)
        except StarFlowError as error:
            desk.notice = str(error)
            yield self.shown(desk)
            return
        yield self.shown(desk, _box("", waits=True))
        async for shown in self._replied(desk, desk.say(self.service, turn, choice)):
            yield shown
        yield self.shown(desk, _box(typed["text"] if desk.notice else ""))

    def _choice(self, seed: float, tries: float, guidance: float) -> Choice:
        own = self.service.sampler.config.guidance
        return Choice(seed=int(seed or 0), tries=int(tries), guidance=None if guidance == own else float(guidance))

    async def _replied(self, desk: Desk, changes: AsyncGenerator[None]) -> AsyncGenerator[Shown]:
        """Updates while a reply is made: at every first draft and whole picture, otherwise a few times a second."""
        last, stages = 0.0, desk.stages
        try:
            async with contextlib.aclosing(changes):
                async for _ in changes:
                    if time.monotonic() - last > FRAME_S or desk.stages != stages:
                        last, stages = time.monotonic(), desk.stages
                        yield self.shown(desk)
        except StarFlowError as error:
            desk.notice = str(error)

    async def play(self, desk: Desk, tries: float, event: gr.EventData) -> AsyncGenerator[Shown]:
        """An example, in a conversation of its own: the picture that it is about, then the sentence."""
        yield self.shown(desk, _box(waits=True))
        example = self.examples[int(event.number)]
        async for shown in self._replied(desk, desk.play(self.service, example, int(tries))):
            yield shown
        yield self.shown(desk, _box())

    async def retry(self, desk: Desk, tries: float) -> AsyncGenerator[Shown]:
        """Other seeds for the last turn."""
        yield self.shown(desk, _box(waits=True))
        async for shown in self._replied(desk, desk.retry(self.service, int(tries))):
            yield shown
        yield self.shown(desk, _box())

    async def map(self, desk: Desk) -> Shown:
        """The map over the last picture, or without it again."""
        return await self._done(desk, lambda: desk.map(self.service))

    async def undo(self, desk: Desk) -> Shown:
        """The conversation without its last turn, whose words are in the box again."""
        box = None
        try:
            box = _box(desk.undo().words)
        except StarFlowError as error:
            desk.notice = str(error)
        return self.shown(desk, box)

    async def fork(self, desk: Desk) -> Shown:
        return await self._done(desk, desk.fork)

    async def begin(self, desk: Desk) -> Shown:
        return await self._done(desk, desk.begin)

    async def choose(self, desk: Desk, event: gr.EventData) -> Shown:
        return await self._done(desk, lambda: desk.choose(int(event.number)))

    async def open(self, desk: Desk, event: gr.EventData) -> Shown:
        return await self._done(desk, lambda: desk.show(int(event.number)))

    async def _done(self, desk: Desk, step: Callable[[], Awaitable[None] | None]) -> Shown:
        try:
            waits = step()
            if waits is not None:
                await waits
        except StarFlowError as error:
            desk.notice = str(error)
        return self.shown(desk)

    @staticmethod
    def stop(desk: Desk) -> None:
        """Leave the reply that is being made."""
        desk.stop()


def _taken(files: Sequence[str]) -> list[bytes]:
    """The pictures that Gradio has received. Their files are removed: they are the visitor's, and not needed again."""
    pictures = [Path(file).read_bytes() for file in files]
    for file in files:
        Path(file).unlink(missing_ok=True)
    return pictures


def _box(words: str | None = None, *, waits: bool = False) -> object:
    """The box with these words, or as it is; while a reply is made it stops it instead of sending."""
    value = {} if words is None else {"value": {"text": words, "files": []}}
    return gr.update(**value, submit_btn=not waits, stop_btn=waits)


# -- what the page consists of ----------------------------------------------------------------------------------------


def build_page(service: Service) -> gr.Blocks:
    """The page as Gradio's Blocks, to be mounted by `mount_page`."""
    page = Page(service)
    with gr.Blocks(title="StarFlow2", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        gr.HTML(_header(service.model), js_on_load=THEME, container=False)
        with gr.Row(elem_id="sf-columns"):
            with gr.Column(scale=7, min_width=300):
                parts, tools = _conversation()
            with gr.Column(scale=3, min_width=260):
                settings = _settings(service)
                chips = gr.HTML(view.chips(page.examples), js_on_load=PICK, elem_id="sf-chips")
        _connect(page, parts, tools, settings, chips)
        blocks.load(page.arrive, None, parts[:1], show_progress="hidden", api_visibility="private")
    blocks.queue(max_size=QUEUE, default_concurrency_limit=None, api_open=False)
    return blocks


def _header(model: StarFlow2) -> str:
    count = sum(weight.numel() for weight in model.components.parameters())
    unit, size = ("B", count / 1e9) if count >= 1e9 else ("M", count / 1e6)
    return view.header(model.components.cfg.name, f"{size:.1f} {unit} parameters")


def _conversation() -> tuple[list[gr.Component], list[gr.Button]]:
    """The components that `Page.shown` fills, and the buttons below the conversation."""
    desk = gr.State(time_to_live=KEPT_S)
    tabs = gr.HTML("", js_on_load=PICK, visible=False)
    chat = gr.Chatbot(
        elem_id="sf-chat", show_label=False, container=False, height="clamp(320px, 52dvh, 620px)", buttons=[],
        feedback_options=None, placeholder=view.placeholder(), latex_delimiters=[], allow_tags=False,
        group_consecutive_messages=False,
    )  # fmt: skip
    strip = gr.HTML("", js_on_load=PICK, visible=False)
    with gr.Row(elem_id="sf-tools"):
        tools = [gr.Button(name, size="sm", min_width=62) for name in ("Undo", "Retry", "Fork", "Map", "New")]
    box = gr.MultimodalTextbox(
        elem_id="sf-box", show_label=False, container=False, placeholder="two pink hearts", file_types=["image"],
        file_count="multiple", sources=["upload"], lines=1, max_lines=4, autofocus=True, stop_btn=False,
    )  # fmt: skip
    return [desk, chat, strip, tabs, box], tools


def _settings(service: Service) -> list[gr.Component]:
    """Seed, number of tries and guidance; below them the words that the model knows."""
    own = service.sampler.config.guidance
    with gr.Group():
        settings = [
            gr.Number(0, label="Seed", precision=0, minimum=0, info="same seed, same words: the same picture"),
            gr.Slider(1, 8, 4, step=1, label="Pictures to choose from", info="one seed each"),
            gr.Slider(0, 6, own, step=0.1, label="Guidance", info="how closely to follow the words; 0: off"),
        ]
    with gr.Accordion("Words it knows", open=False):
        gr.HTML(view.vocabulary(classes_of(service.model.components.vocabulary)))
    return settings


def _connect(
    page: Page, parts: list[gr.Component], tools: list[gr.Button], settings: list[gr.Component], chips: gr.HTML
) -> None:
    """Let every event call its handler; all handlers fill the same parts."""
    desk, _chat, strip, tabs, box = parts
    seed, tries, guidance = settings
    undo, retry, fork, heat, new = tools
    shared = {"outputs": parts, "show_progress": "hidden", "api_visibility": "private"}
    box.submit(page.say, [desk, box, seed, tries, guidance], **shared)
    box.stop(page.stop, [desk], show_progress="hidden", api_visibility="private")
    chips.click(page.play, [desk, tries], **shared)
    retry.click(page.retry, [desk, tries], **shared)
    strip.click(page.choose, [desk], **shared)
    tabs.click(page.open, [desk], **shared)
    for button, step in ((undo, page.undo), (fork, page.fork), (heat, page.map), (new, page.begin)):
        button.click(step, [desk], **shared)


def mount_page(app: FastAPI, service: Service, path: str) -> FastAPI:
    """The app with the page at `path`, and nothing else of Gradio's: no API, no footer, no history of runs."""

    @app.get("/", include_in_schema=False)
    async def start() -> RedirectResponse:
        return RedirectResponse(f"{path}/")

    return gr.mount_gradio_app(
        app, build_page(service), path, theme=gr.themes.Base(font=FONTS, font_mono=MONO), css_paths=CSS, head=HEAD,
        footer_links=[], run_history=False, max_file_size=MAX_FILE, ssr_mode=False, pwa=False, mcp_server=False,
        enable_monitoring=False, show_error=True,
    )  # fmt: skip
