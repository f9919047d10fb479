"""What one process does in the tests of pipeline, context and expert parallelism; run as a script, one per rank."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from helpers.rank_training import as_json, batches_of, mine, train
from torch import distributed as dist
from torch import nn

from inflection_fast.measure import Monitor, MonitorConfig

MICRO_BATCHES, VOCABULARY, WIDTH = 2, 40, 16
EXACT, SAMPLED = (MonitorConfig(every=2, rows=rows, probe_share=None) for rows in (None, 4))
PROBE = [{"input_ids": batch["input_ids"]} for batch in batches_of("llama")[1]]


class Gathered(torch.autograd.Function):
    """The positions [B, H, T, D] of all ranks, one rank after the other."""

    @staticmethod
    def forward(ctx, here):
        parts = [torch.empty(here.shape) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, here.contiguous())
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size(), 2)[dist.get_rank()]


class Attention(nn.Module):
    """All ways in which positions are divided among ranks: not at all, by torch, or by gathering the keys."""

    def __init__(self, causal, gathers):
        super().__init__()
        self.num_heads, self.causal, self.gathers = 4, causal, gathers
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q, k, v = (one(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        if self.gathers:
            k, v = Gathered.apply(k), Gathered.apply(v)
            first = dist.get_rank() * q.shape[2]
            mask = torch.arange(k.shape[2]) <= torch.arange(first, first + q.shape[2])[:, None]
            y = F.scaled_dot_product_attention(q, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, causal, gathers):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention(causal, gathers)
        self.norm2, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Embedding, blocks and head, or the part of them that a stage of a pipeline holds."""

    def __init__(self, layers, causal=True, gathers=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleDict({str(i): Block(causal, gathers) for i in range(layers)})

    def forward(self, input_ids, labels=None):
        x = input_ids if self.embed is None else self.embed(input_ids)
        for block in self.layers.values():
            x = block(x)
        logits = x if self.head is None else self.head(x)
        return logits if labels is None else {"loss": loss_of(logits, labels)}


def loss_of(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def model_of(layers=3, **options):
    import helpers.tiny_models as tiny

    torch.manual_seed(0)
    return tiny.sharpened(Model(layers, **options).train())


def stage_of(model, index, count, *, renumbered=False):
    """The part of a model that a stage holds: earlier ones hold more blocks."""
    ends = [-(-len(model.layers) * i // count) for i in range(count + 1)]
    held = [model.layers[str(i)] for i in range(ends[index], ends[index + 1])]
    names = range(len(held)) if renumbered else range(ends[index], ends[index + 1])
    model.layers = nn.ModuleDict({str(name): block for name, block in zip(names, held, strict=True)})
    model.embed = model.embed if index == 0 else None
    model.head = model.head if index == count - 1 else None
    return model


# ---- pipeline --------------------------------------------------------------------------------------------------------


def schedule_of(kind, module, index, count, group=None, **options):
    from torch.distributed import pipelining

    stage = pipelining.PipelineStage(module, index, count, torch.device("cpu"), group=group)
    return getattr(pipelining, kind)(stage, **{"n_microbatches": MICRO_BATCHES, "loss_fn": loss_of} | options)


def run(schedule, module, batches, config, out=None, part=lambda tensor: tensor):
    """Train by a schedule, measured."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    stage = schedule._stage
    with Monitor(module, config, out, pipeline=schedule, probe=PROBE) as monitor:
        for batch in batches:
            inputs = (part(batch["input_ids"]),) if stage.is_first else ()
            schedule.step(*inputs, target=part(batch["labels"]) if stage.is_last else None)
            monitor.step()
            optimizer.step()
            optimizer.zero_grad()
    return monitor


def pipeline(out, kind="ScheduleGPipe", config=EXACT, renumbered=False, **options):
    rank, world = dist.get_rank(), dist.get_world_size()
    module = stage_of(model_of(), rank, world, renumbered=renumbered)
    monitor = run(
        schedule_of(kind, module, rank, world, **options), module, batches_of("llama")[0], config, out / "run"
    )
    return as_json(monitor.timeline) | {"meta": monitor.timeline.meta, "layers": list(monitor.timeline.layers)}


def gpipe(out):
    return pipeline(out)


def one_forward_one_backward(out):
    """With losses that are parts of a sum, and stages that count their blocks from 0 each."""
    loss = lambda logits, labels: loss_of(logits, labels) / MICRO_BATCHES  # noqa: E731
    return pipeline(out, "Schedule1F1B", SAMPLED, True, scale_grads=False, loss_fn=loss)


def sharded_pipeline(out):
    """Four ranks: two stages, each of which FSDP2 shards over two ranks with batches of their own."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage, part = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    module = stage_of(model_of(), stage, 2)
    for block in module.layers.values():
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(module, mesh=mesh["dp"])
    schedule = schedule_of("Schedule1F1B", module, stage, 2, mesh["pp"].get_group())
    monitor = run(schedule, module, batches_of("llama")[0], EXACT, part=lambda tensor: tensor.chunk(2)[part])
    return as_json(monitor.timeline)


def _entered(schedule, module, config=EXACT, **options):
    with Monitor(module, config, pipeline=schedule, **options):
        pass


def unknown_schedule(out):
    rank, world = dist.get_rank(), dist.get_world_size()
    module = stage_of(model_of(), rank, world)
    schedule = schedule_of("ScheduleGPipe", module, rank, world)
    if rank == 1:
        from torch.distributed.pipelining import ScheduleInterleaved1F1B

        schedule = ScheduleInterleaved1F1B([schedule._stage], MICRO_BATCHES, loss_fn=loss_of)
    _entered(schedule, module)


def other_number_of_micro_batches(out):
    rank, world = dist.get_rank(), dist.get_world_size()
    module = stage_of(model_of(), rank, world)
    _entered(schedule_of("ScheduleGPipe", module, rank, world, n_microbatches=2 + 2 * rank), module)


def stage_twice(out):
    world = dist.get_world_size()
    module = stage_of(model_of(), 0, world)
    _entered(schedule_of("ScheduleGPipe", module, 0, world), module)


def probe_of_other_names(out):
    rank, world = dist.get_rank(), dist.get_world_size()
    module = stage_of(model_of(), rank, world)
    _entered(schedule_of("ScheduleGPipe", module, rank, world), module, probe=[{"tokens": torch.zeros(2, 4).long()}])


def probe_that_a_stage_cannot_take(out):
    rank, world = dist.get_rank(), dist.get_world_size()
    module = stage_of(model_of(), rank, world)
    _entered(schedule_of("ScheduleGPipe", module, rank, world), module, probe=[{"input_ids": torch.tensor([[99]])}])


def quantity_across_stages(out):
    rank, world = dist.get_rank(), dist.get_world_size()
    module = stage_of(model_of(), rank, world)
    _entered(schedule_of("ScheduleGPipe", module, rank, world), module, MonitorConfig(quantities=("gradient_noise",)))


def probe_entropy_in_a_pipeline(out):
    rank, world = dist.get_rank(), dist.get_world_size()
    module = stage_of(model_of(), rank, world)
    schedule = schedule_of("ScheduleGPipe", module, rank, world)
    _entered(schedule, module, MonitorConfig(quantities=("probe_entropy",)), probe=PROBE)


def stage_without_its_schedule(out):
    with Monitor(stage_of(model_of(), dist.get_rank(), dist.get_world_size()), EXACT):
        pass


# ---- context ---------------------------------------------------------------------------------------------------------


def _shared_sequences(model, around, config=EXACT, told=True):
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Monitor(model, config, context=mesh if told else None) as monitor:
        for batch in batches_of("llama")[0]:
            batch = {name: value.clone() for name, value in batch.items()}
            with around(mesh, batch) as part:
                model(**part)["loss"].backward()
            monitor.step()
            optimizer.step()
            optimizer.zero_grad()
    return as_json(monitor.timeline)


@contextlib.contextmanager
def _by_torch(mesh, batch):
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # The one implementation that torch runs so on a CPU.
    buffers = [value.clone() for value in batch.values()]
    with sdpa_kernel(SDPBackend.MATH), context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers)):
        yield dict(zip(batch, buffers, strict=True))


def context_by_torch(out):
    return _shared_sequences(model_of(causal=False), _by_torch)


def context_that_nobody_told(out):
    return _shared_sequences(model_of(causal=False), _by_torch, told=False)


def context_by_gathered_keys(out):
    @contextlib.contextmanager
    def halves(mesh, batch):
        yield {name: value.chunk(mesh.size(), 1)[mesh.get_local_rank()] for name, value in batch.items()}

    return _shared_sequences(model_of(gathers=True), halves)


def calls_under_context(out):
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    Monitor(model_of(), MonitorConfig(quantities=("attention", "rank")), context=mesh)


def context_rows(out):
    """Statistics of causal rows and of a window, against the whole, in torch's order of positions and in the plain."""
    from torch.distributed.tensor.experimental import context_parallel

    from inflection_fast.measure.attention_call import AttentionCall, stats_of
    from inflection_fast.measure.context import Context

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    context, found = Context(mesh), {}
    cases = {"all": {}, "causal": {"is_causal": True}, "around": {"window": (2, 5)}}
    cases["window"] = {"is_causal": True, "window": (3, 3)}
    for name, settings in cases.items():
        for order in ("torch", "plain"):
            torch.manual_seed(3)
            query, place = torch.randn(2, 4, 16, 8) * 3, torch.arange(16)[None]
            key = torch.randn(2, 16, 2, 8).transpose(1, 2)  # as heads are split off
            expected = stats_of(AttentionCall(query, key, **settings), None)
            with contextlib.ExitStack() as stack:
                parts = [query, key, place]
                if order == "torch":
                    stack.enter_context(context_parallel(mesh, buffers=parts, buffer_seq_dims=[2, 2, 1]))
                else:
                    parts = [
                        one.chunk(2, dim)[mesh.get_local_rank()] for one, dim in zip(parts, (2, 2, 1), strict=True)
                    ]
                rows = torch.tensor([0, 2, 3, 7])
                stats = context.stats_of(AttentionCall(*parts[:2], **settings), rows)
                places = parts[2][0][rows].clone()
            differences = [
                (a - b[:, :, places]).abs().nan_to_num(0.0).max() for a, b in zip(stats, expected, strict=True)
            ]
            found[f"{name}, {order}"] = [float(one) for one in differences]
    return found


# ---- experts ---------------------------------------------------------------------------------------------------------


def experts_model(folder=None, **options):
    import helpers.tiny_models as tiny
    import transformers

    if folder is not None:
        return transformers.Qwen3MoeForCausalLM.from_pretrained(folder, **options).train()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=32, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    return tiny.sharpened(transformers.Qwen3MoeForCausalLM(config).train())


def _experts(parts_of=lambda batch: [batch], **sizes):
    from transformers.distributed import DistributedConfig

    model = experts_model(Path(sys.argv[1]) / "experts_model", distributed_config=DistributedConfig(ep_size=2, **sizes))
    return as_json(train(model, batches_of("llama")[0], None, EXACT, parts_of=parts_of))


def experts_of_one_batch(out):
    """Each rank holds half of the experts and of the heads, and both run the whole batch."""
    return _experts(tp_size=2, ep_implementation="all_reduce")


def experts_of_two_batches(out):
    """Each rank holds half of the experts, which get their tokens from both, and FSDP2 shards the rest."""
    return _experts(mine, fsdp_size=2)


SCENARIOS = {
    2: (
        gpipe, one_forward_one_backward, unknown_schedule, other_number_of_micro_batches, stage_twice,
        probe_of_other_names, probe_that_a_stage_cannot_take, quantity_across_stages, probe_entropy_in_a_pipeline,
        stage_without_its_schedule,
        context_by_torch, context_that_nobody_told, context_by_gathered_keys, calls_under_context, context_rows,
        experts_of_one_batch, experts_of_two_batches,
    ),
    4: (sharded_pipeline,),
}  # fmt: skip


def main(folder, names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for scenario in SCENARIOS[dist.get_world_size()]:
        if names and scenario.__name__ not in names:
            continue
        out = Path(folder) / scenario.__name__
        out.mkdir(exist_ok=True)
        try:
            result = scenario(out)
        except Exception as error:
            result = {"raised": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(result or {}))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
