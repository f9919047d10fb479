"""A loop with FSDP2: the Monitor is made after sharding, on every rank. On a CPU, over gloo:

torchrun --nproc-per-node 2 examples/fsdp2_loop.py runs/fsdp2
"""

from __future__ import annotations

import sys

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from inflection_fast import Monitor, MonitorConfig


def main(folder: str) -> None:
    """Trains a tiny Llama for six steps; rank 0 writes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100))
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(distributed.get_rank())
    with Monitor(model, MonitorConfig(every=2), out=folder, if_exists="overwrite") as monitor:
        for _ in range(6):
            ids = torch.randint(4, 100, (4, 16), generator=generator)
            model(input_ids=ids, labels=ids).loss.backward()
            monitor.step()
            optimizer.step()
            optimizer.zero_grad()
    if distributed.get_rank() == 0:
        print(monitor.timeline)


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    main(*sys.argv[1:])
    distributed.destroy_process_group()
