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
from inflection_fast.timeline import Timeline

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


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "demo"
    write_run(run)
    return html(state(followed(run))), Timeline.load(run / "measure")
