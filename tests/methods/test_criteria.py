import pytest
import torch

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.methods.criteria import (
    CRITERIA,
    ByWeightAndGradient,
    Criterion,
    Places,
    get_criterion,
    scored,
)


def places(**changes):
    values = {
        "name": "w",
        "weight": torch.tensor([3.0, -2.0, 0.0, 1.0]),
        "mask": torch.tensor([True, True, False, True]),
        "generator": torch.Generator().manual_seed(0),
        "gradient": torch.tensor([0.5, 1.0, -4.0, 0.0]),
        "mean": torch.tensor([0.0, -1.0, 2.0, 0.5]),
        "square": torch.tensor([1.0, 4.0, 0.25, 0.0]),
    }
    return Places(**{**values, **changes})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("magnitude", [3.0, 2.0, 0.0, 1.0]),
        ("gradient", [0.5, 1.0, 4.0, 0.0]),
        ("taylor", [1.5, 2.0, 0.0, 0.0]),
        ("weight_and_gradient", [3.5, 3.0, 4.0, 1.0]),
        ("momentum", [0.0, 1.0, 2.0, 0.5]),
        ("adam_momentum", [0.0, 0.5, 4.0, 0.5e8]),
        ("saliency", [3.0, 2.0 * 4.0**0.25, 0.0, 0.0]),
    ],
)
def test_scores_of_a_table(name, expected):
    torch.testing.assert_close(scored(get_criterion(name), places()), torch.tensor(expected))


def test_the_coefficient_of_the_gradient():
    assert scored(ByWeightAndGradient(0.5), places()).tolist() == [3.25, 2.5, 2.0, 1.0]
    with pytest.raises(ArgumentError, match="^coefficient: expected"):
        ByWeightAndGradient(-1.0)


def test_random_draws_from_the_generator_alone():
    first, second = (scored(get_criterion("random"), places()) for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(99)
    assert torch.equal(first, scored(get_criterion("random"), places()))
    assert len(set(first.tolist())) == 4


def test_half_precision_is_scored_in_float32():
    half = places(weight=torch.tensor([3e-3] * 4).half(), gradient=torch.tensor([2e-4] * 4).half())
    found = scored(get_criterion("taylor"), half)
    assert found.dtype is torch.float32
    assert found.min() > 0.0  # in float16 the product would be rounded away
    assert scored(get_criterion("magnitude"), half).dtype is torch.float32


@pytest.mark.parametrize("name", [n for n, c in CRITERIA.items() if c.needs != "nothing"])
def test_what_is_not_known_is_named(name):
    bare = places(gradient=None, mean=None, square=None)
    with pytest.raises(ArgumentError, match="of w to be known, got None.*after_backward"):
        scored(get_criterion(name), bare)


def test_what_is_no_criterion():
    with pytest.raises(ArgumentError, match="^grow: expected one of adam_momentum, gradient"):
        get_criterion("gradients", name="grow")
    with pytest.raises(ArgumentError, match="^criterion: expected one of"):
        get_criterion(3)
    with pytest.raises(ArgumentTypeError, match="^coefficient"):
        ByWeightAndGradient("1")


class Broken:
    needs = "nothing"

    def __init__(self, value):
        self.value = value

    def score(self, _places):
        return self.value


@pytest.mark.parametrize("value", [torch.zeros(3), torch.full((4,), torch.nan)])
def test_a_wrong_score_names_who_made_it(value):
    assert isinstance(Broken(value), Criterion)
    with pytest.raises(ArgumentError, match=r"shape \(4,\) without NaN from Broken for w"):
        scored(get_criterion(Broken(value)), places())
