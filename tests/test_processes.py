"""A run of two processes gives what one gives; what the first process refuses ends them all in one sentence."""

import dataclasses
import json
import os
import time
from pathlib import Path

import helpers.tiny_texts as tiny
import numpy as np
import pytest
import torch
import yaml
from helpers.programs import spawn
from helpers.rank_processes import finish, start_ranks

pytest.importorskip("datasets")

from safetensors.torch import load_file

from inflection_fast.decide import Plan, SelectConfig
from inflection_fast.measure import MonitorConfig
from inflection_fast.run import processes
from inflection_fast.run.config import (
    DataConfig,
    MeasureConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    TuneConfig,
    to_dict,
)
from inflection_fast.run.errors import UserError
from inflection_fast.run.stages import Stages
from inflection_fast.timeline import Timeline

TRAIN = TrainConfig(steps=4, batch_size=8, learning_rate=3e-3, checkpoint_every=2, log_every=1)
MONITOR = MonitorConfig(every=2, rows=None, frozen_share=1.0, probe_share=None)  # nothing depends on draws or the clock
STAGES = {"classifier": ("source", "measure", "tune", "baseline-last"), "language": ("measure", "tune")}


def config_of(folder, output, **changes):
    settings = {
        "model": ModelConfig(str(folder / "bert"), max_length=12),
        "target": DataConfig(str(folder / "target.csv"), probe=8, group="film"),
        "output": str(folder / output),
        "source": SourceConfig(DataConfig(str(folder / "source.csv"), probe=0), TRAIN),
        "measure": MeasureConfig(unfreeze=1, train=TRAIN, monitor=MONITOR, overhead_pairs=3),
        "select": SelectConfig(method="top", k=2, significance=None),
        "tune": TuneConfig(train=dataclasses.replace(TRAIN, batch_size=4, accumulate=2)),
        "baselines": ("last",),
    }
    return RunConfig(**{**settings, **changes})


def run_on_two(folder, **configs):
    """What two processes have printed that do these runs one after another; the names are those of settings' files."""
    paths = [folder / f"{name}.yaml" for name in configs]
    for path, config in zip(paths, configs.values(), strict=True):
        path.write_text(yaml.safe_dump(to_dict(config)))
    words = [Path(__file__).with_name("run_scenarios.py"), *paths]
    ranks = start_ranks(words, folder, 2, HF_DATASETS_CACHE=str(folder / "cache"))
    finish(ranks)
    printed = "".join((folder / f"log{rank}").read_text() for rank in range(2))
    assert [process.exitcode for process in ranks] == [0, 0], printed[-3000:]
    return printed


def language_of(folder, output, **changes):
    """A decoder whose output layer shares the weights of its embeddings, without a source."""
    model = ModelConfig(str(folder / "llama"), max_length=12)
    settings = {"model": model, "task": "causal-lm", "source": None, "baselines": ()}
    return config_of(folder, output, **settings, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import BertModel, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # each process draws its own
    BertModel(tiny.bert_config(**still)).save_pretrained(folder / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    llama = LlamaConfig(vocab_size=64, pad_token_id=0, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    for name in ("bert", "llama"):
        tiny.tokenizer().save_pretrained(folder / name)
    tiny.write_csv(folder / "target.csv", tiny.reviews(150))
    tiny.write_csv(folder / "source.csv", tiny.reviews(100, seed=5))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """By name, the folders of a run of one process and of a run of two, finished; and what the two have said.

    The classifier is trained with DDP. The language model is divided (FSDP2), and its run is stopped and given again.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for config in (config_of(folder, "classifier-one"), language_of(folder, "language-one")):
        stages = Stages(config, say=lambda line: None, quiet=True)
        stages.source(), stages.measure(), stages.plan(), stages.tune()
        for name in config.baselines:
            stages.baseline(name)
    torch.set_num_threads(threads)
    divided = language_of(folder, "language-two", parallel="fsdp")
    printed = run_on_two(folder, **{"plain": config_of(folder, "classifier-two"), "stopped-divided": divided})
    return {name: (folder / f"{name}-one", folder / f"{name}-two") for name in STAGES}, printed


@pytest.fixture(params=list(STAGES))
def both(request, runs):
    """The folders of one of these runs, and its stages."""
    return *runs[0][request.param], STAGES[request.param]


def test_every_stage_finds_the_same(both):
    one, two, stages = both
    for stage in stages:
        a, b = (json.loads((path / stage / "stage.json").read_text()) for path in (one, two))
        assert a["data"] == b["data"] and a["steps"] == b["steps"] == 4 and a["layers"] == b["layers"], stage
        for name in ("trainable_parameters", "total_parameters"):
            assert a[name] == b[name], stage
        assert a["metrics"]["n"] == b["metrics"]["n"] and a["metrics"].get("right") == b["metrics"].get("right"), stage
        assert b["metrics"]["loss"] == pytest.approx(a["metrics"]["loss"], rel=1e-5), stage
        losses = [
            [row["loss"] for row in json.loads((path / stage / "log.json").read_text()) if "loss" in row]
            for path in (one, two)
        ]
        np.testing.assert_allclose(*losses, rtol=1e-4, err_msg=stage)
    assert Plan.load(one / "plan.json").layers == Plan.load(two / "plan.json").layers


def test_what_is_measured_is_that_of_the_whole_batch(both):
    one, two = (Timeline.load(path / "measure") for path in both[:2])
    assert one.steps.tolist() == two.steps.tolist() == [0, 2]
    for name in ("entropy", "activation_grad", "parameter_grad", "loss"):
        np.testing.assert_allclose(getattr(two, name), getattr(one, name), rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(two.delta_cka, one.delta_cka, atol=1e-5)


def test_the_models_are_the_same(both):
    for name in ("measure/model/model.safetensors", "tune/adapter/adapter_model.safetensors"):
        one, two = (load_file(path / name) for path in both[:2])
        assert one.keys() == two.keys()
        for key in one:
            np.testing.assert_allclose(two[key], one[key], atol=1e-4, err_msg=f"{name}: {key}")


def test_the_first_process_alone_writes_and_speaks(runs):
    folders, printed = runs
    for _, two in folders.values():
        assert (two / "report" / "index.html").is_file()
        assert not list(two.glob("*/checkpoints")) and not list(two.rglob("*.partial"))
    assert printed.count("measure: begins") == 2 and printed.count("report: ") == 2
    assert printed.count("measure: finished already") == 1 and printed.count("interrupted;") == 2
    assert printed.count("measure: steps will not be timed") == 1


def test_the_adapter_of_a_divided_model_is_whole(runs):
    one, two = runs[0]["language"]
    assert Plan.from_pretrained(two / "tune" / "adapter").layers == Plan.load(one / "plan.json").layers
    assert json.loads((two / "measure" / "stage.json").read_text()).get("overhead") is None


def take_turns(rank, store, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    told = folder / "told"

    def write():
        time.sleep(0.5 if rank == 0 else 0)  # so that the other would be first if it did not wait
        told.write_text(told.read_text() + str(rank) if told.exists() else str(rank))
        return rank, processes.alone(lambda: rank)  # within a turn nobody else is waited for

    assert processes.in_turn(write) == (rank, rank)
    processes.wait()
    assert told.read_text() == "01" and processes.alone(lambda: rank) == 0

    def refuse():
        raise UserError("no room")

    with pytest.raises(UserError) as caught:
        processes.alone(refuse)
    assert isinstance(caught.value, processes.FirstFailed) == (rank == 1)
    assert processes.alone(lambda: "on") == "on"
    (folder / str(rank)).touch()


def test_the_first_process_works_before_the_others_and_its_errors_are_theirs(tmp_path):
    spawn(take_turns, (tmp_path / "store", tmp_path), 2)
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()


def test_what_the_first_process_has_said_is_not_said_again(monkeypatch, capsys):
    from inflection_fast import cli

    def told(argv):
        raise processes.FirstFailed("the first process has failed")

    monkeypatch.setitem(cli._DISPATCH, "run", told)
    assert cli.main(["run"]) == cli.USER_ERROR and capsys.readouterr().err == ""


def test_models_divided_by_deepspeed_are_refused(folder, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"DeepSpeed shards .*: launch the run with DDP or FSDP"):
        Stages(config_of(folder, "divided"), say=print, quiet=True)


@pytest.mark.parametrize("launched", [True, False])
def test_one_process_divides_nothing(folder, monkeypatch, launched):
    """However it was asked: by the settings, or by `accelerate launch --use_fsdp`."""
    if launched:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(UserError, match=r"parallel is fsdp, .* and there is one: start several with torchrun"):
        Stages(config_of(folder, "divided", parallel="ddp" if launched else "fsdp"), say=print, quiet=True)


def test_batches_that_cannot_be_divided_are_refused(folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"source.train.batch_size is 8, which 3 processes .* give a multiple of 3"):
        Stages(config_of(folder, "odd"), say=print, quiet=True)


@pytest.mark.parametrize("command", ["plan", "report", "scan", "init"])
def test_commands_of_one_process_say_so(command, monkeypatch, capsys):
    from inflection_fast import cli

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main([command, "x"]) == cli.USER_ERROR
    assert f"{command} runs in one process: start it without torchrun" in capsys.readouterr().err
