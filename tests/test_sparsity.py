import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu_compile.errors import ArgumentError
from resu_compile.sparsity import global_topk_masks, keep_count, only_at, topk_mask

INF = float("inf")
# few different values, so that ties are the rule
SCORES = st.lists(
    st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, 1e-30, 3.4e38, INF, -INF]), min_size=1, max_size=40
)


def by_sorting(score, k, first=None):
    """The meaning of ``topk_mask``: a stable sort, best first."""
    first = first if first is not None else [True] * len(score)
    order = sorted(range(len(score)), key=lambda i: (not first[i], -score[i], i))
    kept = set(order[:k])
    return [i in kept for i in range(len(score))]


@given(SCORES, st.data())
@settings(max_examples=200, deadline=None)
def test_topk_equals_a_stable_sort(values, data):
    k = data.draw(st.integers(0, len(values)))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        score = torch.tensor(values, dtype=dtype)
        assert topk_mask(score, k).tolist() == by_sorting(score.tolist(), k)


@given(SCORES.filter(lambda v: -INF not in v), st.data())
@settings(max_examples=100, deadline=None)
def test_first_places_come_before_all_others(values, data):
    k = data.draw(st.integers(0, len(values)))
    first = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    mask = topk_mask(torch.tensor(values), k, torch.tensor(first))
    assert mask.tolist() == by_sorting(values, k, first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (3, 5), (2, 3, 4), (9,)])
def test_ties_fall_to_the_lower_index(shape, dtype):
    score = torch.full(shape, 0.25, dtype=dtype)
    for k in range(score.numel() + 1):
        mask = topk_mask(score, k)
        assert mask.shape == score.shape
        assert mask.dtype == torch.bool
        assert mask.flatten().tolist() == [i < k for i in range(score.numel())]


def test_topk_of_a_transposed_score_counts_in_its_own_rows():
    score = torch.ones(3, 4).t()
    assert topk_mask(score, 5).flatten().tolist() == [True] * 5 + [False] * 7


def test_neighbouring_floats_are_told_apart():
    one = torch.tensor(1.0, dtype=torch.float64)
    score = torch.stack([one, torch.nextafter(one, one + 1)])
    assert topk_mask(score, 1).tolist() == [False, True]


@pytest.mark.parametrize("k", [-1, 4])
def test_k_out_of_range(k):
    with pytest.raises(ArgumentError, match=rf"^k: expected an integer in \[0, 3\], got {k}$"):
        topk_mask(torch.ones(3), k)


@pytest.mark.parametrize("numel", [1, 3, 10, 64, 1000, 2**31])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.7, 0.9, 0.999])
def test_keep_count_is_the_formula(numel, sparsity):
    assert keep_count(numel, sparsity) == int((1 - sparsity) * numel)


def test_minus_infinity_still_ranks_above_what_is_out():
    score = torch.tensor([-INF, 1.0, -INF, 5.0])
    places = torch.tensor([True, True, True, False])
    assert topk_mask(only_at(score, places), 3).tolist() == [True, True, True, False]


# -- over several weights ----------------------------------------------------------------------
@given(
    st.lists(SCORES, min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(0, 1),
    st.booleans(),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_global_total_is_exact_and_floors_hold(scores, density, floor, with_first, data):
    tensors = {f"w{i}": torch.tensor(values) for i, values in enumerate(scores)}
    total = int(density * sum(t.numel() for t in tensors.values()))
    floors = {name: int(floor * t.numel()) for name, t in tensors.items()}
    first = None
    if with_first:
        first = {
            name: torch.tensor(
                data.draw(st.lists(st.booleans(), min_size=t.numel(), max_size=t.numel()))
            )
            for name, t in tensors.items()
        }
    masks = global_topk_masks(tensors, total, floors, first)
    assert sum(int(m.sum()) for m in masks.values()) == max(total, sum(floors.values()))
    for name, mask in masks.items():
        assert int(mask.sum()) >= floors[name]
        assert mask.shape == tensors[name].shape


@given(st.lists(SCORES, min_size=2, max_size=4), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_global_without_floors_is_one_ranking(scores, density):
    tensors = {f"w{i}": torch.tensor(values) for i, values in enumerate(scores)}
    flat = [value for values in scores for value in values]
    total = int(density * len(flat))
    masks = global_topk_masks(tensors, total, dict.fromkeys(tensors, 0))
    joined = [bit for mask in masks.values() for bit in mask.tolist()]
    expected = by_sorting(
        [max(value, -3.5e38) if value == -INF else value for value in flat], total
    )
    assert joined == expected


def test_global_keeps_float64_differences():
    tiny = torch.nextafter(torch.ones((), dtype=torch.float64), torch.tensor(2.0).double())
    masks = global_topk_masks({"a": torch.ones(1), "b": tiny[None]}, 1, {"a": 0, "b": 0})
    assert masks["b"].item()
    assert not masks["a"].item()
