from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import resu_compile as resu
from resu_compile.errors import MaskChangedError
from resu_compile.runtime.module_hooks import AfterForward, BeforeForward


@dataclass
class Output:
    logits: Tensor
    extra: str = "text"


class Shaped(nn.Module):
    """Puts its output into whatever ``wrap`` makes of it."""

    def __init__(self, wrap=lambda y: y):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.fc(x).square())


CHANGES = {
    "prune": lambda c: c.prune(0.9),
    "same masks": lambda c: c.prune(),
    "dense": lambda c: c.set_phase("dense"),
    "resu": lambda c: c.set_phase("resu"),
    "load": lambda c: c.load_state_dict(c.state_dict()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_change_between_forward_and_backward_raises(change):
    model = resu.sparsify(Shaped(), 0.5, compile=False)
    loss = model(torch.randn(2, 4)).sum()
    change(resu.controller(model))
    with pytest.raises(MaskChangedError, match=r"^backward: expected the masks and the phase"):
        loss.backward()
    assert model.fc.weight.grad is None


@pytest.mark.parametrize(
    "leave", [lambda c: c.commit(), lambda c: c.abandon()], ids=["commit", "abandon"]
)
def test_the_end_of_a_resurrection_in_between_raises(leave):
    model = resu.sparsify(Shaped(), 0.5, compile=False)
    controller = resu.controller(model)
    controller.set_phase("resu")
    loss = model(torch.randn(2, 4)).sum()
    leave(controller)
    with pytest.raises(MaskChangedError):
        loss.backward()


def test_leaving_the_dense_phase_in_between_raises():
    model = resu.sparsify(Shaped(), 0.5, compile=False)
    controller = resu.controller(model)
    controller.set_phase("dense")
    loss = model(torch.randn(2, 4)).sum()
    controller.set_phase("sparse")
    with pytest.raises(MaskChangedError):
        loss.backward()


@pytest.mark.parametrize(
    ("wrap", "pick"),
    [
        (lambda y: (None, y), lambda out: out[1]),
        (lambda y: [y.detach(), {"a": y}], lambda out: out[1]["a"]),
        (lambda y: {"loss": y.sum(), "logits": y}, lambda out: out["logits"]),
        (Output, lambda out: out.logits),
    ],
    ids=["tuple", "list", "dict", "dataclass"],
)
def test_whatever_shape_the_output_has(wrap, pick):
    model = resu.sparsify(Shaped(wrap), 0.5, compile=False)
    logits = pick(model(torch.randn(2, 4)))
    resu.controller(model).prune(0.9)
    with pytest.raises(MaskChangedError):
        logits.sum().backward()


def test_without_a_change_backward_runs_as_often_as_asked():
    model = resu.sparsify(Shaped(), 0.5, compile=False)
    loss = model(torch.randn(2, 4)).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def test_a_forward_without_gradients_leaves_no_check():
    model = resu.sparsify(Shaped(), 0.5, compile=False)
    with torch.no_grad():
        out = model(torch.randn(2, 4))
    assert out.grad_fn is None


def test_the_refresh_comes_before_hooks_of_the_users_own():
    model = Shaped()
    seen = []
    model.register_forward_pre_hook(lambda m, _: seen.append(int((m.fc.weight == 0).sum())))
    resu.sparsify(model, 0.5, compile=False)
    model.load_state_dict(Shaped().state_dict())
    model(torch.randn(2, 4))
    assert seen == [8]


def test_there_is_one_hook_of_each_kind_on_the_root_only():
    model = resu.sparsify(nn.Sequential(Shaped(), Shaped()), 0.5, compile=False)
    before = [h for m in model.modules() for h in m._forward_pre_hooks.values()]
    after = [h for m in model.modules() for h in m._forward_hooks.values()]
    assert [type(h) for h in before] == [BeforeForward]
    assert [type(h) for h in after] == [AfterForward]
