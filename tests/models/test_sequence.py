"""Documents, rows and positions: padding moves nothing, grids count as they should, labels are what comes next."""

from __future__ import annotations

import itertools

import pytest
import torch

from starflow2.errors import DataError
from starflow2.models.sequence import (
    IGNORE,
    Cursor,
    Document,
    Image,
    Layout,
    Text,
    image_mrope,
    length_groups,
    pack,
    pad_rows,
    text_mrope,
)

ROWS = [[7, 8, 9, 10], [5], [6, 7]]
LAYOUT = Layout(grid=(2, 3), begin=1, end=2, latent=3, pad=0)
STORY: Document = (
    Text((10, 11)), Image(), Text((12,), is_target=True), Image(is_target=True), Text((13, 14), is_target=True),
)  # fmt: skip
WORDS: Document = (Text((20, 21)), Text((22, 23), is_target=True))


def test_rows_are_padded_at_the_right_and_remember_their_lengths():
    rows = pad_rows(ROWS, pad=0)
    assert rows.ids.tolist() == [[7, 8, 9, 10], [5, 0, 0, 0], [6, 7, 0, 0]]
    assert rows.lengths.tolist() == [4, 1, 2] and rows.width == 4


def test_left_padding_puts_the_last_state_of_every_row_at_the_end_and_keeps_their_order():
    rows = pad_rows(ROWS, pad=0)
    states = torch.arange(12.0).view(3, 4, 1)
    moved = rows.left_padded(states)[..., 0]
    for row, length in enumerate(rows.lengths.tolist()):
        assert moved[row, 4 - length :].tolist() == states[row, :length, 0].tolist()
        assert rows.left_attend[row].tolist() == [False] * (4 - length) + [True] * length


def test_flow_positions_of_text_count_from_zero_at_the_first_real_token_of_each_row():
    rows = pad_rows(ROWS, pad=0)
    positions = rows.left_positions
    assert positions.shape == (3, 4, 3) and not positions[..., :2].any()
    for row, length in enumerate(rows.lengths.tolist()):
        assert positions[row, 4 - length :, 2].tolist() == list(range(length))
        assert (positions[row, : 4 - length, 2] < 0).all()


def test_text_counts_on_along_all_three_axes_from_where_it_starts():
    assert text_mrope(2, 3, start=5).tolist() == [[[5, 6, 7]] * 2] * 3


def test_an_image_keeps_one_time_counts_rows_and_columns_and_text_continues_after_its_longer_side():
    positions, after = image_mrope((2, 3), start=4)
    assert positions.tolist() == [[4] * 6, [4, 4, 4, 5, 5, 5], [4, 5, 6, 4, 5, 6]]
    assert after == 4 + 3


@pytest.mark.parametrize(
    "lengths",
    [[3], [5, 5, 5, 5], [4, 120, 5, 130, 6, 110, 4, 140], [9, 200], [1, 2, 3, 4, 5, 6, 7, 8] * 4, [80] * 31 + [6] * 33],
    ids=str,
)
def test_length_groups_hold_every_row_once_and_split_at_the_best_place_or_not_at_all(lengths):
    groups = length_groups(lengths, 64)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))

    def cost(rows: list[list[int]]) -> int:
        return sum(len(g) * (max(lengths[i] for i in g) + 64) for g in rows) + 256 * (len(rows) - 1)

    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    splits = [[order], *([order[:k], order[k:]] for k in range(1, len(order)))]
    assert cost(groups) == min(map(cost, splits))


def test_rows_of_one_length_stay_together_and_very_unequal_ones_do_not():
    assert length_groups([], 64) == []
    assert len(length_groups([7] * 64, 64)) == 1
    assert len(length_groups([6] * 32 + [90] * 32, 64)) == 2


# -- documents


def test_an_image_takes_a_begin_its_latents_and_an_end():
    assert LAYOUT.num_latents == 6
    assert LAYOUT.ids(Image()) == [1, 3, 3, 3, 3, 3, 3, 2] and LAYOUT.ids(Text((7, 8))) == [7, 8]


def test_labels_are_the_next_token_where_it_is_a_target_and_for_an_image_only_its_begin():
    batch = pack([STORY], LAYOUT)
    ids, labels = batch.ids[0].tolist(), batch.labels[0].tolist()
    assert ids == [10, 11, *LAYOUT.ids(Image()), 12, *LAYOUT.ids(Image()), 13, 14]
    targets = {i: label for i, label in enumerate(labels) if label != IGNORE}
    assert targets == {9: 12, 10: 1, 18: 13, 19: 14}
    assert all(ids[i + 1] == label for i, label in targets.items())


def test_images_have_their_position_whether_they_are_targets_and_the_image_before_in_their_document():
    pictures = pack([WORDS, STORY, [Image()], STORY], LAYOUT, 60).pictures
    assert len(pictures) == 5
    assert pictures.is_target.tolist() == [False, True, False, False, True]
    assert pictures.previous.tolist() == [-1, 0, -1, -1, 3], "pictures of other documents are nobody's past"
    batch = pack([WORDS, STORY, [Image()], STORY], LAYOUT, 60)
    for row, begin in zip(pictures.row.tolist(), pictures.begin.tolist(), strict=True):
        assert batch.ids[row, begin : begin + 8].tolist() == LAYOUT.ids(Image())


def test_both_kinds_of_positions_go_through_a_document_as_through_a_cursor():
    batch = pack([STORY], LAYOUT)
    rows, cols = [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]
    # text counts on; all latents of an image have one time, and text continues after its longer side
    expected = [0, 1, 2, *[3] * 6, 6, 7, 8, *[9] * 6, 12, 13, 14]
    assert batch.mrope[0, 0].tolist() == expected
    assert batch.mrope[1, 0, 3:9].tolist() == [3 + r for r in rows]
    assert batch.mrope[2, 0, 3:9].tolist() == [3 + c for c in cols]
    places = batch.places[0].tolist()
    # the flow's step counts slots outside of latents; a latent has that of its begin
    assert [p[2] for p in places] == [0, 1, 2, *[2] * 6, 3, 4, 5, *[5] * 6, 6, 7, 8]
    assert [p[:2] for p in places[3:9]] == [[r, c] for r, c in zip(rows, cols, strict=True)]
    assert all(p[:2] == [0, 0] for i, p in enumerate(places) if batch.ids[0, i] != 3)


@pytest.mark.parametrize("cuts", [(0, 6), (0, 1, 2, 3, 4, 5, 6), (0, 4, 6)], ids=["whole", "one by one", "in two"])
def test_a_cursor_gives_the_same_positions_step_by_step_as_at_once(cuts):
    cursor, pieces = Cursor((2, 3)), []
    pieces += [cursor.text(1) for _ in range(2)]
    pieces.append(cursor.text(1))
    pieces += [cursor.latents(a, b) for a, b in itertools.pairwise(cuts)]
    pieces += [cursor.text(2)]
    whole = pack([(Text((10, 11)), Image(), Text((12,)))], LAYOUT)
    assert torch.equal(torch.cat([mrope for mrope, _ in pieces], 1), whole.mrope[:, 0])
    assert torch.equal(torch.cat([places for _, places in pieces]), whole.places[0])


def test_a_document_is_packed_whole_and_with_the_positions_it_has_alone():
    documents = [WORDS, STORY, (Text((30,)),), WORDS]
    batch = pack(documents, LAYOUT, 30)
    for index, document in enumerate(documents):
        alone, mine = pack([document], LAYOUT), batch.document == index
        assert mine.any(1).sum() == 1, "a document is in one row"
        for name in ("ids", "labels", "places"):
            assert torch.equal(getattr(batch, name)[mine], getattr(alone, name)[0])
        assert torch.equal(batch.mrope[:, mine], alone.mrope[:, 0])


def test_documents_go_longest_first_into_the_first_row_with_room():
    batch = pack([WORDS, STORY, WORDS, (Text((30,) * 22),)], LAYOUT, 26)
    assert [sorted(set(row)) for row in batch.document.tolist()] == [[0, 3], [-1, 1, 2]]
    assert batch.ids.shape == (2, 26)


def test_padding_follows_the_last_document_and_has_no_labels():
    batch = pack([STORY, WORDS], LAYOUT)
    padding = batch.document < 0
    assert padding.sum() == batch.ids.shape[1] - 4
    assert (batch.ids[padding] == 0).all() and (batch.labels[padding] == IGNORE).all()


def test_a_position_attends_to_the_past_of_its_own_document_and_to_nothing_else():
    batch = pack([WORDS, STORY, WORDS], LAYOUT, 30)
    assert batch.mask is not None and batch.attend is batch.mask
    for row, document in enumerate(batch.document.tolist()):
        for q, k in itertools.product(range(len(document)), repeat=2):
            assert bool(batch.mask[row, q, k]) == (k <= q and document[q] == document[k])


def test_rows_of_one_document_each_need_no_mask_since_a_causal_model_does_not_see_padding():
    assert pack([STORY, WORDS], LAYOUT).attend is None
    assert pack([WORDS, WORDS], LAYOUT, 8).attend is not None


def test_the_mask_of_a_batch_is_built_once_and_without_reading_a_value_from_the_device():
    batch = pack([WORDS, STORY, WORDS], LAYOUT, 30)
    assert batch.attend is batch.attend
    elsewhere = batch.to("meta")  # where to read a value raises
    assert elsewhere.mask is not None and elsewhere.mask.shape == (1, 29, 29)
    assert pack([STORY, WORDS], LAYOUT).to("meta").attend is None


def test_what_cannot_be_packed_is_refused():
    for documents in ([], [WORDS, ()], [(Text(()),)]):
        with pytest.raises(DataError, match="at least one segment"):
            pack(documents, LAYOUT)
    with pytest.raises(DataError, match="has 21 positions; expected at most 20"):
        pack([WORDS, STORY], LAYOUT, 20)


def test_a_batch_moves_to_another_device_with_all_it_has():
    batch = pack([STORY], LAYOUT).to("meta")
    tensors = [getattr(batch, name) for name in ("ids", "labels", "document", "mrope", "places")]
    tensors += [getattr(batch.pictures, name) for name in ("row", "begin", "is_target", "previous")]
    assert {t.device.type for t in tensors} == {"meta"}
