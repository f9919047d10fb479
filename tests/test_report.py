import json
from pathlib import Path

import numpy as np
import pytest

from inflection_fast import report
from inflection_fast.decide import SelectConfig, select
from inflection_fast.report import folder as run_files
from inflection_fast.report import pictures
from inflection_fast.report.verdict import compare, verdict
from inflection_fast.timeline import Timeline, TimelineWriter

HEADS, LAYERS, STEPS = 12, 12, 12
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


def write_timeline(folder, **options):
    layers = options.get("layers", LAYERS)
    meta = {
        "model": {"class": "BertForSequenceClassification", "model_type": "bert", "parameters": 22713216},
        "config": {"every": 10, "rows": 64, "signals": ["attention", "activation_grad", "parameter_grad", "delta_cka"]},
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
    timed = {"off_ms": 812.0, "on_ms": 830.0, "noise": 0.004, "ratio": 830 / 812}
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


def shown(run, width=80):
    from rich.console import Console

    with open(run.parent / "terminal.txt", "w+", encoding="utf-8") as file:
        report.summary(run, Console(file=file, width=width))
        file.seek(0)
        return file.read()


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


def test_the_page_answers_first_and_repeats_the_plan_in_its_own_words(finished):
    run, plan, path = finished
    text = path.read_text(encoding="utf-8")
    assert path == run / "report" / "index.md"
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads[0] == "# Inflection layers of tiny-bert" and heads[1] == "## The answer"
    assert "**The injected model beats all 4 baselines beyond the noise.**" in text
    assert "80.0 ± 0.8 %" in text and "61,442 (0.27 %)" in text
    assert plan.summary in text
    for layer, reason in plan.reasons.items():
        assert f"**{layer}:** {reason}" in text
    assert "9,000 texts to train on, 2,500 to test on and 64 only to follow" in text
    assert "Split at random by `movie_name`, 20 %" in text and "Left out: 55 duplicates." in text
    assert "812 ms without and 830 ms with measuring (+2.2%" in text
    assert CONFIG.rstrip() in text and "| torch | 2.13.0 |" in text


def test_every_picture_is_shown_once_and_nothing_else_lies_in_the_folder(finished):
    _, _, path = finished
    text = path.read_text(encoding="utf-8")
    there = {file.name for file in path.parent.iterdir()} - {"index.md"}
    assert there == set(pictures.FILES.values())
    for name in there:
        assert text.count(f"]({name})") == 1


def test_pictures_are_not_blank(finished):
    from matplotlib.image import imread

    for file in finished[2].parent.glob("*.png"):
        pixels = imread(file)[..., :3]
        assert min(pixels.shape[:2]) >= 250, file.name
        assert pixels.std() > 0.05 and (pixels < 0.9).any(axis=-1).mean() > 0.01, file.name


def test_the_same_run_gives_the_same_pictures(finished, tmp_path):
    run = run_files.read(finished[0])
    pictures.draw(run, tmp_path)
    for file in finished[2].parent.glob("*.png"):
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


def test_missing_stages_are_named(tmp_path):
    run = tmp_path / "run"
    write_run(run)
    for name in ("tune", "baseline-random"):
        (run / name / "stage.json").unlink()
    text = report.write(run).read_text(encoding="utf-8")
    assert "There is no answer yet" in text and "The tune stage has not finished" in text
    assert "The stage baseline-random has no results" in text
    assert "run.json calls the stage tune finished, and its results (stage.json) are not there." in text
    assert "LoRA on the last 5 layers" in text
    assert "There is no answer yet" in " ".join(shown(run).split())


def test_a_run_that_has_only_begun_still_has_a_page(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"format": 1, "finished": [], "versions": {}, "seed": 1}')
    text = report.write(run).read_text(encoding="utf-8")
    for sentence in ("There is no timeline", "There is no plan", "There is no config.yaml", "No stage has finished"):
        assert sentence in text
    assert not list((run / "report").glob("*.png"))
    assert "No stage has finished" in shown(run)


def test_signals_without_values_are_said_to_be_missing(tmp_path):
    run = tmp_path / "run"
    write_run(run, drop=("delta_cka", "sink"))
    text = report.write(run).read_text(encoding="utf-8")
    assert "Representation drift (1 - CKA): no value was measured: it needs a fixed set of probe texts." in text
    assert "Attention on the first token: no finite value was measured." in text
    assert not (run / "report" / "sink.png").exists() and (run / "report" / "entropy.png").exists()


def test_scores_that_belong_to_another_plan_are_said_to(tmp_path):
    run = tmp_path / "run"
    write_run(run)
    write_stage(run, "tune", 0.8, layers=[2, 3])
    assert "they do not belong together" in report.write(run).read_text(encoding="utf-8")


def test_an_empty_plan_has_no_injected_model(tmp_path):
    run = tmp_path / "run"
    write_run(run)
    write_stage(run, "tune", None, layers=[], trainable=0, steps=0)
    text = report.write(run).read_text(encoding="utf-8")
    assert "**Nothing was injected, because no layer was chosen" in text
