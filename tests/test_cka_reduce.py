"""States of several ranks: one sum gives on every rank the value of all rows, for any number of ranks."""

import pytest
import torch
from helpers.programs import spawn
from torch import distributed

from inflection_fast import CkaBasis, CkaState, linear_cka

LAYERS, ROWS, DIM = 2, 90, 6


def features():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(LAYERS, ROWS, DIM, generator=generator)
    y = x + torch.randn(LAYERS, ROWS, DIM, generator=generator)
    return x + torch.linspace(100, 130, ROWS)[:, None], y - 70.0  # each rank's own shift is far from the others'


def basis(turned=False):
    vectors = torch.linalg.qr(torch.randn(LAYERS, DIM, 3, generator=torch.Generator().manual_seed(8 + turned))).Q
    return CkaBasis(vectors.contiguous(), torch.ones(LAYERS), torch.zeros(LAYERS))


def pushed(rank, ranks, early, **options):
    """Rows dealt out in turn by sequences of 5; the last rank of three has none."""
    x, y = features()
    ids = torch.arange(ROWS) // 5
    dealing = 2 if ranks == 3 else ranks
    own = ids % dealing == rank
    state = CkaState(LAYERS, DIM, **options)
    parts = own.nonzero()[:, 0].split(17) or [torch.zeros(0, dtype=torch.int64)]
    for number, rows in enumerate(parts):
        state.push(x[:, rows], y[:, rows], sequences=ids[rows] if options.get("groups") else None)
        if early and number == 0:
            state.sync_shift()
    return state


def work(rank, ranks, store, results):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        told = {}
        for early in (False, True):
            state = pushed(rank, ranks, early)
            before = state.gram.clone()
            total = state.all_reduce()
            told[f"value, early {early}"] = total.value()
            told[f"kept, early {early}"] = torch.tensor(torch.equal(before, state.gram))
            told[f"again, early {early}"] = state.all_reduce().value()
            total.push(*(side[:, :1] for side in features()))
            told[f"rows, early {early}"] = total.rows
        state = pushed(rank, ranks, False)
        state.sync()
        told["synced"] = state.compute()
        for again in (state.sync, lambda: state.update(*features()), lambda: state.merge_state(total)):
            with pytest.raises(RuntimeError, match="holds the rows of all ranks since"):
                again()
        state.reset()
        state.update(*features())
        told["reset"] = state.compute()
        groups = pushed(rank, ranks, True, groups=3).all_reduce().result()
        told |= {"error": groups.standard_error, "sequences": groups.sequences}
        projected = pushed(rank, ranks, False, basis=basis()).all_reduce().result()
        told |= {"projected": projected.value, "variance": projected.variance_kept}
        try:
            CkaState(LAYERS, DIM, basis=basis(turned=rank == 0)).all_reduce()
        except ValueError as error:
            told["refused"] = str(error)
        torch.save(told, f"{results}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_gives_the_value_of_all_rows(ranks, tmp_path):
    spawn(work, (ranks, tmp_path / "store", tmp_path), ranks)
    x, y = features()
    alone = {name: pushed(0, 1, False, **kind) for name, kind in
             (("groups", {"groups": 3}), ("basis", {"basis": basis()}))}  # fmt: skip
    groups, projected = alone["groups"].result(), alone["basis"].result()
    assert (groups.standard_error > 0.01).all()
    first = torch.load(tmp_path / "0.pt", weights_only=True)
    for rank in range(ranks):
        told = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for early in (False, True):
            torch.testing.assert_close(told[f"value, early {early}"], linear_cka(x, y), rtol=0, atol=1e-6)
            assert torch.equal(told[f"again, early {early}"], told[f"value, early {early}"])
            assert told[f"kept, early {early}"] or early
            assert told[f"rows, early {early}"].tolist() == [ROWS + 1] * LAYERS
        for name in ("synced", "reset"):
            torch.testing.assert_close(told[name], linear_cka(x, y), rtol=0, atol=1e-6)
        torch.testing.assert_close(told["error"], groups.standard_error, rtol=1e-5, atol=0)
        assert told["sequences"] == groups.sequences == ROWS // 5
        torch.testing.assert_close(told["projected"], projected.value, rtol=0, atol=1e-6)
        torch.testing.assert_close(told["variance"], projected.variance_kept, rtol=1e-5, atol=0)
        assert ("the ranks have different ones" in told.get("refused", "")) == (
            ranks > 1
        )  # one has no other to differ from
        assert all(torch.equal(told[name], first[name]) for name in told if name != "refused" and "kept" not in name)
