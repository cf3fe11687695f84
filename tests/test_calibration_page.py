"""What a report says of how sure a model is: words by the numbers, dots where they belong."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from microtome.evaluation.calibration_page import describe, draw


def found_of(**changes: Any) -> dict[str, Any]:
    empty = [{"confidence": None, "accuracy": None, "share": 0.0} for _ in range(12)]
    bins = [
        *empty,
        {"confidence": 0.83, "accuracy": 0.5, "share": 0.00001},
        {"confidence": 0.9, "accuracy": 0.76, "share": 0.2},
        {"confidence": 0.99, "accuracy": 0.97, "share": 0.8},
    ]
    scores = {"ece_before": 0.1, "ece": 0.044, "brier_before": 0.2, "brier": 0.15, "nll_before": 0.5, "nll": 0.3}
    return {"temperature": 1.6, **scores, "voxels": 12345, "bins": bins, **changes}


def words_of(found: dict[str, Any], conventions: Mapping[str, str] | None = None) -> str:
    told = describe({"calibration": found, "conventions": conventions or {}}, validated=True)
    return " ".join(told.sentences).replace("\N{NO-BREAK SPACE}", " ")


def test_words_for_people() -> None:
    said = words_of(found_of(), {"calibration": "one temperature, fitted; ECE: 15 bins"})
    assert said == (
        "Where the model says that it is about 90 % sure of a voxel's class, it is right in 76 % of the voxels; on average what it says "
        "and how often it is right differ by 4.4 percentage points. Measured on 12,345 voxels of the validation cases: by itself the "
        "network is too sure, 10.0 percentage points off on average; a temperature of 1.6 makes it less sure. Which class it chooses "
        "does not depend on this. One temperature, fitted."
    )
    assert "not sure enough" in words_of(found_of(temperature=0.5))
    assert "needed no correction" in words_of(found_of(temperature=1.0))
    assert "less than 0.1 percentage points" in words_of(found_of(ece=0.0))
    certain = found_of()
    certain["bins"] = [*certain["bins"][:13], {"confidence": None, "accuracy": None, "share": 0.0}, *certain["bins"][14:]]
    assert words_of(certain).startswith("The model is nearly always certain of a voxel's class; on average")


def test_a_run_that_has_not_measured_it_says_so() -> None:
    assert "end of the run" in describe(None, validated=True).sentences[0]
    assert "was not measured" in describe({"conventions": {}}, validated=True).sentences[0]
    assert describe(None, validated=False).diagram is None


def test_the_diagram_has_a_dot_for_each_bin_that_says_something_where_it_belongs() -> None:
    drawn_ = draw(found_of()["bins"])
    width, height = drawn_.right - drawn_.left, drawn_.bottom - drawn_.top
    expected = [(drawn_.left + c * width, drawn_.bottom - a * height) for c, a in ((0.9, 0.76), (0.99, 0.97))]
    assert np.allclose(drawn_.dots, expected, atol=0.06)
    assert drawn_.points == " ".join(f"{x:g},{y:g}" for x, y in drawn_.dots)
    last = drawn_.shares[-1]
    assert (last.y, last.y + last.height) == (pytest.approx(drawn_.bottom - 0.8 * height, abs=0.06), pytest.approx(drawn_.bottom, abs=0.11))
    assert last.x + last.width == pytest.approx(drawn_.right - 1, abs=0.11)
    assert len(drawn_.shares) == 3
