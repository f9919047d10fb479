"""One small JSON per cell, in the layout of peft's method_comparison: run_info, train_info, meta_info."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

from inflection_fast.run.folder import PACKAGES, package_versions
from inflection_fast.run.machine import processor_name
from inflection_fast.study.adaptation import Adaptation
from inflection_fast.study.arms import Seen
from inflection_fast.study.cells import Cell
from inflection_fast.study.config import StudyConfig

__all__ = ["FORMAT", "failed", "record"]

FORMAT = 1


def record(
    config: StudyConfig,
    cell: Cell,
    adaptation: Adaptation,
    result: dict[str, Any],
    seen: Seen,
    source: dict[str, Any],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """What a finished cell leaves behind."""
    ranks: dict[int, int] = {}
    for name, rank in adaptation.ranks.items():
        block = next((int(part) for part in name.split(".") if part.isdigit()), -1)
        ranks[block] = max(ranks.get(block, 0), rank)
    content = _head(config, cell)
    content["run_info"]["peft_config"] = {
        "kind": adaptation.kind,
        "layers": list(adaptation.layers),
        "modules": len(adaptation.ranks),
        "ranks": {str(block): rank for block, rank in sorted(ranks.items())},
        **({"options": dict(adaptation.options)} if adaptation.options else {}),
    }
    content["run_info"]["train_config"] = {
        "learning_rate": result["learning_rate"],
        "steps": result["steps"],
        "batch_size": config.train.batch_size,
        "max_length": config.model.max_length,
        "precision": config.train.precision,
        "training": result["key"],
    }
    content["run_info"]["selection"] = {
        "note": adaptation.note,
        "scores": {name: _short(score) for name, score in adaptation.scores.items()},
        "cost": seen.cost(),
    }
    metrics = result["metrics"]
    content["train_info"] = {
        "status": "success",
        "train_time": result["training"]["wall_s"],
        "train_cpu_time": result["training"]["cpu_s"],
        "eval_time": result["evaluation"]["wall_s"],
        "num_trainable_params": result["trainable"],
        "num_adapter_params": result["adapter_parameters"],
        "num_total_params": result["total"],
        "step_bytes": result["step_bytes"],
        "train_losses": result["losses"],
        "metrics": [{"step": result["steps"], "test": metrics, "source_after": result["source_after"]}],
    }
    content["meta_info"] = {
        "model_info": {"path": Path(config.model.path).name},
        "dataset_info": {
            **{key: facts[key] for key in ("source", "target", "dropped", "near_duplicates")},
            "source_training": {k: source[k] for k in ("texts", "epochs", "steps", "test", "saturation")},
        },
        "package_info": package_versions((*PACKAGES, "filelock", "datasketch")),
        "system_info": _system(),
    }
    return content


def failed(config: StudyConfig, cell: Cell, error: BaseException, text: str) -> dict[str, Any]:
    """What a cell leaves behind that could not be computed."""
    content = _head(config, cell)
    content["run_info"]["error_msg"] = " ".join(f"{type(error).__name__}: {error}".split())
    content["train_info"] = {"status": "failed", "traceback": text}
    content["meta_info"] = {"package_info": package_versions(), "system_info": _system()}
    return content


def _head(config: StudyConfig, cell: Cell) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "run_info": {
            "experiment_name": cell.name,
            "transfer": cell.transfer,
            "regime": cell.regime,
            "arm": cell.arm,
            "draw": cell.draw,
            "seed": cell.seed,
            "leaking": config.transfers[cell.transfer].leaking,
            "held_out": config.transfers[cell.transfer].held_out,
            "error_msg": "",
        },
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


@cache
def _system() -> dict[str, str]:
    return {"machine": platform.machine(), "processor": processor_name(), "system": platform.system()}
