import copy
import gc
import io
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

import resu_compile as resu
from resu_compile import Phase
from resu_compile.errors import (
    ArgumentError,
    ArgumentTypeError,
    NotSparsifiedError,
    PhaseError,
    ResuCompileError,
    WeightError,
)
from resu_compile.runtime.optimizer_state import same_shaped_state
from resu_compile.state import masked_weight_of


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 10)
        self.fc2 = nn.Linear(10, 4)

    def forward(self, x):
        return self.fc2(self.fc1(x).tanh())


def sparse(sparsity=0.5, model=None, **arguments):
    model = resu.sparsify(model or Mlp(), sparsity, compile=False, **arguments)
    return model, resu.controller(model)


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 8)).square().sum().backward()
        optimizer.step()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 2}


def state_of(optimizer, model):
    return {
        (name, key): value.clone()
        for name, p in model.named_parameters()
        if p.dim() == 2
        for key, value in same_shaped_state(optimizer, p)
    }


# -- reaching it -------------------------------------------------------------------------------
def test_a_plain_model_has_none():
    with pytest.raises(
        NotSparsifiedError, match=r"^model: expected a sparsified model, got a plain Mlp"
    ):
        resu.controller(Mlp())
    model, _ = sparse()
    with pytest.raises(NotSparsifiedError, match="reached through its root"):
        resu.controller(model.fc1)


@pytest.mark.parametrize("model", [None, Mlp, "model"])
def test_what_is_no_module(model):
    with pytest.raises(ArgumentTypeError, match="^model: expected an nn.Module"):
        resu.controller(model)


def test_masks_are_copies():
    _, controller = sparse()
    controller.masks["fc1.weight"].fill_(True)
    assert controller.weights["fc1.weight"].nnz == int(controller.masks["fc1.weight"].sum()) == 40
    assert controller.sparsity == 0.5


# -- phases ------------------------------------------------------------------------------------
def test_phases_and_what_they_allow():
    model, controller = sparse()
    assert controller.phase is Phase.SPARSE
    assert controller.phase == "sparse"
    controller.set_phase("sparse")
    controller.set_phase(Phase.DENSE)
    assert controller.phase is Phase.DENSE
    with pytest.raises(PhaseError, match="^resurrect: expected phase sparse, got dense"):
        controller.set_phase("resu")
    controller.set_phase("sparse")
    controller.set_phase("resu")
    controller.set_phase("resu")
    for target in ("dense", "sparse"):
        with pytest.raises(PhaseError, match="^set_phase: .* resurrection is running"):
            controller.set_phase(target)
    assert controller.phase is Phase.RESU


@pytest.mark.parametrize("phase", ["warm", "", None, 3, "SPARSE"])
def test_an_unknown_phase(phase):
    _, controller = sparse()
    with pytest.raises(ArgumentError, match="^phase: expected one of dense, sparse, resu; got "):
        controller.set_phase(phase)


def test_the_dense_phase_is_dense_training():
    model, controller = sparse()
    plain = Mlp()
    plain.load_state_dict(model.state_dict())
    controller.set_phase("dense")
    first, second = (optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.1) for m in (model, plain))
    for seed in range(3):
        for m, o in ((model, first), (plain, second)):
            torch.manual_seed(seed)
            train(m, o, 1)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )


def test_back_from_dense_the_zeros_return_with_those_of_the_state():
    model, controller = sparse()
    optimizer = optim.Adam(model.parameters(), lr=0.05)
    masks = controller.masks
    controller.set_phase("dense")
    train(model, optimizer)
    before, state = weights(model), state_of(optimizer, model)
    assert all((w != 0).all() for w in before.values())
    controller.set_phase("sparse")
    for name, value in weights(model).items():
        assert torch.equal(value, before[name].where(masks[name], torch.zeros(())))
    for (name, key), value in state_of(optimizer, model).items():
        assert torch.equal(value, state[name, key].where(masks[name], torch.zeros(())))


# -- prune -------------------------------------------------------------------------------------
def test_pruning_further_only_takes_away():
    model, controller = sparse(0.5)
    optimizer = optim.Adam(model.parameters(), lr=0.05)
    train(model, optimizer)
    masks, before, state = controller.masks, weights(model), state_of(optimizer, model)
    report = controller.prune(0.8)
    assert report.resurrected == 0
    assert report.active == sum(int((1 - 0.8) * m.numel()) for m in masks.values())
    for name, mask in controller.masks.items():
        assert not (mask & ~masks[name]).any()
        assert torch.equal(weights(model)[name], before[name].where(mask, torch.zeros(())))
    for (name, key), value in state_of(optimizer, model).items():
        expected = state[name, key].where(controller.masks[name], torch.zeros(()))
        assert torch.equal(value, expected)


def test_pruning_less_brings_zeros_back():
    model, controller = sparse(0.8)
    before = weights(model)
    report = controller.prune(0.5)
    assert report.lost == 0
    assert controller.sparsity == 0.5
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 1)
    for name, mask in controller.masks.items():
        assert (weights(model)[name][mask & (before[name] == 0)] != 0).any()


def test_pruning_to_zero_and_almost_one():
    model, controller = sparse(0.5)
    controller.prune(0.999)
    assert [w.nnz for w in controller.weights.values()] == [0, 0]
    assert controller.sparsity == 1.0
    controller.prune(0)
    assert controller.sparsity == 0.0
    assert model(torch.randn(2, 8)).shape == (2, 4)


def test_from_the_dense_phase_all_compete_and_the_kept_keep_their_state():
    model, controller = sparse(0.5)
    optimizer = optim.Adam(model.parameters(), lr=0.05)
    controller.set_phase("dense")
    train(model, optimizer)
    before, state = weights(model), state_of(optimizer, model)
    old = controller.masks
    controller.prune(0.5)
    assert controller.phase is Phase.SPARSE
    for name, mask in controller.masks.items():
        assert before[name].abs()[mask].min() >= before[name].abs()[~mask].max()
    assert any((mask & ~old[name]).any() for name, mask in controller.masks.items())
    for (name, key), value in state_of(optimizer, model).items():
        expected = state[name, key].where(controller.masks[name], torch.zeros(()))
        assert torch.equal(value, expected)


def test_prune_remembers_what_it_was_told():
    _, controller = sparse(0.5)
    controller.prune(0.7, scope="global", min_density=0.1)
    assert controller.config.scope == "global"
    controller.prune()
    assert sum(w.nnz for w in controller.weights.values()) == int((1 - 0.7) * 120)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": "a"}, "sparsity"),
        ({"method": "rgl"}, "method"),
        ({"overrides": {"fc3": 0.1}}, "overrides"),
        ({"overrides": {"fc1.bias": 0.1}}, "overrides"),
        ({"scope": "global", "distribution": "erk"}, "distribution"),
        ({"targets": "fc1"}, "unknown argument of prune 'targets'"),
    ],
)
def test_a_wrong_argument_of_prune_changes_nothing(arguments, named):
    model, controller = sparse()
    before, config, masks = weights(model), controller.config, controller.masks
    with pytest.raises(ResuCompileError, match=f"^{named}"):
        controller.prune(**arguments)
    assert controller.config is config
    assert all(torch.equal(mask, masks[name]) for name, mask in controller.masks.items())
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_pruning_a_weight_that_became_nan_changes_nothing():
    model, controller = sparse()
    masks = controller.masks
    with torch.no_grad():
        model.fc2.weight[controller.masks["fc2.weight"]] = float("nan")
    with pytest.raises(WeightError, match="^fc2.weight: expected finite"):
        controller.prune(0.9)
    assert all(torch.equal(mask, masks[name]) for name, mask in controller.masks.items())


def test_an_alias_goes_on_naming_its_weight():
    model = Mlp()
    model.other = nn.Linear(8, 10)
    model.other.weight = model.fc1.weight
    _, controller = sparse(0.5, model, tied="mask_all", overrides={"other": 0.9})
    assert controller.weights["fc1.weight"].nnz == int((1 - 0.9) * 80)
    controller.prune(0.5)
    assert controller.weights["fc1.weight"].nnz == int((1 - 0.9) * 80)


# -- resurrect, commit, abandon ----------------------------------------------------------------
def test_leaving_the_block_commits():
    model, controller = sparse()
    optimizer = optim.Adam(model.parameters(), lr=0.05)
    masks = controller.masks
    with controller.resurrect(lr=0.1, budget=0.2) as phase:
        assert controller.phase is Phase.RESU
        with pytest.raises(PhaseError, match="^report: expected a committed phase"):
            _ = phase.report
        train(model, optimizer)
        theta = weights(model)
    assert controller.phase is Phase.SPARSE
    for name, row in phase.report.weights.items():
        mask, n_keep = controller.masks[name], int(masks[name].sum())
        assert int(mask.sum()) == row.active == n_keep
        assert row.resurrected == int((mask & ~masks[name]).sum()) == int(0.2 * n_keep)
        assert torch.equal(weights(model)[name], theta[name].where(mask, torch.zeros(())))


def test_commit_leaves_survivors_and_zeroes_the_state_of_the_rest():
    model, controller = sparse()
    optimizer = optim.Adam(model.parameters(), lr=0.05)
    masks = controller.masks
    with controller.resurrect(rule="optimizer", budget=0.3):
        train(model, optimizer)
        state = state_of(optimizer, model)
    for (name, key), value in state_of(optimizer, model).items():
        survivors = controller.masks[name] & masks[name]
        assert torch.equal(value, state[name, key].where(survivors, torch.zeros(())))
        assert (value[survivors] != 0).any()


@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.floats(0, 0.999),
    st.floats(0, 1),
    st.sampled_from(["equal", "random", "zero"]),
)
@settings(max_examples=60, deadline=None)
def test_amnesty_counts_are_exact(shape, sparsity, budget, theta):
    model, controller = sparse(sparsity, nn.Linear(*shape))
    (weight,) = controller.weights.values()
    mask, n_keep = weight.mask, weight.nnz
    controller.set_phase("resu")
    if theta != "zero":
        with torch.no_grad():
            value = torch.ones_like(model.weight) if theta == "equal" else torch.randn(weight.shape)
            model.weight.copy_(value)
    report = controller.commit(budget=budget)
    n_pruned = weight.numel - n_keep
    assert weight.nnz == n_keep == report.active
    assert (
        report.resurrected
        == int((weight.mask & ~mask).sum())
        == min(int(budget * n_keep), n_pruned)
    )


def test_merge_keeps_all():
    model, controller = sparse()
    optimizer = optim.Adam(model.parameters(), lr=0.05)
    masks = controller.masks
    controller.resurrect(strategy="merge").__enter__()
    train(model, optimizer)
    before = weights(model)
    report = controller.commit()
    assert report.strategy == "merge"
    assert controller.sparsity == 0.0
    assert report.resurrected == sum(int((~m).sum()) for m in masks.values())
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    for (name, _), value in state_of(optimizer, model).items():
        assert (value[~masks[name]] == 0).all()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_reprune_lets_all_compete(scope):
    model, controller = sparse(0.5, scope=scope)
    controller.resurrect().__enter__()
    train(model, optim.Adam(model.parameters(), lr=0.5))
    before = weights(model)
    controller.commit(strategy="reprune")
    assert controller.sparsity == 0.5
    if scope == "layer":
        for name, mask in controller.masks.items():
            assert before[name].abs()[mask].min() >= before[name].abs()[~mask].max()


def test_reprune_after_from_zeros_keeps_the_share_that_was_found():
    model = Mlp()
    with torch.no_grad():
        model.fc1.weight[:4] = 0
    _, controller = sparse(0.9, model, from_zeros=True)
    controller.set_phase("resu")
    train(model, optim.Adam(model.parameters(), lr=0.5))
    controller.commit(strategy="reprune")
    assert controller.sparsity == pytest.approx(32 / 120, abs=0.02)


@pytest.mark.parametrize("init", ["zero", "normal", "uniform"])
@pytest.mark.parametrize("rule", ["adam", "sgd", "optimizer"])
def test_abandon_is_a_bit_exact_rollback_when_frozen(rule, init):
    model, controller = sparse()
    optimizer = optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    train(model, optimizer)
    before, state = weights(model), state_of(optimizer, model)
    controller.resurrect(rule=rule, init=init, freeze_active=True).__enter__()
    train(model, optimizer)
    controller.abandon()
    assert controller.phase is Phase.SPARSE
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    found = state_of(optimizer, model)
    assert all(torch.equal(value, state[key]) for key, value in found.items())


def test_a_score_of_ones_own():
    model, controller = sparse()
    masks = controller.masks
    seen = []

    def score(name, weight):
        assert not torch.is_grad_enabled()
        seen.append(name)
        return torch.arange(weight.numel()).view(weight.shape).flip(0)

    with controller.resurrect(budget=1.0, score=score):
        pass
    assert seen == list(masks)
    for name, mask in controller.masks.items():
        n = int(masks[name].sum())
        assert int((mask & ~masks[name]).sum()) == min(n, int((~masks[name]).sum()))


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (lambda _n, _w: 1.0, "got 1.0"),
        (lambda _n, w: w[0], r"got \(8,\)"),
        (lambda _n, w: w * float("nan"), "NaN or infinity"),
    ],
)
def test_a_wrong_score_leaves_the_phase_as_it_was(score, text):
    model, controller = sparse()
    controller.resurrect(init="normal").__enter__()
    before, masks = weights(model), controller.masks
    with pytest.raises(ArgumentError, match=f"^score: expected .* fc1.weight.*{text}"):
        controller.commit(score=score)
    assert controller.phase is Phase.RESU
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert all(torch.equal(mask, masks[name]) for name, mask in controller.masks.items())
    controller.commit()


@pytest.mark.parametrize("strategy", ["amnesty", "merge", "reprune"])
def test_committing_nan_names_the_weight(strategy):
    model, controller = sparse()
    controller.resurrect().__enter__()
    with torch.no_grad():
        model.fc2.weight[0, 0] = float("inf")
    with pytest.raises(WeightError, match="^fc2.weight: expected finite"):
        controller.commit(strategy=strategy)
    assert controller.phase is Phase.RESU
    controller.abandon()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"budget": 1.5}, "budget"),
        ({"budget": "all"}, "budget"),
        ({"score": "taste"}, "score"),
        ({"strategy": "all"}, "strategy"),
    ],
)
def test_a_wrong_argument_of_commit_leaves_the_phase(arguments, named):
    _, controller = sparse()
    controller.set_phase("resu")
    with pytest.raises(ResuCompileError, match=f"^{named}: expected"):
        controller.commit(**arguments)
    assert controller.phase is Phase.RESU


@pytest.mark.parametrize("call", ["commit", "abandon"])
@pytest.mark.parametrize("phase", ["dense", "sparse"])
def test_commit_and_abandon_need_a_resurrection(call, phase):
    _, controller = sparse()
    controller.set_phase(phase)
    with pytest.raises(PhaseError, match=f"^{call}: expected phase resu, got {phase}"):
        getattr(controller, call)()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"lr": -1}, "lr"),
        ({"rule": "lion"}, "rule"),
        ({"warmup": 3}, "unknown argument of resurrect 'warmup'"),
        ({"epss": 3}, r"unknown argument of resurrect 'epss' \(did you mean 'eps'"),
    ],
)
def test_a_wrong_argument_of_resurrect_begins_nothing(arguments, named):
    _, controller = sparse()
    with pytest.raises(ResuCompileError, match=f"^{named}"):
        controller.resurrect(**arguments)
    assert controller.phase is Phase.SPARSE


def test_resurrect_inside_resurrect():
    model, controller = sparse()
    optimizer = optim.Adam(model.parameters())
    theta = {}

    def nested():
        with controller.resurrect(lr=0.1):
            train(model, optimizer)
            theta.update(weights(model))
            with controller.resurrect():
                pass

    with pytest.raises(PhaseError, match="^resurrect: expected phase sparse, got resu"):
        nested()
    assert controller.phase is Phase.RESU
    assert all(torch.equal(value, theta[name]) for name, value in weights(model).items())
    controller.commit()


def test_an_exception_in_the_block_keeps_theta():
    model, controller = sparse()
    masks = controller.masks
    phase = controller.resurrect(init="normal")
    theta = {}

    def interrupted():
        with phase:
            theta.update(weights(model))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert controller.phase is Phase.RESU
    assert all(torch.equal(value, theta[name]) for name, value in weights(model).items())
    assert all(torch.equal(mask, masks[name]) for name, mask in controller.masks.items())
    controller.commit(budget=0.5)
    assert phase.report.resurrected == 30


def test_a_commit_inside_of_the_block_is_the_one_reported():
    _, controller = sparse()
    with controller.resurrect(init="normal", budget=0.0) as phase:
        report = controller.commit(budget=0.5)
    assert phase.report is report
    assert report.resurrected == 30


def test_another_resurrection_begun_inside_of_the_block_is_not_committed():
    _, controller = sparse()
    with controller.resurrect():
        controller.abandon()
        controller.set_phase("resu")
    assert controller.phase is Phase.RESU


def test_prune_and_release_wait_for_the_end_of_a_resurrection():
    model, controller = sparse()
    controller.set_phase("resu")
    with pytest.raises(PhaseError, match="^prune: expected phase dense or sparse, got resu"):
        controller.prune(0.9)
    with pytest.raises(PhaseError, match="^release: expected phase dense or sparse, got resu"):
        controller.release()
    assert resu.controller(model) is controller


# -- release -----------------------------------------------------------------------------------
@pytest.mark.parametrize("phase", ["sparse", "dense"])
def test_release_leaves_a_plain_model(phase):
    plain = Mlp()
    kind, keys = type(plain), list(plain.state_dict())
    model, controller = sparse(0.5, plain)
    x = torch.randn(3, 8)
    controller.set_phase(phase)
    expected = model(x)
    assert controller.release() is model
    assert type(model) is kind
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert model._compiled_call_impl is None
    for parameter in model.parameters():
        assert masked_weight_of(parameter) is None
        assert not parameter._backward_hooks
        assert not parameter._post_accumulate_grad_hooks
    assert set(vars(model)) == set(vars(Mlp()))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 1)
    assert all((w != 0).all() for w in weights(model).values())
    resu.sparsify(model, 0.5, compile=False)


def test_release_folds_what_was_loaded_last():
    model, controller = sparse()
    masks = controller.masks
    model.load_state_dict(Mlp().state_dict())
    controller.release()
    assert all((value[~masks[name]] == 0).all() for name, value in weights(model).items())


def test_a_released_controller_says_so():
    _, controller = sparse()
    controller.release()
    with pytest.raises(NotSparsifiedError, match="released"):
        controller.release()


def test_a_controller_whose_model_is_gone_says_so():
    model, controller = sparse()
    del model
    gc.collect()
    with pytest.raises(NotSparsifiedError, match="it is gone"):
        _ = controller.model


def test_release_takes_the_compiled_call_away():
    model = nn.Linear(4, 4)
    resu.sparsify(model, 0.5)
    assert model._compiled_call_impl is not None
    resu.controller(model).release()
    assert model._compiled_call_impl is None


def test_release_keeps_a_compiled_call_of_the_users_own():
    model, controller = sparse()
    model.compile(backend="eager")
    call = model._compiled_call_impl
    controller.release()
    assert model._compiled_call_impl is call


def test_a_compiled_model_is_freed():
    model = nn.Linear(4, 4)
    resu.sparsify(model, 0.5)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# -- state -------------------------------------------------------------------------------------
def round_trip(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def in_phase(phase, **options):
    model, controller = sparse()
    if phase == "resu":
        controller.resurrect(**options).__enter__()
        train(model, optim.Adam(model.parameters()))
    else:
        controller.set_phase(phase)
    return model, controller


@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
def test_state_round_trips_through_weights_only(phase):
    _, controller = in_phase(phase, budget=0.3, rule="adam", storage="compact", init="uniform")
    state = round_trip(controller.state_dict())
    torch.manual_seed(1)
    _, other = sparse(0.9)
    other.load_state_dict(state)
    assert other.phase == phase
    for name, mask in controller.masks.items():
        assert torch.equal(mask, other.masks[name])
    assert torch.equal(other.generator.get_state(), controller.generator.get_state())
    again = other.state_dict()
    assert again.keys() == state.keys()
    if phase == "resu":
        assert other.resurrection.config == controller.resurrection.config
        first, second = (s["resurrection"]["states"]["fc1.weight"] for s in (state, again))
        assert first["step"] == second["step"] == 3
        assert torch.equal(first["buffers"]["exp_avg"], second["buffers"]["exp_avg"])


def test_state_is_a_copy():
    model, controller = in_phase("resu", rule="adam", storage="compact")
    state = controller.state_dict()
    kept = copy.deepcopy(state)
    train(model, optim.Adam(model.parameters()))
    controller.commit(budget=0.5)
    assert torch.equal(state["masks"]["fc1.weight"], kept["masks"]["fc1.weight"])
    first, second = (s["resurrection"]["states"]["fc1.weight"] for s in (state, kept))
    assert torch.equal(first["buffers"]["exp_avg"], second["buffers"]["exp_avg"])


def broken(change):
    _, controller = sparse()
    state = controller.state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (None, "got None"),
        ({}, r"got keys \[\]"),
        (lambda: Mlp().state_dict(), "got keys .*fc1.bias"),
        (lambda: broken(lambda s: s.pop("generator")), "got keys"),
        (lambda: broken(lambda s: s.update(version=99)), "expected version 1, got 99"),
        (lambda: broken(lambda s: s["masks"].pop("fc1.weight")), r"missing \['fc1.weight'\]"),
        (lambda: broken(lambda s: s["masks"].update(x=0)), r"unexpected \['x'\]"),
        (lambda: broken(lambda s: s["shapes"].update({"fc2.weight": [10, 4]})), r"got \(10, 4\)"),
        (
            lambda: broken(lambda s: s["masks"].update({"fc2.weight": torch.zeros(3).byte()})),
            "expected 5 bytes of mask for fc2.weight",
        ),
        (lambda: broken(lambda s: s.update(phase="warm")), "phase"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(state, text):
    model, controller = sparse(0.7)
    masks, before = controller.masks, weights(model)
    state = state() if callable(state) else state
    with pytest.raises(ArgumentError, match=f"^state: .*{text}"):
        controller.load_state_dict(state)
    assert all(torch.equal(mask, masks[name]) for name, mask in controller.masks.items())
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert controller.phase is Phase.SPARSE


def test_a_resumed_phase_asks_for_its_score_function():
    _, controller = in_phase("resu", score=lambda _n, w: w.abs())
    _, other = sparse()
    other.load_state_dict(round_trip(controller.state_dict()))
    twice = round_trip(other.state_dict())
    other.load_state_dict(twice)
    with pytest.raises(ArgumentError, match="^score: .* begun with a function"):
        other.commit()
    other.commit(score="magnitude")


@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
def test_loading_its_own_state_again_changes_nothing(phase):
    model, controller = in_phase(phase)
    before, masks = weights(model), controller.masks
    controller.load_state_dict(controller.state_dict())
    model(torch.randn(2, 8))
    assert controller.phase == phase
    assert all(torch.equal(mask, masks[name]) for name, mask in controller.masks.items())
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
