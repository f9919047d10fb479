"""A whole study: every cell computed once, alike when computed twice, and nothing lost when it is killed."""

import json
import os
import signal
import time
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import programs
from helpers.tiny_study import added_arms, tiny_study

from inflection_fast.run.errors import UserError
from inflection_fast.study.cells import cells_of
from inflection_fast.study.config import WaveConfig, changed, plain
from inflection_fast.study.estimate import estimate
from inflection_fast.study.gradients import gradients
from inflection_fast.study.publish import publish, reuse
from inflection_fast.study.report import write
from inflection_fast.study.runner import progress_of, retry, work_through
from inflection_fast.study.store import Busy, Store

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished study: its settings and its cells by name."""
    config = tiny_study(tmp_path_factory.mktemp("study"))
    work_through(config)
    return config, read_cells(config)


def read_cells(config, only="*"):
    found = {}
    for cell in (cell for cell in cells_of(config) if fnmatch(cell.name, only)):
        found[cell.name] = json.loads((config.folder / "cells" / f"{cell.name}.json").read_text())
    return found


def outcome(cell):
    """What must be the same when a cell is computed again."""
    metrics = cell["train_info"]["metrics"][0]
    return metrics, cell["run_info"]["peft_config"], cell["train_info"]["num_trainable_params"]


def test_every_cell_is_computed_without_an_error(done):
    config, cells = done
    assert len(cells) == 1 * 2 * (3 + 2) * 2
    assert {cell["run_info"]["error_msg"] for cell in cells.values()} == {""}
    for cell in cells.values():
        test = cell["train_info"]["metrics"][0]["test"]
        bits = bin(int(test["right"], 16)).count("1")
        assert test["n"] == config.target.test and test["correct"] == bits == round(test["accuracy"] * test["n"])


def test_a_cell_computed_again_is_right_about_the_same_texts(done, tmp_path):
    config, cells = done
    again = replace(config, output=str(tmp_path / "again"))
    work_through(again, only="one/over/*/1")
    for name in (cell.name for cell in cells_of(again, "one/over/*/1")):
        found = json.loads((again.folder / "cells" / f"{name}.json").read_text())
        assert outcome(found) == outcome(cells[name]), name


def test_lora_arms_spend_equal_parameters_and_everywhere_more(done):
    _, cells = done
    spent = {name: cell["train_info"]["num_adapter_params"] for name, cell in cells.items()}
    equal = {spent[name] for name in spent if "/greedy/" in name or "/random-" in name}
    assert len(equal) == 1
    # query and value of three blocks at rank 4, against a budget of 2 blocks at rank 3
    assert {n for name, n in spent.items() if "/all/" in name} == {3 * 2 * 4 * 32} and equal == {2 * 3 * 2 * 32}
    assert {n for name, n in spent.items() if "/head/" in name} == {0}


def test_random_blocks_differ_between_draws_and_places(done):
    _, cells = done
    drawn = {tuple(cell["run_info"]["peft_config"]["layers"]) for name, cell in cells.items() if "/random-" in name}
    assert len(drawn) > 1


def test_a_finished_study_trains_nothing(done, monkeypatch):
    config, _ = done
    monkeypatch.setattr("inflection_fast.study.work.train", None)
    work_through(config)


def test_the_reported_seeds_and_the_search_use_other_texts(done):
    from inflection_fast.study.texts import texts_of

    config, _ = done
    texts = texts_of(config, "one", Store.of(config))
    for seed in config.seeds:
        split = texts.split(seed)
        parts = [{tuple(row) for row in part.ids.tolist()} for part in (split.train, split.test, split.validation)]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    first, second = (texts.split(seed) for seed in (1, 2))
    assert (first.validation.ids == second.validation.ids).all()
    assert not (first.test.ids == second.test.ids).all()


def test_the_search_tries_every_rate_and_takes_the_lowest_loss(done):
    config, _ = done
    rates = json.loads((config.folder / "rates" / "greedy-under.json").read_text())
    assert [row["learning_rate"] for row in rates["tried"]] == list(config.rates["lora"])
    assert rates["learning_rate"] == min(rates["tried"], key=lambda row: row["loss"])["learning_rate"]


WORKER = """
import sys; from pathlib import Path
from helpers.tiny_study import tiny_study
from inflection_fast.study.runner import work_through
work_through(tiny_study(Path(sys.argv[1])), only=sys.argv[2])
"""


def test_a_killed_study_goes_on_without_loss_and_two_workers_share_it(done, tmp_path):
    only = "one/under/*/1"
    cells = {name: cell for name, cell in done[1].items() if fnmatch(name, only)}
    tiny_study(tmp_path)  # the data
    words = ["-c", WORKER, tmp_path, only]
    first = programs.start(words, tmp_path / "first")
    mine = tiny_study(tmp_path)
    deadline = time.monotonic() + 120
    while len(list((mine.folder / "cells").rglob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.join()
    before = {path: path.read_bytes() for path in (mine.folder / "cells").rglob("*.json")}
    assert 2 <= len(before) < len(cells)
    second = programs.start(words, tmp_path / "second")
    work_through(mine, only=only)
    second.join(120)
    assert second.exitcode == 0, (tmp_path / "second").read_text()
    assert all(path.read_bytes() == content for path, content in before.items())
    after = read_cells(mine, only)
    assert {name: outcome(cell) for name, cell in after.items()} == {
        name: outcome(cell) for name, cell in cells.items()
    }


def test_work_that_another_process_holds_is_busy_and_free_again_when_it_lets_go(tmp_path):
    store, other = Store(tmp_path), Store(tmp_path)
    with store.claim("cells/a.json"), pytest.raises(Busy):
        other.get("cells/a.json", lambda: 1)
    assert other.get("cells/a.json", lambda: 1) == 1


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_an_arm_that_cannot_be_had_is_recorded_and_the_others_are_computed(tmp_path):
    config = tiny_study(tmp_path, blocks=4, rank=1)
    work_through(config, only="one/under/*/1")
    progress = progress_of(config, Store.of(config), "one/under/*/1")
    assert progress.left == 0 and progress.failed == 2
    cell = json.loads((config.folder / "cells/one/under/random-0/1.json").read_text())
    assert "4 blocks were asked for, the model has 3" in cell["run_info"]["error_msg"]
    assert retry(config, Store.of(config), "one/under/*/1") == 2


def test_an_arm_that_breaks_while_rates_are_searched_stops_no_other_cell(tmp_path):
    class Broken:
        draws = False

        def choose(self, seen):
            raise RuntimeError("shapes do not fit")

    config = tiny_study(tmp_path, waves=(WaveConfig(("broken", "head"), seeds=(1,)),))
    with added_arms(broken=Broken):
        work_through(config, only="one/under/*")
    cell = Store.of(config).find("cells/one/under/broken/1.json")
    assert (
        cell["run_info"]["error_msg"] == "RuntimeError: shapes do not fit"
        and "choose" in cell["train_info"]["traceback"]
    )
    assert not Store.of(config).find("cells/one/under/head/1.json")["run_info"]["error_msg"]


def test_another_study_s_folder_is_refused_and_more_seeds_are_not(done):
    config, _ = done
    Store.of(replace(config, seeds=(1, 2, 3)))
    Store.of(config)
    with pytest.raises(UserError, match="other settings: rank was 3 and is 5"):
        Store.of(replace(config, rank=5))


def test_a_folder_of_an_earlier_version_lacks_settings_and_goes_on(done):
    config, _ = done
    before = plain(config)
    del before["transfers"]["one"]["held_out"]
    assert changed(before, plain(config)) == []
    held_out = {"one": replace(config.transfers["one"], held_out=True)}
    tuned = replace(config.tuning, cells=("two/under", "two/over"))
    after = replace(config, transfers=held_out | {"two": config.transfers["one"]}, tuning=tuned)
    assert "transfers.one.held_out was False and is True" in changed(before, plain(after))
    assert {cell.transfer for cell in cells_of(after)} == {"two"}


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty and holds no study"):
        Store.of(tiny_study(tmp_path, output=str(tmp_path)))


def test_an_unknown_arm_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no arm 'gready'"):
        cells_of(tiny_study(tmp_path, waves=(WaveConfig(("gready",)),)))


def test_a_disk_that_fills_stops_the_study_and_loses_nothing(tmp_path, monkeypatch):
    config = tiny_study(tmp_path)
    from inflection_fast.study import work

    real, full = work.write_json, {"is": False}

    def refusing(path, content):
        if full["is"] and path.parent.name == "head":
            raise OSError(28, "No space left on device", str(path))
        real(path, content)

    monkeypatch.setattr(work, "write_json", refusing)
    full["is"] = True
    with pytest.raises(OSError, match="No space left"):
        work_through(config, only="one/under/head/1")
    assert not list((config.folder / "cells").rglob("*.json"))
    full["is"] = False
    work_through(config, only="one/under/head/1")
    assert progress_of(config, Store.of(config), "one/under/head/1").failed == 0


def test_a_cell_that_killed_three_workers_is_given_up(tmp_path):
    config = tiny_study(tmp_path)
    store = Store.of(config)
    begun = store.path("claims/one__under__head__1.begun.json")
    begun.parent.mkdir(parents=True)
    begun.write_text('{"times": 3}')
    work_through(config, only="one/under/head/1")
    assert "3 workers died" in store.find("cells/one/under/head/1.json")["run_info"]["error_msg"]


# ---- processes -------------------------------------------------------------------------------------------------------


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the children of a process from /proc")
def test_the_command_restarts_a_worker_that_dies_and_its_workers_end_with_it(tmp_path):
    config = tiny_study(tmp_path)
    settings = tmp_path / "study.yaml"
    settings.write_text(yaml.safe_dump(plain(config)))
    words = ["-m", "inflection_fast", "study", "--config", settings, "--only", "one/under/head/1"]

    def children(process):
        path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        found = [int(pid) for pid in path.read_text().split()] if path.is_file() else []
        return [pid for pid in found if b"spawn_main" in command_line(pid)]

    def command_line(pid):
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):  # it has ended since it was listed
            return b""

    def until(condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    first = programs.start(words, tmp_path / "first")
    until(lambda: children(first))
    worker = children(first)[0]
    os.kill(worker, signal.SIGKILL)
    until(lambda: [pid for pid in children(first) if pid != worker])
    worker = next(pid for pid in children(first) if pid != worker)
    first.kill()
    first.join()
    until(lambda: not alive(worker))
    done = programs.run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert progress_of(config, Store.of(config), "one/under/head/1").left == 0


def test_the_plan_names_every_cell_and_a_time(tmp_path):
    config = tiny_study(tmp_path)
    lines = list(estimate(config, None, jobs=2))
    assert [cell.name for cell in cells_of(config)] == lines[:20]
    assert "20 cells, 30 trainings of the search" in lines[20] and "2 sources" in lines[20]
    assert "hours with 2 workers" in lines[-1]


def test_published_cells_and_their_report_need_the_files_alone(done, tmp_path):
    config, cells = done
    assert publish(config.folder, tmp_path) == len(cells)
    again = {path.name for path in tmp_path.iterdir()}
    assert again == {"cells", "rates.json", "sources.json", "probes.json", "choices.json"}
    probes = json.loads((tmp_path / "probes.json").read_text())
    assert set(probes) == {"one-under", "one-over"}
    for one in probes.values():  # a probe on each of the model's blocks, which see words that tell the label
        assert one["n"] == config.target.validation and len(one["accuracy"]) == 3
        assert all(0.5 < share <= 1 for share in one["accuracy"]), one
    choices = json.loads((tmp_path / "choices.json").read_text())
    measured = {f"one-{regime}-{seed}" for regime in ("under", "over") for seed in (0, 1, 2)}
    assert set(choices) == measured
    assert all(len(layers) == config.blocks for layers in choices["one-over-1"]["top"].values())
    page = write(tmp_path, tmp_path / "page.md").read_text()
    assert "20 cells are there" in page and "`greedy`" in page
    with pytest.raises(UserError, match="holds no study"):
        publish(tmp_path, tmp_path / "elsewhere")


def test_published_cells_are_not_computed_again_in_another_folder(done, tmp_path, monkeypatch):
    first, cells = done
    publish(first.folder, tmp_path / "published")
    config = replace(first, output=str(tmp_path / "study"))
    store = Store.of(config)
    taken = [reuse(tmp_path / "published", config, store) for _ in range(2)]
    assert taken == [len(cells), 0]
    assert read_cells(config) == cells
    for missing in ("greedy", "random-0"):
        store.path(f"cells/one/under/{missing}/1.json").unlink()
    work_through(config, only="one/under/*")
    assert not list(store.folder.glob("tuning/**/*.json")), "a published learning rate was searched again"
    again = read_cells(config)
    assert [outcome(again[name]) for name in cells] == [outcome(cell) for cell in cells.values()]

    publish(store.folder, tmp_path / "published")
    assert set(json.loads((tmp_path / "published/sources.json").read_text())) == {"one-over", "one-under"}

    other = replace(config, output=str(tmp_path / "other"), train=replace(config.train, steps=config.train.steps + 1))
    with pytest.raises(UserError, match=r"was trained with steps \d+, this study says"):
        reuse(tmp_path / "published", other, Store.of(other))
    with pytest.raises(UserError, match="holds no published cells"):
        reuse(tmp_path / "nowhere", config, store)


def test_gradients_are_measured_all_along(tmp_path):
    config = tiny_study(tmp_path, gradients=("one/under/greedy", "one/under/head"))
    work_through(config, only="no cell")
    from inflection_fast.study.work import Work

    work = Work(config, Store.of(config))
    for arm in ("greedy", "head"):
        found = gradients(work, "one", "under", arm, f"gradients/one-under-{arm}.json")
        grads = np.array(found["activation_grad"], float)
        assert grads.shape == (len(found["steps"]), 3) and (grads > 0).all()
        assert len(found["probes_before"]) == len(found["probes_after"]) == 3
    # The head alone changes no feature.
    assert np.abs(found["delta_cka"][-1]).max() < 1e-6 and found["probes_before"] == found["probes_after"]


@pytest.mark.parametrize("path", ["examples/study_bert.yaml", "benchmarks/study/minilm.yaml"])
def test_published_settings_are_settings(path, monkeypatch):
    from inflection_fast.study import command

    seen = []
    monkeypatch.setattr(command, "_plan", lambda config, *rest: seen.append(config) or 0)
    assert command.study(["--config", str(ROOT / path), "--plan-only"]) == 0
    cells = cells_of(seen[0])
    assert len(cells) > 100 and all(len(seen[0].rates[kind]) >= 3 for kind in seen[0].rates)
    leaking = {cell.transfer for cell in cells if seen[0].transfers[cell.transfer].leaking}
    assert len(leaking) == 1
