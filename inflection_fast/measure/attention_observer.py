"""Observing attention: queries, keys and masks of every call, while the model's own implementation runs.

There are three ways. Transformers models get their attention function from an `AttentionInterface`; other PyTorch
models call one of torch's attention functions, or a softmax of their own. Each way passes every call to an `observe`
function and then runs the original on the original arguments, so the model's outputs stay equal to the bit. In measured
steps every call of a torch function costs about a microsecond more.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..blocks import Block
from .attention_call import AttentionCall, SequenceStarts, as_packed, takes_flash_masks
from .attention_places import AttentionPlaces
from .hooks import patched

__all__ = [
    "AttentionObserver", "FunctionMode", "InterfaceCall", "Observe", "call_of", "heads_first", "interfaces_of",
    "observing_functions", "observing_interfaces", "traced_call",
]  # fmt: skip

logger = logging.getLogger(__name__)

# Gets the attention module, where it is known, and a function that reads the call and may raise.
Observe = Callable[[nn.Module | None, Callable[[], AttentionCall]], None]

_SDPA = torch._C._nn.scaled_dot_product_attention  # context_parallel replaces the name in F
_SOFTMAX = {torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax}
_SOFTMAX |= {torch.log_softmax, F.log_softmax, Tensor.log_softmax, torch.special.log_softmax}
_LOGSUMEXP = {torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp}
_BY_HAND_KINDS = ("self", "cross")


class AttentionObserver:
    """Observes all attention of the blocks of a model."""

    def __init__(self, blocks: Sequence[Block]):
        self.places = AttentionPlaces(blocks)
        interfaces = [one for block in blocks for one in interfaces_of(block.module)]
        self.interfaces = list({id(one): one for one in interfaces}.values())
        attentions = self.places.innermost
        self.needs_functions = self.places.unnamed or not all(map(interfaces_of, attentions))
        if self.places.others:
            logger.info("attention beside that of the blocks is not measured: %s", ", ".join(self.places.others))

    @contextmanager
    def observing(self, observe: Observe) -> Iterator[None]:
        """Pass every attention call of the blocks to `observe`, once each."""
        with ExitStack() as stack:
            if self.interfaces:
                stack.enter_context(observing_interfaces(self.interfaces, self.places, observe))
            if self.needs_functions:
                stack.enter_context(observing_functions(self.places, observe))
            yield


# ---- Transformers ----------------------------------------------------------------------------------------------------


def interfaces_of(module: nn.Module) -> list:
    """The `AttentionInterface` objects from which `module` and its submodules get their attention."""
    found = {}
    for cls in {cls for submodule in module.modules() for cls in type(submodule).__mro__}:
        for function in map(inspect.unwrap, filter(inspect.isfunction, vars(cls).values())):
            if _INTERFACE in function.__code__.co_names:
                interface = function.__globals__.get(_INTERFACE)
                if hasattr(interface, "get_interface"):
                    found[id(interface)] = interface
    return list(found.values())


_INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # its name in modeling files, some of which have an object of their own


@contextmanager
def observing_interfaces(interfaces: list, places: AttentionPlaces, observe: Observe) -> Iterator[None]:
    """Pass every attention call that goes through `interfaces` to `observe`, then run the chosen implementation.

    What the implementation calls (a softmax, torch's SDPA) is the same attention, and is hidden from the other ways.

    `get_interface` is patched on the interface objects: only there is the implementation in use known, also "eager",
    whose function is private to each model. The name in the model's config stays, and with it the masks that the model
    builds. A registered name of our own would turn the 2-D mask of a flash model into a full one.
    """
    starts = SequenceStarts()

    def observing(original):
        def get_interface(name, default):
            attend = original(name, default)

            def seen_attend(module, query, key, value, attention_mask, *args, **kwargs):
                kind = places.of(module).kind or "self"

                def read():
                    given = InterfaceCall(name, attend, module, query, key, attention_mask, args, kwargs, kind)
                    return call_of(given, starts)

                if kind != "other":
                    observe(module, read)
                with places.hidden():
                    return attend(module, query, key, value, attention_mask, *args, **kwargs)

            return seen_attend

        return get_interface

    with ExitStack() as stack:
        for interface in interfaces:
            stack.enter_context(patched(interface, "get_interface", observing))
        yield


class InterfaceCall(NamedTuple):
    """One call of an attention function by a module."""

    name: str  # of the implementation: "sdpa", "eager", ...
    attend: Callable  # the implementation itself
    module: nn.Module
    query: Tensor  # [B, H, Tq, D]
    key: Tensor  # [B, Hkv, Tk, D]
    mask: Any
    args: tuple  # positional arguments after the mask
    kwargs: dict[str, Any]
    kind: str = "self"  # or "cross"


def call_of(given: InterfaceCall, starts: SequenceStarts) -> AttentionCall:
    """The call that the implementation makes of its arguments."""
    name, attend, _, query, _, mask, *_ = given
    call = _interface_call(given, _as_added(mask, query, attend) if name == "eager" else mask, starts)
    if call.cu_seqlens is None:
        return call
    return replace(call, packed=starts.packed(call.cu_seqlens, call.query.shape[2]))


def traced_call(given: InterfaceCall) -> AttentionCall | None:
    """As `call_of`, for compilers that trace it; None where one operator is not enough.

    Those cases are FlexAttention, packed sequences, a sink per query, and bool masks that an eager function adds.
    """
    mask = given.mask
    if given.name == "flex_attention" or not (mask is None or isinstance(mask, Tensor)):
        return None
    if given.name == "eager" and mask is not None and mask.dtype == torch.bool:
        return None
    call = _interface_call(given, mask, SequenceStarts())
    several = call.cu_seqlens is not None or call.foreign_keys is not None
    return None if several or (call.sinks is not None and call.sinks.dim() > 1) else call


_READS_BOOL = {"masked_fill", "masked_fill_", "where", "logical_not"}


def _as_added(mask: Tensor | None, query: Tensor, eager: Callable) -> Tensor | None:
    """The mask as an eager function uses it: it adds a bool mask as 1 and 0, unless its code handles bool masks."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return mask
    code = getattr(inspect.unwrap(eager), "__code__", None)
    adds = code is not None and _READS_BOOL.isdisjoint(code.co_names)
    return mask.to(query.dtype) if adds else mask


_BEFORE_SETTINGS = 5  # module, query, key, value, attention_mask


def _named_arguments(function: Callable, args: tuple, kwargs: dict) -> dict:
    # Almost every model passes keywords. Positions differ between eager functions, so the signature is read.
    names = list(inspect.signature(function).parameters)[_BEFORE_SETTINGS:] if args else []
    return dict(zip(names, args, strict=False)) | kwargs


def _interface_call(given: InterfaceCall, mask: Any, starts: SequenceStarts) -> AttentionCall:
    """The call by the rules of the implementation: implementations interpret equal arguments differently."""
    name, attend, module, query, key, _, args, kwargs, kind = given
    settings = _named_arguments(attend, args, kwargs)
    mask_mod = None
    if name == "flex_attention" and hasattr(mask, "mask_mod"):
        mask_mod, mask = mask.mask_mod, None  # of a BlockMask
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"attention of {type(module).__name__} goes through {name!r} with a {type(mask).__name__}, which cannot be "
            "read; measure with model.set_attn_implementation('sdpa') or 'eager'"
        )
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window = cu_seqlens = foreign_keys = None
    if name in ("eager", "flex_attention"):
        causal = False  # these functions apply the given mask alone
    elif name != "sdpa":
        reach = settings.get("sliding_window")
        window = None if reach is None else (reach - 1, reach - 1)
        if mask is None and takes_flash_masks(name):
            query, key, cu_seqlens, foreign_keys = as_packed(query, key, settings, starts)
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None, : key.shape[2]].bool()  # flash: 1 for keys that are not padding
    elif mask is not None:
        causal, window = False, None  # a full mask contains both
    if name not in ("eager", "sdpa") and query.shape[2] != key.shape[2] and (causal or window):
        # Flash kernels align at the last key, where torch and the operators align at the first.
        band = _last_aligned(query.shape[2], key.shape[2], causal, window, query.device)
        mask, causal, window = band if mask is None else band & mask, False, None
    sinks = settings.get("s_aux", settings.get("sinks"))
    if sinks is None and name == "eager":
        sinks = getattr(module, "sinks", None)  # eager functions read the parameter
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
        kind=kind,
        sparse="indices" in settings or hasattr(module, "indexer"),  # DeepSeek's sparse attention
    )


def _last_aligned(queries: int, keys: int, causal: bool, window: tuple[int, int] | None, device) -> Tensor:
    distance = torch.arange(keys, device=device) - torch.arange(keys - queries, keys, device=device)[:, None]
    left, right = window if window is not None else (keys, keys)
    return (distance >= -left) & (distance <= (0 if causal else right))  # [Tq, Tk]


# ---- torch's functions -----------------------------------------------------------------------------------------------


@contextmanager
def observing_functions(places: AttentionPlaces, observe: Observe) -> Iterator[None]:
    """Pass every attention that ends in one of torch's functions to `observe`, then run the function.

    A softmax over the last dimension counts as attention if it runs inside an attention module (or in a block without
    one), and another dimension has the size of the module's number of heads. So a router, a pooling or a softmax over
    a vocabulary does not count.
    """
    with places.followed(), FunctionMode(places, observe):
        yield


class FunctionMode(TorchFunctionMode):
    """Passes attention that ends in one of torch's functions to `observe`, where an attention module is running."""

    # A mode is off inside its own handler, so nested calls are not observed twice.
    def __init__(self, places: AttentionPlaces, observe: Observe):
        super().__init__()
        self._places, self._observe = places, observe
        self._flex = getattr(torch.ops.higher_order, "flex_attention", None)  # None: this build of torch has none

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _SOFTMAX:
            self._observe_softmax(*args, **kwargs)
        elif func in _LOGSUMEXP:
            self._observe_logsumexp(*args, **kwargs)
        elif func is F.scaled_dot_product_attention or func is _SDPA:
            return _observed_sdpa(self._observe_here, func)(*args, **kwargs)
        elif getattr(func, "__code__", None) is F.multi_head_attention_forward.__code__:  # or a twin of it, see below
            return _observed_multi_head(self._observe_here, func, *args, **kwargs)
        elif func is self._flex:
            self._observe_flex(*args, **kwargs)
        return func(*args, **kwargs)

    def _observe_here(self, read: Callable[[], AttentionCall]) -> None:
        place = self._places.running
        if place is None:  # outside of all blocks, or observed already
            return
        kind = place.kind or "self"
        if kind in _BY_HAND_KINDS:
            self._observe(self._places.module, lambda: replace(read(), kind=kind))

    def _observe_softmax(self, input=None, dim=None, *args, **kwargs) -> None:
        place = self._places.running
        if place is None or place.kind not in _BY_HAND_KINDS or not isinstance(input, Tensor):
            return
        if dim not in (-1, input.dim() - 1) or not input.is_floating_point():
            return
        logits = heads_first(input, place.heads, self._places.sizes)
        if logits is not None:
            self._observe_here(lambda: AttentionCall(logits, logits, logits=logits))

    def _observe_logsumexp(self, input=None, dim=None, keepdim=False, **kwargs) -> None:
        if keepdim:  # Reformer's softmax is exp(x - logsumexp(x)), which keeps the dimension
            self._observe_softmax(input, dim)

    def _observe_flex(self, query, key, value, score_mod, block_mask, scale, *args, **kwargs) -> None:
        mask_mod = block_mask[-1] if isinstance(block_mask, tuple) else None
        self._observe_here(lambda: AttentionCall(query, key, scale=scale, score_mod=score_mod, mask_mod=mask_mod))


# ---- softmax ---------------------------------------------------------------------------------------------------------


def heads_first(logits: Tensor, heads: int | None, sizes: tuple[int, ...] = ()) -> Tensor | None:
    """Scores before a softmax as [B, H, Q, K]; None where no dimension has the size `heads` (None: not known).

    `sizes` are the leading sizes of the hidden state, batch and length in either order, where they are known.

    Other dimensions before the queries (windows, blocks of a sequence) become part of the batch. Known forms are
    [B, H, Q, K], [B * H, Q, K], [B, Q, H, K], [H, B, Q, K], with windows W [B, W, H, Q, K], and for grouped queries
    [B, Hkv, H / Hkv, Q, K].
    """
    dims = logits.dim()
    if dims < 3:
        return None
    if dims == 3:
        heads = heads or 1
        batches = [size * heads for size in sizes] or [heads]
        return logits.unflatten(0, (-1, heads)) if any(len(logits) % size == 0 for size in batches if size) else None
    if heads is None:
        return logits if dims == 4 else None
    if dims == 4 and logits.shape[2:] == (heads, heads) and logits.shape[1] != heads:
        return None  # [B, Q, H, H]: attention among the heads of one token
    # The usual place first, then before the queries, then after them, then at the front.
    for at in (1, *range(dims - 3, 1, -1), dims - 2, 0):
        if logits.shape[at] == heads:
            return logits.movedim(at, dims - 3).flatten(0, dims - 4)
    if dims == 5 and logits.shape[1] * logits.shape[2] == heads:
        return logits.flatten(1, 2)
    return None


# ---- torch's own attention -------------------------------------------------------------------------------------------


def _observed_sdpa(observe: Callable, attend: Callable) -> Callable:
    def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        observe(lambda: AttentionCall(query, key, attn_mask, scale=kwargs.get("scale"), is_causal=is_causal))
        return attend(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)

    return scaled_dot_product_attention


_MULTI_HEAD_NAMES = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


def _observed_multi_head(observe: Callable, original: FunctionType, *args, **kwargs):
    # A function mode is off inside its own handler, so the inner call of SDPA would not be observed; with the mode on
    # the call would come back here. So the same code runs with other globals, in which SDPA, and the softmax that
    # replaces it when weights are asked for, are observed. torch's own namespace is not changed.
    heads = (dict(zip(_MULTI_HEAD_NAMES, args, strict=False)) | kwargs)["num_heads"]

    def softmax(logits, dim):
        scores = logits.unflatten(0, (-1, heads))  # [B * H, Tq, Tk]
        observe(lambda: AttentionCall(scores, scores, logits=scores))
        return original.__globals__["softmax"](logits, dim=dim)

    names = {**original.__globals__, "softmax": softmax}
    names["scaled_dot_product_attention"] = _observed_sdpa(observe, names["scaled_dot_product_attention"])
    twin = FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    twin.__kwdefaults__ = original.__kwdefaults__
    names[original.__name__] = twin  # for the function mode of another monitor, which makes a twin of this twin
    return twin(*args, **kwargs)
