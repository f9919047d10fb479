"""Models that ranks share, and what the tests of distributed measuring do about parameters and their gradients."""

import itertools

from torch import distributed as dist
from torch import nn

from helpers.rank_training import (
    OF_NOISE,
    ONLY_NOISE,
    as_json,
    batches_of,
    mine,
    model_of,
    of_parameters,
    part_of,
    train,
    with_adapters,
)


def fully_sharded(model, blocks, mesh=None):
    from torch.distributed.fsdp import fully_shard

    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ddp_of_parameters(out):
    return of_parameters(nn.parallel.DistributedDataParallel(with_adapters("bert")), "bert", mine)


def fsdp_of_parameters(out):
    model = with_adapters("llama")
    return of_parameters(fully_sharded(model, model.base_model.model.model.layers), "llama", mine)


def fsdp_accumulated(out):
    """Two micro-batches of one sequence on each rank, reduced together."""
    model = with_adapters("llama")
    fully_sharded(model, model.base_model.model.model.layers)
    reduces = itertools.cycle([False, True])
    model.register_forward_pre_hook(lambda model, _: model.set_requires_gradient_sync(next(reduces)))
    quarters = lambda batch: [part_of(batch, 2 * dist.get_rank() + i, 4) for i in range(2)]  # noqa: E731
    return of_parameters(model, "llama", quarters)


def tensor_parallel_llama(model, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {f"self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
    plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    return model


def tensor_parallel_noise(out):
    """Both ranks compute on both micro-batches; norms are on both of them."""
    model = tensor_parallel_llama(model_of("llama"), dist.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    halves = lambda batch: [part_of(batch, part) for part in range(2)]  # noqa: E731
    return as_json(train(model, batches_of("llama")[0], None, ONLY_NOISE, parts_of=halves), OF_NOISE)
