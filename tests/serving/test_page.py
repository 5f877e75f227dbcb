"""The page in its app: what is sent to a browser, and what its events do."""

import asyncio
import re
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="gradio is not installed; it comes with the ui extra")
from fastapi import FastAPI
from fastapi.testclient import TestClient

from starflow2.serving import page_view as view
from starflow2.serving.page import CSS, Page, build_page, mount_page
from starflow2.serving.service import Service
from starflow2.serving.talks import Desk

PATH = "/page"


@pytest.fixture(scope="module")
def service(model):
    with Service(model) as running:
        yield running


@pytest.fixture(scope="module")
def client(service):
    with TestClient(mount_page(FastAPI(), service, PATH)) as client:
        yield client


def after(updates):
    """The last update of an event."""

    async def last():
        return [shown async for shown in updates][-1]

    return asyncio.run(last())


def test_the_page_is_there_and_names_no_other_address(client):
    page = client.get(f"{PATH}/")
    assert page.status_code == 200 and "StarFlow2" in page.text
    assert "googleapis" not in page.text and "cdn" not in page.text.lower()
    loaded = re.findall(r'(?:src|href)="(https?://[^"]+)"', page.text)
    assert not [url for url in loaded if "testserver" not in url]
    assert not re.findall(r"url\(|@import|https?:", CSS.read_text("utf-8"))


def test_nothing_of_gradios_own_is_offered(client):
    config = client.get(f"{PATH}/config").json()
    assert config["footer_links"] == [] and config["analytics_enabled"] is False
    assert client.get(f"{PATH}/gradio_api/info").json()["named_endpoints"] == {}


def test_every_button_is_connected(service):
    blocks = build_page(service)
    targets = {name for fn in blocks.fns.values() for _, name in fn.targets}
    assert {"submit", "stop", "click"} <= targets
    clicks = [fn.name for fn in blocks.fns.values() if ("click" in [name for _, name in fn.targets])]
    assert sorted(clicks) == ["begin", "choose", "fork", "map", "open", "play", "retry", "undo"]


def test_words_are_sent_answered_undone_and_are_in_the_box_again(service):
    page, desk = Page(service), Desk()
    shown = after(page.say(desk, {"text": "two pink hearts", "files": []}, 3, 2, service.model.settings.guidance))
    assert shown[0] is desk and [m["role"] for m in shown[1]] == ["user", "assistant"]
    assert "sf-final" in shown[1][-1]["content"] and "seed 4" in shown[2]["value"] and shown[2]["visible"]
    assert shown[4]["value"]["text"] == "" and shown[4]["submit_btn"]
    chosen = asyncio.run(page.choose(desk, SimpleNamespace(number=1)))
    assert chosen[0].turn.reply.seed == 4
    undone = asyncio.run(page.undo(desk))
    assert undone[1] == [] and undone[4]["value"]["text"] == "two pink hearts" and not undone[2]["visible"]


def test_every_first_draft_is_shown_however_fast_the_model_draws(service):
    async def shown():
        said = Page(service).say(Desk(), {"text": "two pink hearts", "files": []}, 3, 1, 2.0)
        return [each[1][-1]["content"] async for each in said if each[1]]

    seen = asyncio.run(shown())
    drafts = [i for i, text in enumerate(seen) if "sf-draft" in text and "<img" in text]
    finals = [i for i, text in enumerate(seen) if "sf-final" in text]
    assert drafts and finals and max(drafts) < min(finals)


def test_words_that_the_model_does_not_know_stay_in_the_box(service):
    desk = Desk()
    shown = after(Page(service).say(desk, {"text": "a red elephant", "files": []}, 0, 1, 2.0))
    assert "elephant" in shown[1][-1]["content"] and "sf-notice" in shown[1][-1]["content"]
    assert not desk.talk.turns and "value" not in shown[4]


def test_guidance_is_the_models_own_unless_it_is_moved(service):
    own = service.model.settings.guidance
    page, desk = Page(service), Desk()
    after(page.say(desk, {"text": "a red star", "files": []}, 0, 1, own))
    assert desk.turn.guidance is None
    after(page.say(desk, {"text": "make the star blue", "files": []}, 0, 1, own + 1))
    assert desk.turn.guidance == own + 1


def test_a_file_that_was_sent_is_read_and_removed(service, tmp_path):
    import torch

    from starflow2.core.images import save_png, to_pil

    file = tmp_path / "mine.png"
    save_png(to_pil(torch.zeros(3, 64, 64)), file)
    shown = after(Page(service).say(Desk(), {"text": "what color is it?", "files": [str(file)]}, 0, 1, 2.0))
    assert (not file.exists() and "your picture" in view.messages(shown[0])[0]["content"]) or shown[0].notice
