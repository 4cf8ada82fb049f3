"""Batches and loops: what the model is given."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import resu_compile as resu
from resu_compile.calibration.data import as_loop
from resu_compile.errors import ArgumentError, ArgumentTypeError


class Seen(nn.Module):
    """Remembers what it was called with."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = []

    def forward(self, x, mask=None, *, scale=1.0):
        self.calls.append((x, mask, scale))
        return self.layer(x) * scale


def calls(calibration):
    model = Seen()
    as_loop(calibration)(model)
    return model.calls


X, Y, Z = torch.ones(2, 4), torch.zeros(2), torch.arange(2)


def test_a_tensor_is_the_only_input():
    assert calls([X]) == [(X, None, 1.0)]


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_sequence_is_the_positional_inputs_as_far_as_forward_takes_them(kind):
    assert calls([kind((X,))]) == [(X, None, 1.0)]
    assert calls([kind((X, Y))]) == [(X, Y, 1.0)]
    assert calls([kind((X, Y, Z))]) == [(X, Y, 1.0)]


def test_a_mapping_is_the_keyword_inputs():
    assert calls([{"x": X, "scale": 2.0}]) == [(X, None, 2.0)]


def test_labels_of_a_loader_fall_off():
    data = TensorDataset(torch.randn(6, 8), torch.zeros(6))
    model = nn.Sequential(nn.Linear(8, 4))
    resu.sparsify(model, 0.5, method="wanda", calibration=DataLoader(data, 2), compile=False)
    assert resu.controller(model).sparsity == 0.5


def test_any_number_of_positional_inputs_gets_all():
    class Any(nn.Module):
        def forward(self, *args):
            return len(args)

    model = Any()
    found = []
    model.register_forward_hook(lambda _m, _a, out: found.append(out))
    as_loop([(X, Y, Z)])(model)
    assert found == [3]


def test_an_iterator_is_read_once():
    loop = as_loop(x for x in [X, 2 * X])
    for _ in range(2):
        model = Seen()
        loop(model)
        assert len(model.calls) == 2


def test_a_function_is_taken_as_it_is():
    def forward_loop(model):
        return model(X)

    assert as_loop(forward_loop) is forward_loop


def test_data_go_to_the_device_of_the_model():
    model = Seen().to("meta")
    as_loop([{"x": X, "mask": (Y, [Z])}])(model)
    x, (y, (z,)), _ = model.calls[0]
    assert {x.device.type, y.device.type, z.device.type} == {"meta"}


@pytest.mark.parametrize(
    "wrong", [X, 3, "data", {"x": X}, nn.Linear(4, 4)], ids=lambda w: str(type(w))
)
def test_what_is_no_calibration(wrong):
    with pytest.raises(ArgumentTypeError, match="^calibration: expected a function .*=\\[batch\\]"):
        as_loop(wrong)


def test_no_batch_and_no_tensors():
    with pytest.raises(ArgumentError, match="^calibration: expected at least one batch, got none"):
        as_loop([])
    with pytest.raises(ArgumentTypeError, match="^calibration: expected batches that .* got str"):
        as_loop(["text"])
