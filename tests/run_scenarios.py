"""What each of two processes does in the tests of runs: some runs one after another, by the command line.

`tests/run_scenarios.py SETTINGS ...` runs each file of settings; one that is called `stopped-*` is interrupted
after the first checkpoint of its injected model, and then given again.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def run(settings):
    """The exit status of `python -m inflection_fast run --config SETTINGS`."""
    sys.argv = ["inflection_fast", "run", "--config", settings]
    try:
        runpy.run_module("inflection_fast", run_name="__main__", alter_sys=True)
    except SystemExit as done:
        return done.code


def interrupted(settings):
    from inflection_fast.run.training import _Clock

    keep = _Clock.on_save

    def stop(clock, args, state, control, **kwargs):
        keep(clock, args, state, control, **kwargs)
        if "tune" in Path(args.output_dir).parts:
            raise KeyboardInterrupt

    _Clock.on_save = stop
    code = run(settings)
    _Clock.on_save = keep
    return code


def main(paths):
    for path in paths:
        if Path(path).name.startswith("stopped-"):
            assert interrupted(path) == 130
        assert run(path) == 0


if __name__ == "__main__":
    main(sys.argv[1:])
