import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu_compile.comparison import (
    Pattern,
    RowLayout,
    check_divisible,
    highest_kept,
    lowest_pruned,
    parse_pattern,
    pattern_mask,
    row_mask,
)
from resu_compile.errors import ArgumentError

LAYOUTS = [
    RowLayout((5, 8), (1,)),
    RowLayout((8, 5), (0,)),
    RowLayout((3, 8, 2, 3), (1, 2, 3), kernel=True),
    RowLayout((3, 5, 8), (2,)),
    RowLayout((3, 8, 5), (1,)),
]


# -- patterns as text ----------------------------------------------------------------------------
def test_a_pattern_reads_as_it_is_written():
    assert parse_pattern("2:4") == Pattern(2, 4)
    assert str(Pattern(1, 16)) == "1:16"
    assert Pattern(1, 4).sparsity == 0.75


@pytest.mark.parametrize("text", ["", "2", "2:4:8", "a:b", "-1:4", "2 : 4", "٢:٤", 2, None, (2, 4)])
def test_what_is_no_pattern(text):
    with pytest.raises(ArgumentError, match="^pattern: expected 'N:M' such as '2:4'"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["4:4", "5:4", "0:4", "0:1", "1:1"])
def test_a_pattern_keeps_some_and_prunes_some(text):
    with pytest.raises(ArgumentError, match="^pattern: expected"):
        parse_pattern(text)


# -- rows ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout.shape))
@pytest.mark.parametrize("last", [False, True])
def test_rows_and_back(layout, last):
    weight = torch.randn(layout.shape)
    rows = layout.to_rows(weight, channels_last=last)
    assert rows.shape == (weight.numel() // layout.in_features, layout.in_features)
    assert torch.equal(layout.from_rows(rows, channels_last=last), weight)


def test_rows_of_a_kernel_are_in_its_own_order_or_by_place():
    weight = torch.arange(12).view(1, 3, 4)
    layout = RowLayout((1, 3, 4), (1, 2), kernel=True)
    assert layout.to_rows(weight)[0].tolist() == list(range(12))
    by_place = layout.to_rows(weight, channels_last=True)[0].tolist()
    assert by_place == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


def test_ties_fall_as_the_name_says():
    equal = torch.zeros(2, 4)
    assert lowest_pruned(equal, 1).tolist() == [[False, True, True, True]] * 2
    assert highest_kept(equal, 1).tolist() == [[True, False, False, False]] * 2


@given(st.sampled_from(LAYOUTS), st.floats(0, 0.999), st.booleans())
@settings(max_examples=60, deadline=None)
def test_each_row_loses_as_many(layout, sparsity, equal):
    score = torch.ones(layout.shape) if equal else torch.rand(layout.shape)
    rows = layout.to_rows(row_mask(score, layout, sparsity))
    assert ((~rows).sum(1) == int(layout.in_features * sparsity)).all()
    ranked = layout.to_rows(score)
    for row, mask in zip(ranked, rows, strict=True):
        if 0 < int(mask.sum()) < len(mask):
            assert row[mask].min() >= row[~mask].max()


@given(st.sampled_from(LAYOUTS), st.sampled_from(["1:2", "2:4", "1:4", "5:8"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_each_group_keeps_as_many(layout, text, lower):
    pattern = parse_pattern(text)
    score = torch.rand(layout.shape)
    mask = pattern_mask(score, layout, pattern, keep_lower=lower)
    kept = layout.to_rows(mask, channels_last=True).reshape(-1, pattern.group)
    ranked = layout.to_rows(score, channels_last=True).reshape(-1, pattern.group)
    assert (kept.sum(1) == pattern.keep).all()
    lowest_kept = ranked.masked_fill(~kept, 2.0).min(1).values
    assert (lowest_kept >= ranked.masked_fill(kept, -1.0).max(1).values).all()


def test_active_places_stay_whatever_they_score():
    layout = RowLayout((1, 4), (1,))
    score = torch.tensor([[0.0, 9.0, 1.0, 8.0]])
    active = torch.tensor([[True, False, True, False]])
    assert row_mask(score, layout, 0.5, active).tolist() == active.tolist()
    assert row_mask(score, layout, 0.25, active).tolist() == [[True, True, True, False]]
    for lower in (False, True):
        for keep, expected in ((2, active), (3, row_mask(score, layout, 0.25, active))):
            found = pattern_mask(score, layout, Pattern(keep, 4), active, keep_lower=lower)
            assert torch.equal(found, expected)


def test_a_group_has_to_divide_the_inputs():
    check_divisible("w", RowLayout((3, 8), (1,)), Pattern(2, 4))
    check_divisible("w", RowLayout((3, 4, 3), (1, 2), kernel=True), Pattern(2, 4))
    with pytest.raises(ArgumentError, match="^pattern: expected inputs divisible by 4 .* has 6"):
        check_divisible("w", RowLayout((8, 6), (1,)), Pattern(2, 4))
    with pytest.raises(ArgumentError, match="expected input channels divisible by 4 .* has 3"):
        check_divisible("w", RowLayout((8, 3, 4), (1, 2), kernel=True), Pattern(2, 4))
