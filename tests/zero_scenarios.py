"""What one of two processes does in the tests of DeepSpeed's ZeRO; run as a script, one process per rank.

Each stage of ZeRO trains a tiny model and leaves its timeline, and what was warned of, as JSON in the output folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
from helpers.rank_training import as_json, batches_of, mine, model_of, warnings_of_monitors
from torch import distributed as dist

from inflection_fast.measure import Monitor, MonitorConfig

QUANTITIES = ("attention", "activation_grad", "delta_cka", "parameter_grad")
CONFIG = MonitorConfig(every=2, rows=None, quantities=QUANTITIES, probe_share=None)
MEASURED = ("entropy", "max_logit", "activation_grad", "delta_cka", "loss")


def zero(stage):
    model = model_of("llama")
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # 1.0 where nothing is said
        },
    )
    batches, probe = batches_of("llama")
    with warnings_of_monitors() as messages, Monitor(engine, CONFIG, probe=probe) as monitor:
        for batch in batches:
            engine.backward(engine(**mine(batch)[0])["loss"])
            monitor.step()
            engine.step()
    return as_json(monitor.timeline, MEASURED) | {"columns": list(monitor.timeline.columns), "messages": messages}


def main(folder):
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    for stage in (1, 2, 3):
        out = Path(folder) / f"zero{stage}"
        out.mkdir(exist_ok=True)
        (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(zero(stage)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
