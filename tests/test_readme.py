"""Every Python snippet of the README runs, in order and each on its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import resu_compile

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_readme_has_snippets():
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    namespace: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), namespace)
    if "program" in namespace:  # the exported model gives the model's own outputs
        example = namespace["batches"][0][0]
        torch.testing.assert_close(namespace["program"](example), namespace["model"](example))
    if "compiled" in namespace:
        sparsity = resu_compile.controller(namespace["compiled"]).sparsity
        assert sparsity == pytest.approx(0.7, abs=0.01)
