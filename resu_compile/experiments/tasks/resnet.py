"""Residual networks for images of 32 x 32 (ResNet-20, ...) and of 224 x 224 pixels (ResNet-50).

Source: He et al. 2016, https://arxiv.org/abs/1512.03385
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = _norm(width)
        self.shortcut = _shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) -> (batch, width, h / stride, w / stride)."""
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut; four times ``width`` come out."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.norm1 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = _norm(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norm3 = _norm(4 * width)
        self.shortcut = _shortcut(channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) -> (batch, 4 width, h / stride, w / stride)."""
        inner = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return F.relu(self.norm3(self.conv3(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stages of residual blocks, each at half the size and twice the width of the one before.

    Args:
        stages: blocks of each stage.
        width: of the first stage.
        classes: of the logits.
        bottleneck: take ``Bottleneck`` blocks.
        small_images: begin with a 3 x 3 convolution; False with one of 7 x 7 and a pooling, which
            divide height and width by four.
    """

    def __init__(
        self,
        stages: Sequence[int],
        *,
        width: int,
        classes: int,
        bottleneck: bool = False,
        small_images: bool = True,
    ) -> None:
        super().__init__()
        if small_images:
            self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        else:
            self.conv = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.norm = _norm(width)
        self.pool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        block = Bottleneck if bottleneck else BasicBlock
        channels, blocks = width, []
        for stage, count in enumerate(stages):
            for index in range(count):
                stride = 2 if stage and not index else 1
                blocks.append(block(channels, width * 2**stage, stride))
                channels = width * 2**stage * (4 if bottleneck else 1)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, h, w) -> (batch, classes)."""
        x = self.blocks(self.pool(F.relu(self.norm(self.conv(images)))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def resnet20(classes: int, *, width: int = 16) -> ResNet:
    """ResNet-20 for images of 32 x 32; 0.27 M weights at width 16."""
    return ResNet((3, 3, 3), width=width, classes=classes)


def resnet50(classes: int, *, width: int = 64) -> ResNet:
    """ResNet-50 for images of 224 x 224; 25.6 M weights at width 64 and 1000 classes."""
    return ResNet((3, 4, 6, 3), width=width, classes=classes, bottleneck=True, small_images=False)


def _shortcut(channels: int, width: int, stride: int) -> nn.Module:
    if channels == width and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), _norm(width))
