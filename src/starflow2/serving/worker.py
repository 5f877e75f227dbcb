"""The worker: replies that are being made, each in rows of the engine, from the first position read to the last event.

Everything here runs in the one thread that owns the engine. A job whose request cannot be read, or whose row fails,
ends alone. Not here: waiting, deadlines and threads (`service`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from starflow2.errors import OutputError, PromptError
from starflow2.inference.config import ReplyLimits
from starflow2.inference.engine import Engine
from starflow2.inference.events import DecodedImage, Ended, RowEvent, Stepped
from starflow2.inference.events import Failed as RowFailed
from starflow2.inference.likelihood import score
from starflow2.inference.reading import Part, PastTurn, read_past, read_user_turn
from starflow2.inference.sampler import Sampler
from starflow2.inference.self_check import Check, check_of, confidences, has_room, seed_of
from starflow2.models.wording import words_of
from starflow2.serving.aside import Aside, draft_image
from starflow2.serving.history import after, words_first
from starflow2.serving.jobs import (
    Accepted,
    Ask,
    Done,
    Draft,
    Event,
    Failed,
    ImageDone,
    Progress,
    ScoreAsk,
    Scored,
    Usage,
    count_images,
)
from starflow2.serving.replies import Reply
from starflow2.serving.sessions import SessionStore, Snapshot
from starflow2.serving.stats import Counts
from starflow2.serving.transcript import Transcript

__all__ = ["Job", "ScoreJob", "Worker"]

BACKLOG = 8  # tasks beside the engine, above which drafts are left out


@dataclass(slots=True, eq=False)
class Job:
    """A request for a reply, and the reply that is made."""

    ask: Ask
    reply: Reply
    deadline: float
    tries: int = 1
    base: Snapshot | None = None  # what its past begins with
    unread: Sequence[PastTurn] = ()  # turns after that
    digest: bytes | None = None  # of the whole past; None: it is not one that is sent whole
    rows: dict[int, Transcript] = field(default_factory=dict)
    ended: dict[int, Ended] = field(default_factory=dict)
    events: dict[int, list[RowEvent]] = field(default_factory=dict)  # of each of several rows
    sure: dict[int, float] = field(default_factory=dict)  # confidence in the image of each of several rows
    usage: Usage = field(default_factory=Usage)
    images: int = 0  # in the conversation before the reply
    drafts: int = 0  # of the current image

    @property
    def owner(self) -> str:
        return self.ask.owner

    @property
    def width(self) -> int:
        """Rows of the engine that it takes."""
        return self.tries

    @property
    def words(self) -> str:
        """The words of the user's turn."""
        return " ".join(part for part in self.ask.parts if isinstance(part, str))

    @property
    def images_before(self) -> int:
        """Images of the conversation before the reply, and of the user's turn."""
        unread = sum(count_images([*user, *reply]) for user, reply in self.unread)
        return (0 if self.base is None else self.base.images) + unread + count_images(self.ask.parts)


@dataclass(slots=True, eq=False)
class ScoreJob:
    """A request for a likelihood."""

    ask: ScoreAsk
    reply: Reply
    deadline: float

    @property
    def owner(self) -> str:
        return self.ask.owner


class Worker:
    """Jobs in progress on one engine."""

    def __init__(
        self, sampler: Sampler, exact: Callable[[], Sampler], store: SessionStore, aside: Aside, counts: Counts
    ) -> None:
        self.sampler, self.exact, self.store, self.aside, self.counts = sampler, exact, store, aside, counts
        self.engine = Engine(sampler)
        self._jobs: dict[int, Job] = {}  # by row

    @property
    def jobs(self) -> list[Job]:
        """Jobs in progress."""
        return list(dict.fromkeys(self._jobs.values()))

    @property
    def rows(self) -> int:
        """Rows that reply."""
        return len(self._jobs)

    # -- begin and end

    def begin(self, job: Job) -> None:
        """Read a request and let its rows reply. Raises what is wrong with it; then no row is left."""
        with self.engine.in_use.claimed():
            self._begin(job)
        self.counts.joined += 1
        self._put(job, Accepted())

    def _begin(self, job: Job) -> None:
        row = self.engine.open() if job.base is None else self.engine.load(job.base.state)
        rows = [row]
        try:
            cached = self.engine.length(row)
            read_past(self.engine, row, job.unread)
            read_user_turn(self.engine, row, job.ask.parts)
            self._count_input(job, row, cached)
            limits = self._limits(job.ask, row)
            self.engine.expect(job.tries - 1)
            rows += [self.engine.fork(row) for _ in range(job.tries - 1)]
            seeds = [seed_of(job.ask.seed, number) for number in range(job.tries)]
            draws, decodes = job.ask.mode == "image", job.tries == 1  # of several only the chosen one gets pixels
            for each, seed in zip(rows, seeds, strict=True):
                self.engine.begin(each, limits, seed, job.ask.config, draws=draws, decodes=decodes)
        except BaseException:
            self._release(rows)
            raise
        for each, seed in zip(rows, seeds, strict=True):
            job.rows[each] = Transcript(self.sampler.components.tokenizer, seed)
            job.events[each] = []
            self._jobs[each] = job

    def _count_input(self, job: Job, row: int, cached: int) -> None:
        each = self.sampler.layout.num_latents
        before = 0 if job.base is None else job.base.images
        job.images = job.images_before
        latents = job.images * each
        job.usage = Usage(self.engine.length(row) - latents, latents, cached)
        self.counts.encoded += job.images - before

    def _limits(self, ask: Ask, row: int) -> ReplyLimits:
        """Limits of a reply within the room that is left. Raises PromptError where nothing fits."""
        per_image, most = self.sampler.layout.num_latents + 2, self.sampler.components.cfg.max_positions
        room = most - self.engine.length(row) - 4
        if ask.mode == "image":
            limits = ReplyLimits(tokens=0, pictures=1)
        else:
            limits = replace(ask.limits, pictures=0) if ask.mode == "text" else ask.limits
        pictures = max(0, min(limits.pictures, (room - min(limits.tokens, 1)) // per_image))
        tokens = max(0, min(limits.tokens, room - pictures * per_image))
        if not tokens + pictures or (ask.mode == "image" and not pictures):
            raise PromptError(f"the conversation has {most - room} positions; this model reads up to {most}: say less.")
        return replace(limits, tokens=tokens, pictures=pictures)

    def end(self, job: Job, error: Exception) -> None:
        """Stop a job in progress."""
        self._release(list(job.rows))
        self._put(job, Failed(error))

    def _release(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.engine.release(row)
            self._jobs.pop(row, None)

    def restart(self, error: Exception) -> None:
        """Give up every job, after a failure of the engine itself, and go on with a new engine."""
        jobs, self._jobs = self.jobs, {}
        self.engine = Engine(self.sampler)
        for job in jobs:
            self._put(job, Failed(error))

    # -- events

    def step(self) -> None:
        """Advance every row that replies."""
        with self.engine.in_use.claimed():
            self._step()

    def _step(self) -> None:
        over = list[Job]()
        for event in self.engine.step():
            job = self._jobs.get(event.row)
            if job is not None and self._take(job, event):
                over.append(job)
        self._finish_all(over)
        for job in self.jobs:
            if job.ask.drafts:
                self._draft(job)

    def _take(self, job: Job, event: RowEvent) -> bool:
        """Note an event of one of a job's rows; True if all of them are over now."""
        row = event.row
        if isinstance(event, RowFailed):
            self._lose(job, row, event.error)
        elif isinstance(event, Ended):
            job.rows[row].close()
            job.ended[row] = event
        if row in job.rows:
            if job.tries > 1 and not isinstance(event, Stepped):
                job.events[row].append(event)
            for each in job.rows[row].take(event):
                self._pass_on(job, each)
        return bool(job.rows) and len(job.ended) == len(job.rows)

    def _pass_on(self, job: Job, event: Event) -> None:
        """Give an event to who reads the reply, but where one of several is chosen, which is told when it is."""
        if isinstance(event, Progress):
            if job.ask.reports:
                total = job.tries * event.total
                self._put(job, Progress(event.index, sum(t.drawn for t in job.rows.values()), total))
        elif job.tries == 1:
            self._put(job, event)

    def _put(self, job: Job, event: Event) -> None:
        """Add an event to a reply, behind drafts of it that are still being made."""
        if job.ask.drafts:
            self.aside.do(lambda: job.reply.put(event))
        else:
            job.reply.put(event)

    def _lose(self, job: Job, row: int, error: Exception) -> None:
        """A row has failed; its job fails if it was the last one."""
        self._release([row])
        del job.rows[row]
        if not job.rows:
            self.counts.failed += 1
            self._put(job, Failed(error))

    # -- drafts

    def _draft(self, job: Job) -> None:
        """Make a draft of an image that has come far enough for the next one."""
        row, transcript = next(iter(job.rows.items()))
        total, wanted = self.sampler.layout.num_latents, job.ask.drafts
        if transcript.drawn in (0, total) or job.drafts >= wanted:
            job.drafts = 0 if transcript.drawn in (0, total) else job.drafts
            return
        if transcript.drawn < total * (job.drafts + 1) // (wanted + 1) or len(self.aside) > BACKLOG:
            return
        u = self.engine.draft(row)
        if u is not None:
            index, number = transcript.images, job.drafts
            job.drafts += 1
            self.counts.drafts += 1
            self.aside.do(lambda: job.reply.put(Draft(index, number, draft_image(self.sampler, u))))

    # -- the end of a reply

    def _finish_all(self, jobs: Sequence[Job]) -> None:
        """End replies whose rows are over; questions about their images are asked together."""
        several = [job for job in jobs if job.tries > 1]
        self._check(several)
        rows = {id(job): self._chosen(job) for job in jobs}
        chosen = [event for job in several for event in job.events[rows[id(job)]]]
        whole = dict[int, list[RowEvent]]()
        for event in self.engine.with_pixels(chosen):
            whole.setdefault(event.row, []).append(event)
        for job in several:
            self._tell(job, rows[id(job)], whole.get(rows[id(job)], []))
        for job in jobs:
            self._finish(job, rows[id(job)])

    def _check(self, jobs: Sequence[Job]) -> None:
        """Ask about the image in each row of jobs that have several."""
        cfg = self.sampler.components.cfg
        asked: list[tuple[Job, int, Check]] = []
        for job in jobs:
            if not words_of(job.words):  # there is nothing to ask about
                continue
            check = check_of(cfg, job.words, follows=job.images > 0)
            drawn = [row for row, transcript in job.rows.items() if transcript.images]
            asked += [(job, row, check) for row in drawn if check and has_room(self.engine, row, check)]
        found = confidences(self.engine, [row for _, row, _ in asked], [check for *_, check in asked])
        for (job, row, _), sure in zip(asked, found, strict=True):
            job.sure[row] = sure

    def _chosen(self, job: Job) -> int:
        """The row whose image the model confirms most, the first one where none was asked about."""
        return max(job.sure, key=job.sure.__getitem__) if job.sure else next(iter(job.rows))

    def _tell(self, job: Job, row: int, events: Sequence[RowEvent]) -> None:
        """Pass on what the chosen row said and drew."""
        transcript = job.rows[row] = Transcript(self.sampler.components.tokenizer, job.rows[row].seed)
        for event in events:
            if isinstance(event, Ended):
                transcript.close()
            for each in transcript.take(event):
                sure = job.sure.get(row)
                self._put(job, replace(each, confidence=sure) if isinstance(each, ImageDone) else each)

    def _finish(self, job: Job, row: int) -> None:
        """Keep the state of the row that was chosen if it was asked for, and end the reply."""
        transcript, usage = job.rows[row], self._usage(job, row)
        snapshot = self._snapshot(job, row, transcript) if job.ask.keep != "no" else None
        self._release(list(job.rows))
        done = Done(job.ended[row].reason, usage, transcript.seed, None if snapshot is None else snapshot.id)
        self.counts.add(usage, transcript.images)
        if snapshot is None or job.ask.keep == "memory":
            self._put(job, done)
        else:
            self.aside.do(lambda: self._store(job, snapshot, done))

    def _usage(self, job: Job, row: int) -> Usage:
        transcript, each = job.rows[row], self.sampler.layout.num_latents
        return replace(job.usage, output_text=transcript.tokens, output_images=transcript.images * each)

    def _snapshot(self, job: Job, row: int, transcript: Transcript) -> Snapshot:
        """Keep the conversation as it is now."""
        state = self.engine.save(row)
        snapshot = Snapshot(str(job.ask.id), job.owner, state, job.images + transcript.images)
        self.store.add(snapshot, self._prefixes(job, transcript.parts))
        return snapshot

    def _prefixes(self, job: Job, parts: Sequence[str | DecodedImage]) -> list[bytes]:
        """Digests of all turns and this one, as clients may send them back."""
        if job.digest is None:
            return []
        forms: list[Sequence[Part | DecodedImage]] = [parts, words_first(parts)]
        return list(dict.fromkeys(after(job.digest, job.ask.parts, form) for form in forms))

    def _store(self, job: Job, snapshot: Snapshot, done: Done) -> None:
        try:
            self.store.store(snapshot)
        except OutputError:  # a full disk: the reply is whole, and goes on from memory
            self.counts.unstored += 1
            job.reply.put(done)
        else:
            job.reply.put(replace(done, is_stored=self.store.folder is not None))

    # -- likelihood

    def score(self, job: ScoreJob) -> None:
        """Compute a likelihood, between two steps of the engine. Raises what is wrong with the request."""
        ask = job.ask
        found = score(self.exact(), ask.prompt, ask.reply, noise_level=ask.noise_level)
        each = self.sampler.layout.num_latents
        images = count_images([*ask.prompt, *ask.reply])
        words = [part for part in (*ask.prompt, *ask.reply) if isinstance(part, str)]
        tokens = sum(len(self.sampler.components.tokenizer.encode(part)) for part in words)
        self.counts.scores += 1
        self.counts.joined += 1
        job.reply.put(Scored(found, Usage(tokens, images * each)))
