"""Packets of the quantities that there are, filled by hand."""

from __future__ import annotations

import torch

from inflection_fast import quantities
from inflection_fast.measure.packet import Packet
from inflection_fast.measure.panel import Panel

TRAINING = ("attention", "activation_grad", "parameter_grad", "delta_cka")
ALL = (*TRAINING, "probe_entropy", "probe_activation_grad")


def panel_of(names=ALL):
    return Panel([quantities.made(name) for name in names])


def packet_of(layers, heads, names=ALL, device="cpu"):
    return Packet(panel_of(names).fields(layers, heads), device)


def row_of(packet, **options):
    """Columns of a packet as plain arrays, NaN where nobody measured anything."""
    names = [name for name in packet.fields.declared if name in ALL]
    row = panel_of(names).row(packet, {*names, "step"}, **options)
    return {name: value.filled(float("nan")) for name, value in row.items()}


def tensors_of(row):
    return {name: torch.from_numpy(value) if value.ndim else torch.tensor(float(value)) for name, value in row.items()}
