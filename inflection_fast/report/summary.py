"""The summary of a run in the terminal: three tables and the answer, in 80 columns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from inflection_fast.decide import Plan
from inflection_fast.records import OverheadRecord
from inflection_fast.report.answer import answer
from inflection_fast.report.content import Content, timeline_of
from inflection_fast.report.folder import Run, read
from inflection_fast.report.profile import by_name, log_gradient
from inflection_fast.report.sections import missing_parts, model_name, overhead, overhead_share
from inflection_fast.report.verdict import against, verdict
from inflection_fast.report.words import accuracy, count, score, significant, value

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["summary"]

Justify = Literal["left", "right"]

LONG = 32  # with more layers than this only the chosen ones and their neighbours are listed


def summary(run_folder: str | Path, console: Console) -> None:
    """Print the summary of a run; of a folder with a timeline alone, three lines.

    ValueError if the folder is not a run or a file in it is damaged.
    """
    from rich.text import Text

    def show(what: str | Table, style: str = "") -> None:
        console.print(Text(what, style) if isinstance(what, str) else what, soft_wrap=False)

    folder = Path(run_folder)
    if not (folder / "run.json").is_file() and timeline_of(folder).is_file():
        content = Content(folder)
        content.update()
        said = answer(content)
        for line in (said.verdict, said.why, " ".join(part for part in (said.next, said.command) if part)):
            show(line)
        return
    run = read(run_folder)
    first, *rest = verdict(run)
    show(f"Inflection layers of {model_name(run)}", "bold")
    show(_stages(run) if run.stages else "No stage has finished.")
    console.print()
    show(first, "bold")
    for sentence in rest:
        show(sentence)
    console.print()
    if run.plan is not None:
        show("Chosen layers", "bold")
        show(run.plan.summary)
        show(_layers(run.plan))
        console.print()
    show("Cost of measuring", "bold")
    timed = run.measure.overhead if run.measure else None
    if timed is not None:
        show(_overhead(timed))
    for sentence in overhead(run)[0 if timed is None else 1 :]:
        show(sentence)
    absent = missing_parts(run)
    if absent:
        console.print()
        show("Missing or to be noted", "bold")
        for sentence in absent:
            show(f"- {sentence}")


def _table(*columns: tuple[str, Justify]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", caption_justify="left")
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold")
    return table


def _stages(run: Run) -> Table:
    from rich.text import Text

    stages = run.in_order
    language = all(stage.accuracy is None for stage in stages)
    kind = "loss" if language else "accuracy"
    table = _table(("stage", "left"), (kind, "right"), ("injected better by", "left"), ("trained", "right"))
    unit = "Loss in nats per token" if language else "Accuracy and differences (in points) with one standard error"
    table.caption = f"{unit}; trained: parameters."
    for stage in stages:
        table.add_row(
            Text(stage.label, style="bold" if stage is run.tune else ""),
            value(stage.loss, 4) if language else accuracy(stage.accuracy, stage.standard_error),
            against(run, stage),
            count(stage.trainable_parameters),
        )
    return table


def _layers(plan: Plan) -> Table:
    from rich.text import Text

    layers = len(plan.scores)
    rows = list(range(layers))
    if layers > LONG:
        rows = sorted({i for chosen in plan.layers for i in (chosen - 1, chosen, chosen + 1) if 0 <= i < layers})
    entropy, gradient = by_name(plan, "entropy"), log_gradient(plan)
    measures: list[tuple[str, Justify]] = [(name, "right") for name in ("layer", "entropy", "log grad", "SKI")]
    table = _table(*measures, ("", "left"), ("reason", "left"))
    for layer in rows:
        chosen = layer in plan.layers
        numbers = [significant(entropy[layer]), significant(gradient[layer]), score(plan.scores[layer])]
        style = "bold" if chosen else ""
        cells = [str(layer), *numbers, "*" if chosen else "", plan.reasons[layer] if chosen else ""]
        table.add_row(*(Text(cell, style=style if i < 5 else "") for i, cell in enumerate(cells)))
    if len(rows) < layers:
        table.caption = f"The chosen of {layers} layers and their neighbours; entropy in nats; * chosen."
    else:
        table.caption = "Entropy in nats; * chosen."
    return table


def _overhead(timed: OverheadRecord) -> Table:
    table = _table(("unmeasured step, ms", "right"), ("measured step, ms", "right"), ("share of training", "right"))
    table.add_row(significant(timed.off_ms), significant(timed.on_ms), overhead_share(timed))
    return table
