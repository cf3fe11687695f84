"""The legend that follows from the values found in the labels and from what a document says about them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from microtome.data.case import NOT_ANNOTATED, Declared, Finding, LabelValue
from microtome.data.description import DatasetConfig
from microtome.data.labels import MOST_CLASSES, LabelScan, counted_anew
from microtome.data.legend import Legend, code_of, format_value, value_of
from microtome.data.names import some
from microtome.errors import ConfigError, DataError
from microtome.words import listed

# Numbers of objects are one piece each in nearly all cases, values of classes are not.
WHOLE, IN_PIECES = 0.9, 0.5
# Unnamed classes are seldom as many as this.
MANY_CLASSES = 8
# 255 beside class numbers below this is what Pascal VOC and Cityscapes call void.
VOID, MOST_VOID_CLASSES = 255, 40
# Of the pixels of pictures; so few are annotated where somebody meant it so, or where 255 is what is to be learned.
MUCH_VOID = 0.5
# A value this far from a class's own still is that class, where a picture was smeared.
REACH = 32
BLACK_WHITE = (0, 255)
# No smearing leaves as few values as this; a value rarer than this share is no class by itself.
FEW_VALUES, LEAST_SHARE = 4, 0.001


@dataclass(frozen=True, kw_only=True)
class LegendRules:
    """What decides about the legend beside the values.

    Attributes:
        declared: classes as a document names them.
        instances: whether values are objects, as `microtome.yaml` says; None: the values decide.
        per_instance: whether each file is one object's mask.
        object_name: what an object is called where nobody says.
    """

    declared: Declared = field(default_factory=Declared)
    instances: bool | None = None
    per_instance: bool = False
    object_name: str = "object"


def make_legend(scans: Sequence[LabelScan], rules: LegendRules) -> Legend:
    """The legend of a dataset.

    Declared classes count as declared. Otherwise every value found is a class in ascending order, except that
    -1, and 255 beside small class numbers, are not annotated (declare `not_annotated: []` where they are classes);
    values that are counted from 1 anew in every file and are one piece each are objects, and so are more than 32 that do
    not lie in pieces (`doubts` says what that leaves open); the smeared values of JPEG masks are taken as the nearest
    frequent one.

    Raises:
        ConfigError: as many names are declared as values are not found.
        DataError: all that was found is "not annotated".
    """
    found = _merged(scans)
    centres = None if rules.per_instance else _smeared_centres(found, jpeg=any(scan.format == "jpeg" for scan in scans))
    if _are_instances(scans, rules, smeared=centres is not None):
        return _instance_legend(found, rules)
    declared = rules.declared
    if any(declared.classes.values()):
        return _declared_legend(found, declared, snap=centres is not None and centres <= _declared_codes(declared, found.colour))
    codes = sorted(found.counts if centres is None else centres)
    ignored, why = _ignored(found, codes, declared)
    unseen = {code_of(value, found.colour) for value in ignored}
    legend = _found_legend(found, [code for code in codes if code not in unseen], declared)
    return replace(legend, ignored=ignored, reason=legend.reason + why, snap=centres is not None)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The values of all labels together: code -> voxels, and what kind of file they stand in."""

    counts: Mapping[int, int]
    colour: bool
    eight_bit: bool

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """The values as points (n, 1 or 3), the most frequent first, and the share of voxels of each."""
        codes = np.array(sorted(self.counts, key=lambda code: (-self.counts[code], code)), np.int64)
        shares = np.array([self.counts[int(code)] for code in codes], float) / sum(self.counts.values())
        points = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1) if self.colour else codes[:, None]
        return points, shares


def _merged(scans: Sequence[LabelScan]) -> _Found:
    """All counts in one; numbers become greys where any file holds colours."""
    colour = any(scan.colour for scan in scans)
    counts: Counter[int] = Counter()
    for scan in scans:
        for code, times in scan.counts.items():
            same = code if colour == scan.colour else code_of(code, colour)
            if same is None:
                raise DataError(
                    scan.files[0],
                    expected="colours, as in the other labels",
                    got=f"the number {code}",
                    do="export it as colours too",
                    code="D039",
                )
            counts[same] += times
    return _Found(counts=counts, colour=colour, eight_bit=all(scan.eight_bit for scan in scans))


def doubts(scans: Sequence[LabelScan], rules: LegendRules) -> list[Finding]:
    """A warning where values were taken as objects, or as classes, and could well be the other; it says what settles that."""
    if rules.instances is not None or rules.per_instance or any(rules.declared.classes.values()):
        return []
    found = _merged(scans)
    if _smeared_centres(found, jpeg=any(scan.format == "jpeg" for scan in scans)) is not None:
        return []
    count, whole = len(_numbers(scans)), _whole(scans)
    pieces = "" if whole is None else f", and {whole:.0%} of those looked at are one piece"
    if _are_instances(scans, rules, smeared=False):
        # Many numbers, counted anew in every file, one piece each: nothing else looks like that.
        if count > MOST_CLASSES and counted_anew(scans) and whole is not None and whole >= WHOLE:
            return []
        message = f"the labels hold {count} values beside 0{pieces}: each is taken as an object, not as a class; "
        message += "state `instances: true` in microtome.yaml if that is right, else `instances: false` and `classes:`"
    elif not rules.declared.classes and (count > MANY_CLASSES or (counted_anew(scans) and whole is not None and whole >= IN_PIECES)):
        message = f"the labels hold {count} values beside 0{pieces}: each is taken as a class; "
        message += "state `instances: true` in microtome.yaml if each is an object, else `instances: false`"
    else:
        return []
    return [Finding(severity="warning", code="classes-or-objects", message=message)]


def void_doubts(scans: Sequence[LabelScan], legend: Legend, declared: Declared) -> list[Finding]:
    """What to look at where 255 is taken as not annotated by custom and may well be the foreground, with what settles that.

    An error where every file that has it has nothing but 0 beside it, as masks of 0 and 255 do among others of 0 and 1: of these
    no foreground would be learned. A warning where it fills most of the pictures; of volumes that is the usual case: a few sections
    are annotated.
    """
    having = [scan for scan in scans if scan.counts.get(VOID)]
    if VOID not in legend.ignored or declared.ignored is not None or not having:
        return []
    first = some((scan.files[0] for scan in having), 1)
    if all(scan.numbers <= {VOID, NOT_ANNOTATED} for scan in having):
        message = f"{first}: masks of 0 and 255 among masks of other values; 255 is taken as not annotated, so nothing is learned there; "
        message += f"state {_with_void(legend)}, else `not_annotated: 255`"
        return [_void_finding("error", having, message)]
    pictures = [scan for scan in scans if len(scan.shape_vox) == 2]
    share = sum(scan.counts.get(VOID, 0) for scan in pictures) / max(1, sum(sum(scan.counts.values()) for scan in pictures))
    if share < MUCH_VOID:
        return []
    message = f"{first}: {share:.0%} of the labels' pixels are 255, which is taken as not annotated: nothing is learned there; "
    return [
        _void_finding(
            "warning", having, message + "state `not_annotated: 255` in microtome.yaml if that is right, else `not_annotated: []`"
        )
    ]


def _with_void(legend: Legend) -> str:
    """What to state in microtome.yaml where 255 is annotated: beside one class of foreground it is that, beside several a further one."""
    if legend.background is None or len(legend.foreground) != 1 or legend.kind != "values":
        return "`not_annotated: []` in microtome.yaml if it is a class"
    values = {name: [str(value) for value in each] for name, each in zip(legend.names, legend.values, strict=True)}
    foreground = legend.names[legend.foreground[0]]
    values[foreground].append(str(VOID))
    words = (f"{name}: {each[0] if len(each) == 1 else '[' + ', '.join(each) + ']'}" for name, each in values.items())
    return f"`classes: {{{', '.join(words)}}}` in microtome.yaml if it is the {foreground}"


def _void_finding(severity: Literal["error", "warning"], scans: Sequence[LabelScan], message: str) -> Finding:
    """What is said about 255 in the labels of these."""
    return Finding(severity=severity, code="void-or-class", message=message, files=tuple(scan.files[0] for scan in scans))


def choose_background(legend: Legend, config: DatasetConfig, named_by: str) -> Legend:
    """The legend with the background that `microtome.yaml` states, or none where it names two classes and neither is that.

    Raises:
        ConfigError: no class has the stated name.
    """
    if config.background is None:
        return replace(legend, background=None)
    if config.background:
        if config.background not in legend.names:
            raise ConfigError(
                named_by,
                expected=f"`background` out of {', '.join(legend.names)}",
                got=repr(config.background),
                do="give one of these, or null",
                code="C018",
            )
        return replace(legend, background=legend.names.index(config.background))
    if len(config.classes) == len(legend.names) == 2 and not any(_means_background(name) for name in legend.names):
        reason = f"{legend.reason}; both count as foreground, as none is called background (`background:` in microtome.yaml)"
        return replace(legend, background=None, reason=reason)
    return legend


def _means_background(name: str) -> bool:
    """Whether a class is called background."""
    return name.casefold() in ("background", "bg")


def _are_instances(scans: Sequence[LabelScan], rules: LegendRules, *, smeared: bool) -> bool:
    """Whether a value is an object rather than a class."""
    if rules.instances is not None:
        return rules.instances
    if rules.per_instance:
        return True
    if any(rules.declared.classes.values()) or smeared:
        return False
    whole, numbers = _whole(scans), _numbers(scans)
    if len(numbers) > MOST_CLASSES:
        return whole is None or whole >= IN_PIECES
    # A name for each value, or for several, says that they are classes.
    named = len(rules.declared.classes)
    return named <= 2 and named != len({code for scan in scans for code in scan.counts}) and whole is not None and whole >= WHOLE


def _numbers(scans: Sequence[LabelScan]) -> frozenset[int]:
    """All codes other than 0."""
    return frozenset[int]().union(*(scan.numbers for scan in scans))


def _whole(scans: Sequence[LabelScan]) -> float | None:
    """The share of the values looked at that are one piece; None where none were."""
    looked_at = [scan for scan in scans if scan.whole is not None]
    total = sum(len(scan.numbers) for scan in looked_at)
    return sum(len(scan.numbers) * (scan.whole or 0) for scan in looked_at) / total if total else None


def _smeared_centres(found: _Found, *, jpeg: bool) -> set[int] | None:
    """The values that were meant where a picture format or smoothing put others between them; None where it did not."""
    if not found.eight_bit or len(found.counts) <= FEW_VALUES:
        return None
    if not found.colour and _black_and_white(found.counts, jpeg=jpeg):
        return set(BLACK_WHITE)
    return _frequent(found) if jpeg else None


def _black_and_white(counts: Mapping[int, int], *, jpeg: bool) -> bool:
    """Whether grey values are those of a mask of 0 and 255 with smeared edges."""
    total = sum(counts.values())
    dark, light = (sum(times for code, times in counts.items() if abs(code - end) <= REACH) / total for end in BLACK_WHITE)
    if jpeg:
        return dark + light >= 0.95 and min(dark, light) >= LEAST_SHARE
    between = [code for code in counts if code not in BLACK_WHITE]
    black, white = (counts.get(end, 0) / total for end in BLACK_WHITE)
    # Objects numbered up to 255 also fill the range, but then 255 is no more frequent than the others.
    lone_white = white >= LEAST_SHARE and white >= 5 * max(counts[code] for code in between) / total
    return black + white >= 0.8 and lone_white and len({code // 64 for code in between}) == 4 and len(between) > 2 * FEW_VALUES


def _frequent(found: _Found) -> set[int] | None:
    """Values well apart that are frequent by themselves and have 95 % of all voxels around them; None if there are none."""
    points, shares = found.points()
    centres: list[np.ndarray] = []
    covered = np.zeros(len(points), bool)
    for index in np.flatnonzero(shares >= LEAST_SHARE):
        if not covered[index]:
            centres.append(points[index])
            covered |= np.abs(points - points[index]).max(axis=1) <= REACH
    if len(centres) < 2 or shares[covered].sum() < 0.95:
        return None
    return {int(sum(int(part) << 8 * (len(centre) - 1 - place) for place, part in enumerate(centre))) for centre in centres}


def _instance_legend(found: _Found, rules: LegendRules) -> Legend:
    """Background and object."""
    given = list(rules.declared.classes)
    if len(given) > 2:
        got = f"{len(given)} names: {', '.join(given)}"
        raise ConfigError(
            rules.declared.source, expected="background and one class of objects", got=got, do="set `instances: false`", code="C018"
        )
    names = ("background", *(given or [rules.object_name]))[-2:]
    objects = len(found.counts) - (0 in found.counts)
    if rules.instances:
        reason = "each value is an object (`instances: true`)"
    elif rules.per_instance:
        reason = "one mask file an object"
    else:
        kind = "different values" if objects > MOST_CLASSES else "values, counted anew in every image and one piece each"
        reason = f"{objects} {kind}: objects, not classes"
    return Legend(
        names=(names[0], names[1]),
        values=((0,), (255,)),
        ignored=rules.declared.ignored or (),
        kind="instances",
        background=0,
        reason=reason,
    )


def _declared_codes(declared: Declared, colour: bool) -> set[int | None]:
    """Codes of every declared value."""
    return {code_of(value, colour) for values in (*declared.classes.values(), declared.ignored or ()) for value in values}


def _declared_legend(found: _Found, declared: Declared, *, snap: bool) -> Legend:
    """The classes of a document, in the order of their values."""
    ignored = declared.ignored or ()
    classes = {name: tuple(v for v in values if v not in ignored) for name, values in declared.classes.items()}
    ordered = sorted(((values, name) for name, values in classes.items() if values), key=lambda pair: _rgb(pair[0][0]))
    if not ordered:
        raise ConfigError(
            declared.source, expected="a class that is annotated", got=f"not_annotated {ignored}", do="mend `not_annotated`", code="C018"
        )
    colours = found.colour or any(isinstance(value, tuple) for values, _ in ordered for value in values)
    words = listed((f"{name} {'+'.join(format_value(value) for value in values)}" for values, name in ordered), "classes")
    return Legend(
        names=tuple(name for _, name in ordered),
        values=tuple(values for values, _ in ordered),
        ignored=ignored,
        kind="colours" if colours else "values",
        background=_background([name for _, name in ordered], [values for values, _ in ordered]),
        reason=f"named in {Path(declared.source).name}: {words}" + _not_annotated(ignored, ""),
        snap=snap,
    )


def _ignored(found: _Found, codes: Sequence[int], declared: Declared) -> tuple[tuple[LabelValue, ...], str]:
    """Values that mean "not annotated", and why."""
    if declared.ignored is not None:
        return declared.ignored, _not_annotated(declared.ignored, f" by {Path(declared.source).name}")
    if found.colour:
        return (), ""
    others = [code for code in codes if code not in (VOID, NOT_ANNOTATED)]
    ignored: tuple[LabelValue, ...] = (NOT_ANNOTATED,) if NOT_ANNOTATED in codes and others else ()
    consecutive = others == list(range(others[0], others[0] + len(others))) and others[0] in (0, 1) if others else False
    if VOID in codes and len(others) >= 2 and others[0] >= 0 and (consecutive or others[-1] < MOST_VOID_CLASSES):
        ignored += (VOID,)
    return ignored, _not_annotated(ignored, " by custom; state `not_annotated: []` in microtome.yaml if that is a class")


def _not_annotated(ignored: Sequence[LabelValue], why: str) -> str:
    """The end of a reason that says what is left out."""
    return f"; {', '.join(format_value(value) for value in ignored)} means not annotated{why}" if ignored else ""


def _found_legend(found: _Found, codes: Sequence[int], declared: Declared) -> Legend:
    """A class for each value, in ascending order."""
    values = [value_of(code, found.colour) for code in codes]
    shown = listed(map(format_value, values), "colours" if found.colour else "values")
    if not values:
        raise DataError(
            declared.source or "labels", expected="annotated voxels", got="none in any label", do="mend `not_annotated`", code="D033"
        )
    if declared.classes and len(declared.classes) != len(values):
        got = f"{len(declared.classes)} names for {len(values)} values: {shown}"
        raise ConfigError(
            declared.source, expected="a name for each value in the labels", got=got, do="write `classes:` as `name: value`", code="C018"
        )
    classes = [(value,) for value in values]
    zero = _background(tuple(declared.classes), classes)
    plain = ("background", "foreground") if zero == 0 and len(values) == 2 else tuple(_name(value) for value in values)
    return Legend(
        names=tuple(declared.classes) or plain,
        values=tuple(classes),
        kind="colours" if found.colour else "values",
        background=zero,
        reason=f"the labels hold the {'colours' if found.colour else 'values'} {shown}",
    )


def _background(names: Sequence[str], values: Sequence[Sequence[LabelValue]]) -> int | None:
    """The class that is called background, else that of 0 or black, if there is one."""
    called = next((index for index, name in enumerate(names) if _means_background(name)), None)
    return next((index for index, each in enumerate(values) if _has_zero(each)), None) if called is None else called


def _name(value: LabelValue) -> str:
    """What a class is called where nobody says."""
    if _has_zero((value,)):
        return "background"
    return format_value(value) if isinstance(value, tuple) else f"label {value}"


def _has_zero(values: Sequence[LabelValue]) -> bool:
    """Whether a class is that of 0 or black."""
    return any(value in (0, (0, 0, 0)) for value in values)


def _rgb(value: LabelValue) -> tuple[int, int, int]:
    """A value that can be compared with colours and numbers alike."""
    return value if isinstance(value, tuple) else (value, value, value)
