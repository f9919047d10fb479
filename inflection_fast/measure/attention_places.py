"""Where in a block attention is: the modules that attend, what each of them attends to, and which one is running."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from ..blocks import Block, is_linear_attention, is_named_attention
from .elsewhere import Elsewhere

__all__ = ["AttentionPlaces", "Place", "heads_of"]

_CROSS = re.compile(r"cross|enc_?dec|encoder_(attn|attention)(_|$)|multihead_attn$", re.IGNORECASE)
_PLAIN = re.compile(r"(self_?)?(attention|attn|mha)|self|layers?|\d+", re.IGNORECASE)
_HEAD_COUNTS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "nhead",
    "heads",
    "num_head",
    "nheads",
    "num_attn_heads",
)


@dataclass(frozen=True)
class Place:
    """What the attention of one module is to its block."""

    # "self" and "cross" are measured; "other" is an attention beside the block's own (over frames, channels, memory);
    # None: what looks like attention here is none.
    kind: str | None
    heads: int | None  # as the module states it


class AttentionPlaces:
    """The places of attention in the blocks of a model.

    The attention of a block is what lies in modules called attention; in a block without any, whose modules state a
    number of heads, the block itself. Cross attention is told by its name or by `is_cross_attention`. Of several others
    the block's own is the one called "self" something, else the one without a further name ("attention" beside
    "temporal_attention"); several of equal standing and as many heads count together.
    """

    def __init__(self, blocks: Sequence[Block]):
        self._places: dict[nn.Module, Place] = {}
        self._running: list[tuple[nn.Module, tuple[int, ...]]] = []
        self.others: list[str] = []  # names of the modules whose attention is "other"
        self.unnamed = False  # some block has no module that is called attention
        self.innermost: list[nn.Module] = []  # the modules called attention with none such inside
        for block in blocks:
            if not isinstance(block.module, Elsewhere):
                self._look_into(block)

    def of(self, module: nn.Module) -> Place:
        """The place of a module that attends, whatever it is called."""
        return self._places.get(module) or Place("self", _heads_of(module))

    @property
    def running(self) -> Place | None:
        """The innermost place that is running; None outside of all blocks, and while `hidden`."""
        return self._places[self._running[-1][0]] if self._running else None

    @property
    def module(self) -> nn.Module:
        """The module of `running`."""
        return self._running[-1][0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The two leading sizes of the hidden state that went into it; () if it was given none."""
        return self._running[-1][1]

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Nothing is `running` while the context is open: what runs has been seen."""
        running, self._running = self._running, []
        try:
            yield
        finally:
            self._running = running

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Keep `running` up to date while the context is open."""
        with ExitStack() as stack:
            for module in self._places:
                stack.callback(module.register_forward_pre_hook(self._begins, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._ends, always_call=True).remove)
            yield
        self._running.clear()

    def _begins(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module in self._places:  # not a copy of the model, which has the hooks too
            hidden = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 2), None)
            outer = self._running[-1][1] if self._running else ()
            self._running.append((module, outer if hidden is None else tuple(hidden.shape[:2])))

    def _ends(self, module: nn.Module, args: tuple, output: object) -> None:
        while module in self._places and self._running and self._running.pop()[0] is not module:
            pass

    def __deepcopy__(self, memo: dict) -> AttentionPlaces:
        """Itself: a copy of a measured model carries the hooks along, which then do nothing."""
        return self

    def _look_into(self, block: Block) -> None:
        named = {}  # path in the block -> module called attention, or linear attention
        for path, module in block.module.named_modules():
            attribute = path.rpartition(".")[2]
            if path and (is_named_attention(module, attribute) or is_linear_attention(module, attribute)):
                named[path] = module
        own = is_named_attention(block.module, block.path.rpartition(".")[2])
        inner = {
            path: module
            for path, module in named.items()
            if not is_linear_attention(module, path.rpartition(".")[2])
            and not any(other.startswith(path + ".") for other in named)
        }
        cross = {
            path for path, module in inner.items() if any(map(_CROSS.search, path.split("."))) or _is_cross(module)
        }
        standing = {path: _standing(path) for path in inner if path not in cross}
        best = min(standing.values(), default=0)
        counts = {path: _heads_around(block.module, path) or 0 for path in standing if standing[path] == best}
        # Heads of two numbers cannot be added up: the attention with the most counts (Grounding DINO's encoder).
        selfs = {path for path, count in counts.items() if count == max(counts.values())}
        self.innermost += inner.values()
        # Outer ones first: the same module may be in two blocks, and the last word is that of the innermost.
        heads = next((count for one in block.module.modules() if (count := _heads_of(one))), None)
        kind = "cross" if own and _is_cross(block.module) else "self" if own or (heads and not named) else None
        self._places[block.module] = Place(kind, heads)
        self.unnamed |= not inner
        for path, module in named.items():
            if path in cross:
                kind = "cross"
            elif path in standing:
                kind = "self" if path in selfs else "other"
            elif is_linear_attention(module, path.rpartition(".")[2]):
                kind = None
            else:  # holds others: what attends in its own code is what these are
                within = [other for other in inner if other.startswith(path + ".")]
                kinds = {"cross" if other in cross else "self" if other in selfs else "other" for other in within}
                kind = kinds.pop() if len(kinds) == 1 else "self"
            if kind == "other":
                self.others.append(f"{block.name}.{path}")
            self._places[module] = Place(kind, _heads_around(block.module, path))


def _heads_around(block: nn.Module, path: str) -> int | None:
    """The number of heads that a module of a block states, or the nearest module around it."""
    owners = [block.get_submodule(path.rsplit(".", n)[0]) for n in range(1, path.count(".") + 1)]
    return next((count for one in (block.get_submodule(path), *owners, block) if (count := _heads_of(one))), None)


def _standing(path: str) -> int:
    """0: called self-attention; 1: attention and nothing else; 2: of some kind of its own; 3: over channels."""
    if "channel" in path.lower():
        return 3
    if "self" in path.lower():
        return 0
    return 1 if all(_PLAIN.fullmatch(part) for part in path.split(".")) else 2


def _is_cross(module: nn.Module) -> bool:
    return getattr(module, "is_cross_attention", False) is True or bool(_CROSS.search(type(module).__name__))


def _heads_of(module: nn.Module) -> int | None:
    counts = (getattr(module, name, None) for name in _HEAD_COUNTS)
    return next(
        (count for count in counts if isinstance(count, int) and not isinstance(count, bool) and count > 0), None
    )


def heads_of(blocks: Sequence[Block]) -> int | None:
    """The number of attention heads as the modules of the blocks state it, the largest; None if none does."""
    stated = [_stated(block.module) for block in blocks]
    return max((count for count in stated if count is not None), default=None)


def _stated(block: nn.Module) -> int | None:
    modules = list(block.modules())
    for holder in [*modules, *(getattr(module, "config", None) for module in modules)]:
        for name in _HEAD_COUNTS:
            count = getattr(holder, name, None)
            if isinstance(count, int) and count > 0:
                return count
    return None
