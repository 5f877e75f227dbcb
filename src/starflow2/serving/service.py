"""The service: one thread that owns the engine, and what others may ask of it from any thread or event loop.

`submit` takes an `Ask` and returns a `Reply`, whose events come as they are made. Requests wait in a bounded queue that
serves their owners in turn. A reply may be kept under an id: asking with `previous=id` goes on from there, twice is a
fork, an earlier id is an undo. What a reply says depends on its own words, images, past and seed, never on the load.

>>> with Service(model) as service:  # doctest: +SKIP
...     for event in service.submit(Ask(parts=service.checked(["two pink hearts"]), mode="image", keep="memory")):
...         print(event)
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch

from starflow2.core.fields import of_kind
from starflow2.core.images import MAX_PIXELS, read_picture
from starflow2.errors import ConfigError, StarFlowError, StateError
from starflow2.inference.engine import Engine
from starflow2.inference.sampler import Sampler
from starflow2.inference.self_check import checked_tries, choice_of
from starflow2.inference.session import Said
from starflow2.models.prompts import check_words, normalized
from starflow2.models.wording import words_of
from starflow2.pipeline import StarFlow2
from starflow2.serving.aside import Aside
from starflow2.serving.history import START, beginnings
from starflow2.serving.jobs import Ask, Failed, Part, ScoreAsk
from starflow2.serving.limits import ServeLimits
from starflow2.serving.refusals import CLIENTS_FAULT, Refusal, busy, cancelled, closing, late, refusal_of
from starflow2.serving.replies import Reply
from starflow2.serving.sessions import SessionStore, new_id
from starflow2.serving.stats import Counts, Stats
from starflow2.serving.waiting import FairQueue
from starflow2.serving.worker import Job, ScoreJob, Worker

__all__ = ["Service"]

log = logging.getLogger(__name__)
AT_ONCE = 4  # requests that are read between two steps, so that those in progress are not held up
SWEEP_S = 5.0  # between looks at sessions that are idle


class Service:
    """A model that serves many at once. A context: it starts on entering, and drains on leaving.

    folder: where stored sessions are written, so that they outlive the process; None: in memory only. Raises StateError
    for a model whose streams were not trained together, OutputError for a folder that cannot be used. number: of this
    service among replicas, which stands in the ids that it makes.
    """

    def __init__(
        self, model: StarFlow2, limits: ServeLimits | None = None, folder: Path | None = None, *, number: int = 0
    ) -> None:
        if not of_kind(model, StarFlow2, "model", "StarFlow2.from_pretrained(name) loads one").is_joint:
            raise StateError("a service needs a model that has finished stage joint; train it further.")
        self.model, self.limits, self.sampler = model, limits or ServeLimits(), model.sampler()
        self.number, self.counts = number, Counts()
        self._sessions = _store(self.sampler, self.limits, folder)
        self._aside = Aside()
        self._worker = Worker(self.sampler, model.exact_sampler, self._sessions, self._aside, self.counts)
        self._queue: FairQueue[Job | ScoreJob] = FairQueue()
        self._to_cancel: set[Reply] = set()
        self._wake = threading.Condition()
        self._is_closing = self._is_stopped = False
        self._swept = time.monotonic()
        self._pace, self._finished = 10.0, 0  # replies a second, a running mean, and how many it has counted
        self._thread = threading.Thread(target=self._run, name="starflow2-engine", daemon=True)

    def start(self) -> Self:
        """Begin to serve."""
        self._thread.start()
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, drain_s: float | None = None) -> None:
        """Take no more requests, finish those there are within `drain_s`, by default the limits', and stop."""
        until = time.monotonic() + (self.limits.drain_s if drain_s is None else drain_s)
        with self._wake:
            self._is_closing = True
            self._wake.notify_all()
            self._wake.wait_for(lambda: not self._has_work, max(0.0, until - time.monotonic()))
            self._is_stopped = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        else:
            self._end_all()
        self._aside.close()

    # -- requests

    def checked(self, parts: Sequence[Said], *, is_reply: bool = False) -> list[Part]:
        """Parts as the model reads them: words (str), or images as file bytes, PIL image, array or tensor.

        is_reply: of a reply, whose words are the model's own and not looked up. Raises PromptError for words that it
        does not know, DataError and ShapeError for images that it cannot take.
        """
        return [self._checked(part, is_reply=is_reply) for part in parts]

    def _checked(self, part: Said, *, is_reply: bool) -> Part:
        components = self.model.components
        if not isinstance(part, str):
            most = min(self.limits.pixels, MAX_PIXELS)
            return read_picture(part, components.cfg.fae.image_size, most_pixels=most)
        if not is_reply:
            check_words(components, part)
        return normalized(components, part)

    def new_id(self) -> str:
        """An id under which a reply is to be kept (`Ask.id`)."""
        return new_id(self.number)

    def submit(self, ask: Ask | ScoreAsk) -> Reply:
        """Let a request wait for its turn. Raises Refusal: 404 for an unknown id, 429 for a full queue, 503."""
        return self.submit_all([ask])[0]

    def submit_all(self, asks: Sequence[Ask | ScoreAsk]) -> list[Reply]:
        """Let several requests of one owner wait, all or none. Raises as `submit` does."""
        jobs = [self._score_job(ask) if isinstance(ask, ScoreAsk) else self._job(ask) for ask in asks]
        with self._wake:
            if self._is_closing:
                raise closing()
            self._check_room(jobs)
            for job in jobs:
                self._queue.push(job.owner, job)
            self.counts.submitted += len(jobs)
            self._wake.notify_all()
        return [job.reply for job in jobs]

    def drop(self, name: str, owner: str) -> None:
        """Delete a kept reply. Raises Refusal (404) where there is none of this owner."""
        self._sessions.drop(name, owner)

    def has(self, name: str, owner: str) -> bool:
        """True if a reply of this owner is kept under that id."""
        try:
            self._sessions.get(name, owner)
        except Refusal:
            return False
        return True

    def stats(self) -> Stats:
        """Its counts, and how much it has to do now."""
        with self._wake:
            waiting = len(self._queue)
        return Stats(
            counts=self.counts,
            waiting=waiting,
            replying=self._worker.rows,
            engine_bytes=self._worker.engine.backend.nbytes,
            engine_positions=self._worker.engine.backend.capacity,
            in_memory=self._sessions.in_memory,
            on_disk=self._sessions.on_disk,
            path=self._worker.engine.backend.name,
            is_closing=self._is_closing,
        )

    def _job(self, ask: Ask) -> Job:
        if ask.previous is not None and ask.past:
            raise ConfigError("previous and past are both given; a turn follows a kept reply or turns that are sent.")
        if ask.id is None and ask.keep != "no":
            ask = replace(ask, id=self.new_id())  # known before the reply is made
        job = Job(ask, Reply(self._cancel), self._deadline(ask.timeout_s))
        if ask.previous is not None:
            job.base = self._sessions.get(ask.previous, ask.owner)
        else:
            digests = beginnings(ask.past)
            known, job.base = self._sessions.recall(ask.owner, digests)
            job.unread, job.digest = ask.past[known:], digests[-1] if digests else START
        try:
            job.tries = min(self._tries(job), self.limits.rows)
        except StateError as error:  # several are wanted of a model that cannot choose among them
            raise Refusal(str(error), status=400, code="invalid_value", param="tries") from error
        return job

    def _tries(self, job: Job) -> int:
        """Images drawn to keep one, by `choice_of`; without words all that are wanted, of which the first stays."""
        cfg, wanted = self.model.components.cfg, job.ask.tries
        if wanted is None and job.ask.mode != "image":  # several tries are of an image
            wanted = 1
        if not words_of(job.words):
            return checked_tries(cfg, wanted)
        return choice_of(cfg, job.words, wanted, follows=job.images_before > 0)[0]

    def _score_job(self, ask: ScoreAsk) -> ScoreJob:
        return ScoreJob(ask, Reply(self._cancel), self._deadline(ask.timeout_s))

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + min(timeout_s or math.inf, self.limits.deadline_s)

    def _check_room(self, jobs: Sequence[Job | ScoreJob]) -> None:
        free = max(0, self.limits.rows - self._worker.rows)
        waiting, own = len(self._queue), self._queue.count(jobs[0].owner)
        if len(jobs) + waiting > self.limits.queue + free or len(jobs) + own > self.limits.queue_of_key + free:
            self.counts.refused += len(jobs)
            raise busy(waiting, self._retry_after(waiting))

    def _retry_after(self, waiting: int) -> int:
        """Whole seconds in which the queue will have room, at the pace of the last replies."""
        return max(1, min(60, math.ceil(waiting / max(self._pace, 1e-3))))

    def _cancel(self, reply: Reply) -> None:
        with self._wake:
            self._to_cancel.add(reply)
            self._wake.notify_all()

    # -- the thread that owns the engine

    @property
    def _has_work(self) -> bool:
        return bool(self._queue) or self._worker.rows > 0

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._has_work or self._to_cancel or self._is_stopped, SWEEP_S)
                if self._is_stopped:
                    break
            self._end_unwanted()
            self._begin_waiting()
            if self._worker.rows:
                self._step()
            self._look_around()
            if not self._has_work:
                with self._wake:
                    self._wake.notify_all()
        self._end_all()

    def _look_around(self) -> None:
        """Every few seconds: let idle sessions go, and note how fast replies are made."""
        now = time.monotonic()
        if now - self._swept < SWEEP_S:
            return
        self._sessions.sweep()
        done = self.counts.finished + self.counts.scores - self._finished
        if self._queue:
            self._pace = 0.5 * self._pace + 0.5 * done / (now - self._swept)
        self._swept, self._finished = now, self._finished + done

    def _step(self) -> None:
        try:
            self._worker.step()
        except Exception as error:
            log.exception("the engine failed; replies in progress are given up")
            self.counts.failed += len(self._worker.jobs)
            self._worker.restart(error)

    def _end_unwanted(self) -> None:
        """End what was cancelled, and what is too late."""
        with self._wake:
            unwanted, self._to_cancel = self._to_cancel, set()
            now = time.monotonic()
            waiting = [job for job in self._queue if job.reply in unwanted or job.deadline < now]
            for job in waiting:
                self._queue.remove(job)
        for job in waiting:
            job.reply.put(Failed(self._why(job, unwanted, has_begun=False)))
        for job in self._worker.jobs:
            if job.reply in unwanted or job.deadline < now:
                self._worker.end(job, self._why(job, unwanted, has_begun=True))

    def _why(self, job: Job | ScoreJob, unwanted: set[Reply], *, has_begun: bool) -> Refusal:
        if job.reply in unwanted:
            self.counts.cancelled += 1
            return cancelled()
        self.counts.expired += 1
        return late(min(job.ask.timeout_s or math.inf, self.limits.deadline_s), has_begun=has_begun)

    def _begin_waiting(self) -> None:
        """Begin requests whose turn it is, while there are rows for them."""
        for _ in range(AT_ONCE):
            with self._wake:
                job = self._queue.peek()
                if job is None or not self._fits(job):
                    return
                self._queue.pop()
            self._begin(job)
            if isinstance(job, ScoreJob):
                return  # it was computed whole; replies in progress come first now

    def _fits(self, job: Job | ScoreJob) -> bool:
        return isinstance(job, ScoreJob) or not self._worker.rows or (self._worker.rows + job.width <= self.limits.rows)

    def _begin(self, job: Job | ScoreJob) -> None:
        try:
            if isinstance(job, ScoreJob):
                self._worker.score(job)
            else:
                self._worker.begin(job)
        except StarFlowError as error:
            self._reject(job, error)
        except Exception as error:
            log.exception("a request could not be read")
            self.counts.failed += 1
            job.reply.put(Failed(error))

    def _reject(self, job: Job | ScoreJob, error: StarFlowError) -> None:
        """End a request that cannot be read: by the client's fault, or for want of memory."""
        if isinstance(error, CLIENTS_FAULT):
            self.counts.rejected += 1
            job.reply.put(Failed(refusal_of(error)))
        else:
            self.counts.failed += 1
            job.reply.put(Failed(error))

    def _end_all(self) -> None:
        with self._wake:
            jobs = [*self._queue]
            for waiting in jobs:
                self._queue.remove(waiting)
        for job in jobs:
            job.reply.put(Failed(closing()))
        for running in self._worker.jobs:
            self._worker.end(running, closing())


def _store(sampler: Sampler, limits: ServeLimits, folder: Path | None) -> SessionStore:
    """A store whose files have to fit the model."""
    probe = Engine(sampler)
    row = probe.open()
    probe.feed(row, sampler.components.tokenizer.opens_user()[:1])
    deep = sampler.components.cfg.flow.deep
    none = torch.zeros(deep.num_latents + 1, deep.dim, dtype=sampler.dtype, device=sampler.components.device)
    return SessionStore(limits, folder, sampler.fingerprint, probe.save(row), none)
