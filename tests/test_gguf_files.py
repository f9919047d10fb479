"""A GGUF file that Transformers reads sparingly gives the same model."""

import helpers.tiny_texts as tiny
import pytest
import torch

from inflection_fast.checkpoints.gguf_files import low_memory_gguf
from inflection_fast.quantities import spectrum

gguf = pytest.importorskip("gguf")


def test_a_file_is_read_once_and_its_weights_are_the_same(tmp_path, monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tiny.gguf(tmp_path)
    named = {"gguf_file": "tiny.gguf"}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, **named).state_dict()
    made = []

    class Counted(gguf.GGUFReader):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    monkeypatch.setattr(spectrum, "GGUF_ROWS", 10)  # no tensor has a multiple of it
    at_once = gguf.dequantize
    with low_memory_gguf():
        AutoTokenizer.from_pretrained(tmp_path, **named)
        config = AutoConfig.from_pretrained(tmp_path, **named)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, **named)
    assert len(made) == 1
    sizes = [tensor.n_elements for tensor in made[0].tensors]
    assert sizes == sorted(sizes, reverse=True)
    found = model.state_dict()
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
    assert gguf.GGUFReader is Counted and gguf.dequantize is at_once


def test_the_library_is_as_before_after_a_failure(tmp_path):
    before = gguf.GGUFReader, gguf.dequantize
    with pytest.raises(FileNotFoundError), low_memory_gguf():
        gguf.GGUFReader(tmp_path / "absent.gguf")
    assert (gguf.GGUFReader, gguf.dequantize) == before
