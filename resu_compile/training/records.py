"""What a trainer writes into its stats: the values of each kind of record."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from resu_compile.runtime.controller import Controller, find_controller
from resu_compile.training.config import TrainingConfig
from resu_compile.training.distributed import mean
from resu_compile.training.plan import Span
from resu_compile.training.stats import Record, layer_sparsities, mask_picture

if TYPE_CHECKING:
    from resu_compile.training.cycle import CycleEvent


def start_record(config: TrainingConfig) -> Record:
    """The config and the versions that it runs on."""
    import resu_compile

    return {
        "config": config.describe(),
        "versions": {"torch": torch.__version__, "resu_compile": resu_compile.__version__},
    }


def step_record(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, span: Span
) -> Record:
    """One optimizer step, with the mean loss of all ranks, which all have to call this."""
    controller = find_controller(model)
    return {
        "cycle": span.cycle,
        "stage": str(span.stage),
        "phase": "dense" if controller is None else str(controller.phase),
        "loss": mean(loss).item(),
        "lr": float(optimizer.param_groups[0]["lr"]),
        "sparsity": 0.0 if controller is None else controller.sparsity,
    }


def masks_record(event: CycleEvent, controller: Controller) -> Record:
    """A change of masks: the report, and how sparse each weight is now."""
    assert event.report is not None
    return {
        "cycle": event.cycle,
        "report": event.report.as_dict(),
        "sparsity": controller.sparsity,
        "layers": layer_sparsities(controller),
        "mask": mask_picture(controller),
    }


def pause_record(event: CycleEvent) -> Record:
    """A pause, with what it is for."""
    assert event.pause is not None
    return {
        "cycle": event.cycle,
        "reason": event.pause.reason,
        "suggested_steps": event.pause.suggested_steps,
    }
