import gc
import weakref

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.errors import WeightError
from resu_compile.phase import Routing
from resu_compile.state import masked_weight_of, registry_epoch


def linear(sparsity=0.5):
    return resu.sparsify(nn.Linear(6, 4), sparsity, compile=False)


def weight_of(model):
    return resu.controller(model).weights["weight"]


def backward(model):
    model(torch.randn(3, 6)).square().sum().backward()


def pruned(model):
    return ~weight_of(model).mask


def known_as_masked(model):
    """True if nothing is left to do to the gradient before an optimizer step."""
    before = model.weight.grad._version
    weight_of(model).clean_gradient(model.weight, Routing.ACTIVE)
    assert (model.weight.grad[pruned(model)] == 0).all()
    return model.weight.grad._version == before


# -- the gradient ------------------------------------------------------------------------------
def test_a_gradient_arrives_masked():
    model = linear()
    backward(model)
    assert (model.weight.grad[pruned(model)] == 0).all()
    assert (model.weight.grad[~pruned(model)] != 0).all()
    assert known_as_masked(model)


def test_the_gradient_is_that_of_the_unmasked_model_where_active():
    model = linear()
    plain = nn.Linear(6, 4)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(3, 6)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert torch.equal(model.weight.grad, plain.weight.grad.masked_fill(pruned(model), 0))


def test_nan_and_infinity_do_not_leak_through_the_mask():
    model = linear()
    (model(torch.full((1, 6), float("inf")))).sum().backward()
    assert (model.weight.grad[pruned(model)] == 0).all()


def test_accumulated_gradients_stay_known_as_masked():
    model = linear()
    for _ in range(3):
        backward(model)
    assert known_as_masked(model)
    model.weight.grad.mul_(2)
    assert not known_as_masked(model)


def test_accumulation_onto_a_written_gradient_is_not_trusted():
    model = linear()
    backward(model)
    model.weight.grad.add_(1)
    backward(model)
    assert not known_as_masked(model)
    assert known_as_masked(model)


def test_a_hook_of_the_users_own_that_adds_noise_is_not_trusted():
    model = linear()
    model.weight.register_hook(lambda grad: grad + 1)
    backward(model)
    assert not known_as_masked(model)


def test_a_post_accumulate_hook_of_the_users_own_is_not_trusted():
    model = linear()
    model.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad + 1))
    backward(model)
    assert not known_as_masked(model)


def test_an_expanded_gradient_can_be_cleaned():
    model = linear()
    model.weight.grad = torch.ones(()).expand(4, 6)
    weight_of(model).clean_gradient(model.weight, Routing.ACTIVE)
    assert torch.equal(model.weight.grad, (~pruned(model)).float())


def test_autograd_grad_is_masked():
    model = linear()
    (grad,) = torch.autograd.grad(model(torch.randn(3, 6)).sum(), model.weight)
    assert (grad[pruned(model)] == 0).all()


def test_second_derivatives_go_through_the_mask():
    model = linear()
    x = torch.randn(3, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), model.weight, create_graph=True)
    grad.square().sum().backward()
    plain = model.weight.detach().clone().requires_grad_()
    y = x.detach().clone()
    (expected,) = torch.autograd.grad(
        (y @ plain.t() + model.bias).square().sum(), plain, create_graph=True
    )
    masked = expected.where(~pruned(model), torch.zeros(()))
    (second,) = torch.autograd.grad(masked.square().sum(), plain)
    torch.testing.assert_close(model.weight.grad, second.masked_fill(pruned(model), 0))


def test_a_function_that_gives_no_gradient():
    class Ignore(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x, _weight):
            return x * 1

        @staticmethod
        def backward(_ctx, grad):
            return grad, None

    model = linear()
    x = torch.randn(3, requires_grad=True)
    Ignore.apply(x, model.weight).sum().backward()
    assert model.weight.grad is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    model = linear()
    x = torch.randn(3, 6, requires_grad=True)
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert (model.weight.grad[pruned(model)] == 0).all()


def test_requires_grad_switched_on_later():
    model = nn.Linear(6, 4)
    model.weight.requires_grad_(False)
    resu.sparsify(model, 0.5, compile=False)
    assert (model.weight[pruned(model)] == 0).all()
    model.weight.requires_grad_(True)
    backward(model)
    assert (model.weight.grad[pruned(model)] == 0).all()


def test_requires_grad_switched_off_and_on():
    model = linear()
    model.weight.requires_grad_(False)
    model(torch.randn(3, 6))
    model.weight.requires_grad_(True)
    backward(model)
    assert (model.weight.grad[pruned(model)] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_hooks_survive_a_change_of_dtype(dtype):
    model = linear()
    backward(model)
    model.zero_grad()
    model.to(dtype)
    model(torch.randn(3, 6, dtype=dtype)).sum().backward()
    assert model.weight.grad.dtype is dtype
    assert (model.weight.grad[pruned(model)] == 0).all()
    assert (model.weight[pruned(model)] == 0).all()


# -- the value ---------------------------------------------------------------------------------
def write_in_place(model):
    with torch.no_grad():
        model.weight.add_(1)


def write_by_load(model):
    model.load_state_dict(nn.Linear(6, 4).state_dict())


def write_by_assigning_load(model):
    model.load_state_dict(nn.Linear(6, 4).state_dict(), assign=True)


def write_by_data(model):
    model.weight.data = torch.ones(4, 6)


def write_by_vector(model):
    vector = torch.randn(28)
    nn.utils.vector_to_parameters(vector, model.parameters())


def write_by_swap(model):
    model.weight = nn.Parameter(torch.ones(4, 6))


def write_by_init(model):
    nn.init.ones_(model.weight)


def write_in_inference_mode(model):
    with torch.inference_mode():
        model.weight.fill_(1.0)


@pytest.mark.parametrize(
    "write",
    [
        write_in_place,
        write_by_load,
        write_by_assigning_load,
        write_by_data,
        write_by_vector,
        write_by_swap,
        write_by_init,
        write_in_inference_mode,
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_whoever_writes_the_next_forward_sees_zeros(write, mode):
    model = linear()
    hole = pruned(model)
    write(model)
    assert (model.weight[hole] != 0).any()
    x = torch.randn(3, 6)
    with mode():
        out = model(x)
    assert (model.weight[hole] == 0).all()
    assert (model.weight[~hole] != 0).all()
    assert torch.equal(out, nn.functional.linear(x, model.weight, model.bias))


def test_an_untouched_weight_is_not_written_again():
    model = linear()
    model(torch.randn(3, 6))
    version = model.weight._version
    model(torch.randn(3, 6))
    assert model.weight._version == version


def test_a_swapped_parameter_is_followed():
    model = linear()
    old = model.weight
    model.weight = nn.Parameter(torch.ones(4, 6))
    epoch = registry_epoch()
    backward(model)
    assert registry_epoch() > epoch
    assert masked_weight_of(old) is None
    assert masked_weight_of(model.weight) is weight_of(model)
    assert not old._backward_hooks
    assert (model.weight.grad[pruned(model)] == 0).all()


def test_a_parameter_of_another_shape_is_an_error():
    model = linear()
    model.weight = nn.Parameter(torch.ones(6, 6))
    with pytest.raises(
        WeightError, match=r"^weight: expected shape \(4, 6\) of its mask, .* \(6, 6\)"
    ):
        model(torch.randn(3, 6))


def test_a_removed_parameter_is_an_error_that_release_mends():
    model = resu.sparsify(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 0.5, compile=False)
    model[1] = nn.Linear(4, 3)
    with pytest.raises(WeightError, match="^1.weight: .* or the layer replaced; controller"):
        model(torch.randn(2, 4))
    resu.controller(model).release()
    assert model(torch.randn(2, 4)).shape == (2, 3)
    resu.sparsify(model, from_zeros=True, compile=False)
    assert resu.controller(model).weights["0.weight"].nnz == 8


def test_a_parameter_that_became_another_kind_of_tensor_is_an_error():
    from torch.testing._internal.two_tensor import TwoTensor

    model = linear()
    model.weight = nn.Parameter(TwoTensor(torch.ones(4, 6), torch.ones(4, 6)))
    with pytest.raises(
        WeightError, match="^weight: expected a plain tensor, .* TwoTensor.*release"
    ):
        model(torch.randn(3, 6))


def test_functional_call_keeps_the_callers_tensors():
    model = linear()
    lent = {"weight": torch.ones(4, 6), "bias": torch.zeros(4)}
    out = torch.func.functional_call(model, lent, (torch.ones(1, 6),))
    assert out.tolist() == [[6.0] * 4]
    assert lent["weight"].eq(1).all()
    assert masked_weight_of(model.weight) is weight_of(model)
    grads = torch.func.grad(
        lambda p: torch.func.functional_call(model, p, (torch.ones(1, 6),)).sum()
    )(lent)
    assert grads["weight"].eq(1).all()
    backward(model)
    assert (model.weight.grad[pruned(model)] == 0).all()


def test_content_key_changes_with_whatever_changes_the_value():
    model = linear()
    weight = weight_of(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    seen = {weight.content_key()}
    backward(model)
    optimizer.step()  # fused: autograd's version counter does not see it
    seen.add(weight.content_key())
    write_in_place(model)
    seen.add(weight.content_key())
    write_by_data(model)
    seen.add(weight.content_key())
    resu.controller(model).prune(0.9)
    seen.add(weight.content_key())
    assert len(seen) == 5
    assert weight.content_key() == weight.content_key()


# -- memory ------------------------------------------------------------------------------------
def test_a_model_dies_with_its_last_reference():
    gc.collect()
    gc.disable()
    try:
        model = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
        resu.sparsify(model, 0.5, compile=False)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randn(2, 6)).sum().backward()
        optimizer.step()
        gone = weakref.ref(model), weakref.ref(model[0].weight)
        del model, optimizer
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_the_registry_forgets():
    model = linear()
    weight, parameter = weakref.ref(weight_of(model)), model.weight
    resu.controller(model).release()
    assert masked_weight_of(parameter) is None
    del model
    gc.collect()
    assert weight() is None


def test_layers_stay_masked_when_their_root_is_gone():
    layers = list(resu.sparsify(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), 0.5, compile=False))
    gc.collect()
    hole = layers[0].weight == 0
    optimizer = torch.optim.AdamW(layers[0].parameters(), weight_decay=0.1)
    for _ in range(2):
        layers[0](torch.randn(3, 6)).sum().backward()
        optimizer.step()
    assert torch.equal(layers[0].weight == 0, hole)
