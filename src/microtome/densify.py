"""One volume and the few planes of it that somebody painted -> the whole volume labelled: 3D U-Net's semi-automated use.

Çiçek et al. 2016, arXiv:1606.06650: a network that learns from sparse annotation of a volume fills in the rest of it.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from microtome.config import Plan
from microtome.data.case import NOT_ANNOTATED, Case, LabelValue, Plane, Planes
from microtome.data.classes import LegendRules, make_legend
from microtome.data.dataset import Dataset, DatasetConfig, open_pair, read_case_image
from microtome.data.description import load_description
from microtome.data.labels import MOST_CLASSES, LabelScan, count_codes, read_label_image
from microtome.data.legend import code_of, format_value, label_codes, value_of
from microtome.data.names import some
from microtome.data.planes import annotated_planes, in_planes, parse_planes, plane_name
from microtome.data.reading import checked_label
from microtome.errors import ConfigError, DataError, RunError
from microtome.evaluation.gallery import draw_filled
from microtome.evaluation.report import build_report
from microtome.files import write_json
from microtome.images.files import probe_image, stem_of, suffix_of, write_labels
from microtome.images.image import Header, Image
from microtome.inference.predictor import load
from microtome.training.initial import Start
from microtome.training.loop import Event
from microtome.training.rehearsal import make_plan
from microtome.training.run import train

# Names that a label map may have, by what the image file really is; of any other format it is a PNG.
SUFFIXES = MappingProxyType(
    {
        "tiff": (".tif", ".tiff", ".ome.tif", ".ome.tiff"),
        "nifti": (".nii.gz", ".nii"),
        "dicom": (".nii.gz", ".nii"),
        "nrrd": (".nrrd",),
        "metaimage": (".mha",),
        "hdf5": (".h5",),
        "npy": (".npy",),
        **dict.fromkeys(("zarr", "n5", "precomputed"), (".ome.zarr",)),
    }
)
# 0 is what nobody looked at where it fills this share of the voxels, and is so many times as frequent as any class.
ZERO_SHARE, ZERO_TIMES = 0.5, 2
# These are never painted where they occur nowhere but outside of the planes that were named; nor is what fills this share there.
UNSEEN, FILLER_SHARE = (0, 255, NOT_ANNOTATED), 0.5
# Fewer steps teach next to nothing, however few were planned.
FEW_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class DensifyOptions:
    """How to densify.

    Attributes:
        minutes: wall time of the training; None with `steps`.
        steps: exactly so many optimiser steps, instead.
        not_annotated: the value of voxels that nobody looked at; None: found out, see `open_sketch`.
        planes: these planes are annotated in full and nothing else is: `z10,z20,y40`, counted from 0; empty: not said.
        holdout: keep every fifth annotated plane back and score there what the others taught. Without it all of them
            train, and nothing tells how good the result is.
        network: a name that `microtome networks` lists; None: the recipe's.
        recipe: as `train --recipe` takes it.
        run: folder of the run, with model and report; None: beside the output, `<its name>.run`.
        device: "auto", "cpu" or "cuda".
        seed: of everything random.
    """

    minutes: float | None = None
    steps: int | None = None
    not_annotated: int | None = None
    planes: str = ""
    holdout: bool = False
    network: str | None = None
    recipe: str = "default"
    run: Path | None = None
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """A volume and its sparse annotation, checked, before any work.

    Attributes:
        dataset: of the one case.
        out: the file to write.
        run: the folder of the run.
        options: as given.
        reason: in words, which voxels count as annotated, and why.
    """

    dataset: Dataset
    out: Path
    run: Path
    options: DensifyOptions
    reason: str

    def plan(self, say: Callable[[str], None] = lambda line: None) -> Plan:
        """A plan as `make_plan` makes it, that trains on all that is annotated, or with `holdout` on four fifths of the planes."""
        options = self.options
        words: dict[str, Any] = {"network": options.network, "recipe": options.recipe, "device": options.device, "seed": options.seed}
        words |= {"fold": "1/5", "holdout": "slices"} if options.holdout else {"fold": "all"}
        return make_plan(self.dataset, minutes=options.minutes, steps=options.steps, say=say, **words)


def open_sketch(image: Path, annotation: Path, out: Path, options: DensifyOptions) -> Sketch:
    """Check an image, its annotation and where the result is to go.

    What is not annotated is, by the first that applies: `options.not_annotated`; what the `microtome.yaml` beside the
    image says; everything outside of `options.planes`; -1, or 255 beside small class numbers; 0, where most voxels have
    it and two classes or more stand beside it. Where 0 stands beside a single value nobody can tell.

    Args:
        image: a volume, or a picture, in one file.
        annotation: a label file on its grid.
        out: a file that is not there yet, named as the image's format asks.
        options: as given.

    Raises:
        DataError: a file cannot be read, the two do not fit, too little or all of it is annotated, or something was painted
            outside of the planes that were named.
        ConfigError: `out` or the run folder is taken or misnamed, what is not annotated cannot be told, or there are no two
            planes of which one could be held out.
    """
    header = probe_image(image)
    _check_out(out, header)
    run = out.with_name(f"{stem_of(out)}.run") if options.run is None else options.run
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ConfigError(
            run, expected="a new or empty folder for the run", got="one with files in it", do="remove it or give another --run", code="C005"
        )
    planes = parse_planes(options.planes, header.shape_vox) if options.planes else ()
    case = Case(name=stem_of(image), images=(image,), labels=(annotation,), planes=Planes(shown=planes) if planes else None)
    config, named_by = load_description(image.parent)
    colours = any(isinstance(value, tuple) for values in config.classes.values() for value in values)
    label = checked_label(case, read_label_image(case, palette="colours" if colours else "indices")[0])
    ignored, reason = _Values(case, label, planes).ignored(config, options.not_annotated)
    config = DatasetConfig(
        classes=config.classes, background=config.background, spacing_mm=config.spacing_mm, instances=False, not_annotated=ignored
    )
    dataset = open_pair(image, annotation, config, named_by)
    dataset = replace(dataset, cases=(replace(dataset.cases[0], planes=case.planes),))
    dataset = _checked(dataset, annotation)
    if options.holdout:
        _check_holdout(dataset)
    return Sketch(dataset=dataset, out=out, run=run, options=options, reason=reason)


def densify(sketch: Sketch, plan: Plan, *, on_event: Callable[[Event], None] = lambda event: None, started: float | None = None) -> Path:
    """Train on what is annotated and write the whole volume, in the image's geometry and with the annotation's values.

    What somebody annotated stays as it is, planes that were held out included; only the rest is predicted. The run's report
    shows some sections of it.

    Args:
        sketch: as `open_sketch` gives it.
        plan: as `sketch.plan()` gives it, maybe changed.
        on_event: as of `train`; the reason of an end after fewer than `FEW_STEPS` steps says so.
        started: as of `train`.

    Returns:
        the file written; model and report are in `sketch.run`.

    Raises:
        RunError: as `train`; a full disk.
    """
    device, dataset = sketch.options.device, sketch.dataset
    try:
        folder = train(dataset, plan, sketch.run, device=device, on_event=_warning(on_event, plan), start=Start(started))
    except RunError as error:
        # A training says how to resume it, which is no option here.
        do = f"densify again with another --run, or remove {sketch.run} first; where time or space was short, with more of it"
        raise RunError(error.where, expected=error.expected, got=error.got, do=do, code=error.code) from error
    image = read_case_image(dataset.cases[0])
    label = dataset.read_label(dataset.cases[0])
    dense = np.where(label == NOT_ANNOTATED, load(folder, device=device)(image), label)
    write_labels(sketch.out, dataset.legend.encode(dense), like=image)
    # Once more, now that there is something to show.
    write_json(folder / "filled.json", draw_filled(image, label, dense, dataset))
    build_report(folder, dataset=dataset)
    return sketch.out


def _warning(on_event: Callable[[Event], None], plan: Plan) -> Callable[[Event], None]:
    """The same listener, to whom an end after a handful of steps is one that went wrong, even where no more were planned."""

    def listen(event: Event) -> None:
        if event["event"] == "end" and event["step"] < FEW_STEPS and "planned steps" not in event["reason"]:
            made = f"only {event['step']} of {plan.steps} planned steps were made"
            event = {**event, "reason": f"{made}, too few to learn from: give more minutes, or an idler machine"}
        on_event(event)

    return listen


def _check_out(out: Path, header: Header) -> None:
    """Refuse a file that is there, and a name that the image's format does not have."""
    suffixes = SUFFIXES.get(header.format, (".png",))
    if suffix_of(out) not in suffixes:
        raise ConfigError(
            out, expected=f"a name ending in {' or '.join(suffixes)}", got=f"`{out.name}`", do="name --out as the image", code="C004"
        )
    if os.path.lexists(out):
        raise ConfigError(
            out, expected="a file that is not there yet", got="one that is", do="give another --out or remove it", code="C005"
        )


class _Values:
    """The values of an annotation: those in its planes, if planes were named, and those outside of them."""

    def __init__(self, case: Case, label: Image, planes: tuple[Plane, ...]) -> None:
        self.file, self.planes = case.labels[0], planes
        self.codes, self.colour = label_codes(label)
        inside = in_planes(label.shape_vox, planes)
        self.counts: Mapping[int, int] = count_codes(self.codes[inside] if planes else self.codes)
        self.outside = count_codes(self.codes[~inside]) if planes else {}
        self.scan = LabelScan(
            case=case.name,
            files=case.labels,
            counts=self.counts,
            colour=self.colour,
            eight_bit=label.array.dtype == np.uint8,
            format=label.format,
            shape_vox=label.shape_vox,
        )

    def ignored(self, config: DatasetConfig, asked: int | None) -> tuple[tuple[LabelValue, ...], str]:
        """The values that mean "not annotated", and in words what counts as annotated and why."""
        self._check_uniform()
        values, reason = self._of_the_file(config, asked)
        if self.planes:
            classes = {value for each in config.classes.values() for value in each}
            self._check_outside(config, classes, values)
            lone = {value_of(code, self.colour) for code in self.outside.keys() - self.counts.keys()} - classes - set(values)
            said = some(map(plane_name, self.planes), 12)
            return (*values, *sorted(lone, key=str)), f"annotated in {said} as asked{'; there ' + reason if reason else ''}"
        return values, reason

    def _of_the_file(self, config: DatasetConfig, asked: int | None) -> tuple[tuple[LabelValue, ...], str]:
        """The same without regard to what lies outside of the planes."""
        if asked is not None:
            self._check_asked(asked)
            return (asked,), f"{asked} means not annotated, as asked"
        if config.not_annotated is not None:
            return config.not_annotated, f"{some(map(format_value, config.not_annotated))} means not annotated, says microtome.yaml"
        custom = make_legend([self.scan], LegendRules(instances=False)).ignored
        if custom:
            return custom, f"{some(map(format_value, custom))} means not annotated by custom (--not-annotated says otherwise)"
        zero = value_of(0, self.colour)
        if self.planes or 0 not in self.counts or any(zero in values for values in config.classes.values()):
            return (), ""
        return self._zero()

    def _check_uniform(self) -> None:
        """Refuse an annotation that is one value all over."""
        codes = self.counts.keys() | self.outside.keys()
        if len(codes) == 1:
            (code,) = codes
            everywhere = f"{format_value(value_of(code, self.colour))} everywhere"
            got = f"nothing is annotated: {everywhere}" if code in UNSEEN else everywhere
            what = "a few planes" if self.codes.ndim == 3 else "a few places"
            raise DataError(
                self.file,
                expected="annotated voxels of two classes at least",
                got=got,
                do=f"paint {what}, background included",
                code="D044",
            )

    def _check_outside(self, config: DatasetConfig, classes: set[LabelValue], ignored: tuple[LabelValue, ...]) -> None:
        """Refuse to throw away what somebody painted outside of the planes that were named."""
        background = config.classes.get(config.background or "background", ())
        plain = {0, *(code_of(value, self.colour) for value in (*background, *ignored))}
        total = sum(self.outside.values())
        for code in self.outside.keys() - self.counts.keys():
            # Of no class that is named or occurs in the planes: nobody paints as much as that, or with such a value.
            fills = self.outside[code] >= FILLER_SHARE * total or (code in UNSEEN and not self.colour)
            if fills and value_of(code, self.colour) not in classes:
                plain.add(code)
        painted = [code for code in self.outside if code not in plain]
        if painted:
            outside = np.isin(self.codes, painted) & ~in_planes(self.codes.shape, self.planes)
            count, found = np.count_nonzero(outside), annotated_planes(np.where(outside, 1, NOT_ANNOTATED))
            where = f"most of them in {some(map(plane_name, found), 6)}" if found else "all over the volume"
            raise DataError(
                self.file,
                expected=f"nothing painted outside of {some(map(plane_name, self.planes), 6)}",
                got=f"{count:,} painted {'voxel' if count == 1 else 'voxels'} there, {where}",
                do="name these planes too, or leave out --planes",
                code="D046",
            )

    def _check_asked(self, asked: int) -> None:
        """Refuse a value that occurs nowhere: it is a slip."""
        found = [value_of(code, self.colour) for code in sorted(self.counts.keys() | self.outside.keys())]
        if asked not in found and (asked,) * 3 not in found:
            listed = some(map(format_value, found), 8)
            raise ConfigError(
                "--not-annotated", expected=f"a value of {self.file.name} ({listed})", got=str(asked), do="give one of these", code="C021"
            )

    def _zero(self) -> tuple[tuple[LabelValue, ...], str]:
        """0, if it can be told that nobody looked there."""
        zero, others = self.counts[0], {code: count for code, count in self.counts.items() if code}
        share = zero / sum(self.counts.values())
        listed = some((format_value(value_of(code, self.colour)) for code in others), 8)
        if len(others) >= 2 and share >= ZERO_SHARE and zero >= ZERO_TIMES * max(others.values()):
            black = value_of(0, self.colour)
            reason = f"{format_value(black)} means not annotated: {share:.0%} of the voxels have it, and {listed} stand beside it"
            hint = " (where it is background in planes that were painted in full, name these with --planes)"
            return (black,), reason + (hint if self.codes.ndim == 3 else "")
        got = f"0 ({share:.0%} of the voxels) beside {listed or 'nothing else'}, so that 0 may be background or unseen"
        raise ConfigError(
            self.file,
            expected="annotation that shows what nobody looked at",
            got=got,
            do=f"{self._proposal()}paint the background with a value of its own, "
            "or give what nobody looked at a value of its own and name it with --not-annotated",
            code="C021",
        )

    def _proposal(self) -> str:
        """Words that propose `--planes` of a volume, with the planes that hold what is not 0 where that is a few."""
        if self.codes.ndim != 3:
            return ""
        found = annotated_planes(np.where(self.codes == 0, NOT_ANNOTATED, 1))
        planes = ",".join(map(plane_name, found)) if found and len(found) <= 12 else "z10,z20,y40"
        return f"name the planes that were painted in full (--planes {planes}), or "


def _checked(dataset: Dataset, annotation: Path) -> Dataset:
    """The dataset with counts of what its planes show, if there is something to learn from and something to fill."""
    case, names = dataset.cases[0], dataset.legend.names
    label = dataset.read_label(case)
    found, or_planes = count_codes(label), " or --planes" if label.ndim == 3 else ""
    counts = tuple(found.get(index, 0) for index in (*range(len(names)), NOT_ANNOTATED))
    annotated = [name for name, count in zip(names, counts, strict=False) if count]
    if len(annotated) < 2:
        got = f"only {annotated[0]}" if annotated else "nothing that is annotated"
        do = "annotate the background too" + or_planes.replace(" or", ", or name")
        raise DataError(annotation, expected="annotated voxels of two classes at least", got=got, do=do, code="D044")
    if not counts[-1]:
        raise DataError(
            annotation,
            expected="voxels that nobody annotated, to fill them",
            got=f"{some(annotated)} everywhere",
            do=f"name what is not annotated with --not-annotated{or_planes}",
            code="D045",
        )
    if len(annotated) > MOST_CLASSES:
        got = f"{len(annotated)} values"
        raise DataError(
            annotation, expected=f"classes, {MOST_CLASSES} at most", got=got, do="give all objects of a class one value", code="D047"
        )
    return replace(dataset, class_counts=MappingProxyType({case.name: counts}))


def _check_holdout(dataset: Dataset) -> None:
    """Refuse to hold planes out where there are no two of them."""
    case = dataset.cases[0]
    label = dataset.read_label(case)
    what, planes = "a picture, which has no planes", None
    if label.ndim == 3:
        planes = case.planes.shown if case.planes else annotated_planes(label)
        what = "a volume in which no plane stands out" if not planes else f"one, {plane_name(planes[0])}"
    if not planes or len(planes) < 2:
        do = ("annotate another plane, or " if label.ndim == 3 else "") + "leave out --holdout slices"
        raise ConfigError("--holdout slices", expected="two annotated planes at least, to keep one back", got=what, do=do, code="C015")
