"""Configs by name: what measured well, and what the RESU paper's code ships.

``default`` is what comparisons at equal steps taught: train dense first, ramp up the steeper the
sparser the goal, let the optimizer train hidden theta from zero beside the active weights, stop
resurrecting well before the end. It was chosen on validation data (docs/training.md has the
numbers).
The others have the numbers of huy209vn/RESU (resu/training/config.py), warm-up and recovery
excluded, which it does not have: ``preset("published", warmup=0.1, recovery=0.25)`` adds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from resu_compile.errors import check_choice, check_known_keys
from resu_compile.training.config import RESU_ONLY, TRIAL, TrainingConfig
from resu_compile.training.densify import Densification, Pause


def _published(cycles: int = 5, steps: int = 1000, **changes: Any) -> dict[str, Any]:
    """The paper's recipe with ``steps`` steps in each of ``cycles`` cycles."""
    values = {
        "cycles": cycles,
        "steps": cycles * steps,
        "warmup": 0.0,
        "recovery": 0.0,
        "cycle": {},
        "method": "magnitude",
        "sparsity": 0.7,
        "schedule": "linear",
        "budget_start": 0.10,
        "budget_end": 0.02,
        "resurrection": _frozen("selective"),
    }
    return {**values, **changes}


def _frozen(rule: str) -> dict[str, Any]:
    """Theta from noise with plain gradients beside frozen active weights."""
    return {
        "lr": 1e-4,
        "rule": rule,
        "step": "raw",
        "init": "normal",
        "eps": 0.1,
        "freeze_active": True,
    }


def _default() -> dict[str, Any]:
    return {"cycle": RESU_ONLY, "resurrection": TRIAL}  # else the defaults of TrainingConfig


def _aggressive() -> dict[str, Any]:
    return _published(7, 2000, sparsity=0.9, budget_start=0.15, budget_end=0.05)


def _conservative() -> dict[str, Any]:
    return _published(3, 500, sparsity=0.5, budget_start=0.20, resurrection=_frozen("sgd"))


def _densification() -> dict[str, Any]:
    return _published(
        sparsity=0.0,
        budget_start=0.30,
        budget_end=0.10,
        densify=Densification(
            mode="stepped",
            levels=(0.7, 0.5, 0.3, 0.1, 0.0),
            pauses=tuple(Pause(c, "evaluate", suggested_steps=1000) for c in range(4)),
        ),
    )


def _quick_test() -> dict[str, Any]:
    return _published(2, 100, sparsity=0.5)


_PRESETS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "default": _default,
    "published": _published,
    "aggressive": _aggressive,
    "conservative": _conservative,
    "densification": _densification,
    "quick_test": _quick_test,
}

PRESETS: tuple[str, ...] = tuple(_PRESETS)


def preset(name: str, **changes: Any) -> TrainingConfig:
    """The config called ``name``, with some fields changed.

    Args:
        name: one of ``PRESETS``: ``"default"``, ``"published"``, ``"aggressive"``,
            ``"conservative"``, ``"densification"`` or ``"quick_test"``.
        **changes: fields of ``TrainingConfig``; a mapping ``resurrection`` or ``cycle`` changes the
            fields that it names.

    Raises:
        ArgumentError: an unknown name or field, or a value that a field does not take.
    """
    check_choice(name, _PRESETS, name="preset")
    check_known_keys(changes, TrainingConfig.__dataclass_fields__, what="setting")
    return TrainingConfig.from_dict({**changes, "preset": name})


def preset_fields(name: str) -> dict[str, Any]:
    """What the preset ``name`` gives; ``cycle`` and ``resurrection`` as mappings.

    Raises:
        ArgumentError: an unknown name.
    """
    check_choice(name, _PRESETS, name="preset")
    return _PRESETS[name]()
