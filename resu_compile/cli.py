"""The console script ``resu-compile``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resu_compile.errors import ArgumentError, ArtifactError, ResuCompileError

SIZES = ("small", "large")
TASKS = ("digits", "bytes")
DEMO_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
DEVICES = ("cpu", "cuda")
SIZE_HELP = "large: a GPT of 10.6 M weights, for a GPU"
USAGE_ERROR = 2

Commands = Any  # argparse does not name the type that add_subparsers returns


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

    for add_command in (
        _add_demo,
        _add_report,
        _add_train,
        _add_plot,
        _add_verify,
        _add_experiment,
    ):
        add_command(commands)
    return parser


def _add_demo(commands: Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="train, prune, resurrect and export on real data",
        description="Compare dense, one-shot pruned, gradually pruned and RESU models at equal "
        "steps, on data that every machine has.",
    )
    demo.add_argument("--device", choices=DEVICES, default="cpu")
    demo.add_argument("--size", choices=SIZES, default="small", help=SIZE_HELP)
    demo.add_argument("--task", choices=(*TASKS, "all"), default="all")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), metavar="DIR")
    demo.add_argument("--seed", type=_seed, default=0, metavar="N")
    demo.add_argument("--eager", action="store_true", help="do not compile the models")
    demo.set_defaults(run=_demo)


def _add_report(commands: Commands) -> None:
    report = commands.add_parser(
        "report", help="what an exported model holds, and the kernels it takes here"
    )
    report.add_argument("file", type=Path, metavar="FILE.pt2")
    report.add_argument("--device", choices=DEVICES, default="cpu")
    report.set_defaults(run=_report)


def _add_train(commands: Commands) -> None:
    train = commands.add_parser(
        "train",
        help="run the training that a file describes",
        description="Train by a .yaml or .json file that names a task (digits, bytes, or "
        "module:function of your own) and the fields of TrainingConfig; "
        "examples/digits_resu.yaml is one.",
    )
    train.add_argument("config", type=Path, metavar="CONFIG")
    train.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint, if there is one"
    )
    train.add_argument(
        "--output", type=Path, metavar="DIR", help="in place of the output that the file names"
    )
    train.add_argument("--device", choices=DEVICES, help="in place of the task's device")
    train.set_defaults(run=_train)


def _add_plot(commands: Commands) -> None:
    plot = commands.add_parser("plot", help="draw a training run from its stats file")
    plot.add_argument("stats", type=Path, metavar="STATS.jsonl")
    plot.add_argument(
        "--output", type=Path, metavar="DIR", help="for the pictures; default: beside the stats"
    )
    plot.set_defaults(run=_plot)


def _add_verify(commands: Commands) -> None:
    verify = commands.add_parser(
        "verify",
        help="check what RESU is for: that pruned weights come back, and that it helps",
        description="Train dense, one-shot pruned, gradually pruned and RESU models for equal "
        "steps. Exits with 1 if nothing was resurrected, if a weight holds another number of "
        "entries than asked for, or if RESU recovers no more than half of what one-shot pruning "
        "lost.",
    )
    verify.add_argument("--device", choices=DEVICES, default="cpu")
    verify.add_argument("--size", choices=SIZES, default="small", help=SIZE_HELP)
    verify.add_argument("--task", choices=(*TASKS, "all"), default="all")
    verify.add_argument(
        "--sparsity", type=float, nargs="+", default=[0.7, 0.9], metavar="S", help="in [0, 1)"
    )
    verify.add_argument("--seeds", type=int, default=3, metavar="N", help="how many")
    verify.add_argument("--quick", action="store_true", help="few steps and one seed: counts only")
    verify.add_argument(
        "--preset", default="default", metavar="NAME", help="of RESU's plan: %(default)s"
    )
    verify.add_argument("--compile", action="store_true", help="compile the models")
    verify.add_argument("--output", type=Path, default=Path("verify_output"), metavar="DIR")
    verify.set_defaults(run=_verify)


def _add_experiment(commands: Commands) -> None:
    experiment = commands.add_parser(
        "experiment",
        usage="resu-compile experiment CONFIG [options]\n"
        "       resu-compile experiment report RESULTS [options]",
        help="compare training methods: tasks x methods x sparsities x seeds",
        description="Run what a .yaml or .json file describes; examples/experiment_small.yaml is "
        "one. Started again, it goes on where it was; started several times at once, the processes "
        "share the work. 'report' makes tables and pictures of its results file.",
    )
    experiment.add_argument("words", nargs="+", metavar="CONFIG | report RESULTS")
    experiment.add_argument("--output", type=Path, metavar="DIR", help="in place of the default")
    run = experiment.add_argument_group("running")
    run.add_argument("--dry-run", action="store_true", help="count cells and steps only")
    run.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N, for all tasks")
    run.add_argument("--retry-failed", action="store_true", help="run again what failed before")
    run.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases")
    report = experiment.add_argument_group("reporting")
    report.add_argument(
        "--method", default="resu", metavar="NAME", help="compared with its rivals: %(default)s"
    )
    experiment.set_defaults(run=_experiment)


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
    _check_demo_packages("demo")
    _check_device(arguments.device)
    _check_output(arguments.output)

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


def _train(arguments: argparse.Namespace) -> int:
    from resu_compile.training.runner import load_run_file, run

    if arguments.device is not None:
        _check_device(arguments.device)
    file = load_run_file(arguments.config, output=arguments.output, device=arguments.device)
    outcome = run(
        file,
        resume=arguments.resume,
        progress=sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None,
    )
    print(outcome.table)
    if outcome.result.stopped_early:
        print(f"stopped early, after {outcome.result.steps} steps")
    print(f"stats: {outcome.stats}")
    if outcome.pictures:
        print(f"pictures: {', '.join(map(str, outcome.pictures))}")
    else:
        print("no pictures: pip install resu-compile[plot], then resu-compile plot")
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from resu_compile.training.plots import plot_stats

    folder = arguments.stats.parent if arguments.output is None else arguments.output
    _check_output(folder)
    for path in plot_stats(arguments.stats, folder):
        print(path)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    _check_demo_packages("verify")
    _check_device(arguments.device)
    _check_output(arguments.output)

    from resu_compile.training.verify import VerifyConfig, verify

    config = VerifyConfig(
        tasks=TASKS if arguments.task == "all" else (arguments.task,),
        sparsities=tuple(arguments.sparsity),
        seeds=1 if arguments.quick else arguments.seeds,
        size=arguments.size,
        device=arguments.device,
        quick=arguments.quick,
        compile=arguments.compile,
        preset=arguments.preset,
    )
    outcome = verify(config, tell=lambda line: print(line, file=sys.stderr, flush=True))
    print(outcome.text())
    print(f"numbers: {outcome.write(arguments.output)}")
    return 0 if outcome.passed else 1


def _experiment(arguments: argparse.Namespace) -> int:
    words: list[str] = arguments.words
    if arguments.output is not None:
        _check_output(arguments.output)
    if words[0] == "report" and len(words) == 2:
        from resu_compile.experiments.report import write_report

        report = write_report(words[1], arguments.output, method=arguments.method)
        print(report.text)
        print(f"written: {', '.join(map(str, report.files))}")
        return 0
    if len(words) != 1 or words[0] == "report":
        raise ArgumentError(f"experiment: expected CONFIG or report RESULTS, got {' '.join(words)}")
    return _run_experiment(arguments)


def _run_experiment(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from resu_compile.experiments.config import ExperimentConfig
    from resu_compile.experiments.runner import describe, run_experiment
    from resu_compile.experiments.tasks.registry import check_torch_device
    from resu_compile.experiments.tracking import import_wandb

    if arguments.device is not None:
        check_torch_device(arguments.device)
    config = ExperimentConfig.load(arguments.words[0])
    changes = {"output": arguments.output, "wandb": arguments.wandb}
    config = replace(config, **{k: v for k, v in changes.items() if v is not None})
    print(describe(config), flush=True)
    if arguments.dry_run:
        return 0
    if config.wandb is not None:
        import_wandb()
    outcome = run_experiment(
        config,
        device=arguments.device,
        retry_failed=arguments.retry_failed,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(f"{outcome.done} cells done, {len(outcome.failed)} failed; results: {config.results}")
    print(f"tables and pictures: resu-compile experiment report {config.results}")
    return 1 if outcome.failed else 0


def _check_demo_packages(command: str) -> None:
    missing = [
        package
        for module, package in DEMO_PACKAGES.items()
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise ArgumentError(
            f"{command}: expected {', '.join(missing)} to be installed; "
            "run: pip install resu-compile[demo]"
        )


def _check_output(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"--output: expected a folder, got the file {folder}")


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(
            "--device cuda: expected a GPU that torch can use, found none; "
            "run with --device cpu, or install a CUDA build of torch"
        )


if __name__ == "__main__":
    sys.exit(main())
