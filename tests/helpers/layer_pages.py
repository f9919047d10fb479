"""Pages of scans and comparisons, as a browser opens them."""

import numpy as np

from inflection_fast.report.answer import Answer
from inflection_fast.report.layer_page import LayerPage, Line, Matrix, Profile, Table


def look(text="a name", **more):
    profile = Profile(text, "nats", [Line(text, [1.0, None, np.nan], [0.1, None, 0.2])], text, marked=[0])
    matrix = Matrix(text, "CKA", np.array([[1.0, 0.5, np.nan], [0.25, 1.0, 0.0]]), "layer of A", "layer of B", text)
    parts = {
        "kind": "comparison",
        "title": text,
        "where": text,
        "facts": [text],
        "answer": Answer(text, text, text, text),
        "layers": [text, "x", "y"],
        "profiles": [profile],
        "matrices": [matrix],
        "tables": [Table(text, [text, "b"], [[text, "1"]], (1,)), Table(text, [text], [[text]], folded=True)],
        "settings": [(text, text)],
        "versions": [(text, text)],
        "missing": [text],
    }
    return LayerPage(**parts | more)
