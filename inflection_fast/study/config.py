"""Every setting of a study as frozen dataclasses, each of which refuses nonsense when it is made."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from inflection_fast.run.config import DataConfig, ModelConfig, check

__all__ = [
    "ConfirmationConfig",
    "LoopConfig",
    "MeasuredConfig",
    "RegimeConfig",
    "SizesConfig",
    "SourcesConfig",
    "StudyConfig",
    "TransferConfig",
    "TuningConfig",
    "WaveConfig",
    "changed",
    "plain",
]

RATES: dict[str, tuple[float, ...]] = {
    "head": (1e-2, 3e-2, 1e-1),
    "unfreeze": (1e-4, 3e-4, 1e-3),
    "blocks": (1e-4, 3e-4, 1e-3),
    "full": (3e-5, 1e-4, 3e-4),
    "bitfit": (1e-3, 3e-3, 1e-2),
    "lora": (2e-3, 5e-3, 1.5e-2),
    "dora": (2e-3, 5e-3, 1.5e-2),
    "adalora": (3e-3, 1e-2, 3e-2),
    "ia3": (3e-3, 1e-2, 3e-2),
    "vera": (3e-3, 1e-2, 3e-2),
    "prefix": (3e-3, 1e-2, 3e-2),
    "bottleneck": (1e-3, 3e-3, 1e-2),
    "lisa": (3e-5, 1e-4, 3e-4),
}


@dataclass(frozen=True)
class TransferConfig:
    """From which texts to which.

    Args:
        source: the texts that the model is trained on first
        target: the texts that the arms adapt it to
        leaking: leave source texts in that also stand in the target, as published experiments did; such cells are
            labelled and stay out of every pooled number
        head: keep the source's head, which needs equally many labels in the same order, or begin with a new one
        held_out: it is kept for testing what the other transfers suggested; such cells are labelled, stay out of every
            pooled number and have a section of their own in the report; no learning rate may be searched on them
    """

    source: DataConfig
    target: DataConfig
    leaking: bool = False
    head: Literal["keep", "new"] = "keep"
    held_out: bool = False

    @property
    def pooled(self) -> bool:
        """Whether its cells count in the pooled numbers."""
        return not self.leaking and not self.held_out


@dataclass(frozen=True)
class RegimeConfig:
    """How long the source is trained.

    Args:
        epochs: passes over the source's texts
        steps: optimizer steps instead
    """

    epochs: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"a regime has either epochs or steps, got epochs {self.epochs} and steps {self.steps}")
        check((self.epochs or self.steps or 0) >= 1, "regimes", self.epochs or self.steps, "at least 1")

    def steps_of(self, texts: int, batch_size: int) -> int:
        """Optimizer steps on so many texts."""
        return self.steps or (self.epochs or 0) * max(1, texts // batch_size)


@dataclass(frozen=True)
class LoopConfig:
    """One training by the study's own loop: AdamW, a linear rise and fall of the learning rate, clipped gradients.

    Args:
        steps: optimizer steps of every arm
        batch_size: texts per step
        weight_decay: decoupled weight decay
        warmup_share: share of the steps over which the learning rate rises
        max_grad_norm: gradients are clipped to this norm
        eval_batch_size: texts per forward pass of an evaluation
        precision: arithmetic of the forward pass (autocast); the weights stay in float32
        device: where torch computes
        threads: threads of torch in each process; 0: torch's own choice
    """

    steps: int = 100
    batch_size: int = 16
    weight_decay: float = 0.0
    warmup_share: float = 0.1
    max_grad_norm: float = 1.0
    eval_batch_size: int = 64
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_batch_size"):
            check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        check(0 <= self.warmup_share < 1, "train.warmup_share", self.warmup_share, "at least 0 and below 1")
        check(self.max_grad_norm > 0, "train.max_grad_norm", self.max_grad_norm, "above 0")


@dataclass(frozen=True)
class SourcesConfig:
    """The full fine-tuning on the source.

    Args:
        limit: train on at most so many texts, drawn at random, so that many epochs are affordable
        test: keep so many texts out, on which forgetting is measured
        learning_rate: highest learning rate
        seed: seed of the draw and of the training; one source serves all seeds of the target
    """

    limit: int = 960
    test: int = 400
    learning_rate: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.limit >= 1, "source.limit", self.limit, "at least 1")
        check(self.test >= 1, "source.test", self.test, "at least 1")


@dataclass(frozen=True)
class SizesConfig:
    """The split of the target.

    Args:
        train: train on so many texts, drawn anew with every seed
        test: test on at most so many other texts, drawn anew with every seed
        least_test: a transfer that leaves fewer to test on is refused
        validation: so many texts serve the search for learning rates only; they are the same for all seeds
    """

    train: int = 1600
    test: int = 1500
    least_test: int = 200
    validation: int = 500

    def __post_init__(self) -> None:
        for name in ("train", "test", "least_test", "validation"):
            check(getattr(self, name) >= 1, f"target.{name}", getattr(self, name), "at least 1")


@dataclass(frozen=True)
class TuningConfig:
    """The search for learning rates: every arm tries every rate of its kind, and takes the best of each regime.

    Args:
        seed: seed of the search; must not be among the reported seeds
        cells: transfer and regime of the trainings that the search averages over, such as tweets_reviews/over;
            at least one of every regime
    """

    cells: tuple[str, ...]
    seed: int = 0


@dataclass(frozen=True)
class MeasuredConfig:
    """The measured training, which is that of the arm `shallow`.

    Args:
        top: train the last so many blocks, and the head
        every: measure every so many steps
        rows: query rows sampled per sequence; null: all
    """

    top: int = 2
    every: int = 5
    rows: int | None = None


@dataclass(frozen=True)
class WaveConfig:
    """Cells that are finished before those of the next wave begin.

    Args:
        arms: names of arms
        seeds: seeds that are reported; null: all seeds of the study
        transfers: names of transfers; null: all that neither leak nor are held out
    """

    arms: tuple[str, ...]
    seeds: tuple[int, ...] | None = None
    transfers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ConfirmationConfig:
    """A family of hypotheses that is tested on cells of its own: each arm differs from random layers there.

    Args:
        arms: names of arms
        transfers: names of transfers; null: all that neither leak nor are held out
        seeds: seeds; null: all
    """

    arms: tuple[str, ...]
    transfers: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class StudyConfig:
    """A study.

    Args:
        model: the pretrained model
        transfers: name and texts of each transfer
        tuning: the search for learning rates
        output: folder of the study; any number of processes may work in it at once
        waves: what is computed, in this order; an arm may stand in several, with other seeds
        seeds: seeds that are reported
        draws: so many cells per seed of an arm that draws at random
        regimes: name and length of each regime of the source
        source: the full fine-tuning on the source
        target: the split of the target
        train: the training of every arm
        measured: the measured training
        rates: learning rates to try, by kind of adaptation; what is left out keeps its default
        blocks: arms that choose blocks by number choose so many
        rank: rank of LoRA on so many blocks; `blocks * rank` is the rank that every LoRA arm has to spend
        everywhere_rank: rank of the arm `all`, which spends more
        near_duplicates: texts whose sets of five letters overlap by this share (Jaccard) count as one; null: only
            texts that are equal after normalisation
        gradients: cells, as transfer/regime/arm, whose gradients and features are measured all along, at the first seed
        confirmations: name and content of each family of hypotheses that the report tests apart
    """

    model: ModelConfig
    transfers: dict[str, TransferConfig]
    tuning: TuningConfig
    output: str = "runs/study"
    waves: tuple[WaveConfig, ...] = (WaveConfig(("head", "all", "greedy", "random", "first", "last")),)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    draws: int = 3
    regimes: dict[str, RegimeConfig] = field(
        default_factory=lambda: {"under": RegimeConfig(epochs=1), "over": RegimeConfig(epochs=8)}
    )
    source: SourcesConfig = SourcesConfig()
    target: SizesConfig = SizesConfig()
    train: LoopConfig = LoopConfig()
    measured: MeasuredConfig = MeasuredConfig()
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    blocks: int = 3
    rank: int = 4
    everywhere_rank: int = 5
    near_duplicates: float | None = 0.8
    gradients: tuple[str, ...] = ()
    confirmations: dict[str, ConfirmationConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", {**RATES, **{k: tuple(v) for k, v in self.rates.items()}})
        check(bool(self.transfers), "transfers", self.transfers, "at least one")
        check(bool(self.seeds) and len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "distinct, not none")
        names = [arm for wave in self.waves for arm in wave.arms]
        check(bool(names), "waves", self.waves, "at least one arm")
        outside = [seed for wave in self.waves for seed in wave.seeds or () if seed not in self.seeds]
        check(not outside, "seeds of a wave", outside, f"among the seeds of the study {list(self.seeds)}")
        for name in [*self.transfers, *self.regimes, *names]:
            check(name.replace("_", "").isalnum(), "a name of a transfer, regime or arm", name, "letters, digits and _")
        unknown = [name for wave in self.waves for name in wave.transfers or () if name not in self.transfers]
        check(not unknown, "transfers of a wave", unknown, f"among the transfers {list(self.transfers)}")
        if self.tuning.seed in self.seeds:
            raise ValueError(f"tuning.seed {self.tuning.seed} is among the reported seeds {list(self.seeds)}")
        for cell in self.tuning.cells:
            check(self._known(cell.split("/"), 2), "tuning.cells", cell, "a transfer and a regime, as tweets/over")
            held_out = self.transfers[cell.split("/")[0]].held_out
            check(not held_out, "tuning.cells", cell, "of a transfer that is not held out")
        untuned = [name for name in self.regimes if not any(cell.endswith(f"/{name}") for cell in self.tuning.cells)]
        check(not untuned, "tuning.cells", self.tuning.cells, f"at least one of the regimes {untuned}")
        for cell in self.gradients:
            check(self._known(cell.split("/"), 3), "gradients", cell, "transfer, regime and arm, as tweets/over/all")
        for name, confirmation in self.confirmations.items():
            unknown = [transfer for transfer in confirmation.transfers or () if transfer not in self.transfers]
            check(not unknown, f"confirmations.{name}.transfers", unknown, f"among {list(self.transfers)}")
        for kind, rates in self.rates.items():
            check(len(set(rates)) >= 3 and min(rates) > 0, f"rates.{kind}", rates, "at least three different rates")
        for name in ("draws", "blocks", "rank", "everywhere_rank"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        threshold = self.near_duplicates
        check(threshold is None or 0 < threshold < 1, "near_duplicates", threshold, "null, or above 0 and below 1")

    def _known(self, parts: list[str], count: int) -> bool:
        return len(parts) == count and parts[0] in self.transfers and parts[1] in self.regimes

    @property
    def folder(self) -> Path:
        """The folder of the study."""
        return Path(self.output).expanduser()

    @property
    def budget(self) -> int:
        """The sum of the ranks over blocks that a LoRA arm has to spend."""
        return self.blocks * self.rank


# What may grow between two calls on one folder: no finished cell depends on it.
GROWING = ("output", "waves", "seeds", "draws", "transfers", "regimes", "gradients", "rates", "confirmations")
_LOCAL = ("device", "threads")  # of train: where a cell is computed
_TRANSFER = {f.name: f.default for f in dataclasses.fields(TransferConfig) if f.default is not dataclasses.MISSING}


def plain(config: Any) -> Any:
    """The settings as dictionaries, lists and plain values, as JSON and YAML have them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings in which two studies differ, and that cells depend on."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        if name in ("transfers", "regimes", "rates"):
            for key in sorted(old.get(name, {}).keys() & new.get(name, {}).keys()):
                # A folder of an earlier version lacks the settings that were added since; they had their defaults.
                before = {**_TRANSFER, **old[name][key]} if name == "transfers" else old[name][key]
                found += _difference(f"{name}.{key}", before, new[name][key])
        elif name == "train":
            sides = [{k: v for k, v in side[name].items() if k not in _LOCAL} for side in (old, new)]
            found += _difference(name, *sides)
        elif name not in GROWING:
            found += _difference(name, old.get(name), new.get(name))
    return found


def _difference(name: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in _difference(f"{name}.{key}", old.get(key), new.get(key))
        ]
    return [] if old == new else [f"{name} was {old!r} and is {new!r}"]
