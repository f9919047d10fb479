"""Linear CKA of rows that come in batches: exact for every split, debiased too."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import checks
from .cka import HEAD, check_rank, leading, of_terms, packed, pooled, unpack

__all__ = ["CkaState"]


class CkaState:
    """CKA of `layers` pairs of features whose rows are pushed batch by batch.

    Holds, per layer, the Gram matrix of ``(1, |u|^2, |v|^2, u, v)`` over all rows, with u and v the features less a
    shift: everything that biased and debiased CKA of all rows together need. Any split of the rows, any order of
    merging gives the same value to 1e-6. A mean over batches of debiased values would be another number wherever
    rows depend on each other, as tokens of one text do.

    Memory: 4 (dim + dim_y + 3)^2 bytes per layer in float64, 9.5 MB at dim = 768. A push reads and writes that once per
    256 rows, so few rows at a time cost nearly as much as 256.

    Attributes:
        gram: float64 ``[layers, K (K + 1) / 2]``, upper triangles row by row, K = 3 + dim + dim_y. States that share a
            shift add by adding it.
        shift: float32 ``[layers, dim + dim_y]``.

    Args:
        layers: pairs of features, at least 1.
        dim: width of x.
        dim_y: width of y; None: that of x.
        shift: as the attribute, near the means of the features; not copied. None: every layer takes the mean of the
            first rows that are pushed to it (of at most 256, but for rows far longer than the others). A first batch
            of nothing but such rows makes a bad shift: push ordinary rows first, or give one.
        device: of the state and of everything pushed.

    Raises:
        TypeError, ValueError: a number or `shift` is none such, or the state is larger than the memory of the device.
    """

    def __init__(
        self,
        layers: int,
        dim: int,
        dim_y: int | None = None,
        *,
        shift: Tensor | None = None,
        device: torch.device | str | None = None,
    ):
        self.layers, self.dim = checks.integer(layers, "layers", 1), checks.integer(dim, "dim", 1)
        self.dim_y = self.dim if dim_y is None else checks.integer(dim_y, "dim_y", 1)
        dims = self.dim + self.dim_y
        device = torch.empty(0, device=device if shift is None else checks.tensor(shift, "shift").device).device
        need, have = self.layers * (8 * packed(HEAD + dims) + 4 * dims), memory_bytes(device)
        if need > have:
            raise ValueError(f"dim: {layers} layers of {dim} and {self.dim_y} take {need} bytes, {device} has {have}")
        if shift is not None and (shift.dtype, tuple(shift.shape)) != (torch.float32, (self.layers, dims)):
            raise ValueError(f"shift: expected float32 {[self.layers, dims]}, got {shift.dtype} {list(shift.shape)}")
        if shift is not None and not shift.is_contiguous():
            raise ValueError("shift: expected a contiguous tensor")
        if shift is not None and shift.requires_grad:
            raise ValueError("shift: expected a tensor that does not require a gradient")
        self._adopt = shift is None
        self.shift = torch.zeros(self.layers, dims, device=device) if shift is None else shift
        self.gram = torch.zeros(self.layers, packed(HEAD + dims), dtype=torch.float64, device=device)

    def push(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Add rows x ``[layers, N, dim]`` and y ``[layers, N, dim_y]``; any N, strides, float32, bfloat16 or float16.

        `mask`: bool ``[N]`` or ``[layers, N]``, True counts; other rows are not read, whatever they hold. Never
        synchronises; rows are read as values.
        """
        checks.paired_features(x, y, ("x", "y"))
        for value, name, dim in ((x, "x", self.dim), (y, "y", self.dim_y)):
            if value.ndim != 3 or value.shape[0] != self.layers or value.shape[2] != dim:
                raise ValueError(f"{name}: expected shape [{self.layers}, N, {dim}], got {list(value.shape)}")
        checks.same_device(x, "x", self.gram, "the state")
        if mask is not None:
            mask = checks.row_mask(mask, "mask", x).expand(x.shape[:2])
        torch.ops.inflection_fast.cka_push(self.gram, self.shift, x.detach(), y.detach(), mask, self._adopt)

    def merge(self, other: CkaState) -> None:
        """Add the rows of another state, which stays as it is: exact for any shifts, one addition for a shared one."""
        if not isinstance(other, CkaState):
            raise TypeError(f"other: expected a CkaState, got {type(other).__name__}")
        mine, theirs = (self.layers, self.dim, self.dim_y), (other.layers, other.dim, other.dim_y)
        if mine != theirs:
            raise ValueError(f"other: expected layers, dim and dim_y {mine}, got {theirs}")
        checks.same_device(other.gram, "other", self.gram, "the state")
        if self.shift is other.shift:
            self.gram += other.gram
            return
        if self._adopt:
            self.shift = torch.where(self.gram[:, :1] == 0, other.shift, self.shift)
        for layer in range(self.layers):
            self.gram[layer] += self._rebased(other, layer)

    def like(self) -> CkaState:
        """An empty state with this one's shift, which must be there: rows were pushed, or it was given."""
        state = CkaState(self.layers, self.dim, self.dim_y, shift=self.shift)
        self._adopt = False  # a layer that is still empty must not move the shift of the other
        return state

    def value(self, rank: int | None = None, debiased: bool = True) -> Tensor:
        """CKA of all rows so far, float32 ``[layers]``, as `linear_cka` gives it for all of them at once.

        `rank`: the leading directions of both sides pooled, chosen from the same sums; only with ``debiased=False``,
        because debiasing within a basis needs the rows again. NaN as for `linear_cka`, and with fewer than 4 rows
        (2 if biased): a state knows their number only on its device.
        """
        checks.flag(debiased, "debiased")
        if rank is None:
            terms = torch.ops.inflection_fast.cka_gram_terms(self.gram, self.dim, self.dim_y, debiased)
            return of_terms(terms).float()
        check_rank(rank, self.dim, self.dim_y)
        if debiased:
            raise ValueError(
                "debiased: a streamed value in a basis chosen afterwards is biased: pass debiased=False, "
                "leave out rank, or call linear_cka with all rows"
            )
        return of_terms(torch.stack([self._terms_in_basis(layer, rank) for layer in range(self.layers)])).float()

    def _rebased(self, other: CkaState, layer: int) -> Tensor:
        """The triangle of other's layer with this state's shift.

        Rows z = (1, p, q, u, v) become ``(1, p + 2 e.u + |e|^2, q + 2 f.v + |f|^2, u + e, v + f)``, linear in z: their
        Gram matrix follows from the old one exactly, the sums of fourth order included.
        """
        k = HEAD + self.dim + self.dim_y
        u, v = slice(HEAD, HEAD + self.dim), slice(HEAD + self.dim, k)
        move = other.shift[layer].double() - self.shift[layer].double()
        e, f = move[: self.dim], move[self.dim :]

        def moved(rows: Tensor) -> Tensor:
            out = rows.clone()
            out[1] += 2 * (e @ rows[u]) + (e @ e) * rows[0]
            out[2] += 2 * (f @ rows[v]) + (f @ f) * rows[0]
            out[HEAD:] += torch.outer(move, rows[0])
            return out

        full = moved(moved(unpack(other.gram[layer], k)).mT)
        rows, cols = torch.triu_indices(k, k, device=full.device)
        return full[rows, cols]

    def _terms_in_basis(self, layer: int, rank: int) -> Tensor:
        k = HEAD + self.dim + self.dim_y
        full = unpack(self.gram[layer], k)
        n, sums = full[0, 0], full[0, HEAD:]
        scatter = full[HEAD:, HEAD:] - torch.outer(sums, sums / n)
        own_x, own_y = scatter[: self.dim, : self.dim], scatter[self.dim :, self.dim :]
        means = self.shift[layer].double() + sums / n
        apart = means[: self.dim] - means[self.dim :]
        basis = leading(pooled(own_x, own_y, apart, n), rank)
        blocks = (scatter[: self.dim, self.dim :], own_x, own_y)
        return torch.stack([(basis.mT @ block @ basis).square().sum() for block in blocks])


def memory_bytes(device: torch.device) -> int:
    """All the memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
