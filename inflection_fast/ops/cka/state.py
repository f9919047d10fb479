"""Linear CKA of rows that come in batches: exact for every split, debiased too."""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed

from .. import checks
from .basis import CkaBasis, Projection, check_fits, check_rank, check_same_on_ranks, find, leading, variance_share
from .gram import HEAD, MIN_ROWS, Grams, check_memory, moved, of_terms, packed
from .result import CkaResult, jackknife_error, reason_of

__all__ = ["CkaState"]


class CkaState:
    """CKA of `layers` pairs of features whose rows come batch by batch.

    Named as torchmetrics names it: `update`, `compute`, `merge_state`, `reset`, and over ranks `sync`, or `all_reduce`,
    which returns a new state. `push`, `value`, `merge` and `agree` are earlier names of `update`, `compute`,
    `merge_state` and `sync_shift`.

    Holds, per layer, the Gram matrix of ``(1, |u|^2, |v|^2, u, v)`` over all rows, with u and v the features less a
    shift: everything that biased and debiased CKA of all rows together need. Any split of the rows, any order of
    merging gives the same value to 1e-6. A mean over batches of debiased values would be another number wherever
    rows depend on each other, as tokens of one text do.

    Memory: 4 (dim + dim_y + 3)^2 bytes per layer in float64, 9.5 MB at dim = 768; with `groups` so much for each of
    them; with `basis` of rank k 4 (2 k + 3)^2, 0.27 MB at k = 128. `bytes_needed` says it beforehand. An update reads
    and writes that once per 256 rows, so few rows at a time cost nearly as much as 256.

    Attributes:
        gram: float64 ``[layers, K (K + 1) / 2]``, with groups ``[groups, layers, K (K + 1) / 2]``, upper triangles row
            by row, K = 3 + dim + dim_y or, in a basis, 3 + 2 k. States that share a shift add by adding it.
        shift: float32 ``[layers, dim + dim_y]``.
        frozen: the `CkaBasis` that rows are projected on, or None.

    Args:
        layers: pairs of features, at least 1.
        dim: width of x.
        dim_y: width of y; None: that of x.
        shift: as the attribute, near the means of the features; not copied. None: every layer takes the mean of the
            first rows that it gets (of at most 256, but for rows far longer than the others). A first batch
            of nothing but such rows makes a bad shift: begin with ordinary rows, or give one.
        basis: a frozen shared basis (`CkaState.basis` finds one): rows are projected as they come, and biased and
            debiased values are those in the basis. For the same layer before and after: both sides of one width.
        groups: number of groups of sequences for a delete-a-group jackknife (`result`), at least 2. Exact and one-pass,
            but it takes `groups` Gram matrices where a plain state takes one, because what a group contributes to
            the value depends on all rows, also those to come. Where all rows are at hand, `cka_jackknife` leaves out
            single sequences and holds one matrix. None: no standard error.
        gram: memory for the attribute of that name, where nothing is kept apart by `groups` or `basis`: zeros, or the
            sums of another state, whose `shift` then belongs to it. Not copied. None: of its own.
        device: of the state and of all features, if neither `shift` nor `gram` is given.

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
            check_memory(shift, "shift", torch.float32, [self.layers, dims])
        self._adopt, self._synced = shift is None, False
        self.shift = torch.zeros(self.layers, dims, device=device) if shift is None else shift
        self._allocate(device, gram)

    @staticmethod
    def bytes_needed(
        layers: int, dim: int, dim_y: int | None = None, *, groups: int | None = None, rank: int | None = None
    ) -> int:
        """What a state holds, in bytes; `rank`: of its frozen basis."""
        dim_y = dim if dim_y is None else dim_y
        width, sums = (dim + dim_y, 0) if rank is None else (2 * rank, dim + dim_y + 2)
        return layers * (8 * (groups or 1) * packed(HEAD + width) + 8 * sums + 4 * (dim + dim_y))

    def _allocate(self, device: torch.device, gram: Tensor | None) -> None:
        """Everything that adds up, in one piece, so that one reduction adds it."""
        self._widths = (self.dim, self.dim_y) if self.frozen is None else (self.frozen.rank, self.frozen.rank)
        shape = [self.layers, packed(HEAD + sum(self._widths))]
        shape = shape if self.groups is None else [self.groups, *shape]
        grams = math.prod(shape)
        extra = 0 if self.frozen is None else self.layers * (self.dim + self.dim_y + 2)
        if gram is None:
            self._sums = torch.zeros(grams + extra + (self.groups is not None), dtype=torch.float64, device=device)
        elif self.groups is None and self.frozen is None:
            check_memory(gram, "gram", torch.float64, shape)
            self._sums = gram.view(-1)
        else:
            raise ValueError("gram: only a state without groups and without a basis takes memory for it")
        self.gram = self._sums[:grams].view(shape)
        self._sequences = self._sums[-1]  # with groups: how many have begun; NaN where an update did not tell them
        self._last = torch.full((), -1, dtype=torch.int64, device=device)  # of the last row's sequence
        self._turn = 0
        self._projection = None
        if self.frozen is not None:
            self._projection = Projection(self.frozen, self._sums[grams : grams + extra].view(self.layers, -1))
            self._no_shift = torch.zeros(self.layers, sum(self._widths), device=device)

    @property
    def rows(self) -> Tensor:
        """float64 ``[layers]``: how many rows counted so far."""
        counts = self.gram[..., 0]
        return counts if self.groups is None else counts.sum(0)

    def update(self, x: Tensor, y: Tensor, mask: Tensor | None = None, sequences: Tensor | None = None) -> None:
        """Add rows x ``[layers, N, dim]`` and y ``[layers, N, dim_y]``; any N, strides, float32, bfloat16 or float16.

        `mask`: bool ``[N]`` or ``[layers, N]``, True counts; other rows are not read, whatever they hold. Never
        synchronises; rows are read as values.

        `sequences`: int64 ``[N]``, at least 0, only with `groups`: which sequence of the whole stream a row is of;
        rows of a sequence follow each other. Sequence s is of group s modulo `groups`. Without it, all rows of an
        update belong to one group, the next one in turn: then no sequence may go on in another update. That costs no
        more than one without groups, while a batch that several groups share is multiplied in as many short pieces.

        Raises:
            TypeError, ValueError: an argument does not fit the state.
            RuntimeError: after `sync`.
        """
        self._check_not_synced("update")
        checks.paired_features(x, y, ("x", "y"))
        for value, name, dim in ((x, "x", self.dim), (y, "y", self.dim_y)):
            if value.ndim != 3 or value.shape[0] != self.layers or value.shape[2] != dim:
                raise ValueError(f"{name}: expected shape [{self.layers}, N, {dim}], got {list(value.shape)}")
        checks.same_device(x, "x", self.gram, "the state")
        if mask is not None:
            mask = checks.row_mask(mask, "mask", x).expand(x.shape[:2])
        if sequences is not None:
            checks.sequences(sequences, x)
            if self.groups is None:
                raise ValueError("sequences: only a state with groups keeps them apart, see CkaState(groups=...)")
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
        own = (sequences % number == groups[:, None])[:, None].expand(-1, *x.shape[:2])
        own = own if mask is None else own & mask
        x, y = (side.expand(number, *side.shape) for side in (x, y))
        torch.ops.inflection_fast.cka_push(self.gram, shift.repeat(number, 1), x, y, own.flatten(0, 1), False)

    def _count(self, sequences: Tensor, mask: Tensor | None) -> None:
        """Adds the sequences that begin among these rows; a masked row is of the sequence before it."""
        if not len(sequences):
            return
        ids = torch.cat([self._last[None], sequences])
        if mask is not None:
            there = torch.cat([mask.new_ones(1), mask.any(0)])
            ids = ids[torch.where(there, torch.arange(len(ids), device=ids.device), 0).cummax(0).values]
        self._sequences += (ids[1:] != ids[:-1]).sum()
        self._last = ids[-1]

    def merge_state(self, other: CkaState) -> None:
        """Add the rows of another state, which stays as it is: exact for any shifts, one addition for a shared one."""
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
        """A state of the same rows that goes its own way."""
        state = CkaState(
            self.layers, self.dim, self.dim_y, shift=self.shift.clone(), basis=self.frozen, groups=self.groups
        )
        state._sums.copy_(self._sums)
        state._adopt, state._last, state._turn, state._synced = self._adopt, self._last, self._turn, self._synced
        return state

    def like(self) -> CkaState:
        """An empty state with this one's shift, which must be there: rows came, or it was given."""
        state = CkaState(self.layers, self.dim, self.dim_y, shift=self.shift, basis=self.frozen, groups=self.groups)
        self._adopt = False  # a layer that is still empty must not move the shift of the other
        return state

    def reset(self) -> None:
        """Forget all rows. The shift stays, and rows that come later may still move it if it was not given."""
        self._sums.zero_()
        self._last.fill_(-1)
        self._turn, self._synced = 0, False

    def sync(self, group: distributed.ProcessGroup | None = None) -> None:
        """Let this state hold the rows of all ranks of a process group, as a torchmetrics metric does after `sync`.

        Collective: one packed sum. A state that is synced takes no more rows, which would count once for every rank;
        `all_reduce` leaves this state as it is and returns another one.
        """
        self._check_not_synced("sync")
        self.sync_shift(group)
        distributed.all_reduce(self._sums, group=group)
        self._synced = True

    def all_reduce(self, group: distributed.ProcessGroup | None = None) -> CkaState:
        """A new state with the rows of all ranks of a process group: one packed sum, one shift for all before it.

        Collective. The value is the same, to 1e-6, for any number of ranks that the rows are dealt out to; this state
        stays as it is. Needs the memory of a second state. A rank without rows takes part. `ValueError` on every rank
        where their frozen bases differ.
        """
        total = self.copy()
        total.sync(group)
        total._synced = False
        return total

    def sync_shift(self, group: distributed.ProcessGroup | None = None) -> None:
        """Let all ranks of a process group go on with one shift, so that `all_reduce` need not move any sums.

        Collective, after the first update; no rows are exchanged. It is the mean of the shifts, weighted by rows.
        """
        check_same_on_ranks(self.frozen, group, self.gram.device)
        rows = self.rows[:, None]
        sums = torch.cat([rows, torch.where(rows > 0, self.shift.double() * rows, 0.0)], 1)
        distributed.all_reduce(sums, group=group)
        self.rebase((sums[:, 1:] / sums[:, :1].clamp(min=1)).float().contiguous())
        self._adopt = False

    def _check_not_synced(self, call: str) -> None:
        if self._synced:
            ways = "call reset(), or take all_reduce(), a new state, in place of sync()"
            raise RuntimeError(f"{call}: this state holds the rows of all ranks since sync(); {ways}")

    def compute(self, rank: int | None = None, debiased: bool = True) -> Tensor:
        """CKA of all rows so far, float32 ``[layers]``, as `linear_cka` gives it for all of them at once.

        `rank`: the leading directions of both sides pooled, chosen from the same sums; only with ``debiased=False``,
        because debiasing within a basis needs the rows again or a frozen `basis`. NaN as for `linear_cka`, and with
        fewer than 4 rows (2 if biased): a state knows their number only on its device.
        """
        self._check_value(rank, debiased)
        grams = self._grams()
        return of_terms(grams.terms(debiased, self._bases(grams, rank))).float()

    def result(self, rank: int | None = None, debiased: bool = True) -> CkaResult:
        """The value with its standard error, number of rows and sequences, rank and variance kept, and reasons for NaN.

        The standard error needs `groups` (each in turn is left out, in a basis that stays that of all rows); otherwise
        it is NaN. Arguments as for `compute`.
        """
        self._check_value(rank, debiased)
        grams = self._grams()
        bases = self._bases(grams, rank)
        terms = grams.terms(debiased, bases)
        nothing = torch.full((), torch.nan, dtype=torch.float64, device=terms.device)
        error, units = nothing.expand(self.layers), torch.zeros_like(nothing)
        if self.groups is not None:
            there = (self.gram[..., 0] > 0).any(-1)
            without = [of_terms(grams.without(one).terms(debiased, bases)) for one in self.gram]
            error, units = jackknife_error(torch.stack(without), there), there.sum().double()
        value = of_terms(terms)
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
        """The leading principal directions of the rows of both sides pooled, to be frozen for other states.

        Args:
            rank: so many, 1 to `dim`; or
            variance: as many as it takes to keep this share of the variance, above 0 to 1, in the layer that needs
                most; reads the device.
            mean_term: whether the distance of the two sides' means is part of the scatter.
            start: a basis near the wanted one (of an earlier snapshot), whose rank is then taken: a block
                method from there instead of `eigh`, faster for k well below `dim`, at most a third of it. The
                `residual` says how far it came.
        """
        if self.frozen is not None:
            raise ValueError("basis: the rows of this state are projected already")
        if (rank is None) + (variance is None) + (start is None) != 2:
            raise ValueError("rank, variance, start: expected exactly one of them")
        if start is not None:
            check_fits(start, self.layers, self.dim, self.dim_y, self.gram.device)
            rank = start.rank
            if 3 * rank > self.dim:
                raise ValueError(f"start: expected a rank of at most a third of {self.dim}, got {rank}")
        if variance is not None and checks.positive(variance, "variance") > 1:
            raise ValueError(f"variance: expected a share above 0 to 1, got {variance}")
        check_rank(self.dim if rank is None else rank, self.dim, self.dim_y)
        checks.flag(mean_term, "mean_term")
        return find(self._grams().pooled_scatters(mean_term), rank, variance, start)

    # ---- sums ----

    def _grams(self) -> Grams:
        return Grams(self.gram if self.groups is None else self.gram.sum(0), self._widths, self._moves(self.shift))

    def _check_value(self, rank: int | None, debiased: bool) -> None:
        checks.flag(debiased, "debiased")
        if rank is None:
            return
        check_rank(rank, self.dim, self.dim_y)
        if self.frozen is not None:
            raise ValueError("rank: the rows of this state are in a frozen basis already")
        if debiased:
            raise ValueError(
                "debiased: a streamed value in a basis chosen afterwards is biased: pass debiased=False, "
                "leave out rank, freeze a basis (CkaState.basis), or call linear_cka with all rows"
            )

    def _bases(self, grams: Grams, rank: int | None) -> Tensor | None:
        """The basis of every layer that `rank` asks for."""
        return None if rank is None else leading(grams.pooled_scatters(), rank)

    def _kept(self, grams: Grams, bases: Tensor | None) -> Tensor:
        """float64 ``[layers]``: the share of the variance of both sides pooled in these bases, or in the frozen one."""
        if self._projection is not None:
            traces = grams.pooled_scatters().diagonal(dim1=1, dim2=2).sum(1)
            return traces / self._projection.variance(self.shift, self.rows)
        return self.gram.new_ones(self.layers) if bases is None else variance_share(grams.pooled_scatters(), bases)

    def _moves(self, move: Tensor) -> Tensor:
        """A move of the shift ``[layers, dim + dim_y]`` as the Gram matrix sees it, float64: itself, or projected."""
        if self.frozen is None:
            return move.double()
        vectors = self.frozen.vectors.double()
        sides = [(side.double()[:, None] @ vectors)[:, 0] for side in (move[:, : self.dim], move[:, self.dim :])]
        return torch.cat(sides, 1)

    def rebase(self, shift: Tensor) -> None:
        """Give the sums another shift, as the attribute; exact, whatever it is. The value does not change."""
        far = self.shift.double() - shift.double()
        moves = self._moves(far)
        for gram in self.gram if self.groups is not None else (self.gram,):
            for layer in range(self.layers):
                gram[layer] = moved(gram[layer], moves[layer], self._widths[0])
        if self._projection is not None:
            self._projection.rebase(far, self.rows)
        self.shift = shift

    push, value, merge, agree = update, compute, merge_state, sync_shift  # earlier names
