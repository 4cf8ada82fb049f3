"""Prune, resurrect and export a digit classifier, with a training loop of one's own.

    python examples/digits.py

Needs scikit-learn. Takes about half a minute, most of it compilation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import resu_compile as resu

torch.manual_seed(0)
digits = load_digits()
pixels = torch.tensor(digits.data / 16.0, dtype=torch.float32)
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels))
test, train = order[:600], order[600:]

model = nn.Sequential(
    nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)


def train_epochs(epochs: int) -> None:
    """The loop is an ordinary one, and stays as it is in every phase."""
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(64):
            loss = F.cross_entropy(model(pixels[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def accuracy() -> float:
    with torch.no_grad():
        return (model(pixels[test]).argmax(-1) == labels[test]).float().mean().item()


train_epochs(20)
print(f"dense       {accuracy():.2%}")

resu.sparsify(model, sparsity=0.7)  # in place: prunes, masks and compiles
print(f"pruned      {accuracy():.2%}")
train_epochs(10)  # pruned weights stay exactly 0
print(f"fine-tuned  {accuracy():.2%}")

with resu.controller(model).resurrect(rule="optimizer") as phase:
    train_epochs(3)  # pruned places are trained too, and compete for a place
train_epochs(7)  # always train on after a commit
print(f"resurrected {accuracy():.2%}  ({phase.report.resurrected} weights came back)")

example = pixels[test][:1]
resu.export(model, (example,), "digits.pt2")
program = resu.load("digits.pt2")
torch.testing.assert_close(program(example), model.eval()(example), rtol=1e-4, atol=1e-4)
print("digits.pt2  loads, and computes the same")
print(resu.report(model).table())
