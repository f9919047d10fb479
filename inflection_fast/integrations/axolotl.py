"""A plugin of axolotl: three lines of YAML measure a training, a fourth puts adapters on the layers of a plan.

```yaml
plugins: [inflection_fast.integrations.axolotl.InflectionPlugin]
inflection_every: 10
inflection_out: runs/a
inflection_plan: runs/a/plan.json
```

Written against the public source of axolotl 0.19.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from inflection_fast.decide import Plan
from inflection_fast.integrations.callback import InflectionCallback
from inflection_fast.measure import MonitorConfig

__all__ = ["InflectionArgs", "InflectionPlugin"]


class InflectionArgs(BaseModel):
    """Settings of the plugin in the YAML file."""

    inflection_every: int = 10  # optimizer steps between measured steps
    inflection_out: str | None = None  # folder of the timeline; none: `output_dir`/inflection
    inflection_keys: list[str] = []  # patterns of further scalars
    inflection_plan: str | None = None  # a plan.json, or the folder of an adapter with a plan


class InflectionPlugin(BasePlugin):
    """Adds an InflectionCallback, and takes the targets of LoRA from a plan."""

    def register(self, cfg: dict) -> None:
        """Check the settings. ValueError if they have a plan and also targets of LoRA."""
        if not cfg.get("inflection_plan"):
            return
        given = [name for name in ("lora_target_modules", "lora_target_linear") if cfg.get(name)]
        if given:
            raise ValueError(f"inflection_plan: it gives the targets of LoRA, and so does {given[0]}; remove one")
        cfg["lora_target_linear"] = True  # axolotl requires a target; `pre_lora_load` replaces this one

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        """Set the target modules, whose names follow from the plan and the model."""
        path = cfg.inflection_plan
        if path:
            plan = Plan.load(path) if str(path).endswith(".json") else Plan.from_pretrained(path)
            names = plan.lora_config(model, r=cfg.lora_r or 4).target_modules
            cfg.lora_target_modules = names if isinstance(names, str) else sorted(names or ())
            cfg.lora_target_linear = None

    def get_input_args(self) -> str:
        """The import path of the settings class."""
        return f"{__name__}.{InflectionArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """The callback that measures."""
        config = MonitorConfig(every=cfg.inflection_every or 10)
        out = cfg.inflection_out or f"{cfg.output_dir}/inflection"
        return [InflectionCallback(config, out, if_exists="overwrite", keys=tuple(cfg.inflection_keys or ()))]
