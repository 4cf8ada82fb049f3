import math

import numpy as np
import pytest

from resu_compile.errors import (
    ArgumentError,
    ArgumentTypeError,
    MaskChangedError,
    NotSparsifiedError,
    PhaseError,
    ResuCompileError,
    WeightError,
    check_choice,
    check_known_keys,
    check_number,
    check_sparsity,
)


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 0.999, np.float32(0.5), math.nextafter(1.0, 0.0)])
def test_sparsity_is_a_python_float(value):
    checked = check_sparsity(value)
    assert type(checked) is float
    assert checked == value


@pytest.mark.parametrize("value", [1, 1.0, -0.1, 1.5, math.nan, math.inf, -math.inf])
def test_sparsity_out_of_range(value):
    with pytest.raises(
        ArgumentError, match=rf"^sparsity: expected a number in \[0, 1\), got {value!r}$"
    ):
        check_sparsity(value)


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5], 1j])
def test_sparsity_of_a_wrong_type(value):
    with pytest.raises(ArgumentTypeError, match=r"^sparsity: expected .* of type "):
        check_sparsity(value)


def test_number_names_its_range():
    with pytest.raises(ArgumentError, match=r"^budget: expected a number in \[0, 1\], got 2$"):
        check_number(2, name="budget", minimum=0.0, maximum=1.0)


def test_choice_lists_the_choices():
    assert check_choice("b", ("b", "a"), name="scope") == "b"
    with pytest.raises(ArgumentError, match="^scope: expected one of a, b; got 'c'$"):
        check_choice("c", ("b", "a"), name="scope")
    with pytest.raises(ArgumentError, match="got 3"):
        check_choice(3, ("b", "a"), name="scope")


def test_unknown_key_suggests_a_close_one():
    check_known_keys(["scope"], ["scope"], what="option")
    with pytest.raises(
        ArgumentError, match=r"unknown option 'scop' \(did you mean 'scope'\?\); known: a, scope"
    ):
        check_known_keys(["scop"], ["scope", "a"], what="option")


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ArgumentError, ValueError),
        (ArgumentTypeError, TypeError),
        (WeightError, ValueError),
        (PhaseError, RuntimeError),
        (MaskChangedError, RuntimeError),
        (NotSparsifiedError, LookupError),
    ],
)
def test_errors_are_also_the_builtin_that_they_are(error, builtin):
    assert issubclass(error, ResuCompileError)
    assert issubclass(error, builtin)
