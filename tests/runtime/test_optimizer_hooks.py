"""What the global hooks do to each optimizer; whole training loops are in tests/integration."""

import pytest
import torch
from torch import nn, optim

import resu_compile as resu
from resu_compile.runtime.optimizer_hooks import ELEMENTWISE, LOOK_EVERY, optimizers_of
from resu_compile.runtime.optimizer_state import same_shaped_state


def sparse(sparsity=0.5, shape=(6, 4)):
    return resu.sparsify(nn.Linear(*shape), sparsity, compile=False)


def weight_of(model):
    return resu.controller(model).weights["weight"]


def backward(model):
    model(torch.randn(5, model.in_features)).square().sum().backward()


def clean(model, optimizer):
    hole = ~weight_of(model).mask
    bits = model.weight.view(torch.int32)[hole]
    assert (bits == 0).all(), "a pruned weight is not +0"
    assert (model.weight[~hole] != 0).all()
    for key, value in same_shaped_state(optimizer, model.weight):
        assert (value[hole] == 0).all(), f"{key} is not 0 where the weight is pruned"


def test_nothing_is_written_by_an_elementwise_optimizer_that_needs_no_help():
    model = sparse()
    optimizer = optim.SGD(model.parameters(), 0.1, foreach=True)
    backward(model)
    optimizer.step()
    before = model.weight._version
    optimizer.step()
    assert model.weight._version == before + 1  # its own write


def test_an_optimizer_of_other_weights_is_not_touched():
    sparse()
    other = nn.Linear(3, 3)
    optimizer = optim.SGD(other.parameters(), 0.1)
    other(torch.randn(2, 3)).sum().backward()
    expected = other.weight.detach() - 0.1 * other.weight.grad
    optimizer.step()
    torch.testing.assert_close(other.weight.detach(), expected)


def test_optimizers_of_a_weight():
    model = sparse()
    first, second = (optim.SGD(model.parameters(), 0.1) for _ in range(2))
    assert optimizers_of(weight_of(model)) == []
    first.step()
    assert optimizers_of(weight_of(model)) == [first]
    second.step()
    assert set(optimizers_of(weight_of(model))) == {first, second}
    del first, second
    assert optimizers_of(weight_of(model)) == []


# -- state that comes from elsewhere -----------------------------------------------------------
def dense_state(optimizer_class, **arguments):
    """An optimizer whose state is nonzero everywhere."""
    model = nn.Linear(6, 4)
    optimizer = optimizer_class(model.parameters(), lr=0.1, **arguments)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def test_state_from_before_sparsify_is_zeroed():
    model, optimizer = dense_state(optim.Adam)
    resu.sparsify(model, 0.5, compile=False)
    backward(model)
    optimizer.step()
    clean(model, optimizer)


def test_a_loaded_state_is_zeroed():
    _, dense = dense_state(optim.SGD, momentum=0.9)
    model = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    backward(model)
    optimizer.step()
    optimizer.load_state_dict(dense.state_dict())
    backward(model)
    optimizer.step()
    clean(model, optimizer)


def test_a_parameter_group_that_comes_later_is_masked():
    first, second = sparse(), sparse()
    optimizer = optim.AdamW(first.parameters(), lr=0.1, weight_decay=0.1)
    backward(first)
    optimizer.step()
    optimizer.add_param_group({"params": second.parameters(), "lr": 0.5})
    for _ in range(2):
        backward(first)
        backward(second)
        second.weight.grad.add_(1)
        optimizer.step()
    clean(first, optimizer)
    clean(second, optimizer)


def test_two_models_whose_weights_share_a_name():
    models = [sparse(), sparse(0.8)]
    optimizer = optim.Adam([p for m in models for p in m.parameters()], lr=0.1)
    for _ in range(3):
        for model in models:
            backward(model)
        optimizer.step()
    for model in models:
        clean(model, optimizer)


# -- gradients that were written ---------------------------------------------------------------
def noise_in_place(p):
    p.grad.add_(torch.randn_like(p.grad))


def noise_out_of_place(p):
    p.grad = p.grad + torch.randn_like(p.grad)


def own_gradient(p):
    p.grad = torch.ones_like(p)


def expanded_gradient(p):
    p.grad = torch.ones(()).expand_as(p)


@pytest.mark.parametrize(
    "write", [noise_in_place, noise_out_of_place, own_gradient, expanded_gradient]
)
@pytest.mark.parametrize("fused", [False, True])
def test_a_written_gradient_does_not_reach_pruned_places(write, fused):
    model = sparse()
    optimizer = optim.Adam(model.parameters(), lr=0.1, fused=fused)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model)
        for parameter in model.parameters():
            write(parameter)
        optimizer.step()
    clean(model, optimizer)


def hidden_noise(p):
    p.grad.data.add_(torch.randn_like(p.grad))


def hidden_noise_on_the_weight(p):
    p.data.add_(torch.randn_like(p))


@pytest.mark.parametrize("write", [hidden_noise, hidden_noise_on_the_weight])
def test_writes_through_data_are_found_at_the_first_step(write):
    model = sparse()
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        backward(model)
        write(model.weight)
        optimizer.step()
        clean(model, optimizer)
    assert not weight_of(model).trusts_versions


def test_writes_through_data_that_begin_later_are_found_too():
    model = sparse()
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    for step in range(2 * LOOK_EVERY + 1):
        optimizer.zero_grad()
        backward(model)
        if step > 5:
            hidden_noise(model.weight)
        optimizer.step()
    clean(model, optimizer)


def test_a_step_hook_that_writes_the_gradient():
    model = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def add_noise(found, _args, _kwargs):
        for group in found.param_groups:
            for parameter in group["params"]:
                parameter.grad.add_(1)

    optimizer.register_step_pre_hook(add_noise)
    for _ in range(2):
        backward(model)
        optimizer.step()
        clean(model, optimizer)


def test_a_step_hook_that_writes_the_weight():
    model = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: nn.init.ones_(model.weight))
    backward(model)
    optimizer.step()
    model(torch.randn(2, 6))
    assert (model.weight[~weight_of(model).mask] == 0).all()


# -- optimizers of other kinds -----------------------------------------------------------------
class MixesEntries(optim.Optimizer):
    """Writes through ``.data``, so that no version counter sees it, and mixes all entries."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, _closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["mean"] = parameter.grad.mean().expand_as(parameter).clone()
                state["codes"] = torch.full(parameter.shape, 7, dtype=torch.uint8)
                parameter.data.sub_(group["lr"] * state["mean"])


def test_an_optimizer_that_mixes_entries_and_hides_its_writes():
    model = sparse()
    optimizer = MixesEntries(model.parameters())
    for _ in range(3):
        backward(model)
        optimizer.step()
        clean(model, optimizer)
    # numbers of another kind are left alone: their 0 may mean something else
    assert (optimizer.state[model.weight]["codes"] == 7).all()


@pytest.mark.parametrize("name", ["Adamax", "ASGD", "Rprop"])
def test_optimizers_whose_state_is_not_zero_where_the_gradient_is(name):
    model = sparse()
    optimizer = getattr(optim, name)(model.parameters())
    assert type(optimizer) not in ELEMENTWISE
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        clean(model, optimizer)


def test_an_accumulator_that_starts_above_zero():
    model = sparse()
    optimizer = optim.Adagrad(model.parameters(), initial_accumulator_value=0.5)
    backward(model)
    optimizer.step()
    clean(model, optimizer)
    assert (optimizer.state[model.weight]["sum"][weight_of(model).mask] > 0.5).all()


class Centred(optim.Adam):
    """An elementwise optimizer no more: it removes the mean, then calls the real step."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.sub_(parameter.grad.mean())
        super().step()
        return loss


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_calls_the_real_step(with_closure):
    optim.Adam(nn.Linear(1, 1).parameters())  # its step has hooks of its own then
    model = sparse()
    optimizer = Centred(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        backward(model)
        return 1.5

    for _ in range(3):
        if with_closure:
            assert optimizer.step(closure) == 1.5
        else:
            closure()
            optimizer.step()
        clean(model, optimizer)


# -- closures ----------------------------------------------------------------------------------
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs(search):
    model = sparse()
    optimizer = optim.LBFGS(model.parameters(), line_search_fn=search, max_iter=5)
    x, y = torch.randn(8, 6), torch.randn(8, 4)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(3):
        optimizer.step(closure)
        assert (model.weight[~weight_of(model).mask] == 0).all()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_closure_that_writes_the_gradient(name, keyword):
    """As Lightning does: backward and clipping inside of the closure."""
    model = sparse()
    optimizer = getattr(optim, name)(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        backward(model)
        for parameter in model.parameters():
            parameter.grad.add_(1)
        return torch.tensor(0.25)

    for _ in range(3):
        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert loss == 0.25
        clean(model, optimizer)


def test_a_closure_that_is_none():
    model = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step(None)
    optimizer.step(closure=None)
    clean(model, optimizer)


def test_an_optimizer_step_inside_of_backward():
    model = sparse()
    optimizers = {p: optim.Adam([p], lr=0.1) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    before = model.weight.detach().clone()
    for _ in range(3):
        backward(model)
    clean(model, optimizers[model.weight])
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
def test_a_compiled_step_is_one_graph_and_ends_in_the_same_weights(phase):
    def run(compiled):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        model = sparse()
        resu.controller(model).set_phase(phase)
        optimizer = optim.Adam(model.parameters(), lr=0.1)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(4):
            optimizer.zero_grad()
            backward(model)
            model.weight.grad.add_(1)
            step()
        if phase == "sparse":
            clean(model, optimizer)
        return model.weight.detach()

    plain = run(False)
    torch.testing.assert_close(run(True), plain)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1


def test_a_whole_training_step_compiled_by_another_backend():
    model = sparse()
    optimizer = optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    @torch.compile(backend="aot_eager")
    def train(x):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    for _ in range(3):
        train(torch.randn(5, 6))
        clean(model, optimizer)


def test_an_average_of_models():
    model = sparse()
    average = optim.swa_utils.AveragedModel(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        backward(model)
        optimizer.step()
        average.update_parameters(model)
    hole = ~weight_of(model).mask
    average(torch.randn(2, 6))
    assert (average.module.weight[hole] == 0).all()
    assert torch.equal(resu.controller(average.module).masks["weight"], ~hole)
