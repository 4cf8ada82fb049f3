"""What training methods make of gradients: scaled, missing ones; and who may see the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resu_compile.errors import ArgumentError
from resu_compile.methods import TrainingMethod, training_method_names
from resu_compile.phase import Phase
from resu_compile.training import Callback, Trainer, TrainingConfig
from tests.methods.runs import (
    WEIGHTS,
    assert_sparse,
    drive,
    loss_of,
    make_batches,
    make_model,
    make_run,
    one_step,
)

WITH_GRADIENT = {"every": 2, "drop": "weight_and_gradient", "fraction": 0.8}
HIDING = ("sr_ste", "top_kast")


def scaled_step(run, optimizer, batch, *, scale: float, overflow: bool = False) -> None:
    """As a GradScaler does it: a step whose gradients overflowed is left out."""
    (loss_of(run.model, batch) * scale).backward()
    if overflow:
        for parameter in run.model.parameters():
            parameter.grad.fill_(torch.nan)
    if run.after_backward(loss_scale=scale) and not overflow:
        for parameter in run.model.parameters():
            parameter.grad /= scale
        optimizer.step()
    optimizer.zero_grad()
    run.after_step()


# -- scaled losses -------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mest", "set"])
def test_the_scale_of_a_loss_has_no_part_in_a_score(name):
    """|w| + |g| ranks the same, whatever the loss was multiplied by."""
    runs = [make_run(name, options=WITH_GRADIENT).start() for _ in range(2)]
    for run, scale in zip(runs, (1.0, 2.0**16), strict=True):
        optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
        for step in range(6):
            scaled_step(run, optimizer, make_batches()[step % 5], scale=scale)
    assert runs[0].updates[-1].grown > 0
    for name in WEIGHTS:
        assert torch.equal(*(run.controller.masks[name] for run in runs))


@pytest.mark.parametrize("name", ["mest", "set", "rigl", "snip", "snfs"])
def test_an_overflow_breaks_no_method(name):
    options = {} if name == "snip" else {"every": 2}
    if name in ("mest", "set"):
        options = WITH_GRADIENT
    run = make_run(name, options=options, steps=8).start()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    while not run.done:
        scaled_step(run, optimizer, make_batches()[0], scale=1024.0, overflow=run.step in (0, 2, 5))
    run.finish()
    assert_sparse(run, optimizer)
    assert all(bool(value.isfinite().all()) for value in run.model.state_dict().values())


def test_the_last_range_comes_late_but_it_comes():
    """MEST's border at step 24 of 32 overflows: the run still ends at its sparsity."""
    options = {"every": 7, "mode": "em&s", "drop": "weight_and_gradient", "stop": 10}
    run = make_run("mest", options=options, steps=32).start()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    while not run.done:
        scaled_step(run, optimizer, make_batches()[0], scale=64.0, overflow=run.step == 24)
    assert run.updates[-1].step == 25
    assert [weight.nnz for weight in run.controller.weights.values()] == [32, 16]


def test_no_gradient_so_far_is_no_reason_to_grow():
    """All steps up to SNFS's first update have overflowed."""
    run = make_run("snfs", options={"every": 2}, steps=8).start()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    while not run.done:
        scaled_step(run, optimizer, make_batches()[0], scale=64.0, overflow=run.step < 2)
    assert [update.step for update in run.updates] == [0, 4]


def test_a_late_update_does_not_pass_the_stop():
    """Its fraction would be 0, and it would take the place of a step."""
    run = make_run("rigl", options={"every": 2, "stop": 5}, steps=8).start()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    while not run.done:
        scaled_step(run, optimizer, make_batches()[0], scale=64.0, overflow=run.step == 4)
    assert [update.step for update in run.updates] == [0, 2]


class Words(nn.Module):
    """An embedding with sparse gradients below a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8, sparse=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.table(x))


def test_sparse_gradients_are_looked_at_for_overflow_too():
    model = Words()
    run = make_run("rigl", model, options={"every": 1}, steps=4).start()
    words = torch.arange(6).remainder(4)
    for overflow in (False, True, False):
        (model(words).square().mean() * 64.0).backward()
        if overflow:
            model.table.weight.grad = model.table.weight.grad * torch.inf
        run.after_backward(loss_scale=64.0)
        assert run.postponed is overflow
        model.zero_grad()
        run.after_step()
    assert [update.step for update in run.updates] == [0, 2]


# -- calls ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options"), [("mest", WITH_GRADIENT), ("set", {"every": 2, "replaces_step": True})]
)
def test_a_forgotten_call_is_named_without_dense_gradients_too(name, options):
    run = make_run(name, options=options).start()
    for _ in range(2):
        run.after_step()
    with pytest.raises(ArgumentError, match="^after_step: expected after_backward.*step 2"):
        run.after_step()


@pytest.mark.parametrize("name", ["rigl", "sr_ste", "static"])
def test_a_second_call_in_a_step_is_named(name):
    """After each of several batches, say: SR-STE would show its full weights to the second one."""
    run = make_run(name).start()
    loss_of(run.model, make_batches()[0]).backward()
    run.after_backward()
    with pytest.raises(ArgumentError, match="^after_backward: expected one call a step"):
        run.after_backward()


def test_a_run_that_never_began_ends_sparse():
    run = make_run("rigl")
    run.finish()
    assert run.controller.phase is Phase.SPARSE
    assert_sparse(run)


# -- frozen weights ------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [n for n in training_method_names() if n != "resu"])
def test_a_frozen_weight_loses_what_the_first_mask_takes_and_no_more(name):
    """Optimizers leave it alone, and drop-and-grow would only ever drop: nothing grows there."""
    model = make_model()
    before = model[0].weight.detach().clone()
    model[0].weight.requires_grad_(False)
    options = {"rate": 0.5} if name == "lottery" else {}
    if name in ("rigl", "set", "snfs", "mest", "top_kast"):
        options = {"every": 2}
    if name == "soft_shrinkage":
        options = {"shrink": 0.0}
    run = make_run(name, model, options=options, scope="layer", distribution="uniform")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    drive(run, optimizer).finish()
    weight = run.controller.weights["0.weight"]
    assert weight.nnz == 32
    assert torch.equal(weight.parameter[weight.mask], before[weight.mask])
    assert_sparse(run, optimizer)


class Experts(nn.Module):
    """Only one of two linears is used in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 4) for _ in range(2))

    def forward(self, x):
        return self.parts[0](x)


@pytest.mark.parametrize("name", HIDING)
def test_a_weight_without_a_gradient_does_not_move(name):
    model = Experts()
    run = make_run(name, model).start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = run.master.value("parts.1.weight").clone()
    for _ in range(3):
        one_step(run, optimizer)
    assert torch.equal(run.master.value("parts.1.weight"), before)


# -- who sees what -------------------------------------------------------------------------------
class Looks(Callback):
    def __init__(self):
        self.seen = []

    def on_step(self, trainer, loss):  # noqa: ARG002
        weight = trainer.cycle.controller.weights["0.weight"]
        self.seen.append(bool(weight.parameter[~weight.mask].any()))


@pytest.mark.parametrize("name", HIDING)
def test_an_evaluation_sees_the_sparse_model(name):
    model = make_model()
    found = []

    def evaluate(evaluated):
        found.append(float((evaluated[0].weight != 0).float().mean()))
        return {"density": found[-1]}

    config = TrainingConfig(
        method=name,
        steps=6,
        sparsity=0.75,
        compile=False,
        evaluate_every=2,
        log_every=1,
    )
    looks = Looks()
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.02),
        loss_of,
        config,
        evaluate=evaluate,
        callbacks=[looks],
    )
    trainer.fit(make_batches())
    assert found == [0.25] * 3
    assert looks.seen == [False] * 6
    steps = [record for record in trainer.stats if record["event"] == "step"]
    assert {record["phase"] for record in steps} == {"sparse"}


@pytest.mark.parametrize("name", HIDING)
def test_looking_in_between_changes_nothing(name):
    runs = []
    for looks in (False, True):
        run = make_run(name, options={} if name == "sr_ste" else {"every": 2}).start()
        optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.02, weight_decay=0.1)
        while not run.done:
            loss_of(run.model, make_batches()[run.step % 5]).backward()
            run.after_backward()
            optimizer.step()
            if looks:
                run.conceal()
                assert_sparse(run)
            optimizer.zero_grad()
            run.after_step()
        runs.append(run)
    for name in WEIGHTS:
        assert torch.equal(*(run.model.get_parameter(name) for run in runs))
        assert torch.equal(*(run.master.value(name) for run in runs))


# -- a method of one's own -----------------------------------------------------------------------
class Counting(TrainingMethod):
    """Holds something beside ``run.memory``, which ``resume`` builds again."""

    def begin(self, run):
        self.resume(run)
        run.prune(method="random")

    def resume(self, run):
        run.built = True


def test_resume_is_called_for_any_method():
    first = make_run(Counting()).start()
    second = make_run(Counting())
    second.controller.load_state_dict(first.controller.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.built
