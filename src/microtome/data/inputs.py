"""Paths as people give them -> unlabelled cases to predict; without what reading labels needs."""

from collections.abc import Sequence
from pathlib import Path

from microtome.data.case import Case
from microtome.data.containers import are_inner, image_of
from microtome.data.description import load_description
from microtome.data.documents import channel_groups
from microtome.data.layouts import image_side
from microtome.data.names import is_image_place, natural, outer_of, stem_of, unique_names
from microtome.errors import DataError
from microtome.files import check_name
from microtome.images.volume import url_of


def list_images(path: Path, channels: int = 1) -> tuple[Case, ...]:
    """The images of a file, a folder or a dataset as unlabelled cases, to predict them; labels are left out.

    Args:
        path: an image file; a store, a folder of DICOM files, or a part of a container (`a.h5/raw`); the URL of a store, which
            is not looked at; or a folder that is searched with its subfolders. Of a container with labels its image is taken.
        channels: files `x_0000`, `x_0001`, ... are one case where there are as many of them as channels.

    Raises:
        DataError: nothing there, no image, or a name that is not UTF-8.
    """
    path = Path(path)
    check_name(path)
    if url_of(path) is not None or is_image_place(path):
        name = stem_of(outer_of(path))
        return (Case(name=name, images=(path if url_of(path) else image_of(path),), group=name),)
    files = image_side(path) if path.is_dir() else []
    if not files:
        got = "no image in it" if path.is_dir() else "nothing there"
        do = "give pictures or volumes, such as PNG, TIFF, NIfTI, DICOM, HDF5 or OME-Zarr"
        raise DataError(path, expected="an image file or a folder of images", got=got, do=do, code="D001")
    for file in files:
        check_name(file)
    stated = load_description(path)[0].images
    inner = stated if are_inner(path, stated) else None
    members = _channel_files(files, channels)
    named = [group[0].with_name(name) for group, name in members]
    found = zip(unique_names(path, named), members, strict=True)
    cases = (Case(name=n, images=tuple(image_of(file, inner) for file in f), group=n) for n, (f, _) in found)
    return tuple(sorted(cases, key=lambda case: natural(case.name)))


def _channel_files(files: Sequence[Path], channels: int) -> list[tuple[tuple[Path, ...], str]]:
    """The files of each case, and a file name for it without the number of a channel."""
    folders: dict[Path, list[Path]] = {}
    for path in files:
        folders.setdefault(path.parent, []).append(path)
    found: list[tuple[tuple[Path, ...], str]] = []
    for members in folders.values():
        for name, group in channel_groups(members).items():
            expected = [f"{name}_{number:04d}" for number in range(channels)]
            if [stem_of(path) for path in group] == expected:
                found.append((tuple(group), name + group[0].name.removeprefix(expected[0])))
            else:
                found.extend(((path,), path.name) for path in group)
    return found
