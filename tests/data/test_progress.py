"""Readers that change: nothing that was left unread is lost, and little is read twice."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from corpora_cases import LAYOUT, SIDE, Letters, captioned, image_of
from starflow2.data.mixture import BatchConfig, Batches, BatchIterator, Source, Spelling
from starflow2.data.progress import MixtureProgress, PassProgress
from starflow2.data.shards import Samples, WorkerShard

BLOCK, COUNT = 4, 60


def readers(folder: Path, world: int, progress: MixtureProgress) -> list[BatchIterator]:
    """A stream for each process, after what others have read."""
    sources = [Source(corpus="captions", url=str(folder / name), weight=w) for name, w in (("a", 2.0), ("b", 1.0))]
    config = BatchConfig(rows=1, width=64, block=BLOCK, caption_drop=0.0)
    found = []
    for rank in range(world):
        batches = Batches(sources, Spelling(Letters(), LAYOUT, SIDE), config, WorkerShard(rank=rank, world=world))
        batches.continue_after(progress)
        found.append(iter(batches))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of 40 and 20 samples in files of 10."""
    folder = tmp_path_factory.mktemp("progress")
    for i in range(4):
        captioned(folder / "a" / f"{i}.tar", 10, first=10 * i)
    for i in range(2):
        captioned(folder / "b" / f"{i}.tar", 10, first=40 + 10 * i)
    return folder


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_readers_may_change_at_any_moment_and_again_and_no_sample_of_a_pass_is_lost(folder, seed):
    """Two readers, then three, then one, each stopped after a random number of batches; the last reads on for a pass.

    Everything of the first pass is read once or more; twice only what a reader had in its block of four samples, or in
    the pass after, where the other source was slower.
    """
    rng, counts = random.Random(seed), Counter[int]()
    numbers = {image_of(i).numpy().tobytes(): i for i in range(COUNT)}
    progress = MixtureProgress()

    def read(streams: list[BatchIterator], batches: int) -> None:
        for _ in range(batches):
            for stream in streams:
                images, _ = next(stream)
                counts.update(numbers[image.numpy().tobytes()] for image in images)

    for world in (2, 3):
        streams = readers(folder, world, progress)
        read(streams, rng.randrange(4, 7))
        ranks = json.loads(json.dumps([{"somewhere": [stream.state_dict()]} for stream in streams]))
        identity = json.loads(json.dumps(streams[0]._batches.identity))
        progress = MixtureProgress.from_json(json.loads(json.dumps(progress.after(identity, 0, ranks).to_json())))
    (last,) = readers(folder, 1, progress)
    before = counts.total()
    while min(state["samples"]["epoch"] for state in last.state_dict()["documents"]["sources"]) == 0:
        read([last], 1)
    assert progress.generation == 2 and before > 4
    assert set(counts) == set(range(COUNT)), "nothing is lost"
    left = COUNT - sum(progress_counts(progress, folder))
    assert left < COUNT, "what was read is left out"


def progress_counts(progress: MixtureProgress, folder: Path) -> list[int]:
    """The samples of each source that need no more reading."""
    found = []
    for name, files in (("a", 4), ("b", 2)):
        own = progress.of("captions", str(folder / name))
        found.append(sum(own.has_read(f"{i}.tar", n) for i in range(files) for n in range(10)))
    return found


def test_readers_after_others_read_exactly_what_is_left_of_a_pass(folder):
    progress = PassProgress(epoch=2, files={"0.tar": [[-1]], "1.tar": [[2, 3]], "2.tar": [[0, -1], [5]]})
    left = []
    for rank in range(2):
        samples = Samples(str(folder / "a"), shard=WorkerShard(rank=rank, world=2), seed=1, block=3)
        samples.continue_after(progress)
        left += [int(sample.key) for sample in samples]
        assert samples.whole_passes == 0
    # of 1.tar two of the even and three of the odd samples were read; of 2.tar the odd ones, and five more by others
    expected = [14, 16, 17, 18, 19, 26, 28, *range(30, 40)]
    assert sorted(left) == expected
    assert progress.is_done("0.tar") and not progress.is_done("2.tar")


def test_files_may_be_added_and_a_new_source_begins_at_its_start(tmp_path):
    for i in range(2):
        captioned(tmp_path / "a" / f"{i}.tar", 10, first=10 * i)
    captioned(tmp_path / "b" / "0.tar", 10, first=40)
    (stream,) = readers(tmp_path, 1, MixtureProgress())
    for _ in range(12):
        next(stream)
    progress = MixtureProgress().after(stream._batches.identity, 0, [stream.state_dict()])
    read = {n for n in range(20) if progress.of("captions", str(tmp_path / "a")).has_read(f"{n // 10}.tar", n % 10)}
    captioned(tmp_path / "a" / "2.tar", 10, first=20)
    samples = Samples(str(tmp_path / "a"), block=BLOCK)
    samples.continue_after(progress.of("captions", str(tmp_path / "a")))
    assert 0 < len(read) < 20 and {int(sample.key) for sample in samples} == set(range(30)) - read
    assert progress.of("captions", "elsewhere") == PassProgress()
