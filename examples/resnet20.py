"""ResNet-20 on CIFAR-10, sparse by any training method.

    pip install resu-compile[train,data]
    python examples/resnet20.py --data DIR --method rigl --sparsity 0.9

DIR holds ``cifar-10-batches-py`` (https://www.cs.toronto.edu/~kriz/cifar.html). Without --data the
images are noise whose mean tells the class, enough to see everything run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

import resu_compile as resu
from resu_compile.experiments.tasks.images import CIFAR_MEAN, CIFAR_STD, normalized, read_cifar
from resu_compile.experiments.tasks.recipe import Classification, Split, schedule
from resu_compile.experiments.tasks.resnet import resnet20
from resu_compile.training import Trainer, TrainingConfig


def load_images(folder: str | None, device: str) -> tuple[Split, Split]:
    """Training and test images, (count, 3, 32, 32), and their labels."""
    if folder is None:
        labels = torch.arange(512, device=device) % 10
        noise = torch.randn(512, 3, 32, 32, device=device)
        images = noise + 0.5 * (labels[:, None, None, None] - 4.5)
        return (images[:384], labels[:384]), (images[384:], labels[384:])
    parts = [read_cifar(folder, "cifar10", train=train) for train in (True, False)]
    train, test = (
        (normalized(images, CIFAR_MEAN, CIFAR_STD).to(device), labels.to(device))
        for images, labels in parts
    )
    return train, test


def main(arguments: Sequence[str] | None = None) -> nn.Module:
    """Train, and return the sparse model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", help="folder of CIFAR-10; default: made-up images")
    parser.add_argument("--method", default="resu")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=16, help="of the first stage")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    train, test = load_images(options.data, options.device)
    model = resnet20(10, width=options.width).to(options.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    data = Classification(train, test, test, batch_size=128)
    task = data.task(model, optimizer, steps=options.steps, seed=0)
    config = TrainingConfig(
        method=options.method,
        steps=options.steps,
        sparsity=options.sparsity,
        exclude=("conv.weight", "head.weight"),  # the first and the last layer stay dense
        compile=not options.eager,
    )
    trainer = Trainer(
        model,
        optimizer,
        task.loss_fn,
        config,
        evaluate=task.test,
        scheduler=schedule(optimizer, options.steps),
    )
    result = trainer.fit(task.batches)
    accuracy = [r for r in result.stats if r["event"] == "evaluation"][-1]["metrics"]["accuracy"]
    print(resu.report(model).table())
    print(f"{options.method} at {options.sparsity:.0%}: test accuracy {accuracy:.2%}")
    return model


if __name__ == "__main__":
    main()
