"""Attention heads of a block: which ones are chosen, and where their weights are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..blocks import Block, is_named_attention
from ..decide import Plan
from ..measure.attention_places import AttentionPlaces, heads_of
from .targets import is_conv1d, is_linear

__all__ = ["HeadWeights", "Heads", "Rows", "as_setting", "head_weights", "heads_by_layer", "output_projection"]

Heads = Sequence[int] | Mapping[int, Sequence[int]] | None  # for all blocks, or by block; None: all heads

_QUERY = ("q_proj", "query", "q", "q_lin", "wq", "to_q", "query_proj", "q_linear")
_KEY = ("k_proj", "key", "k", "k_lin", "wk", "to_k", "key_proj", "k_linear")
_VALUE = ("v_proj", "value", "v", "v_lin", "wv", "to_v", "value_proj", "v_linear")
_OUTPUT = ("o_proj", "out_proj", "c_proj", "o", "out_lin", "wo", "dense", "proj", "to_out", "out", "Wo")
# One layer whose outputs are all queries, then all keys, then all values. Others interleave them (GPT-NeoX, Falcon).
_JOINT = ("c_attn", "qkv", "qkv_proj", "Wqkv", "in_proj")


@dataclass(frozen=True, eq=False)
class Rows:
    """Outputs (or inputs) of a linear layer that belong to one head."""

    module: nn.Module
    begin: int
    end: int
    of_inputs: bool = False

    @property
    def index(self) -> tuple[slice, ...]:
        """The index into the weight, which is [out, in], or [in, out] of a `Conv1D`."""
        rows = slice(self.begin, self.end)
        first = self.of_inputs == is_conv1d(self.module)
        return (rows,) if first else (slice(None), rows)


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """The self-attention of a block: H heads of queries, G of keys and values."""

    heads: int
    groups: int
    query: tuple[nn.Module, int]  # the layer, and the first of its outputs
    key: tuple[nn.Module, int]
    value: tuple[nn.Module, int]
    output: nn.Module
    width: int  # of a head's query and key
    value_width: int

    def of(self, head: int) -> list[Rows]:
        """The weights that make the queries of a head and read its output."""
        module, begin = self.query
        return [
            Rows(module, begin + head * self.width, begin + (head + 1) * self.width),
            Rows(self.output, head * self.value_width, (head + 1) * self.value_width, of_inputs=True),
        ]

    def of_group(self, group: int) -> list[Rows]:
        """The weights that make the keys and values of a group."""
        found = []
        for (module, begin), width in ((self.key, self.width), (self.value, self.value_width)):
            found.append(Rows(module, begin + group * width, begin + (group + 1) * width))
        return found


def heads_by_layer(blocks: Sequence[Block], where: object, heads: Heads) -> dict[int, list[int] | None]:
    """The chosen heads of each block, None for all. Without `heads`, those of a plan.

    `ValueError` for a head that a block does not have, or a block that is not in `blocks`.
    """
    if heads is None and isinstance(where, Plan) and where.heads:
        heads = where.heads
    layers = [block.index for block in blocks]
    if heads is None:
        return dict.fromkeys(layers)
    given = heads if isinstance(heads, Mapping) else dict.fromkeys(layers, heads)
    outside = sorted(set(given) - set(layers))
    if outside:
        raise ValueError(f"heads: blocks {outside} are not among the layers {layers}")
    chosen: dict[int, list[int] | None] = {}
    for block in blocks:
        some = given.get(block.index)
        if some is None:
            chosen[block.index] = None
            continue
        count, listed = heads_of([block]), list(some)
        fits = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in listed)
        if not listed or not fits or len(set(listed)) < len(listed) or (count and max(listed) >= count):
            raise ValueError(
                f"heads: expected distinct indices from 0 to {'?' if count is None else count - 1} in block "
                f"{block.index}, got {listed}"
            )
        chosen[block.index] = sorted(listed)
    return chosen


def as_setting(heads: Mapping[int, list[int] | None]) -> dict[str, list[int]]:
    """The result of `heads_by_layer` for JSON: chosen heads by layer, without blocks of which all are chosen."""
    return {str(layer): chosen for layer, chosen in heads.items() if chosen is not None}


def output_projection(block: Block) -> tuple[nn.Module, int]:
    """The output projection of a block's self-attention, and the number of heads.

    `ValueError` if it is not found, or not called as a module (`nn.MultiheadAttention`).
    """
    attention, outer = _attention_of(block)
    if isinstance(attention, nn.MultiheadAttention):
        raise ValueError(
            f"model: the attention of {block.name} is nn.MultiheadAttention, which does not call its output projection "
            "as a module, so single heads cannot be dropped"
        )
    heads = heads_of([block])
    output = _linear_in(outer, _OUTPUT)
    if output is None or heads is None or _sizes(output)[0] % heads:
        raise ValueError(f"model: the output projection of the attention heads of {block.name} cannot be found")
    return output, heads


def head_weights(block: Block) -> HeadWeights:
    """The weights of a block's self-attention by head. `ValueError` if their layout is not known."""
    attention, outer = _attention_of(block)
    heads = heads_of([block])
    if heads is None:
        raise ValueError(f"model: the attention of {block.name} does not state its number of heads")
    if isinstance(attention, nn.MultiheadAttention):
        raise ValueError(f"model: the weights of nn.MultiheadAttention in {block.name} are one parameter, not layers")
    output = _linear_in(outer, _OUTPUT)
    separate = [_linear_in(attention, names) for names in (_QUERY, _KEY, _VALUE)]
    joint = _linear_in(attention, _JOINT)
    known = [layer for layer in separate if layer is not None]
    fits = False
    if output is not None and len(known) == 3:
        query, key, value = known
        width = _sizes(query)[1] // heads
        value_width = _sizes(output)[0] // heads
        groups = _sizes(key)[1] // width if width else 0
        sizes = (heads * width, groups * width, groups * value_width)
        outputs = tuple(_sizes(layer)[1] for layer in known)
        fits, begins = groups > 0 and heads % groups == 0 and sizes == outputs, (0, 0, 0)
    elif output is not None and joint is not None:
        query = key = value = joint
        width = value_width = _sizes(output)[0] // heads
        groups = (_sizes(joint)[1] // width - heads) // 2 if width else 0
        begins = (0, heads * width, (heads + groups) * width)
        fits = groups > 0 and heads % groups == 0 and (heads + 2 * groups) * width == _sizes(joint)[1]
    if not fits or output is None:
        raise ValueError(
            f"model: the layout of heads in the attention of {block.name} is not known; it has neither layers for "
            "queries, keys, values and output nor a joint layer of a known layout"
        )
    return HeadWeights(
        heads, groups, (query, begins[0]), (key, begins[1]), (value, begins[2]), output, width, value_width
    )


def _attention_of(block: Block) -> tuple[nn.Module, nn.Module]:
    """The module of a block's self-attention, and the outermost module around it with a name of attention."""
    places = AttentionPlaces([block])
    found = [module for module in places.innermost if places.of(module).kind == "self"]
    if len(found) != 1:
        raise ValueError(f"model: {block.name} has {len(found)} modules of self-attention; expected one")
    (attention,) = found
    for path, module in block.module.named_modules():
        inside = any(child is attention for child in module.modules())
        if path and inside and is_named_attention(module, path.rpartition(".")[2]):
            return attention, module
    return attention, attention


def _linear_in(module: nn.Module, names: Sequence[str]) -> nn.Module | None:
    named = {path: one for path, one in module.named_modules() if is_linear(one)}
    for name in names:
        for path, one in named.items():
            if path.rpartition(".")[2] == name:
                return one
    return None


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """(in, out)."""
    rows, columns = layer.get_parameter("weight").shape
    return (rows, columns) if is_conv1d(layer) else (columns, rows)
