"""A study as tasks of a Ray cluster, here one of this machine alone."""

import pytest
from helpers.tiny_study import tiny_study

from inflection_fast.study import runner
from inflection_fast.study.runner import progress_of, run
from inflection_fast.study.store import Store

ray = pytest.importorskip("ray", reason="ray is an extra: pip install 'inflection_fast[ray]'")


def test_ray_computes_the_cells_and_the_cluster_is_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LOOK_S", 0.2)
    config = tiny_study(tmp_path)
    shown = []
    run(config, jobs=2, executor="ray", only="one/under/*/1", show=lambda: shown.append(1))
    progress = progress_of(config, Store.of(config), "one/under/*/1")
    assert progress.left == 0 and progress.failed == 0 and shown
    assert not ray.is_initialized()
