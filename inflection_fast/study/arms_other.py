"""Other adapters than LoRA, on all blocks and on the planned ones, at the parameters of LoRA where they allow it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from inflection_fast.study.adaptation import Adaptation, NoArm, weight_of
from inflection_fast.study.arms import Everywhere, Planned, Seen

__all__ = ["Other"]


@dataclass(frozen=True)
class Other:
    """An adapter of another kind where `place` puts LoRA.

    DoRA takes LoRA's ranks. VeRA trains vectors only and has one rank for all, here 64. IA3 has no rank at all. Prefix
    tuning has virtual tokens in every block and cannot be put on some. A bottleneck is as wide as makes its parameters
    those of LoRA on the same blocks.
    """

    kind: str
    place: Everywhere | Planned
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        lora = self.place.choose(seen)
        if self.kind == "dora":
            return replace(lora, kind="dora")
        if self.kind in ("ia3", "vera"):
            return replace(
                lora, kind=self.kind, ranks=dict.fromkeys(lora.ranks, VERA_RANK if self.kind == "vera" else 1)
            )
        hidden = getattr(seen.model.config, "hidden_size", None)
        if hidden is None:
            raise NoArm("the configuration of the model names no hidden_size")
        spent = sum(rank * sum(weight_of(seen.model, name).shape) for name, rank in lora.ranks.items())
        if self.kind == "prefix":
            if len(lora.layers) < seen.blocks:
                raise NoArm("prefix tuning cannot be put on some of the blocks")
            tokens = max(1, round(spent / (2 * hidden * seen.blocks)))
            return replace(lora, kind="prefix", ranks=dict.fromkeys(lora.ranks, tokens))
        # Per block a width w costs 2 w hidden + w + hidden.
        width = max(1, round((spent / len(lora.layers) - hidden) / (2 * hidden + 1)))
        return Adaptation("bottleneck", {}, lora.layers, {"width": width, "layers": list(lora.layers)}, lora.note)


VERA_RANK = 64
