"""What a run of months keeps by key."""

import torch
from helpers.tiny_models import model_and_batch, one_thread  # noqa: F401

from inflection_fast.blocks import find_blocks
from inflection_fast.measure import parameters, schedule
from inflection_fast.measure.schedule import BoundedDict


def test_a_new_key_takes_the_place_of_the_oldest():
    table = BoundedDict(2)
    for key in "abac":
        table[key] = key.upper()
    assert table == {"b": "B", "c": "C"}  # to set a key again makes it no younger
    table["c"] = "again"
    assert len(table) == 2 and table["c"] == "again"


def test_layers_that_are_dropped_at_random_fill_no_memory(monkeypatch):
    for module in (schedule, parameters):
        monkeypatch.setattr(module, "MOST_LISTS", 4)
    model, _ = model_and_batch("bert")
    of_blocks = parameters.BlockParameters(find_blocks(model), torch.device("cpu"))
    indices = schedule.LayerIndices(torch.device("cpu"))
    for seen in range(8):
        layers = tuple(layer for layer in range(3) if seen >> layer & 1)
        assert indices[layers].tolist() == list(layers)
        assert of_blocks.marked(layers).tolist() == [float(layer in layers) for layer in range(3)]
    assert len(indices) == len(of_blocks._marks) == 4
