"""Tournaments against their plain meaning in Python, and by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu_compile.errors import ArgumentError
from resu_compile.runtime.commit_report import compare_masks
from resu_compile.runtime.tournament import (
    amnesty_mask,
    ceiling_mask,
    linear_budget,
    linear_margin,
    linear_ramp,
)
from resu_compile.sparsity import topk_mask

INF = float("inf")
VALUES = st.sampled_from([0.0, 1.0, 1.0, 2.0, 3.0, -1.0, INF, -INF])


@st.composite
def tournaments(draw):
    numel = draw(st.integers(1, 30))
    score = draw(st.lists(VALUES, min_size=numel, max_size=numel))
    mask = draw(st.lists(st.booleans(), min_size=numel, max_size=numel))
    n_keep = draw(st.integers(0, numel))
    n_resurrected = draw(st.integers(0, n_keep))
    return score, mask, n_keep, n_resurrected


def by_sorting(score, mask, n_keep, n_resurrected):
    """The tournament in plain Python."""

    def best(group):
        return sorted(group, key=lambda i: (-max(score[i], -3.5e38), i))

    active = best([i for i in range(len(score)) if mask[i]])
    pruned = best([i for i in range(len(score)) if not mask[i]])
    from_pruned = min(n_resurrected, len(pruned))
    from_active = min(n_keep - from_pruned, len(active))
    winners = set(active[:from_active]) | set(pruned[: n_keep - from_active])
    return [i in winners for i in range(len(score))]


@given(tournaments())
@settings(max_examples=300, deadline=None)
def test_the_tournament_equals_its_plain_meaning(case):
    score, mask, n_keep, n_resurrected = case
    found = amnesty_mask(torch.tensor(score), torch.tensor(mask), n_keep, n_resurrected)
    assert int(found.sum()) == n_keep
    assert found.tolist() == by_sorting(score, mask, n_keep, n_resurrected)


@given(st.integers(1, 400), st.floats(0, 0.999), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_counts_of_an_all_equal_weight(numel, sparsity, budget):
    n_keep = int((1 - sparsity) * numel)
    n_resurrected = int(budget * n_keep)
    mask = torch.arange(numel) < n_keep
    found = amnesty_mask(torch.ones(numel), mask, n_keep, n_resurrected)
    change = compare_masks(mask, found)
    from_pruned = min(n_resurrected, numel - n_keep)
    assert (change.active, change.resurrected) == (n_keep, from_pruned)
    assert found.tolist() == [
        i < n_keep - from_pruned or n_keep <= i < n_keep + from_pruned for i in range(numel)
    ]


def test_a_table_by_hand():
    #                      active             pruned
    score = torch.tensor([5.0, 1.0, 4.0, 2.0, 9.0, 0.5, 8.0, 0.1])
    mask = torch.tensor([True] * 4 + [False] * 4)
    assert amnesty_mask(score, mask, 4, 0).tolist() == mask.tolist()
    # one place reserved: the weakest active leaves for the best of the pruned
    assert amnesty_mask(score, mask, 4, 1).nonzero().flatten().tolist() == [0, 2, 3, 4]
    assert amnesty_mask(score, mask, 4, 4).nonzero().flatten().tolist() == [4, 5, 6, 7]
    # growing: the active cannot fill 6 - 1 places, the pruned take the rest
    assert amnesty_mask(score, mask, 6, 1).nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 6]


def test_a_weight_without_pruned_places_keeps_all():
    mask = torch.ones(5, dtype=torch.bool)
    assert amnesty_mask(torch.zeros(5), mask, 5, 3).all()


# -- the ceiling -------------------------------------------------------------------------------
@st.composite
def contests(draw):
    numel = draw(st.integers(1, 30))
    values = st.one_of(st.sampled_from([0.0, 1.0, 1.125, 1.5, 2.0]), st.floats(0, 4, width=32))
    score = draw(st.lists(values, min_size=numel, max_size=numel))
    mask = draw(st.lists(st.booleans(), min_size=numel, max_size=numel))
    n_keep = draw(st.integers(0, numel))
    n_resurrected = draw(st.integers(0, n_keep))
    margin = draw(st.sampled_from([0.0, 0.1, 0.125, 0.5, 3.0]))
    return score, mask, n_keep, n_resurrected, margin


def ceiling_by_sorting(score, mask, n_keep, n_resurrected, margin):
    """One exchange after another, in plain Python."""
    best = sorted(range(len(score)), key=lambda i: (-score[i], i))
    active = [i for i in best if mask[i]]
    pruned = [i for i in best if not mask[i]]
    holders = active[:n_keep]
    back = [pruned.pop(0) for _ in range(n_keep - len(holders))]
    factor = 1.0 + margin
    while pruned and holders and len(back) < n_resurrected:
        if not score[pruned[0]] > float(torch.tensor(score[holders[-1]]) * factor):
            break
        holders.pop()
        back.append(pruned.pop(0))
    return [i in set(holders + back) for i in range(len(score))]


@given(contests())
@settings(max_examples=400, deadline=None)
def test_the_ceiling_equals_one_exchange_after_another(case):
    score, mask, n_keep, n_resurrected, margin = case
    found = ceiling_mask(torch.tensor(score), torch.tensor(mask), n_keep, n_resurrected, margin)
    assert int(found.sum()) == n_keep
    assert found.tolist() == ceiling_by_sorting(score, mask, n_keep, n_resurrected, margin)


@given(contests())
@settings(max_examples=300, deadline=None)
def test_the_ceiling_lets_nobody_through_who_does_not_beat_the_margin(case):
    score, mask, _, n_resurrected, margin = case
    score, mask = torch.tensor(score), torch.tensor(mask)
    found = ceiling_mask(score, mask, int(mask.sum()), n_resurrected, margin)
    back, lost = found & ~mask, mask & ~found
    assert int(back.sum()) == int(lost.sum()) <= n_resurrected
    if back.any():
        assert score[back].min() > score[lost].max() * (1.0 + margin)


@given(contests())
@settings(max_examples=300, deadline=None)
def test_a_ceiling_without_margin_or_limit_is_the_plain_choice(case):
    score, mask, n_keep, _, _ = case
    score, mask = torch.tensor(score), torch.tensor(mask)
    found = ceiling_mask(score, mask, n_keep, n_keep, 0.0)
    plain = topk_mask(score, n_keep)
    assert score[found].sort().values.tolist() == score[plain].sort().values.tolist()


@given(contests())
@settings(max_examples=100, deadline=None)
def test_a_ceiling_never_brings_back_more_than_a_quota(case):
    score, mask, n_keep, n_resurrected, margin = case
    score, mask = torch.tensor(score), torch.tensor(mask)
    found = ceiling_mask(score, mask, n_keep, n_resurrected, margin)
    quota = amnesty_mask(score, mask, n_keep, n_resurrected)
    assert not (found & ~mask & ~quota).any()


def test_a_ceiling_by_hand():
    #                      active             pruned
    score = torch.tensor([5.0, 1.0, 4.0, 2.0, 9.0, 0.5, 2.5, 0.1])
    mask = torch.tensor([True] * 4 + [False] * 4)

    def winners(n_keep, n_resurrected, margin):
        return ceiling_mask(score, mask, n_keep, n_resurrected, margin).nonzero().flatten().tolist()

    # 9 beats 1 and 2.5 beats 2, but 0.5 does not beat 4: two of four may pass
    assert winners(4, 4, 0.0) == [0, 2, 4, 6]
    assert winners(4, 1, 0.0) == [0, 2, 3, 4]
    assert winners(4, 0, 0.0) == [0, 1, 2, 3]
    # 2.5 has to be over 1.25 * 2, and is not
    assert winners(4, 4, 0.25) == [0, 2, 3, 4]
    assert winners(4, 4, 8.0) == [0, 1, 2, 3]  # nor is 9 over 9 * 1
    # fewer places: 1 and 2 leave first, then 9 beats 4, but 2.5 does not beat 5
    assert winners(2, 2, 0.0) == [0, 4]
    # more places: 9 and 2.5 fill them; the next, 0.5, beats nobody
    assert winners(6, 6, 0.0) == [0, 1, 2, 3, 4, 6]


def test_equal_scores_change_nothing_under_a_ceiling():
    mask = torch.tensor([False, True, True, False])
    assert ceiling_mask(torch.ones(4), mask, 2, 2).tolist() == mask.tolist()


def test_a_ceiling_without_anybody_to_let_through():
    full = torch.ones(5, dtype=torch.bool)
    assert ceiling_mask(torch.zeros(5), full, 5, 3).all()
    assert ceiling_mask(torch.rand(5), ~full, 2, 2).sum() == 2


# -- ramps -------------------------------------------------------------------------------------
def test_a_ramp_ends_in_the_last_cycle():
    assert [linear_ramp(c, 5, 0.1, 0.02) for c in range(5)] == pytest.approx(
        [0.1, 0.08, 0.06, 0.04, 0.02]
    )
    assert linear_budget(4, 5) == 0.02
    assert linear_budget(0, 5) == 0.10
    assert linear_margin(2, 3, 0.5) == 0.0
    assert linear_margin(1, 3, 0.5) == 0.25
    assert linear_ramp(0, 1, 0.3, 0.1) == 0.1


@pytest.mark.parametrize(("cycle", "cycles", "named"), [(0, 0, "cycles"), (3, 3, "cycle")])
def test_a_cycle_out_of_range(cycle, cycles, named):
    with pytest.raises(ArgumentError, match=f"^{named}: expected"):
        linear_budget(cycle, cycles)
    with pytest.raises(ArgumentError, match="^cycle: expected"):
        linear_ramp(-1, 2, 1.0, 0.0)
