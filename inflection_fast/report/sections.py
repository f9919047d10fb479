"""The sections of the Markdown page: the answer first, then its basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from inflection_fast.decide import Plan
from inflection_fast.records import OverheadRecord
from inflection_fast.report.folder import Run, Stage
from inflection_fast.report.pictures import Pictures, drawn_columns
from inflection_fast.report.profile import layer_rows
from inflection_fast.report.verdict import NOISE, against, verdict
from inflection_fast.report.words import (
    MISSING,
    accuracy,
    capitalised,
    count,
    layer_list,
    listed,
    percent,
    seconds,
    significant,
    trainable,
    value,
)  # fmt: skip

__all__ = ["described", "missing_parts", "model_name", "overhead", "overhead_share", "page", "training_note"]

LONG = 64  # with more layers than this the table lists the chosen ones only


def page(run: Run, pictures: Pictures) -> str:
    """The whole page as Markdown."""
    parts = [
        [f"# Inflection layers of {model_name(run)}", LEAD],
        _answer(run, pictures),
        _missing(run, pictures),
        _what_was_run(run),
        _choice(run, pictures),
        _signals(run, pictures),
        ["## What measuring cost", " ".join(overhead(run))],
        _repeat(run),
        _versions(run),
    ]
    return "\n\n".join(block for part in parts for block in part if block) + "\n"


def model_name(run: Run) -> str:
    """The name of the model in the settings, or its class."""
    path = (run.settings.get("model") or {}).get("path")
    if path:
        return str(path).rstrip("/").rsplit("/", 1)[-1]
    return (_model(run).get("class")) or "an unnamed model"


def _model(run: Run) -> dict:
    return (run.plan.model if run.plan else None) or (run.timeline.meta.get("model") if run.timeline else None) or {}


LEAD = (
    "A run measures a pretrained transformer while a part of it trains on a new task, chooses a few of its layers from "
    "what was measured, puts small trainable adapters (LoRA) into exactly those, and compares the result with other "
    "ways to train. This page says what that was worth here, which layers were chosen and why, and how to repeat it. A "
    "layer is a transformer block, counted from 0 in the order in which the input passes them; *injected* means the "
    "model with LoRA in the chosen layers."
)


def _answer(run: Run, pictures: Pictures) -> list[str]:
    first, *rest = verdict(run)
    blocks = ["## The answer", f"**{first}**", _bullets(rest), _stage_table(run)]
    if any(stage.accuracy is not None for stage in run.in_order):
        blocks.append(
            f"± is one binomial standard error. Differences up to {NOISE:g} standard errors of the difference are "
            f"called noise; {_pairing(run)}"
        )
    return [*blocks, _picture(pictures, "stages")]


def _pairing(run: Run) -> str:
    if run.tune is not None and run.tune.right and all(stage.right for stage in run.baselines):
        return "the models are compared example by example, so what both get right or both get wrong carries no noise."
    return "the two models of a comparison are treated as independent samples, which errs towards noise."


def _stage_table(run: Run) -> str:
    stages = run.in_order
    if not stages:
        return "No stage has finished, so there are no results."
    language = all(stage.accuracy is None for stage in stages)
    kinds = "Loss, nats per token | Perplexity" if language else "Accuracy | Loss"
    unit = "nats" if language else "points"
    lines = [
        f"| Stage | {kinds} | Injected better by, {unit} | Evaluated on | Trainable parameters | LoRA in | Steps |",
        "|---|--:|--:|--:|--:|--:|---|--:|",
    ]
    for stage in stages:
        if language:
            scores = f"{value(stage.loss)} | {value(stage.perplexity)}"
        else:
            scores = f"{accuracy(stage.accuracy, stage.standard_error)} | {value(stage.loss)}"
        bold = "**" if stage is run.tune else ""
        lines.append(
            f"| {bold}{_cell(stage.label)}{bold} | {scores} | {against(run, stage)} | {count(stage.n)} | "
            f"{trainable(stage)} | {_where(stage)} | {count(stage.steps)} |"
        )
    note = ["The source stage is another task: its score is not comparable with the others."] if run.source else []
    return "\n\n".join(["\n".join(lines), *note])


def _missing(run: Run, pictures: Pictures) -> list[str]:
    absent = missing_parts(run) + [f"{title}: {why}." for title, why in pictures.missing.items()]
    return ["## What is missing or to be noted", _bullets(absent)] if absent else []


def missing_parts(run: Run) -> list[str]:
    """What is missing in this run, as sentences."""
    absent = []
    settings = run.settings
    if run.source is None:
        asked = settings.get("source") is not None
        absent.append(
            "The source stage has not finished."
            if asked
            else "There was no source stage: the model came to the target task as it was pretrained."
        )
    if run.measure is None:
        absent.append("The measure stage has not finished: there is no shallow-unfreezing model to compare with.")
    if run.timeline is None:
        absent.append("There is no timeline: nothing was measured.")
    elif run.timeline.truncated:
        absent.append("The timeline ends in a torn row, which was left out: the measured run was cut off.")
    if run.timeline is not None and (alone := run.timeline.steps[run.timeline.missing_ranks > 0]).size:
        absent.append(
            f"In {alone.size} of {run.timeline.steps.size} measured steps, from step {alone[0]} on, a rank was lost: "
            "their values are those of one rank alone, and they have no gradient norms."
        )
    padded = getattr(run.timeline, "padded_rows", None)  # timelines of earlier versions do not say
    if padded is not None and (padded > 0).any():
        absent.append(
            "Padded rows are included in the means over attention rows: the model's mask has another length than its "
            "attention, which has none of its own."
        )
    if run.plan is None:
        absent.append("There is no plan: no layers have been chosen.")
    if run.plan is not None and run.timeline is not None and not run.fits:
        absent.append(
            f"The plan was made for a model of {len(run.plan.scores)} layers, and {len(run.timeline.layers)} were "
            "measured here: the maps mark no chosen layers."
        )
    if run.tune is None:
        absent.append("The tune stage has not finished: there is no injected model.")
    elif run.plan is not None and not run.plan.layers and run.tune.layers:
        absent.append(
            f"The plan names no layer; the injected model has LoRA in {layer_list(run.tune.layers)}, the highest "
            "scores, as the setting `tune.when_empty` asks."
        )
    elif run.plan is not None and run.tune.layers is not None and run.tune.layers != tuple(run.plan.layers):
        absent.append(
            f"The plan names {layer_list(run.plan.layers)}, and the injected model has LoRA in "
            f"{layer_list(run.tune.layers)}: they do not belong together, and the scores are those of the latter."
        )
    wanted = [f"baseline-{name}" for name in settings.get("baselines") or ()]
    for name in wanted:
        if name not in run.stages:
            absent.append(
                f"The stage {name} has no results: it has not finished, or was left out because its layers would be "
                "the chosen ones or because none were chosen."
            )
    if not wanted and not any(name.startswith("baseline-") for name in run.stages):
        absent.append("There is no LoRA baseline: the chosen layers were not compared with other layers.")
    absent += [
        f"run.json calls the stage {name} finished, and its results (stage.json) are not there."
        for name in run.finished
        if name not in run.stages and name != "plan" and (name in ("source", "measure", "tune") or name in wanted)
    ]
    if run.config is None:
        absent.append("There is no config.yaml: the settings of this run are not known.")
    return absent


def _what_was_run(run: Run) -> list[str]:
    model, timeline = _model(run), run.timeline
    layers = len(timeline.layers) if timeline is not None else len(model.get("layers") or ()) or None
    totals = (stage.total_parameters for stage in (run.measure, run.source, run.tune) if stage is not None)
    total = next(filter(None, totals), None)
    where = (run.settings.get("model") or {}).get("path")
    facts = [
        f"**Model:** {f'`{where}`, ' if where else ''}{model.get('class') or 'class not recorded'}"
        f" ({model.get('model_type') or 'type not recorded'}), {count(total)} parameters, "
        f"{count(layers)} transformer layers{f' with {timeline.heads} attention heads each' if timeline else ''}.",
        *described(run),
        *[
            f"**{capitalised(stage.label)}:** {training_note(stage)}"
            for stage in run.in_order
            if stage.trainable_parameters
        ],
        f"**Seed:** {MISSING if run.seed is None else run.seed}.",
    ]
    return ["## What was run", _bullets(facts)]


def training_note(stage: Stage) -> str:
    """How long a stage trained and was evaluated, in words."""
    layers = "" if stage.layers is None else f" in {layer_list(stage.layers)}"
    return (
        f"{count(stage.steps)} optimizer steps{layers} in {seconds(stage.train_seconds)}; evaluated on "
        f"{count(stage.n)} {'tokens' if stage.accuracy is None and stage.perplexity is not None else 'examples'} in "
        f"{seconds(stage.evaluate_seconds)}."
    )


def _choice(run: Run, pictures: Pictures) -> list[str]:
    head = "## Which layers, and why"
    if run.plan is None:
        return [head, "No layers have been chosen: there is no plan.json."]
    plan = run.plan
    reasons = _bullets([f"**{layer}:** {plan.reasons[layer]}" for layer in plan.layers])
    options = ", ".join(f"`{name}` = {value}" for name, value in plan.config.items())
    return [
        head,
        plan.summary,
        reasons,
        _picture(pictures, "profile"),
        _picture(pictures, "ski"),
        _layer_table(plan),
        f"Options of the choice: {options}." if options else "",
    ]


def _layer_table(plan: Plan) -> str:
    layers = range(len(plan.scores)) if len(plan.scores) <= LONG else plan.layers
    lines = ["| Layer | Entropy, nats | log gradient norm | SKI | Chosen |", "|--:|--:|--:|--:|:-:|"]
    lines += [
        f"| {' | '.join(cells)} | {'yes' if int(cells[0]) in plan.layers else ''} |"
        for cells in layer_rows(plan, layers)
    ]
    note = "" if len(layers) == len(plan.scores) else f"\n\nOnly the chosen of {len(plan.scores)} layers are listed."
    return "\n".join(lines) + note


def _signals(run: Run, pictures: Pictures) -> list[str]:
    blocks = ["## What was measured, layer by layer"]
    timeline = run.timeline
    if timeline is None or not len(timeline.steps):
        return [*blocks, "Nothing was measured."]
    config = timeline.meta.get("config") or {}
    sampling = ""
    if "attention" in config.get("quantities", config.get("signals", ("attention",))):
        rows = config.get("rows")
        sampling = f" Attention was read at {f'up to {rows} token positions per text' if rows else 'every token'}."
    blocks.append(
        f"Optimizer steps measured: {len(timeline.steps)}, from step {timeline.steps[0]} to {timeline.steps[-1]}."
        f"{sampling} In every map the input enters at the bottom, time runs to the right, triangles mark the chosen "
        "layers, and hatching means that there is no value. The numbers are in `measure/timeline.arrows`."
    )
    blocks += [_picture(pictures, key) for key in (*drawn_columns(timeline), "drift", "heads")]
    return blocks


def overhead(run: Run) -> list[str]:
    """What measuring cost, in sentences."""
    if run.measure is None:
        return ["Not known: the measure stage has not finished."]
    said = []
    timed = run.measure.overhead
    if timed is None:
        said.append("Steps with and without measuring were not timed against each other in this run.")
    else:
        said.append(
            f"A step that is measured takes {significant(timed.on_ms)} ms, one that is not "
            f"{significant(timed.off_ms)} ms (medians of interleaved forward and backward passes, without the fixed "
            "probe texts). Spread over the steps that are not measured, that is "
            f"{overhead_share(timed)} of the training."
        )
    spent = run.timeline.measure_ms if run.timeline is not None else np.array([])
    spent = spent[np.isfinite(spent)]
    if spent.size and run.measure.train_seconds:
        share = spent.sum() / 1000 / run.measure.train_seconds
        said.append(
            f"Over the whole stage, {spent.size} measured step{'s' * (spent.size > 1)} spent "
            f"{seconds(spent.sum() / 1000)} on measuring, "
            f"{percent(share)} of its training time."
        )
    return said


def overhead_share(timed: OverheadRecord) -> str:
    """The cost of measuring as a share of training, with its standard error, and whether it stands out from that."""
    share, error = timed.ratio - 1, timed.noise
    within = ", which is within the noise" if abs(share) <= NOISE * error else ""
    return f"{100 * share:+.2f} ± {100 * error:.2f} %{within}"


def _repeat(run: Run) -> list[str]:
    blocks = ["## How to repeat it"]
    if run.config is None:
        return [*blocks, "Not possible from this folder: its config.yaml is missing."]
    where = str(run.settings.get("output") or run.folder.name).rstrip("/")
    fence = "````" if "```" in run.config else "```"
    return [
        *blocks,
        "From the folder in which it was started, into a new folder (the settings are those below):",
        f"```\ninflection-fast run --config {where}/config.yaml --output {where}-again\n```",
        "To choose layers again from what was measured, or to write this page again, without training anything:",
        f"```\ninflection-fast plan {where} --out {where}/other-plan.json\ninflection-fast report {where}\n```",
        f"{fence}yaml\n{run.config.rstrip()}\n{fence}",
    ]


def _versions(run: Run) -> list[str]:
    if not run.versions:
        return ["## Versions", "The versions of the packages were not recorded."]
    lines = ["| Package | Version |", "|---|---|"]
    return ["## Versions", "\n".join(lines + [f"| {_cell(k)} | {_cell(str(v))} |" for k, v in run.versions.items()])]


def _picture(pictures: Pictures, key: str) -> str:
    picture = pictures.drawn.get(key)
    return f"![{picture.title}]({picture.file})\n\n**{picture.title}.** {picture.caption}" if picture else ""


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _cell(text: str) -> str:
    """Text that cannot end a table's cell or row."""
    return " ".join(text.split()).replace("|", "\\|")


def _where(stage: Stage) -> str:
    return ", ".join(str(layer) for layer in stage.layers) if stage.layers else "no LoRA"


# ---- the data of a run -----------------------------------------------------------------------------------------------


def described(run: Run) -> list[str]:
    """One Markdown line per data set."""
    target = next((s for s in (run.measure, run.tune, *run.baselines) if s is not None and s.data), None)
    lines = []
    if run.source is not None or run.settings.get("source"):
        settings = (run.settings.get("source") or {}).get("data") or {}
        lines.append(f"**Source data:** {_data_set(settings, run.source)}")
    lines.append(f"**Target data:** {_data_set(run.settings.get('target') or {}, target)}")
    return lines


def _data_set(settings: dict[str, Any], stage: Stage | None) -> str:
    data = stage.data if stage is not None else None
    sentences = [f"`{settings['path']}`" if settings.get("path") else f"where it came from is {MISSING}"]
    if data is not None:
        probe = f" and {count(data.probe)} only to follow the representations" if data.probe else ""
        sentences[0] += f", {count(data.train)} texts to train on, {count(data.test)} to test on{probe}."
        if data.labels:
            labels = listed([f"`{label}`" for label in data.labels])
            share = None if stage is None else stage.majority
            majority = f"; the most frequent is {percent(share)} of the test texts" if share else ""
            sentences.append(f"Labels: {labels}{majority}.")
    else:
        sentences[0] += f"; sizes {MISSING}."
    if settings:
        sentences.append(_split(settings))
        sentences += _limits(settings)
        if not settings.get("deduplicate"):
            sentences.append("Duplicates were not looked for, so texts may stand on both sides of the split.")
    if data is not None and data.dropped:
        sentences.append(f"Left out: {listed([f'{count(number)} {why}' for why, number in data.dropped.items()])}.")
    elif data is not None and settings.get("deduplicate"):
        sentences.append("Duplicates were looked for, and there were none.")
    return " ".join(sentences)


def _split(settings: dict[str, Any]) -> str:
    if settings.get("test"):
        return f"Tested on `{settings['test']}`."
    share = percent(settings.get("test_share"), 0)
    seed = f"(split seed {settings.get('split_seed', MISSING)})"
    if settings.get("group"):
        group = f"Split at random by `{settings['group']}`"
        return f"{group}, {share} to test on, so that no value of it is on both sides {seed}."
    return f"Split at random by text, {share} to test on {seed}."


def _limits(settings: dict[str, Any]) -> list[str]:
    limits = [
        f"at most {count(settings[name])} to {verb} on"
        for name, verb in (("train_limit", "train"), ("test_limit", "test"))
        if settings.get(name)
    ]
    return [f"Drawn at random: {listed(limits)}."] if limits else []
