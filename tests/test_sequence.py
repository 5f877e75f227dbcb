"""Rows and positions: padding moves nothing, grids count as they should, groups are a partition."""

from __future__ import annotations

import itertools

import pytest
import torch

from starflow2.sequence import image_mrope, length_groups, pad_rows, text_mrope

ROWS = [[7, 8, 9, 10], [5], [6, 7]]


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


def test_a_picture_stands_still_in_time_counts_rows_and_columns_and_text_goes_on_behind_its_longer_side():
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
    assert len(length_groups([7] * 64, 64)) == 1
    assert len(length_groups([6] * 32 + [90] * 32, 64)) == 2
