"""A finished run with known numbers, as the stages write it."""

import json

import numpy as np

from inflection_fast.decide import SelectConfig, select
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
            "delta_cka_se": 0.01 + 0.03 * time * depth,
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
    metrics = None if accuracy is None else {"accuracy": accuracy, "loss": 0.5, "n": n, "correct": round(accuracy * n)}
    record = {
        "format": 2,
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
    facts = {"format": 2, "finished": finished, "versions": {"torch": "2.13.0", "numpy": "2.4.6"}, "seed": 42}
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
