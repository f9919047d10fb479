import io
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from inflection_fast import report
from inflection_fast.decide import SelectConfig, select
from inflection_fast.report import canvas, pictures, profile, sections
from inflection_fast.report import folder as run_files
from inflection_fast.report.charts import index_chart, profile_chart
from inflection_fast.report.heatmap import heat_map
from inflection_fast.report.verdict import compare, verdict
from inflection_fast.timeline import Timeline, TimelineWriter

HEADS, LAYERS, STEPS = 12, 12, 12
ASKED = ["attention", "activation_grad", "parameter_grad", "delta_cka"]
CONFIG = """\
model:
  path: models/tiny-bert
target:
  path: reviews.csv
  group: movie_name
  test_share: 0.2
  split_seed: 0
  deduplicate: true
source:
  data: {path: tweets.csv, test_share: 0.1, split_seed: 0, deduplicate: true}
baselines: [last, random]
output: runs/demo
"""


def measured(layers=LAYERS, steps=STEPS, heads=HEADS, drop=()):
    """Steps of a run with an entropy minimum in the middle and a gradient cliff at the bottom."""
    rng = np.random.default_rng(0)
    depth = np.linspace(0, 1, layers)
    dip = np.exp(-(((np.arange(layers) - (5 * layers) // 12) / (0.13 * layers)) ** 2))
    gradient = np.exp(-3.5 + 2.0 * depth) * np.where(np.arange(layers) == 0, 0.3, 1.0)
    spread = 0.25 * rng.standard_normal((layers, heads))
    for step, time in enumerate(np.linspace(0, 1, steps)):
        noise = rng.standard_normal((layers, heads))
        entropy = 2.4 - 1.3 * dip[:, None] + spread + 0.02 * noise - 0.1 * time
        signals = {
            "entropy": entropy,
            "entropy_se": np.full((layers, heads), 0.03),
            "max_logit": 8 + 4 * depth[:, None] + 2 * time + noise,
            "collision": np.exp(-entropy),
            "sink": 1 / (1 + np.exp(2 - 3 * depth[:, None] + noise)),
            "activation_grad": gradient * np.exp(-0.8 * time + 0.05 * rng.standard_normal(layers)),
            "parameter_grad": np.where(depth > 0.85, 3 * gradient, np.nan),
            "delta_cka": 0.4 * time * depth**2,
            "loss": 0.69 - 0.2 * time,
            "measure_ms": 20.0,
        }
        yield 10 * step, {name: value for name, value in signals.items() if name not in drop}


def write_timeline(folder, signals=ASKED, **options):
    layers = options.get("layers", LAYERS)
    meta = {
        "model": {"class": "BertForSequenceClassification", "model_type": "bert", "parameters": 22713216},
        "config": {"every": 10, "rows": 64, "signals": signals},
        "versions": {},
    }
    names = [f"encoder.layer.{i}" for i in range(layers)]
    with TimelineWriter(folder, layers=names, heads=options.get("heads", HEADS), meta=meta) as writer:
        for step, signals in measured(**options):
            writer.append(step, **signals)


def write_stage(run, name, accuracy, *, n=2500, trainable=61442, layers=None, label=None, steps=60, **more):
    metrics = {} if accuracy is None else {"accuracy": accuracy, "loss": 0.5, "n": n, "correct": round(accuracy * n)}
    record = {
        "stage": name,
        "label": label or name,
        "task": "sequence-classification",
        "metrics": metrics,
        "majority": 0.578,
        "data": {"train": 9000, "test": n, "probe": 64, "labels": ["rotten", "fresh"], "dropped": {"duplicates": 55}},
        "trainable_parameters": trainable,
        "total_parameters": 22713216,
        "layers": layers,
        "steps": steps,
        "train_seconds": 61.0,
        "evaluate_seconds": 5.0,
        "overhead": None,
        **more,
    }
    (run / name).mkdir(parents=True, exist_ok=True)
    (run / name / "stage.json").write_text(json.dumps(record))


def write_run(run, *, tune=0.80, shallow=0.75, random=0.755, last=0.75, **options):
    """A finished run, as the stages write it."""
    run.mkdir()
    finished = ["source", "measure", "plan", "tune", "baseline-last", "baseline-random"]
    facts = {"format": 1, "finished": finished, "versions": {"torch": "2.13.0", "numpy": "2.4.6"}, "seed": 42}
    (run / "run.json").write_text(json.dumps(facts))
    (run / "config.yaml").write_text(CONFIG)
    on_target = {"accuracy": 0.65, "loss": 0.7, "n": 2500, "correct": 1625}
    write_stage(run, "source", 0.81, n=3000, trainable=22713216, label="source, full fine-tuning", on_target=on_target)
    timed = {"off_ms": 800.0, "on_ms": 900.0, "noise": 0.004, "ratio": 1.0125}
    label = "shallow unfreezing (top 2 blocks and head)"
    write_stage(run, "measure", shallow, trainable=3549000, label=label, overhead=timed)
    write_timeline(run / "measure", **options)
    plan = select(Timeline.load(run / "measure"), SelectConfig())
    plan.save(run / "plan.json")
    layers = list(plan.layers)
    write_stage(run, "tune", tune, layers=layers, label="LoRA on the planned layers")
    write_stage(run, "baseline-random", random, layers=[2, 3, 7, 8, 9], label="LoRA on 5 random layers")
    write_stage(run, "baseline-last", last, layers=[7, 8, 9, 10, 11], label="LoRA on the last 5 layers")
    return plan


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "demo"
    plan = write_run(run)
    return run, plan, report.write(run)


def stage(accuracy, n=2500, label="the other", **more):
    known = dict.fromkeys(run_files.Stage.__dataclass_fields__) | {"name": "x", "trainable": 1000}
    return run_files.Stage(**known | {"label": label, "accuracy": accuracy, "n": n} | more)


def terminal(run):
    """The summary as it goes through a pipe."""
    from rich.console import Console

    file = io.StringIO()
    report.summary(run, Console(file=file, width=80, soft_wrap=True))
    return file.getvalue()


@pytest.fixture
def unpainted(monkeypatch):
    """Pictures are laid out and then left empty, where the test looks at none."""
    monkeypatch.setattr(canvas, "save", lambda drawn, path: path.touch())


@pytest.fixture
def coarse(monkeypatch):
    """Few pixels, where the test only asks whether there can be any."""
    monkeypatch.setattr(canvas, "DPI", 40)


# ---- the answer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "outcomes", "answer"),
    [
        ((0.85, 0.75), ["won"], "The injected model beats the only baseline beyond the noise."),
        ((0.75, 0.85), ["lost"], "Injecting did not help: the injected model is worse than the only baseline"),
        ((0.755, 0.75), ["tie"], "This run shows no gain from injecting: the injected model is within the noise"),
        ((0.85, 0.75, 0.74), ["won", "won"], "beats all 2 baselines beyond the noise"),
        ((0.80, 0.75, 0.79), ["won", "tie"], "does not beat every baseline: it beats a beyond the noise and is within"),
        ((0.80, 0.75, 0.85), ["won", "lost"], "and is worse than b beyond the noise."),
    ],
)
def test_the_answer_says_what_the_numbers_say(accuracies, outcomes, answer):
    injected = stage(accuracies[0])
    others = [stage(accuracy, label=name) for accuracy, name in zip(accuracies[1:], "ab", strict=False)]
    assert [compare(injected, other).outcome for other in others] == outcomes
    stages = {"tune": injected} | {f"baseline-{other.label}": other for other in others}
    run = run_files.Run(Path(), (), {}, None, None, stages=stages)
    assert answer in verdict(run)[0]


def test_the_border_of_the_noise_is_two_standard_errors_of_the_difference():
    error = np.sqrt(0.8 * 0.2 / 2500 + 0.8 * 0.2 / 2500)
    assert compare(stage(0.8 + 1.9 * error), stage(0.8)).outcome == "tie"
    assert compare(stage(0.8 + 2.1 * error), stage(0.8)).outcome == "won"
    assert compare(stage(0.8 - 2.1 * error), stage(0.8)).outcome == "lost"


def test_everything_right_out_of_few_is_not_without_noise():
    assert compare(stage(1.0, n=8), stage(0.875, n=8)).outcome == "tie"


def test_different_test_sets_are_not_compared():
    comparison = compare(stage(0.9, n=100), stage(0.5, n=2500))
    assert comparison.outcome == "unknown" and "different examples (100 and 2,500)" in comparison.why


def test_a_loss_without_noise_decides_nothing():
    other = stage(None, loss=3.3, label="last")
    comparison = compare(stage(None, loss=3.2), other)
    assert comparison.outcome == "unknown" and "a lower loss than last (3.200 against 3.300)" in comparison.why
    run = run_files.Run(Path(), (), {}, None, None, stages={"tune": stage(None, loss=3.2), "baseline-last": other})
    assert "cannot tell whether injecting helped" in verdict(run)[0]


def test_the_place_is_judged_at_equal_parameters_only():
    big = stage(0.7, trainable=10_000_000, label="big")
    run = run_files.Run(Path(), (), {}, None, None, stages={"tune": stage(0.8), "measure": big})
    assert any("cannot tell whether the chosen place matters" in sentence for sentence in verdict(run))
    run.stages["baseline-x"] = stage(0.8, label="same size")
    assert any("same size trains about as many" in s and "made no difference" in s for s in verdict(run))


def test_no_better_than_the_most_frequent_answer_is_said():
    run = run_files.Run(Path(), (), {}, None, None, stages={"tune": stage(0.58, majority=0.578)})
    assert any("has not learnt the task" in sentence for sentence in verdict(run))
    run = run_files.Run(Path(), (), {}, None, None, stages={"tune": stage(0.7, majority=0.578)})
    assert not any("has not learnt the task" in sentence for sentence in verdict(run))


def test_unequal_training_is_said():
    stages = {"tune": stage(0.8, steps=60), "measure": stage(0.7, steps=30, label="short")}
    run = run_files.Run(Path(), (), {}, None, None, stages=stages)
    assert "Not all trained equally long: injected 60 steps, short 30." in verdict(run)


# ---- the page --------------------------------------------------------------------------------------------------------


def words(run):
    """The page of a run without its pictures."""
    return sections.page(run_files.read(run), pictures.Pictures({}, {}))


def test_the_page_answers_first_and_repeats_the_plan_in_its_own_words(finished):
    run, plan, path = finished
    text = path.read_text(encoding="utf-8")
    assert path == run / "report" / "index.md"
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads[0] == "# Inflection layers of tiny-bert" and heads[1] == "## The answer"
    assert "**The injected model beats all 4 baselines beyond the noise.**" in text
    assert "80.0 ± 0.8 %" in text and "61,442 (0.27 %)" in text
    assert "| LoRA on 5 random layers | 75.5 ± 0.9 % | 0.500 | +4.5 ± 1.2, beyond noise |" in text
    assert "| source model, not trained further | 65.0 ± 1.0 % | 0.700 | +15.0 ± 1.2, beyond noise |" in text
    assert plan.layers == (0, 1, 4, 5, 6) and plan.summary in text
    for layer, reason in plan.reasons.items():
        assert f"**{layer}:** {reason}" in text
    assert "9,000 texts to train on, 2,500 to test on and 64 only to follow" in text
    assert "Split at random by `movie_name`, 20 %" in text and "Left out: 55 duplicates." in text
    assert "takes 900 ms, one that is not 800 ms" in text and "+1.25 ± 0.40 % of the training" in text
    assert CONFIG.rstrip() in text and "| torch | 2.13.0 |" in text
    assert "inflection-fast run --config runs/demo/config.yaml --output runs/demo-again" in text


def test_every_picture_is_shown_once_and_nothing_else_lies_in_the_folder(finished):
    _, _, path = finished
    text = path.read_text(encoding="utf-8")
    there = {file.name for file in path.parent.iterdir()} - {"index.md"}
    assert there == set(pictures.FILES.values())
    for name in there:
        assert text.count(f"]({name})") == 1
    assert not list(path.parent.parent.glob(".report*"))


def test_pictures_are_not_blank(finished):
    from matplotlib.image import imread

    for file in finished[2].parent.glob("*.png"):
        pixels = imread(file)[..., :3]
        assert min(pixels.shape[:2]) >= 400, file.name
        assert pixels.std() > 0.05 and (pixels < 0.9).any(axis=-1).mean() > 0.01, file.name


def test_missing_stages_are_named(tmp_path):
    run = tmp_path / "run"
    write_run(run)
    for name in ("tune", "baseline-random"):
        (run / name / "stage.json").unlink()
    text = words(run)
    assert "There is no answer yet" in text and "The tune stage has not finished" in text
    assert "The stage baseline-random has no results" in text
    assert "run.json calls the stage tune finished, and its results (stage.json) are not there." in text
    assert "LoRA on the last 5 layers" in text
    shown = " ".join(terminal(run).split())
    assert "There is no answer yet" in shown and "The tune stage has not finished" in shown


def test_a_run_that_has_only_begun_still_has_a_page(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"format": 1, "finished": [], "versions": {}, "seed": 1}')
    text = report.write(run).read_text(encoding="utf-8")
    for sentence in ("There is no timeline", "There is no plan", "There is no config.yaml", "No stage has finished"):
        assert sentence in text
    assert not list((run / "report").glob("*.png"))
    assert "No stage has finished" in terminal(run)


def test_signals_without_values_are_said_to_be_missing(tmp_path, unpainted):
    run = tmp_path / "run"
    write_run(run, drop=("delta_cka", "sink", "activation_grad"), steps=3)
    text = report.write(run).read_text(encoding="utf-8")
    assert "Representation drift (1 - CKA): no value was measured: it needs a fixed set of probe texts." in text
    assert "Attention on the first token: no finite value was measured." in text
    assert "SKI by layer" in text and "the scores rest on the attention entropy alone" in text
    assert not (run / "report" / "sink.png").exists() and (run / "report" / "entropy.png").exists()


def test_a_signal_that_was_not_asked_for_says_so(tmp_path):
    run = tmp_path / "run"
    write_run(run, drop=("delta_cka",), signals=["attention", "activation_grad"], steps=3)
    missing = {}
    pictures._measured(run_files.read(run), lambda *_: None, missing)
    assert "`delta_cka` is not among the monitor's signals" in missing["Representation drift (1 - CKA)"]


def test_scores_that_belong_to_another_plan_are_said_to(tmp_path):
    run = tmp_path / "run"
    write_run(run)
    assert "do not belong together" not in words(run)
    write_stage(run, "tune", 0.8, layers=[2, 3])
    assert "they do not belong together" in words(run)


def test_an_empty_plan_has_no_injected_model(tmp_path):
    run = tmp_path / "run"
    write_run(run)
    write_stage(run, "tune", None, layers=[], trainable=0, steps=0)
    assert "**Nothing was injected, because no layer was chosen" in words(run)


def test_a_language_model_is_reported_by_its_loss(tmp_path, unpainted):
    run = tmp_path / "run"
    write_run(run, steps=3)
    losses = {"source": 3.5, "measure": 3.4, "tune": 3.2, "baseline-last": 3.3, "baseline-random": 3.3}
    for name, loss in losses.items():
        metrics = {"loss": loss, "perplexity": float(np.exp(loss)), "n": 10000}
        write_stage(run, name, None, metrics=metrics, majority=None, layers=[0])
    text = report.write(run).read_text(encoding="utf-8")
    assert "Loss, nats per token | Perplexity" in text and "| 3.20 | 24.5 |" in text
    assert "a lower loss than baseline-last (3.200 against 3.300)" in text
    assert (run / "report" / "stages.png").exists()


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for call in (report.write, terminal):
        with pytest.raises(ValueError, match=r"not a run folder: it holds no run\.json"):
            call(tmp_path)
        with pytest.raises(ValueError, match="there is no such folder"):
            call(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("run.json", '{"format": 2}', "format 2; this version reads format 1"),
        ("run.json", "[]", "must hold a JSON object"),
        ("tune/stage.json", "{", "is not JSON"),
        ("tune/stage.json", '{"metrics": {"accuracy": "high"}}', "accuracy must be a number; it is 'high'"),
        ("plan.json", "{}", "is not a plan"),
        ("config.yaml", "a: [", "is not YAML"),
        ("measure/timeline.arrows", "not arrow", "is not a timeline"),
    ],
)
def test_a_damaged_file_is_named(finished, tmp_path, file, content, says):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / file).write_text(content)
    before = (run / "report" / "index.md").read_bytes()
    with pytest.raises(ValueError, match=says):
        report.write(run)
    assert (run / "report" / "index.md").read_bytes() == before


def test_a_failure_leaves_the_older_report_and_nothing_else(finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    before = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    calls = []

    def full_disk(drawn, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        path.write_text("half")

    monkeypatch.setattr(canvas, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        report.write(run)
    assert len(calls) == 2
    assert {path.name: path.read_bytes() for path in (run / "report").iterdir()} == before
    assert not list(run.glob(".report*"))


def test_an_older_report_is_replaced_and_a_readers_notes_are_kept(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"format": 1, "finished": []}')
    (run / "report").mkdir()
    for name in ("index.md", "sink.png", "notes.txt"):
        (run / "report" / name).write_text("old")
    report.write(run)
    assert {path.name for path in (run / "report").iterdir()} == {"index.md", "notes.txt"}
    assert (run / "report" / "index.md").read_text() != "old" and (run / "report" / "notes.txt").read_text() == "old"
    assert not list(run.glob(".report*"))


# ---- the pictures ----------------------------------------------------------------------------------------------------


def marked(ax):
    """Positions of the points in the colour of the chosen layers."""
    points = [line.get_xydata() for line in ax.get_lines() if line.get_color() == canvas.CHOSEN]
    return np.concatenate(points) if points else np.empty((0, 2))


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []


@pytest.fixture(scope="module")
def figures(finished):
    """The figures of the finished run by file name, not written."""
    drawn = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "save", lambda figure, path: drawn.__setitem__(path.name, figure))
        pictures.draw(run_files.read(finished[0]), Path())
    return drawn


def test_the_marked_layers_are_the_plans(finished, figures):
    layers = list(finished[1].layers)
    assert marked(figures["ski.png"].axes[0])[:, 0].tolist() == layers
    assert marked(figures["profile.png"].axes[0])[:, 0].tolist() == layers
    assert marked(figures["profile.png"].axes[1])[:, 0].tolist() == layers
    for name in (*pictures.SIGNALS, "entropy_by_head"):
        assert marked(figures[f"{name}.png"].axes[0])[:, 1].tolist() == layers


@pytest.mark.parametrize("cliff", ["steepest", "lowest"])
def test_rings_stand_where_the_plan_found_something(finished, cliff):
    plan = select(run_files.read(finished[0]).timeline, SelectConfig(cliff=cliff))
    assert profile.found(plan, "entropy minimum") == 5
    assert profile.found(plan, "gradient cliff") == 0


def test_rings_are_drawn(figures):
    for ax, layer, name in zip(figures["profile.png"].axes, (5, 0), pictures.FOUND, strict=True):
        rings = [line for line in ax.get_lines() if line.get_markerfacecolor() == "none"]
        assert [list(line.get_xdata()) for line in rings] == [[layer]] and name in legend_of(ax)


def test_maps_show_the_numbers_of_the_timeline(finished, figures):
    timeline = run_files.read(finished[0]).timeline
    for name, expected in (
        ("entropy", timeline.entropy.mean(-1)),
        ("max_logit", timeline.max_logit.max(-1)),
        ("activation_grad", timeline.activation_grad),
    ):
        mesh = figures[f"{name}.png"].axes[0].collections[0]
        np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(LAYERS, STEPS), expected.T)
    assert type(mesh.norm).__name__ == "LogNorm"


def test_missing_values_are_hatched_and_named(figures):
    ax = figures["parameter_grad.png"].axes[0]
    assert "no value" in legend_of(ax) and ax.collections[0].get_array().mask.any()
    assert "no value" not in legend_of(figures["entropy.png"].axes[0])


def test_components_are_the_parts_of_ski(finished):
    plan = finished[1]
    parts = list(profile.components(plan).values())
    np.testing.assert_allclose((parts[0] + parts[1]) / 2, plan.scores)


@pytest.mark.parametrize(("layers", "columns"), [(1, 1), (300, 5)])
@pytest.mark.parametrize("fill", ["numbers", "equal", "holes", "nothing"])
def test_any_size_gives_a_sane_map(layers, columns, fill, tmp_path, coarse):
    values = np.random.default_rng(0).random((layers, columns))
    values = {"numbers": values, "equal": values * 0 + 2, "holes": values, "nothing": values * np.nan}[fill]
    if fill == "holes":
        values[0, 0] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = heat_map(values, 10 * np.arange(columns), title="t", unit="u", x="step", chosen=[layers - 1], log=True)
        canvas.save(drawn, tmp_path / "map.png")
    assert ("no value" in legend_of(drawn.axes[0])) == (fill in ("holes", "nothing"))
    assert len(drawn.axes) == (1 if not np.isfinite(values).any() else 2)  # without values there is no scale
    assert all(float(label).is_integer() for label in drawn.axes[0].get_yticks())


@pytest.mark.parametrize("layers", [1, 300])
@pytest.mark.parametrize("fill", [1.0, np.nan])
def test_any_size_gives_sane_charts(layers, fill, tmp_path, coarse):
    values, chosen = fill * np.linspace(0.2, 1, layers), [0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = index_chart(values, {"a": values, "b": values}, chosen)
        rows = [("entropy", values, values / 10), ("gradient", values, values * np.nan)]
        chart = profile_chart(rows, [(0, "minimum"), None], chosen)
        for number, drawn in enumerate((index, chart)):
            canvas.save(drawn, tmp_path / f"{number}.png")
    assert len(marked(index.axes[0])) == len(marked(chart.axes[0])) == 1


def test_steps_that_were_not_to_be_probed_are_no_holes():
    writer = TimelineWriter(None, layers=["a"], heads=1, meta={"config": {"probe_every": 20}})
    for step, drift in ((0, 0.0), (10, np.nan), (20, 0.1), (30, np.nan), (40, np.nan)):
        writer.append(step, delta_cka=[drift])
    steps, values = pictures.by_layer(writer.timeline, "delta_cka")
    assert steps.tolist() == [0, 20, 40] and np.isnan(values[-1])  # step 40 was to be probed and is missing


# ---- the terminal ----------------------------------------------------------------------------------------------------


def test_the_summary_fits_80_columns_and_carries_no_codes_through_a_pipe(finished):
    shown = terminal(finished[0])
    assert max(map(len, shown.splitlines())) <= 80 and "\x1b" not in shown
    lines = [line.split() for line in shown.splitlines()]
    chosen = [int(line[0]) for line in lines if len(line) > 4 and line[0].isdecimal() and line[4] == "*"]
    assert tuple(chosen) == finished[1].layers
    assert "The injected model beats all 4 baselines beyond the noise." in shown and "+1.25 ± 0.40 %" in shown


def test_a_deep_models_summary_lists_the_chosen_layers_and_their_neighbours(tmp_path):
    run = tmp_path / "run"
    plan = write_run(run, layers=96, heads=2, steps=8)
    shown = terminal(run)
    table = shown[shown.index("layer   entropy") : shown.index("Cost of measuring")]
    rows = [int(line.split()[0]) for line in table.splitlines() if line[:5].strip().isdecimal()]
    near = {layer for chosen in plan.layers for layer in (chosen - 1, chosen, chosen + 1)} & set(range(96))
    assert plan.layers and rows == sorted(near) and "The chosen of 96 layers and their neighbours" in shown


def test_drawing_libraries_are_loaded_only_when_they_draw():
    code = "import sys, inflection_fast.report; print({'matplotlib', 'rich', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
