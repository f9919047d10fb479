import pytest
import tiny_texts as tiny

pytest.importorskip("datasets")

from inflection_fast.blocks import find_blocks
from inflection_fast.run.config import ModelConfig
from inflection_fast.run.errors import UserError
from inflection_fast.run.models import check_model, load_model, load_tokenizer, unfreeze

CLASSES = "sequence-classification"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.bert(folder / "bert")
    tiny.llama(folder / "llama")
    return folder


@pytest.mark.parametrize(
    ("top", "head", "blocks", "outside"),
    [
        (0, None, set(), {"classifier", "bert.pooler"}),
        (2, None, {1, 2}, {"classifier", "bert.pooler"}),
        (1, ("classifier",), {2}, {"classifier"}),
        (None, None, {0, 1, 2}, {"classifier", "bert.pooler", "bert.embeddings"}),
    ],
)
def test_the_top_blocks_and_the_head_train(files, top, head, blocks, outside):
    config = ModelConfig(str(files / "bert"))
    model = load_model(config, "sequence-classification", load_tokenizer(config), labels=("a", "b"))
    unfreeze(model, find_blocks(model), top, head)
    for name, parameter in model.named_parameters():
        layer = name.split("layer.")[1].split(".")[0] if "layer." in name else None
        expected = int(layer) in blocks if layer else any(name.startswith(prefix + ".") for prefix in outside)
        assert parameter.requires_grad == expected, name


def test_a_head_shared_with_the_embeddings_stays_frozen(files):
    config = ModelConfig(str(files / "llama"))
    model = load_model(config, "causal-lm", load_tokenizer(config))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.lm_head.weight = model.model.embed_tokens.weight
    names = unfreeze(model, find_blocks(model), 1, None)
    assert not model.lm_head.weight.requires_grad and "model.norm.weight" in names


def test_models_that_do_not_fit_are_refused(files, tmp_path):
    from transformers import ResNetConfig, ResNetModel

    with pytest.raises(UserError, match="at most 64 tokens"):
        check_model(ModelConfig(str(files / "bert"), max_length=65), CLASSES, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        check_model(ModelConfig(str(tmp_path / "empty")), CLASSES, None)
    ResNetModel(ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8)).save_pretrained(tmp_path / "resnet")
    with pytest.raises(UserError, match="resnet"):
        check_model(ModelConfig(str(tmp_path / "resnet")), CLASSES, None)
