import math

import numpy as np
import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.errors import (
    ArgumentError,
    ArgumentTypeError,
    PhaseError,
    ResuCompileError,
    WeightError,
)
from resu_compile.state import masked_weight_of


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(10, 12)
        self.fc2 = nn.Linear(12, 6)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


def sparsify(model, sparsity=0.7, **arguments):
    return resu.sparsify(model, sparsity, compile=False, **arguments)


def active(model):
    return {name: int(mask.sum()) for name, mask in resu.controller(model).masks.items()}


# -- what comes out ----------------------------------------------------------------------------
def test_the_same_module_comes_back_with_zeros_in_place():
    model = Mlp()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters, keys = list(model.parameters()), list(model.state_dict())
    assert sparsify(model, 0.7) is model
    assert type(model) is Mlp
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    masks = resu.controller(model).masks
    assert list(masks) == ["fc1.weight", "fc2.weight"]
    for name, parameter in model.named_parameters():
        expected = before[name]
        if name in masks:
            assert int(masks[name].sum()) == int((1 - 0.7) * expected.numel())
            kept = expected.abs()[masks[name]].min()
            assert kept >= expected.abs()[~masks[name]].max()
            expected = expected.where(masks[name], torch.zeros(()))
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.5, 0.999, np.float32(0.7), np.float64(0.7)])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_counts_are_exact(sparsity, scope):
    model = sparsify(Mlp(), sparsity, scope=scope)
    keep = 1 - float(sparsity)
    if scope == "layer":
        assert active(model) == {"fc1.weight": int(keep * 120), "fc2.weight": int(keep * 72)}
    assert sum(active(model).values()) in (int(keep * 192), int(keep * 120) + int(keep * 72))
    controller = resu.controller(model)
    assert controller.sparsity == pytest.approx(1 - sum(active(model).values()) / 192)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_equal_weights(value):
    model = nn.Linear(7, 3, bias=False)
    nn.init.constant_(model.weight, value)
    mask = resu.controller(sparsify(model, 0.5)).masks["weight"]
    assert mask.flatten().tolist() == [i < 10 for i in range(21)]


def test_a_single_row():
    mask = resu.controller(sparsify(nn.Linear(9, 1), 0.7)).masks["weight"]
    assert mask.shape == (1, 9)
    assert int(mask.sum()) == int((1 - 0.7) * 9)


def test_random_depends_on_the_seed_alone():
    model = Mlp()
    state = model.state_dict()

    def masks(seed):
        again = Mlp()
        again.load_state_dict(state)
        return resu.controller(sparsify(again, method="random", seed=seed)).masks

    torch.rand(3)
    first, same, other = masks(1), masks(1), masks(2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


def test_a_method_of_ones_own():
    class LastColumns:
        def score(self, weight, _generator):
            return torch.arange(weight.shape[1]).expand_as(weight)

    mask = resu.controller(sparsify(Mlp(), 0.5, method=LastColumns())).masks["fc1.weight"]
    assert mask.sum(0).tolist() == [0] * 5 + [12] * 5


@pytest.mark.parametrize(
    "score", [lambda w: w.abs()[0], lambda w: torch.full_like(w, math.nan)], ids=["shape", "nan"]
)
def test_wrong_scores_of_a_method(score):
    class Broken:
        def score(self, weight, _generator):
            return score(weight)

    with pytest.raises(ArgumentError, match=r"^method: expected scores .* Broken for fc1.weight"):
        sparsify(Mlp(), method=Broken())


def test_from_zeros_changes_no_value():
    model = Mlp()
    with torch.no_grad():
        model.fc1.weight[:, ::2] = 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    controller = resu.controller(sparsify(model, from_zeros=True))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert active(model) == {"fc1.weight": 60, "fc2.weight": 72}
    assert controller.sparsity == pytest.approx(60 / 192)
    assert controller.config.sparsity == pytest.approx(60 / 192)
    controller.prune(0.9)
    assert active(model) == {"fc1.weight": int((1 - 0.9) * 120), "fc2.weight": int((1 - 0.9) * 72)}


def test_from_zeros_of_a_model_that_is_all_zero():
    model = nn.Linear(4, 4)
    nn.init.zeros_(model.weight)
    assert resu.controller(sparsify(model, from_zeros=True)).sparsity == 1.0


def test_overrides_the_last_match_wins():
    model = sparsify(Mlp(), 0.5, overrides={"fc*": 0.9, "fc2.weight": 0.25})
    assert active(model) == {"fc1.weight": int((1 - 0.9) * 120), "fc2.weight": 54}


def test_erk_keeps_the_overall_count():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    counts = active(sparsify(model, 0.8, distribution="erk"))
    assert sum(counts.values()) == pytest.approx((1 - 0.8) * (64 * 64 + 64 * 8), abs=4)
    assert counts["1.weight"] / 512 > counts["0.weight"] / 4096


def test_example_inputs_may_be_one_tensor():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.added = nn.Parameter(torch.randn(4, 4))
            self.multiplied = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ self.multiplied + self.added

    model = sparsify(Table(), example_inputs=torch.randn(4, 4))
    assert list(active(model)) == ["multiplied"]
    assert "no matmul" in resu.controller(model).skipped["added"]


def test_a_wrapped_model_keeps_its_own_compiler():
    model = Mlp()
    wrapped = torch.compile(model, backend="eager")
    assert resu.sparsify(wrapped, 0.5) is wrapped
    assert model._compiled_call_impl is None
    assert resu.controller(wrapped) is resu.controller(model)
    assert wrapped(torch.randn(2, 10)).shape == (2, 6)


def test_under_inference_mode_the_masks_are_for_training_too():
    model = Mlp()
    with torch.inference_mode():
        sparsify(model, 0.5)
        model(torch.randn(2, 10))
    model(torch.randn(2, 10)).sum().backward()
    assert (model.fc1.weight.grad[model.fc1.weight == 0] == 0).all()
    resu.controller(model).prune(0.9)


# -- what is refused, with model and masks as they were ----------------------------------------
def fingerprint(model):
    hooks = [
        (name, list(module._forward_pre_hooks), list(module._forward_hooks))
        for name, module in model.named_modules()
    ]
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    backward = [dict(p._backward_hooks or {}) for p in model.parameters()]
    return hooks, backward, tensors, model._compiled_call_impl


def unchanged(before, model):
    hooks, backward, tensors, call = fingerprint(model)
    assert hooks == before[0]
    assert backward == before[1]
    assert call is before[3]
    assert all(torch.equal(value, before[2][name]) for name, value in tensors.items())


WRONG = [
    ({"sparsity": 1.0}, ArgumentError, "sparsity"),
    ({"sparsity": -0.5}, ArgumentError, "sparsity"),
    ({"sparsity": math.nan}, ArgumentError, "sparsity"),
    ({"sparsity": "70%"}, ArgumentTypeError, "sparsity"),
    ({"sparsity": torch.tensor(0.5)}, ArgumentTypeError, "sparsity"),
    ({"method": "wandaa"}, ArgumentError, "method"),
    ({"scope": "channel"}, ArgumentError, "scope"),
    ({"distribution": "erdos"}, ArgumentError, "distribution"),
    ({"targets": "fc3"}, ArgumentError, "targets"),
    ({"targets": ()}, ArgumentError, "targets"),
    ({"targets": 7}, ArgumentTypeError, "targets"),
    ({"targets": lambda _name, _p: False}, ArgumentError, "targets"),
    ({"exclude": "fc3"}, ArgumentError, "exclude"),
    ({"exclude": "*"}, ArgumentError, "model"),
    ({"overrides": {"fc3": 0.5}}, ArgumentError, "overrides"),
    ({"overrides": {"fc1.bias": 0.5}}, ArgumentError, "overrides"),
    ({"overrides": {"fc1": 1.0}}, ArgumentError, "overrides"),
    ({"overrides": "fc1"}, ArgumentTypeError, "overrides"),
    ({"min_density": 2}, ArgumentError, "min_density"),
    ({"tied": "all"}, ArgumentError, "tied"),
    ({"seed": 0.5}, ArgumentTypeError, "seed"),
    ({"example_inputs": 3}, ArgumentTypeError, "example_inputs"),
    ({"sparse_threshold": 2}, ArgumentError, "sparse_threshold"),
    ({"modes": "default"}, ArgumentError, "unknown compile option 'modes'"),
    ({"options": "fast"}, ArgumentTypeError, "options"),
    ({"options": {"max_autotun": True}}, ArgumentError, "unknown Inductor option 'max_autotun'"),
    ({"mode": "fastest"}, ArgumentError, "mode"),
]


@pytest.mark.parametrize(("arguments", "error", "named"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_argument_is_named_and_changes_nothing(arguments, error, named):
    model = Mlp()
    before = fingerprint(model)
    with pytest.raises(error, match=f"^{named}") as caught:
        resu.sparsify(model, **arguments)
    assert (
        "expected" in str(caught.value)
        or "known" in str(caught.value)
        or "registered" in str(caught.value)
    )
    assert isinstance(caught.value, ResuCompileError)
    unchanged(before, model)
    assert all(masked_weight_of(p) is None for p in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(value):
    model = Mlp()
    with torch.no_grad():
        model.fc2.weight[0, 0] = value
    with pytest.raises(WeightError, match="^fc2.weight: expected finite values"):
        sparsify(model)
    assert not model._forward_hooks
    with torch.no_grad():
        model.fc2.weight[0, 0] = 0.0
    sparsify(model)


def test_a_meta_model_is_refused_with_the_next_step():
    with torch.device("meta"):
        model = Mlp()
    with pytest.raises(WeightError, match=r"^fc1.weight: .* meta device.*to_empty"):
        sparsify(model)
    model.to_empty(device="cpu").load_state_dict(Mlp().state_dict())
    sparsify(model)


@pytest.mark.parametrize(
    "model", [None, "model", Mlp, lambda x: x, [Mlp()]], ids=["none", "text", "class", "fn", "list"]
)
def test_what_is_no_module(model):
    with pytest.raises(ArgumentTypeError, match=r"^model: expected a plain nn.Module, got "):
        resu.sparsify(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_model_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"^model: expected a plain nn.Module"):
        resu.sparsify(torch.jit.script(nn.Linear(3, 3)))


def test_twice_is_refused():
    model = sparsify(Mlp(), 0.5)
    before = fingerprint(model)
    with pytest.raises(PhaseError, match=r"^model: .*prune\(sparsity\) prunes again"):
        sparsify(model, 0.9)
    unchanged(before, model)
    assert active(model) == {"fc1.weight": 60, "fc2.weight": 36}


def test_a_part_or_a_whole_of_a_sparsified_model_is_refused():
    model = sparsify(Mlp(), 0.5)
    with pytest.raises(PhaseError, match="^model: .* weight belongs to the controller"):
        sparsify(model.fc1)
    with pytest.raises(PhaseError, match="^model: .* but 0 has one"):
        sparsify(nn.Sequential(model, nn.Linear(6, 6)))


def test_a_failure_while_masks_are_put_on_is_undone(monkeypatch):
    from resu_compile.state import MaskedWeight

    model = Mlp()
    before = fingerprint(model)
    bind = MaskedWeight.bind

    def out_of_memory(self):
        if self.name == "fc2.weight":
            raise MemoryError
        bind(self)

    monkeypatch.setattr(MaskedWeight, "bind", out_of_memory)
    with pytest.raises(MemoryError):
        sparsify(model)
    monkeypatch.undo()
    unchanged(before, model)
    sparsify(model)
