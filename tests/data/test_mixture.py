"""Mixtures: weights hold, rows are full, shares are disjoint and complete, and a resumed stream is the same stream."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from corpora_cases import LAYOUT, PUBLISHED, SIDE, Letters, captioned, encoded, image_of, write_lines, write_tar
from starflow2.core.dialogue import Dialogue, Turn
from starflow2.data import shards
from starflow2.data.mixture import (
    WAITING,
    BatchConfig,
    Batches,
    Source,
    Spelling,
    broken_counts,
    drop_words,
    fits,
    loader,
    read_mixture,
)
from starflow2.data.records import Photo
from starflow2.data.shards import Samples, WorkerShard
from starflow2.errors import ConfigError, DataError
from starflow2.models.sequence import Batch, Text, pack

SPELLING = Spelling(Letters(), LAYOUT, SIDE)
PLAIN = BatchConfig(rows=3, width=64, block=7, caption_drop=0.0)


@pytest.fixture
def corpora(tmp_path) -> tuple[Source, ...]:
    """Three sources in three formats, one of them with broken samples."""
    for i in range(3):
        captioned(tmp_path / "tars" / f"{i}.tar", 7, first=7 * i)
    url, _ = PUBLISHED["cambrian"](tmp_path / "cambrian")
    members = [(f"{i}.png", encoded(i)) for i in range(4)] + [("4.png", b""), ("4.txt", b"x"), ("5.txt", b"x")]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in [*members, *((f"{i}.txt", b"words" * i) for i in range(1, 4))]:
        (folder / name).write_bytes(data)
    return (
        Source(corpus="captions", url=str(tmp_path / "tars"), weight=3),
        Source(corpus="cambrian", url=url, weight=1),
        Source(corpus="captions", url=str(folder), weight=2),
    )


def same(one: tuple[Tensor, Batch], two: tuple[Tensor, Batch]) -> bool:
    """True if every tensor of both is equal to the bit, as repeated reads of the same files are."""
    a, b = one[1], two[1]
    names = ("ids", "labels", "document", "mrope", "places")
    pictures = all(
        torch.equal(getattr(a.pictures, n), getattr(b.pictures, n)) for n in ("row", "begin", "is_target", "previous")
    )
    return torch.equal(one[0], two[0]) and pictures and all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


def take(stream: Iterator[Any], count: int) -> list[Any]:
    return [next(stream) for _ in range(count)]


# -- mixture files ----------------------------------------------------------------------------------------------------


def test_a_mixture_file_names_its_sources(tmp_path):
    path = tmp_path / "mix.json"
    path.write_text('[{"corpus": "cc12m", "url": "a/*.tar", "weight": 3}, {"corpus": "comm", "url": "b", "weight": 1.5,'
                    ' "format": "jsonl", "pictures": "c"}]')  # fmt: skip
    assert read_mixture(path) == (
        Source(corpus="cc12m", url="a/*.tar", weight=3.0),
        Source(corpus="comm", url="b", weight=1.5, format="jsonl", pictures="c"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"corpus": "cc12m", "url": "a", "wieght": 3}]', r'source 1: .*wieght.*Did you mean "weight"'),
        ('[{"corpus": "cc12", "url": "a", "weight": 3}]', r"""source 1: .*cc12.*Did you mean "cc12m"""),
        ('[{"corpus": "cc12m", "url": "a", "weight": "3"}]', "expected float"),
        ('[{"corpus": "cc12m", "url": "a", "weight": 0}]', "more than 0"),
        ('[{"corpus": "cc12m", "url": "a", "weight": 1, "format": "zip"}]', "'tar', 'parquet'"),
        ('[{"corpus": "cc12m", "weight": 1}]', "url: missing"),
        ('[{"corpus": "cc12m", "url": "a", "weight": 1, "weight": 2}]', "occurs twice"),
        ('{"corpus": "cc12m"}', "expected a list"),
        ("[]", "expected a list"),
        ("[3]", "expected a dictionary"),
        ("[", "not JSON"),
    ],
)
def test_a_wrong_mixture_file_is_refused_with_place_and_nearest_name(text, message, tmp_path):
    (tmp_path / "mix.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_mixture(tmp_path / "mix.json")


def test_without_its_packages_the_command_that_installs_them_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'starflow2\[train\]'"):
        shards.needs("datasets")


# -- shares -----------------------------------------------------------------------------------------------------------


def keys(samples: Samples) -> list[str]:
    return [sample.key for sample in samples]


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("block", [1, 5])
def test_ranks_read_disjoint_parts_that_make_up_the_whole_in_every_pass(world, block, tmp_path):
    for i in range(3):
        captioned(tmp_path / f"{i}.tar", 6, first=6 * i)
    ranks = [Samples(str(tmp_path), shard=WorkerShard(rank=r, world=world), seed=4, block=block) for r in range(world)]
    for _ in range(2):
        assert sorted(key for rank in ranks for key in keys(rank)) == [f"{i:06d}" for i in range(18)]


@pytest.mark.parametrize("kind", ["jsonl", "folder"])
def test_a_single_file_or_folder_is_divided_by_samples(kind, tmp_path):
    if kind == "jsonl":
        url = str(write_lines(tmp_path / "x.jsonl", [{"n": i} for i in range(11)]))
    else:
        url = str(tmp_path)
        for i in range(11):
            (tmp_path / f"{i:02d}.png").write_bytes(b"x")
    parts = [keys(Samples(url, shard=WorkerShard(rank=r, world=3))) for r in range(3)]
    assert sorted(map(len, parts)) == [3, 4, 4] and len({key for part in parts for key in part}) == 11


def test_workers_of_ranks_read_disjoint_parts_that_make_up_the_whole_and_none_is_idle(tmp_path):
    captioned(tmp_path / "0.tar", 9)
    captioned(tmp_path / "1.tar", 8, first=9)
    found: list[tuple[int, int, str]] = []
    for rank in range(2):
        samples = Samples(str(tmp_path), shard=WorkerShard(rank=rank, world=2), block=4)
        loaded = torch.utils.data.DataLoader(_Keys(samples), batch_size=None, num_workers=2)
        found += [(rank, worker, key) for worker, key in loaded]
    assert sorted(key for *_, key in found) == [f"{i:06d}" for i in range(17)]
    assert {(rank, worker) for rank, worker, _ in found} == {(0, 0), (0, 1), (1, 0), (1, 1)}


class _Keys(torch.utils.data.IterableDataset):
    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[tuple[int, str]]:
        info = torch.utils.data.get_worker_info()
        assert info is not None
        return iter([(info.id, key) for key in keys(self.samples)])


def test_passes_differ_in_order_and_a_seed_gives_the_same_ones_again(tmp_path):
    for i in range(3):
        captioned(tmp_path / f"{i}.tar", 10, first=10 * i)
    one, two, other = (Samples(str(tmp_path), seed=s, block=8) for s in (1, 1, 2))
    passes = [keys(one) for _ in range(3)]
    assert passes == [keys(two) for _ in range(3)]
    assert passes[0] != passes[1] != passes[2] and keys(other) != passes[0]
    assert all(sorted(p) == sorted(passes[0]) for p in passes)
    assert len({keys(one)[0][-2] for _ in range(8)}) == 3  # every file is the first one now and then


def test_samples_resume_exactly_wherever_they_stopped(tmp_path):
    for i in range(3):
        captioned(tmp_path / f"{i}.tar", 4, first=4 * i)
    whole = Samples(str(tmp_path), seed=1, block=5)
    passes = keys(whole) + keys(whole)
    for stop in range(0, 25, 2):
        first = Samples(str(tmp_path), seed=1, block=5)
        got = []
        while len(got) < stop:
            for sample in first:
                got.append(sample.key)
                if len(got) == stop:
                    break
        resumed = Samples(str(tmp_path), seed=1, block=5)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        while len(got) < 24:
            got += keys(resumed)
        assert got[:24] == passes


# -- batches ----------------------------------------------------------------------------------------------------------


def test_a_resumed_iterator_gives_bit_equal_batches_wherever_it_stopped(corpora):
    config = BatchConfig(rows=2, width=64, block=5, caption_drop=0.3)
    stream = iter(Batches(corpora, SPELLING, config))
    states, whole = [], []
    for _ in range(14):
        states.append(json.dumps(stream.state_dict()))
        whole.append(next(stream))
    for stop in (0, 1, 2, 5, 11):
        resumed = iter(Batches(corpora, SPELLING, config))
        resumed.load_state_dict(json.loads(states[stop]))
        assert json.dumps(resumed.state_dict()) == states[stop]
        assert broken_counts(resumed.state_dict()) == broken_counts(json.loads(states[stop]))
        for a, b in zip(take(resumed, 3), whole[stop:], strict=False):
            assert same(a, b)
    assert broken_counts(json.loads(states[-1])).total() > 3


def test_a_resumed_iterator_knows_which_sources_have_made_their_passes(corpora):
    sources = (replace(corpora[0], epochs=1), *corpora[1:])
    whole, states = iter(Batches(sources, SPELLING, PLAIN)), list[Any]()
    batches = [(states.append(json.dumps(whole.state_dict())), next(whole))[1] for _ in range(14)]
    assert json.loads(states[-1])["documents"]["sources"][0]["samples"]["epoch"] == 1
    for at in (5, 12):
        resumed = iter(Batches(sources, SPELLING, PLAIN))
        resumed.load_state_dict(json.loads(states[at]))
        assert all(same(one, two) for one, two in zip(batches[at:], take(resumed, 14 - at), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_gives_bit_equal_batches(workers, corpora):
    make = partial(loader, Batches(corpora, SPELLING, PLAIN), workers)
    whole = take(iter(make()), 7)
    for stop in (1, 4):
        first = make()
        take(iter(first), stop)
        state = json.loads(json.dumps(first.state_dict()))
        resumed = make()
        resumed.load_state_dict(state)
        for a, b in zip(take(iter(resumed), 7 - stop), whole[stop:], strict=True):
            assert same(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 4}, "packing was"),
        ({"seed": 1}, "packing was"),
        ({"sources": 2}, "sources was"),
        ({"shard": WorkerShard(rank=0, world=2)}, "reader was"),
    ],
)
def test_a_state_of_another_mixture_or_another_number_of_readers_is_refused(change, message, corpora):
    state = iter(Batches(corpora, SPELLING, PLAIN)).state_dict()
    config = replace(PLAIN, **{k: v for k, v in change.items() if k in ("rows", "seed")})
    other = iter(Batches(corpora[: change.get("sources", 3)], SPELLING, config, change.get("shard")))
    with pytest.raises(DataError, match=message):
        other.load_state_dict(state)


def test_a_state_from_before_a_file_was_added_is_refused(tmp_path):
    captioned(tmp_path / "0.tar", 3)
    source = [Source(corpus="captions", url=str(tmp_path), weight=1)]
    state = iter(Batches(source, SPELLING, PLAIN)).state_dict()
    captioned(tmp_path / "1.tar", 3)
    with pytest.raises(DataError, match="cannot resume: files was"):
        iter(Batches(source, SPELLING, PLAIN)).load_state_dict(state)


def test_a_batch_holds_the_documents_and_pictures_that_its_rows_say(tmp_path):
    """Against documents packed by hand: what the stream drew, in its order, one document to a row."""
    captioned(tmp_path / "0.tar", 12)
    source = Source(corpus="captions", url=str(tmp_path), weight=1)
    config = BatchConfig(rows=2, width=60, block=1, caption_drop=0.0)
    images, batch = next(iter(Batches([source], SPELLING, config)))
    numbers = []
    for row in range(len(batch.ids)):
        for document in batch.document[row].unique():
            ids = batch.ids[row][batch.document[row] == document].tolist() if document >= 0 else []
            if ids:
                words = "".join(chr(i - 10) for i in ids if i >= 10)
                assert ids == [4, *(10 + ord(c) for c in words), 5, 1, 3, 3, 3, 3, 2, 6]
                numbers.append((int(document), int(words.split()[1])))
    for document, number in numbers:
        assert torch.equal(images[document], image_of(number))
    assert len(images) == len(numbers) == len(batch.pictures)
    assert bool(batch.pictures.is_target.all()) and len(batch.ids) <= 2


def test_every_document_of_a_pass_is_read_exactly_once(tmp_path):
    for i in range(2):
        captioned(tmp_path / f"{i}.tar", 20, first=20 * i)
    stream = iter(Batches([Source(corpus="captions", url=str(tmp_path), weight=1)], SPELLING, PLAIN))
    counts = Counter[int]()
    while sum(counts.values()) < 40:
        images, _ = next(stream)
        counts.update(next(i for i in range(40) if torch.equal(image, image_of(i))) for image in images)
    late = [drawn.item.images[0] for drawn in stream._waiting]
    counts.update(next(i for i in range(40) if torch.equal(image, image_of(i))) for image in late)
    total = sum(counts.values())
    assert set(counts) == set(range(40)) and max(counts.values()) <= -(-total // 40)


def test_weights_hold_within_what_chance_allows(tmp_path):
    sources = []
    for name, weight in (("a", 6.0), ("b", 3.0), ("c", 1.0)):
        captioned(tmp_path / name / "0.tar", 60, words=lambda i, name=name: name)
        sources.append(Source(corpus="captions", url=str(tmp_path / name), weight=weight))
    stream = iter(Batches(sources, SPELLING, BatchConfig(rows=50, width=100, block=1, caption_drop=0)))
    counts = Counter[str]()
    for _, batch in take(stream, 1):
        counts.update(chr(int(i) - 10) for i in batch.ids[batch.ids >= 10])
    total = sum(counts.values())
    assert total > 450
    for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
        assert abs(counts[name] / total - share) < 4 * (share * (1 - share) / total) ** 0.5


def test_ranks_draw_from_sources_in_different_orders(tmp_path):
    sources = []
    for name in "ab":
        captioned(tmp_path / name / "0.tar", 40, words=lambda i, name=name: name)
        sources.append(Source(corpus="captions", url=str(tmp_path / name), weight=1))

    def drawn(rank: int, seed: int) -> list[tuple[int, ...]]:
        config = BatchConfig(rows=1, width=64, seed=seed, caption_drop=0)
        documents = iter(Batches(sources, SPELLING, config, WorkerShard(rank=rank, world=2)))._documents
        return [documents.next().document[1].ids for _ in range(20)]

    one, other, seeded = drawn(0, 0), drawn(1, 0), drawn(0, 1)
    assert one == drawn(0, 0) and one != other and one != seeded and other != seeded


def test_broken_samples_are_counted_and_listed_with_reason_source_and_key(corpora, tmp_path):
    listed = tmp_path / "broken.jsonl"
    config = BatchConfig(rows=2, width=64, block=1, caption_drop=0.0, broken=str(listed))
    stream = iter(Batches(corpora[2:], SPELLING, config))
    take(stream, 3)
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    counts = Counter(line["reason"] for line in lines)
    keys = {(line["reason"], line["key"]) for line in lines}
    assert keys == {("missing text", "0"), ("empty picture", "4"), ("missing picture", "5")}
    assert {line["corpus"] for line in lines} == {"captions"} and all(line["source"] for line in lines)
    counted = Counter[str]()
    for source in stream._documents.streams:
        counted += source.broken
    assert counted == counts
    before = listed.read_text()
    resumed = iter(Batches(corpora[2:], SPELLING, config))
    resumed.load_state_dict(stream.state_dict())
    assert listed.read_text() == before  # what is drawn again is not listed again


def test_a_corpus_where_everything_is_broken_is_an_error_that_says_why(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}.png", b"x") for i in range(5)])
    stream = iter(Batches([Source(corpus="captions", url=str(tmp_path), weight=1)], SPELLING, PLAIN))
    with pytest.raises(DataError, match=r"captions at .*none of its 5 samples can be used \(missing text 5\)"):
        next(stream)


def test_a_large_corpus_where_everything_is_broken_is_an_error_before_a_pass_is_over(tmp_path):
    url = write_lines(tmp_path / "a.jsonl", [{}] * 3000)
    stream = iter(Batches([Source(corpus="cambrian", url=str(url), weight=1)], SPELLING, PLAIN))
    with pytest.raises(DataError, match=r"none of the first 1000 samples can be used \(missing text 1000\)"):
        next(stream)


def test_a_corpus_with_no_sample_for_a_process_is_an_error(tmp_path):
    captioned(tmp_path / "0.tar", 2)
    source = Source(corpus="captions", url=str(tmp_path), weight=1)
    with pytest.raises(DataError, match="no sample for this process"):
        next(iter(Batches([source], SPELLING, PLAIN, WorkerShard(rank=3, world=4))))


def test_an_error_in_a_worker_reaches_the_run_as_the_same_error(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}.png", b"x") for i in range(5)])
    batches = Batches([Source(corpus="captions", url=str(tmp_path), weight=1)], SPELLING, PLAIN)
    with pytest.raises(DataError, match="none of its"):
        next(iter(loader(batches, workers=1)))


def test_a_place_with_nothing_to_read_is_refused_at_once(tmp_path):
    for url in (str(tmp_path), str(tmp_path / "gone.tar"), str(tmp_path / "*.parquet")):
        with pytest.raises(DataError, match="no file to read"):
            Samples(url)


def test_words_are_dropped_from_drawings_alone_and_half_of_the_shown_pictures_stay():
    photo = Photo(b"x")
    edit = Dialogue((Turn((photo, "redder"), (photo,)),), "edit")
    answer = Dialogue((Turn((photo, "what?"), ("a cat",)),), "understand")
    rng = np.random.default_rng(0)
    kinds = Counter(drop_words(edit, rng, 0.5).turns[0].user for _ in range(2000))
    assert all(drop_words(answer, rng, 1.0) == answer for _ in range(20))
    assert abs(kinds[(photo, "redder")] - 1000) < 100 and abs(kinds[(photo,)] - 500) < 80 and abs(kinds[()] - 500) < 80


# -- remote -----------------------------------------------------------------------------------------------------------


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


class _Server(ThreadingHTTPServer):
    server_bind = TCPServer.server_bind  # HTTPServer's looks its own name up, which takes seconds without a network


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    """tmp_path over HTTP on this machine."""
    running = _Server(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path)))
    Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}"
    Thread(target=running.shutdown, daemon=True).start()  # which waits half a second


def test_tars_are_streamed_over_http_like_local_ones(server, tmp_path):
    for i in range(2):
        captioned(tmp_path / "data" / f"s-{i:04d}.tar", 3, first=3 * i)
    remote, local = Samples(f"{server}/data/s-{{0000..0001}}.tar"), Samples(str(tmp_path / "data"))
    assert [(s.key, s.fields) for s in remote] == [(s.key, s.fields) for s in local]


def test_workers_stream_over_http_after_the_run_has_looked_there(server, tmp_path):
    """A connection that was open when workers were forked would hang them."""
    for i in range(2):
        captioned(tmp_path / "data" / f"s-{i:04d}.tar", 6, first=6 * i)
    source = Source(corpus="captions", url=f"{server}/data/s-{{0000..0001}}.tar", weight=1)
    assert len(keys(Samples(source.url))) == 12
    for images, batch in take(iter(loader(Batches([source], SPELLING, PLAIN), workers=2)), 4):
        assert len(images) == len(batch.pictures) > 0


def test_a_file_that_a_server_has_not_is_counted_and_the_next_one_read(server, tmp_path):
    captioned(tmp_path / "0.tar", 2)
    captioned(tmp_path / "1.tar", 2, first=2)
    samples = Samples(f"{server}/{{0..1}}.tar")
    (tmp_path / "0.tar").unlink()
    gone, *rest = samples
    assert "FileNotFoundError" in gone.damage and [s.key for s in rest] == ["000002", "000003"]


def test_object_stores_are_read_through_fsspec(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    local = captioned(tmp_path / "0.tar", 3)
    memory.pipe("/bucket/0.tar", local.read_bytes())
    memory.pipe("/bucket/pictures/a.png", encoded(1))
    memory.pipe("/bucket/pictures/a.txt", b"words")
    assert keys(Samples("memory://bucket/0.tar")) == ["000000", "000001", "000002"]
    assert [s.fields["txt"] for s in Samples("memory://bucket/pictures")] == [b"words"]


# -- packing ----------------------------------------------------------------------------------------------------------


def realistic(rng: np.random.Generator, count: int) -> list[int]:
    """Positions of documents: half are captions of about 60 of 128 words and no picture's slots, half interleaved."""
    captions = np.clip(rng.gamma(6.0, 10.0, count // 2), 8, 128).astype(int)
    mixed = rng.integers(300, 1201, count - count // 2)
    lengths = np.concatenate([captions, mixed])
    rng.shuffle(lengths)
    return [int(n) for n in lengths]


def fill(batch: Batch) -> float:
    """Share of its positions that hold something."""
    return float((batch.document >= 0).float().mean())


def _spoken(length: int) -> dict[str, Any]:
    """A record whose document has that many positions."""
    words = "x" * (length // 2), "y" * (length - length // 2 - 3)
    return {"conversations": [{"from": who, "value": w} for who, w in zip(("human", "gpt"), words, strict=True)]}


@pytest.mark.parametrize("captions_only", [True, False])
def test_packed_rows_hold_far_more_than_rows_of_one_document(captions_only, tmp_path):
    """At least 1.2 times as many real tokens in a slot as with one document a row, 32 rows as long as the longest."""
    lengths = realistic(np.random.default_rng(0), 640)
    if captions_only:
        lengths = [n for n in lengths if n <= 128]
    url = write_lines(tmp_path / "x.jsonl", map(_spoken, lengths))
    config = BatchConfig(rows=8, width=2048, block=1)
    stream = iter(Batches([Source(corpus="cambrian", url=str(url), weight=1)], SPELLING, config))
    batches = [batch for _, batch in take(stream, 2 if captions_only else 6)]
    packed = np.mean([fill(batch) for batch in batches])
    groups = np.split(np.array(lengths), len(lengths) // 32)
    alone = np.mean([group.mean() / group.max() for group in groups])
    print(f"packed {packed:.3f}, one a row {alone:.3f}, {packed / alone:.2f} times as many")
    assert all(len(batch.ids) <= 8 and batch.ids.shape[1] <= 2048 for batch in batches)
    assert packed > 0.97 and packed / alone > 1.2


def test_whether_documents_fit_is_what_packing_says():
    """The shortcut against `pack` itself, on batches that are nearly full."""
    rng, answers = np.random.default_rng(3), Counter[bool]()
    for _ in range(200):
        longest, rows = int(rng.integers(3, 41)), int(rng.integers(1, 6))
        lengths = [int(n) for n in rng.integers(1, longest, max(1, int(rng.uniform(50, 110)) * rows // longest))]
        batch = pack([[Text((9,) * n)] for n in lengths], LAYOUT, 40)
        assert fits(lengths, rows, 40) == (len(batch.ids) <= rows)
        answers[fits(lengths, rows, 40)] += 1
    assert min(answers.values()) > 40
    assert not fits([41], 9, 40)


def test_no_more_than_a_few_documents_wait_and_the_oldest_go_first(corpora):
    stream = iter(Batches(corpora, SPELLING, PLAIN))
    last = -1
    for _ in range(10):
        next(stream)
        numbers = [drawn.number for drawn in stream._waiting]
        assert numbers == sorted(numbers) and len(numbers) == WAITING and numbers[0] > last
        last = numbers[0]


def test_a_list_that_cannot_be_written_is_refused_before_anything_is_read(corpora, tmp_path):
    with pytest.raises(OSError, match="cannot write"):
        Batches(corpora, SPELLING, BatchConfig(rows=1, width=64, broken=str(tmp_path)))


def test_paths_are_plain(tmp_path):
    captioned(tmp_path / "odd [name]" / "0.tar", 2)
    assert len(keys(Samples(str(tmp_path / "odd [name]" / "0.tar")))) == 2
    assert Path(next(iter(Samples(str(tmp_path / "odd [name]" / "0.tar")))).source).name == "0.tar"


# -- training ---------------------------------------------------------------------------------------------------------


def test_a_stage_trains_on_batches_of_real_corpora_as_on_drawn_ones(tmp_path):
    """The tiny model's own tokenizer and sizes; gradients reach the flow from pictures and words of two corpora."""
    from model_cases import tiny_components
    from starflow2.training.config import StageConfig
    from starflow2.training.tasks import JointTask

    captioned(tmp_path / "a" / "0.tar", 8)
    url, _ = PUBLISHED["zebra-cot"](tmp_path / "b")
    components = tiny_components()
    sources = [
        Source(corpus="captions", url=str(tmp_path / "a"), weight=1),
        Source(corpus="zebra-cot", url=url, weight=1),
    ]
    spelling = Spelling(components.tokenizer, components.layout, components.cfg.fae.image_size)
    images, batch = next(iter(Batches(sources, spelling, BatchConfig(rows=2, width=512))))
    assert images.shape[1:] == (3, 64, 64) and len(images) == len(batch.pictures) > 3
    task = JointTask(components, StageConfig(name="joint", steps=1, batch=1), seed=0)
    loss, _ = task.loss((images, batch), torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.isfinite()
    gradient = components.flow.deep.head.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": 0},
        {"width": 1.5},
        {"seed": b"3"},
        {"block": 0},
        {"documents": -1},
        {"caption_drop": 2.0},
        {"broken": 3},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_of_batches_that_mean_nothing_are_refused_by_name(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"^{name} is "):
        replace(PLAIN, **wrong)  # type: ignore[arg-type]
