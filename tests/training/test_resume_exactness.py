"""A run that goes on from any of its steps is the same run, to the last bit, whatever it does."""

import pytest
import torch

import resu_compile.optim as resu_optim
from resu_compile.config import ResurrectionConfig
from resu_compile.training import (
    Callback,
    CheckpointConfig,
    CycleShares,
    Densification,
    EarlyStop,
    Trainer,
)
from resu_compile.training.tree import decode_tree, encode_tree
from tests.training.models import config, loss_fn, make_batches, make_model
from tests.training.test_tree import same

SPAN = 3  # steps that a resumed run is followed for
STRIDE = 5  # steps between two resumes; cycles have 9, so that each falls elsewhere in its cycle
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1),
    "momentum": lambda p: torch.optim.SGD(p, lr=3e-2, momentum=0.9, nesterov=True),
    "own adamw": lambda p: resu_optim.AdamW(p, lr=1e-2),
    "own adamw active": lambda p: resu_optim.AdamW(p, lr=1e-2, state="active"),
    "own sgd": lambda p: resu_optim.SGD(p, lr=3e-2, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
}


def copy_state(state):
    """What would come back from a file; long lists of integers are not worth the way through it."""
    trainer = state["trainer"]
    sources = {"rng": trainer["rng"], "epoch": trainer["batches"]["epoch_random"]}
    numbers = {place: [found["python"], found["numpy"]] for place, found in sources.items()}
    for found in sources.values():
        found["python"] = found["numpy"] = None
    tree, tensors = encode_tree(state)
    made = decode_tree(tree, {name: tensor.clone() for name, tensor in tensors.items()})
    copies = {"rng": made["trainer"]["rng"], "epoch": made["trainer"]["batches"]["epoch_random"]}
    for where in (sources, copies):
        for place, found in where.items():
            found["python"], found["numpy"] = numbers[place]
    return made


class Halt(Exception):  # noqa: N818  (no error)
    """Ends a run that was followed for long enough."""


class Recorder(Trainer):
    """Keeps what it would save, as it would come back from a file."""

    halt: int | None = None

    def save(self):
        if not hasattr(self, "saved"):
            self.saved = {}
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "trainer": self.state_dict(),
        }
        self.saved[self.cycle.step_index] = copy_state(state)
        if self.cycle.step_index == self.halt:
            raise Halt


class NoiseCallback(Callback):
    """Draws random numbers where users do."""

    def on_start(self, trainer):  # noqa: ARG002
        torch.rand(1)

    def on_commit(self, trainer, report):  # noqa: ARG002
        torch.rand(1)


def make_trainer(optimizer, *, dtype=torch.float32, frozen=None, **changes):
    model = make_model(dropout=0.3).to(dtype)
    if frozen is not None:
        model[frozen].requires_grad_(requires_grad=False)
    made = OPTIMIZERS[optimizer](model.parameters())
    return Recorder(
        model,
        made,
        lambda model, batch: loss_fn(model, [part.to(dtype) for part in batch]),
        config(
            checkpoint=CheckpointConfig("unused", every=1),
            **{"cycle": CycleShares(3, 2, 4), **changes},
        ),
        scheduler=torch.optim.lr_scheduler.OneCycleLR(made, 2e-2, total_steps=41),
        evaluate=lambda model: {"norm": sum(p.norm().item() for p in model.parameters())},
        callbacks=(NoiseCallback(),),
    )


def make_loader():
    return torch.utils.data.DataLoader(make_batches(7), batch_size=None, shuffle=True)


def check_resumes(optimizer, **changes):
    whole = make_trainer(optimizer, **changes)
    result = whole.fit(make_loader())
    saved = whole.saved
    assert len(saved) == result.steps
    for step in range(1, result.steps, STRIDE):
        torch.manual_seed(step + 99)  # whatever another process would have
        resumed = make_trainer(optimizer, **changes)
        resumed.load(copy_state(saved[step]))
        resumed.halt = min(step + SPAN, result.steps)
        with pytest.raises(Halt):
            resumed.fit(make_loader())
        assert sorted(resumed.saved) == list(range(step + 1, resumed.halt + 1))
        for later, state in resumed.saved.items():
            differing = list(_differences(state, saved[later]))
            assert not differing, f"resumed at {step}, at {later}: {differing[:3]}"


def _differences(a, b, place="", skip=("stats_lines",)):
    """Places in two trees that differ."""
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        for key in a:
            if key in ("python", "numpy"):
                if a[key] != b[key]:
                    yield f"{place}.{key}"
            elif key not in skip:
                yield from _differences(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, type(a)) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{place}[{index}]")
    elif not same(a, b):
        yield place


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(optimizer):
    check_resumes(optimizer, resurrection=ResurrectionConfig(init="normal"))


RULES = {
    "sgd": {"rule": "sgd"},
    "momentum": {"rule": "momentum"},
    "adam": {"rule": "adam", "init": "uniform"},
    "adam lr": {"lr": 1e-2},
    "selective": {"rule": "selective"},
    "selective raw": {"rule": "selective", "step": "raw"},
    "subset": {"rule": "subset", "refresh": 1},
    "subset gradient": {"rule": "subset", "subset_by": "gradient"},
    "frozen": {"rule": "adam", "freeze_active": True},
    "frozen optimizer": {"rule": "optimizer", "freeze_active": True},
    "frozen all": {"rule": "adam", "freeze": "all"},
    "compact": {"rule": "adam", "storage": "compact", "init": "normal"},
    "compact selective": {"rule": "selective", "storage": "compact"},
    "compact frozen": {"rule": "momentum", "storage": "compact", "freeze_active": True},
    "gradient score": {"score": "gradient", "kind": "ceiling"},
    "reprune": {"strategy": "reprune"},
    "places": {"places": 0.4},
    "places adam": {"places": 0.4, "rule": "adam"},
    "places frozen": {"places": 0.4, "rule": "optimizer", "freeze_active": True},
    "places compact": {"places": 0.4, "rule": "momentum", "storage": "compact"},
    "saliency score": {"score": "saliency"},
    "hidden": {"hidden": True},
    "hidden adam": {"hidden": True, "rule": "adam"},
    "hidden frozen": {"hidden": True, "freeze_active": True, "init": "normal"},
    "open": {"hidden": True, "strategy": "open"},
}
HIDDEN = ResurrectionConfig(hidden=True, strategy="open", score="saliency", kind="ceiling")
RESU = CycleShares(0.0, 0.0, 1.0)  # theta goes on from cycle to cycle
TRIAL = ResurrectionConfig(places=0.4, score="saliency", kind="ceiling")


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule):
    check_resumes("adamw", resurrection=ResurrectionConfig(**RULES[rule]))


@pytest.mark.parametrize("optimizer", ["own adamw", "own adamw active"])
@pytest.mark.parametrize(
    "rule", ["adam", "selective", "compact", "places", "places adam", "hidden", "hidden adam"]
)
def test_rules_in_the_pass_of_the_optimizer(optimizer, rule):
    check_resumes(optimizer, resurrection=ResurrectionConfig(**RULES[rule]))


PLANS = {
    "random": {"method": "random"},
    "global": {"scope": "global", "overrides": {}},
    "saliency": {"method": "saliency"},
    "saliency and places": {"method": "saliency", "resurrection": TRIAL},
    "hidden": {"method": "saliency", "resurrection": HIDDEN, "cycle": RESU, "scope": "global"},
    "hidden amnesty": {"resurrection": ResurrectionConfig(hidden=True), "cycle": RESU},
    "accumulate": {"accumulate": 3, "clip_norm": 0.5},
    "gradual": {"initial_sparsity": 0.3, "warmup": 0.0},
    "early stop": {
        "evaluate_every": 2,
        "early_stop": EarlyStop("norm", "max", patience=3, recovery_only=False),
    },
    "densify": {
        "sparsity": 0.0,
        "densify": Densification(start=0.8, mode="linear"),
    },
}


@pytest.mark.parametrize("plan", PLANS)
def test_plans(plan):
    check_resumes("momentum", **PLANS[plan])


@pytest.mark.parametrize("layer", [0, 3])
def test_bfloat16_and_a_layer_without_gradient(layer):
    whole, resumed = (make_trainer("adamw", dtype=torch.bfloat16, frozen=layer) for _ in range(2))
    whole.fit(make_loader())
    resumed.load(whole.saved[17])
    resumed.fit(make_loader())
    assert not list(_differences(resumed.saved[40], whole.saved[40]))


def test_early_stop_does_stop():
    result = make_trainer("momentum", **PLANS["early stop"]).fit(make_loader())
    assert result.stopped_early
    assert 6 <= result.steps < 40
