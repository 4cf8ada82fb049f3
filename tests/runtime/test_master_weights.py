import torch
from torch import nn

import resu_compile as resu
from resu_compile.phase import Phase
from resu_compile.runtime.master_weights import MasterWeights


def made():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    full = model[0].weight.detach().clone()
    resu.sparsify(model, 0.5, compile=False)
    controller = resu.controller(model)
    model[0].weight.data.copy_(full)
    controller.set_phase("dense")
    model[0].weight.data.copy_(full)
    master = MasterWeights(controller)
    return model, controller, master, full


def test_hidden_and_shown():
    model, controller, master, full = made()
    weight = model[0].weight
    master.hide()
    mask = controller.masks["0.weight"]
    assert controller.phase is Phase.SPARSE
    assert torch.equal(weight, torch.where(mask, full, 0.0))
    assert torch.equal(master.value("0.weight"), full)
    master.show()
    assert controller.phase is Phase.DENSE
    assert torch.equal(weight, full)


def test_another_mask_shows_other_values_and_keeps_the_optimizer_state():
    model, controller, master, full = made()
    weight = model[0].weight
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.square().sum().backward()
    optimizer.step()
    master.take()
    stepped = weight.detach().clone()
    assert not torch.equal(stepped, full)
    buffer = optimizer.state[weight]["momentum_buffer"].clone()
    mask = ~controller.masks["0.weight"]
    epoch, structure = controller.epoch, controller.structure
    master.hide({"0.weight": mask})
    assert torch.equal(controller.masks["0.weight"], mask)
    assert torch.equal(weight, torch.where(mask, stepped, 0.0))
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], buffer)
    assert controller.epoch > epoch
    assert controller.structure == structure  # as many as before
    assert controller.history.ever_active(controller.weights["0.weight"]) == 16
    master.hide({"0.weight": torch.ones_like(mask)})
    assert controller.structure > structure
    master.zero_state({"0.weight": mask})
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], torch.where(mask, buffer, 0.0))


def test_only_some_places_are_taken_over():
    model, _, master, full = made()
    weight = model[0].weight
    places = torch.arange(16).view(4, 4) < 5
    with torch.no_grad():
        weight.add_(1.0)
    master.take({"0.weight": places})
    assert torch.equal(master.value("0.weight"), torch.where(places, full + 1.0, full))


def test_state_is_a_copy():
    _model, controller, master, full = made()
    state = master.state_dict()
    master.value("0.weight").zero_()
    assert torch.equal(state["0.weight"], full)
    other = MasterWeights(controller)
    other.value("0.weight").zero_()
    other.load_state_dict(state)
    assert torch.equal(other.value("0.weight"), full)
