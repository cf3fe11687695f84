"""Results as pages: one HTML file that needs nothing else, not even a network."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2

from microtome.evaluation.units import Units
from microtome.files import write_json, write_text

# Names of metrics as people write them; what is not here is shown as it is, with spaces.
WORDS = MappingProxyType(
    {"dice": "Dice", "iou": "IoU", "hd95_mm": "HD95", "assd_mm": "ASSD", "nsd": "NSD", "volume_mm3": "volume"}
    | {"ap50": "AP50", "ap": "AP 0.50–0.95", "pq": "PQ", "sq": "SQ", "rq": "RQ", "seg": "SEG", "arand": "ARand error"}
    | {"voi": "VOI", "voi_split": "VOI split", "voi_merge": "VOI merge", "v_rand": "V-Rand", "v_info": "V-Info"}
)
# Metrics from 0 to 1 that a bar shows in the table of cases, of classes and of objects.
BARS = ("dice", "pq")
LENGTHS, VOLUMES, BITS = ("hd95_mm", "assd_mm"), ("volume_mm3",), ("voi", "voi_split", "voi_merge")


def write_scores(result: Mapping[str, Any], json_file: Path | None, html: Path | None) -> list[Path]:
    """Write all numbers, and the page of them, where a file is given; the files written."""
    if json_file is not None:
        # Pictures are for the page alone.
        write_json(json_file, {name: value for name, value in result.items() if name != "pictures"})
    if html is not None:
        write_text(html, scores_html(result))
    return [path for path in (json_file, html) if path is not None]


def scores_html(result: Mapping[str, Any]) -> str:
    """The page of a `metrics.json`: summary with intervals, classes, cases worst first, conventions."""
    rows: dict[str, list[Mapping[str, Any]]] = {case: [] for case in result["worst"]}
    for row in result["cases"]:
        rows[row["case"]].append(row)
    parts = {"pictures": result.get("pictures", ()), "objects": result.get("objects"), "bars": BARS}
    values = {**result, **parts, "cases": list(rows.values()), "units": Units.of(result["conventions"])}
    return environment().get_template("scores.html").render(values)


@cache
def environment() -> jinja2.Environment:
    """The templates of this folder; everything put into them is escaped, an unknown name is an error; made once, as are its templates."""
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


def _words(name: str, units: Units | None = None) -> str:
    """The name of a metric for people, with its unit if units are given."""
    words = WORDS.get(name, name.replace("_", " "))
    if units is None:
        return words
    if name in VOLUMES:
        return f"{units.content} ({units.size})"
    return f"{words} ({units.length})" if name in LENGTHS else f"{words} (bits)" if name in BITS else words
