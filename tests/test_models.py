import helpers.tiny_texts as tiny
import pytest

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


def test_a_gguf_file_is_read_into_plain_numbers_that_train(tmp_path):
    """What is loaded is what the blocks of the file stand for; it trains, is saved and is read again."""
    import numpy as np
    import torch

    pytest.importorskip("gguf")
    plain = tiny.gguf(tmp_path / "gguf")
    config = ModelConfig(str(tmp_path / "gguf"), gguf_file="tiny.gguf", max_length=12)
    assert check_model(config, "causal-lm", None) == 2
    model = load_model(config, "causal-lm", tiny.tokenizer())
    np.testing.assert_array_equal(model.model.embed_tokens.weight.detach(), plain["token_embd.weight"])
    np.testing.assert_array_equal(model.model.layers[1].mlp.down_proj.weight.detach(), plain["blk.1.ffn_down.weight"])
    ids = torch.arange(4, 12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not getattr(model, "is_quantized", False)  # or the Trainer refuses it
    model.save_pretrained(tmp_path / "saved")
    again = load_model(config, "causal-lm", tiny.tokenizer(), folder=tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    missing = ModelConfig(str(tmp_path / "gguf"), gguf_file="other.gguf")
    with pytest.raises(UserError, match=r"there is no other.gguf in .*; it has \['tiny.gguf'\]"):
        check_model(missing, "causal-lm", None)
