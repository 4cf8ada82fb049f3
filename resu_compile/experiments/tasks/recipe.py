"""What the tasks have in common: optimizer, learning rate, batches and scores of classifiers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from resu_compile.experiments.tasks.registry import ExperimentTask

Split = tuple[Tensor, Tensor]  # inputs and targets
WARM_UP = 0.05  # share of the steps in which the learning rate rises
LAST = 0.1  # learning rate at the end, relative to the highest


def relative_lr(step: int, steps: int) -> float:
    """Learning rate of ``step`` relative to the highest: a linear rise, then a cosine to a tenth.

    Args:
        step: from 0 on.
        steps: of the run.
    """
    rise = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    return rise * (LAST + (1.0 - LAST) * 0.5 * (1.0 + math.cos(math.pi * step / steps)))


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """The scheduler of ``relative_lr``."""
    return LambdaLR(optimizer, partial(relative_lr, steps=steps))


def loss_of(model: nn.Module, batch: Split) -> Tensor:
    """Mean cross entropy in nats; logits (..., classes), targets (...)."""
    inputs, target = batch
    return F.cross_entropy(model(inputs).flatten(0, -2).float(), target.flatten())


def epoch_batches(split: Split, *, size: int, seed: int, epoch: int) -> Iterator[Split]:
    """Batches of one epoch, drawn without replacement; the odd rest is left.

    Args:
        split: on its device.
        size: of a batch.
        seed: of the run.
        epoch: counted from 0; each has an order of its own.
    """
    inputs, targets = split
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
    order = torch.randperm(len(targets), generator=generator).to(targets.device)
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        yield inputs[chosen], targets[chosen]


def score_classifier(model: nn.Module, batches: Iterable[Split]) -> dict[str, float]:
    """Accuracy in [0, 1] and mean loss in nats, over all samples of ``batches``."""
    right, loss, count = 0.0, 0.0, 0
    for inputs, targets in batches:
        logits = model(inputs).float()
        right += (logits.argmax(-1) == targets).sum().item()
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        count += len(targets)
    return {"accuracy": right / count, "loss": loss / count}


def splits_of(count: int, *shares: float) -> list[Tensor]:
    """Indices of disjoint splits, the same for every seed; the last one takes the rest.

    Args:
        count: of samples.
        *shares: of each split but the last, in (0, 1).
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    sizes = [int(share * count) for share in shares]
    return list(order.split([*sizes, count - sum(sizes)]))


@dataclass(frozen=True)
class Classification:
    """A classifier on tensors that lie on the device.

    Attributes:
        train: images and labels.
        validation: the same.
        test: the same.
        batch_size: of training; the last odd batch of an epoch is left out.
        test_batch: of validation and test.
    """

    train: Split
    validation: Split
    test: Split
    batch_size: int
    test_batch: int = 1024

    def task(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        seed: int,
        change: Callable[[Split, int], Split] | None = None,
        autocast: Literal["bfloat16", "float16"] | None = None,
    ) -> ExperimentTask:
        """The task of training ``model``.

        Args:
            model: on the device of the data.
            optimizer: at the highest learning rate.
            steps: of the run.
            seed: of the batches.
            change: ``(batch, number) -> batch``, an augmentation; the number of the batch in the
                run seeds it.
            autocast: as in ``ExperimentTask``.
        """

        def batches(epoch: int) -> Iterator[Split]:
            found = epoch_batches(self.train, size=self.batch_size, seed=seed, epoch=epoch)
            for number, batch in enumerate(found):
                place = epoch * (len(self.train[1]) // self.batch_size) + number
                yield batch if change is None else change(batch, place)

        return ExperimentTask(
            model=model,
            optimizer=optimizer,
            loss_fn=loss_of,
            batches=batches,
            evaluate=partial(_score, self.validation, self.test_batch),
            test=partial(_score, self.test, self.test_batch),
            on_training=partial(_score, self.train, self.test_batch),
            scheduler=schedule(optimizer, steps),
            metric="accuracy",
            higher_is_better=True,
            example=(self.train[0][:1],),
            autocast=autocast,
        )


def _score(split: Split, size: int, model: nn.Module) -> dict[str, float]:
    parts = zip(split[0].split(size), split[1].split(size), strict=True)
    return score_classifier(model, parts)


def adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW of all parameters."""
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay
    )
