"""The tournament under a pattern against its plain meaning in Python, and by hand."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu_compile.comparison import Pattern, RowLayout
from resu_compile.runtime.group_tournament import group_tournament, pattern_tournament
from resu_compile.runtime.tournament import amnesty_mask, ceiling_mask

VALUES = st.sampled_from([0.0, 0.5, 1.0, 1.0, 1.25, 2.0, 3.0])


@st.composite
def contests(draw, groups=6, exact=False):
    size = draw(st.integers(2, 6))
    keep = draw(st.integers(1, size - 1))
    n_groups = draw(st.integers(1, groups))
    row = st.lists(VALUES, min_size=size, max_size=size)
    score = draw(st.lists(row, min_size=n_groups, max_size=n_groups))
    if exact:
        places = st.permutations([i < keep for i in range(size)])
    else:
        places = st.lists(st.booleans(), min_size=size, max_size=size)
    mask = draw(st.lists(places, min_size=n_groups, max_size=n_groups))
    n_resurrected = draw(st.integers(0, n_groups * keep))
    margin = draw(st.sampled_from([None, 0.0, 0.25, 1.0]))
    return score, mask, keep, n_resurrected, margin


def one_after_another(score, mask, keep, n_resurrected, margin):
    """One exchange after another, always the one of the highest gain, in plain Python."""
    lists = []
    budget = n_resurrected
    for row, active in zip(score, mask, strict=True):
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))
        inside = [i for i in best if active[i]][:keep]
        outside = [i for i in best if not active[i]]
        back = [outside.pop(0) for _ in range(keep - len(inside))]
        budget -= len(back)
        lists.append((inside, outside, back))
    while budget > 0:
        gains = []
        for g, (inside, outside, _) in enumerate(lists):
            if inside and outside:
                new, old = score[g][outside[0]], score[g][inside[-1]]
                if margin is None or new > old * (1.0 + margin):
                    gains.append((old - new, g))
        if not gains:
            break
        inside, outside, back = lists[min(gains)[1]]
        inside.pop()
        back.append(outside.pop(0))
        budget -= 1
    return [
        [i in inside + back for i in range(len(row))]
        for row, (inside, _, back) in zip(score, lists, strict=True)
    ]


def run(score, mask, keep, n_resurrected, margin):
    return group_tournament(
        torch.tensor(score),
        torch.tensor(mask),
        keep,
        n_resurrected,
        ceiling=margin is not None,
        margin=margin or 0.0,
    )


@given(contests())
@settings(max_examples=300, deadline=None)
def test_equals_one_exchange_after_another(case):
    assert run(*case).tolist() == one_after_another(*case)


@given(contests(exact=True))
@settings(max_examples=200, deadline=None)
def test_the_pattern_and_the_budget_hold(case):
    score, mask, keep, n_resurrected, margin = case
    score, mask, found = torch.tensor(score), torch.tensor(mask), run(*case)
    back = found & ~mask
    assert (found.sum(1) == keep).all()
    most = min(n_resurrected, len(mask) * min(keep, mask.shape[1] - keep))
    assert int(back.sum()) == most or (margin is not None and int(back.sum()) < most)
    for row, here, left in zip(score, back, mask & ~found, strict=True):
        if margin is not None and here.any():
            assert row[here].min() > row[left].max() * (1.0 + margin)


@given(contests(groups=1))
@settings(max_examples=200, deadline=None)
def test_one_group_is_the_plain_tournament(case):
    score, mask, keep, n_resurrected, margin = case
    plain_score, plain_mask = torch.tensor(score[0]), torch.tensor(mask[0])
    if margin is None:
        plain = amnesty_mask(plain_score, plain_mask, keep, n_resurrected)
    else:
        plain = ceiling_mask(plain_score, plain_mask, keep, n_resurrected, margin)
    assert run(*case)[0].tolist() == plain.tolist()


@given(contests(groups=2, exact=True))
@settings(max_examples=60, deadline=None)
def test_no_mask_of_the_pattern_with_as_many_back_scores_more(case):
    score, mask, keep, n_resurrected, _ = case
    case = (*case[:4], None)
    found = run(*case)
    score, mask = torch.tensor(score), torch.tensor(mask)
    size, n_back = mask.shape[1], int((found & ~mask).sum())
    rows = [
        torch.tensor([i in c for i in range(size)])
        for c in itertools.combinations(range(size), keep)
    ]
    for choice in itertools.product(rows, repeat=len(mask)):
        other = torch.stack(choice)
        if int((other & ~mask).sum()) == n_back:
            assert score[found].sum() >= score[other].sum()


def test_a_table_by_hand():
    score = torch.tensor([[5.0, 4.0, 9.0, 1.0], [3.0, 3.0, 4.0, 3.5], [1.0, 8.0, 0.0, 0.5]])
    mask = torch.tensor([[True, True, False, False]] * 3)

    def kept(n_resurrected, **terms):
        return group_tournament(score, mask, 2, n_resurrected, **terms).nonzero()[:, 1].tolist()

    assert kept(0) == [0, 1, 0, 1, 0, 1]
    assert kept(1) == [0, 2, 0, 1, 0, 1]  # 9 for 4: a gain of 5
    assert kept(2) == [0, 2, 0, 2, 0, 1]  # 4 for the later of two 3
    assert kept(3) == [0, 2, 2, 3, 0, 1]  # 3.5 for 3
    assert kept(4) == [0, 2, 2, 3, 1, 3]  # 0.5 for 1: a quota is paid
    assert kept(4, ceiling=True) == [0, 2, 2, 3, 0, 1]
    assert kept(4, ceiling=True, margin=0.25) == [0, 2, 0, 2, 0, 1]
    assert kept(99) == [2, 3] * 3


def test_of_equal_gains_the_lower_group_comes_first():
    mask = torch.tensor([[True, False]] * 5)
    found = group_tournament(torch.ones(5, 2), mask, 1, 2)
    assert found.nonzero()[:, 1].tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("layout", "group_of"),
    [
        (RowLayout((6, 8), (1,)), lambda m: m.reshape(-1, 4)),
        (RowLayout((8, 6), (0,)), lambda m: m.t().reshape(-1, 4)),
        (
            RowLayout((3, 8, 2, 2), (1, 2, 3), kernel=True),
            lambda m: m.movedim(1, -1).reshape(-1, 4),
        ),
    ],
    ids=["linear", "[in, out]", "convolution"],
)
def test_groups_lie_along_the_input_of_the_layer(layout, group_of):
    rank = torch.rand(layout.shape).movedim(layout.input_dims[0], -1).reshape(-1, 4).argsort(-1)
    moved = torch.rand(layout.shape).movedim(layout.input_dims[0], -1)
    mask = (rank < 2).reshape(moved.shape).movedim(-1, layout.input_dims[0])
    score = torch.rand(layout.shape)
    found = pattern_tournament(score, mask, layout, Pattern(2, 4), 7)
    assert (group_of(found).sum(1) == 2).all()
    assert int((found & ~mask).sum()) == 7
    plain = group_tournament(group_of(score), group_of(mask), 2, 7)
    assert torch.equal(group_of(found), plain)
