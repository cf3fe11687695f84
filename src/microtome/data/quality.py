"""What is wrong with a dataset, found before anyone trains: every case read once, every fault named with its file."""

import base64
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from microtome.data.case import Case, Finding
from microtome.data.checks import CaseRow, Severity, Values, class_shares, findings_of, format_share, look
from microtome.data.dataset import Dataset
from microtome.data.labels import count_codes
from microtome.data.legend import Legend
from microtome.data.names import relative, relative_words
from microtome.data.parts import looked_at
from microtome.data.split import Split, cut_case, split_dataset
from microtome.data.thumbnails import Thumbnail, class_colours, draw_middle, draw_thumbnail
from microtome.errors import DataWarning, MicrotomeError
from microtome.geometry import format_shape, format_sides
from microtome.images.volume import Volume, volume_of
from microtome.threads import in_threads, usable_cores

NUMBER_COLUMNS = frozenset({"channels", "annotated"})
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All that `microtome inspect` has to say.

    Attributes:
        root: folder of the dataset.
        layout: how it is laid out, as `open_dataset` found.
        legend: its classes.
        rows: a row for each readable case.
        findings: those of `open_dataset` and those found here, errors first.
    """

    root: Path
    layout: str
    legend: Legend
    rows: tuple[CaseRow, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return all(finding.severity != "error" for finding in self.findings)

    def of_severity(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of one severity."""
        return tuple(finding for finding in self.findings if finding.severity == severity)

    def to_json(self) -> dict[str, Any]:
        """The inspection as JSON holds it: paths as text, no NaN."""
        return {
            "root": str(self.root),
            "layout": self.layout,
            "ok": self.ok,
            "legend": self.legend.to_json(),
            "cases": [_row_json(row, self.legend) for row in self.rows],
            "findings": [_finding_json(finding) for finding in self.findings],
        }


def _finding_json(finding: Finding) -> dict[str, Any]:
    """A finding as JSON holds it."""
    words = {"severity": finding.severity, "code": finding.code, "page": finding.page, "case": finding.case, "message": finding.message}
    return {**words, "files": [str(path) for path in finding.files]}


def inspect_fold(dataset: Dataset, fold: str, seed: int) -> Inspection:
    """Inspect a dataset that is to be split; that it cannot be split is one more finding.

    Raises:
        ConfigError: `fold` is none, or there is none of that number.
    """
    try:
        return inspect_dataset(dataset, split_dataset(dataset, fold, seed))
    except MicrotomeError as error:
        if error.where == "fold":
            raise
        reason = f"cannot be split into training and validation: {' '.join(str(error).split())}"
    finding = Finding(severity="warning", code="no-split", message=relative_words(dataset.root, reason))
    return inspect_dataset(replace(dataset, findings=(*dataset.findings, finding)))


def inspect_dataset(dataset: Dataset, split: Split | None = None) -> Inspection:
    """Read every case once and say what is wrong with it, and with the cases together.

    A file that cannot be read is a finding and never an exception. At most four cases are in memory at a time.

    Args:
        dataset: as `open_dataset` gives it; its findings are taken over.
        split: where given, an image that is in both of its parts is an error.
    """
    parts = _parts(split)
    with warnings.catch_warnings(record=True) as caught:
        # What a reader warns of becomes a finding; the filter is the process's, so it holds in the threads too.
        warnings.simplefilter("always", DataWarning)
        examined = in_threads(lambda case: _examine(dataset, case, parts.get(case.images[0], "")), dataset.cases, _threads())
    rows = tuple(row for row, _ in examined if row is not None)
    said = {path for finding in dataset.findings if finding.severity == "error" for path in finding.files}
    found = [finding for _, findings in examined for finding in findings if finding.code != "unreadable" or said.isdisjoint(finding.files)]
    found += [*_warned(caught), *findings_of(rows, dataset.legend), *(cut_case(split, dataset) if split else ())]
    found = [replace(finding, message=relative_words(dataset.root, finding.message)) for finding in found]
    return Inspection(
        root=dataset.root, layout=dataset.layout, legend=dataset.legend, rows=rows, findings=_in_order([*dataset.findings, *found])
    )


@dataclass(frozen=True)
class Table:
    """Plain text in rows, for a terminal or a page."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def case_table(inspection: Inspection) -> Table:
    """The cases as text; columns that say nothing here (no split, all annotated) are left out."""
    names = inspection.legend.names
    columns: dict[str, Callable[[CaseRow], str]] = {"case": lambda row: row.name}
    if any(row.part for row in inspection.rows):
        columns["part"] = lambda row: row.part or "–"
    columns |= {
        "size": lambda row: format_shape(row.shape_vox),
        "channels": lambda row: str(row.channels),
        "type": lambda row: row.dtype,
        "spacing (mm)": lambda row: format_sides(row.spacing_mm) if row.spacing_known else "not known",
        "values": lambda row: "none" if row.low is None or row.high is None else f"{row.low:.4g} – {row.high:.4g}",
    }
    if any(row.annotated not in (None, 1.0) for row in inspection.rows):
        columns["annotated"] = lambda row: "–" if row.annotated is None else format_share(row.annotated)
    columns["classes"] = lambda row: _class_text(row, names)
    return Table(tuple(columns), tuple(tuple(text(row) for text in columns.values()) for row in inspection.rows))


def case_thumbnails(dataset: Dataset, inspection: Inspection, limit: int = 64) -> tuple[Thumbnail, ...]:
    """Pictures of at most `limit` readable cases: those with findings first, worst first, then an even choice of the others."""
    rows = {row.name: row for row in inspection.rows}
    cases = {case.name: case for case in dataset.cases if case.name in rows}
    severities = case_severities(inspection)
    found = sorted((name for name in cases if name in severities), key=lambda name: SEVERITIES.index(severities[name]))[:limit]
    others = [name for name in cases if name not in severities]
    count = min(len(others), limit - len(found))
    chosen = [*found, *(others[n * len(others) // count] for n in range(count))]
    colours = class_colours(len(dataset.legend.names), dataset.legend.background)
    side_px = 264 if len(chosen) > 3 else 360

    def draw(name: str) -> Thumbnail:
        if dataset.is_large(cases[name]):
            label_parts = dataset.open_label(cases[name]) if rows[name].voxels is not None else None
            return draw_middle(name, dataset.open_image(cases[name]), label_parts, colours, side_px)
        # A label that could not be read is among the findings already; its image is shown without it.
        label = dataset.read_label(cases[name]) if rows[name].voxels is not None else None
        return draw_thumbnail(name, dataset.read_image(cases[name]), label, colours, side_px)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # inspect_dataset made findings of them
        return tuple(in_threads(draw, chosen, _threads()))


def inspection_html(inspection: Inspection, thumbnails: Sequence[Thumbnail] = ()) -> str:
    """The inspection as one page that needs no network: findings, legend, pictures, table."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("microtome", "data"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    legend, severities = inspection.legend, case_severities(inspection)
    shares = class_shares(inspection.rows, len(legend.names))
    colours = class_colours(len(legend.names), legend.background)
    table = case_table(inspection)
    size, size_words = _sizes(inspection.rows)
    return environment.get_template("inspect.html").render(
        inspection=inspection,
        title=inspection.root.resolve().name,
        labelled=sum(row.voxels is not None for row in inspection.rows),
        size=size,
        size_words=size_words,
        groups=[(severity, inspection.of_severity(severity)) for severity in SEVERITIES],
        classes=[(name, colour, format_share(share)) for name, colour, share in zip(legend.names, colours, shares, strict=True)],
        sparse=any(row.annotated not in (None, 1.0) for row in inspection.rows),
        pictures=[_picture(thumbnail, severities.get(thumbnail.case, "")) for thumbnail in thumbnails],
        columns=[(title, title in NUMBER_COLUMNS) for title in table.titles],
        table=[(severities.get(row.name, ""), cells) for row, cells in zip(inspection.rows, table.rows, strict=True)],
    )


def case_severities(inspection: Inspection) -> dict[str, Severity]:
    """The worst severity found about each case; cases without findings are not in it."""
    names = {path: row.name for row in inspection.rows for path in row.files}
    worst: dict[str, Severity] = {}
    for finding in reversed(inspection.findings):
        # Worst last, so it stays. A finding about several cases names them by their files only.
        for name in [finding.case] if finding.case else [names[path] for path in finding.files if path in names]:
            worst[name] = finding.severity
    return worst


def _parts(split: Split | None) -> dict[Path, str]:
    """First image file -> its part of the split; both parts where a single case is cut in two."""
    if split is None:
        return {}
    train, validation = ({case.images[0] for case in cases} for cases in (split.train, split.validation))
    return {path: " + ".join(("train",) * (path in train) + ("validation",) * (path in validation)) for path in train | validation}


def _examine(dataset: Dataset, case: Case, part: str) -> tuple[CaseRow | None, list[Finding]]:
    """One case's row, None where its image cannot be read, and what is wrong with it."""
    where = _where(dataset.root, case)
    try:
        if dataset.is_large(case):
            return _examine_parts(dataset, case, part)
        image = volume_of(dataset.read_image(case))
        values = look([image.pixels])
    except Exception as error:  # noqa: BLE001 - whatever a broken file makes a decoder raise is the finding
        return None, [_unreadable(case, case.images, where, error)]
    found: list[Finding] = []
    voxels = None
    # What open_dataset could not read it has said already.
    if case.labels and case.name not in dataset.unreadable:
        try:
            counts = count_codes(dataset.read_label(case))
            voxels = tuple(counts.get(index, 0) for index in range(len(dataset.legend.names)))
        except Exception as error:  # noqa: BLE001 - as above
            found = [_mismatch(dataset.root, case, error)]
    return _row(dataset.root, case, (image, values), part, voxels), found


def _examine_parts(dataset: Dataset, case: Case, part: str) -> tuple[CaseRow, list[Finding]]:
    """The same of a case that is too large to be read at once; what stands in its label was counted when the dataset was opened."""
    volume, found, voxels = dataset.open_image(case), [], None
    boxes, seen = looked_at(volume)
    values = look(volume.pixels[(slice(None), *box)] for box in boxes)
    if case.name not in dataset.unreadable:
        try:
            dataset.open_label(case)
            voxels = dataset.class_counts[case.name][:-1]
        except MicrotomeError as error:
            found.append(_mismatch(dataset.root, case, error))
    if seen < 1:
        message = f"{_where(dataset.root, case)}: {format_shape(volume.shape_vox)} voxels are too many to read; its values are those of "
        message += f"{100 * seen:.2g} % of them, spread over it"
        found.append(Finding(severity="note", code="sampled-image", case=case.name, message=message, files=case.images))
    return _row(dataset.root, case, (volume, values), part, voxels), found


def _row(root: Path, case: Case, seen: tuple[Volume, Values], part: str, voxels: tuple[int, ...] | None) -> CaseRow:
    """The numbers of one case."""
    image, values = seen
    return CaseRow(
        name=case.name,
        where=_where(root, case),
        where_label=relative(root, case.labels[0]) if case.labels else "",
        files=case.images,
        part=part,
        shape_vox=image.shape_vox,
        channels=image.channels,
        dtype=str(image.pixels.dtype),
        spacing_mm=image.spacing_mm,
        spacing_known=image.spacing_known,
        low=values.low,
        high=values.high,
        not_finite=values.not_finite,
        constant=values.constant,
        voxels=voxels,
        fingerprint=f"{image.shape_vox} {values.fingerprint}",
    )


def _unreadable(case: Case, files: tuple[Path, ...], where: str, error: Exception) -> Finding:
    """The finding that a file's reader failed; without a label nothing is lost for training."""
    severity: Severity = "error" if case.labels else "warning"
    fault = error.code if isinstance(error, MicrotomeError) else ""
    return Finding(severity=severity, code="unreadable", case=case.name, message=_said(where, error), files=files, fault=fault)


def _mismatch(root: Path, case: Case, error: Exception) -> Finding:
    """The finding that a label does not lie on its image; open_dataset could read its values, so that is what is left."""
    where = relative(root, case.labels[0])
    message, fault = _said(where, error), error.code if isinstance(error, MicrotomeError) else ""
    return Finding(severity="error", code="grid-mismatch", case=case.name, message=message, files=case.images + case.labels, fault=fault)


def _said(where: str, error: Exception) -> str:
    """An error in one line. Our own name the file and the remedy; a decoder's say neither."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if isinstance(error, MicrotomeError) else f"{where}: cannot be read ({said}); export it again or leave the case out"


def _warned(caught: Iterable[warnings.WarningMessage]) -> list[Finding]:
    """What the readers warned of, each thing once; other people's warnings go on to whom they were meant for."""
    texts = dict.fromkeys(str(each.message) for each in caught if issubclass(each.category, DataWarning))
    for each in caught:
        if not issubclass(each.category, DataWarning):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return [Finding(severity="note", code="assumed", message=text) for text in texts]


def _in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings without repetitions, errors first, else in the order in which they were found."""
    once = {(finding.message, finding.files): finding for finding in findings}
    return tuple(sorted(once.values(), key=lambda finding: SEVERITIES.index(finding.severity)))


def _where(root: Path, case: Case) -> str:
    """The case's first image file for a message."""
    section = f" section {case.sections[0]}" if case.sections else ""
    return relative(root, case.images[0]) + section


def _class_text(row: CaseRow, names: tuple[str, ...]) -> str:
    """The classes of a case with their shares, the largest four."""
    if row.voxels is None:
        return "label not usable" if row.where_label else "no label"
    present = sorted(((share, name) for share, name in zip(row.shares, names, strict=True) if share), reverse=True)
    more = f" and {len(present) - 4} more" if len(present) > 4 else ""
    return ", ".join(f"{name} {format_share(share)}" for share, name in present[:4]) + more or "nothing annotated"


def _row_json(row: CaseRow, legend: Legend) -> dict[str, Any]:
    """A row as JSON holds it."""
    return {
        "case": row.name,
        "file": row.where,
        "part": row.part or None,
        "shape_vox": list(row.shape_vox),
        "channels": row.channels,
        "dtype": row.dtype,
        "spacing_mm": list(row.spacing_mm) if row.spacing_known else None,
        "low": row.low,
        "high": row.high,
        "annotated": row.annotated,
        "classes": dict(zip(legend.names, row.shares, strict=True)) if row.shares else None,
    }


def _threads() -> int:
    """Decoding leaves Python's lock; more than four cases in memory would gain little."""
    return min(4, usable_cores())


def _sizes(rows: Sequence[CaseRow]) -> tuple[str, str]:
    """The usual size of the images, and in words what it is."""
    if not rows:
        return "–", "no image could be read"
    shapes = sorted((row.shape_vox for row in rows), key=np.prod)
    unit = "pixels" if len(shapes[0]) == 2 else "voxels"
    same = shapes[0] == shapes[-1]
    return format_shape(shapes[len(shapes) // 2]), f"{unit}, all alike" if same else f"{unit} in the median case"


def _picture(thumbnail: Thumbnail, severity: str) -> dict[str, Any]:
    """A thumbnail as the page shows it."""
    caption = "" if thumbnail.section is None else f"section {thumbnail.section}"
    png = base64.b64encode(thumbnail.png).decode("ascii")
    return {"case": thumbnail.case, "png": png, "caption": caption, "severity": severity}
