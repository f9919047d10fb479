"""The words and tables of the page as HTML. All text from files is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from inflection_fast.decide import Plan
from inflection_fast.report.answer import Answer, answer
from inflection_fast.report.content import Content
from inflection_fast.report.folder import Run, Stage
from inflection_fast.report.profile import layer_rows
from inflection_fast.report.sections import described, missing_parts, model_name, overhead, training_note
from inflection_fast.report.verdict import NOISE, against, verdict
from inflection_fast.report.words import MISSING, accuracy, count, percent, significant, trainable, value

__all__ = ["answer_block", "choice_block", "fragments", "table", "title"]

PLOT = (220.0, 22.0)  # width and height of the small interval plots in a table
SHOWN_ALERTS = 12  # more than this are folded away


def title(run: Run) -> str:
    """The title of the page, as plain text."""
    return f"Inflection layers of {model_name(run)}"


def fragments(content: Content) -> dict[str, str]:
    """The text parts of the page by the id of their element."""
    return {
        "heading": _heading(content),
        "answer": answer_block(answer(content)),
        "alert-list": _alerts(content),
        "choice-words": choice_block(content.run.plan),
        "stages-words": _stages(content.run),
        "settings-words": _settings(content),
        "missing-words": _missing(content),
    }


def answer_block(said: Answer) -> str:
    """Verdict, why, next."""
    command = f"<code>{escape(said.command)}</code>" if said.command else ""
    lines = (("Verdict", escape(said.verdict)), ("Why", escape(said.why)), ("Next", f"{escape(said.next)} {command}"))
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in lines) + "</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), caption: str = "") -> str:
    """A table of HTML cells; the columns `numbers` are right-aligned."""

    def cells(row: Sequence[str], tag: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        return "".join(
            f"<{tag}{scope}{' class=n' if i in numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    said = f"<caption>{caption}</caption>" if caption else ""
    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>"
    return f'<div class="scroll"><table>{said}{top}<tbody>{body}</tbody></table></div>'


def _heading(content: Content) -> str:
    run, measured = content.run, content.measured
    facts = []
    if measured is not None:
        model = measured.meta.get("model") or {}
        facts += [str(model.get("class"))] if model.get("class") else []
        facts += [f"{count(model.get('parameters'))} parameters"] if model.get("parameters") else []
        facts += [f"{len(measured.layers)} layers", f"{measured.heads} heads"]
        facts += [f"{count(len(measured.steps))} measured step{'s' * (len(measured.steps) != 1)}"]
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return f"<p class=folder>{escape(str(content.folder))}</p><h1>{escape(title(run))}</h1><ul class=facts>{items}</ul>"


def _alerts(content: Content) -> str:
    alerts = content.alerts
    if content.measured is None or not len(content.measured.steps):
        return "<p>Nothing has been measured, so there are no alerts.</p>"
    if not alerts:
        return "<p>No alert was raised.</p>"
    rows = [
        (
            count(alert.step),
            escape(alert.kind.replace("_", " ")),
            "" if alert.layer is None else str(alert.layer),
            "" if alert.head is None else str(alert.head),
            escape(alert.message),
        )
        for alert in alerts
    ]
    left_out = content.alerts_in_all - len(alerts)
    note = f"<p>{count(left_out)} more in the middle of the run are left out here.</p>" if left_out else ""
    listed = table(("Step", "Kind", "Layer", "Head", "What"), rows, numbers=(0, 2, 3))
    opened = " open" if len(rows) <= SHOWN_ALERTS else ""
    return f"<details{opened}><summary>{count(len(rows))} alerts in words</summary>{listed}</details>{note}"


def choice_block(plan: Plan | None) -> str:
    """Which layers were chosen, and why."""
    if plan is None:
        return "<p>No layers have been chosen: there is no plan.json.</p>"
    reasons = "".join(
        f'<li value="{layer}"><b>Layer {layer}</b> {escape(plan.reasons[layer])}</li>' for layer in plan.layers
    )
    cells = layer_rows(plan, range(len(plan.scores)))
    rows = [(*row, "chosen" if int(row[0]) in plan.layers else "") for row in cells]
    numbers = table(("Layer", "Entropy, nats", "log gradient norm", "SKI", ""), rows, numbers=(0, 1, 2, 3))
    options = ", ".join(f"{escape(str(name))} = {escape(str(value))}" for name, value in plan.config.items())
    return (
        f"<p>{escape(plan.summary)}</p><ul class=reasons>{reasons}</ul>"
        f"<details><summary>Numbers by layer</summary>{numbers}</details>"
        f"<p class=note>Options of the choice: {options}.</p>"
    )


def _stages(run: Run) -> str:
    stages = run.in_order
    if not stages:
        return "<p>No stage has finished, so there are no results.</p>"
    language = all(stage.accuracy is None for stage in stages)
    span = _span(stages, language)
    rows = []
    for stage in stages:
        result = value(stage.loss, 4) if language else accuracy(stage.accuracy, stage.standard_error)
        name = f"<b>{escape(stage.label)}</b>" if stage is run.tune else escape(stage.label)
        rows.append(
            (name, escape(result), _interval(stage, span, language, stage is run.tune), escape(against(run, stage)),
             trainable(stage), count(stage.steps),
             escape(training_note(stage)) if stage.trainable_parameters else "")
        )  # fmt: skip
    kind = "Loss, nats per token" if language else "Accuracy"
    head = ("Stage", kind, _axis(span, language), "Injected better by", "Trained parameters", "Steps", "Cost")
    notes = [f"± and bars are one standard error; differences up to {NOISE:g} of them are called noise."] * (
        not language
    )
    if run.source is not None:
        notes.append("The source stage is another task, and not to be compared with the others.")
    bullets = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict(run)[1:])
    return (
        f"{table(head, rows, numbers=(1, 4, 5))}<p class=note>{' '.join(notes)}</p>"
        f"<ul>{bullets}</ul><p><b>Cost of measuring.</b> {escape(' '.join(overhead(run)))}</p>"
    )


def _span(stages: Sequence[Stage], language: bool) -> tuple[float, float] | None:
    """The range that all interval plots share; None where there is no number."""
    ends = []
    for stage in stages:
        value, error = (stage.loss, 0) if language else (stage.accuracy, stage.standard_error or 0)
        ends += [] if value is None else [value - error, value + error]
        ends += [stage.majority] if stage.majority is not None and not language else []
    if not ends:
        return None
    room = 0.08 * (max(ends) - min(ends)) or 0.01
    return min(ends) - room, max(ends) + room


def _axis(span: tuple[float, float] | None, language: bool) -> str:
    if span is None:
        return ""
    low, high = (significant(end) if language else percent(end, 0) for end in span)
    return f"<span class=span><span>{low}</span><span>{high}</span></span>"


def _interval(stage: Stage, span: tuple[float, float] | None, language: bool, ours: bool) -> str:
    """A point with its error bar, and a tick at the accuracy of always giving the most frequent answer."""
    value, error = (stage.loss, None) if language else (stage.accuracy, stage.standard_error)
    if value is None or span is None:
        return MISSING
    width, height = PLOT

    def x(number: float) -> str:
        return f"{width * (number - span[0]) / (span[1] - span[0]):.1f}"

    middle = height / 2
    parts = [f'<line class=base x1="0" x2="{width:g}" y1="{middle:g}" y2="{middle:g}"/>']
    if stage.majority is not None and not language:
        parts.append(
            f'<line class=majority x1="{x(stage.majority)}" x2="{x(stage.majority)}" y1="4" y2="{height - 4:g}"/>'
        )
    if error:
        parts.append(
            f'<line class=bar x1="{x(value - error)}" x2="{x(value + error)}" y1="{middle:g}" y2="{middle:g}"/>'
        )
    parts.append(f'<circle cx="{x(value)}" cy="{middle:g}" r="4.5"/>')
    kind = " ours" if ours else " other" if stage.stage == "source" else ""
    return (
        f'<svg class="interval{kind}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'role="presentation">{"".join(parts)}</svg>'
    )


def _settings(content: Content) -> str:
    run, measured = content.run, content.measured
    blocks = []
    if run.settings:
        blocks.append("<ul>" + "".join(f"<li>{_marked(line)}</li>" for line in described(run)) + "</ul>")
    if run.config is not None:
        blocks.append(f"<details><summary>config.yaml</summary><pre>{escape(run.config.rstrip())}</pre></details>")
    if measured is not None:
        config = measured.meta.get("config") or {}
        rows = [(escape(str(name)), escape(str(value))) for name, value in config.items()]
        if rows:
            blocks.append(
                f"<details><summary>Settings of the monitor</summary>{table(('Setting', 'Value'), rows)}</details>"
            )
        layers = table(
            ("Layer", "Name"), [(str(i), escape(name)) for i, name in enumerate(measured.layers)], numbers=(0,)
        )
        blocks.append(f"<details><summary>Names of the layers</summary>{layers}</details>")
    versions = run.versions or (measured.meta.get("versions") if measured else None) or {}
    if versions:
        rows = [(escape(str(name)), escape(str(value))) for name, value in versions.items()]
        blocks.append(f"<details><summary>Versions</summary>{table(('Package', 'Version'), rows)}</details>")
    seed = MISSING if run.seed is None else str(run.seed)
    return f"<p>Seed: {escape(seed)}.</p>" + "".join(blocks)


def _missing(content: Content) -> str:
    run, measured = content.run, content.measured
    if not run.versions and not run.stages:  # nothing but a timeline was ever asked for
        said = [] if measured is None or not measured.truncated else [
            "The timeline ends in a row that is not whole: it is being written, or its writer was cut off."
        ]  # fmt: skip
    else:
        said = missing_parts(run)
    never = [series.column.label for series in content.series.values() if not len(series.places.steps)]
    if never:
        said.append(f"Without any value in this run: {', '.join(never)}.")
    if not said:
        return "<p>Nothing is missing.</p>"
    return "<ul>" + "".join(f"<li>{_marked(line)}</li>" for line in said) + "</ul>"


def _marked(text: str) -> str:
    """Markdown sentences as HTML: bold between `**`, code between backticks."""
    out = []
    for i, part in enumerate(escape(text).split("**")):
        code = "".join(f"<code>{piece}</code>" if j % 2 else piece for j, piece in enumerate(part.split("`")))
        out.append(f"<b>{code}</b>" if i % 2 else code)
    return "".join(out)
