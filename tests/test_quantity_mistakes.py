"""Quantities that cannot be, that raise, or that wait: each is told in a sentence and harms no other."""

import logging
import threading

import numpy as np
import pytest
import torch
from helpers.probes import adapted
from helpers.quantity_of_a_user import OutputRms, column, train
from helpers.tiny_models import loss_of, model_and_batch, one_thread  # noqa: F401
from helpers.waits import Waits

from inflection_fast import Accumulator, Monitor, MonitorConfig, Quantity, quantities

# ---- mistakes --------------------------------------------------------------------------------------------------------


class Broken(OutputRms):
    """Raises where it is told to."""

    name, columns = "broken", {"broken": column()}

    def __init__(self, where, at=0):
        self.where, self.at, self.calls = where, at, 0

    def on_block(self, sums, block):
        self.calls += 1
        if self.where == "on_block" and self.calls > 3 * self.at:
            raise ArithmeticError("of one's own")
        if self.where == "shape":
            sums["squares"] = block.output.flatten()
        super().on_block(sums, block)

    def values(self, sums):
        if self.where == "values":
            raise ArithmeticError("of one's own")
        return {"broken": np.ones(7) if self.where == "columns" else np.ones(3)}


@pytest.mark.parametrize(
    "where, at, says",
    [
        ("on_block", 0, "for quantity 'broken' in on_block: ArithmeticError"),
        ("on_block", 1, "for quantity 'broken' in on_block: ArithmeticError"),
        ("shape", 0, "quantity 'broken': accumulator 'squares' is fixed memory, whose shape does not depend"),
        ("values", 0, "for quantity 'broken' in values: ArithmeticError"),
        ("columns", 0, r"column 'broken' has shape (7,) where its axes ('layer',) say (3,)"),
    ],
)
def test_one_that_raises_costs_its_own_columns_and_is_told_once(where, at, says, caplog):
    names = ("attention", "activation_grad", "parameter_grad")
    alone = train(*model_and_batch("bert"), MonitorConfig(every=1, quantities=names))
    with caplog.at_level(logging.WARNING):
        both = train(
            *model_and_batch("bert"), MonitorConfig(every=1, quantities=(*names, Broken(where, at))), alerts=None
        )
    assert np.isnan(both.broken).all(1).tolist() == [at < 1, True, True]
    for name in alone.columns:
        if name != "measure_ms":
            np.testing.assert_array_equal(getattr(both, name), getattr(alone, name), err_msg=name)
    assert len(caplog.messages) == 1 and says in caplog.messages[0]


def declared(**settings):
    return type("Declared", (OutputRms,), settings)()


@pytest.mark.parametrize(
    "one, says",
    [
        (declared(name="Own Name"), "name is 'Own Name'; expected a name like 'rank'"),
        (declared(name="attention"), "'attention' is given twice|distinct names"),
        (declared(columns={"entropy": column()}), "'attention' and 'output_rms' both name a column 'entropy'"),
        (declared(columns={"steps": column()}), "column 'steps' cannot be named so"),
        (declared(columns={"x": column(count="rows")}), "counts by 'rows', which is none of its accumulators"),
        (
            declared(accumulators={"x": Accumulator(("layer", "token")), "count": Accumulator()}),
            "accumulator 'x' has an axis 'token' of unknown size.*no shape may depend on the batch",
        ),
        (declared(columns={"x": column(axes=("layer", "token"))}), "column 'x' has an axis 'token' of unknown size"),
        (declared(every=0), "quantity 'output_rms': every is 0, expected an integer >= 1 or None"),
        (
            declared(accumulators={"x": Accumulator((), held="heads"), "count": Accumulator()}),
            "accumulator 'x' is held by 'heads' and so needs 'layer' first",
        ),
    ],
)
def test_a_declaration_that_cannot_be_is_refused_in_a_sentence(one, says):
    model, _ = model_and_batch("bert")
    with pytest.raises(ValueError, match=says):
        Monitor(model, MonitorConfig(quantities=("attention", one)))


@pytest.mark.parametrize(
    "settings, error, says",
    [
        ({"quantities": ("attenton",)}, ValueError, "quantities: expected distinct names out of .*'attention'"),
        ({"quantities": (OutputRms,)}, TypeError, r"got the class; write OutputRms\(\)"),
        ({"quantities": "attention"}, TypeError, "quantities: expected a tuple of names and instances"),
        ({"every": {"attention": 0}}, ValueError, "every: expected integers >= 1, got 0 for 'attention'"),
        ({"every": {"attention": 1.5}}, TypeError, "every: expected integers >= 1, got 1.5 for 'attention'"),
        ({"every": {"rnk": 5}}, ValueError, r"every: names \['rnk'\], which are not among the quantities"),
        ({"probe_share": 0}, ValueError, "probe_share: expected a share above 0 and up to 1, got 0"),
        ({"forwards": "some"}, ValueError, "forwards: expected one of"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_sentence(settings, error, says):
    with pytest.raises(error, match=says):
        MonitorConfig(**settings)


@pytest.mark.parametrize("bad", [{"axes": ("head", "layer")}, {"dtype": "float16"}, {"join": "mean"}, {"held": "all"}])
def test_an_accumulator_that_cannot_be_is_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected"):
        Accumulator(**bad)


class Entry:
    name, value = "from_a_package", "package:OutputRms"

    @staticmethod
    def load():
        return type("FromAPackage", (OutputRms,), {"name": "from_a_package"})


def test_packages_add_quantities_by_an_entry_point(monkeypatch):
    def entry_points(group, name=None):
        return [Entry] if group == "inflection_fast.quantities" and name in (None, Entry.name) else []

    monkeypatch.setattr(quantities, "entry_points", entry_points)
    assert quantities.known()[-1] == "from_a_package"
    timeline = train(*model_and_batch("bert"), MonitorConfig(every=1, quantities=("from_a_package",)), 1)
    assert timeline.columns["output_rms"].quantity == "from_a_package"
    monkeypatch.setattr(Entry, "load", lambda: object())
    with pytest.raises(ValueError, match="'from_a_package' is 'package:OutputRms', which is not a Quantity"):
        quantities.made("from_a_package")


# ---- waiting for the device ------------------------------------------------------------------------------------------


def model_for(name):
    if name == "adapter":
        model, batch = adapted(), model_and_batch("bert")[1]
    elif name == "router":
        hf = pytest.importorskip("transformers")
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = hf.MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=40, num_local_experts=5)
        model, ids = hf.MixtralForCausalLM(config).train(), torch.arange(16).view(2, 8)
        batch = {"input_ids": ids, "labels": ids}
    else:
        model, batch = model_and_batch("bert")
    return model, batch


def waits_of(one, name):
    """What of a third step that is measured waits for the device, beyond what training and a probe do anyway."""
    model, batch = model_for(name)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for every in (1, 10**6):
        config = MonitorConfig(quantities=(one,), every={name: every}, probe_share=None)
        with Monitor(model, config, probe=[batch]) as monitor:
            for _ in range(3):
                counted = Waits()
                with counted:
                    loss_of(model(**batch)).backward()
                    monitor.step()
                optimizer.step()
                optimizer.zero_grad()
                monitor._background._todo.join()  # so that the third step always has the results of the second
        found.append(counted.found)
    forward = Waits()
    with forward, torch.no_grad():
        model(**batch)
    return found[0] - found[1] - forward.found


# Whose matrices are too large to be brought to the host.
KNOWN = {"rank": {"_linalg_eigh"}, "first_order": {"_linalg_eigh"}}


@pytest.mark.parametrize("name", quantities.QUANTITIES)
def test_no_quantity_of_ours_waits_for_the_device(name):
    assert waits_of(name, name).keys() == KNOWN.get(name, set()), name


class Late(Quantity):
    """Leaves everything to the thread that finishes rows."""

    accumulators = {"value": Accumulator(), "count": Accumulator()}

    def __init__(self, name, raises=False):
        self.name, self.columns, self.raises, self.threads = name, {name: column()}, raises, set()

    def before_update(self, sums, update):
        self.later(sums, self.finish, torch.arange(3.0))

    def finish(self, sums, tensor):
        self.threads.add(threading.current_thread().name)
        if self.raises:
            raise ArithmeticError("of one's own")
        sums["value"].copy_(tensor)
        sums["count"].fill_(1)

    def values(self, sums):
        return {self.name: sums["value"]}


def test_what_is_left_for_later_is_done_by_the_thread_that_finishes_rows(caplog):
    late, broken = Late("late"), Late("broken", raises=True)
    timeline = train(*model_and_batch("bert"), MonitorConfig(every=1, quantities=(late, broken)), alerts=None)
    assert timeline.late.tolist() == [[0.0, 1.0, 2.0]] * 3 and np.isnan(timeline.broken).all()
    assert late.threads == {"inflection_fast timeline"}
    assert len(caplog.messages) == 1 and "for quantity 'broken' in later: ArithmeticError" in caplog.messages[0]


def test_one_that_waits_is_found():
    class Waiting(OutputRms):
        name = "waiting"

        def on_block(self, sums, block):
            if block.output.sum().item() > 0:
                super().on_block(sums, block)

    assert waits_of(Waiting(), "waiting")["_local_scalar_dense"] > 0
