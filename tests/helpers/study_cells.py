"""Published cells of a study whose truth is known."""

import json

import numpy as np

from inflection_fast.study.results import read_results

COSTS = {"wall_s": 2.0, "cpu_s": 1.0, "steps": 5}


def cell(
    transfer, regime, arm, seed, right, *, draw=None, layers=(0,), leaking=False, held_out=False, adapter=100, error=""
):
    """A published cell with these right and wrong answers."""
    right = np.asarray(right, bool)
    bits = "".join("01"[int(one)] for one in right)
    test = {"accuracy": float(right.mean()), "loss": 0.5, "n": len(right), "correct": int(right.sum()),
            "right": f"{int(bits, 2):0{-(-len(bits) // 4)}x}"}  # fmt: skip
    name = f"{transfer}/{regime}/{arm}{'' if draw is None else f'-{draw}'}/{seed}"
    return name, {
        "format": 1,
        "run_info": {
            "experiment_name": name, "transfer": transfer, "regime": regime, "arm": arm, "draw": draw, "seed": seed,
            "leaking": leaking, "held_out": held_out, "error_msg": error,
            "peft_config": {"kind": "lora", "layers": list(layers), "modules": 2, "ranks": {}},
            "train_config": {"learning_rate": 1e-3, "steps": 5, "batch_size": 4, "max_length": 8,
                             "precision": "float32", "training": "x"},
            "selection": {"note": "", "scores": {}, "cost": COSTS},
        },
        "train_info": {
            "status": "success", "train_time": 1.0, "train_cpu_time": 3.0, "eval_time": 1.0, "step_bytes": 1000,
            "num_trainable_params": adapter + 10, "num_adapter_params": adapter, "num_total_params": 1000,
            "train_losses": [], "metrics": [{"step": 5, "test": test, "source_after": {"accuracy": 0.7, "n": 10}}],
        },
        "meta_info": {
            "model_info": {"path": "tiny"},
            "dataset_info": {
                "source": {"texts": 5, "labels": ["a", "b"]}, "target": {"texts": 9, "labels": ["a", "b"]},
                "dropped": {"source texts that stand in the target": 2}, "near_duplicates": 0.8,
                "source_training": {
                    "texts": 5, "epochs": 1, "steps": 5, "test": {"accuracy": 0.9, "n": 10},
                    "saturation": {"test": {"largest_probability": 0.9, "entropy_nats": 0.3, "share_above_099": 0.2}},
                },
            },
            "package_info": {}, "system_info": {"machine": "m", "processor": "p", "system": "s"},
        },
    }  # fmt: skip


def study(folder, cells):
    for name, content in cells:
        path = folder / "cells" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return read_results(folder)


def planted(folder, gain, *, transfers=4, seeds=6, n=400, spread=0.0, seed=0):
    """Cells of `greedy` and three draws of `random`, `gain` apart in the probability of a right answer."""
    rng = np.random.default_rng(seed)
    cells = []
    for transfer in range(transfers):
        for number in range(seeds):
            shift = rng.normal(0, spread)
            hard = rng.uniform(0.4, 0.9, n)  # the same texts are hard for both
            cells.append(cell(f"t{transfer}", "over", "greedy", number, rng.random(n) < hard + gain + shift))
            for draw in range(3):
                cells.append(cell(f"t{transfer}", "over", "random", number, rng.random(n) < hard, draw=draw))
    return study(folder, cells)
