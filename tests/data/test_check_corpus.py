"""`starflow2 data check`: its counts, its messages and its exit status."""

from __future__ import annotations

import json
from typing import get_args, get_type_hints

import numpy as np
import pytest

from corpora_cases import LAYOUT, PUBLISHED, SIDE, Letters, captioned, encoded, write_tar
from starflow2.cli.app import main
from starflow2.cli.data import CORPUS, Data
from starflow2.data.check import check_corpus
from starflow2.data.corpora import CORPORA
from starflow2.data.mixture import Source, Spelling
from starflow2.data.shards import Format
from starflow2.errors import DataError

SPELLING = Spelling(Letters(), LAYOUT, SIDE)


def test_choices_of_the_command_are_those_of_the_library():
    assert get_args(get_type_hints(Data)["format"]) == get_args(Format)
    assert all(name in CORPUS for name in CORPORA)


@pytest.mark.parametrize("corpus", PUBLISHED)
def test_a_check_counts_what_the_published_fixture_holds(corpus, tmp_path):
    url, expected = PUBLISHED[corpus](tmp_path)
    pictures = str(tmp_path / "imgs") if corpus == "journeydb" else ""
    facts = check_corpus(Source(corpus=corpus, url=url, weight=1, pictures=pictures), SPELLING)
    parts = [part for _, turns in expected for user, reply in turns for part in (*user, *reply)]
    assert facts["samples"] == facts["documents"] == len(expected) and facts["broken"] == {}
    assert facts["pictures"] == sum(isinstance(part, int) for part in parts)
    assert facts["kinds"] == {expected[0][0]: len(expected)}


def test_lengths_are_percentiles_of_positions_and_of_words(tmp_path):
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.integers(1, 200, 100)]
    captioned(tmp_path / "0.tar", 100, words=lambda i: "x" * lengths[i])
    facts = check_corpus(Source(corpus="captions", url=str(tmp_path), weight=1), SPELLING)
    ordered = sorted(lengths)
    for name, extra in (("tokens", 3), ("positions", 9)):  # three marks of the turn; a picture has four latents and two
        assert facts[name]["max"] == ordered[-1] + extra
        assert facts[name]["p50"] in (ordered[49] + extra, ordered[50] + extra)
        assert facts[name]["p10"] in (ordered[9] + extra, ordered[10] + extra)
        assert facts[name]["p90"] in (ordered[89] + extra, ordered[90] + extra)


def test_reasons_come_with_their_count_and_three_examples(tmp_path):
    members = [(f"{i}.png", encoded(1)) for i in range(5)] + [("5.txt", b"x"), ("6.png", encoded(2)), ("6.txt", b"x")]
    write_tar(tmp_path / "0.tar", members)
    facts = check_corpus(Source(corpus="captions", url=str(tmp_path), weight=1), SPELLING)
    assert (facts["samples"], facts["documents"]) == (7, 1)
    assert list(facts["broken"]) == ["missing text", "missing picture"]
    assert facts["broken"]["missing text"]["count"] == 5
    assert [e["key"] for e in facts["broken"]["missing text"]["examples"]] == ["0", "1", "2"]
    assert facts["broken"]["missing picture"]["examples"][0]["source"].endswith("0.tar")


def test_the_command_prints_and_writes_the_counts_with_the_models_own_tokenizer(tmp_path, capsys):
    captioned(tmp_path / "data" / "0.tar", 6, words=lambda i: f"a picture of {i} hearts")
    out = tmp_path / "facts.json"
    assert main(["data", "check", str(tmp_path / "data"), "--limit", "4", "--json", str(out)]) == 0
    facts = json.loads(out.read_text())
    assert (facts["samples"], facts["documents"], facts["pictures"], facts["format"]) == (4, 4, 4, "tar")
    assert facts["positions"]["p50"] == facts["tokens"]["p50"] + 66  # nano: 8 x 8 latents, begin and end
    assert "draw 4" in capsys.readouterr().out


def test_a_mixture_file_is_checked_source_by_source_with_the_options_of_each(tmp_path, capsys):
    captioned(tmp_path / "a" / "0.tar", 3)
    write_tar(tmp_path / "b" / "0.tar", [("0.png", encoded(1))])
    sources = [{"corpus": "captions", "url": str(tmp_path / name), "weight": 1} for name in "ab"]
    sources[0]["task"] = "describe"
    (tmp_path / "mix.json").write_text(json.dumps(sources))
    out = tmp_path / "facts.json"
    assert main(["data", "check", str(tmp_path / "mix.json"), "--json", str(out)]) == 1
    first, second = json.loads(out.read_text())["sources"]
    assert (first["kinds"], second["documents"]) == ({"describe": 3}, 0)
    assert f"{tmp_path / 'b'} can be used" in " ".join(capsys.readouterr().err.split())
    assert main(["data", "check", str(tmp_path / "mix.json"), "--flatten", "white"]) == 2
    assert "--flatten is an option of one corpus" in capsys.readouterr().err


def test_a_corpus_with_nothing_to_use_ends_with_status_1_and_its_reasons(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [("\x1b[31m0.png", b"no picture"), ("\x1b[31m0.txt", b"words")])
    assert main(["data", "check", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "not a picture" in printed.out and "\x1b[31m" not in printed.out
    assert "none of the 1 samples" in " ".join(printed.err.split())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["gone/"], "there is no file to read at gone/"),
        (["."], "there is no file to read at ."),
        ([".", "--corpus", "cc12"], "expected captions, dialogue, cc12m"),
        ([".", "--flatten", "whiet"], "flatten is 'whiet'"),
        ([".", "--limit", "0"], "--limit is 0"),
        ([".", "--copus", "cc12m"], 'Did you mean "--corpus"'),
        ([".", "--model", "gone"], "there is no model"),
        (["warp://x/*.tar"], "cannot look at warp://x"),
    ],
)
def test_what_cannot_be_checked_is_refused_with_status_2(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "check", *argv]) == 2
    assert says in capsys.readouterr().err


def test_a_check_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="no file to read"):
        check_corpus(Source(corpus="captions", url=str(tmp_path), weight=1), SPELLING)
