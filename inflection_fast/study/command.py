"""`inflection-fast study`: runs a study, prints its plan, or writes its report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from inflection_fast.run.errors import UserError, user_errors

__all__ = ["study"]


def study(argv: list[str]) -> int:
    """The command; `study report` writes the report of cells that are there."""
    if argv[:1] == ["report"]:
        return _report(argv[1:])
    from jsonargparse import ArgumentParser
    from rich.console import Console

    from inflection_fast.study.config import StudyConfig

    parser = ArgumentParser(
        prog="inflection-fast study",
        description="Compute the cells of a study that are missing. `study report FOLDER` writes its report.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of settings; flags win over it")
    parser.add_argument("--jobs", type=int, default=1, help="so many workers at once")
    parser.add_argument(
        "--only", type=str | None, default=None, help="only cells of this pattern, as tweets/*/greedy/1"
    )
    parser.add_argument("--executor", type=str, default="local", help="local: processes; ray: tasks of a Ray cluster")
    parser.add_argument("--plan-only", action="store_true", help="print the cells and an estimate of the time")
    parser.add_argument(
        "--published", type=str | None, default=None, help="a folder of published cells, which are not computed again"
    )
    parser.add_argument("--retry", action="store_true", help="compute cells again that failed")
    parser.add_class_arguments(StudyConfig, None)
    parsed = _parse(parser, argv)
    if parsed.jobs < 1 or parsed.executor not in ("local", "ray"):
        raise UserError(
            f"--jobs must be at least 1 and --executor local or ray, got {parsed.jobs}, {parsed.executor!r}"
        )
    with user_errors(about="settings"):
        config = StudyConfig(**{name: getattr(parsed, name) for name in StudyConfig.__dataclass_fields__})
    console = Console(highlight=False, soft_wrap=True)
    from inflection_fast.run.quiet import quiet_libraries

    quiet_libraries()
    if parsed.plan_only:
        return _plan(config, parsed.only, parsed.jobs, console)
    return _run(config, parsed, console)


def _parse(parser: Any, argv: list[str]) -> Any:
    import argparse

    try:
        return parser.instantiate(parser.parse_args(argv))
    except (ValueError, TypeError, argparse.ArgumentError, OSError) as error:
        raise UserError(f"settings: {' '.join(str(error).split())}") from error


def _run(config: Any, parsed: Any, console: Any) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from inflection_fast.study.cells import cells_of
    from inflection_fast.study.publish import reuse
    from inflection_fast.study.runner import finished, retry, run
    from inflection_fast.study.store import Store

    store = Store.of(config)
    if parsed.published is not None:
        console.print(f"{reuse(Path(parsed.published), config, store)} published cells were taken over", markup=False)
    if parsed.retry:
        console.print(f"{retry(config, store, parsed.only)} failed cells will be computed again", markup=False)
    cells = cells_of(config, parsed.only)
    columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), speed_estimate_period=600) as bar:
        task = bar.add_task("cells", total=len(cells), completed=finished(cells, store))
        end = run(
            config,
            jobs=parsed.jobs,
            executor=parsed.executor,
            only=parsed.only,
            show=lambda: bar.update(task, completed=finished(cells, store)),
        )
    failed = f", {end.failed} of them failed (their files say why)" if end.failed else ""
    console.print(f"{end.done} of {end.cells} cells{failed}: {config.folder / 'cells'}", markup=False)
    return 0 if end.left == 0 else 1


def _plan(config: Any, only: str | None, jobs: int, console: Any) -> int:
    from inflection_fast.study.estimate import estimate

    for line in estimate(config, only, jobs):
        console.print(line, markup=False)
    return 0


def _report(argv: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="inflection-fast study report", description="Write the report of a study from the JSON files of its cells."
    )
    parser.add_argument("folder", help="the folder of a study, or any folder with a folder `cells`")
    parser.add_argument(
        "--out", default=None, help="the page to write; pictures lie beside it (default: study.md there)"
    )
    args = parser.parse_args(argv)
    from inflection_fast.study.report import write

    with user_errors(ValueError, FileNotFoundError):
        print(f"report: {write(args.folder, args.out)}")
    return 0
