"""Results as pages: one HTML file that needs nothing else, not even a network."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2

# Names of metrics as people write them; what is not here is shown as it is, with spaces.
WORDS = MappingProxyType({"dice": "Dice", "iou": "IoU", "hd95_mm": "HD95", "assd_mm": "ASSD", "nsd": "NSD", "volume_mm3": "volume"})
LENGTHS, VOLUMES = ("hd95_mm", "assd_mm"), ("volume_mm3",)


def scores_html(result: Mapping[str, Any]) -> str:
    """The page of a `metrics.json`: summary with intervals, classes, cases worst first, conventions."""
    rows: dict[str, list[Mapping[str, Any]]] = {case: [] for case in result["worst"]}
    for row in result["cases"]:
        rows[row["case"]].append(row)
    unit = {"mm": "mm", "voxel": "voxel"}.get(result["conventions"]["unit"], "mm or voxel")
    values = {**result, "cases": list(rows.values()), "unit": unit}
    return environment().get_template("scores.html").render(values)


def environment() -> jinja2.Environment:
    """The templates of this folder; everything put into them is escaped, an unknown name is an error."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(number=_number, words=_words)
    return made


def _number(value: float | None) -> str:
    """A number with three digits that mean something, a dash for none."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    # Micrographs have voxels of millionths of a millimetre.
    if 0 < size < 0.001:
        return f"{value:.2e}"
    return f"{value:.3g}" if 0 < size < 0.1 else f"{value:.3f}" if size < 10 else f"{value:.1f}"


def _words(name: str, unit: str = "") -> str:
    """The name of a metric for people, with its unit if one is given."""
    words = WORDS.get(name, name.replace("_", " "))
    if unit and name in LENGTHS:
        return f"{words} ({unit})"
    return f"{words} ({unit.replace(' or', '³ or')}³)" if unit and name in VOLUMES else words
