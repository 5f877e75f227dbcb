"""The service around the engine: every reply is what it would be alone, and nothing is left of one that is over."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from starflow2.errors import OutputError, PromptError
from starflow2.inference.config import ReplyLimits
from starflow2.inference.sampler import Sampler
from starflow2.models.config import SelfCheckConfig
from starflow2.pipeline import StarFlow2
from starflow2.serving.jobs import Ask, Done, Draft, ImageDone, Progress, ScoreAsk, Scored, TextDelta
from starflow2.serving.limits import ServeLimits
from starflow2.serving.refusals import Refusal
from starflow2.serving.replies import Reply
from starflow2.serving.service import Service

DRAW = ReplyLimits(tokens=0, pictures=1)


@pytest.fixture(scope="module")
def service(model: StarFlow2) -> Iterator[Service]:
    with Service(model, ServeLimits(rows=16, queue=64)) as running:
        yield running


def drawing(text: str = "two red hearts", seed: int = 0, **more: object) -> Ask:
    return Ask(parts=[text], mode="image", seed=seed, **more)  # type: ignore[arg-type]


def image_of(reply: Reply) -> np.ndarray:
    return np.asarray(next(event.image for event in reply if isinstance(event, ImageDone)))


def end_of(reply: Reply) -> Done:
    return next(event for event in reply if isinstance(event, Done))


def words_of(reply: Reply) -> str:
    return "".join(event.text for event in reply if isinstance(event, TextDelta))


def refused(reply: Reply) -> Refusal:
    with pytest.raises(Refusal) as caught:
        list(reply)
    return caught.value


def idle(service: Service) -> bool:
    """True once nothing waits, replies or holds a row of the engine."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        stats = service.stats()
        if not stats.waiting and not stats.replying:
            return True
        time.sleep(0.005)
    return False


def test_a_seed_draws_the_same_image_alone_and_among_fifteen_others(service, model):
    (alone,) = model.generate("two red hearts", seed=3, tries=1)
    replies = [service.submit(drawing("a blue star", seed)) for seed in range(8)]
    replies.append(service.submit(drawing(seed=3)))
    replies += [service.submit(Ask(parts=["two pink hearts"], seed=seed)) for seed in range(7)]
    assert np.abs(image_of(replies[8]).astype(int) - np.asarray(alone.image)).max() <= 1
    assert all(isinstance(end_of(reply), Done) for reply in replies)
    assert idle(service)


def test_a_kept_reply_is_continued_as_a_session_continues(service, model):
    session = model.session()
    drawn = session.add("two red hearts").draw(tries=1)
    words = session.add("what color are the hearts?").write()
    first = service.submit(drawing(keep="memory"))
    assert np.array_equal(image_of(first), np.asarray(drawn.image))
    ask = Ask(parts=["what color are the hearts?"], mode="text", previous=end_of(first).id)
    assert words_of(service.submit(ask)).strip() == words


def test_two_continuations_of_one_reply_are_a_fork(service):
    start = end_of(service.submit(drawing(keep="memory"))).id
    asks = [
        Ask(parts=[f"make the hearts {c}"], mode="image", seed=1, previous=start) for c in ("blue", "green", "blue")
    ]
    blue, green, again = (image_of(reply) for reply in service.submit_all(asks))
    assert np.array_equal(blue, again) and not np.array_equal(blue, green)


def test_turns_that_are_sent_again_are_not_read_again(service):
    first = service.submit(drawing("two pink hearts", seed=5, keep="memory"))
    assert end_of(first).id
    image = torch.from_numpy(image_of(first).copy()).permute(2, 0, 1)  # as a client sends it back
    past = [(["two pink hearts"], service.checked([image]))]
    question = ["how many hearts are there?"]
    encoded = service.counts.encoded
    stateless = service.submit(Ask(parts=question, mode="text", past=past, keep="memory"))
    usage = end_of(stateless).usage
    assert usage.cached > 64 and service.counts.encoded == encoded, "it was found by its turns"
    kept = service.submit(Ask(parts=question, mode="text", previous=end_of(first).id))
    assert words_of(kept) == words_of(stateless)
    elsewhere = service.submit(Ask(parts=question, mode="text", past=past, owner="another"))
    assert end_of(elsewhere).usage.cached == 0 and service.counts.encoded == encoded + 1


def test_a_reply_of_another_owner_is_not_there(service):
    name = end_of(service.submit(drawing(keep="memory", owner="one"))).id
    for owner, given in (("two", name), ("one", "resp_" + 32 * "0"), ("one", "../../etc/passwd")):
        with pytest.raises(Refusal) as caught:
            service.submit(drawing(previous=given, owner=owner))
        assert caught.value.status == 404
    service.drop(name, "one")
    assert not service.has(name, "one")


def test_drafts_come_before_the_image_and_change_nothing(service):
    plain = image_of(service.submit(drawing(seed=9)))
    reply = service.submit(drawing(seed=9, drafts=3, reports=True))
    events = list(reply)
    drafts = [event for event in events if isinstance(event, Draft)]
    (done,) = (i for i, event in enumerate(events) if isinstance(event, ImageDone))
    numbers = [draft.number for draft in drafts]  # a draft that would come too late on a busy machine is left out
    assert numbers and numbers == sorted(set(numbers)) and set(numbers) <= {0, 1, 2}
    assert all(events.index(draft) < done for draft in drafts)
    assert np.array_equal(np.asarray(events[done].image), plain)
    assert [event.done for event in events if isinstance(event, Progress)][-1] == 64


def test_what_is_cancelled_or_late_leaves_no_row(service):
    running = service.submit(drawing())
    running.cancel()
    assert refused(running).status == 499
    late = service.submit(drawing(timeout_s=1e-6))
    assert refused(late).code == "deadline_exceeded"
    assert idle(service)
    image_of(service.submit(drawing()))  # and the service goes on


def test_a_full_queue_refuses_and_says_when_to_come_back(model):
    service = Service(model, ServeLimits(rows=2, queue=3))  # not started: everything waits
    accepted = [service.submit(drawing()) for _ in range(5)]
    with pytest.raises(Refusal) as caught:
        service.submit(drawing())
    assert caught.value.status == 429 and caught.value.retry_after is not None
    service.start()
    assert all(end_of(reply) for reply in accepted)
    service.close()
    with pytest.raises(Refusal) as caught:
        service.submit(drawing())
    assert caught.value.status == 503


def test_one_owner_cannot_fill_the_queue_of_all(model):
    service = Service(model, ServeLimits(rows=1, queue=10, queue_of_key=2))
    for _ in range(3):
        service.submit(drawing(owner="greedy"))
    with pytest.raises(Refusal):
        service.submit(drawing(owner="greedy"))
    service.submit(drawing(owner="modest"))
    service.close(0)


def test_closing_finishes_what_was_begun(model):
    service = Service(model, ServeLimits(rows=2)).start()
    replies = [service.submit(drawing(seed=seed)) for seed in range(6)]
    service.close()
    assert all(end_of(reply) for reply in replies)


class PoisonedSampler(Sampler):
    """A sampler one of whose seeds starts from what is no number."""

    BAD = 666

    def prior(self, shape, generator, config=None) -> Tensor:
        found = super().prior(shape, generator, config)
        return found * float("nan") if generator.initial_seed() == self.BAD else found


class Poisoned(StarFlow2):
    """A model that samples with it."""

    def sampler(self, config=None) -> Sampler:
        twin = copy.copy(super().sampler(config))
        twin.__class__ = PoisonedSampler
        return twin


def test_one_row_that_is_no_number_fails_alone(model, service):
    with Service(Poisoned(model.components)) as poisoned:
        asks = [drawing(seed=PoisonedSampler.BAD if i == 7 else i) for i in range(16)]
        replies = poisoned.submit_all(asks)
        assert refused(replies[7]).status == 500
        good = [image_of(reply) for i, reply in enumerate(replies) if i != 7]
        again = image_of(poisoned.submit(drawing(seed=0)))
    right = [image_of(reply) for reply in service.submit_all([drawing(seed=i) for i in range(16) if i != 7])]
    assert all(np.array_equal(a, b) for a, b in zip(good, right, strict=True))
    assert np.array_equal(again, right[0])


def test_stored_replies_outlive_the_process_and_memory(model, tmp_path):
    with Service(model, folder=tmp_path / "sessions") as service:
        done = end_of(service.submit(drawing(keep="stored", owner="one")))
        assert done.is_stored
        follow = Ask(parts=["make the hearts blue"], mode="image", seed=2, previous=done.id, owner="one")
        before = image_of(service.submit(follow))
    with Service(model, ServeLimits(idle_s=1e-3), folder=tmp_path / "sessions") as service:  # as after a kill
        assert np.array_equal(image_of(service.submit(follow)), before)
        with pytest.raises(Refusal):
            service.submit(Ask(parts=["make the hearts blue"], previous=done.id, owner="two"))
        file = next((tmp_path / "sessions").iterdir())
        file.write_bytes(file.read_bytes()[:-1])
    with Service(model, folder=tmp_path / "sessions") as service, pytest.raises(Refusal):
        service.submit(follow)  # a damaged file is no session


def test_a_full_disk_costs_the_file_and_not_the_reply(model, tmp_path):
    folder = tmp_path / "sessions"
    with Service(model, folder=folder) as service:
        folder.rmdir()
        folder.write_text("no folder any more", encoding="utf-8")
        done = end_of(service.submit(drawing(keep="stored")))
        assert done.id is not None and not done.is_stored and service.counts.unstored == 1
        assert words_of(service.submit(Ask(parts=["what color are the hearts?"], mode="text", previous=done.id)))


def test_a_folder_that_cannot_be_used_is_refused_at_once(model, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OutputError):
        Service(model, folder=tmp_path / "file")


def test_memory_holds_what_it_may_and_the_rest_is_read_back(model, tmp_path):
    limits = ServeLimits(memory_bytes=3 * 10**6)
    with Service(model, limits, tmp_path) as service:
        names = [end_of(service.submit(drawing(seed=i, keep="stored"))).id for i in range(6)]
        count, size = service.stats().in_memory
        assert size <= limits.memory_bytes and count < 6 and service.stats().on_disk[0] == 6
        asks = [Ask(parts=["what color are the hearts?"], mode="text", previous=name) for name in names]
        assert all(words_of(reply) for reply in service.submit_all(asks))


def test_old_files_make_room_for_new_ones(model, tmp_path):
    limits = ServeLimits(memory_bytes=1, disk_bytes=3 * 10**6)
    with Service(model, limits, tmp_path) as service:
        names = [end_of(service.submit(drawing(seed=i, keep="stored"))).id for i in range(6)]
        assert service.has(names[-1], "local") and not service.has(names[0], "local")
        assert sum(file.stat().st_size for file in Path(tmp_path).iterdir()) <= limits.disk_bytes


def test_likelihoods_are_those_of_the_model(service, model):
    image = model.generate("two red hearts", tries=1)[0].image
    parts = service.checked([image])
    (scored,) = (e for e in service.submit(ScoreAsk(prompt=["two red hearts"], reply=parts)) if isinstance(e, Scored))
    assert scored.score.log_prob == pytest.approx(model.score(["two red hearts"], [image]).log_prob)


def test_words_that_the_model_never_learnt_are_refused_before_they_wait(service):
    with pytest.raises(PromptError):
        service.checked(["a zebra"])


def test_a_conversation_that_is_too_long_is_the_clients_fault(service):
    past = [(["two red hearts"] * 40, ["two red hearts"] * 40) for _ in range(40)]
    assert refused(service.submit(Ask(parts=["a red star"], past=past))).status == 400
    assert idle(service)


@pytest.fixture(scope="module")
def checking(model: StarFlow2) -> StarFlow2:
    """The model as if it had learnt to check its images."""
    components = copy.copy(model.components)
    asked = SelfCheckConfig(shows="is there {}?", done="is {} there now?", tries=3)
    components.cfg = replace(components.cfg, self_check=asked)
    return StarFlow2(components)


def test_several_tries_of_a_model_that_cannot_choose_are_the_clients_fault(model):
    components = copy.copy(model.components)
    components.cfg = replace(components.cfg, self_check=None)
    with Service(StarFlow2(components)) as service, pytest.raises(Refusal, match="use tries=1") as caught:
        service.submit(drawing(tries=2))
    assert (caught.value.status, caught.value.param) == (400, "tries")


def test_images_of_a_request_too_long_to_ask_about_are_drawn_and_not_compared(checking):
    """The question repeats the request, and both together are more than the model reads."""
    words = " ".join(["two red hearts"] * 700)
    with Service(checking) as service:
        reply = service.submit(Ask(parts=[words], mode="image", tries=2))
        other = service.submit(drawing())
    (made,) = [event for event in reply if isinstance(event, ImageDone)]
    assert made.confidence is None and end_of(reply).seed == 0
    assert isinstance(end_of(other), Done)


def test_of_several_tries_the_one_that_is_confirmed_is_what_the_library_draws(checking):
    with Service(checking) as service:
        replies = [service.submit(drawing("a blue star", seed=5, tries=3)), service.submit(drawing(seed=1, tries=None))]
        made = [next(event for event in reply if isinstance(event, ImageDone)) for reply in replies]
        seeds = [end_of(reply).seed for reply in replies]
    assert all(each.confidence is not None and each.gain is not None for each in made)
    for each, words, seed, own in zip(made, ("a blue star", "two red hearts"), seeds, (5, 1), strict=True):
        (alone,) = checking.generate(words, seed=seed, tries=1)
        (chosen,) = checking.generate(words, seed=own, tries=3)
        for other in (alone, chosen):
            assert np.abs(np.asarray(each.image).astype(int) - np.asarray(other.image)).max() <= 1


def test_an_event_loop_reads_the_same_events_as_a_thread(service):
    reply = service.submit(drawing(seed=4))

    async def read() -> list[object]:
        return [event async for event in reply]

    there = asyncio.run(read())
    assert there == list(reply)


def test_many_threads_may_ask_at_once(service):
    found: dict[int, np.ndarray] = {}

    def ask(seed: int) -> None:
        found[seed] = image_of(service.submit(drawing(seed=seed % 2)))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[seed], found[seed % 2]) for seed in range(8))
