"""What one of two processes does in the tests of distributed measuring; run as a script, one process per rank.

Every scenario measures a tiny model and leaves its timeline, or what it raised, as JSON in the output folder. `whole`
is the same training in one process on the whole batch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
from helpers.packets import ALL
from helpers.rank_parameters import (
    ddp_of_parameters,
    fsdp_accumulated,
    fsdp_of_parameters,
    fully_sharded,
    tensor_parallel_llama,
    tensor_parallel_noise,
)
from helpers.rank_training import (
    BATCH,
    CONFIG,
    SAMPLED,
    STEPS,
    as_json,
    batches_of,
    mine,
    model_of,
    part_of,
    train,
    uneven,
    update,
    warnings_of_monitors,
)
from torch import distributed as dist
from torch import nn

from inflection_fast.measure import Monitor, MonitorConfig

# ---- what is measured right ------------------------------------------------------------------------------------------


def ddp(out, config=CONFIG, name="bert", **options):
    batches, probe = batches_of(name)
    model = nn.parallel.DistributedDataParallel(model_of(name))
    return as_json(train(model, batches, probe, config, parts_of=mine, out=out / "run", **options))


def ddp_sampled(out):
    return ddp(out, SAMPLED)


def ddp_accumulated(out):
    """Two micro-batches of one sequence on each rank."""
    batches, probe = batches_of("bert")
    model = nn.parallel.DistributedDataParallel(model_of("bert"))
    halves = lambda batch: [part_of(batch, 2 * dist.get_rank() + i, 4) for i in range(2)]  # noqa: E731
    return as_json(train(model, batches, probe, parts_of=halves))


def fsdp(out):
    batches, probe = batches_of("llama")
    model = model_of("llama")
    return as_json(train(fully_sharded(model, model.model.layers), batches, probe, parts_of=mine, out=out / "run"))


def replicated_shards(out):
    """FSDP2 with replicas: one shard, two copies of it."""
    mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    batches, probe = batches_of("llama")
    model = model_of("llama")
    return as_json(train(fully_sharded(model, model.model.layers, mesh), batches, probe, parts_of=mine))


def tensor_parallel(out):
    """Both ranks compute on the whole batch, each with half of the heads."""
    batches, probe = batches_of("llama")
    model = tensor_parallel_llama(model_of("llama"), dist.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    return as_json(train(model, batches, probe, SAMPLED, out=out / "run"))


def tensor_parallel_mlp_only(out):
    """Both ranks measure all heads, which must not count twice."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    batches, probe = batches_of("llama")
    model, mesh = model_of("llama"), dist.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        parallelize_module(layer.mlp, mesh, {"up_proj": ColwiseParallel(), "gate_proj": ColwiseParallel(),
                                             "down_proj": RowwiseParallel()})  # fmt: skip
    return as_json(train(model, batches, probe, SAMPLED))


def sharded_and_tensor_parallel(out):
    mesh = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    batches, probe = batches_of("llama")
    model = tensor_parallel_llama(model_of("llama"), mesh["tp"])
    return as_json(train(fully_sharded(model, model.model.layers, mesh["dp"]), batches, probe, SAMPLED))


class SplitAttention(nn.Module):
    """Takes its number of heads from its projections, as models do whose heads are divided among ranks."""

    def __init__(self, width, size):
        super().__init__()
        self.size = size
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (one(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for one in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class SplitBlock(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), SplitAttention(width, size)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class SplitModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
        self.blocks = nn.ModuleList(SplitBlock(16, 4) for _ in range(3))

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def split_model():
    import helpers.tiny_models as tiny

    torch.manual_seed(0)
    return tiny.sharpened(SplitModel().train())


NO_PROBE = MonitorConfig(every=2, rows=4, signals=("attention", "activation_grad", "parameter_grad"))


def sequence_parallel(out):
    """Between the attentions each rank holds half of every sequence, as a plain tensor."""
    from torch.distributed.tensor import Replicate, Shard, parallel

    split = {"input_layouts": Shard(1)}
    plan = {
        "norm1": parallel.SequenceParallel(),
        "norm2": parallel.SequenceParallel(),
        "attention": parallel.PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        **{f"attention.{name}": parallel.ColwiseParallel() for name in "qkv"},
        "attention.out": parallel.RowwiseParallel(output_layouts=Shard(1)),
        "up": parallel.ColwiseParallel(**split),
        "down": parallel.RowwiseParallel(output_layouts=Shard(1)),
    }
    model, mesh = split_model(), dist.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for block in model.blocks:
        parallel.parallelize_module(block, mesh, plan)
    ends = {
        "embed": parallel.RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "head": parallel.ColwiseParallel(**split, output_layouts=Replicate()),
    }
    batches, _ = batches_of("llama")
    return as_json(train(parallel.parallelize_module(model, mesh, ends), batches, None, NO_PROBE))


# ---- one path for all ranks ------------------------------------------------------------------------------------------


def one_rank_without_a_batch(out):
    """Rank 1 has nothing to do in any step; gradients are its own affair here."""
    batches, _ = batches_of("bert")
    parts_of = lambda batch: mine(batch) if dist.get_rank() == 0 else []  # noqa: E731
    return as_json(train(model_of("bert"), batches, None, parts_of=parts_of))


def no_rank_with_a_batch(out):
    with warnings_of_monitors() as messages, Monitor(model_of("bert"), CONFIG) as monitor:
        monitor.step()
    return as_json(monitor.timeline) | {"messages": messages}


def other_config(out):
    with Monitor(model_of("bert"), MonitorConfig(every=2 + dist.get_rank())):
        pass


def other_model(out):
    with Monitor(model_of("bert" if dist.get_rank() == 0 else "distilbert"), CONFIG):
        pass


def folder_of_another_run(out):
    """Only rank 0 looks at the folder."""
    ddp(out)
    ddp(out)


def resumed(out):
    batches, probe = batches_of("bert")
    full = ddp(out / "full")
    model = nn.parallel.DistributedDataParallel(model_of("bert"))
    train(model, batches[:2], probe, parts_of=mine, out=out / "cut")
    train(model, batches, probe, parts_of=mine, out=out / "cut", start_step=2)
    return full


def resumed_from_one(out):
    """One process has measured the first half of the run."""
    batches, probe = batches_of("bert")
    model = update(nn.parallel.DistributedDataParallel(model_of("bert")), batches[:2], mine)
    return as_json(train(model, batches, probe, parts_of=mine, out=out / "run", start_step=2))


def trainer(out, name="llama", accumulate=1):
    """transformers.Trainer, which wraps the model in DDP by way of Accelerate."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from inflection_fast import InflectionCallback

    batches, probe = batches_of(name)
    batches = uneven(batches) if name == "llama" else batches
    # Accelerate deals out whole batches in turn: what two ranks take in one step is what one process takes.
    items = [{name: value[i] for name, value in batch.items()} for batch in batches for i in range(BATCH)]
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"), per_device_train_batch_size=BATCH // 2 // accumulate, max_steps=STEPS,
        use_cpu=True, gradient_accumulation_steps=accumulate,
        learning_rate=0.05, lr_scheduler_type="constant", optim="sgd", weight_decay=0.0, max_grad_norm=1e-3,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no", ddp_backend="gloo",
        dataloader_pin_memory=False,
    )  # fmt: skip

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with InflectionCallback(
        MonitorConfig(every=STEPS, rows=None, signals=ALL, cka_se=True, probe_share=None), out / "run", probe=probe
    ) as callback:
        training = InOrder(model=model_of(name), args=arguments, train_dataset=items, callbacks=[callback])
        training.remove_callback(PrinterCallback)
        training.train()
    return as_json(callback.timeline) | {"world": training.accelerator.num_processes}


def trainer_accumulated(out):
    return trainer(out, accumulate=2)


def trainer_that_adds_means(out):
    """This head takes the mean over its own batch, whatever it is told about the others."""
    return trainer(out, "bert")


def trainer_that_adds_means_accumulated(out):
    return trainer(out, "bert", accumulate=2)


def dropped_on_one_rank(out):
    """The ring of rank 1 is full at step 1."""
    batches, _ = batches_of("bert")
    model = model_of("bert")
    with warnings_of_monitors() as messages, Monitor(model, MonitorConfig(every=1, rows=None)) as monitor:
        for number, batch in enumerate(batches):
            model(**mine(batch)[0]).loss.backward()
            if number == 1 and dist.get_rank() == 1:
                monitor.timeline  # noqa: B018  (all slots are free again)
                free = list(monitor._record.recorder._free)
                monitor._record.recorder._free.clear()
            monitor.step()
            if number == 1 and dist.get_rank() == 1:
                monitor._record.recorder._free.extend(free)
            model.zero_grad()
    return as_json(monitor.timeline) | {"messages": messages, "dropped": monitor.dropped}


def failed_on_one_rank(out):
    """At step 1 a hook of ours fails on rank 1."""
    batches, _ = batches_of("bert")
    model = model_of("bert")
    with warnings_of_monitors() as messages, Monitor(model, MonitorConfig(every=1, rows=None)) as monitor:
        for number, batch in enumerate(batches):
            if number == 1 and dist.get_rank() == 1:
                monitor._taps.failure = ZeroDivisionError("planted")
            model(**mine(batch)[0]).loss.backward()
            monitor.step()
            model.zero_grad()
    return as_json(monitor.timeline) | {"messages": messages}


# ---- faults; the last one ends rank 1 --------------------------------------------------------------------------------


def _alone_from(step, out, leave, timeout_s):
    """Independent training on each rank, of which rank 1 leaves at `step`."""
    batches, _ = batches_of("bert")
    model = model_of("bert")
    waits = []
    with (
        warnings_of_monitors() as messages,
        Monitor(model, MonitorConfig(every=1, rows=None), out / "run", rank_timeout_s=timeout_s) as monitor,
    ):
        for number, batch in enumerate(batches):
            if number == step and dist.get_rank() == 1:
                monitor.timeline  # noqa: B018  (what came before has been joined)
                leave()
                return None
            model(**mine(batch)[0]).loss.backward()
            started = time.monotonic()
            monitor.step()
            waits.append(time.monotonic() - started)
            model.zero_grad()
    missing = monitor.timeline.missing_ranks.tolist()
    return as_json(monitor.timeline) | {"messages": messages, "waits": waits, "missing_ranks": missing}


def late_rank(out):
    """Rank 1 hangs (in a file system, say) for longer than anybody waits."""
    return _alone_from(2, out, leave=lambda: time.sleep(4), timeout_s=1.5)


def killed_rank(out):
    return _alone_from(2, out, leave=lambda: os._exit(9), timeout_s=30)


SCENARIOS = (
    ddp, ddp_sampled, ddp_accumulated, ddp_of_parameters, fsdp, fsdp_of_parameters, fsdp_accumulated,
    replicated_shards, tensor_parallel, tensor_parallel_noise, tensor_parallel_mlp_only,
    sharded_and_tensor_parallel, sequence_parallel, one_rank_without_a_batch, no_rank_with_a_batch, other_config,
    other_model, folder_of_another_run, resumed, resumed_from_one, trainer, trainer_accumulated,
    trainer_that_adds_means, trainer_that_adds_means_accumulated, dropped_on_one_rank, failed_on_one_rank,
    late_rank, killed_rank,
)  # fmt: skip


def main(folder, names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for scenario in SCENARIOS:
        if names and scenario.__name__ not in names:
            continue
        out = Path(folder) / scenario.__name__
        out.mkdir(exist_ok=True)
        started = time.monotonic()
        try:
            result = scenario(out)
        except Exception as error:
            result = {"raised": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        result = {"seconds": time.monotonic() - started} | (result or {})
        (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
        if scenario is not killed_rank:
            dist.barrier()
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
