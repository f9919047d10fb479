"""What is packed into a page, read back."""

import base64
import json
import re
import zlib

import numpy as np
import pytest

from helpers.tiny_runs import write_run
from inflection_fast.report.content import Content
from inflection_fast.report.single_page import html, state
from inflection_fast.timeline import Timeline, TimelineWriter
from inflection_fast.timeline.older import STANDARD

WIDE = 128  # layers, and heads of each, of the run of `write_wide`
PEAK = 777.0  # one value of its entropy, far above all others
MARKUP = "</script><img src=x onerror=alert(1)><b>&amp;"


def followed(folder):
    found = Content(folder)
    found.update()
    return found


def manifest_of(page):
    return json.loads(re.search(r'<script type="application/json" id="manifest">(.*?)</script>', page, re.S)[1])


def array_of(page, reference):
    text = re.search(rf'<script type="text/plain" id="array-{reference["id"]}">(.*?)</script>', page, re.S)[1]
    planes = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(4, -1)
    return np.ascontiguousarray(planes.T).view("<f4").reshape(reference["shape"])


def column(page, name):
    return next(entry for entry in manifest_of(page)["columns"] if entry["name"] == name)


def write_wide(folder, measured=514):
    """A run of 100,000 steps, 128 layers and 128 heads; returns the step, layer and head of its largest entropy.

    With more than 512 measured steps every map of its page is reduced, and so as large as after any number of them.
    """
    rng = np.random.default_rng(0)
    names = ("entropy", "max_logit", "activation_grad", "loss")
    columns = {name: STANDARD[name] for name in names}
    places = [f"model.layers.{i}" for i in range(WIDE)]
    place = measured // 3, 77, 99
    steps = np.linspace(0, 100_000, measured).astype(int)
    with TimelineWriter(folder, layers=places, heads=WIDE, meta={}, columns=columns) as out:
        for number, step in enumerate(steps):
            entropy = rng.random((WIDE, WIDE), np.float32) + 1
            if number == place[0]:
                entropy[place[1:]] = PEAK
            logits = rng.random((WIDE, WIDE), np.float32) + 9
            out.append(int(step), entropy=entropy, max_logit=logits, activation_grad=rng.random(WIDE) + 1, loss=1.0)
    return int(steps[place[0]]), *place[1:]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "demo"
    write_run(run)
    return html(state(followed(run))), Timeline.load(run / "measure")
