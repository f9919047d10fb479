"""What would make the host wait for a device: numbers read, tensors of unknown size, copies of lists from the host."""

from collections import Counter

import pytest
import torch
from helpers.monitored import loss_of
from helpers.packets import ALL as SIGNALS
from helpers.plain_flash import flash, packed_llama  # noqa: F401
from helpers.tiny_models import CASES, model_and_batch, one_thread  # noqa: F401
from helpers.waits import Waits

from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.ops import checks


def waits(model, batch, config, **options):
    """Of the third step, which is a measured one if `config` says so, and is none of the first."""
    with Monitor(model, config, **options) as monitor:
        for _ in range(3):
            counted = Waits()
            with counted:
                loss_of(model(**batch)).backward()
                monitor.step()
            model.zero_grad()
    return counted.found


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "hand-written"])
@pytest.mark.parametrize("probe", [False, True])
def test_a_measured_step_reads_no_number_of_the_device_and_hands_none_over(name, probe):
    model, batch = model_and_batch(name)
    signals = (*SIGNALS,) if probe else SIGNALS[:3]
    options = {"probe": [batch]} if probe else {}
    alone = waits(model, batch, MonitorConfig(every=100, rows=None, signals=SIGNALS[:3]))
    if probe:  # the forward of the probe is the model's own, and random generators are set back by copies on the host
        once = Waits()
        with once, torch.no_grad():
            model(**batch)
        alone = alone + once.found
    found = waits(model, batch, MonitorConfig(every=1, rows=None, signals=signals), **options)
    assert found - alone == Counter()


@pytest.mark.parametrize("lengths", [False, True])
def test_packed_sequences_are_measured_without_a_wait_either(lengths, flash, monkeypatch):
    monkeypatch.setattr(checks, "cu_seqlens", lambda value, *rest: value)  # looks at numbers on the CPU only
    model, packed = packed_llama(flash)
    if lengths:
        names = ("cu_seq_lens_q", "cu_seq_lens_k")  # two tensors: whether they are equal has to be seen
        packed |= {name: torch.tensor([0, 12, 24, 36]) for name in names} | {"max_length_q": 12, "max_length_k": 12}
    alone = waits(model, packed, MonitorConfig(every=100, rows=None, signals=SIGNALS[:3]))
    found = waits(model, packed, MonitorConfig(every=1, rows=None, signals=SIGNALS[:3]))
    assert alone["_local_scalar_dense"] > 0  # of the kernel in plain PyTorch
    assert found == alone
