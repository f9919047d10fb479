"""Scan of one checkpoint: weights, and on texts attention, features and gradients, compared with chance."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from inflection_fast.checkpoints.documents import read_document, write_document
from inflection_fast.checkpoints.files import find
from inflection_fast.checkpoints.findings import Finding, Nulls, findings
from inflection_fast.checkpoints.loading import (
    Loaded,
    damaged_file_errors,
    import_libraries,
    load,
    reading,
    tokenizer_of,
)
from inflection_fast.checkpoints.memory import peak_bytes, resident_bytes, trim_memory
from inflection_fast.checkpoints.numbers import Numbers, error_of, numbers
from inflection_fast.checkpoints.on_texts import Measured, Module
from inflection_fast.checkpoints.on_texts import measured as measured_on
from inflection_fast.checkpoints.weights import MatrixSpectrum, spectra
from inflection_fast.decide import Plan, SelectConfig, select
from inflection_fast.run.errors import user_errors
from inflection_fast.timeline.means import finite_mean

__all__ = ["Profiled", "Scan", "scan"]


@dataclass(frozen=True)
class Profiled:
    """One quantity by layer, mean over texts and heads; None where there is no value."""

    label: str
    unit: str
    explanation: str
    scale: str
    texts: Numbers
    error: Numbers  # standard error of that over batches
    shuffled: Numbers  # on the same words in random order
    random: Numbers  # with random matrices of their sizes for the weights of the blocks


@dataclass(frozen=True)
class Scan:
    """What `scan` found.

    Attributes:
        model: name, class, model_type, parameters, bytes of the weights.
        layers: names of the blocks; empty where only weights were read.
        texts: file, number, batches, loss, tokens; empty without texts.
        profiles: by the name of the column.
        matrices: CKA of all layers, on the texts ("texts") and with random matrices ("random").
        modules: first-order gains.
        weights: spectra of all matrices.
        findings: what is unusual against a null.
        settings: of the scan, with seconds and memory.
        versions: of packages.
        plan: the layers to adapt; None without texts.
        yaml: the plan as settings of another tool, where that was asked for.
    """

    model: dict[str, object]
    layers: list[str]
    texts: dict[str, object]
    profiles: dict[str, Profiled]
    matrices: dict[str, list[Numbers]]
    modules: list[Module]
    weights: list[MatrixSpectrum]
    findings: list[Finding]
    settings: dict[str, object]
    versions: dict[str, str]
    plan: Plan | None = field(default=None, compare=False)
    yaml: str | None = None

    def save(self, path: str | Path) -> None:
        """Write it as JSON without its plan, which has a file of its own, whole or not at all."""
        document = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "plan"}
        for name in ("modules", "weights", "findings"):
            document[name] = [asdict(one) for one in document[name]]
        document["profiles"] = {name: asdict(one) for name, one in self.profiles.items()}
        write_document(path, "scan", {name: _finite(value) for name, value in document.items()})

    @classmethod
    def load(cls, path: str | Path) -> Scan:
        """Read what `save` wrote. ValueError for a file that is none."""
        document = read_document(path, "scan")
        kinds = {"modules": Module, "weights": MatrixSpectrum, "findings": Finding}
        for name, kind in kinds.items():
            document[name] = [kind(**one) for one in document[name]]
        document["weights"] = [replace(one, shape=tuple(one.shape)) for one in document["weights"]]
        document["profiles"] = {name: Profiled(**one) for name, one in document["profiles"].items()}
        return cls(**document)


def _finite(value: object) -> object:
    """The value with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def scan(
    model: str | Path,
    texts: Sequence[str] | None = None,
    *,
    out: str | Path | None = None,
    rank: int = 4,
    tokens: int = 128,
    select_config: SelectConfig | None = None,
    yaml: str | None = None,
    weights: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    told: Callable[[str], None] | None = None,
) -> Scan:
    """Scan a checkpoint without training it.

    With texts the model is measured on them three times: as they are, with a backward pass of its own loss through
    every batch; on the first 32 with their words in random order; and on those with random matrices in place of the
    weights of its blocks. The weights are read from the file, matrix by matrix.

    Memory: the weights (float32 on the CPU), at most a quarter of them or 96 MiB for one batch, the features of 1024
    tokens in every layer, and the largest gradient of one matrix. Without texts: the largest matrix, see `spectra`.

    Args:
        model: a folder, a .safetensors or .gguf file, or a name on the hub. No pickle is read.
        texts: at least 4; None: weights alone.
        out: folder for the timelines of the three measurements; None: they are not kept.
        rank: of the adapters whose first-order gain is measured.
        tokens: each text is cut to so many.
        select_config: how the plan chooses layers.
        yaml: a tool of `Plan.to_yaml`, whose settings are made of the plan.
        weights: whether spectra are computed.
        seed: of everything that is drawn: masks, orders of words, random matrices of the blocks.
        progress: called with a description of each part of the work.
        told: the earlier name of `progress`; deprecated.

    Raises:
        UserError: in one sentence, what is wrong with the model or the texts.
        TypeError: both `progress` and `told`.
    """
    if told is not None:
        if progress is not None:
            raise TypeError("scan: progress and told are two names of one argument; pass progress alone")
        warnings.warn("scan: told is now called progress; pass progress", DeprecationWarning, stacklevel=2)
    report = progress or told or (lambda part: None)
    began = time.perf_counter()
    source = find(str(model))
    before = resident_bytes()
    settings: dict[str, object] = {"rank": rank, "tokens": tokens, "seed": seed}
    measured: Measured | None = None
    about: dict[str, object] = {"name": source.name, "bytes on disk": source.bytes}
    versions = _versions()
    plan, settings_yaml = None, None
    if texts is not None:
        report("loading the model")
        with reading(source):
            tokenizer = tokenizer_of(source)  # errors before the weights are loaded
            config = import_libraries(source)
        trim_memory()
        before = resident_bytes()
        loaded = load(source, config=config)
        about |= _about(loaded)
        with user_errors(ValueError, RuntimeError, about=f"{source.name} cannot be measured"):
            measured = measured_on(loaded, tokenizer, texts, out, rank, tokens, seed, report)
        with user_errors(ValueError, about="plan"):
            plan = select(measured.nulls.texts, select_config or SelectConfig())
            if yaml is not None:
                if not plan.layers:
                    raise ValueError(f"there is nothing to write for {yaml}: {plan.summary}")
                settings_yaml = plan.to_yaml(yaml, loaded.model, r=rank)
        settings["weights in memory, MiB"] = round(loaded.weight_bytes / 2**20, 1)
        del loaded  # before the weights are read
        gc.collect()
        trim_memory()
    found: list[MatrixSpectrum] = []
    if weights:
        report("reading the weights")
        with user_errors(*damaged_file_errors(), about=f"the weights of {source.name} cannot be read"):
            found = spectra(source, progress=lambda done: report(f"reading the weights: {done} matrices"))
    settings["peak above libraries, MiB"] = round((peak_bytes() - before) / 2**20, 1)
    settings["seconds"] = round(time.perf_counter() - began, 1)
    modules = [] if measured is None else measured.modules
    return Scan(
        model=about,
        layers=[] if measured is None else list(measured.nulls.texts.layers),
        texts={} if measured is None else measured.about,
        profiles={} if measured is None else _profiles(measured.nulls),
        matrices={} if measured is None else measured.matrices,
        modules=modules,
        weights=found,
        findings=findings(None if measured is None else measured.nulls, modules, found, rank),
        settings=settings,
        versions=versions,
        plan=plan,
        yaml=settings_yaml,
    )


# ---- in numbers ------------------------------------------------------------------------------------------------------


def _profiles(nulls: Nulls) -> dict[str, Profiled]:
    found = {}
    for name, column in nulls.texts.columns.items():
        if column.axes not in (("layer",), ("layer", "head")) or name.endswith("_se"):
            continue
        values = nulls.by_layer(name, "texts")
        if values is None:
            continue
        others = {kind: nulls.by_layer(name, kind) for kind in ("shuffled", "random")}
        found[name] = Profiled(
            column.label, column.unit, column.explanation, column.scale,
            numbers(finite_mean(values)), numbers(error_of(values)),
            *([] if of is None else numbers(finite_mean(of)) for of in others.values()),
        )  # fmt: skip
    return found


def _about(loaded: Loaded) -> dict[str, object]:
    model = loaded.model
    return {
        "class": type(model).__name__,
        "model_type": str(getattr(model.config, "model_type", "")),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("inflection_fast", "torch", "transformers")}
