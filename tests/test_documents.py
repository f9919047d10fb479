"""Every Python block of the documents runs. Those that cannot here say why in their title, and are counted."""

from collections import Counter

import pytest
import torch
from helpers import documents
from helpers.tiny_models import one_thread  # noqa: F401

import inflection_fast

pytestmark = pytest.mark.sources

# Blocks that are not run, by the title that they carry. Whoever adds one changes the number.
NOT_RUN = {"needs several processes": 1, "signatures": 9}
ELSEWHERE = {"own_operator.md"}  # built, run and measured by tests/test_own_operator.py
CONTINUED = {"quickstart.md"}  # read from top to bottom: one program, which is given nothing
PAGES = [path for path in documents.documents() if path.name not in ELSEWHERE and documents.sections(path)[0]]


def run(path, blocks, folder):
    """The names after the blocks have run one after the other."""
    names = {"__name__": "__main__", **({} if path.name in CONTINUED else documents.given(folder))}
    for line, code in blocks:
        exec(compile("\n" * line + code, str(path), "exec"), names)
    return names


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_blocks_run(path, tmp_path, monkeypatch):
    programs = [section.blocks for section in documents.sections(path)[0]]
    if path.name in CONTINUED:
        programs = [[block for blocks in programs for block in blocks]]
    for number, blocks in enumerate(programs):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        run(path, blocks, folder)


def test_what_does_not_run_says_why_and_is_python():
    found = Counter()
    for path in documents.documents():
        for line, title, code in documents.sections(path)[1]:
            found[title] += 1
            if title != "signatures":
                compile(code, f"{path}:{line}", "exec")
    assert found == NOT_RUN


def test_what_the_readme_calls_equivalent_is(tmp_path):
    (section,) = (s for s in documents.sections(documents.ROOT / "README.md")[0] if s.heading == "The operators")
    names = run(documents.ROOT / "README.md", section.blocks, tmp_path)
    entropy = inflection_fast.attention_entropy(names["logits"], attn_mask=names["mask"], scale=names["scale"])
    torch.testing.assert_close(entropy, names["entropy"], rtol=0, atol=1e-6)
    cka = inflection_fast.linear_cka(names["x"], names["y"])
    torch.testing.assert_close(cka, names["cka"].float(), rtol=0, atol=1e-6)
