"""The command line: `inflection-fast measure | plan | tune | report | scan | compare | run | study | overhead | ...`.

Each command builds its parser when it is called: the settings of a run are defined beside the code that uses them, and
`inflection-fast --help` does not load that code.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

USER_ERROR = 2  # as argparse exits
INTERRUPTED = 130  # as shells report Ctrl-C
EXTRAS = (
    "transformers", "peft", "accelerate", "datasets", "filelock",
    "gguf", "jsonargparse", "matplotlib", "rich", "yaml",
)  # fmt: skip
PARALLEL = ("run", "measure", "tune", "exec", "doctor")  # commands that torchrun may start in several processes
STUDY_EXTRAS = ("statsmodels", "datasketch")

COMMANDS = {
    "init": "write a first settings file for a model and a data set",
    "measure": "train on a source data set, if there is one, and measure a shallow training on the target",
    "plan": "choose layers from what was measured",
    "tune": "put LoRA on the planned layers, train, and compare with other layers",
    "report": "write the report of a run, or of several side by side",
    "watch": "serve the page of a run on this machine, following it while it trains",
    "scan": "say what is unusual in any checkpoint, from its weights, and with texts from attention and gradients",
    "compare": "compare two checkpoints layer by layer: features, what is measured on both, weights",
    "run": "measure, plan, tune and report in this order, continuing where an interrupted run stopped",
    "inherit": "build a smaller model of the early blocks, train it on, and compare it with others of that size",
    "study": "compare many ways to place adapters over transfers and seeds, and report what they say",
    "exec": "run a training command, measure it without a line in its code, and say what was seen",
    "overhead": "time training steps of a model with and without measuring, on this machine",
    "doctor": "say what is installed, what is loaded, and what is missing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for an error of the user, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _top_parser()
    if not argv or argv[0] not in COMMANDS:
        parser.parse_args(argv)
        parser.print_help(sys.stderr)
        return USER_ERROR
    from inflection_fast.run import processes
    from inflection_fast.run.errors import UserError, disk_full, refused_path

    try:
        if processes.count() > 1 and argv[0] not in PARALLEL:
            raise UserError(f"{argv[0]} runs in one process: start it without torchrun")
        return _DISPATCH[argv[0]](argv[1:])
    except KeyboardInterrupt:
        return _fail("interrupted; the same command continues from the last checkpoint", INTERRUPTED)
    except processes.FirstFailed:
        return USER_ERROR
    except UserError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        extras = [name for name, packages in (("run", EXTRAS), ("study", STUDY_EXTRAS)) if error.name in packages]
        if not extras:
            raise
        return _fail(f"the package {error.name} is not installed: pip install 'inflection_fast[{extras[0]}]'")
    except Exception as error:
        if disk_full(error):
            return _fail(f"the disk is full ({error}): free some space and give the same command again to continue")
        refused = refused_path(error)
        if refused is None:
            raise
        return _fail(refused)


def _top_parser() -> argparse.ArgumentParser:
    from inflection_fast import __version__

    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="inflection-fast",
        usage="inflection-fast COMMAND [options]",
        description="Measures transformers while they train, and puts LoRA where that points.",
        epilog="\n".join(["commands:", *lines, "", "inflection-fast COMMAND --help lists the options of a command."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=list(COMMANDS), help=argparse.SUPPRESS)
    return parser


def _fail(message: str, code: int = USER_ERROR) -> int:
    from inflection_fast.run import processes

    which = "" if processes.first() else f" (process {os.environ['RANK']})"
    print(f"inflection-fast{which}: {message}", file=sys.stderr)
    return code


def _console() -> Console:
    from rich.console import Console

    from inflection_fast.run import processes

    return Console(highlight=False, soft_wrap=True, quiet=not processes.first())


def _settings_parser(command: str) -> Any:
    """The parser of a command that takes the whole tree of settings."""
    from jsonargparse import ArgumentParser

    from inflection_fast.run.config import RunConfig

    parser = ArgumentParser(
        prog=f"inflection-fast {command}", description=f"{COMMANDS[command].capitalize()}.", exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file of settings; flags win over it")
    parser.add_class_arguments(RunConfig, None)
    return parser


def _parse(parser: Any, argv: list[str], *, objects: bool = True) -> Any:
    """The parsed arguments, with configuration objects if `objects`. UserError for an unknown or wrong setting."""
    from inflection_fast.run.errors import UserError

    try:
        parsed = parser.parse_args(argv)
        return parser.instantiate(parsed) if objects else parsed
    except (ValueError, TypeError, argparse.ArgumentError, OSError) as error:
        raise UserError(f"settings: {_reason(str(error))}") from error


def _reason(text: str) -> str:
    """The parser's message on one line, without its part about null where a setting may be null."""
    if "Union subtypes" in text:
        reasons = [line.strip(" -") for line in text.splitlines() if line.strip().startswith("- ")]
        lead = text.splitlines()[0] if text.startswith("Parser key") else ""
        text = " ".join([lead, *(reason for reason in reasons if "NoneType" not in reason)])
    return " ".join(text.split())


def _config(parsed: Any) -> Any:
    from inflection_fast.run.config import RunConfig
    from inflection_fast.run.errors import user_errors

    with user_errors(about="settings"):
        return RunConfig(**{name: getattr(parsed, name) for name in RunConfig.__dataclass_fields__})


def _print_help(argv: list[str], parser: Any, command: str) -> bool:
    """Print the help that `argv` asks for, if any: the usual options, or every option with `--help all`."""
    asked = next((i for i, argument in enumerate(argv) if argument in ("-h", "--help")), None)
    if asked is None:
        return False
    if argv[asked + 1 : asked + 2] == ["all"]:
        parser.print_help()
    else:
        from inflection_fast.run.usual_options import usual_options

        print(usual_options(parser, command, COMMANDS[command]))
    return True


def _init(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="inflection-fast init", description=f"{COMMANDS['init'].capitalize()}.")
    parser.add_argument("--model", required=True, help="folder of a saved model, or its name on the hub")
    parser.add_argument(
        "--data", required=True, help="a .csv, .tsv, .json, .jsonl, .parquet or .txt file, or a hub name"
    )
    tasks = ("sequence-classification", "causal-lm")
    parser.add_argument("--task", choices=tasks, default=tasks[0], help=f"what the model is trained for ({tasks[0]})")
    parser.add_argument("--text", help="column of the text (found where it is not named)")
    parser.add_argument("--label", help="column of the label (found where it is not named)")
    parser.add_argument("--out", default="run.yaml", help="file to write (run.yaml)")
    args = parser.parse_args(argv)
    from inflection_fast.run.init_config import write_init_config
    from inflection_fast.run.quiet import quiet_libraries

    quiet_libraries()
    path = Path(args.out).expanduser()
    data = write_init_config(path, model=args.model, data=args.data, task=args.task, text=args.text, label=args.label)
    print(f"{args.data}: {len(data.train)} texts to train on, {len(data.test)} to test on")
    print(f"settings: {path}; look at them, then: inflection-fast run --config {path}")
    return 0


def _run_stages(command: str, argv: list[str]) -> int:
    """The stages of `measure`, of `tune`, or of `run`: those of both, and the report."""
    parser = _settings_parser(command)
    if command == "tune":
        parser.add_argument("--plan", type=str | None, default=None, help="a plan.json to use; null: the run's own")
    if _print_help(argv, parser, command):
        return 0
    parsed = _parse(parser, argv)
    config, console = _config(parsed), _console()
    from inflection_fast.run import processes
    from inflection_fast.run.plans import adopt_plan
    from inflection_fast.run.preflight import check_before_training
    from inflection_fast.run.quiet import quiet_libraries
    from inflection_fast.run.stages import Stages

    quiet_libraries()
    stages = Stages(config, say=lambda line: console.print(line, markup=False), quiet=not sys.stderr.isatty())
    if command == "tune":
        if (plan := parsed.plan) is not None:
            processes.alone(lambda: adopt_plan(stages.folder.path, Path(plan).expanduser()))
        stages.plan()  # an error where there is no timeline to make one from
    check_before_training(stages, measure=command != "tune", tune=command != "measure", report=command == "run")
    if command != "tune":
        stages.source()
        stages.measure()
    if command == "run":
        stages.plan()
    if command != "measure":
        stages.tune()
        for name in stages.config.baselines:
            stages.baseline(name)
    return _show(stages.folder.path, stages.report(), console) if command == "run" else 0


def _report(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="inflection-fast report", description="Write the report of a run.")
    parser.add_argument("folder", nargs="+", help="the output folder of a run, or of a Monitor; several: side by side")
    parser.add_argument("--out", help="where the page of several runs goes; default: comparison, beside the first run")
    parser.add_argument("--figures", action="store_true", help="also write every chart as SVG and PDF")
    from inflection_fast import report
    from inflection_fast.run.errors import user_errors

    args = parser.parse_args(argv)
    with user_errors(ValueError, FileNotFoundError):
        if len(args.folder) > 1:
            if args.figures:
                raise ValueError("--figures: expected one run; for several, draw report.difference_map on your axes")
            _console().print(f"report: {report.write_several(args.folder, args.out)}", markup=False)
            return 0
        if args.out is not None:
            raise ValueError("--out: expected several runs; the report of one goes into its folder")
        return _show(args.folder[0], report.write(args.folder[0], figures=args.figures), _console())


def _watch(argv: list[str]) -> int:
    from inflection_fast.report.watch import command
    from inflection_fast.run.errors import user_errors

    with user_errors(ValueError, FileNotFoundError):
        return command(argv)


def _show(folder: str | os.PathLike, page: str | os.PathLike, console: Console) -> int:
    from inflection_fast import report

    report.summary(Path(folder), console)
    console.print(f"report: {page}", markup=False)
    return 0


def _plan(argv: list[str]) -> int:
    from jsonargparse import ArgumentParser

    from inflection_fast.decide import SelectConfig
    from inflection_fast.run.plans import make_plan, select_settings

    parser = ArgumentParser(
        prog="inflection-fast plan",
        description="Choose layers from a timeline. In a run folder, --select changes the run's own settings.",
        exit_on_error=False,
    )
    parser.add_argument("folder", type=str, help="a run folder, or a folder with timeline.arrows, or that file")
    parser.add_argument("--out", type=str | None, default=None, help="the plan to write; null: plan.json in the folder")
    parser.add_class_arguments(SelectConfig, "select")
    # First the folder alone: the flags may be valid only together with the settings of its run.
    defaults = select_settings(Path(_parse(parser, argv, objects=False).folder))
    parser.set_defaults({f"select.{name}": value for name, value in defaults.items()})
    parsed = _parse(parser, argv)
    plan, path = make_plan(
        Path(parsed.folder).expanduser(), parsed.select, None if parsed.out is None else Path(parsed.out).expanduser()
    )
    console = _console()
    for layer in plan.layers:
        console.print(f"layer {layer}: {plan.reasons[layer]}", markup=False)
    console.print(plan.summary, markup=False)
    console.print(f"plan: {path}", markup=False)
    return 0


def _doctor(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="inflection-fast doctor", description=f"{COMMANDS['doctor']}.").parse_args(argv)
    from inflection_fast.run.doctor import examine, show

    return show(examine())


def _defined_in(module: str, function: str = "command", *, console: bool = False) -> Callable[[list[str]], int]:
    """A command that another module defines, which is imported when the command runs."""

    def run(argv: list[str]) -> int:
        command = getattr(import_module(f"inflection_fast.{module}"), function)
        return command(argv, _console()) if console else command(argv)

    return run


_DISPATCH: dict[str, Callable[[list[str]], int]] = {
    "init": _init,
    "measure": partial(_run_stages, "measure"),
    "plan": _plan,
    "tune": partial(_run_stages, "tune"),
    "report": _report,
    "watch": _watch,
    "scan": _defined_in("checkpoints.commands", "scan_command", console=True),
    "compare": _defined_in("checkpoints.commands", "compare_command", console=True),
    "run": partial(_run_stages, "run"),
    "inherit": _defined_in("run.inheriting", console=True),
    "study": _defined_in("study.command", "study"),
    "exec": _defined_in("integrations.launch"),
    "overhead": _defined_in("run.overhead", console=True),
    "doctor": _doctor,
}
