from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import resu_compile as resu
from resu_compile.capture import capture, captured_parameters
from tests.compiling import no_recompile

X = torch.randn(4, 8)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Net(nn.Module):
    """Everything that a call may change."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(8, 3)
        self.offset = nn.Parameter(torch.randn(4, 8))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", None)

    def forward(self, x):
        self.calls += 1
        self.calls = self.calls + 1
        return self.second(self.drop(self.norm(self.first(x + self.offset))))


class Broken(Net):
    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def names(model, graphs):
    known = {id(p): name for name, p in model.named_parameters()}
    return [[(known[id(g.parameters[s.index])], s.op) for s in g.sites] for g in graphs]


def test_one_graph_with_its_sites():
    model = Net()
    graphs = capture(model, X)
    assert names(model, graphs) == [[("first.weight", "linear"), ("second.weight", "linear")]]
    assert graphs[0].sites[0].node.meta["example_value"].shape == (4, 8)


def test_a_graph_for_each_part_of_a_broken_model():
    model = Broken()
    assert names(model, capture(model, X)) == [
        [("first.weight", "linear")],
        [("second.weight", "linear")],
    ]


def test_parameters_that_nothing_multiplies_by():
    model = Net()
    found = captured_parameters(capture(model, X))
    assert found[id(model.second.weight)] == "linear"
    assert found[id(model.offset)] is None
    assert found[id(model.norm.weight)] is None


def test_keyword_inputs():
    model = Net()
    assert len(capture(model, x=X)) == 1


@pytest.mark.parametrize("make", [Net, Broken])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_state_stay_as_they_are(make, training):
    model = make().train(training)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    versions = [p._version for p in model.parameters()]
    random = torch.get_rng_state()
    capture(model, X)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())
    assert [p._version for p in model.parameters()] == versions
    assert {name: id(b) for name, b in model.named_buffers()} == {
        n: id(b) for n, b in buffers.items()
    }
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_buffers_come_back_after_an_error_too():
    class Failing(Net):
        def forward(self, x):
            self.calls += 1
            self.last = x
            torch._dynamo.graph_break()
            raise ValueError("no")

    model = Failing()
    with pytest.raises(ValueError, match="no"):
        capture(model, X)
    assert model.calls == 0
    assert model.last is None


def test_hooks_of_the_user_take_part():
    model = nn.Linear(8, 3)
    model.register_forward_pre_hook(lambda _, args: (args[0][:2],))
    (graph,) = capture(model, X)
    assert graph.sites[0].node.meta["example_value"].shape == (2, 3)


def test_a_compiled_model_is_not_run_compiled():
    compiled = []
    model = Net()
    model.compile(backend=lambda gm, _: compiled.append(gm) or gm.forward)
    capture(model, X)
    assert compiled == []


def test_many_captures_see_static_sizes_each():
    for model in (Net(), Broken()):
        for rows in range(2, 12):
            if isinstance(model, Net) and not isinstance(model, Broken):
                model.offset = nn.Parameter(torch.randn(rows, 8))
            graphs = capture(model, torch.randn(rows, 8))
            shapes = [site.node.meta["example_value"].shape for g in graphs for site in g.sites]
            assert shapes == [(rows, 8), (rows, 3)]


@pytest.mark.parametrize("already_compiled", [True, False])
def test_nothing_is_left_with_dynamo(already_compiled):
    """Neither recompiles that count, nor sizes that would make the model's own dynamic."""
    model = Broken()
    sizes = []

    def backend(gm, inputs):
        sizes.append([v for v in inputs if isinstance(v, torch.SymInt)])
        return gm.forward

    call = torch.compile(model, backend=backend)
    if already_compiled:
        call(torch.randn(9, 8))
    for rows in range(2, 12):
        assert len(capture(model, torch.randn(rows, 8))) == 2
    if already_compiled:
        with no_recompile():
            call(torch.randn(9, 8))
    else:
        assert not _debug_get_cache_entry_list(Broken.forward.__code__)
        call(torch.randn(9, 8))
    assert sizes == [[], []]


def test_example_inputs_let_the_graph_select():
    plain = resu.sparsify(Net(), 0.5, compile=False)
    assert "offset" in resu.controller(plain).masks  # two dimensions: looks like a weight
    model = resu.sparsify(Net(), 0.5, compile=False, example_inputs=(X,))
    ctl = resu.controller(model)
    assert set(ctl.masks) == {"first.weight", "second.weight"}
    assert ctl.skipped["offset"] == "no matmul multiplies by it"
    single = resu.sparsify(Net(), 0.5, compile=False, example_inputs=X)
    assert set(resu.controller(single).masks) == set(ctl.masks)
