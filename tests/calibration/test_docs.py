"""The example of docs/calibration.md runs."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "calibration.md"


def test_the_example_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    namespace = {}
    exec(compile(snippet, PAGE.name, "exec"), namespace)
    controller = namespace["controller"]
    assert abs(controller.sparsity - 0.75) < 1e-9
    for name, mask in controller.masks.items():
        assert (mask.reshape(-1, 4).sum(1) == 1).all(), name
