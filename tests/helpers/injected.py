"""Plans for tiny models, and the names of the adapters that an injection makes."""

import numpy as np
from peft.tuners.tuners_utils import BaseTunerLayer

from inflection_fast import Plan, find_blocks


def plan_for(model, *layers, **changes):
    names = changes.get("layers") or [block.name for block in find_blocks(model)]
    made_for = {"model_type": getattr(getattr(model, "config", None), "model_type", None), "layers": names}
    return Plan(
        layers=layers,
        summary="Nothing was worth picking." if not layers else "",
        reasons={layer: "because" for layer in layers},
        scores=np.zeros(len(names)),
        profile={},
        config={},
        model=made_for | {"class": type(model).__name__, "named": False} | changes,
    )


def adapted_names(model):
    return [
        name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)
    ]
