"""The console script ``resu-compile``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from resu_compile.errors import ArgumentError, ArtifactError, ResuCompileError

SIZES = ("small", "large")
TASKS = ("digits", "bytes")
DEMO_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 means success, 1 that a check failed, 2 that the call was wrong or something is missing, 130
    that it was interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except (ResuCompileError, OSError) as error:
        print(f"resu-compile: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("resu-compile: interrupted", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="resu-compile",
        description="Run any PyTorch model dense, sparse or resurrecting, from one capture.",
    )
    parser.add_argument("--version", action=_PrintVersion)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train, prune, resurrect and export on real data",
        description="Compare dense, one-shot pruned, gradually pruned and RESU models at equal "
        "steps, on data that every machine has.",
    )
    demo.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    demo.add_argument(
        "--size", choices=SIZES, default="small", help="large: a GPT of 10.6 M weights, for a GPU"
    )
    demo.add_argument("--task", choices=(*TASKS, "all"), default="all")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), metavar="DIR")
    demo.add_argument("--seed", type=_seed, default=0, metavar="N")
    demo.add_argument("--eager", action="store_true", help="do not compile the models")
    demo.set_defaults(run=_demo)

    report = commands.add_parser(
        "report", help="what an exported model holds, and the kernels it takes here"
    )
    report.add_argument("file", type=Path, metavar="FILE.pt2")
    report.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    report.set_defaults(run=_report)
    return parser


class _PrintVersion(argparse.Action):
    """Print the versions that a bug report needs; torch is imported only then."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show versions and exit")

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,  # noqa: ARG002
        values: object,  # noqa: ARG002
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        import torch

        import resu_compile

        python = ".".join(map(str, sys.version_info[:3]))
        print(
            f"resu-compile {resu_compile.__version__} (torch {torch.__version__}, Python {python})"
        )
        parser.exit()


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"expected 0 <= N < 2**31, got {value}")
    return value


def _demo(arguments: argparse.Namespace) -> int:
    missing = [
        package
        for module, package in DEMO_PACKAGES.items()
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise ArgumentError(
            f"demo: expected {', '.join(missing)} to be installed; "
            "run: pip install resu-compile[demo]"
        )
    _check_device(arguments.device)
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ArgumentError(f"--output: expected a folder, got the file {arguments.output}")

    from resu_compile.demo.runner import DemoConfig, run_demo
    from resu_compile.demo.tasks import make_task

    names = TASKS if arguments.task == "all" else (arguments.task,)
    tasks = [make_task(name, arguments.size, arguments.device) for name in names]
    config = DemoConfig(arguments.output, seed=arguments.seed, compiled=not arguments.eager)
    results = run_demo(tasks, config)
    return 0 if all(result.exported.agrees for result in results) else 1


def _report(arguments: argparse.Namespace) -> int:
    _check_device(arguments.device)

    import resu_compile

    if arguments.file.suffix != ".pt2":
        raise ArtifactError(f"{arguments.file}: expected a .pt2 file of resu_compile.export")
    program = resu_compile.load(arguments.file, device=arguments.device)
    print(program.report)
    return 0


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(
            "--device cuda: expected a GPU that torch can use, found none; "
            "run with --device cpu, or install a CUDA build of torch"
        )


if __name__ == "__main__":
    sys.exit(main())
