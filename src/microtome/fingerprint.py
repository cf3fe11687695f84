"""What a dataset is like, in the numbers that a plan is made from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from microtome.data.dataset import Case, Dataset
from microtome.data.parts import looked_at, middle_of
from microtome.errors import DataError
from microtome.geometry import Shape, Spacing, format_shape
from microtome.images.image import Image
from microtome.images.medical import PATIENT_FORMATS
from microtome.images.volume import Volume

# Cases that are read in full for grey values and shapes of the classes; the rest only by their headers.
CASES_READ = 12
# Values a channel of each of them, and how many are looked at of one that is too large to be read.
VALUES_READ, VALUES_OF_LARGE = 1_000_000, 2**26
# Part of it in which neighbouring sections are compared.
LAG_SIDES = (64, 256, 256)
# Lower grey values are air in Hounsfield units, and hardly anything in other scales.
HOUNSFIELD_AIR = -500


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Facts about the images and labels of a dataset; lengths are medians over cases.

    Attributes:
        cases: how many are labelled.
        channels: of every image.
        classes: names.
        shape_vox: median image shape S.
        spacing_mm: median spacing along S.
        spacing_low_mm: 10th percentile of the spacing along S.
        spacing_varies: whether cases differ by more than 1 %.
        spacing_known: whether every file states its spacing.
        stated_spacing_mm: what `microtome.yaml` states for all of them; empty where it does not.
        formats: what the files are ("nifti", "png", ...), and `jpeg_share`, how many of them are JPEG.
        thinnest_vox: thickness of the thinnest class, 2 x area / perimeter, voxels in the plane of a section; infinite
            where no two classes touch (scribbles), so that nothing is known of it.
        section_lag: how many voxels apart in a section look as unlike as two neighbouring sections; None in 2D.
        low, high, mean, sd: of grey values by channel: 0.5th and 99.5th percentile, mean and sd between them; of CT in the foreground.
        brightness_varies: spread of the images' means in units of their inner spread.
        hounsfield: whether values look like CT numbers.
        left_right_axis: the axis of S that runs from left to right of a patient; None where nothing tells.
    """

    cases: int
    channels: int
    classes: tuple[str, ...]
    shape_vox: Shape
    spacing_mm: Spacing
    spacing_low_mm: Spacing
    spacing_varies: bool
    spacing_known: bool
    stated_spacing_mm: Spacing = ()
    formats: frozenset[str]
    jpeg_share: float
    thinnest_vox: float
    section_lag: float | None
    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    brightness_varies: float
    hounsfield: bool
    left_right_axis: int | None


def take_fingerprint(dataset: Dataset, cases: Sequence[Case]) -> Fingerprint:
    """Measure the labelled `cases`: headers of all, pixels of a dozen spread over them.

    Raises:
        DataError: no cases, labels of one class alone, 2D beside 3D images, different numbers of channels, or files with a voxel size
            beside files without.
    """
    if not cases:
        raise DataError(
            dataset.root, expected="labelled cases to train on", got="none", do="run `microtome inspect` on the folder", code="D032"
        )
    counts = [counts for case in cases if (counts := dataset.class_counts.get(case.name))]
    seen = [name for name, voxels in zip(dataset.legend.names, np.sum(counts, axis=0), strict=False) if voxels] if counts else []
    if len(seen) < 2 and (counts or len(dataset.legend.names) < 2):
        do = "annotate what is to be found; `microtome inspect` shows what each label holds"
        got = f"{seen[0]} alone" if seen else "none"
        raise DataError(dataset.root, expected="labels of two classes at least", got=got, do=do, code="D044")
    chosen = [cases[i] for i in np.unique(np.linspace(0, len(cases) - 1, CASES_READ).round().astype(int))]
    samples = [_Sample(dataset, case) for case in chosen]
    first = samples[0]
    shapes, spacings, known, formats = _headers(dataset, cases)
    _check_alike(dataset, cases, shapes, samples)
    if len(set(known)) > 1:
        got = f"none in {cases[known.index(False)].name}, one in {cases[known.index(True)].name}"
        raise DataError(
            dataset.root, expected="a voxel size in every image or in none", got=got, do="state `spacing_mm` in microtome.yaml", code="D038"
        )
    spacing = np.array(spacings)
    grey = np.array([[s.low, s.high, s.mean, s.sd] for s in samples])
    means, spreads = grey[:, 2], grey[:, 3]
    lags = [s.section_lag for s in samples if s.section_lag is not None]
    return Fingerprint(
        cases=len(cases),
        channels=first.channels,
        classes=dataset.legend.names,
        shape_vox=tuple(int(n) for n in np.median(shapes, axis=0)),
        spacing_mm=_floats(np.median(spacing, axis=0)),
        spacing_low_mm=_floats(np.percentile(spacing, 10, axis=0)),
        spacing_varies=bool((spacing.max(0) / spacing.min(0) > 1.01).any()),
        spacing_known=all(known),
        stated_spacing_mm=tuple(dataset.config.spacing_mm or ()),
        formats=frozenset(formats),
        jpeg_share=formats.count("jpeg") / len(formats),
        thinnest_vox=float(np.median([s.thinnest for s in samples])),
        section_lag=float(np.median(lags)) if lags else None,
        low=_floats(np.median(grey[:, 0], axis=0)),
        high=_floats(np.median(grey[:, 1], axis=0)),
        mean=_floats(means.mean(0)),
        sd=_floats(np.sqrt((spreads**2).mean(0) + means.var(0))),
        brightness_varies=float((means.std(0) / spreads.mean(0).clip(1e-9)).max()),
        hounsfield=bool(np.median([s.hounsfield for s in samples]) > 0.5),
        left_right_axis=first.left_right_axis,
    )


class _Sample:
    """The facts of one case that need its pixels."""

    def __init__(self, dataset: Dataset, case: Case) -> None:
        # The image itself is not kept: a dozen volumes may not fit into memory together.
        if dataset.is_large(case):
            flat, foreground = self._look_at_parts(dataset, case)
        else:
            flat, foreground = self._look(dataset, case)
        self.hounsfield = bool(np.nanpercentile(flat, 0.5) < HOUNSFIELD_AIR)
        if self.hounsfield and foreground.any():
            # Of a CT the organs count, not the air around the patient (Isensee 2021).
            flat = flat[:, foreground]
        rows = [row[np.isfinite(row)] if np.isfinite(row).any() else np.zeros(1) for row in flat]
        self.low, self.high = np.array([np.percentile(row, [0.5, 99.5]) for row in rows]).T
        clipped = [row.clip(low, high) for row, low, high in zip(rows, self.low, self.high, strict=True)]
        self.mean, self.sd = np.array([row.mean() for row in clipped]), np.array([row.std() for row in clipped])

    def _look(self, dataset: Dataset, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """Read the case: a million of its values (C, N) float64, spread evenly, and which are of the foreground (N,)."""
        image, label = dataset.read_image(case), dataset.read_label(case)
        self.channels, self.name, self.left_right_axis = image.channels, image.path.name, _left_right_axis(image)
        self.thinnest = thinnest_class(label)
        self.section_lag = section_lag(image.array[0]) if label.ndim == 3 else None
        flat = image.array.reshape(image.channels, -1)
        # A million voxels a channel tell percentiles to three digits.
        stride = max(1, flat.shape[1] // VALUES_READ)
        return flat[:, ::stride].astype(np.float64), np.isin(label, dataset.legend.foreground).ravel()[::stride]

    def _look_at_parts(self, dataset: Dataset, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """The same of a case that is too large to be read: of parts spread over it, the same ones each time."""
        volume, label = dataset.open_image(case), dataset.open_label(case)
        self.channels, self.name, self.left_right_axis = volume.channels, volume.path.name, _left_right_axis(volume)
        boxes, share = looked_at(volume, VALUES_OF_LARGE)
        stride = max(1, int(share * math.prod(volume.shape_vox)) // VALUES_READ)
        values, foreground, thinnest = [], [], []
        for box in boxes:
            classes = label[box]
            values.append(volume.pixels[(slice(None), *box)].reshape(volume.channels, -1)[:, ::stride].astype(np.float64))
            foreground.append(np.isin(classes, dataset.legend.foreground).ravel()[::stride])
            thinnest.append(thinnest_class(classes))
        # In most parts of a sparse annotation no two classes touch.
        known = [thickness for thickness in thinnest if np.isfinite(thickness)]
        self.thinnest = float(np.median(known)) if known else np.inf
        middle = middle_of(volume, LAG_SIDES[-len(volume.shape_vox) :])
        self.section_lag = section_lag(volume.pixels[(slice(0, 1), *middle)][0]) if len(middle) == 3 else None
        return np.concatenate(values, axis=1), np.concatenate(foreground)


def thinnest_class(label: np.ndarray) -> float:
    """2 x area / perimeter of the thinnest class of a label map, voxels in the plane of the last two axes.

    A wall of thickness t has area t x L and perimeter 2 L, so this is t. Only borders between two classes count:
    not those to unannotated voxels or to the edge of the image. Infinite where there is no border.
    """
    planes = label.reshape(-1, *label.shape[-2:])
    # Of a sparse annotation those sections that hold most of it.
    annotated = (planes >= 0).sum(axis=(1, 2))
    planes = planes[annotated > 0.5 * annotated.max()]
    planes = planes[np.linspace(0, len(planes) - 1, min(len(planes), 16)).round().astype(int)]
    found = [np.inf]
    for k in np.unique(planes[planes >= 0]):
        inside, other = planes == k, (planes != k) & (planes >= 0)
        border = 0
        for axis in (1, 2):
            a = np.take(inside, range(planes.shape[axis] - 1), axis), np.take(inside, range(1, planes.shape[axis]), axis)
            b = np.take(other, range(planes.shape[axis] - 1), axis), np.take(other, range(1, planes.shape[axis]), axis)
            border += int((a[0] & b[1]).sum() + (a[1] & b[0]).sum())
        if border:
            found.append(2 * int(inside.sum()) / border)
    return float(min(found))


def section_lag(volume: np.ndarray) -> float:
    """How far apart, in voxels along a row, pixels are as unlike as pixels of neighbouring sections; at least 1.

    In a volume of cubic voxels this is about 1; in a stack of thick sections it is the ratio of their thickness to
    the pixel size, as far as the tissue looks alike in all directions.
    """
    volume = volume[: 64 * 3, :1024, :1024].astype(np.float32)
    if volume.shape[0] < 2 or volume.std() == 0:
        return 1.0
    across = _unlike(volume[1:], volume[:-1])
    lag = 1
    while lag < min(64, volume.shape[2] // 2) and _unlike(volume[:, :, lag:], volume[:, :, :-lag]) < 0.9 * across:
        lag += 1
    return float(lag)


def _unlike(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared difference of two arrays: what a variogram shows at one distance."""
    return float(((a - b) ** 2).mean())


def _headers(dataset: Dataset, cases: Sequence[Case]) -> tuple[list[Shape], list[Spacing], list[bool], list[str]]:
    """Shape, spacing, whether that is stated, and format of each case, from the files' headers alone."""
    shapes, spacings, known, formats = [], [], [], []
    for case in cases:
        # Parts of one stack carry its name with their sections behind it.
        header = dataset.headers[case.name if case.name in dataset.headers else case.name.rpartition("[")[0]]
        shape = list(header.shape_vox)
        if case.sections:
            shape[0] = case.sections[1] - case.sections[0]
        shapes.append(tuple(shape))
        spacings.append(tuple(dataset.config.spacing_mm or header.spacing_mm)[-len(shape) :])
        known.append(header.spacing_known or dataset.config.spacing_mm is not None)
        formats.append(header.format)
    return shapes, spacings, known, formats


def _check_alike(dataset: Dataset, cases: Sequence[Case], shapes: Sequence[Shape], samples: Sequence[_Sample]) -> None:
    """Refuse a dataset that no single network can take."""
    for case, shape in zip(cases, shapes, strict=True):
        if len(shape) != len(shapes[0]):
            got = f"{case.name} of {format_shape(shape)} beside {cases[0].name} of {format_shape(shapes[0])}"
            raise DataError(
                dataset.root, expected="only 2D images or only volumes", got=got, do="put them into separate folders", code="D037"
            )
    channels = {sample.channels: sample.name for sample in samples}
    if len(channels) > 1:
        got = ", ".join(f"{name} with {count}" for count, name in channels.items())
        raise DataError(
            dataset.root,
            expected="the same number of channels in every image",
            got=got,
            do="convert them (all grey or all RGB)",
            code="D036",
        )


def _left_right_axis(image: Image | Volume) -> int | None:
    """The array axis along which world x, a patient's left-right in NIfTI, changes most."""
    if image.format not in PATIENT_FORMATS or len(image.affine) != 4:
        return None
    return int(np.abs(image.affine[0, :-1] / np.linalg.norm(image.affine[:-1, :-1], axis=0)).argmax())


def _floats(values: np.ndarray) -> tuple[float, ...]:
    """An array as a tuple of Python floats, with as many digits as matter."""
    return tuple(float(f"{value:.6g}") for value in values)
