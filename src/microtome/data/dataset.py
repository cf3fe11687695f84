"""A folder as people have it -> Dataset: named cases, a legend of classes, and arrays on request."""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from microtome.data.case import NOT_ANNOTATED, Case, Declared, Finding, LabelValue, Layout
from microtome.data.classes import LegendRules, choose_background, doubts, make_legend, void_doubts
from microtome.data.containers import container_layout, contents_of
from microtome.data.description import DatasetConfig, as_stored, load_description, unknown_name
from microtome.data.headers import channel_names, geometry_findings
from microtome.data.inputs import list_images
from microtome.data.labels import LabelScan, class_counts, label_findings, read_label_image, scan_labels
from microtome.data.layouts import find_layout
from microtome.data.legend import Legend, label_codes
from microtome.data.names import relative_words, stem_of
from microtome.data.parts import MOST_WHOLE, image_part, middle_of, parts_of
from microtome.data.planes import keep_planes
from microtome.data.reading import (
    PARTED,
    LabelParts,
    checked_label,
    cut,
    cut_volume,
    fit_channels,
    fit_volume,
    open_case,
    open_label_parts,
    read_case_image,
    stack_channels,
    with_spacing,
)
from microtome.errors import DataError, DataWarning
from microtome.files import check_name
from microtome.images.files import probe_image
from microtome.images.image import Header, Image
from microtome.images.volume import Volume
from microtome.threads import looked_at_in_threads

__all__ = [
    "NOT_ANNOTATED",
    "Case",
    "Dataset",
    "DatasetConfig",
    "Finding",
    "LabelValue",
    "Legend",
    "fit_channels",
    "list_images",
    "open_dataset",
    "open_pair",
    "read_case_image",
]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The cases of a folder and all that is known of them without their images' pixels.

    Attributes:
        root: the folder.
        layout: how files were found and paired, in words.
        cases: all of them, labelled or not, in natural order of their names.
        legend: its classes.
        findings: what a person should know before training.
        config: its `microtome.yaml`.
        channel_names: a name for each channel of `read_image`.
        class_counts: case -> voxels of each class, and last those not annotated; of every readable label.
        headers: case -> header of its first image, of every labelled case whose image can be read.
        per_instance: whether each label file is the mask of one object.
        unreadable: labelled cases of which a file cannot be read; each is among the findings.
    """

    root: Path
    layout: str
    cases: tuple[Case, ...]
    legend: Legend
    findings: tuple[Finding, ...] = ()
    config: DatasetConfig = field(default_factory=DatasetConfig)
    channel_names: tuple[str, ...] = ()
    class_counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    headers: Mapping[str, Header] = field(default_factory=dict)
    per_instance: bool = False
    unreadable: frozenset[str] = frozenset()

    @property
    def labelled(self) -> tuple[Case, ...]:
        """The cases that can be trained on or scored: with a label, and all their files readable."""
        return tuple(case for case in self.cases if case.labels and case.name not in self.unreadable)

    def read_image(self, case: Case) -> Image:
        """The image of a case, (C, *S), C as in `channel_names`, at the spacing that `microtome.yaml` states, its sections only.

        Grey among colour pictures becomes three equal channels.

        Raises:
            DataError: a file cannot be read, or its channels do not fit.
            ConfigError: the stated spacing has another number of axes.
        """
        if case.sections is not None and self.is_parted(case):
            return self.open_image(case).load()
        image = stack_channels(case)
        if self.channel_names:
            image = fit_channels(image, len(self.channel_names))
        return cut(with_spacing(image, self.config.spacing_mm), case.sections)

    def read_pair(self, case: Case) -> tuple[Image, np.ndarray]:
        """Image and label (*S) of a labelled case; of a case that `is_large` the part in its middle that is not.

        Raises:
            DataError: as `read_image` and `read_label`.
        """
        if not self.is_large(case):
            return self.read_image(case), self.read_label(case)
        volume = self.open_image(case)
        side = int((MOST_WHOLE // volume.channels) ** (1 / len(volume.shape_vox)))
        box = middle_of(volume, (side,) * len(volume.shape_vox))
        return image_part(volume, box), self.open_label(case)[box]

    def open_image(self, case: Case) -> Volume:
        """What `read_image` gives, not read yet.

        Raises:
            DataError: a file cannot be opened, or its channels do not fit.
            ConfigError: the stated spacing has another number of axes.
        """
        volume = open_case(replace(case, sections=None))
        if self.channel_names:
            volume = fit_volume(volume, len(self.channel_names))
        return cut_volume(with_spacing(volume, self.config.spacing_mm), case.sections)

    def open_label(self, case: Case) -> LabelParts:
        """What `read_label` gives, not read yet; of a case that `is_parted` or `is_large`.

        Raises:
            DataError: the file cannot be opened, or the label is not on the image's grid.
        """
        return open_label_parts(case, self.legend)

    def is_parted(self, case: Case) -> bool:
        """Whether image and label are one file or store each, of which parts are read without the rest."""
        if len(case.images) != 1 or len(case.labels) != 1 or self.per_instance or self.header(case).format not in PARTED:
            return False
        label = probe_image(case.labels[0])
        return label.format in PARTED and label.channels == 1

    def is_large(self, case: Case) -> bool:
        """Whether a case has so many values that it is looked at part by part."""
        if len(case.images) != 1 or len(case.labels) != 1 or self.per_instance or case.name in self.unreadable:
            return False
        header = self.headers.get(case.name, self.headers.get(case.name.rpartition("[")[0]))
        if header is None:
            return False
        length = header.shape_vox[0] if case.sections is None else case.sections[1] - case.sections[0]
        if length * math.prod(header.shape_vox[1:]) * header.channels <= MOST_WHOLE:
            return False
        return probe_image(case.labels[0]).channels == 1

    def header(self, case: Case) -> Header:
        """The header of a labelled case, or of the stack that it is a part of."""
        # Parts of one stack carry its name with their sections behind it.
        return self.headers[case.name if case.name in self.headers else case.name.rpartition("[")[0]]

    def read_label(self, case: Case) -> np.ndarray:
        """The label map of a labelled case, (*S) int16: classes of the legend, NOT_ANNOTATED elsewhere; its sections and planes only.

        Raises:
            DataError: a file cannot be read, or the label is not on the image's grid.
        """
        if case.sections is not None and self.is_parted(case):
            parts = self.open_label(case)
            return parts[(slice(None),) * len(parts.shape)]
        label = self._label_image(case)
        if self.per_instance:
            label = replace(label, array=(label.array > 0).view(np.uint8))
        return keep_planes(self.legend.decode(label), case)

    def annotated_sections(self, case: Case) -> np.ndarray:
        """Which sections (rows of a picture) of a labelled case hold an annotated voxel, bool along the slowest axis of S.

        Raises:
            DataError: as `read_label`.
        """
        if not self.is_large(case):
            label = self.read_label(case)
            found: np.ndarray = (label != NOT_ANNOTATED).reshape(len(label), -1).any(axis=1)
            return found
        parts = self.open_label(case)
        found = np.zeros(parts.shape[0], bool)
        for box in parts_of(parts.shape, parts.volume.chunk_vox):
            part = parts[box]
            found[box[0]] |= (part != NOT_ANNOTATED).reshape(len(part), -1).any(axis=1)
        return found

    def read_instances(self, case: Case) -> np.ndarray | None:
        """The objects of a labelled case, (*S) int32: 0 background, one number an object; None if labels are classes.

        What is not annotated is NOT_ANNOTATED here too.

        Raises:
            DataError: as `read_label`.
        """
        if self.legend.kind != "instances":
            return None
        codes, colour = label_codes(self._label_image(case))
        if codes.dtype.itemsize >= 4 and codes.max(initial=0) > np.iinfo(np.int32).max:
            # Numbers beyond int32 keep their order and lose their gaps.
            unique = np.union1d(codes, [0])
            objects = np.searchsorted(unique, codes).astype(np.int32)
        else:
            objects = codes.astype(np.int32)
        objects[self.legend.lookup(codes, colour=colour) == NOT_ANNOTATED] = NOT_ANNOTATED
        return keep_planes(objects, case)

    def _label_image(self, case: Case) -> Image:
        """The label file or files as one image on the grid of the case's image."""
        if not case.labels:
            raise DataError(case.name, expected="a labelled case", got="no label file", do="take a case of `labelled`", code="D032")
        label, _ = read_label_image(case, palette=self.legend.palette, per_instance=self.per_instance)
        return cut(checked_label(case, label), case.sections)


def open_dataset(path: Path) -> Dataset:
    """Find the cases of a folder, pair images with labels by name, and read every label once for its classes.

    Understands images/ + labels/ (or masks/, annotations/, ...), pairs side by side in one folder, a folder a case,
    Kaggle's one mask an instance, the Medical Segmentation Decathlon and nnU-Net raw data, files and stores that hold
    image and label (HDF5 with raw + label, OME-Zarr with labels/), of which a single one may be given too; `microtome.yaml`
    in the folder, or beside the single file, says what cannot be seen.

    Raises:
        DataError: no such folder; nothing in it that pairs; not one label that can be read; a name that is not UTF-8.
        ConfigError: `microtome.yaml` says something that cannot be.

    Warns:
        DataWarning: volumes without a voxel size, once a dataset.
    """
    root = Path(path)
    if contents_of(root):
        return _open_container(root)
    if not root.is_dir():
        got = "a file" if root.exists() else "nothing there"
        raise DataError(root, expected="a folder of images and labels", got=got, do="give the folder that holds both", code="D001")
    config, named_by = load_description(root)
    layout = find_layout(root, config, named_by)
    config = as_stored(config, (case.name for case in layout.cases))
    layout = replace(layout, cases=_grouped(layout.cases, config, named_by))
    return _opened(root, layout, config, named_by)


def _open_container(path: Path) -> Dataset:
    """A file or store that holds an image and its label as a dataset of one case."""
    config, named_by = load_description(path.parent)
    # What is said of cases is said of the folder's.
    config = config.model_copy(update={"pairs": {}, "groups": {}, "group_by": None, "validation": ()})
    layout = container_layout(path.parent, [path], config.images, config.labels)
    if layout is None:
        do = "give the folder that holds both, or a file with both (HDF5 with raw + label, OME-Zarr with labels/)"
        raise DataError(
            path, expected="a folder of images and labels", got=f"a {path.suffix or 'store'} without a label in it", do=do, code="D031"
        )
    return _opened(path, layout, config, named_by)


def open_pair(image: Path, label: Path, config: DatasetConfig, named_by: str) -> Dataset:
    """One image and its label as a dataset of one case, wherever the two files lie and whatever they are called.

    Args:
        image: the image file; its folder is the dataset's root, its stem the case's name.
        label: the label file.
        config: what a `microtome.yaml` would say; what it says of layout, groups and validation is not looked at.
        named_by: who says that, for messages.

    Raises:
        DataError: the label cannot be read, or holds nothing that is annotated.
        ConfigError: as `open_dataset`.

    Warns:
        DataWarning: a volume without a voxel size.
    """
    case = Case(name=stem_of(image), images=(image,), labels=(label,), group=stem_of(image))
    return _opened(image.parent, Layout(sentence=f"{image.name} with {label.name}", cases=(case,)), config, named_by)


def _opened(root: Path, layout: Layout, config: DatasetConfig, named_by: str) -> Dataset:
    """The dataset of files that are paired: every label read once for its classes, every header for its geometry."""
    for path in (root, *(file for case in layout.cases for file in (*case.images, *case.labels))):
        check_name(path)
    labelled = [case for case in layout.cases if case.labels]
    declared = _declared(config, layout, named_by)
    with warnings.catch_warnings(record=True) as caught:
        # What a reader assumes is a finding here; reading the file again for its pixels warns.
        warnings.simplefilter("always", DataWarning)
        scans, faults = _scan(labelled, declared, layout)
        headers, image_faults = _probe(labelled)
    if not scans:
        raise next(iter(faults.values()))
    rules = LegendRules(declared=declared, instances=config.instances, per_instance=layout.per_instance, object_name=layout.object_name)
    legend = choose_background(make_legend(scans, rules), config, named_by)
    names, channel_findings = channel_names(headers, labelled, layout)
    findings = [
        *layout.findings,
        *(_unreadable(case, case.images, image_faults[case.name]) for case in labelled if case.name in image_faults),
        *(_unreadable(case, case.labels, faults[case.name]) for case in labelled if case.name in faults),
        *(Finding(severity="note", code="assumed", message=text) for text in dict.fromkeys(str(warning.message) for warning in caught)),
        *doubts(scans, rules),
        *void_doubts(scans, legend, declared),
        *_group_findings(layout.cases, config, named_by),
        *label_findings(scans, legend, Path(declared.source).name if declared.classes else ""),
        *channel_findings,
        *geometry_findings(headers, labelled, config),
    ]
    return Dataset(
        root=root,
        layout=layout.sentence,
        cases=layout.cases,
        legend=legend,
        findings=tuple(replace(finding, message=relative_words(root, finding.message)) for finding in findings),
        config=config,
        channel_names=names,
        class_counts=MappingProxyType({scan.case: class_counts(scan, legend) for scan in scans}),
        headers=MappingProxyType(headers),
        per_instance=layout.per_instance,
        unreadable=frozenset(faults.keys() | image_faults.keys()),
    )


def _grouped(cases: Sequence[Case], config: DatasetConfig, named_by: str) -> tuple[Case, ...]:
    """The cases with the group that `groups:` or `group_by:` gives them, their own name by default."""
    known = {case.name for case in cases}
    for kind, names in (("groups", [name for members in config.groups.values() for name in members]), ("validation", config.validation)):
        for name in names:
            if name not in known:
                raise unknown_name(named_by, kind, name, known)
    stated = {name: group for group, members in config.groups.items() for name in members}

    def group_of(name: str) -> str:
        match = re.search(config.group_by, name) if config.group_by else None
        return stated.get(name) or (match[1] if match else None) or name

    return tuple(replace(case, group=group_of(case.name)) for case in cases)


def _group_findings(cases: Sequence[Case], config: DatasetConfig, named_by: str) -> list[Finding]:
    """A pattern of groups that groups nothing, or not everything, is a mistake that a split would hide."""
    if not config.group_by:
        return []
    matched = [case for case in cases if re.search(config.group_by, case.name)]
    if len(matched) == len(cases):
        return []
    missing = next(case.name for case in cases if case not in matched)
    message = (
        f"{Path(named_by).name}: `group_by` matches {len(matched)} of {len(cases)} cases (not {missing}); the others are groups of one"
    )
    return [Finding(severity="warning", code="group-by-misses", message=message)]


def _declared(config: DatasetConfig, layout: Layout, named_by: str) -> Declared:
    """What `microtome.yaml` says of the classes, and where it is silent the layout's own document."""
    if config.classes:
        return Declared(classes=config.classes, ignored=config.not_annotated, source=named_by)
    if config.not_annotated is not None:
        return Declared(classes=layout.declared.classes, ignored=config.not_annotated, source=layout.declared.source or named_by)
    return layout.declared


def _scan(cases: Sequence[Case], declared: Declared, layout: Layout) -> tuple[list[LabelScan], dict[str, DataError]]:
    """Every label, palettes as numbers unless the classes are colours."""
    stated = any(isinstance(value, tuple) for values in declared.classes.values() for value in values)
    scans, faults = scan_labels(cases, palette="colours" if stated else "indices", per_instance=layout.per_instance)
    if not stated and any(scan.colour for scan in scans) and not all(scan.colour for scan in scans):
        return scan_labels(cases, palette="colours", per_instance=layout.per_instance)
    return scans, faults


def _probe(cases: Sequence[Case]) -> tuple[dict[str, Header], dict[str, DataError]]:
    """The header of each case's first image, and the faults of those without; channels of all files are summed."""

    def probe(case: Case) -> Header | DataError:
        try:
            headers = [probe_image(path) for path in case.images]
        except DataError as error:
            return error
        return replace(headers[0], channels=sum(header.channels for header in headers))

    found = list(zip((case.name for case in cases), looked_at_in_threads(probe, cases), strict=True))
    headers = {name: result for name, result in found if isinstance(result, Header)}
    return headers, {name: result for name, result in found if isinstance(result, DataError)}


def _unreadable(case: Case, files: tuple[Path, ...], error: DataError) -> Finding:
    """The finding that a file cannot be read."""
    message = " ".join(str(error).split())
    return Finding(severity="error", code="unreadable", case=case.name, message=message, files=files, fault=error.code)
