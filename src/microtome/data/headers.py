"""What the headers of a dataset's images say when they are taken together: channels, dimensions, voxel sizes."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

from microtome.data.case import Case, Finding, Layout
from microtome.data.description import DatasetConfig
from microtome.data.names import some
from microtome.errors import DataWarning
from microtome.geometry import format_sides
from microtome.images.image import Header


def channel_names(headers: Mapping[str, Header], cases: Sequence[Case], layout: Layout) -> tuple[tuple[str, ...], list[Finding]]:
    """Names of the channels that most images have, and what is to be said of the others."""
    counts = Counter(header.channels for header in headers.values())
    if not counts:
        return layout.channel_names, []
    usual = 3 if counts.keys() == {1, 3} else max(counts, key=lambda channels: (counts[channels], channels))
    names = tuple(f"channel {number}" for number in range(1, usual + 1))
    if len(layout.channel_names) == usual:
        names = layout.channel_names
    elif usual in (1, 3):
        names = ("grey",) if usual == 1 else ("red", "green", "blue")
    odd = [case for case in cases if case.name in headers and headers[case.name].channels != usual]
    if not odd:
        return names, []
    fits = counts.keys() == {1, 3}
    message = f"{len(odd)} of {len(headers)} images have {headers[odd[0].name].channels} channels and not {usual}: "
    message += some((case.images[0].name for case in odd), 3) + ("; grey is taken as red = green = blue" if fits else "")
    files = tuple(case.images[0] for case in odd)
    return names, [Finding(severity="note" if fits else "error", code="mixed-channels", message=message, files=files)]


def geometry_findings(headers: Mapping[str, Header], cases: Sequence[Case], config: DatasetConfig) -> list[Finding]:
    """Voxel sizes that only some files state, volumes without one, which also warn, and pictures among volumes."""
    found = []
    volumes = [case for case in cases if case.name in headers and len(headers[case.name].shape_vox) == 3]
    unknown = [case.images[0] for case in volumes if not headers[case.name].spacing_known]
    if unknown and config.spacing_mm is None:
        message = f"{some(unknown, 1)}: no voxel size in the file, 1 mm is assumed; "
        message += "state `spacing_mm: [z, y, x]` in microtome.yaml"
        warnings.warn(message, DataWarning, stacklevel=3)
        found.append(Finding(severity="warning", code="no-spacing", message=message, files=tuple(unknown)))
    if volumes and len(volumes) < len(headers):
        picture = next(case for case in cases if case.name in headers and len(headers[case.name].shape_vox) == 2)
        message = f"volumes ({volumes[0].images[0].name}) and pictures ({picture.images[0].name}) in one dataset; state in "
        message += "microtome.yaml which are meant (`images:`, `labels:` or `pairs:`)"
        found.append(Finding(severity="error", code="mixed-dimensions", message=message, files=(volumes[0].images[0], picture.images[0])))
    elif config.spacing_mm is None:
        found += _mixed_spacing(headers, cases)
    return found


def _mixed_spacing(headers: Mapping[str, Header], cases: Sequence[Case]) -> list[Finding]:
    """An error where some files state a voxel size and others none: 1 mm for the others cannot be right."""
    probed = [case for case in cases if case.name in headers]
    known, unknown = ([case.images[0] for case in probed if headers[case.name].spacing_known is yes] for yes in (True, False))
    if not known or not unknown:
        return []
    size = format_sides(next(headers[case.name].spacing_mm for case in probed if case.images[0] == known[0]))
    message = f"{len(unknown)} of {len(probed)} images state no voxel size ({some((path.name for path in unknown), 3)}), others do "
    message += f"({known[0].name}: {size} mm); state `spacing_mm` in microtome.yaml, or take one kind out"
    return [Finding(severity="error", code="mixed-spacing", message=message, files=(*unknown, known[0]))]
