"""Blocks: found in the module tree, named, and everything around them."""

import pytest
from torch import nn

from resu_compile.calibration.blocks import find_blocks
from resu_compile.config import SparsityConfig
from resu_compile.errors import ArgumentError
from resu_compile.selection import select


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


class Net(nn.Module):
    def __init__(self, n=3):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(n))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(5))
        self.head = nn.Linear(4, 2)


def found(model, blocks=None, **config):
    weights = select(model, SparsityConfig(**config)).chosen
    specs = find_blocks(model, weights, blocks)
    assert sorted(w.name for spec in specs for w in spec.weights) == sorted(w.name for w in weights)
    assert all(spec.module is model.get_submodule(spec.name) for spec in specs)
    return [(spec.name, [weight.name for weight in spec.weights]) for spec in specs]


def test_the_list_that_holds_most_and_what_is_around_it():
    specs = found(Net())
    assert [name for name, _ in specs] == ["", "layers.0", "layers.1", "layers.2", ""]
    assert specs[0][1] == ["stem.weight"]
    assert specs[-1][1] == ["head.weight"]
    assert len(specs[1][1]) == 3


def test_a_list_of_one_is_no_blocks():
    specs = found(Net(1))
    assert [name for name, _ in specs] == ["", "layers.0.experts.0", "layers.0.experts.1", ""]
    assert specs[0][1] == ["stem.weight", "layers.0.a.weight"]


def test_more_experts_than_layers_are_no_blocks():
    model = Net(2)
    for layer in model.layers:
        layer.experts.extend(nn.Linear(4, 4) for _ in range(9))
    assert [name for name, _ in found(model)] == ["", "layers.0", "layers.1", ""]


def test_layers_that_stay_dense_are_passed_through():
    specs = found(Net(4), exclude=["layers.1", "layers.3", "head"])
    assert [(name, len(weights)) for name, weights in specs] == [
        ("", 1),
        ("layers.0", 3),
        ("layers.1", 0),
        ("layers.2", 3),
    ]


def test_a_model_without_blocks_is_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert found(model) == [("", ["0.weight", "2.weight"])]


def test_a_sequential_of_one_class_is_blocks():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert [name for name, _ in found(model)] == ["0", "1"]


def test_named_blocks():
    model = Net()
    assert [n for n, _ in found(model, "layers")] == ["", "layers.0", "layers.1", "layers.2", ""]
    names = ("layers.2", "stem")
    assert [n for n, _ in found(model, names)][:2] == ["layers.2", "stem"]
    assert [n for n, _ in found(model, ("layers.1.experts",))][1:3] == [
        "layers.1.experts.0",
        "layers.1.experts.1",
    ]
    assert [n for n, _ in found(model, "head")] == ["", "head"]


def test_wrong_names():
    with pytest.raises(ArgumentError, match="^blocks: .* but 'layer' is none; .*layers, layers.0"):
        found(Net(), "layer")
    with pytest.raises(ArgumentError, match="^blocks: expected modules that hold weights"):
        found(Net(), "norms")
