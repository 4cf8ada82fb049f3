"""What a commit decides: counts, scores, what stays and what starts over."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

import resu_compile as resu
from resu_compile import Phase
from resu_compile.errors import ArgumentError
from resu_compile.runtime.optimizer_state import same_shaped_state
from resu_compile.sparsity import keep_count


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(12, 16)
        self.conv = nn.Conv2d(1, 3, 3)
        self.out = nn.Linear(3 * 4, 5)

    def forward(self, x):
        x = self.wide(x).tanh().view(-1, 1, 4, 4)
        return self.out(self.conv(x).tanh().flatten(1))


def sparse(sparsity=0.5, **arguments):
    model = resu.sparsify(Net(), sparsity, compile=False, **arguments)
    return model, resu.controller(model)


def train(model, optimizer, steps=3, **zero):
    for _ in range(steps):
        model(torch.randn(6, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(**zero)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() > 1}


def begun(model, controller, steps=3, lr=0.05, **options):
    """A resurrection with some theta, and what was before its commit."""
    controller.resurrect(**options).__enter__()
    optimizer = optim.Adam(model.parameters(), lr=lr)
    train(model, optimizer, steps)
    return optimizer, controller.masks, values(model)


# -- quota and ceiling ---------------------------------------------------------------------------
def test_a_quota_is_paid_and_a_ceiling_is_not():
    model, controller = sparse()
    with controller.resurrect(kind="quota", budget=0.5) as phase:
        pass  # theta is 0: nobody has earned a place
    assert phase.report.resurrected == sum(int(0.5 * n) for n in (96, 13, 30))
    model, controller = sparse()
    with controller.resurrect(kind="ceiling", budget=0.5) as phase:
        pass
    assert phase.report.resurrected == 0
    assert phase.report.jaccard == 1.0


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_a_ceiling_lets_the_better_through(margin):
    model, controller = sparse()
    _, masks, before = begun(model, controller, lr=0.3)
    report = controller.commit(budget=1.0, kind="ceiling", margin=margin)
    assert report.resurrected > 0
    for name, new in controller.masks.items():
        back, lost = new & ~masks[name], masks[name] & ~new
        assert int(back.sum()) == int(lost.sum()) == report.weights[name].resurrected
        if back.any():
            assert before[name][back].abs().min() > (1 + margin) * before[name][lost].abs().max()


def test_a_higher_margin_lets_fewer_through():
    back = []
    for margin in (0.0, 1.0, 1e6):
        torch.manual_seed(1)
        model, controller = sparse()
        begun(model, controller, lr=0.3)
        back.append(controller.commit(budget=1.0, kind="ceiling", margin=margin).resurrected)
    assert back[0] > back[1] > back[2] == 0


def test_a_margin_needs_scores_that_are_no_debt():
    model, controller = sparse()
    begun(model, controller)
    with pytest.raises(ArgumentError, match="^score: expected scores >= 0 for wide.weight"):
        controller.commit(kind="ceiling", margin=0.1, score=lambda _name, weight: weight)
    assert controller.phase is Phase.RESU
    controller.commit(kind="ceiling", margin=0.0, score=lambda _name, weight: weight)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kind": "merit"}, "kind"),
        ({"margin": -0.1}, "margin"),
        ({"margin": "big"}, "margin"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": 0.3, "strategy": "merge"}, "sparsity"),
        ({"calibration": [1]}, "calibration"),
        ({"calibration": [1], "strategy": "merge"}, "calibration"),
        ({"calibration": [1], "strategy": "reprune"}, "calibration"),
        ({"score": "wanda"}, "calibration"),
        ({"score": "taste"}, "score"),
    ],
)
def test_a_wrong_argument_leaves_the_phase(arguments, named):
    model, controller = sparse()
    _, masks, before = begun(model, controller)
    with pytest.raises((ArgumentError, TypeError), match=f"^{named}: expected"):
        controller.commit(**arguments)
    assert controller.phase is Phase.RESU
    assert controller.config.sparsity == 0.5
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    assert all(torch.equal(mask, masks[name]) for name, mask in controller.masks.items())


# -- a new sparsity ----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["quota", "ceiling"])
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.8, 0.999])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"distribution": "erk"},
        {"scope": "global"},
        {"overrides": {"conv.weight": 0.25}},
        {"scope": "global", "overrides": {"out.weight": 0.9}},
    ],
    ids=["uniform", "erk", "global", "overrides", "global+overrides"],
)
def test_a_new_sparsity_gives_the_counts_that_pruning_would(arguments, sparsity, kind):
    model, controller = sparse(0.5, **arguments)
    begun(model, controller, lr=0.3)
    state = controller.state_dict()
    before = values(model)
    controller.commit(budget=0.1, sparsity=sparsity, kind=kind)
    counts = {name: weight.nnz for name, weight in controller.weights.items()}
    assert controller.config.sparsity == sparsity
    assert controller.phase is Phase.SPARSE
    controller.load_state_dict(state)
    with torch.no_grad():
        for name, weight in controller.weights.items():
            weight.parameter.copy_(before[name])
    controller.commit(strategy="reprune", sparsity=sparsity)
    assert counts == {name: weight.nnz for name, weight in controller.weights.items()}
    assert counts == {name: int(mask.sum()) for name, mask in controller.masks.items()}


def test_with_more_places_nobody_has_to_leave():
    model, controller = sparse(0.7)
    _, masks, before = begun(model, controller, lr=0.3)
    report = controller.commit(sparsity=0.4, budget=0.1)
    assert report.lost == 0
    for name, new in controller.masks.items():
        back, still = new & ~masks[name], ~new
        assert before[name][back].abs().min() >= before[name][still].abs().max()


def test_with_fewer_places_the_weakest_leave():
    model, controller = sparse(0.4)
    _, masks, before = begun(model, controller)
    report = controller.commit(sparsity=0.8, budget=0.0)
    assert report.resurrected == 0
    for name, new in controller.masks.items():
        lost = masks[name] & ~new
        assert before[name][new].abs().min() >= before[name][lost].abs().max()


@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.floats(0, 0.99),
    st.floats(0, 0.99),
    st.floats(0, 1),
    st.sampled_from(["quota", "ceiling"]),
)
@settings(max_examples=60, deadline=None)
def test_counts_are_exact(shape, sparsity, new_sparsity, budget, kind):
    model = resu.sparsify(nn.Linear(*shape), sparsity, compile=False)
    controller = resu.controller(model)
    (weight,) = controller.weights.values()
    mask = weight.mask
    controller.set_phase("resu")
    with torch.no_grad():
        model.weight.copy_(torch.randn(weight.shape))
    report = controller.commit(budget=budget, kind=kind, sparsity=new_sparsity)
    n_keep = keep_count(weight.numel, new_sparsity)
    assert weight.nnz == report.active == int(weight.mask.sum()) == n_keep
    vacant = max(n_keep - int(mask.sum()), 0)
    most = max(min(int(budget * n_keep), int((~mask).sum())), vacant)
    assert vacant <= report.resurrected <= most
    if kind == "quota":
        assert report.resurrected == most
    assert int((weight.mask & ~mask).sum()) == report.resurrected


def test_reprune_and_merge_take_a_sparsity():
    model, controller = sparse(0.5)
    begun(model, controller)
    controller.commit(strategy="reprune", sparsity=0.25)
    assert controller.sparsity == pytest.approx(0.25, abs=0.01)
    assert controller.config.sparsity == 0.25
    begun(model, controller)
    controller.commit(strategy="merge", sparsity=0.0)
    assert controller.sparsity == controller.config.sparsity == 0.0


# -- weights and optimizer state ---------------------------------------------------------------
@pytest.mark.parametrize("rule", ["optimizer", "adam"])
@pytest.mark.parametrize("freeze_active", [False, True])
@pytest.mark.parametrize("kind", ["quota", "ceiling"])
def test_state_starts_over_but_for_the_survivors(kind, freeze_active, rule):
    model, controller = sparse()
    optimizer = optim.AdamW(model.parameters(), lr=0.3)
    train(model, optimizer)
    masks = controller.masks
    controller.resurrect(rule=rule, freeze_active=freeze_active).__enter__()
    train(model, optimizer)
    before = values(model)
    state = {
        (name, key): value.clone()
        for name, weight in controller.weights.items()
        for key, value in same_shaped_state(optimizer, weight.parameter)
    }
    report = controller.commit(budget=0.5, kind=kind)
    assert report.resurrected > 0
    for name, weight in controller.weights.items():
        survivors = weight.mask & masks[name]
        assert torch.equal(weight.parameter, before[name] * weight.mask)
        found = dict(same_shaped_state(optimizer, weight.parameter))
        assert set(found) == {"exp_avg", "exp_avg_sq"}
        for key, value in found.items():
            assert torch.equal(value, state[name, key] * survivors)
            assert (value[survivors] != 0).any()


@pytest.mark.parametrize("state_first", [True, False])
def test_a_commit_right_after_a_resume_ends_the_same(state_first):
    def step(model, optimizer):
        torch.manual_seed(7)
        train(model, optimizer, 1)

    model, controller = sparse()
    optimizer = optim.Adam(model.parameters(), lr=0.3)
    controller.resurrect(budget=0.5).__enter__()
    train(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), controller.state_dict(), optimizer.state_dict()))
    controller.commit()
    step(model, optimizer)

    other, resumed = sparse()
    later = optim.Adam(other.parameters(), lr=0.3)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    if state_first:
        later.load_state_dict(saved[2])
    resumed.commit()
    if not state_first:
        later.load_state_dict(saved[2])
    step(other, later)
    for name, value in values(model).items():
        assert torch.equal(value, values(other)[name])
        first, second = (
            dict(same_shaped_state(o, m.get_parameter(name)))
            for m, o in ((model, optimizer), (other, later))
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


# -- scores ------------------------------------------------------------------------------------
@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_gradient_score_remembers_what_zero_grad_drops(set_to_none):
    model, controller = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    masks = controller.masks
    controller.resurrect(score="gradient", budget=0.3).__enter__()
    train(model, optimizer, set_to_none=set_to_none)
    model(torch.randn(6, 12)).square().sum().backward()
    grads = {name: weight.parameter.grad.clone() for name, weight in controller.weights.items()}
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    before = values(model)
    controller.commit()
    for name, new in controller.masks.items():
        merit = before[name].abs() * grads[name].abs()
        for group in (masks[name], ~masks[name]):
            inside, outside = merit[group & new], merit[group & ~new]
            assert inside.min() >= outside.max()
        n_keep = int(masks[name].sum())
        assert int((new & ~masks[name]).sum()) == int(0.3 * n_keep)


@pytest.mark.parametrize("rule", ["optimizer", "adam"])
def test_the_gradient_score_knows_every_optimizer(rule):
    found = []
    for kind in (optim.AdamW, resu.optim.AdamW):
        torch.manual_seed(3)
        model, controller = sparse()
        optimizer = kind(model.parameters(), lr=0.05)
        with controller.resurrect(score="gradient", rule=rule, budget=0.3):
            train(model, optimizer)
        found.append(controller.masks)
    for name, mask in found[0].items():
        assert torch.equal(mask, found[1][name])


def test_the_gradient_score_takes_the_gradient_that_is_there():
    model, controller = sparse()
    controller.resurrect().__enter__()
    model(torch.randn(6, 12)).square().sum().backward()
    controller.commit(score="gradient")
    assert controller.phase is Phase.SPARSE


def test_without_a_gradient_the_gradient_score_says_what_to_do():
    model, controller = sparse()
    controller.resurrect(score="gradient").__enter__()
    with pytest.raises(
        ArgumentError, match=r"^score: expected a gradient of wide.weight .* take a step, or"
    ):
        controller.commit()
    assert controller.phase is Phase.RESU
    controller.commit(score="magnitude")
    begun(model, controller)  # magnitude: nothing is remembered
    with pytest.raises(ArgumentError, match="^score: expected a gradient of wide.weight"):
        controller.commit(score="gradient")
    assert controller.resurrection.gradients is None


def test_frozen_weights_have_no_gradient_to_be_scored_by():
    model, controller = sparse()
    with pytest.raises(ArgumentError, match="^score: expected another one than 'gradient'"):
        controller.resurrect(score="gradient", freeze_active=True)
    begun(model, controller, freeze_active=True)
    with pytest.raises(ArgumentError, match="^score: expected another one than 'gradient'"):
        controller.commit(score="gradient")


def test_remembered_gradients_are_saved_and_loaded():
    model, controller = sparse()
    begun(model, controller, score="gradient")
    state, before = controller.state_dict(), values(model)
    controller.commit(budget=0.4)
    other, resumed = sparse()
    resumed.load_state_dict(state)
    with torch.no_grad():
        for name, weight in resumed.weights.items():
            weight.parameter.copy_(before[name])
    resumed.commit(budget=0.4)
    assert all(torch.equal(mask, controller.masks[name]) for name, mask in resumed.masks.items())


def test_the_wanda_score_is_magnitude_times_input_norm():
    model, controller = sparse()
    _, masks, before = begun(model, controller, score="wanda")
    batches = [torch.randn(6, 12) * torch.rand(12) for _ in range(2)]
    seen = {name: [] for name in masks}
    for name in masks:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0]))
    report = controller.commit(calibration=batches, budget=0.4)
    columns = {name: torch.cat(inputs[:2]).detach() for name, inputs in seen.items()}
    patches = nn.functional.unfold(columns["conv.weight"], 3)  # (12, 9, 4)
    columns["conv.weight"] = patches.transpose(1, 2).flatten(0, 1)
    assert report.resurrected > 0
    for name, new in controller.masks.items():
        norm = columns[name].norm(dim=0).view(before[name].shape[1:])
        merit = before[name].abs() * norm
        for group in (masks[name], ~masks[name]):
            assert merit[group & new].min() >= merit[group & ~new].max() * (1 - 1e-5)
        assert int((new & ~masks[name]).sum()) == int(0.4 * masks[name].sum())
    assert all(torch.equal(v, before[n] * controller.masks[n]) for n, v in values(model).items())


def test_wanda_without_a_calibration_that_reaches_all_leaves_the_phase():
    model, controller = sparse()
    controller.resurrect(score="wanda").__enter__()
    for calibration in (None, [], lambda model: model.wide(torch.ones(1, 12))):
        with pytest.raises(ArgumentError):
            controller.commit(calibration=calibration)
        assert controller.phase is Phase.RESU


# -- calibrated methods and patterns -----------------------------------------------------------
def test_reprune_by_a_calibrated_method_takes_its_data():
    batches = [torch.randn(6, 12)]
    model = resu.sparsify(Net(), 0.5, method="wanda", calibration=batches, compile=False)
    controller = resu.controller(model)
    begun(model, controller, lr=0.3, strategy="reprune")
    with pytest.raises(ArgumentError, match="^calibration: expected data for method 'wanda'"):
        controller.commit()
    assert controller.phase is Phase.RESU
    report = controller.commit(calibration=batches)
    assert report.resurrected > 0
    assert (controller.masks["wide.weight"].sum(1) == 6).all()  # each output keeps its half


def test_a_pattern_stays_a_pattern():
    model = resu.sparsify(nn.Sequential(nn.Linear(12, 16)), pattern="2:4", compile=False)
    controller = resu.controller(model)
    controller.resurrect(strategy="reprune").__enter__()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(16, 12))
    with pytest.raises(ArgumentError, match="^sparsity: expected None or 0.5"):
        controller.commit(sparsity=0.25)
    assert controller.commit().resurrected > 0
    assert (controller.masks["0.weight"].view(-1, 4).sum(1) == 2).all()


# -- ever active -------------------------------------------------------------------------------
def test_the_share_ever_active_is_the_or_of_all_masks():
    model, controller = sparse(0.6)
    ever = controller.masks
    shares = []
    for round_ in range(4):
        begun(model, controller, lr=0.2)
        if round_ == 2:
            controller.abandon()
            report = controller.prune(0.5)
        else:
            report = controller.commit(budget=0.3)
        ever = {name: mask | controller.masks[name] for name, mask in ever.items()}
        for name, row in report.weights.items():
            assert row.ever_active == int(ever[name].sum())
        shares.append(report.ever_share)
    total = sum(mask.numel() for mask in ever.values())
    assert shares[-1] == sum(int(mask.sum()) for mask in ever.values()) / total
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]
