"""Handwritten digits, which come with scikit-learn: a perceptron and a small convolutional net.

1797 images of 8 x 8 pixels: a fifth validates, a fifth tests, the rest trains. The fifth that
validates lies in what the demo holds out, so that nothing that was chosen there touched the test.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resu_compile.experiments.tasks.recipe import Classification, Split, adamw, splits_of
from resu_compile.experiments.tasks.registry import (
    ExperimentTask,
    check_torch_device,
    import_extra,
    register_task,
)

SHARE = 0.2  # of validation, and of test


class DigitPerceptron(nn.Module):
    """Two hidden layers: (batch, 64) pixels -> (batch, 10) logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, width)
        self.fc2 = nn.Linear(width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, 64) -> (batch, 10)."""
        logits: Tensor = self.head(F.relu(self.fc2(F.relu(self.fc1(pixels)))))
        return logits


class DigitCNN(nn.Module):
    """Three convolutions with batch norm: (batch, 1, 8, 8) -> (batch, 10) logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 1, 8, 8) -> (batch, 10)."""
        x = F.relu(self.norm1(self.conv1(images)))  # (batch, width, 8, 8)
        x = F.relu(self.norm2(self.conv2(x)))  # (batch, 2 width, 4, 4)
        x = F.relu(self.norm3(self.conv3(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@register_task("digits_mlp")
def digits_mlp(
    *,
    steps: int,
    seed: int,
    width: int = 128,
    batch_size: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.01,
    device: str = "cpu",
) -> ExperimentTask:
    """The perceptron, by AdamW; 26 000 weights at width 128.

    Args:
        steps: of the run.
        seed: of initial weights and batches.
        width: of both hidden layers.
        batch_size: of training.
        lr: highest learning rate.
        weight_decay: of AdamW.
        device: where model and data live.
    """
    data = _data(batch_size, device, flat=True)
    torch.manual_seed(seed)
    model = DigitPerceptron(width).to(device)
    optimizer = adamw(model, lr=lr, weight_decay=weight_decay)
    return data.task(model, optimizer, steps=steps, seed=seed)


@register_task("digits_cnn")
def digits_cnn(
    *,
    steps: int,
    seed: int,
    width: int = 32,
    batch_size: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.01,
    device: str = "cpu",
) -> ExperimentTask:
    """The convolutional net, by AdamW; 56 000 weights at width 32.

    Args:
        steps: of the run.
        seed: of initial weights and batches.
        width: channels of the first convolution; the others have twice as many.
        batch_size: of training.
        lr: highest learning rate.
        weight_decay: of AdamW.
        device: where model and data live.
    """
    data = _data(batch_size, device, flat=False)
    torch.manual_seed(seed)
    model = DigitCNN(width).to(device)
    optimizer = adamw(model, lr=lr, weight_decay=weight_decay)
    return data.task(model, optimizer, steps=steps, seed=seed)


def _data(batch_size: int, device: str, *, flat: bool) -> Classification:
    where = check_torch_device(device)
    load_digits = import_extra("sklearn.datasets", task="digits", extra="demo").load_digits
    digits = load_digits()
    pixels = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    images = pixels if flat else pixels.unflatten(1, (1, 8, 8))

    def split(chosen: Tensor) -> Split:
        return images[chosen].to(where), labels[chosen].to(where)

    validation, train, test = splits_of(len(labels), SHARE, 1.0 - 2.0 * SHARE)
    return Classification(split(train), split(validation), split(test), batch_size)
