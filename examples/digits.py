"""Prune, resurrect and export a digit classifier, in a training loop of one's own.

    pip install resu-compile[demo]
    python examples/digits.py

A tenth of the steps are dense, then five cycles prune to 90 %, and at the end of each the pruned
weights compete to come back; the last fifth trains what is left. The model is written to
digits.pt2. Takes about half a minute, most of it compilation.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn

import resu_compile as resu
from resu_compile.training import Cycle, CycleEvent, TrainingConfig


@dataclass(frozen=True)
class Images:
    """Images of 8 x 8 pixels and the digits that they show."""

    pixels: Tensor  # (images, 64), in [0, 1]
    labels: Tensor  # (images,)

    def batches(self, size: int) -> list[Images]:
        """All images in an order drawn anew."""
        order = torch.randperm(len(self.labels)).split(size)
        return [Images(self.pixels[chosen], self.labels[chosen]) for chosen in order]

    def accuracy(self, model: nn.Module) -> float:
        """Share of the images that ``model`` recognises."""
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return (model(self.pixels).argmax(-1) == self.labels).float().mean().item()


def load_images() -> tuple[Images, Images]:
    """Two thirds to train on, and the held-out third."""
    digits = load_digits()
    pixels = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    train, test = order[600:], order[:600]
    return Images(pixels[train], labels[train]), Images(pixels[test], labels[test])


def train(model: nn.Module, train_set: Images, test_set: Images, config: TrainingConfig) -> None:
    """Train ``model`` by the plan of ``config``, and print what each commit left."""
    rows = []

    def on_event(event: CycleEvent) -> None:
        if event.kind == "commit":
            report = event.report
            rows.append([event.step, report.sparsity, report.resurrected, test_set.accuracy(model)])

    cycle = Cycle(model, config, on_event=on_event).start()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    while not cycle.done:
        for batch in train_set.batches(64):
            F.cross_entropy(model(batch.pixels), batch.labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if cycle.step().done:  # prunes, opens a RESU phase or commits, where the plan says so
                break
    cycle.finish()
    rows.append([cycle.step_index, cycle.controller.sparsity, None, test_set.accuracy(model)])
    headers = ("step", "pruned", "came back", "accuracy")
    print(tabulate(rows, headers=headers, floatfmt=("", ".1%", "", ".2%")))


def main(arguments: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    train_set, test_set = load_images()
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    config = TrainingConfig(
        steps=options.steps,
        sparsity=options.sparsity,
        warmup=0.1,
        cycles=5,  # few, for a short table; the default is 40
        seed=options.seed,
        compile=not options.eager,
    )
    train(model, train_set, test_set, config)

    example = test_set.pixels[:1]
    resu.export(model, (example,), "digits.pt2")
    program = resu.load("digits.pt2")
    torch.testing.assert_close(program(example), model.eval()(example), rtol=1e-4, atol=1e-4)
    print("\ndigits.pt2 loads, and computes the same\n")
    print(resu.report(model).table())
    return model


if __name__ == "__main__":
    main()
