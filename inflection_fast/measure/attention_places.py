"""The attention modules of a block: which there are, whether each is self or cross attention, which one is running."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from ..blocks import Block, is_linear_attention, is_named_attention
from .placements import RemoteBlock

__all__ = ["AttentionPlaces", "Place", "heads_of"]

_CROSS = re.compile(r"cross|enc_?dec|encoder_(attn|attention)(_|$)|multihead_attn$", re.IGNORECASE)
_PLAIN = re.compile(r"(self_?)?(attention|attn|mha)|self|layers?|\d+", re.IGNORECASE)
_HEAD_COUNTS = (
    *("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_head", "nheads"),
    "num_attn_heads",
)


@dataclass(frozen=True)
class Place:
    """What the attention of one module is to its block."""

    # "self" and "cross" are measured; "other" is an additional attention (over frames, channels, memory); None: no
    # attention.
    kind: str | None
    heads: int | None  # as an attribute of the module says


class AttentionPlaces:
    """The attention modules in the blocks of a model.

    A module is attention by the name of its class or attribute. In a block without such a module, but with a number of
    heads, the block itself is the attention. Cross attention is recognised by its name or by `is_cross_attention`. Of
    several others the main one has "self" in its name, or else no further name ("attention" beside
    "temporal_attention"). Several main ones with equal numbers of heads are summed.
    """

    def __init__(self, blocks: Sequence[Block]):
        self._places: dict[nn.Module, Place] = {}
        self._running: list[tuple[nn.Module, tuple[int, ...]]] = []
        self.others: list[str] = []  # names of the modules whose attention is "other"
        self.unnamed = False  # some block has no module called attention
        self.innermost: list[nn.Module] = []  # attention modules without another one inside
        for block in blocks:
            if not isinstance(block.module, RemoteBlock):
                self._look_into(block)

    def of(self, module: nn.Module) -> Place:
        """The place of a module that attends."""
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
        """The two leading sizes of its input hidden state; () if there is none."""
        return self._running[-1][1]

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Hide what runs while the context is open: it was observed already."""
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
        """Itself: hooks that are copied with a model do nothing."""
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
        # Different numbers of heads cannot be summed: the attention with most heads counts (Grounding DINO's encoder).
        selfs = {path for path, count in counts.items() if count == max(counts.values())}
        self.innermost += inner.values()
        # Outer ones first: the same module may be in two blocks, and the innermost decides.
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
            else:  # contains others: its own attention is of their kind
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
    """0: named self-attention; 1: attention without a further name; 2: with one; 3: over channels."""
    if "channel" in path.lower():
        return 3
    if "self" in path.lower():
        return 0
    return 1 if all(_PLAIN.fullmatch(part) for part in path.split(".")) else 2


def _is_cross(module: nn.Module) -> bool:
    return getattr(module, "is_cross_attention", False) is True or bool(_CROSS.search(type(module).__name__))


def _heads_of(holder: object) -> int | None:
    counts = (getattr(holder, name, None) for name in _HEAD_COUNTS)
    return next(
        (count for count in counts if isinstance(count, int) and not isinstance(count, bool) and count > 0), None
    )


def heads_of(blocks: Sequence[Block]) -> int | None:
    """The number of attention heads as the modules of the blocks state it, the largest; None if none does."""
    found = []
    for block in blocks:
        modules = list(block.module.modules())
        holders = [*modules, *(getattr(module, "config", None) for module in modules)]
        found += [count for holder in holders if (count := _heads_of(holder))][:1]
    return max(found, default=None)
