"""`inflection-fast exec -- python train.py ...`: measures what a command trains, without a line in its code."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from inflection_fast.alerts import ALERT_KINDS, find_alerts
from inflection_fast.integrations import startup
from inflection_fast.integrations.exec_child import VARIABLE
from inflection_fast.timeline import Timeline, folder_for
from inflection_fast.timeline.timeline import FILE_NAME

__all__ = ["ALERTED", "command"]

ALERTED = 3  # exit status where `--fail-on` names an alert that was raised
NOT_FOUND = 127  # as shells report a command that there is not
ANY = "any"
NOTHING = (
    "nothing was measured: the command trained no model of transformer blocks with an optimizer of torch in a Python"
    " that has inflection_fast installed"
)


def command(argv: Sequence[str]) -> int:
    """Runs a command, prints what its trainings say, and returns its exit status, or 3 for an alert to fail on."""
    parser = argparse.ArgumentParser(
        prog="inflection-fast exec",
        usage="inflection-fast exec [--every N] [--out FOLDER] [--fail-on ALERT] -- COMMAND ...",
        description="Run a command, and measure what it trains: with transformers.Trainer, TRL, Lightning, Accelerate,"
        " or a loop of its own; also python -m, torchrun and accelerate launch.",
    )
    parser.add_argument("--every", type=_positive, default=10, help="measure every so many optimizer steps (10)")
    parser.add_argument("--out", default="runs/exec", help="folder of the timeline, or one beside it (runs/exec)")
    parser.add_argument(
        "--fail-on", action="append", default=[], metavar="ALERT", choices=(ANY, *ALERT_KINDS),
        help=f"exit with {ALERTED} if it was raised: {ANY}, {', '.join(ALERT_KINDS)}; may be given several times",
    )  # fmt: skip
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    asked, run = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    if not run:
        parser.error("expected -- and a command, such as: inflection-fast exec -- python train.py")
    out, began = folder_for(asked.out, "new"), time.time()
    with tempfile.TemporaryDirectory() as notes:
        settings = {"every": asked.every, "out": str(out.absolute()), "notes": notes}
        status = _run(run, {**os.environ, VARIABLE: json.dumps(settings), "PYTHONPATH": _python_path()})
        told = [line for file in sorted(Path(notes).iterdir()) for line in file.read_text("utf-8").splitlines()]
    sys.stdout.flush()
    folders = _measured(out, began)
    for number, folder in enumerate(folders, 1):
        _print(folder, f"training {number} of {len(folders)}: " if len(folders) > 1 else "")
    for line in dict.fromkeys(told):
        _say(line)
    if not folders and not told:
        _say(NOTHING)
    return status or _alerted(folders, asked.fail_on)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of steps, at least 1, got {text!r}")
    return int(text)


def _python_path() -> str:
    first = str(Path(startup.__file__).parent)
    return os.pathsep.join([first, *filter(None, [os.environ.get("PYTHONPATH")])])


def _run(words: list[str], environment: dict[str, str]) -> int:
    try:
        process = subprocess.Popen(words, env=environment)
    except (FileNotFoundError, PermissionError) as error:
        _say(f"the command cannot be run: {error}")
        return NOT_FOUND
    while True:
        try:
            status = process.wait()
            return status if status >= 0 else 128 - status  # ended by a signal, as shells report it
        except KeyboardInterrupt:  # the terminal has told the command, too: let it end
            continue


def _measured(out: Path, began: float) -> list[Path]:
    """The folders of timelines with rows that were written since, in the order in which they were begun."""
    files = [*out.glob(FILE_NAME), *out.parent.glob(f"{out.name}-*/{FILE_NAME}")]
    fresh = [file for file in files if file.stat().st_mtime >= began - 1]
    fresh.sort(key=lambda file: (len(file.parent.name), file.parent.name))
    return [file.parent for file in fresh if len(Timeline.load(file).steps)]


def _print(folder: Path, which: str) -> None:
    from inflection_fast.report.answer import answer
    from inflection_fast.report.content import Content

    content = Content(folder)
    content.update()
    said = answer(content)
    _say(f"{which}{said.verdict}")
    _say(f"why: {said.why}")
    _say(f"next: {said.next}" + (f" {said.command}" if said.command else ""))


def _alerted(folders: list[Path], kinds: Sequence[str]) -> int:
    if not kinds:
        return 0
    found = {alert.kind for folder in folders for alert in find_alerts(Timeline.load(folder))}
    raised = found if ANY in kinds else found & set(kinds)
    if raised:
        _say(f"exit status {ALERTED}, as --fail-on asks for, because of: {', '.join(sorted(raised))}")
    return ALERTED if raised else 0


def _say(line: str) -> None:
    print(f"inflection-fast: {line}", file=sys.stderr)
