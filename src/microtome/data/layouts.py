"""How a folder is laid out: which files are images, which are labels, and which belong together, always by name."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from microtome.data.case import Case, Finding, Layout
from microtome.data.containers import are_inner, container_layout, existing_part
from microtome.data.description import DatasetConfig, inside, load_description
from microtome.data.documents import CHANNEL, read_document
from microtome.data.names import Role, image_files, key_of, lone_outer, natural, relative, role_of, some, stem_of, unique_names
from microtome.errors import DataError

# Words of a folder's name that keep its files from those of another: training data from test data.
PARTS = frozenset({"tr", "ts", "train", "training", "test", "testing", "val", "valid", "validation", "dev"})


@dataclass(frozen=True, kw_only=True)
class _Item:
    """An image file, with what its name and folders say.

    Attributes:
        where: its folders without the words of a role, in small letters: `train` of `train/images/`.
        part: the same, but of folders that have a role only what tells training from test: nothing of `JPEGImages/`.
        key: what it shares with its partner.
        side: the folder that gave it its role, for people; empty for the dataset's own folder.
    """

    path: Path
    role: Role
    where: str
    part: str
    key: str
    side: str


@dataclass(kw_only=True)
class _Pairs:
    """Files while they are being paired."""

    pairs: list[tuple[_Item, _Item]] = field(default_factory=list)
    images: list[_Item] = field(default_factory=list)
    labels: list[_Item] = field(default_factory=list)
    ambiguous: list[tuple[_Item, ...]] = field(default_factory=list)


def find_layout(root: Path, config: DatasetConfig, named_by: str = "microtome.yaml") -> Layout:
    """The cases of a folder, by the first that applies: `microtome.yaml`, `dataset.json`, containers, one mask an instance, names.

    Args:
        root: the dataset's folder.
        config: its `microtome.yaml`.
        named_by: where that stands, for messages.

    Raises:
        DataError: not one image could be paired with a label; says what was looked for, what is there, what to do.
    """
    if config.pairs:
        return _stated_pairs(root, config, named_by)
    document = None if config.images or config.labels else read_document(root, classes_known=bool(config.classes))
    if document:
        return document
    contained = _contained(root, config)
    if contained:
        return contained
    items = _items(root, config, named_by)
    return _instance_folders(root, items) or _by_name(root, items)


def image_side(root: Path) -> list[Path]:
    """The images of a folder without its labels, in natural order; all of them where that would leave none; containers as they are.

    A file that only its own name calls a label (`no_mask_3.png`) is one only beside the image that it would label.
    """
    config, named_by = load_description(root)
    if config.pairs:
        return [existing_part(root, image, named_by) for image in config.pairs]
    if are_inner(root, config.images, config.labels):
        return image_files(root)
    items = _items(root, config, named_by)
    images = {(item.where, item.key) for item in items if item.role == "image"}
    lone = {
        item.path
        for item in items
        if (item.where, item.key) not in images and _side(item.path.relative_to(root).parent.parts)[0] != "label"
    }
    chosen = [item for item in items if item.role == "image" or (item.path in lone and not config.labels)]
    return [item.path for item in chosen or items]


def _stated_pairs(root: Path, config: DatasetConfig, named_by: str) -> Layout:
    """The layout of `pairs:`."""
    images = [existing_part(root, image, named_by) for image in config.pairs]
    labels = [tuple(existing_part(root, label, named_by) for label in names) for names in config.pairs.values()]
    several = any(len(names) > 1 for names in labels)
    named = zip(unique_names(root, images), images, labels, strict=True)
    cases = tuple(Case(name=name, images=(image,), labels=files) for name, image, files in named)
    return Layout(sentence="pairs stated in microtome.yaml", cases=cases, per_instance=several)


def _contained(root: Path, config: DatasetConfig) -> Layout | None:
    """The layout of files that hold image and label each; None where names tell images from labels, or folders are stated."""
    inner = are_inner(root, config.images, config.labels)
    if (config.images or config.labels) and not inner:
        return None
    files = image_files(root)
    if not inner and len({item.role for item in _guessed(root, files)}) > 1:
        return None
    return container_layout(root, files, config.images, config.labels)


def _items(root: Path, config: DatasetConfig, named_by: str) -> list[_Item]:
    """Every image file of the folder with its role."""
    stated: dict[Path, _Item] = {}
    for role, pattern in (("label", config.labels), ("image", config.images)):
        for item in _stated(root, pattern, "label" if role == "label" else "image", named_by) if pattern else ():
            stated.setdefault(item.path, item)
    files = [path for path in image_files(root) if path not in stated]
    roles = {side for side, pattern in (("label", config.labels), ("image", config.images)) if pattern}
    others = [item for item in _guessed(root, files) if item.role not in roles]
    return [*stated.values(), *others]


def _stated(root: Path, pattern: str, role: Role, named_by: str) -> list[_Item]:
    """The files of `images:` or `labels:`; the part of a name that a glob's star stands for is its key."""
    plain = pattern.rstrip("/")
    whole = (root / plain).is_dir()
    files = image_files(inside(root, plain, named_by)) if whole else _glob(root, plain, named_by)
    if not files:
        raise DataError(named_by, expected=f"images for `{role}s: {pattern}`", got=f"none in {root}", do="mend the glob", code="D031")
    folder = Path(plain) if whole else _fixed_part(plain)
    before, star, after = ("*" if whole else Path(plain).name).partition("*")
    items = []
    for path in files:
        where, part = _places(path.relative_to(root / folder).parent.parts)
        # A name without a star is the same in every folder, so the folder alone tells the cases apart.
        key = _key(path.name.removeprefix(before).removesuffix(after), path) if star else ""
        items.append(_Item(path=path, role=role, where=where, part=part, key=key, side=folder.as_posix()))
    return items


def _key(starred: str, path: Path) -> str:
    """The key of what a star stands for; of the whole stem where that is nothing but the words of a role."""
    return key_of(stem_of(Path(starred)) if starred == path.name else starred) or key_of(stem_of(path))


def _glob(root: Path, pattern: str, named_by: str) -> list[Path]:
    """Image files that a pattern matches, all of them inside of the folder."""
    inside(root, pattern, named_by)
    known = set(image_files(root))
    found = sorted(path for path in root.glob(pattern) if path in known)
    return [inside(root, path.relative_to(root).as_posix(), named_by) for path in found]


def _fixed_part(pattern: str) -> Path:
    """The folders of a glob before its first star."""
    parts = Path(pattern).parent.parts
    wild = next((index for index, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
    return Path(*parts[:wild])


def _guessed(root: Path, files: Sequence[Path]) -> list[_Item]:
    """Roles by the names of the folders; where no folder is one of labels, by the names of the files."""
    outer = {path: lone_outer(root, path) for path in files}
    folders = {path: outer[path].relative_to(root).parent.parts for path in files}
    sided = {path: _side(parts) for path, parts in folders.items()}
    by_folder = any(role == "label" for role, _ in sided.values())
    items = []
    for path, parts in folders.items():
        role, side = sided[path]
        stem = stem_of(outer[path])
        if not by_folder or not role:
            role = "label" if role_of(stem) == "label" else "image"
        where, part = _places(parts)
        items.append(_Item(path=path, role=role, where=where, part=part, key=key_of(stem), side=side))
    return items


def _places(parts: Iterable[str]) -> tuple[str, str]:
    """`where` and `part` of an item in these folders."""
    keys = [(key_of(part), bool(role_of(part))) for part in parts]
    kept = ["_".join(word for word in key.split("_") if word in PARTS) if has_role else key for key, has_role in keys]
    return "/".join(key for key, _ in keys if key), "/".join(key for key in kept if key)


def _side(parts: tuple[str, ...]) -> tuple[Role, str]:
    """The role of the innermost folder that has one, and the folders down to it."""
    for depth in range(len(parts), 0, -1):
        role = role_of(parts[depth - 1])
        if role:
            return role, "/".join(parts[:depth])
    return "", "/".join(parts)


def _instance_folders(root: Path, items: Sequence[_Item]) -> Layout | None:
    """Kaggle's layout, a folder an image with images/ of one file and masks/ of one file an instance; else None."""
    members: dict[Path, dict[Role, list[_Item]]] = defaultdict(lambda: {"image": [], "label": []})
    for item in items:
        if item.path.parent != root:
            members[item.path.parent.parent][item.role].append(item)
    complete = {folder: sides for folder, sides in members.items() if sides["image"] and sides["label"]}
    one_each = all(len(sides["image"]) == 1 and _apart(sides) for sides in complete.values())
    several = any(len(sides["label"]) > 1 for sides in complete.values())
    # A mask with its image's name is a label map, whatever lies beside it.
    own_name = any(item.key == sides["image"][0].key for sides in complete.values() for item in sides["label"])
    if not several or not one_each or own_name or not _only_images(members, complete):
        return None
    found = {sides["image"][0].path: tuple(item.path for item in sides["label"]) for sides in complete.values()}
    images = [item.path for item in items if item.role == "image"]
    cases = [Case(name=n, images=(path,), labels=found.get(path, ())) for n, path in zip(unique_names(root, images), images, strict=True)]
    kaggle = any(part.startswith("stage1") for path in images for part in (root.name, *path.relative_to(root).parts))
    sentence = "a folder an image, with one mask file an instance"
    return Layout(
        sentence=sentence,
        cases=_sorted(cases),
        findings=tuple(_unlabelled_note(root, [path for path in images if path not in found])),
        per_instance=True,
        object_name="nucleus" if kaggle else "object",
    )


def _apart(sides: Mapping[Role, Sequence[_Item]]) -> bool:
    """Whether images and masks stand in folders of their own."""
    return {item.path.parent for item in sides["image"]}.isdisjoint(item.path.parent for item in sides["label"])


def _only_images(members: Mapping[Path, Mapping[Role, Sequence[_Item]]], complete: Mapping[Path, object]) -> bool:
    """Whether the folders that are not complete lack nothing but masks (a test set)."""
    return all(not sides["label"] for folder, sides in members.items() if folder not in complete)


def _by_name(root: Path, items: Sequence[_Item]) -> Layout:
    """Images and labels whose names agree once the words of a role are taken away."""
    images, files = _join_channels(items)
    work = _Pairs(images=images, labels=[item for item in items if item.role == "label"])
    _pair(work)
    _pair_across_folders(work)
    if not work.pairs:
        raise _nothing_found(root, work)
    return _layout(root, work, files)


def _join_channels(items: Sequence[_Item]) -> tuple[list[_Item], dict[Path, tuple[Path, ...]]]:
    """Images `x_0000`, `x_0001` as one under the key x where the labels have that key; and the files of each."""
    label_keys = {item.key for item in items if item.role == "label"}
    joined: dict[object, _Item] = {}
    files: dict[Path, tuple[Path, ...]] = {}
    for item in items:
        if item.role != "image":
            continue
        match = CHANNEL.match(item.key)
        known = match is not None and item.key not in label_keys and match["name"] in label_keys
        key = match["name"] if match and known else item.key
        # Natural order of the walk is the order of the channels.
        first = joined.setdefault((item.path.parent, key) if known else item.path, replace(item, key=key))
        files[first.path] = (*files.get(first.path, ()), item.path)
    return list(joined.values()), files


def _pair(work: _Pairs) -> None:
    """Take out the images and labels that agree in folder and key; several of one kind are ambiguous."""
    images, labels = _grouped(work.images), _grouped(work.labels)
    for place in images.keys() & labels.keys():
        if len(images[place]) == len(labels[place]) == 1:
            work.pairs.append((images[place][0], labels[place][0]))
        else:
            work.ambiguous.append((*images[place], *labels[place]))
    work.images = [item for item in work.images if (item.where, item.key) not in labels]
    work.labels = [item for item in work.labels if (item.where, item.key) not in images]


def _pair_across_folders(work: _Pairs) -> None:
    """Of what is left, pair what agrees in its key and only differs in how deep it lies (`annotations/fine/x`)."""
    by_key: dict[str, list[_Item]] = defaultdict(list)
    for item in work.images:
        by_key[item.key].append(item)
    partners = {item.path: [image for image in by_key[item.key] if _compatible(item.part, image.part)] for item in work.labels}
    wanted: dict[Path, list[_Item]] = defaultdict(list)
    for label in work.labels:
        for image in partners[label.path]:
            wanted[image.path].append(label)
    for label in work.labels:
        found = partners[label.path]
        if len(found) == 1 and len(wanted[found[0].path]) == 1:
            work.pairs.append((found[0], label))
        elif found and label is wanted[found[0].path][0]:
            work.ambiguous.append((*found, *wanted[found[0].path]))
    work.images = [item for item in work.images if not wanted[item.path]]
    work.labels = [item for item in work.labels if not partners[item.path]]


def _grouped(items: Sequence[_Item]) -> dict[tuple[str, str], list[_Item]]:
    """Items by folder and key."""
    groups: dict[tuple[str, str], list[_Item]] = defaultdict(list)
    for item in items:
        groups[item.where, item.key].append(item)
    return groups


def _compatible(a: str, b: str) -> bool:
    """Whether one folder is the other, or an end of it: `train` and `val` are not."""
    short, long = sorted((a, b), key=len)
    return not short or f"/{long}/".startswith(f"/{short}/") or f"/{long}/".endswith(f"/{short}/")


def _layout(root: Path, work: _Pairs, files: Mapping[Path, tuple[Path, ...]]) -> Layout:
    """Cases and findings of what was paired and what was left."""
    label_of = {image.path: label.path for image, label in work.pairs}
    undecided = [item for items in work.ambiguous for item in items if item.role == "image"]
    images = [image.path for image, _ in work.pairs] + [item.path for item in (*work.images, *undecided)]
    # A case of several files is named without the number of its channel.
    bare = [_without_channel(path) if len(files[path]) > 1 else path for path in images]
    cases = [
        Case(name=name, images=files[path], labels=(label_of[path],) if path in label_of else ())
        for name, path in zip(unique_names(root, bare), images, strict=True)
    ]
    names = {case.images[0]: case.name for case in cases}
    return Layout(sentence=_sentence(work.pairs), cases=_sorted(cases), findings=tuple(_findings(root, work, names)))


def _without_channel(path: Path) -> Path:
    """`x_0000.tif` -> `x.tif`."""
    stem = stem_of(path)
    return path.with_name(stem[: -len("_0000")] + path.name.removeprefix(stem))


def _sorted(cases: Iterable[Case]) -> tuple[Case, ...]:
    """Cases in the order in which people count."""
    return tuple(sorted(cases, key=lambda case: natural(case.name)))


def _sentence(pairs: Sequence[tuple[_Item, _Item]]) -> str:
    """The layout in words."""
    images, labels = ({pair[side].side for pair in pairs} for side in (0, 1))
    image, label = pairs[0][0].path.name, pairs[0][1].path.name
    if images == labels:
        where = f"in {len(images)} folders" if len(images) > 1 else f"in {next(iter(images))}/" if any(images) else "in one folder"
        return f"image and label side by side {where}, paired by name ({image} + {label})"
    return f"{_folders(images)} + {_folders(labels)}, paired by name"


def _folders(sides: Iterable[str]) -> str:
    """Folders for people."""
    return some((f"{side or '.'}/" for side in sorted(sides, key=natural)), most=2)


def _findings(root: Path, work: _Pairs, names: Mapping[Path, str]) -> list[Finding]:
    """What could not be paired: named one by one, a folder of images that have no labels at all as one note."""
    found = []
    for items in work.ambiguous:
        files = tuple(item.path for item in items)
        case = next((names[path] for path in files if path in names), "")
        message = (
            f"{some(_short(root, files))}: cannot tell which label belongs to which image; state `pairs:` or `labels:` in microtome.yaml"
        )
        found.append(Finding(severity="error", code="ambiguous-pair", case=case, message=message, files=files))
    for item in work.labels:
        message = f"{_short(root, [item.path])[0]} has no image; it is not used"
        found.append(Finding(severity="warning", code="unpaired-label", message=message, files=(item.path,)))
    training = {image.path.parent for image, _ in work.pairs}
    for item in work.images:
        if item.path.parent in training:
            message = f"{_short(root, [item.path])[0]} has no label; it is not used for training"
            found.append(Finding(severity="warning", code="unpaired-image", case=names[item.path], message=message, files=(item.path,)))
    rest = [item.path for item in work.images if item.path.parent not in training]
    return found + _unlabelled_note(root, rest)


def _unlabelled_note(root: Path, files: Sequence[Path]) -> list[Finding]:
    """One note on images that nobody meant to have labels; none where there are no such images."""
    if not files:
        return []
    message = f"{len(files)} images have no labels and are not used for training: {some(_short(root, files), most=2)}"
    return [Finding(severity="note", code="unlabelled-images", message=message, files=tuple(files))]


def _short(root: Path, files: Iterable[Path]) -> list[str]:
    """Paths as they stand in the folder."""
    return [relative(root, path) for path in files]


def _nothing_found(root: Path, work: _Pairs) -> DataError:
    """Why a folder is no dataset."""
    expected = "images and labels that pair by name (images/ + labels/, images/ + masks/, x.png + x_mask.png, dataset.json)"
    do = "say which belong together in microtome.yaml (`images:`, `labels:` or `pairs:`)"
    if work.ambiguous:
        got = f"more than one candidate: {some(_short(root, [item.path for item in work.ambiguous[0]]))}"
    elif work.images and work.labels:
        got = f"no agreement between images ({some(_short(root, [item.path for item in work.images]), 3)})"
        got += f" and labels ({some(_short(root, [item.path for item in work.labels]), 3)})"
    elif work.images:
        got = f"{len(work.images)} images and no labels: {some(_short(root, [item.path for item in work.images]), 3)}"
        do = "add a folder labels/ with files of the same names, or " + do
    else:
        inside_it = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
        got = f"no image that can be read, but {some(inside_it)}" if inside_it else "an empty folder"
        do = "give the folder that holds the images (PNG, JPEG, TIFF, NIfTI, ...)"
    return DataError(root, expected=expected, got=got, do=do, code="D031")
