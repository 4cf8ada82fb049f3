import pytest
import torch
from torch import nn

from resu_compile.errors import ArgumentError
from resu_compile.runtime.gradient_score import LastGradients


def test_the_last_gradient_wins_and_is_a_copy():
    last = LastGradients()
    parameter = nn.Parameter(torch.zeros(3))
    grad = torch.tensor([1.0, -2.0, 0.0])
    last.observe("w", grad)
    grad.mul_(5.0)
    assert last.magnitude("w", parameter).tolist() == [1.0, 2.0, 0.0]
    last.observe("w", grad)
    assert last.magnitude("w", parameter).tolist() == [5.0, 10.0, 0.0]
    last.observe("w", grad.bfloat16())
    assert last.magnitude("w", parameter).dtype == torch.bfloat16


def test_a_step_reuses_the_memory_of_the_one_before():
    last = LastGradients()
    parameter = nn.Parameter(torch.zeros(3))
    last.observe("w", torch.ones(3))
    address = last.magnitude("w", parameter).data_ptr()
    last.observe("w", -torch.ones(3))
    assert last.magnitude("w", parameter).data_ptr() == address


def test_what_was_never_stepped():
    last = LastGradients()
    parameter = nn.Parameter(torch.zeros(3))
    with pytest.raises(ArgumentError, match=r"^score: expected a gradient of w .*score='gradient'"):
        last.magnitude("w", parameter)
    parameter.grad = torch.tensor([-1.0, 0.0, 2.0])
    assert last.magnitude("w", parameter).tolist() == [1.0, 0.0, 2.0]


def test_state_round_trips_as_copies():
    last = LastGradients()
    last.observe("w", torch.ones(3))
    state = last.state_dict()
    other = LastGradients.from_state_dict(state)
    state["w"].zero_()
    parameter = nn.Parameter(torch.zeros(3))
    assert last.magnitude("w", parameter).tolist() == [1.0] * 3
    assert other.magnitude("w", parameter).tolist() == [1.0] * 3
