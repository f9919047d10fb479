"""Where a model attends, and what it attends with: queries, keys and masks, seen while its own implementation runs.

Two ways in. Transformers models fetch their attention function from an `AttentionInterface`; any other PyTorch model
ends in `F.scaled_dot_product_attention` or `F.multi_head_attention_forward`. Both hand every call to a `see` function
and then let the original run on the original arguments, so that the model's outputs stay equal to the bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import ops
from .distributed import local_of
from .packing import FOREIGN_KEYS, Starts, as_packed, takes_flash_masks

__all__ = ["AttentionCall", "interfaces_of", "seeing_interfaces", "seeing_sdpa", "stats_of"]


_HEADS = 1  # the dimension of queries [B, H, Tq, D]


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention, as the model's implementation will apply it."""

    query: Tensor  # [B, H, Tq, D]
    key: Tensor  # [B, Hkv, Tk, D]
    mask: Tensor | None = None  # bool (True: attend) or additive, broadcastable to [B, H, Tq, Tk]
    bias: Tensor | None = None  # additive, broadcastable to [B, H, Tq, Tk], on top of the mask
    scale: float | None = None  # None: D ** -0.5
    is_causal: bool = False
    window: tuple[int, int] | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # [H]
    logits: Tensor | None = None  # [B, H, Tq, Tk], finished scores where the caller had them; key is then unused
    cu_seqlens: Tensor | None = None  # [S + 1], where sequences begin that are packed into one row, without a mask
    foreign_keys: Tensor | None = None  # [] bool: keys of packed sequences are not those of the queries; None: they are

    def refuse_foreign_keys(self) -> None:
        """`ValueError` for packed sequences that attend to others. Waits for the device to know."""
        if self.foreign_keys is not None and bool(self.foreign_keys):
            raise ValueError(FOREIGN_KEYS)

    def here(self) -> AttentionCall:
        """This rank's part of a call on DTensors, which may be sharded by heads. `ValueError` for others."""
        if type(self.query) is Tensor or not hasattr(self.query, "placements"):
            return self
        if any(place.is_partial() or (place.is_shard() and place.dim != _HEADS) for place in self.query.placements):
            raise ValueError(
                f"attention on queries placed as {self.query.placements} over ranks cannot be measured: heads may be "
                "sharded, batch and sequence may not"
            )
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return AttentionCall(**{name: local_of(v) if isinstance(v, Tensor) else v for name, v in values.items()})


# Takes the attention module, where it is known, and what reads its call: reading may fail, and is for `see` to forgive.
See = Callable[[nn.Module | None, Callable[[], AttentionCall]], None]


# ---- Transformers ----------------------------------------------------------------------------------------------------


def interfaces_of(module: nn.Module) -> list:
    """The `AttentionInterface` objects that `module` and its submodules fetch their attention from; none: not seen."""
    found = {}
    for cls in {cls for submodule in module.modules() for cls in type(submodule).__mro__}:
        for function in map(inspect.unwrap, filter(inspect.isfunction, vars(cls).values())):
            if _INTERFACE in function.__code__.co_names:
                interface = function.__globals__.get(_INTERFACE)
                if hasattr(interface, "get_interface"):
                    found[id(interface)] = interface
    return list(found.values())


_INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # what modeling files call it; some have one of their own


@contextmanager
def seeing_interfaces(interfaces: list, see: See) -> Iterator[None]:
    """Hand every attention call that goes through `interfaces` to `see`, then let the chosen implementation run.

    `get_interface` is shadowed on the interface objects, because it is the one place that knows the implementation in
    use, "eager" included, whose function is private to each model. The names that the model's config carries stay as
    they are, so the masks it builds and its checks for "flash" do too; a name of our own, registered for attention and
    for masks, would change both and rebuild a flash model's 2-D mask as a full one.
    """
    starts = Starts()
    with ExitStack() as stack:
        for interface in interfaces:
            original = interface.get_interface  # bound, or what somebody else has put there

            def get_interface(name, default, original=original):
                attend = original(name, default)

                def seen_attend(module, query, key, value, attention_mask, *args, **kwargs):
                    def read():
                        settings = _named_arguments(attend, args, kwargs)
                        return _interface_call(name, module, query, key, attention_mask, settings, starts)

                    see(module, read)
                    return attend(module, query, key, value, attention_mask, *args, **kwargs)

                return seen_attend

            shadowed = vars(interface).get("get_interface")
            interface.get_interface = get_interface
            stack.callback(_unshadow, interface, shadowed)
        yield


def _unshadow(interface, shadowed: Callable | None) -> None:
    if shadowed is None:
        del interface.get_interface
    else:
        interface.get_interface = shadowed


_BEFORE_SETTINGS = 5  # module, query, key, value, attention_mask


def _named_arguments(function: Callable, args: tuple, kwargs: dict) -> dict:
    # Almost every model passes keywords; positions differ from one eager function to the next, hence the signature.
    names = list(inspect.signature(function).parameters)[_BEFORE_SETTINGS:] if args else []
    return dict(zip(names, args, strict=False)) | kwargs


def _interface_call(
    name: str, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, settings: dict, starts: Starts
) -> AttentionCall:
    """What the implementation `name` makes of its arguments: the same ones mean different things to different ones."""
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"attention of {type(module).__name__} goes through {name!r} with a {type(mask).__name__}, which cannot be "
            "read; measure with model.set_attn_implementation('sdpa') or 'eager'"
        )
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window = cu_seqlens = foreign_keys = None
    if name == "eager":
        causal = False  # eager functions apply the mask that they are given, and nothing else
    elif name != "sdpa":
        reach = settings.get("sliding_window")
        window = None if reach is None else (reach - 1, reach - 1)
        if mask is None and takes_flash_masks(name):
            query, key, cu_seqlens, foreign_keys = as_packed(query, key, settings, starts)
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None, : key.shape[2]].bool()  # flash: 1 for keys that are not padding
    elif mask is not None:
        causal, window = False, None  # a full mask holds both already
    if name not in ("eager", "sdpa") and query.shape[2] != key.shape[2] and (causal or window):
        # Flash kernels align at the last key, where torch and the operators align at the first.
        band = _last_aligned(query.shape[2], key.shape[2], causal, window, query.device)
        mask, causal, window = band if mask is None else band & mask, False, None
    sinks = settings.get("s_aux")
    if sinks is None and name == "eager":
        sinks = getattr(module, "sinks", None)  # eager functions reach for the parameter itself
    return AttentionCall(
        query,
        key,
        mask,
        settings.get("position_bias"),
        settings.get("scaling"),
        bool(causal) and query.shape[2] > 1,
        window,
        settings.get("softcap"),
        sinks if name != "sdpa" else None,  # torch's SDPA has none
        cu_seqlens=cu_seqlens,
        foreign_keys=foreign_keys,
    )


def _last_aligned(queries: int, keys: int, causal: bool, window: tuple[int, int] | None, device) -> Tensor:
    distance = torch.arange(keys, device=device) - torch.arange(keys - queries, keys, device=device)[:, None]
    left, right = window if window is not None else (keys, keys)
    return (distance >= -left) & (distance <= (0 if causal else right))  # [Tq, Tk]


# ---- any PyTorch model -----------------------------------------------------------------------------------------------


@contextmanager
def seeing_sdpa(see: See) -> Iterator[None]:
    """Hand every call of `F.scaled_dot_product_attention`, also inside `nn.MultiheadAttention`, to `see`."""
    with _SdpaMode(see):
        yield


class _SdpaMode(TorchFunctionMode):
    def __init__(self, see: See):
        super().__init__()
        self._see = see

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _seen_sdpa(self._see)(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return _seen_multi_head(self._see, *args, **kwargs)
        return func(*args, **kwargs)


def _seen_sdpa(see: See) -> Callable:
    def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        see(None, lambda: AttentionCall(query, key, attn_mask, scale=kwargs.get("scale"), is_causal=is_causal))
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)

    return scaled_dot_product_attention


_MULTI_HEAD_NAMES = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


def _seen_multi_head(see: See, *args, **kwargs):
    # A function mode is off inside its own handler, so the inner call of SDPA would go by unseen, and calling again
    # with the mode on would come straight back here. The same code with two names looked up elsewhere sees it, without
    # touching torch's own namespace: SDPA, and the softmax that stands in its place when weights are asked for.
    heads = (dict(zip(_MULTI_HEAD_NAMES, args, strict=False)) | kwargs)["num_heads"]

    def softmax(logits, dim):
        scores = logits.unflatten(0, (-1, heads))  # [B * H, Tq, Tk]
        see(None, lambda: AttentionCall(scores, scores, logits=scores))
        return F.softmax(logits, dim=dim)

    original = F.multi_head_attention_forward
    names = {**original.__globals__, "scaled_dot_product_attention": _seen_sdpa(see), "softmax": softmax}
    twin = FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    twin.__kwdefaults__ = original.__kwdefaults__
    names[original.__name__] = twin  # what the function hands to other function modes, if there are any
    return twin(*args, **kwargs)


# ---- what is measured of a call --------------------------------------------------------------------------------------


def stats_of(call: AttentionCall, rows: Tensor | None) -> ops.AttentionStats:
    """The statistics of the query rows `rows` (None: all) of a call, [B, H, R] each; NaN for `foreign_keys`.

    `sink` of packed sequences is the probability of the first key of the row's own sequence.
    """
    stats = _stats_of(call, rows)
    if call.cu_seqlens is not None and call.sinks is None:
        stats = stats._replace(sink=_sink_of_sequence(call, rows, stats))
    if call.foreign_keys is not None:
        stats = type(stats)(*(field.masked_fill(call.foreign_keys, torch.nan) for field in stats))
    return stats


def _sink_of_sequence(call: AttentionCall, rows: Tensor | None, stats: ops.AttentionStats) -> Tensor:
    """[1, H, R]: the probability of the first key of each row's sequence, where the operator has that of the tensor's.

    The log-sum-exp of a row with one key is the score of that key.
    """
    cu_seqlens = call.cu_seqlens.long()
    if rows is None:
        rows = torch.arange(call.query.shape[2], device=call.query.device)
    before = torch.searchsorted(cu_seqlens, rows, right=True) - 1  # the last start that is not after the row
    first = cu_seqlens.index_select(0, before.clamp(min=0))
    query, key = call.query.detach().index_select(2, rows), call.key.detach().index_select(2, first)
    by_row = (x.permute(2, 1, 0, 3) for x in (query, key))  # [R, H, 1, D]: a batch of single rows with a single key
    bias = None
    if call.bias is not None:
        every = call.bias.detach().expand(-1, -1, call.query.shape[2], call.query.shape[2])
        bias = every[0, :, rows, first].mT[:, :, None, None]
    score = ops.attention_stats_qk(*by_row, attn_mask=bias, scale=call.scale, softcap=call.softcap).lse.permute(2, 1, 0)
    hidden = stats.keys == 0
    if call.window is not None:
        hidden = hidden | (rows - first > call.window[0])
    return (score - stats.lse).exp().masked_fill(hidden, 0.0)


def _stats_of(call: AttentionCall, rows: Tensor | None) -> ops.AttentionStats:
    if call.logits is not None:
        return ops.attention_stats(_at(call.logits, rows).detach())
    query, mask = call.query.detach(), call.mask if call.bias is None else call.bias.detach()
    if call.bias is not None and call.mask is not None:
        if not call.is_causal and call.window is None:  # nothing else depends on where a row stands
            query, mask, rows = _at(query, rows), _biased(_at(call.bias.detach(), rows), _at(call.mask, rows)), None
        else:
            mask = _biased(mask, call.mask)
    return ops.attention_stats_qk(
        query,
        call.key.detach(),
        attn_mask=mask,
        is_causal=call.is_causal,
        scale=call.scale,
        window=call.window,
        softcap=call.softcap,
        sinks=None if call.sinks is None else call.sinks.detach(),
        rows=rows,
        cu_seqlens=call.cu_seqlens,
    )


def _at(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None or tensor.shape[-2] == 1 else tensor.index_select(-2, rows)


def _biased(bias: Tensor, mask: Tensor) -> Tensor:
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
