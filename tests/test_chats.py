"""Conversations are trained on as the template of the tokenizer writes them."""

import json

import helpers.tiny_texts as tiny
import pytest
from helpers.small_runs import own_cache  # noqa: F401

pytest.importorskip("datasets")

from inflection_fast import cli
from inflection_fast.run.batches import Batches
from inflection_fast.run.chats import template_of
from inflection_fast.run.config import DataConfig, ModelConfig, RunConfig
from inflection_fast.run.data import read
from inflection_fast.run.errors import UserError
from inflection_fast.run.stages import Stages

TEMPLATE = (
    "{{ '[CLS]' }}{% for message in messages %}"
    "{% if message['role'] not in ('user', 'assistant') %}{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}{{ ' good ' if message['role'] == 'user' else ' bad ' }}{{ message['content'] }}{{ '[SEP]' }}"
    "{% endfor %}"
)


@pytest.fixture
def tokenizer():
    made = tiny.tokenizer()
    made.chat_template = TEMPLATE
    return made


def chats(count=40):
    roles = ("user", "assistant")
    for i in range(count):
        words = [f"word{i} word{(i * j) % 7}" for j in range(1, 4)]
        yield [{"role": roles[j % 2], "content": said} for j, said in enumerate(words)]


def written(path, conversations, **more):
    path.write_text("\n".join(json.dumps({"messages": one, **more}) for one in conversations))
    return path


def config(path, **changes):
    return DataConfig(str(path), **{"messages": "messages", "probe": 5, **changes})


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_pieces_are_the_tokens_that_the_template_gives(tmp_path, tokenizer, suffix):
    conversations = list(chats())
    path = written(tmp_path / "chats.jsonl", [*conversations, conversations[3], [], [{"role": "user", "content": ""}]])
    if suffix == "parquet":
        import pandas

        path = tmp_path / "chats.parquet"
        pandas.DataFrame({"messages": [*conversations, conversations[3], [], None]}).to_parquet(path)
    data = read(config(path), "causal-lm", template_of(tokenizer, "m"))
    assert data.dropped == {"empty": 2, "duplicates": 1}
    pieces = [piece for part in (data.train, data.test) for piece in Batches(tokenizer, "causal-lm", 99).items(part)]
    expected = [tokenizer.apply_chat_template(one, return_dict=False) for one in conversations]
    found = [piece.tolist() for piece in pieces]
    assert len(found) == 35 and all(piece in expected for piece in found)
    assert all(piece.count(2) == 1 and piece.count(3) == 3 for piece in found)  # no special tokens but the template's


def test_a_run_trains_on_chats(tmp_path, tokenizer):
    model = tiny.llama(tmp_path / "llama")
    data = config(written(tmp_path / "chats.jsonl", chats()))
    run = RunConfig(ModelConfig(str(model), max_length=16), data, str(tmp_path / "run"), "causal-lm")
    with pytest.raises(UserError, match=r"its tokenizer has no chat template, which data\.messages needs"):
        _ = Stages(run, say=print, quiet=True).target
    tokenizer.save_pretrained(model)
    stages = Stages(run, say=lambda line: None, quiet=True)
    batch = stages.few(2)
    assert batch["input_ids"][0, 0] == 2 and (batch["labels"] >= 0).sum() == batch["attention_mask"].sum()


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ("hello", "line 41: column 'messages': expected a list of messages, got str"),
        (["hello"], "line 41: .*expected messages with role and content, got str"),
        ([{"from": "human", "value": "hello"}], "line 41: .*name them role and content"),
        ([{"content": "hello"}], "line 41: .*a message has no role"),
        ([{"role": "user", "content": [{"type": "image"}]}], "line 41: .*the content of a message is list, not text"),
        ([{"role": "judge", "content": "hello"}], "line 41: the model's chat template refuses it: unknown role judge"),
    ],
)
def test_a_conversation_that_cannot_be_read_is_named_by_its_line(tmp_path, tokenizer, conversation, message):
    path = written(tmp_path / "chats.jsonl", [*chats(), conversation])
    with pytest.raises(UserError, match=message):
        read(config(path), "causal-lm", template_of(tokenizer, "m"))


def test_settings_that_do_not_go_with_chats_are_refused(tmp_path):
    path = written(tmp_path / "chats.jsonl", chats())
    with pytest.raises(UserError, match=r"data\.messages is for causal-lm"):
        read(config(path), "sequence-classification")
    with pytest.raises(ValueError, match=r"messages and data\.text_pair"):
        config(path, text_pair="b")


def test_a_first_settings_file_names_the_conversations(tmp_path, capsys):
    import yaml

    path, out = written(tmp_path / "chats.jsonl", chats(), id=1), tmp_path / "run.yaml"
    words = ["init", "--model", "m", "--data", str(path), "--task", "causal-lm", "--out", str(out)]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert yaml.safe_load(out.read_text())["target"] == {"path": str(path), "messages": "messages"}
