import pytest
import torch

from resu_compile.errors import ArgumentError
from resu_compile.methods import Magnitude, get_method, method_names, register_method
from resu_compile.methods.registry import _METHODS


class ByIndex:
    def score(self, weight, _generator):
        return torch.arange(weight.numel(), dtype=torch.float32).view(weight.shape)


def test_names_are_sorted_and_known():
    assert method_names() == sorted(method_names())
    assert {"magnitude", "random"} <= set(method_names())


def test_get_by_name_and_by_object():
    assert get_method("magnitude") == Magnitude()
    own = ByIndex()
    assert get_method(own) is own


@pytest.mark.parametrize("name", ["rgl", "", "Magnitude"])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(
        ArgumentError, match=f"^method: unknown method {name!r}; registered: .*magnitude"
    ):
        get_method(name)


@pytest.mark.parametrize("method", [None, 3, ByIndex, object()])
def test_what_is_no_method(method):
    with pytest.raises(ArgumentError, match="^method: expected a name .* or an object with"):
        get_method(method)


def test_a_name_is_given_once():
    with pytest.raises(ArgumentError, match="'magnitude' is already registered by .*Magnitude"):
        register_method("magnitude")(ByIndex)
    assert get_method("magnitude") == Magnitude()


def test_a_registered_method_is_found():
    try:
        assert register_method("by_index")(ByIndex) is ByIndex
        assert isinstance(get_method("by_index"), ByIndex)
    finally:
        _METHODS.pop("by_index")
