"""The kernels of the optimizers' step compile for Hopper, and move whole vectors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resu_compile.kernels._triton import HAS_TRITON


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_kernels_compile_and_move_whole_vectors():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_kernels"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 12
    assert not [line for line in lines if line.endswith("narrow")]
