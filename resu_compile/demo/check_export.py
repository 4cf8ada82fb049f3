"""Run by the demo in a process of its own: load an exported model and compare its outputs.

    python -m resu_compile.demo.check_export model.pt2 model.sample.pt cpu

Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys

import torch

import resu_compile as resu
from resu_compile.demo.deploy import ATOL, RTOL


def main(model_path: str, sample_path: str, device: str) -> None:
    """Load both files, run the program on ``device`` and print how far the outputs are apart."""
    sample = torch.load(sample_path, weights_only=True)
    program = resu.load(model_path, device=device)
    outputs = program(sample["inputs"].to(device)).cpu()
    expected = sample["outputs"]
    result = {
        "max_difference": (outputs - expected).abs().max().item(),
        "agrees": torch.allclose(outputs, expected, rtol=RTOL, atol=ATOL),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
