"""Where a model attends, and what it attends with: queries, keys and masks, seen while its own implementation runs.

Three ways in. Transformers models fetch their attention function from an `AttentionInterface`; other PyTorch models
call one of torch's attention functions, or a softmax of their own. All of them hand every call to a `see` function and
then let the original run on the original arguments, so that the model's outputs stay equal to the bit.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..blocks import Block
from .attention_call import AttentionCall, stats_of
from .attention_functions import See, seeing_functions
from .attention_places import AttentionPlaces
from .packing import Starts, as_packed, takes_flash_masks

__all__ = ["AttentionCall", "AttentionSight", "See", "interfaces_of", "seeing_interfaces", "stats_of"]

logger = logging.getLogger(__name__)


class AttentionSight:
    """All ways in which the blocks of a model may attend."""

    def __init__(self, blocks: Sequence[Block]):
        self._places = AttentionPlaces(blocks)
        interfaces = [one for block in blocks for one in interfaces_of(block.module)]
        self._interfaces = list({id(one): one for one in interfaces}.values())
        attentions = self._places.innermost
        self._needs_functions = self._places.unnamed or not all(map(interfaces_of, attentions))
        if self._places.others:
            logger.info("attention beside that of the blocks is not measured: %s", ", ".join(self._places.others))

    @contextmanager
    def seeing(self, see: See) -> Iterator[None]:
        """Hand every attention call of the blocks to `see`, once each."""
        with ExitStack() as stack:
            if self._interfaces:
                stack.enter_context(seeing_interfaces(self._interfaces, self._places, see))
            if self._needs_functions:
                stack.enter_context(seeing_functions(self._places, see))
            yield


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
def seeing_interfaces(interfaces: list, places: AttentionPlaces, see: See) -> Iterator[None]:
    """Hand every attention call that goes through `interfaces` to `see`, then let the chosen implementation run.

    What that calls in turn (a softmax, torch's SDPA) is the same attention, and is hidden from the other ways in.

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
                    kind = places.of(module).kind or "self"

                    def read():
                        settings = _named_arguments(attend, args, kwargs)
                        mask = _as_added(attention_mask, query, attend) if name == "eager" else attention_mask
                        call = _interface_call(name, module, query, key, mask, settings, starts)
                        return replace(call, kind=kind)

                    if kind != "other":
                        see(module, read)
                    with places.hidden():
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


_READS_BOOL = {"masked_fill", "masked_fill_", "where", "logical_not"}


def _as_added(mask: Tensor | None, query: Tensor, eager: Callable) -> Tensor | None:
    """The mask of an eager function, which adds what it gets: True is 1 and False is 0, unless it looks for either."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return mask
    code = getattr(inspect.unwrap(eager), "__code__", None)
    adds = code is not None and _READS_BOOL.isdisjoint(code.co_names)
    return mask.to(query.dtype) if adds else mask


_BEFORE_SETTINGS = 5  # module, query, key, value, attention_mask


def _named_arguments(function: Callable, args: tuple, kwargs: dict) -> dict:
    # Almost every model passes keywords; positions differ from one eager function to the next, hence the signature.
    names = list(inspect.signature(function).parameters)[_BEFORE_SETTINGS:] if args else []
    return dict(zip(names, args, strict=False)) | kwargs


def _interface_call(
    name: str, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, settings: dict, starts: Starts
) -> AttentionCall:
    """What the implementation `name` makes of its arguments: the same ones mean different things to different ones."""
    mask_mod = None
    if name == "flex_attention" and hasattr(mask, "mask_mod"):
        mask, mask_mod = None, mask.mask_mod
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"attention of {type(module).__name__} goes through {name!r} with a {type(mask).__name__}, which cannot be "
            "read; measure with model.set_attn_implementation('sdpa') or 'eager'"
        )
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window = cu_seqlens = foreign_keys = None
    if name in ("eager", "flex_attention"):
        causal = False  # these functions apply the mask that they are given, and nothing else
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
    sinks = settings.get("s_aux", settings.get("sinks"))
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
        mask_mod=mask_mod,
        sparse="indices" in settings or hasattr(module, "indexer"),  # DeepSeek's sparse attention
    )


def _last_aligned(queries: int, keys: int, causal: bool, window: tuple[int, int] | None, device) -> Tensor:
    distance = torch.arange(keys, device=device) - torch.arange(keys - queries, keys, device=device)[:, None]
    left, right = window if window is not None else (keys, keys)
    return (distance >= -left) & (distance <= (0 if causal else right))  # [Tq, Tk]
