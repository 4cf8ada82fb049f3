"""A cycle in a user's own loop: what holds at each border of the plan, and in between."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.config import ResurrectionConfig
from resu_compile.errors import ArgumentError, ArgumentTypeError, WeightError
from resu_compile.phase import Phase
from resu_compile.runtime.controller import find_controller
from resu_compile.sparsity import keep_count
from resu_compile.training import Cycle, CycleShares, Densification, Pause, Stage
from tests.training.models import config, drive, loss_fn, make_batches, make_model

SIZES = {"0.weight": 128, "3.weight": 64}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def counts(cycle: Cycle) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in cycle.controller.masks.items()}


def expected_counts(sparsity: float) -> dict[str, int]:
    return {name: keep_count(size, sparsity) for name, size in SIZES.items()}


def test_every_step_has_the_phase_and_the_counts_of_its_span():
    model, batches = make_model(), make_batches()
    cycle, optimizer = Cycle(model, config()), optimizer_of(model)
    cycle.start()
    phases = []
    while not cycle.done:
        span, step = cycle.span, cycle.step_index
        assert span.start <= step < span.stop
        phases.append(str(cycle.controller.phase))
        if span.sparsity:
            assert counts(cycle) == expected_counts(span.sparsity)
        loss_fn(model, batches[step % 7]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if cycle.controller.phase is Phase.SPARSE:
            for name, mask in cycle.controller.masks.items():
                weight = model.get_parameter(name)
                assert torch.equal(weight[~mask], torch.zeros_like(weight[~mask]))
                assert weight[mask].ne(0).all()
        cycle.step()
    assert phases == (
        ["dense"] * 9
        + (["sparse"] * 2 + ["resu"] * 2 + ["sparse"] * 5) * 2
        + ["sparse"] * 2
        + ["resu"] * 2
        + ["sparse"] * 9
    )
    assert cycle.finish() is model
    assert cycle.controller.sparsity == 0.75


def test_history_holds_the_budgets_that_were_used():
    model = make_model()
    cycle = Cycle(model, config())
    drive(model, cycle, make_batches())
    assert [(s.cycle, s.step, s.sparsity) for s in cycle.history] == [
        (0, 13, 0.25),
        (1, 22, 0.5),
        (2, 31, 0.75),
    ]
    assert [s.budget for s in cycle.history] == pytest.approx([0.3, 0.2, 0.1])
    for stats in cycle.history:
        for name, size in SIZES.items():
            kept = keep_count(size, stats.sparsity)
            row = stats.commit["weights"][name]
            # a quota: filled as far as there are pruned places
            assert row["resurrected"] == min(int(stats.budget * kept), size - kept)
            assert row["active"] == kept
            assert stats.prune["weights"][name]["active"] == kept


def test_events_come_at_the_borders():
    model = make_model()
    events = []
    cycle = Cycle(model, config(), on_event=events.append)
    drive(model, cycle, make_batches())
    assert [(event.kind, event.step, event.cycle) for event in events] == [
        ("prune", 9, 0),
        ("commit", 13, 0),
        ("prune", 18, 1),
        ("commit", 22, 1),
        ("prune", 27, 2),
        ("commit", 31, 2),
    ]
    assert events[1].report.as_dict() == cycle.history[0].commit


def test_theta_is_trained_as_the_config_says():
    model = make_model()
    theta = ResurrectionConfig(lr=0.1, rule="sgd", init="normal", eps=0.5, freeze_active=True)
    cycle, batches = Cycle(model, config(resurrection=theta)), make_batches()
    optimizer = optimizer_of(model)
    cycle.start()
    while cycle.stage is not Stage.RESU:
        loss_fn(model, batches[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        cycle.step()
    running = cycle.controller.resurrection.config
    assert running == ResurrectionConfig(
        lr=0.1, rule="sgd", init="normal", eps=0.5, freeze_active=True, budget=0.3
    )
    mask = cycle.controller.masks["0.weight"]
    before = model[0].weight.detach().clone()
    assert before[~mask].ne(0).all()  # noise
    loss_fn(model, batches[0]).backward()
    optimizer.step()
    assert torch.equal(model[0].weight[mask], before[mask])
    assert not torch.equal(model[0].weight[~mask], before[~mask])


def test_a_ceiling_takes_the_margin_of_its_cycle():
    model = make_model()
    theta = ResurrectionConfig(kind="ceiling", margin=0.4)
    found = []

    class Watch(Cycle):
        def _leave(self, span, **options):
            if self.controller.phase is Phase.RESU:
                running = self.controller.resurrection.config
                found.append((running.kind, running.budget, running.margin))
            super()._leave(span, **options)

    cycle = Watch(model, config(resurrection=theta, margin_end=0.0))
    drive(model, cycle, make_batches())
    assert found == [("ceiling", b, m) for b, m in zip(cycle.budgets, cycle.margins, strict=True)]
    assert cycle.margins == pytest.approx((0.4, 0.2, 0.0))


def test_without_warm_up_and_recovery_the_last_act_is_the_commit():
    model = make_model()
    cycle = Cycle(model, config(warmup=0.0, recovery=0.0, initial_sparsity=0.2, steps=27))
    assert cycle.controller.phase is Phase.DENSE
    cycle.start()
    assert counts(cycle) == expected_counts(0.2)
    assert cycle.start() is cycle
    drive(model, cycle, make_batches())
    assert cycle.controller.phase is Phase.SPARSE
    assert cycle.history[-1].step == 27
    assert counts(cycle) == expected_counts(0.75)


def test_without_a_resu_stage_it_is_gradual_pruning():
    model = make_model()
    events = []
    cycle = Cycle(model, config(cycle=CycleShares(2, 1, 0)), on_event=events.append)
    drive(model, cycle, make_batches())
    assert [event.kind for event in events] == ["prune"] * 3
    assert [stats.commit for stats in cycle.history] == [None] * 3
    assert counts(cycle) == expected_counts(0.75)


def test_a_merging_commit_is_pruned_again_before_the_next_stage():
    model = make_model()
    cycle = Cycle(
        model, config(schedule="constant", resurrection=ResurrectionConfig(strategy="merge"))
    )
    drive(model, cycle, make_batches())
    assert [stats.sparsity for stats in cycle.history] == [0.0, 0.0, 0.0]
    assert counts(cycle) == expected_counts(0.75)


def test_overrides_grow_with_the_sparsity():
    model = make_model()
    cycle = Cycle(model, config(overrides={"3.*": 0.5}))
    found = []
    cycle._on_event = lambda event: found.append(counts(cycle)) if event.kind == "prune" else None
    drive(model, cycle, make_batches())
    assert [count["3.weight"] for count in found] == [
        keep_count(64, 0.5 * s / 0.75) for s in (0.25, 0.5, 0.75)
    ]
    assert found[-1]["0.weight"] == 32


def test_method_targets_and_seed_reach_the_controller():
    masks = []
    for seed in (3, 3, 4):
        model = make_model()
        cycle = Cycle(model, config(method="random", targets=("0.weight",), seed=seed))
        assert list(cycle.controller.weights) == ["0.weight"]
        drive(model, cycle, make_batches())
        masks.append(cycle.controller.masks["0.weight"])
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_a_sparsified_model_keeps_its_controller():
    model = make_model()
    resu.sparsify(model, sparsity=0.5, targets="0.weight", compile=False)
    before = resu.controller(model)
    cycle = Cycle(model, config())
    assert cycle.controller is before
    drive(model, cycle, make_batches())
    assert {name: int(m.sum()) for name, m in before.masks.items()} == {"0.weight": 32}


HIDDEN = ResurrectionConfig(hidden=True, strategy="open")
RESU = CycleShares(0.0, 0.0, 1.0)


@pytest.mark.parametrize("strategy", ["open", "amnesty", "reprune"])
def test_hidden_theta_goes_on_from_cycle_to_cycle(strategy):
    """One resurrection, whose tournaments prune for the next cycle as well."""
    model, batches, events = make_model(), make_batches(), []
    theta = replace(HIDDEN, strategy=strategy)
    cycle = Cycle(
        model,
        config(resurrection=theta, cycle=RESU, overrides={"3.*": 0.5}),
        on_event=events.append,
    )
    optimizer = optimizer_of(model)
    cycle.start()
    while not cycle.done:
        controller, span = cycle.controller, cycle.span
        running = controller.resurrection
        if running is not None:
            assert running.config.budget == cycle.budgets[span.cycle]
            assert counts(cycle)["3.weight"] == keep_count(64, 0.5 * span.sparsity / 0.75)
            assert controller.sparsity == pytest.approx(
                (span.sparsity * 128 + 0.5 * span.sparsity / 0.75 * 64) / 192, abs=0.01
            )
        before = None if running is None else (running.hidden.values(), controller.masks)
        loss_fn(model, batches[cycle.step_index % 7]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if before is not None:
            values = running.hidden.values()
            assert any((values[name] != theta).any() for name, theta in before[0].items())
            before = (values, controller.masks)
        cycle.step()
        if before is not None and controller.resurrection is not None:
            assert controller.resurrection is running
            for name, theta in running.hidden.values().items():
                stay = ~before[1][name] & ~controller.masks[name]
                assert torch.equal(theta[stay], before[0][name][stay])
                assert (theta[~stay] == 0).all()
    assert [(event.kind, event.cycle) for event in events] == [
        ("prune", 0),
        ("commit", 0),
        ("commit", 1),
        ("commit", 2),
    ]
    assert [stats.prune is None for stats in cycle.history] == [False, True, True]
    assert cycle.history[-1].sparsity == pytest.approx((0.75 * 128 + 0.5 * 64) / 192, abs=0.01)
    cycle.finish()
    for name, mask in cycle.controller.masks.items():
        assert (model.get_parameter(name)[~mask] == 0).all()


@pytest.mark.parametrize("stop", [12, 13, 20])
def test_a_run_that_ends_early_hides_nothing(stop):
    model = make_model()
    cycle = Cycle(model, config(resurrection=HIDDEN, cycle=RESU))
    drive(model, cycle, make_batches(), stop=stop)
    assert cycle.controller.phase is Phase.RESU
    assert cycle.finish() is model
    assert cycle.controller.phase is Phase.SPARSE
    assert counts(cycle) == expected_counts(cycle.span.sparsity)


def test_a_schedule_may_be_dense_in_between():
    model, settings = make_model(), {"cycles": 4, "schedule": (0.5, 0.0, 0.0, 0.75)}
    cycle = Cycle(model, config(resurrection=HIDDEN, cycle=RESU, **settings))
    drive(model, cycle, make_batches())
    assert counts(cycle) == expected_counts(0.75)


def test_merged_theta_leaves_nothing_to_go_on():
    model, events = make_model(), []
    theta = ResurrectionConfig(hidden=True, strategy="merge")
    settings = config(resurrection=theta, cycle=RESU)
    drive(model, Cycle(model, settings, on_event=events.append), make_batches())
    assert [event.kind for event in events][:4] == ["prune", "commit"] * 2


def test_between_other_stages_hidden_theta_begins_anew():
    model, events = make_model(), []
    cycle = Cycle(model, config(resurrection=HIDDEN), on_event=events.append)
    drive(model, cycle, make_batches())
    assert [event.kind for event in events] == ["prune", "commit"] * 3


@pytest.mark.parametrize("strategy", ["amnesty", "merge", "reprune", "open"])
def test_a_pattern_holds_from_the_first_pruning_on(strategy):
    model = make_model()
    settings = config(
        pattern="2:4",
        sparsity=0.5,
        schedule="constant",
        resurrection=ResurrectionConfig(strategy=strategy),
    )
    cycle = Cycle(model, settings)
    kept = []

    def look(_event):
        kept.extend(m.unflatten(1, (-1, 4)).sum(2) for m in cycle.controller.masks.values())

    cycle._on_event = look
    drive(model, cycle, make_batches())
    assert len(kept) == 2 * 4  # one pruning, three commits
    assert all(bool((groups == 2).all()) for groups in kept)


@pytest.mark.parametrize(
    ("changes", "measured"),
    [
        ({"method": "wanda"}, 3),
        ({"resurrection": ResurrectionConfig(score="wanda")}, 3),
        ({"method": "wanda", "resurrection": ResurrectionConfig(strategy="reprune")}, 6),
    ],
)
def test_calibration_data_are_measured_where_they_are_needed(changes, measured):
    model, calls = make_model(), []

    def forward_loop(model):
        calls.append(model)
        for inputs, _ in make_batches():
            model(inputs)

    drive(model, Cycle(model, config(**changes), calibration=forward_loop), make_batches())
    assert len(calls) == measured
    assert resu.controller(model).sparsity == pytest.approx(0.75, abs=0.05)


def test_missing_and_useless_calibration_is_refused_at_once():
    with pytest.raises(ArgumentError, match="calibration: expected data for method 'wanda'"):
        Cycle(make_model(), config(method="wanda"))
    with pytest.raises(ArgumentError, match="calibration: expected None with method 'magnitude'"):
        Cycle(make_model(), config(), calibration=[torch.randn(2, 8)])
    with pytest.raises(ArgumentTypeError, match="got a list_iterator, which runs out"):
        Cycle(make_model(), config(method="wanda"), calibration=iter([torch.randn(2, 8)]))


# -- densification -----------------------------------------------------------------------------
def test_densification_falls_pauses_and_ends_plain():
    model, keys = make_model(), list(make_model().state_dict())
    paused, events = [], []
    densify = Densification(
        mode="stepped", levels=(0.75, 0.5, 0.0), pauses=(Pause(0, "play", 50), Pause(1))
    )
    cycle = Cycle(
        model,
        config(sparsity=0.0, densify=densify),
        on_event=events.append,
        on_pause=lambda m, c: paused.append((m is model, c, cycle.controller.sparsity)),
    )
    drive(model, cycle, make_batches())
    assert paused == [(True, 0, 0.75), (True, 1, 0.5)]
    assert [(e.kind, e.step) for e in events] == [
        *[("prune", 9), ("commit", 13), ("pause", 13)],
        *[("commit", 22), ("pause", 22), ("commit", 31)],
    ]
    assert events[2].pause == Pause(0, "play", 50)
    assert [s.sparsity for s in cycle.history] == [0.75, 0.5, 0.0]
    # the places that came back hold trained theta, but for units that no batch made fire
    fired = torch.stack([model[:2](inputs) for inputs, _ in make_batches()]).ne(0).any(0).any(0)
    assert fired.sum() > 10
    assert model[0].weight[fired].ne(0).all()
    assert model[3].weight[:, fired].ne(0).all()
    assert cycle.controller.phase is Phase.DENSE
    assert cycle.finish() is model
    assert cycle.controller is None
    assert find_controller(model) is None
    assert list(model.state_dict()) == keys
    assert not model._forward_pre_hooks
    assert cycle.finish() is model


def test_densification_may_end_sparse():
    model = make_model()
    cycle = Cycle(model, config(sparsity=0.25, densify=Densification(start=0.75)))
    drive(model, cycle, make_batches())
    cycle.finish()
    assert cycle.controller.phase is Phase.SPARSE
    assert counts(cycle) == expected_counts(0.25)


# -- ends and errors ---------------------------------------------------------------------------
def test_finish_commits_an_open_phase():
    model, batches = make_model(), make_batches()
    cycle, optimizer = Cycle(model, config()), optimizer_of(model)
    while cycle.step_index < 12:
        loss_fn(model, batches[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        cycle.step()
    assert cycle.controller.phase is Phase.RESU
    cycle.finish()
    assert cycle.controller.phase is Phase.SPARSE
    assert counts(cycle) == expected_counts(0.25)
    assert [stats.step for stats in cycle.history] == [12]


def test_a_step_too_many_is_refused():
    model = make_model()
    cycle = Cycle(model, config())
    drive(model, cycle, make_batches())
    with pytest.raises(ArgumentError, match="expected at most 40 steps"):
        cycle.step()


def test_wrong_arguments_are_refused():
    with pytest.raises(ArgumentTypeError, match="model: expected an nn.Module, got list"):
        Cycle([], config())
    with pytest.raises(ArgumentTypeError, match="config: expected a TrainingConfig, got dict"):
        Cycle(make_model(), {})


def test_a_weight_of_nan_is_not_pruned():
    model = make_model()
    cycle = Cycle(model, config(warmup=0.0, initial_sparsity=0.2))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(WeightError, match=r"0\.weight"):
        cycle.start()


# -- state -------------------------------------------------------------------------------------
def test_state_refuses_another_plan_and_other_things():
    cycle = Cycle(make_model(), config())
    state = cycle.state_dict()
    with pytest.raises(ArgumentError, match="state: expected the same plan"):
        Cycle(make_model(), config(cycles=2)).load_state_dict(state)
    with pytest.raises(ArgumentError, match="state: expected version"):
        cycle.load_state_dict({**state, "version": 0})
    with pytest.raises(ArgumentError, match=r"state: expected what Cycle\.state_dict"):
        cycle.load_state_dict({})


@pytest.mark.parametrize("stop", [2, 4, 6, 9, 12, 13, 15, 19, 21, 30, 31, 35, 40])
def test_a_users_loop_resumes_bit_for_bit(stop):
    """In the warm-up, in each stage, and on the borders between them."""
    batches, settings = make_batches(), config()
    straight = make_model()
    whole = Cycle(straight, settings)
    drive(straight, whole, batches)

    first = make_model()
    cycle, optimizer = Cycle(first, settings), optimizer_of(first)
    drive(first, cycle, batches, optimizer, stop=stop)
    saved = (
        {k: v.clone() for k, v in first.state_dict().items()},
        cycle.controller.state_dict(),
        optimizer.state_dict(),
        cycle.state_dict(),
    )

    second = make_model()
    resumed, optimizer = Cycle(second, settings), optimizer_of(second)
    second.load_state_dict(saved[0])
    resumed.controller.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    resumed.load_state_dict(saved[3])
    assert resumed.span == cycle.span
    drive(second, resumed, batches, optimizer)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert resumed.history == whole.history
    assert resumed.controller.masks.keys() == whole.controller.masks.keys()
    for name, mask in whole.controller.masks.items():
        assert torch.equal(mask, resumed.controller.masks[name])


def test_a_score_function_survives_a_resume():
    def score(_name, weight):
        return -weight.abs()

    settings = config(resurrection=ResurrectionConfig(score=score))
    model = make_model()
    cycle, optimizer = Cycle(model, settings), optimizer_of(model)
    while cycle.step_index < 12:
        loss_fn(model, make_batches()[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        cycle.step()
    again = make_model()
    resumed = Cycle(again, settings)
    again.load_state_dict(model.state_dict())
    resumed.controller.load_state_dict(cycle.controller.state_dict())
    resumed.load_state_dict(cycle.state_dict())
    cycle.step()
    resumed.step()
    assert resumed.history == cycle.history
    assert resumed.history[0].commit["weights"]["total"]["resurrected"] > 0


@pytest.mark.parametrize("compiled", [True, False])
def test_the_model_is_compiled_if_asked(compiled):
    model = make_model()
    Cycle(model, config(compile=compiled))
    assert (model._compiled_call_impl is not None) is compiled
