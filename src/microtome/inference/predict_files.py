"""Image files -> label files beside each other in a folder: which images, under which names, never over what others wrote."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from microtome.data.case import Case
from microtome.data.inputs import list_images
from microtome.data.listing import Listing, continued_listing, forget_empty, recording
from microtome.data.reading import open_case
from microtome.errors import ConfigError, DataError
from microtome.images.files import label_suffix, write_labels
from microtome.images.volume import url_of
from microtome.inference.asked import Options
from microtome.inference.finishing import STORE_SUFFIX, STORES, predict_maps, write_map
from microtome.inference.layout import TooLittleMemoryError
from microtome.inference.predictor import Predictor

# Folders in --out for what else was asked for.
MAPS = ("probabilities", "uncertainty", "disagreement", "instances")
# What `label_suffix` may give; stores are looked after by their own record.
LABEL_SUFFIXES = (".png", ".tif", ".nii", ".nii.gz", ".h5", ".npy", ".nrrd", ".mha", ".dcm")


def predict_files(
    predictor: Predictor,
    inputs: Sequence[Path],
    out: Path,
    *,
    options: Options = Options(),  # noqa: B008 - frozen
    on_done: Callable[[str, int, int], None] = lambda name, done, of: None,
    on_voxels: Callable[[str, int, int], None] = lambda name, done, of: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Label every image among `inputs` (files, folders, stores, datasets) into `out`; returns what was written.

    Each file appears when it is complete, beside it maps in folders of their own (`probabilities/`, `uncertainty/`, ...); a chunked
    image gets an OME-Zarr store, which goes on where a killed call left it. What cannot be labelled stops nothing: the others are
    written first.

    Raises:
        DataError: no images, two that would have the same name in `out`, `out` among the images or with files that
            `predict` did not write and would overwrite or with predictions of another legend, or (after all others)
            images that failed.
    """
    legend = predictor.bundle.legend
    options.check(legend)
    _check_out(inputs, out)
    listed = continued_listing(out, legend)
    cases = list(_cases(inputs, predictor.bundle.plan.channels))
    _check_names(cases, out, listed)
    written, failed = [], []
    # At a URL stores alone are written, which have their own record.
    listing = recording(out, legend, (safe_name(case.name) for case in cases)) if url_of(out) is None else nullcontext()
    with listing as record:
        for number, case in enumerate(cases, start=1):
            try:
                voxels = partial(on_voxels, case.name)
                words: dict[str, Any] = {"options": options, "images": len(cases) - number + 1, "on_voxels": voxels, "say": say}
                written.append(write_prediction(predictor, case, out, **words))
                if record is not None:
                    record.add(written[-1], case)
            except TooLittleMemoryError as error:
                failed.append(_memory_error(error, options, case))
            except DataError as error:
                failed.append(error)
            on_done(case.name, number, len(cases))
    if not written and url_of(out) is None:
        forget_empty(out)
    if failed and len(failed) < len(cases):
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        first, do = failed[0], f"mend it or leave it out; the other {len(written)} are in {out}"
        raise DataError(first.where, expected=first.expected, got=first.got + more, do=do, code=first.code)
    if failed:
        raise failed[0]
    return written


def write_prediction(
    predictor: Predictor,
    case: Case,
    out: Path,
    *,
    options: Options = Options(),  # noqa: B008 - frozen
    images: int = 1,
    on_voxels: Callable[[int, int], None] = lambda done, of: None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Predict one case, the first of so many to come, and write it, with the values of the training labels, under the case's name."""
    volume = open_case(case)
    if options.clean.min_size_mm and not volume.spacing_known:
        got, do = "none, and --min-size in mm", "give --min-size in voxels (50)"
        raise DataError(volume.path, expected="a voxel size in the file", got=got, do=do, code="D038")
    name = safe_name(case.name)
    if options.store or options.cluster or volume.format in STORES:
        # Late: what reads and writes stores is slow to import, and a picture needs none of it.
        from microtome.inference.storing import write_store

        return write_store(predictor, case, out / f"{name}{STORE_SUFFIX}", options, images=images, on_voxels=on_voxels, say=say)
    if (url := url_of(out)) is not None:
        raise DataError(
            url, expected=f"a folder for the label file of {case.name}", got="a URL", do="give --ome-zarr, or another --out", code="D029"
        )
    maps = predict_maps(predictor, volume, options, images=images, on_voxels=on_voxels, say=say)
    for kind, array in maps.items():
        if kind != "labels":
            write_map(out / kind / name, array, volume)
    path, legend = out / (name + label_suffix(volume)), predictor.bundle.legend
    if volume.format == "dicom":
        # A segment is named.
        names = {int(value[0]): word for word, value in zip(legend.names, legend.values, strict=True) if isinstance(value[0], int)}
        volume = replace(volume, extra={**volume.extra, "classes": names})
    write_labels(path, legend.encode(maps["labels"]), like=volume)
    return path


def _memory_error(error: TooLittleMemoryError, options: Options, case: Case) -> DataError:
    """The same in the words of the command line: how much for the whole process would be enough. Other images may need less."""
    enough = ((options.limit_bytes or 0) + error.short_bytes) / 1e9
    do = "give as much" if options.store else "give as much, or --ome-zarr, which holds a part of the labels at a time"
    return DataError(
        case.images[0],
        expected=f"--memory {math.ceil(enough * 10) / 10:g} or more",
        got=f"--memory {options.memory_gb:g}",
        do=do,
        code="D062",
    )


def safe_name(name: str) -> str:
    """A case's name as a file name: `stack[20:25]` becomes `stack_20-25`; folders stay folders."""
    return name.replace("[", "_").replace(":", "-").replace("]", "")


def _cases(inputs: Sequence[Path], channels: int) -> Iterator[Case]:
    """The images that paths mean, each once."""
    seen = set()
    for path in inputs:
        if url_of(path) is None and not path.exists() and not any(above.is_file() for above in path.parents):
            raise DataError(path, expected="an image or a folder", got="nothing there", do="check the path", code="D001")
        for case in list_images(path, channels=channels):
            # Not resolved: links of several names to one file are several images.
            place = tuple(str(image) if url_of(image) else os.path.abspath(image) for image in case.images)
            if place not in seen:
                seen.add(place)
                yield case


def _check_out(inputs: Sequence[Path], out: Path) -> None:
    """Refuse a file, and to write into a folder of images, where the next call would take predictions for images."""
    if out.is_file():
        raise ConfigError(out, expected="a folder for the label files", got="a file", do="give another --out", code="C005")
    for path in inputs:
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise DataError(out, expected=f"a folder outside of the images' {path}", got="one inside", do="give another --out", code="D063")


def _check_names(cases: Sequence[Case], out: Path, listed: Listing) -> None:
    """Refuse inputs whose results would overwrite each other, themselves, or what `predict` did not write."""
    seen: dict[str, Path] = {}
    for case in cases:
        name = safe_name(case.name)
        if name in seen:
            raise DataError(
                case.images[0],
                expected="images with different names",
                got=f"the name of {seen[name]}",
                do="predict them in two calls with two --out folders",
                code="D064",
            )
        if case.images[0].resolve().parent == (out / name).resolve().parent:
            raise DataError(
                out,
                expected="another folder than the images'",
                got="theirs",
                do="give another --out, or images would be overwritten",
                code="D063",
            )
        for suffix in LABEL_SUFFIXES:
            ours = name + suffix in listed.entries or name in listed.writing
            # Maps of a listed prediction are ours as it is.
            taken = [place for place in (out, *(out / kind for kind in MAPS)) if (place / (name + suffix)).exists()]
            if taken and not ours and not (taken[0] != out and any(entry.startswith(f"{name}.") for entry in listed.entries)):
                file = taken[0] / (name + suffix)
                raise DataError(
                    file, expected="no file of that name", got="one that `predict` did not write", do="give another --out", code="D063"
                )
        seen[name] = case.images[0]
