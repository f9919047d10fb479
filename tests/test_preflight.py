"""What a run finds out before its first training step."""

import json

import helpers.tiny_texts as tiny
import pytest
import torch
import yaml
from helpers.tiny_models import one_thread  # noqa: F401

pytest.importorskip("jsonargparse")

from inflection_fast import cli
from inflection_fast.run import training


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tiny.bert(folder / "bert")
    tiny.write_csv(folder / "target.csv", tiny.reviews(80))
    tiny.write_csv(folder / "source.csv", tiny.reviews(60, seed=5))
    return folder


def settings(files, folder, model="bert", **changes):
    train = {"steps": 2, "batch_size": 8}
    tree = {
        "model": {"path": str(files / model), "max_length": 12},
        "target": {"path": str(files / "target.csv"), "probe": 4},
        "source": {"data": {"path": str(files / "source.csv"), "probe": 0}, "train": train},
        "output": str(folder / "run"),
        "measure": {"unfreeze": 1, "train": train, "monitor": {"every": 1}, "overhead_pairs": 0},
        "select": {"method": "top", "k": 1, "significance": None},
        "tune": {"train": train},
        "baselines": ["last", "random"],
    }
    for name, value in changes.items():
        *path, last = name.split("__")
        where = tree
        for key in path:
            where = where[key]
        where[last] = value
    (folder / "settings.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "settings.yaml")


@pytest.fixture
def untrained(monkeypatch):
    """Training is a failure of the test."""
    monkeypatch.setattr(training, "train", lambda *arguments, **options: pytest.fail("a training began"))


def refused(capsys, command, path, *more):
    assert cli.main([command, "--config", path, *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith("inflection-fast: ") and said.count("\n") == 1
    return said


def saved(folder, config):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def test_a_model_without_a_linear_layer_to_adapt_is_refused_before_it_is_measured(files, tmp_path, capsys, untrained):
    from transformers import SqueezeBertConfig

    config = SqueezeBertConfig(
        vocab_size=64,
        embedding_size=16,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        q_groups=1,
        k_groups=1,
        v_groups=1,
        post_attention_groups=1,
        intermediate_groups=1,
        output_groups=1,
    )
    saved(files / "squeezebert", config)
    capsys.readouterr()
    said = refused(capsys, "run", settings(files, tmp_path, "squeezebert"))
    assert "has no linear layer, so there is nothing to adapt" in said
    assert not (tmp_path / "run" / "source").exists()


OWN_ATTENTION = """
import torch
from torch import nn
from transformers import BertConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

class OwnConfig(BertConfig):
    model_type = "own"

class SelfAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        scores = (self.query(x) @ self.key(x).mT).exp()
        return scores @ self.value(x) / scores.sum(-1, keepdim=True)

class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = SelfAttention(width)
        self.output = nn.Linear(width, width)

    def forward(self, x):
        return x + self.output(self.attention(x))

class OwnForSequenceClassification(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "own"

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layer = nn.ModuleList(Layer(config.hidden_size) for _ in range(3))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **more):
        x = self.embeddings(input_ids)
        for layer in self.layer:
            x = layer(x)
        logits = self.classifier(x.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
"""


@pytest.fixture(scope="module")
def own_attention(files):
    """A model whose attention is written by hand and without a softmax, with its code."""
    folder = files / "own"
    folder.mkdir()
    (folder / "own.py").write_text(OWN_ATTENTION)
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnForSequenceClassification"}
    tree = tiny.bert_config(num_labels=2).to_dict() | {"model_type": "own", "auto_map": names}
    (folder / "config.json").write_text(json.dumps(tree))
    code = {}
    exec(OWN_ATTENTION, code)
    from safetensors.torch import save_model

    torch.manual_seed(0)
    model = code["OwnForSequenceClassification"](code["OwnConfig"](**tiny.bert_config(num_labels=2).to_dict()))
    save_model(model, folder / "model.safetensors", metadata={"format": "pt"})
    tiny.tokenizer().save_pretrained(folder)
    return "own"


def test_attention_that_cannot_be_seen_is_said(files, own_attention, tmp_path, capsys, monkeypatch):
    class Began(Exception):
        pass

    def began(*arguments, **options):
        raise Began

    monkeypatch.setattr(training, "train", began)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    lora = {"target_modules": ["query"]}
    path = settings(files, tmp_path, own_attention, model__trust_remote_code=True, tune__lora=lora)
    with pytest.raises(Began):
        cli.main(["run", "--config", path])
    assert "its blocks have no softmax attention" in capsys.readouterr().out


def test_modules_to_inject_are_known_before_anything_trains(files, tmp_path, capsys, untrained):
    path = settings(files, tmp_path, tune__lora={"target_modules": ["q_proj"]})
    said = refused(capsys, "run", path)
    assert "tune.lora: target_modules: ['q_proj'] match" in said and "attention.self.query" in said
    said = refused(capsys, "run", settings(files, tmp_path, tune__lora={"modules_to_save": ["head"]}))
    assert "tune.lora: modules_to_save" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure__head": ["scorer"]}, "measure.head: the model has no parameters under 'scorer'"),
        ({"target__text": "body"}, "there is no column 'body'"),
        ({"source__data__label": "stars"}, "there is no column 'stars'"),
        ({"source__data__deduplicate": False, "target__label": "stars"}, "there is no column 'stars'"),
    ],
)
def test_what_any_stage_needs_is_known_before_the_first(files, tmp_path, capsys, untrained, changes, message):
    tree = (
        {"source": {"data": {"path": str(files / "source.csv"), "probe": 0}}}
        if "source__data__label" in changes
        else {}
    )
    assert message in refused(capsys, "run", settings(files, tmp_path, **tree, **changes))


def test_a_target_with_more_labels_than_the_source_is_checked_with_its_own(files, tmp_path, monkeypatch):
    class Began(Exception):
        pass

    def began(*arguments, **options):
        raise Began

    monkeypatch.setattr(training, "train", began)
    with pytest.raises(Began):
        cli.main(["run", "--config", settings(files, tmp_path, target__label="film")])


def test_a_number_format_that_the_machine_lacks_is_known_before_the_first_step(files, tmp_path, capsys, untrained):
    def no_bf16(config):
        if config.precision == "bfloat16":
            raise ValueError("Your setup does not support bf16")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "check_arguments", no_bf16)
        path = settings(files, tmp_path, tune__train={"steps": 2, "precision": "bfloat16"})
        assert "tune.train: Your setup does not support bf16" in refused(capsys, "run", path)


@pytest.mark.parametrize(("positions", "longest"), [(18, 16), (20, 18)])
def test_a_table_of_positions_with_a_padding_index_is_two_shorter(
    files, tmp_path, capsys, untrained, positions, longest
):
    from transformers import RobertaConfig

    config = RobertaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
        pad_token_id=1,
        type_vocab_size=2,
    )
    saved(files / f"roberta{positions}", config)
    capsys.readouterr()
    model = str(files / f"roberta{positions}")
    said = refused(capsys, "run", settings(files, tmp_path, f"roberta{positions}", model__max_length=longest + 1))
    assert f"model.max_length is {longest + 1}, and " in said and f"takes at most {longest} tokens" in said
    from inflection_fast.run.config import ModelConfig
    from inflection_fast.run.models import check_model

    assert check_model(ModelConfig(model, max_length=longest), "sequence-classification", None) == 3


def test_modules_to_inject_may_change_when_all_before_is_measured(files, tmp_path, capsys):
    path = settings(files, tmp_path, source=None, tune__lora={"target_modules": ["q_proj"]})
    assert cli.main(["measure", "--config", path]) == 0
    measured = (tmp_path / "run" / "measure" / "stage.json").stat().st_mtime_ns
    assert "target_modules" in refused(capsys, "run", path)
    path = settings(files, tmp_path, source=None, tune__lora={"target_modules": ["query"]})
    assert cli.main(["run", "--config", path]) == 0
    assert (tmp_path / "run" / "measure" / "stage.json").stat().st_mtime_ns == measured
    # From here on the injected stages rest on them.
    said = refused(capsys, "run", settings(files, tmp_path, source=None, tune__lora={"target_modules": ["key"]}))
    assert "tune.lora.target_modules" in said and str(tmp_path / "run" / "tune") in said


def test_a_plan_is_tuned_and_compared_in_a_folder_without_a_timeline(files, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    measured = settings(files, tmp_path / "a", source=None)
    assert cli.main(["measure", "--config", measured]) == 0
    assert cli.main(["plan", str(tmp_path / "a" / "run")]) == 0
    other, plan = settings(files, tmp_path / "b", source=None), str(tmp_path / "a" / "run" / "plan.json")
    assert cli.main(["tune", "--config", other, "--plan", plan]) == 0
    stages = {path.parent.name for path in (tmp_path / "b" / "run").glob("*/stage.json")}
    assert "tune" in stages and stages & {"baseline-last", "baseline-random"}
