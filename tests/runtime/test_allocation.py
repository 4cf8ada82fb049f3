import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resu_compile.config import SparsityConfig
from resu_compile.distributions import erk
from resu_compile.runtime.allocation import new_generator, new_masks
from resu_compile.selection import named_weights
from resu_compile.sparsity import keep_count


def weights(*shapes, fill=None):
    model = nn.ParameterList(
        [nn.Parameter(torch.randn(s) if fill is None else torch.full(s, fill)) for s in shapes]
    )
    return model, named_weights(model)


def masks(named, active=None, seed=0, **arguments):
    return new_masks(named, SparsityConfig(**arguments), new_generator(seed), active)


def counts(found):
    return [int(mask.sum()) for mask in found.values()]


SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


@given(SHAPES, st.floats(0, 0.999), st.booleans())
@settings(max_examples=60, deadline=None)
def test_layer_counts_are_exact(shapes, sparsity, equal):
    _, named = weights(*shapes, fill=1.0 if equal else None)
    assert counts(masks(named, sparsity=sparsity)) == [
        int((1 - sparsity) * w.parameter.numel()) for w in named
    ]


@given(SHAPES, st.floats(0, 0.999), st.floats(0, 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_global_total_is_exact_and_no_weight_dies(shapes, sparsity, min_density, equal):
    _, named = weights(*shapes, fill=1.0 if equal else None)
    found = masks(named, sparsity=sparsity, scope="global", min_density=min_density)
    total = sum(w.parameter.numel() for w in named)
    assert sum(counts(found)) == int((1 - sparsity) * total)
    floor = min(min_density, 1 - sparsity)
    for weight, count in zip(named, counts(found), strict=True):
        assert count >= int(floor * weight.parameter.numel())


def test_global_is_one_threshold():
    model, named = weights((20, 20), (20, 20))
    with torch.no_grad():
        model[1].mul_(10)
    found = masks(named, sparsity=0.5, scope="global")
    kept = torch.cat([w.parameter.abs()[found[w.name]] for w in named])
    lost = torch.cat([w.parameter.abs()[~found[w.name]] for w in named])
    assert kept.min() >= lost.max()
    assert counts(found)[1] > counts(found)[0]


def test_min_density_lifts_a_weight_that_would_die():
    model, named = weights((10, 10), (10, 10))
    with torch.no_grad():
        model[0].mul_(1e-6)
    assert counts(masks(named, sparsity=0.8, scope="global", min_density=0.0)) == [0, 40 - 1]
    assert counts(masks(named, sparsity=0.8, scope="global", min_density=0.1)) == [10, 29]


def test_overrides_are_taken_out_of_the_global_ranking():
    _, named = weights((10, 10), (10, 10), (10, 10))
    found = masks(named, sparsity=0.5, scope="global", overrides={"1": 0.9})
    assert counts(found)[1] == keep_count(100, 0.9)
    assert sum(counts(found)) == 100 + keep_count(100, 0.9)


def test_erk_follows_the_distribution():
    shapes = [(40, 40), (40, 10), (5, 5)]
    _, named = weights(*shapes)
    found = masks(named, sparsity=0.8, distribution="erk")
    expected = erk({w.name: tuple(w.parameter.shape) for w in named}, 0.8)
    assert counts(found) == [keep_count(w.parameter.numel(), expected[w.name]) for w in named]


# -- the active come first ---------------------------------------------------------------------
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_a_higher_sparsity_only_takes_away(scope, method):
    _, named = weights((10, 12), (7, 9))
    before = masks(named, sparsity=0.5, scope=scope, method=method)
    after = masks(named, before, seed=1, sparsity=0.8, scope=scope, method=method)
    for name in before:
        assert not (after[name] & ~before[name]).any()
    assert sum(counts(after)) == sum(counts(masks(named, sparsity=0.8, scope=scope)))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_lower_sparsity_only_gives_back(scope):
    _, named = weights((10, 12), (7, 9))
    before = masks(named, sparsity=0.8, scope=scope, method="random")
    after = masks(named, before, seed=1, sparsity=0.5, scope=scope, method="random")
    for name in before:
        assert not (before[name] & ~after[name]).any()
    # what comes back is drawn, not the first in line
    back = after["0"] & ~before["0"]
    assert not torch.equal(back, ~before["0"] & ((~before["0"]).cumsum(1) <= 1))
    assert sum(counts(after)) == sum(counts(masks(named, sparsity=0.5, scope=scope)))


@given(SHAPES, st.floats(0, 0.99), st.floats(0, 0.99), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_global_counts_are_exact_from_any_mask(shapes, first, second, min_density):
    _, named = weights(*shapes)
    before = masks(named, sparsity=first, scope="global", min_density=0.0)
    after = masks(named, before, sparsity=second, scope="global", min_density=min_density)
    total = sum(w.parameter.numel() for w in named)
    assert sum(counts(after)) == int((1 - second) * total)


def test_a_random_mask_does_not_depend_on_weights_drawn_with_the_same_seed():
    for seed in (0, 1, 1234):
        torch.manual_seed(seed)
        model = nn.ParameterList([nn.Parameter(torch.rand(100, 100))])
        mask = new_masks(
            named_weights(model), SparsityConfig(0.5, method="random"), new_generator(seed)
        )["0"]
        assert abs(model[0][mask].mean() - 0.5) < 0.02
