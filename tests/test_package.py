"""What importing the package does and does not do, each in a process of its own."""

import subprocess
import sys

import pytest

import resu_compile


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names():
    assert sorted(resu_compile.__all__) == [
        "Phase",
        "controller",
        "explain",
        "export",
        "load",
        "optim",
        "report",
        "sparsify",
    ]
    assert all(hasattr(resu_compile, name) for name in resu_compile.__all__)


def test_import_starts_nothing_heavy():
    heavy = ("torch._inductor.compile_fx", "sympy.printing", "sklearn", "matplotlib")
    out = run(
        "import sys, time, torch\n"
        "before = set(sys.modules)\n"
        "start = time.perf_counter()\n"
        "import resu_compile\n"
        "elapsed = time.perf_counter() - start\n"
        "assert not torch.cuda.is_initialized()\n"
        "from torch.optim import optimizer as o\n"
        "assert not o._global_optimizer_pre_hooks\n"
        f"print([m for m in {heavy!r} if m in sys.modules and m not in before])\n"
        "print(f'import resu_compile: {elapsed * 1e3:.0f} ms beyond torch')\n"
    )
    print(out)  # noqa: T201 - a number to look at, not a limit
    assert out.splitlines()[0] == "[]"


def test_works_without_triton():
    out = run(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, resu_compile\n"
        "model = torch.nn.Linear(8, 8)\n"
        "resu_compile.sparsify(model, 0.5, compile=False)\n"
        "optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)\n"
        "for _ in range(2):\n"
        "    model(torch.randn(2, 8)).sum().backward(); optimizer.step()\n"
        "print((model.weight == 0).sum().item())\n"
    )
    assert out == "32"


@pytest.mark.parametrize("module", ["pruning", "state", "runtime.controller", "runtime.commit"])
def test_any_module_can_be_imported_first(module):
    run(f"import resu_compile.{module}")
