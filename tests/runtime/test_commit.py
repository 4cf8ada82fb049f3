import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu_compile.runtime.commit import (
    CommitReport,
    WeightCommit,
    amnesty_mask,
    compare_masks,
)

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


# -- the report --------------------------------------------------------------------------------
def test_counts_of_a_change():
    old = torch.tensor([True, True, False, False])
    new = torch.tensor([True, False, True, False])
    row = compare_masks(old, new)
    assert row == WeightCommit(total=4, kept=1, resurrected=1, lost=1)
    assert row.active == 2
    assert row.churn == 0.5
    assert row.jaccard == pytest.approx(1 / 3)


def test_an_empty_weight_has_no_churn():
    row = WeightCommit(total=3, kept=0, resurrected=0, lost=0)
    assert row.churn == 0.0
    assert row.jaccard == 1.0


def test_totals_data_and_table():
    report = CommitReport(
        "amnesty", {"a": WeightCommit(10, 3, 1, 2), "b": WeightCommit(20, 5, 2, 2)}
    )
    assert (report.total, report.kept, report.resurrected, report.lost) == (30, 8, 3, 4)
    assert report.active == 11
    data = report.as_dict()
    assert data["strategy"] == "amnesty"
    assert data["weights"]["b"]["active"] == 7
    assert data["weights"]["total"]["resurrected"] == 3
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "weight",
        "entries",
        "active",
        "kept",
        "resurrected",
        "lost",
        "churn",
    ]
    assert lines[-1].split()[:6] == ["total", "30", "11", "8", "3", "4"]
