"""A plugin of axolotl: three lines of its YAML measure a training, a fourth puts the adapters where a plan says.

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
    """What the YAML may say."""

    inflection_every: int = 10  # measure every so many optimizer steps
    inflection_out: str | None = None  # folder of the timeline; none: `output_dir`/inflection
    inflection_keys: list[str] = []  # patterns of scalars beside the dozen
    inflection_plan: str | None = None  # a plan.json, or the folder of an adapter: adapters go on its layers


class InflectionPlugin(BasePlugin):
    """Adds InflectionCallback, and fills in the targets of LoRA from a plan."""

    def register(self, cfg: dict) -> None:
        """Puts the plan's targets into the settings. ValueError where they name targets of their own."""
        if not cfg.get("inflection_plan"):
            return
        given = [name for name in ("lora_target_modules", "lora_target_linear") if cfg.get(name)]
        if given:
            raise ValueError(f"inflection_plan: it names the targets of LoRA, and so does {given[0]}; leave one out")
        cfg["lora_target_linear"] = True  # settings without any target are refused; `pre_lora_load` takes it back

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        """Names the modules of the plan's layers, which only the model tells."""
        path = cfg.inflection_plan
        if path:
            plan = Plan.load(path) if str(path).endswith(".json") else Plan.from_pretrained(path)
            names = plan.lora_config(model, r=cfg.lora_r or 4).target_modules
            cfg.lora_target_modules = names if isinstance(names, str) else sorted(names or ())
            cfg.lora_target_linear = None

    def get_input_args(self) -> str:
        """Where the settings are declared."""
        return f"{__name__}.{InflectionArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """The callback."""
        config = MonitorConfig(every=cfg.inflection_every or 10)
        out = cfg.inflection_out or f"{cfg.output_dir}/inflection"
        return [InflectionCallback(config, out, if_exists="overwrite", keys=tuple(cfg.inflection_keys or ()))]
