"""`inflection-fast exec -- python train.py ...`: measure what a command trains, without changes in its code."""

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

ALERTED = 3  # exit status if an alert of `--fail-on` was raised
NOT_FOUND = 127  # as shells report a missing command
ANY = "any"
NOTHING = (
    "nothing was measured: the command trained no model of transformer blocks with an optimizer of torch in a Python"
    " that has inflection_fast installed"
)


def command(argv: Sequence[str]) -> int:
    """Run a command, print the verdict on its trainings, and return its exit status, or 3 for `--fail-on`."""
    parser = argparse.ArgumentParser(
        prog="inflection-fast exec",
        usage="inflection-fast exec [--every N] [--out FOLDER] [--fail-on ALERT] -- COMMAND ...",
        description="Run a command, and measure what it trains: with transformers.Trainer, TRL, Lightning, Accelerate,"
        " or a loop of its own; also python -m, torchrun and accelerate launch.",
    )
    parser.add_argument("--every", type=_positive, default=10, help="optimizer steps between measured steps (10)")
    parser.add_argument(
        "--out", default="runs/exec", help="folder of the timeline; if it holds one, a new folder beside it (runs/exec)"
    )
    parser.add_argument(
        "--fail-on", action="append", default=[], metavar="ALERT", choices=(ANY, *ALERT_KINDS),
        help=f"exit with {ALERTED} if this alert was raised: {ANY}, {', '.join(ALERT_KINDS)}; may be repeated",
    )  # fmt: skip
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    args, words = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    if not words:
        parser.error("expected -- and a command, such as: inflection-fast exec -- python train.py")
    out, began = folder_for(args.out, "new"), time.time()
    with tempfile.TemporaryDirectory() as notes:
        settings = {"every": args.every, "out": str(out.absolute()), "notes": notes}
        status = _run(words, {**os.environ, VARIABLE: json.dumps(settings), "PYTHONPATH": _python_path()})
        messages = [line for file in sorted(Path(notes).iterdir()) for line in file.read_text("utf-8").splitlines()]
    sys.stdout.flush()
    folders = _measured(out, began)
    for number, folder in enumerate(folders, 1):
        _print(folder, f"training {number} of {len(folders)}: " if len(folders) > 1 else "")
    for line in dict.fromkeys(messages):
        _say(line)
    if not folders and not messages:
        _say(NOTHING)
    return status or _alerted(folders, args.fail_on)


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
            return status if status >= 0 else 128 - status  # of a signal, as shells report it
        except KeyboardInterrupt:  # the terminal sends it to the command, too: wait for its end
            continue


def _measured(out: Path, began: float) -> list[Path]:
    """The folders of timelines with rows written after `began`, in the order of their beginnings."""
    files = [*out.glob(FILE_NAME), *out.parent.glob(f"{out.name}-*/{FILE_NAME}")]
    fresh = [file for file in files if file.stat().st_mtime >= began - 1]
    fresh.sort(key=lambda file: (len(file.parent.name), file.parent.name))
    return [file.parent for file in fresh if len(Timeline.load(file).steps)]


def _print(folder: Path, which: str) -> None:
    from inflection_fast.report.answer import answer
    from inflection_fast.report.content import Content

    content = Content(folder)
    content.update()
    found = answer(content)
    _say(f"{which}{found.verdict}")
    _say(f"why: {found.why}")
    _say(f"next: {found.next}" + (f" {found.command}" if found.command else ""))


def _alerted(folders: list[Path], kinds: Sequence[str]) -> int:
    if not kinds:
        return 0
    found = {alert.kind for folder in folders for alert in find_alerts(Timeline.load(folder))}
    raised = found if ANY in kinds else found & set(kinds)
    if raised:
        _say(f"exit status {ALERTED}, for --fail-on, because of: {', '.join(sorted(raised))}")
    return ALERTED if raised else 0


def _say(line: str) -> None:
    print(f"inflection-fast: {line}", file=sys.stderr)
