"""The engine of the training methods: two calls in a loop, state, compiled graphs, the trainer."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.methods import RigL, TrainingMethod, training_method_names
from resu_compile.phase import Phase
from resu_compile.training import (
    Callback,
    CheckpointConfig,
    Cycle,
    SparseTraining,
    Stage,
    Trainer,
    TrainingConfig,
)
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

OPTIONS = {
    "rigl": {"every": 3},
    "set": {"every": 3},
    "snfs": {"every": 3},
    "mest": {"every": 3, "mode": "em&s"},
    "gmp": {"every": 2},
    "top_kast": {"every": 3},
    "soft_shrinkage": {"every": 2},
    "lottery": {"rate": 0.5, "rewind": 1},
    "acdc": {"phase": 3},
}
CYCLES = {"resu": {"cycles": 2, "warmup": 0.1}}


def build(name: str, **changes: object) -> tuple[SparseTraining, torch.optim.Optimizer]:
    values = {**CYCLES.get(name, {}), **changes}
    run = make_run(name, options=OPTIONS.get(name), **values)
    return run, torch.optim.AdamW(run.model.parameters(), lr=0.02, weight_decay=0.1)


# -- every method --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", training_method_names())
def test_it_ends_sparse_with_exact_counts(name):
    run, optimizer = build(name)
    drive(run, optimizer)
    assert run.done
    assert run.finish() is run.model
    assert run.controller.phase is Phase.SPARSE
    assert_sparse(run, optimizer)
    total = sum(weight.nnz for weight in run.controller.weights.values())
    assert total == (47 if run.config.distribution != "uniform" else 48)  # ER rounds each weight
    assert run.controller.agree is None
    stats = run.stats()
    assert 0.0 < stats.training_flops <= 1.0
    assert stats.ever_share >= 1.0 - stats.sparsity - 1e-9


@pytest.mark.parametrize("stop", [3, 7, 12])
@pytest.mark.parametrize("name", training_method_names())
def test_a_resumed_run_is_the_same_to_the_bit(name, stop):
    whole, optimizer = build(name)
    drive(whole, optimizer)
    first, first_optimizer = build(name)
    drive(first, first_optimizer, until=stop)
    file = io.BytesIO()
    torch.save(
        {
            "model": first.model.state_dict(),
            "controller": first.controller.state_dict(),
            "optimizer": first_optimizer.state_dict(),
            "run": first.state_dict(),
        },
        file,
    )
    file.seek(0)
    state = torch.load(file, weights_only=True)
    torch.manual_seed(5)
    second, second_optimizer = build(name)
    second.model.load_state_dict(state["model"])
    second.controller.load_state_dict(state["controller"])
    second_optimizer.load_state_dict(state["optimizer"])
    second.load_state_dict(state["run"])
    drive(second, second_optimizer)
    for run in (whole, second):
        run.finish()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], value), key
    for key, mask in whole.controller.masks.items():
        assert torch.equal(second.controller.masks[key], mask)
    assert second.updates == whole.updates
    assert second.stats() == whole.stats()


def test_state_is_a_copy_and_checked():
    run = drive(make_run("snfs", options={"every": 3}), until=4)
    state = run.state_dict()
    before = state["memory"]["mean"]["0.weight"].clone()
    drive(run, until=6)
    assert torch.equal(state["memory"]["mean"]["0.weight"], before)
    with pytest.raises(ArgumentError, match="expected method 'rigl', as this run has, got 'snfs'"):
        make_run("rigl").load_state_dict(state)
    with pytest.raises(ArgumentError, match="expected steps 30"):
        make_run("snfs", steps=30).load_state_dict(state)
    with pytest.raises(ArgumentError, match=r"what SparseTraining.state_dict\(\) returns"):
        run.load_state_dict({"step": 3})


# -- the two calls -------------------------------------------------------------------------------
def test_a_forgotten_call_is_named():
    run = make_run("rigl", options={"every": 2}).start()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    for _ in range(2):  # steps without a dense gradient do without it
        loss_of(run.model, make_batches()[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.after_step()
    with pytest.raises(ArgumentError, match="^after_step: expected after_backward.*RigL.*step 2"):
        run.after_step()


def test_there_is_an_end():
    run = drive(make_run("static", steps=2))
    for call in (run.after_backward, run.after_step):
        with pytest.raises(ArgumentError, match=f"^{call.__name__}: expected at most 2 steps"):
            call()


def test_wrong_arguments():
    with pytest.raises(ArgumentTypeError, match="^model: expected an nn.Module"):
        SparseTraining(3, TrainingConfig(method="set"))
    with pytest.raises(ArgumentTypeError, match="^config: expected a TrainingConfig"):
        SparseTraining(make_model(), "set")
    with pytest.raises(ArgumentError, match="^config: expected a pruning method, got method='set'"):
        Cycle(make_model(), TrainingConfig(method="set", compile=False))
    run = make_run("static")
    run.start()
    run.controller.release()
    with pytest.raises(ArgumentError, match="^run: expected its model to have a controller"):
        run.controller  # noqa: B018


def test_accumulated_gradients_are_looked_at_once():
    """Two batches a step make the masks of the batch that both are."""
    runs = [make_run("rigl", options={"every": 2, "fraction": 0.9}).start() for _ in range(2)]
    batches = make_batches()
    together = tuple(torch.cat(pair) for pair in zip(*batches[:2], strict=True))
    for run, parts in zip(runs, ([together], batches[:2]), strict=True):
        optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
        for _ in range(4):
            for batch in parts:
                (loss_of(run.model, batch) / len(parts)).backward()
            run.after_backward()
            optimizer.step()
            optimizer.zero_grad()
            run.after_step()
    assert runs[0].updates[-1].grown > 0
    for name in WEIGHTS:
        assert torch.equal(*(run.controller.masks[name] for run in runs))


def test_a_model_that_was_sparsified_keeps_its_targets():
    model = make_model()
    resu.sparsify(model, 0.5, targets="0.weight", compile=False)
    run = drive(make_run("rigl", model, options={"every": 3}, distribution="uniform"))
    assert list(run.controller.weights) == ["0.weight"]
    assert run.controller.sparsity == 0.75


@pytest.mark.parametrize("name", ["set", "gmp", "acdc", "mest"])
def test_overrides_hold_at_the_end(name):
    run, optimizer = build(name, overrides={"2.weight": 0.5})
    drive(run, optimizer).finish()
    assert run.controller.weights["2.weight"].nnz == 32
    assert run.controller.weights["0.weight"].nnz == 32


def test_the_first_layer_stays_dense_where_it_is_excluded():
    run = drive(make_run("rigl", options={"every": 3}, exclude="0.weight", distribution="uniform"))
    assert list(run.controller.weights) == ["2.weight"]


class Scaled:
    """As much of a GradScaler as it takes: the loss is scaled, some steps overflow."""

    def __init__(self, run, optimizer, overflows):
        self.run, self.optimizer, self.overflows = run, optimizer, overflows

    def step(self, batch):
        run = self.run
        (loss_of(run.model, batch) * 1024.0).backward()
        if run.step in self.overflows:
            run.model[0].bias.grad.fill_(torch.inf)
        goes_on = run.after_backward(loss_scale=1024.0)
        if goes_on and run.step not in self.overflows:
            for parameter in run.model.parameters():
                parameter.grad /= 1024.0
            self.optimizer.step()
        self.optimizer.zero_grad()
        run.after_step()


def test_an_update_waits_for_a_gradient_that_has_not_overflowed():
    run = make_run("rigl", options={"every": 4}).start()
    scaled = Scaled(run, torch.optim.SGD(run.model.parameters(), lr=0.1), overflows=(4, 5))
    while not run.done:
        scaled.step(make_batches()[0])
    assert [update.step for update in run.updates] == [0, 6, 8, 12]


@pytest.mark.parametrize("name", ["top_kast", "sr_ste", "snfs"])
def test_a_scaled_loss_changes_nothing(name):
    plain, optimizer = build(name)
    other, other_optimizer = build(name)
    plain.start()
    scaled = Scaled(other.start(), other_optimizer, overflows=())
    for step in range(8):
        one_step(plain, optimizer, [make_batches()[step % 5]])
        scaled.step(make_batches()[step % 5])
    for name in WEIGHTS:
        assert torch.equal(plain.controller.masks[name], other.controller.masks[name])
        torch.testing.assert_close(plain.model.get_parameter(name), other.model.get_parameter(name))


@pytest.mark.parametrize("name", ["top_kast", "sr_ste"])
def test_a_step_that_was_left_out_loses_no_weight(name):
    run, optimizer = build(name)
    scaled = Scaled(run.start(), optimizer, overflows=(1,))
    scaled.step(make_batches()[0])
    before = run.master.state_dict()
    scaled.step(make_batches()[1])
    for name, value in run.master.state_dict().items():
        assert torch.equal(value, before[name])
    scaled.step(make_batches()[2])
    assert any(not torch.equal(run.master.value(name), before[name]) for name in WEIGHTS)


# -- compiled ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["rigl", "top_kast"])
def test_compiled_and_eager_agree(name):
    torch._dynamo.reset()
    runs = [build(name, compile=compiled) for compiled in (False, True)]
    for run, optimizer in runs:
        drive(run, optimizer, until=8)
    (eager, _), (compiled, optimizer) = runs
    assert compiled.updates[-1].step == 6
    assert compiled.updates == eager.updates
    for key, mask in eager.controller.masks.items():
        assert torch.equal(compiled.controller.masks[key], mask)
        torch.testing.assert_close(
            compiled.model.get_parameter(key), eager.model.get_parameter(key)
        )
    compiled.finish()
    assert_sparse(compiled, optimizer)


# -- the optimizer that keeps packed state -------------------------------------------------------
@pytest.mark.parametrize("name", ["rigl", "sr_ste", "gmp", "top_kast"])
def test_packed_optimizer_state_gives_the_same_run(name):
    plain, optimizer = build(name)
    packed = make_run(name, options=OPTIONS.get(name))
    packing = resu.optim.AdamW(packed.model.parameters(), lr=0.02, weight_decay=0.1, state="active")
    drive(plain, optimizer)
    drive(packed, packing)
    for name in WEIGHTS:
        assert torch.equal(plain.controller.masks[name], packed.controller.masks[name])
        torch.testing.assert_close(
            plain.model.get_parameter(name), packed.model.get_parameter(name)
        )


# -- a method of one's own -----------------------------------------------------------------------
class Shuffle(TrainingMethod):
    """Another random mask after every step."""

    def begin(self, run):
        run.prune(method="random")

    def settled(self, run):
        return run.steps

    def after_step(self, run):
        masks = ((places.name, places.mask.flip(0)) for places in run.places())
        run.remask(masks, "shuffle")


def test_a_method_of_ones_own():
    events = []
    config = TrainingConfig(method=Shuffle(), steps=3, sparsity=0.5, compile=False)
    run = SparseTraining(make_model(), config, on_event=events.append)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    drive(run, optimizer)
    assert [(event.kind, event.step) for event in events] == [
        ("prune", 0),
        ("update", 1),
        ("update", 2),
        ("update", 3),
    ]
    assert run.updates[-1].churn > 0.2
    assert_sparse(run, optimizer)
    assert run.state_dict()["method"] == "Shuffle"


# -- the config ----------------------------------------------------------------------------------
def test_a_method_goes_through_files(tmp_path):
    config = TrainingConfig(method=RigL(fraction=0.2, every=0.01), sparsity=0.9)
    assert (config.method, config.method_options) == ("rigl", {"fraction": 0.2, "every": 0.01})
    config.dump(tmp_path / "run.yaml")
    assert TrainingConfig.load(tmp_path / "run.yaml") == config
    assert config.training_method() == RigL(fraction=0.2, every=0.01)
    assert config.distribution == "erk"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "rigl", "cycles": 3}, "^cycles: expected no value with method='rigl'"),
        ({"method": "rigl", "warmup": 0.1}, "^warmup: expected no value"),
        ({"method": "rigl", "method_options": {"alpha": 0.3}}, "^unknown option of rigl 'alpha'"),
        ({"method_options": {"every": 3}}, "^method_options: expected none with method='salie"),
        ({"method": "rgl"}, "^method: unknown method 'rgl'"),
    ],
)
def test_a_setting_that_has_no_part_is_an_error(changes, message):
    with pytest.raises(ArgumentError, match=message):
        TrainingConfig(**changes)


def test_a_training_method_is_no_pruning_method():
    with pytest.raises(ArgumentError, match="^method: expected one of dsnot.*got 'rigl'.*training"):
        resu.sparsify(make_model(), 0.5, method="rigl")


# -- the trainer ---------------------------------------------------------------------------------
class Events(Callback):
    def __init__(self):
        self.seen = []

    def on_prune(self, trainer, report):
        self.seen.append((trainer.cycle.step_index, report.strategy))

    def on_commit(self, trainer, report):
        self.seen.append((trainer.cycle.step_index, report.strategy))


def make_trainer(name, **changes):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    config = TrainingConfig(
        **{
            "method": name,
            "method_options": OPTIONS.get(name, {}),
            "steps": 20,
            "sparsity": 0.75,
            "compile": False,
            "log_every": 1,
            **changes,
        }
    )
    events = Events()
    trainer = Trainer(model, optimizer, loss_of, config, callbacks=[events], scheduler=scheduler)
    return trainer, events


def test_the_trainer_runs_what_a_loop_runs():
    trainer, events = make_trainer("rigl", clip_norm=0.5)
    trainer.fit(make_batches())
    run = make_run("rigl", options={"every": 3}).start()
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.02, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for step in range(20):
        loss_of(run.model, make_batches()[step % 5]).backward()
        if run.after_backward():
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run.after_step()
    for key, value in run.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[key], value)
    assert events.seen == [(0, "prune"), *((step, "rigl") for step in (3, 6, 9, 12))]
    stages = [record["stage"] for record in trainer.stats if record["event"] == "step"]
    assert stages == [str(Stage.TRAIN)] * 15 + [str(Stage.RECOVER)] * 5
    assert sum(record["event"] == "update" for record in trainer.stats) == 4
    assert trainer.stats[-1]["method"] == run.stats().as_dict()


def test_the_learning_rate_is_rewound_with_the_weights():
    trainer, _ = make_trainer("lottery")
    trainer.fit(make_batches())
    rates = [record["lr"] for record in trainer.stats if record["event"] == "step"]
    ends = trainer.cycle.method.level_ends(trainer.cycle)
    assert ends == [6, 13]
    assert rates[5] == rates[12] == 0.02 * 0.5**3
    assert rates[6] == pytest.approx(0.02)
    rewinds = [record["step"] for record in trainer.stats if record["event"] == "rewind"]
    assert rewinds == ends


@pytest.mark.parametrize("name", ["snfs", "gmp", "resu"])
def test_a_checkpoint_resumes(name, tmp_path):
    folder = str(tmp_path / "run")
    changes = {"checkpoint": CheckpointConfig(folder, every=7, keep=9), **CYCLES.get(name, {})}
    whole, _ = make_trainer(name, **changes)
    whole.fit(make_batches())
    for path in sorted((tmp_path / "run").iterdir())[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    second, _ = make_trainer(name, **changes)
    second.fit(make_batches(), resume=True)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], value)
    assert second.cycle.stats() == whole.cycle.stats()


def test_a_copy_of_the_model_is_sparse_too():
    run = drive(make_run("set", options={"every": 3}), until=5)
    twin = copy.deepcopy(run.model)
    for name in WEIGHTS:
        assert torch.equal(resu.controller(twin).masks[name], run.controller.masks[name])
