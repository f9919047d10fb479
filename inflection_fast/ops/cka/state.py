"""Linear CKA of rows in batches, biased or debiased, exact for any split into batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed

from .. import checks
from .basis import (
    CkaBasis,
    Projection,
    check_fits,
    check_rank,
    check_same_on_ranks,
    find_basis,
    leading_eigenvectors,
    variance_share,
)
from .gram import HEAD, MIN_ROWS, Grams, check_buffer, cka_from_terms, packed_size, shifted_triangle
from .result import CkaResult, jackknife_error, reason_of

__all__ = ["CkaState"]


class CkaState:
    """CKA of `layers` pairs of features whose rows arrive in batches.

    `update`, `compute`, `merge_state`, `reset` and `sync` are named as in torchmetrics. `push`, `value`, `merge` and
    `agree` are the earlier names of `update`, `compute`, `merge_state` and `sync_shift`.

    The state holds, for each layer, the Gram matrix of ``(1, |u|^2, |v|^2, u, v)`` over all rows, where u and v are the
    features less a shift. Biased and debiased CKA of all rows follow from it. Any split of the rows into batches and
    any order of merging give the same value to 1e-6. A mean of debiased values over batches is another number if rows
    are not independent, as tokens of one text.

    Memory: 4 (dim + dim_y + 3)^2 bytes per layer, 9.5 MB at dim = 768; times `groups`, if given; with a `basis` of rank
    k 4 (2 k + 3)^2 bytes, 0.27 MB at k = 128. See `bytes_needed`. An update reads and writes this memory once per 256
    rows, so a small update costs nearly as much as one of 256 rows.

    Attributes:
        gram: float64 ``[layers, K (K + 1) / 2]``, with groups ``[groups, layers, K (K + 1) / 2]``: upper triangles,
            stored row by row, K = 3 + dim + dim_y or, in a basis, 3 + 2 k. States with the same shift are merged by
            adding it.
        shift: float32 ``[layers, dim + dim_y]``.
        frozen: the `CkaBasis` on which rows are projected, or None.

    Args:
        layers: number of pairs of features, at least 1.
        dim: width of x.
        dim_y: width of y; None: that of x.
        shift: as the attribute, near the means of the features; not copied. None: the mean of each layer's first rows
            (at most 256, without rows far longer than the others). If the first batch has only such rows, give a shift.
        basis: a frozen shared basis, from `CkaState.basis`: rows are projected on it, and values are those in the
            basis. For one layer before and after a change; both sides have the same width.
        groups: number of groups of sequences for a delete-a-group jackknife (`result`), at least 2. Takes `groups` Gram
            matrices instead of one, because the contribution of a group depends on all rows, also on later ones.
            `cka_jackknife`, for rows in memory, needs one. None: no standard error.
        gram: memory for the attribute of that name, without `groups` and `basis`: zeros, or the sums of another state,
            with its `shift`. Not copied. None: newly allocated.
        device: device of the state and of all features, if neither `shift` nor `gram` is given.

    Raises:
        TypeError, ValueError: an argument has another type or is out of range, or the state does not fit into the
            memory of the device.
    """

    def __init__(
        self,
        layers: int,
        dim: int,
        dim_y: int | None = None,
        *,
        shift: Tensor | None = None,
        basis: CkaBasis | None = None,
        groups: int | None = None,
        gram: Tensor | None = None,
        device: torch.device | str | None = None,
    ):
        self.layers, self.dim = checks.integer(layers, "layers", 1), checks.integer(dim, "dim", 1)
        self.dim_y = self.dim if dim_y is None else checks.integer(dim_y, "dim_y", 1)
        self.groups = None if groups is None else checks.integer(groups, "groups", 2)
        dims = self.dim + self.dim_y
        given = [checks.tensor(x, name) for x, name in ((shift, "shift"), (gram, "gram")) if x is not None]
        device = torch.empty(0, device=given[0].device if given else device).device
        if basis is not None:
            check_fits(basis, self.layers, self.dim, self.dim_y, device)
        self.frozen, rank = basis, None if basis is None else basis.rank
        need = self.bytes_needed(layers, dim, dim_y, groups=groups, rank=rank)
        checks.fits(need, device, f"dim: {layers} layers of {dim} and {self.dim_y}")
        if shift is not None:
            check_buffer(shift, "shift", torch.float32, [self.layers, dims])
        self._adopt, self._synced = shift is None, False
        self.shift = torch.zeros(self.layers, dims, device=device) if shift is None else shift
        self._allocate(device, gram)

    @staticmethod
    def bytes_needed(
        layers: int, dim: int, dim_y: int | None = None, *, groups: int | None = None, rank: int | None = None
    ) -> int:
        """Memory of a state in bytes; `rank`: that of its frozen basis."""
        dim_y = dim if dim_y is None else dim_y
        width, sums = (dim + dim_y, 0) if rank is None else (2 * rank, dim + dim_y + 2)
        return layers * (8 * (groups or 1) * packed_size(HEAD + width) + 8 * sums + 4 * (dim + dim_y))

    def _allocate(self, device: torch.device, gram: Tensor | None) -> None:
        """Allocate all sums in one tensor, so that one all-reduce adds them."""
        self._widths = (self.dim, self.dim_y) if self.frozen is None else (self.frozen.rank, self.frozen.rank)
        shape = [self.layers, packed_size(HEAD + sum(self._widths))]
        shape = shape if self.groups is None else [self.groups, *shape]
        grams = math.prod(shape)
        extra = 0 if self.frozen is None else self.layers * (self.dim + self.dim_y + 2)
        if gram is None:
            self._sums = torch.zeros(grams + extra + (self.groups is not None), dtype=torch.float64, device=device)
        elif self.groups is None and self.frozen is None:
            check_buffer(gram, "gram", torch.float64, shape)
            self._sums = gram.view(-1)
        else:
            raise ValueError("gram: only a state without groups and without a basis takes memory for it")
        self.gram = self._sums[:grams].view(shape)
        self._sequences = self._sums[-1]  # with groups: number of sequences; NaN after an update without `sequences`
        self._last = torch.full((), -1, dtype=torch.int64, device=device)  # sequence of the last row
        self._turn = 0  # group of the next update without `sequences`
        self._projection = None
        if self.frozen is not None:
            self._projection = Projection(self.frozen, self._sums[grams : grams + extra].view(self.layers, -1))
            self._no_shift = torch.zeros(self.layers, sum(self._widths), device=device)

    @property
    def rows(self) -> Tensor:
        """Number of rows so far, float64 ``[layers]``."""
        counts = self.gram[..., 0]
        return counts if self.groups is None else counts.sum(0)

    def update(self, x: Tensor, y: Tensor, mask: Tensor | None = None, sequences: Tensor | None = None) -> None:
        """Add rows x ``[layers, N, dim]`` and y ``[layers, N, dim_y]``, any N. Never synchronises; no gradient flows.

        Args:
            x, y: any strides, float32, bfloat16 or float16.
            mask: bool ``[N]`` or ``[layers, N]``, True counts; other rows are not read and may hold NaN.
            sequences: only with `groups`: int64 ``[N]``, at least 0, number of each row's sequence in the whole stream.
                Rows of a sequence are contiguous. Sequence s belongs to group s modulo `groups`. None: all rows of an
                update belong to one group, the groups taking turns; a sequence must not continue in another update.

        Raises:
            TypeError, ValueError: an argument does not fit the state.
            RuntimeError: after `sync`.
        """
        self._check_not_synced("update")
        checks.paired_features(x, y, ("x", "y"))
        checks.shape(x, "x", (self.layers, "N", self.dim))
        checks.shape(y, "y", (self.layers, "N", self.dim_y))
        checks.same_device(x, "x", self.gram, "the state")
        if mask is not None:
            checks.shape(checks.device_tensor(mask, "mask", x, "x", torch.bool), "mask", x.shape[1:2], x.shape[:2])
            mask = mask.expand(x.shape[:2])
        if sequences is not None:
            checks.sequences(sequences, x)
            if self.groups is None:
                raise ValueError("sequences: only for a state with groups; create it by CkaState(..., groups=...)")
        checks.no_tangent("CkaState.update", x, y, differentiable=False)
        x, y, shift, adopt = x.detach(), y.detach(), self.shift, self._adopt
        if adopt and (self.groups is not None or self.frozen is not None):
            torch.ops.inflection_fast.cka_adopt(self.rows, shift, x, y, mask)
            adopt = False
        if self._projection is not None:
            x, y = self._projection.push(x, y, shift, mask)
            shift = self._no_shift
        if self.groups is not None:
            self._update_groups(self.groups, x, y, shift, mask, sequences)
        else:
            torch.ops.inflection_fast.cka_push(self.gram, shift, x, y, mask, adopt)

    def _update_groups(
        self, number: int, x: Tensor, y: Tensor, shift: Tensor, mask: Tensor | None, sequences: Tensor | None
    ) -> None:
        if sequences is None:
            self._sequences += torch.nan
            torch.ops.inflection_fast.cka_push(self.gram[self._turn % number], shift, x, y, mask, False)
            self._turn += 1
            return
        self._count(sequences, mask)
        groups = torch.arange(number, device=x.device)
        in_group = (sequences % number == groups[:, None])[:, None].expand(-1, *x.shape[:2])
        in_group = in_group if mask is None else in_group & mask
        x, y = (side.expand(number, *side.shape) for side in (x, y))
        torch.ops.inflection_fast.cka_push(self.gram, shift.repeat(number, 1), x, y, in_group.flatten(0, 1), False)

    def _count(self, sequences: Tensor, mask: Tensor | None) -> None:
        """Count the sequences that begin among these rows; a masked row belongs to the sequence before it."""
        if not len(sequences):
            return
        ids = torch.cat([self._last[None], sequences])
        if mask is not None:
            counts = torch.cat([mask.new_ones(1), mask.any(0)])
            ids = ids[torch.where(counts, torch.arange(len(ids), device=ids.device), 0).cummax(0).values]
        self._sequences += (ids[1:] != ids[:-1]).sum()
        self._last = ids[-1]

    def merge_state(self, other: CkaState) -> None:
        """Add the rows of another state, which does not change. Exact for any shifts; fast if the shift is shared."""
        self._check_not_synced("merge_state")
        if not isinstance(other, CkaState):
            raise TypeError(f"other: expected a CkaState, got {type(other).__name__}")
        mine, theirs = (self.layers, self.dim, self.dim_y), (other.layers, other.dim, other.dim_y)
        if mine != theirs:
            raise ValueError(f"other: expected layers, dim and dim_y {mine}, got {theirs}")
        if self.groups != other.groups:
            raise ValueError(f"other: expected {self.groups} groups, got {other.groups}")
        checks.same_device(other.gram, "other", self.gram, "the state")
        if not (self.frozen is other.frozen is None or (self.frozen is not None and self.frozen.same_as(other.frozen))):
            raise ValueError("other: expected the same basis")
        if self.shift is other.shift:
            self._sums += other._sums
            return
        if self._adopt:
            self.shift = torch.where(self.rows[:, None] == 0, other.shift, self.shift)
        near = other.copy()
        near.rebase(self.shift)
        self._sums += near._sums

    def copy(self) -> CkaState:
        """An independent state with the same rows."""
        state = CkaState(
            self.layers, self.dim, self.dim_y, shift=self.shift.clone(), basis=self.frozen, groups=self.groups
        )
        state._sums.copy_(self._sums)
        state._adopt, state._last, state._turn, state._synced = self._adopt, self._last, self._turn, self._synced
        return state

    def like(self) -> CkaState:
        """An empty state that shares this one's shift. Call it after the first update, or give a shift."""
        state = CkaState(self.layers, self.dim, self.dim_y, shift=self.shift, basis=self.frozen, groups=self.groups)
        self._adopt = False  # rows of a layer that is still empty must not change the shared shift
        return state

    def reset(self) -> None:
        """Remove all rows. The shift remains; if it was not given, later rows may change it."""
        self._sums.zero_()
        self._last.fill_(-1)
        self._turn, self._synced = 0, False

    def sync(self, group: distributed.ProcessGroup | None = None) -> None:
        """Replace the sums by those of all ranks of a process group, as `sync` of a torchmetrics metric. Collective.

        A synced state takes no more rows, which would count once for each rank; `all_reduce` returns a new state.
        """
        self._check_not_synced("sync")
        self.sync_shift(group)
        distributed.all_reduce(self._sums, group=group)
        self._synced = True

    def all_reduce(self, group: distributed.ProcessGroup | None = None) -> CkaState:
        """A new state with the rows of all ranks of a process group; this state does not change.

        Collective: `sync_shift`, then one all-reduce. Ranks without rows take part. The value is the same to 1e-6 for
        any distribution of the rows over ranks. Needs the memory of a second state. ValueError on all ranks if their
        frozen bases differ.
        """
        total = self.copy()
        total.sync(group)
        total._synced = False
        return total

    def sync_shift(self, group: distributed.ProcessGroup | None = None) -> None:
        """Give the states of all ranks the same shift, so that `all_reduce` only adds.

        Collective, after the first update; no rows are exchanged. The new shift is the mean, weighted by rows.
        """
        check_same_on_ranks(self.frozen, group, self.gram.device)
        rows = self.rows[:, None]
        sums = torch.cat([rows, torch.where(rows > 0, self.shift.double() * rows, 0.0)], 1)
        distributed.all_reduce(sums, group=group)
        self.rebase((sums[:, 1:] / sums[:, :1].clamp(min=1)).float().contiguous())
        self._adopt = False

    def _check_not_synced(self, call: str) -> None:
        if self._synced:
            hint = "call reset(), or use all_reduce(), which returns a new state, instead of sync()"
            raise RuntimeError(f"{call}: this state holds the rows of all ranks since sync(); {hint}")

    def compute(self, rank: int | None = None, debiased: bool = True) -> Tensor:
        """CKA of all rows so far, float32 ``[layers]``, equal to `linear_cka` of all rows at once.

        `rank`: compare in this number of leading principal directions of both sides, computed from the same sums. Only
        with ``debiased=False``: debiasing within a basis needs the rows again, or a frozen `basis`. NaN as for
        `linear_cka`, and for fewer than 4 rows (2 if biased), whose number is known only on the device.
        """
        return cka_from_terms(self._terms(rank, debiased)[2]).float()

    def result(self, rank: int | None = None, debiased: bool = True) -> CkaResult:
        """The value with its standard error, numbers of rows and sequences, rank, variance kept, and reasons for NaN.

        The standard error needs `groups`, each of which is left out in turn, in the basis of all rows; without groups
        it is NaN. Arguments as for `compute`.
        """
        grams, bases, terms = self._terms(rank, debiased)
        nothing = torch.full((), torch.nan, dtype=torch.float64, device=terms.device)
        error, units = nothing.expand(self.layers), torch.zeros_like(nothing)
        if self.groups is not None:
            nonempty = (self.gram[..., 0] > 0).any(-1)
            without = [cka_from_terms(grams.without(group).terms(debiased, bases)) for group in self.gram]
            error, units = jackknife_error(torch.stack(without), nonempty), nonempty.sum().double()
        value = cka_from_terms(terms)
        return CkaResult(
            value=value.float(),
            delta=(1 - value).float(),
            standard_error=error.float(),
            rows=self.rows.clone(),
            units=units,
            sequences=nothing if self.groups is None else self._sequences.clone(),
            rank=rank if self.frozen is None else self.frozen.rank,
            variance_kept=self._kept(grams, bases),
            debiased=debiased,
            reason=reason_of(terms, self.rows, grams.packed[:, 1:HEAD], MIN_ROWS[debiased]),
        )

    def basis(
        self,
        rank: int | None = None,
        *,
        variance: float | None = None,
        mean_term: bool = True,
        start: CkaBasis | None = None,
    ) -> CkaBasis:
        """The leading principal directions of the pooled rows of both sides, to be frozen for other states.

        Give exactly one of `rank`, `variance` and `start`.

        Args:
            rank: number of directions, 1 to `dim`.
            variance: share of the variance to keep, above 0 and at most 1: as many directions as the layer that needs
                most. Synchronises with the device.
            mean_term: whether the difference of the two sides' means is part of the scatter.
            start: an approximate basis, for instance of an earlier snapshot, whose rank is used, at most a third of
                `dim`: a block method improves it, which is faster than `eigh`. `residual` of the result is its error.
        """
        if self.frozen is not None:
            raise ValueError("basis: the rows of this state are already projected on a basis")
        if (rank is None) + (variance is None) + (start is None) != 2:
            raise ValueError("rank, variance, start: expected exactly one of them")
        if start is not None:
            check_fits(start, self.layers, self.dim, self.dim_y, self.gram.device)
            rank = start.rank
            if 3 * rank > self.dim:
                raise ValueError(f"start: expected a rank of at most a third of {self.dim}, got {rank}")
        if variance is not None and checks.positive(variance, "variance") > 1:
            raise ValueError(f"variance: expected a share above 0 and up to 1, got {variance}")
        check_rank(self.dim if rank is None else rank, self.dim, self.dim_y)
        checks.flag(mean_term, "mean_term")
        return find_basis(self._grams().pooled_scatters(mean_term), rank, variance, start)

    def _grams(self) -> Grams:
        return Grams(self.gram if self.groups is None else self.gram.sum(0), self._widths, self._moves(self.shift))

    def _terms(self, rank: int | None, debiased: bool) -> tuple[Grams, Tensor | None, Tensor]:
        """The sums, the basis of each layer for this rank, and the terms of CKA."""
        checks.flag(debiased, "debiased")
        grams, bases = self._grams(), None
        if rank is not None:
            check_rank(rank, self.dim, self.dim_y)
            if self.frozen is not None:
                raise ValueError("rank: the rows of this state are already projected on a basis")
            if debiased:
                raise ValueError(
                    "debiased: a streamed value in a basis chosen afterwards is biased; pass debiased=False, "
                    "omit rank, freeze a basis (CkaState.basis), or call linear_cka with all rows"
                )
            bases = leading_eigenvectors(grams.pooled_scatters(), rank)
        return grams, bases, grams.terms(debiased, bases)

    def _kept(self, grams: Grams, bases: Tensor | None) -> Tensor:
        """Share of the pooled variance of both sides in these bases, or in the frozen one, float64 ``[layers]``."""
        if self._projection is not None:
            traces = grams.pooled_scatters().diagonal(dim1=1, dim2=2).sum(1)
            return traces / self._projection.variance(self.shift, self.rows)
        return self.gram.new_ones(self.layers) if bases is None else variance_share(grams.pooled_scatters(), bases)

    def _moves(self, move: Tensor) -> Tensor:
        """A change of the shift ``[layers, dim + dim_y]`` in the space of the Gram matrix, float64."""
        if self.frozen is None:
            return move.double()
        vectors = self.frozen.vectors.double()
        sides = [(side.double()[:, None] @ vectors)[:, 0] for side in (move[:, : self.dim], move[:, self.dim :])]
        return torch.cat(sides, 1)

    def rebase(self, shift: Tensor) -> None:
        """Change the shift of the sums, exactly. The value does not change."""
        move = self.shift.double() - shift.double()
        moves = self._moves(move)
        for gram in self.gram if self.groups is not None else (self.gram,):
            for layer in range(self.layers):
                gram[layer] = shifted_triangle(gram[layer], moves[layer], self._widths[0])
        if self._projection is not None:
            self._projection.rebase(move, self.rows)
        self.shift = shift

    push, value, merge, agree = update, compute, merge_state, sync_shift  # earlier names
