import json
import math
import struct
from collections import Counter, OrderedDict
from enum import StrEnum

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.training.tree import decode_tree, encode_tree

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2fnuz,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint64,
    torch.bool,
]


def round_trip(state):
    tree, tensors = encode_tree(state)
    return decode_tree(json.loads(json.dumps(tree, allow_nan=False)), tensors)


def bits(tensor):
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return plain.contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    """Equal in value and type all the way down; NaN equals the same NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(x, y) for x, y in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return a == b


def make_tensor(dtype, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    numel = math.prod(shape)
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        raw = raw % 2
    if dtype.is_complex:
        return torch.view_as_complex(raw.view(dtype.to_real()).reshape([*shape, 2]))
    return raw.view(dtype).reshape(shape)


TENSORS = st.builds(
    make_tensor,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 2**31),
)
KEYS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.text()
    | TENSORS
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(KEYS, st.integers(), max_size=3).map(Counter)
    ),
    max_leaves=12,
)


@settings(max_examples=250, deadline=None)
@given(state=TREES)
def test_round_trip_keeps_values_and_types(state):
    assert same(round_trip(state), state)


def test_keys_that_look_like_tags_stay_keys():
    state = {"tuple": [1], "dict": {"items": []}, "x": {"float": "00"}, "tensor": ["a", "b", []]}
    assert same(round_trip(state), state)


def test_special_numbers():
    state = [math.inf, -math.inf, math.nan, -0.0, 5e-324, 0.1, 1.0, 1, True, 2**64, -(10**6000)]
    assert same(round_trip(state), state)


def test_views_and_lazy_tensors():
    base = torch.arange(12.0).reshape(3, 4)
    imaginary = torch.randn(3, dtype=torch.complex64)
    state = {
        "transposed": base.T,
        "column": base[:, 1],
        "expanded": base[0].expand(2, 4),
        "base": base,
        "conj": imaginary.conj(),
        "neg": imaginary.conj().imag,
        "parameter": nn.Parameter(torch.ones(2)),
    }
    loaded = round_trip(state)
    for key in state:
        assert torch.equal(loaded[key], state[key].detach()), key
        assert not loaded[key].requires_grad


def test_same_tensor_is_stored_once_and_stays_one():
    weight = nn.Parameter(torch.randn(3, 3))
    tree, tensors = encode_tree({"embed": weight, "head": weight.detach(), "row": weight[0]})
    assert sorted(tensors) == ["embed", "row"]
    assert tensors["row"].untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
    loaded = decode_tree(tree, tensors)
    assert loaded["embed"] is loaded["head"]
    assert torch.equal(loaded["row"], weight[0])


def test_keys_that_spell_the_same_path_get_names_of_their_own():
    one, two, three, four = (torch.tensor(float(i)) for i in range(4))
    state = {"a": {"b": one}, "a.b": two, "a[0]": three, "__metadata__": four, "\ud800": one + 9}
    _, tensors = encode_tree(state)
    assert len(tensors) == 5
    assert "__metadata__" not in tensors
    assert same(round_trip(state), state)


def test_model_versions_are_kept():
    state = nn.BatchNorm1d(2).state_dict()
    assert round_trip(state)._metadata == state._metadata


def test_states_of_schedulers():
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(2))], lr=0.1)
    steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 4])
    warmup = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, steps], [3])
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    state = [both.state_dict(), plateau.state_dict()]
    assert same(round_trip(state), state)


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (b"bytes", "builtins.bytes"),
        ({1, 2}, "builtins.set"),
        (object(), "builtins.object"),
        (1j, "builtins.complex"),
        (Colour.RED, "Colour"),
        (torch.float32, "torch.dtype"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo"),
        (torch.empty(2, device="meta"), "on meta"),
        (nn.UninitializedParameter(), "UninitializedParameter"),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, str) else "",
)
def test_other_types_are_refused_by_place(value, got):
    state = {"optimizer": {"state": {3: {"foo": value}}}}
    with pytest.raises(ArgumentTypeError, match=r"^optimizer\.state\[3\]\.foo: expected") as caught:
        encode_tree(state)
    assert got in str(caught.value)


def test_other_keys_are_refused_by_place():
    with pytest.raises(ArgumentTypeError, match=r"^a\[1\]\[\(0, 1\)\]: expected a key"):
        encode_tree({"a": [0, {(0, 1): 2}]})


def test_bare_value_is_called_state():
    with pytest.raises(ArgumentTypeError, match=r"^state: expected"):
        encode_tree(b"")


def test_tree_that_contains_itself():
    state: list = []
    state.append(state)
    with pytest.raises(ArgumentError, match="contains itself"):
        encode_tree(state)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": 1, "b": 2}, "one key"),
        ({"set": [1]}, "tag among"),
        ({"tensor": ["x", "float32", [2]]}, "none of that name"),
        ({"tensor": ["w", "nn", [2]]}, "dtype"),
        ({"tensor": ["w", "float64", [2]]}, "float64 of shape"),
        ({"tensor": ["w", "float32", [3]]}, r"shape \[3\]"),
    ],
    ids=["two keys", "tag", "missing", "dtype name", "dtype", "shape"],
)
def test_trees_that_do_not_fit(tree, message):
    with pytest.raises(ValueError, match=message):
        decode_tree(tree, {"w": torch.zeros(2)})
