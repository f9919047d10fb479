"""Attention entropies of a model in float64, from its own eager attention, without the package under test.

Two observers: every softmax over the last dimension inside a block, and every row-stochastic tensor that a module of
the block returns (the attention weights that eager attention hands out). Where there are both, they have to agree.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_SOFTMAX = {torch.softmax, F.softmax, torch.Tensor.softmax}
_CROSS = re.compile(r"cross|encdec|(^|\.)(encoder_attn|encoder_attention|multihead_attn)", re.IGNORECASE)
_NOT_ATTENTION = re.compile(r"router|gate|expert|moe|linear_att|pool|channel_att|(^|[._])hc($|\.)", re.IGNORECASE)
_MASKED = -1e30  # the lowest number of float32, with scores added or not
_HEADS = (
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


def entropy(p):
    """[...]: of the last dimension."""
    return -torch.special.xlogy(p, p).sum(-1)


class _Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.path = []  # of running modules: (path of the block, which run of it, path in the block)
        self.modules = []
        self.found = []  # the same and probabilities

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward and self.path:  # its softmax is out of sight: ask for the weights
            weights = func(*args, **kwargs | {"need_weights": True, "average_attn_weights": False})[1]
            self.found.append((*self.path[-1], weights.detach().double()))
        out = func(*args, **kwargs)
        if self.path and func is torch.logsumexp and kwargs.get("keepdim") and kwargs.get("dim") == -1:
            self.found.append((*self.path[-1], (args[0].detach().double() - out.detach().double()).exp()))
        if self.path and func in _SOFTMAX:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if dim in (-1, out.dim() - 1) and out.dim() >= 3:
                p = out.detach().double()
                p[args[0].detach().amax(-1) < _MASKED] = torch.nan  # rows without a key are no rows
                sinks = getattr(self.modules[-1], "sinks", None)
                if isinstance(sinks, torch.nn.Parameter) and p.shape[-1] == p.shape[-2]:
                    # Eager functions that weigh the output by a sink hand out a softmax without its column.
                    p = torch.cat([args[0], sinks.view(1, -1, 1, 1).expand(*p.shape[:3], 1)], -1).double().softmax(-1)
                self.found.append((*self.path[-1], p.detach()))
        elif self.path and func is F.scaled_dot_product_attention:
            self.found.append((*self.path[-1], _probabilities(*args, **kwargs)))
        return out


def _probabilities(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if enable_gqa:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q @ k.mT).double() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1).nan_to_num(0.0).detach()


def _heads(model, block, path):
    parts = path.split(".") if path else []
    for n in range(len(parts), -1, -1):
        module = block.module.get_submodule(".".join(parts[:n]))
        for name in _HEADS:
            count = getattr(module, name, None)
            if isinstance(count, int) and not isinstance(count, bool) and count > 0:
                return count
    return None


def entropies_by_head(p, heads):
    """([rows], [H] sums): entropies of all rows of probabilities in any layout."""
    h = entropy(p)
    if p.dim() == 3:
        h = h.unflatten(0, (-1, heads or 1))
        axis = 1
    elif heads is None or p.shape[1] == heads:
        axis = 1
    elif p.dim() == 4 and p.shape[2:] == (heads, heads):
        return None  # of the heads of a token among each other (SAM 2 computes it and uses it for nothing)
    elif p.dim() == 5 and p.shape[1] * p.shape[2] == heads:
        h, axis = h.flatten(1, 2), 1
    else:
        axis = next((a for a in (*range(p.dim() - 3, 1, -1), p.dim() - 2, 0) if p.shape[a] == heads), None)
        if axis is None:
            return None
    h = h.movedim(axis, 0).flatten(1)
    empty = h.isnan().all(0)  # rows without any key, of which softmax is NaN
    return int((~empty).sum()), h[:, ~empty].sum(1)


def truth_of(model, batch, blocks_of, double=True):
    """{(block name, kind): [H] mean entropies} over all rows, and whether returned weights confirm them.

    `model` is eager; `blocks_of(model)` are its blocks, whose modules' softmaxes are sorted by the names of modules.
    """
    if double:
        model = copy.deepcopy(model).double()
        batch = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()
        }
    blocks = blocks_of(model)
    recorder, returned, runs = _Recorder(), defaultdict(list), defaultdict(int)
    with ExitStack() as stack, torch.no_grad():
        for block in {b.path: b for b in blocks}.values():
            for path, module in block.module.named_modules():

                def begins(m, args, block=block, path=path):
                    if not path:
                        runs[block.path] += 1
                    recorder.path.append((block.path, runs[block.path] - 1, path))
                    recorder.modules.append(m)

                def ends(m, args, out, block=block, path=path):
                    recorder.path.pop(), recorder.modules.pop()
                    values = out if isinstance(out, (tuple, list)) else [out]
                    for one in values:
                        if isinstance(one, torch.Tensor) and one.dim() == 4 and _stochastic(one):
                            returned[block.path, runs[block.path] - 1].append(one.detach().double())

                stack.callback(module.register_forward_pre_hook(begins).remove)
                stack.callback(module.register_forward_hook(ends).remove)
        torch.manual_seed(5)
        with recorder:
            model(**batch)
    by_path = {block.path: block for block in blocks}
    modules = defaultdict(lambda: defaultdict(list))
    for path, run, inner, p in recorder.found:
        if not _NOT_ATTENTION.search(inner):
            modules[path, run][inner].append(p)
    found, confirmed = {}, True
    for path, run in dict.fromkeys([*modules, *returned]):
        of_block = modules.get((path, run), {})
        self_like = [inner for inner in of_block if not _is_cross(by_path[path], inner)]
        best = min((0 if "self" in i.lower() else 1 if not _qualified(i) else 2 for i in self_like), default=0)
        groups = {"self": [], "cross": []}
        for inner, probabilities in of_block.items():
            if inner not in self_like:
                kind = "cross"
            elif (0 if "self" in inner.lower() else 1 if not _qualified(inner) else 2) == best:
                kind = "self"
            else:
                continue
            heads = _heads(model, by_path[path], inner)
            groups[kind] += [one for p in probabilities if (one := entropies_by_head(p, heads)) is not None]
        name = by_path[path].name.split("@")[0]
        for kind, parts in groups.items():
            widest = max((len(sums) for _, sums in parts), default=0)  # what has fewer heads is beside the block's own
            parts = [(rows, sums) for rows, sums in parts if len(sums) == widest]
            if parts:
                found[name, run, kind] = sum(sums for _, sums in parts) / sum(rows for rows, _ in parts)
        if (name, run, "self") not in found and (name, run, "cross") not in found:  # a function that hides its softmax
            weights = returned.get((path, run), [])
            if len(weights) == 1:
                found[name, run, "self"] = entropy(weights[0]).mean((0, 2))
        for weights in returned.get((path, run), []):
            mean = entropy(weights).mean((0, 2))
            near = [v for (n, r, k), v in found.items() if (n, r) == (name, run) and len(v) == len(mean)]
            confirmed &= not near or any(torch.allclose(v, mean, atol=1e-6) for v in near)
    return found, confirmed, dict(runs), bool(returned)


def _is_cross(block, inner):
    module = block.module.get_submodule(inner)
    return bool(_CROSS.search(inner) or "cross" in type(module).__name__.lower()) or (
        getattr(module, "is_cross_attention", False) is True
    )


def _qualified(inner):
    return not all(re.fullmatch(r"(attention|attn|mha|self|layers?|\d+)?", part) for part in inner.lower().split("."))


def _stochastic(p):
    return (
        p.is_floating_point()
        and p.shape[-1] > 1
        and bool((p >= 0).all())
        and torch.allclose(p.sum(-1), torch.ones((), dtype=p.dtype), atol=1e-6)
    )
