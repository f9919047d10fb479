"""The page of profiles, matrices and tables, and matrices on the page of a run."""

import numpy as np
import pytest
from helpers.layer_pages import look
from helpers.pages import MARKUP, array_of, manifest_of

from inflection_fast.quantities.layer_cka import LayerCka
from inflection_fast.report.content import Content
from inflection_fast.report.layer_page import layer_page_state, write_layer_page
from inflection_fast.report.page import write
from inflection_fast.report.single_page import html, state
from inflection_fast.timeline import TimelineWriter


def test_what_is_drawn_stands_in_the_manifest(tmp_path):
    write_layer_page(look(), tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    manifest = manifest_of(text)
    (profile,), (matrix,) = manifest["profiles"], manifest["matrices"]
    assert profile["lines"][0]["values"] == [1.0, None, None] and profile["lines"][0]["error"] == [0.1, None, 0.2]
    assert profile["label"] == "A name" and profile["marked"] == [0]
    np.testing.assert_allclose(array_of(text, matrix), [[1.0, 0.5, np.nan], [0.25, 1.0, 0.0]], rtol=1e-6)
    assert 'id="alerts" hidden' in text and 'id="maps" hidden' in text and 'id="choice" hidden' in text


def test_no_text_becomes_markup():
    text = html(layer_page_state(look(MARKUP)))
    assert MARKUP not in text.replace("\\u003c", "<<")  # in JSON it is written without angle brackets
    assert text.count("<script") == text.count("</script>")


def test_the_words_of_the_kinds_differ():
    kinds = {kind: html(layer_page_state(look(kind=kind))) for kind in ("scan", "comparison")}
    assert "random matrices of their sizes" in kinds["scan"] and "of B to the right" in kinds["comparison"]


@pytest.fixture
def run_with_matrix(tmp_path):
    """A timeline that holds CKA of all pairs of layers at two of three steps."""
    names, columns = ["a", "b", "c"], {**LayerCka.columns}
    rng = np.random.default_rng(0)
    last = rng.random((3, 3))
    with TimelineWriter(
        tmp_path, layers=names, heads=1, meta={"config": {}}, columns=columns, axes={"other_layer": 3}
    ) as writer:
        writer.append(0, layer_cka=rng.random((3, 3)))
        writer.append(5, layer_cka=last)
        writer.append(6, layer_cka=np.full((3, 3), np.nan))
    return tmp_path, last


def test_a_run_shows_the_last_matrix_of_layers(run_with_matrix):
    folder, last = run_with_matrix
    content = Content(folder)
    content.update()
    text = html(state(content))
    manifest = manifest_of(text)
    assert [matrix["name"] for matrix in manifest["matrices"]] == ["layer_cka"]
    np.testing.assert_allclose(array_of(text, manifest["matrices"][0]), last, rtol=1e-4)
    assert "At step 5." in manifest["matrices"][0]["explanation"]
    assert "layer_cka" not in [column["name"] for column in manifest["columns"]]
    write(folder, figures=True)
    assert (folder / "report" / "figures" / "matrix_layer_cka.svg").is_file()
