"""A trained model and image files -> label files in the images' own format and geometry."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from microtome.bundle import Bundle, load_bundle
from microtome.config import Plan
from microtome.data.case import Case
from microtome.data.dataset import fit_channels, list_images, read_case_image
from microtome.data.listing import LISTING, Listing, continued_listing, recording
from microtome.errors import ConfigError, DataError, DataWarning
from microtome.images.files import label_suffix, read_image, write_labels
from microtome.images.image import Image
from microtome.inference.averaging import TTA
from microtome.inference.devices import has_bf16, pick_device, to_device
from microtome.inference.predict import predict_labels
from microtome.inference.torch_engine import TorchEngine
from microtome.machine import recycle_memory
from microtome.preprocess import voxel_size

# What `label_suffix` may give.
LABEL_SUFFIXES = (".png", ".tif", ".nii", ".nii.gz")


class Predictor:
    """A bundle ready to label images.

    Args:
        bundle: as `load_bundle` gives it.
        device: "auto", "cpu", "cuda".
        tta: "none"; "mirror": average over the mirrored versions of each tile, along the axes that training mirrored;
            "rotations": over 7 versions turned in the plane, if training turned by any angle.
        head: answer from a shallower nested U-Net, 1 the shallowest (UNet++ trained with a loss at that level): faster.
    """

    def __init__(self, bundle: Bundle, *, device: str = "auto", tta: TTA = "none", head: int | None = None) -> None:
        recycle_memory()
        self.bundle, self.device = bundle, pick_device(device)
        network = bundle.network()
        self.network = to_device(network if head is None else network.pruned(head), self.device, bundle.plan.dims)
        # A model from a newer machine: its bf16 would be emulated here.
        precision = bundle.plan.precision if has_bf16(self.device) else "fp32"
        check_turned(bundle.plan, tta)
        self.engine = TorchEngine(
            network=self.network,
            device=self.device,
            precision=precision,
            tta=tta,
            mirror_axes=mirror_axes(bundle.plan, tta),
            spacing_mm=bundle.plan.spacing_mm,
        )

    def __call__(self, image: Image | Path | str) -> np.ndarray:
        """The class of each voxel, (*S) int16, counted as in `bundle.legend.names`.

        Raises:
            DataError: other channels or axes than the model was trained on.
        """
        if not isinstance(image, Image):
            image = read_image(Path(image))
        plan = self.bundle.plan
        self._check(image)
        image = fit_channels(image, plan.channels)
        if plan.assumed_spacing_mm and not (image.spacing_known or plan.stated_spacing_mm or plan.resize_vox):
            sizes = " × ".join(f"{value:g}" for value in plan.assumed_spacing_mm)
            warnings.warn(f"{image.path}: no voxel size in the file; {sizes} mm is assumed, as in training", DataWarning, stacklevel=2)
        return predict_labels(image.array, voxel_size(image, plan), plan=plan, network=self.network, engine=self.engine)

    def _check(self, image: Image) -> None:
        """Refuse an image of another kind than the training images."""
        plan = self.bundle.plan
        if image.channels not in (plan.channels, 1 if plan.channels == 3 else plan.channels):
            expected = f"{plan.channels} channel{'s' if plan.channels > 1 else ''} as in training"
            raise DataError(image.path, expected=expected, got=str(image.channels), do="convert the image, or train on such images")
        if len(image.shape_vox) != len(plan.spacing_mm):
            got = f"{len(image.shape_vox)} axes"
            raise DataError(
                image.path, expected=f"{len(plan.spacing_mm)} axes as in training", got=got, do="use a model trained on such images"
            )


def mirror_axes(plan: Plan, tta: TTA) -> tuple[int, ...]:
    """The axes along which prediction may mirror: those that training mirrored.

    Raises:
        ConfigError: mirrored averaging for a network that never saw a mirrored image.
    """
    if tta != "mirror":
        return ()
    if not plan.augment.flip_axes:
        raise ConfigError("--tta mirror", expected="a model trained on mirrored images", got="augment.flip_axes ()", do="leave it out")
    return plan.augment.flip_axes


def check_turned(plan: Plan, tta: TTA) -> None:
    """Refuse to average over turned versions that the network never learned to read: its answers there are worse, not better.

    Raises:
        ConfigError: training did not turn images in their plane by any angle.
    """
    augment = plan.augment
    if tta == "rotations" and not (augment.rotation_p and augment.rotation_deg and augment.rotation_deg[0] >= 180):
        got = f"augment.rotation_deg {augment.rotation_deg} with probability {augment.rotation_p:g}"
        do = "leave it out, or try --tta mirror"
        raise ConfigError("--tta rotations", expected="a model trained on images turned by any angle, up to 180", got=got, do=do)


def load(run: Path | str, *, device: str = "auto", tta: TTA = "none", head: int | None = None) -> Predictor:
    """The trained model of a run folder; the words are those of `Predictor`."""
    return Predictor(load_bundle(Path(run)), device=device, tta=tta, head=head)


def predict_files(
    predictor: Predictor, inputs: Sequence[Path], out: Path, *, on_done: Callable[[str, int, int], None] = lambda name, done, of: None
) -> list[Path]:
    """Label every image among `inputs` (files, folders, datasets) into `out`; returns the files written.

    Each file appears when it is complete. A file that cannot be labelled stops nothing: the others are written first.

    Raises:
        DataError: no images, two that would have the same name in `out`, `out` among the images or with files that
            `predict` did not write and would overwrite or with predictions of another legend, or (after all others)
            images that failed.
    """
    legend = predictor.bundle.legend
    _check_out(inputs, out)
    listed = continued_listing(out, legend)
    cases = list(_cases(inputs, predictor.bundle.plan.channels))
    _check_names(cases, out, listed)
    written, failed = [], []
    with recording(out, legend, (safe_name(case.name) for case in cases)) as record:
        for number, case in enumerate(cases, start=1):
            try:
                written.append(write_prediction(predictor, case, out))
                record.add(written[-1], case)
            except DataError as error:
                failed.append(error)
            on_done(case.name, number, len(cases))
    if not written and not listed.entries:
        (out / LISTING).unlink(missing_ok=True)
        with suppress(OSError):
            # Only if it is empty: nothing is left of a call that could do nothing.
            out.rmdir()
    if failed and len(failed) < len(cases):
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise DataError(failed[0].where, expected=failed[0].expected, got=failed[0].got + more, do=f"the other {len(written)} are in {out}")
    if failed:
        raise failed[0]
    return written


def write_prediction(predictor: Predictor, case: Case, out: Path) -> Path:
    """Predict one case and write it, with the values that its training labels had, under the case's name."""
    image = read_case_image(case)
    labels = predictor.bundle.legend.encode(predictor(image))
    path = out / (safe_name(case.name) + label_suffix(image))
    write_labels(path, labels, like=image)
    return path


def safe_name(name: str) -> str:
    """A case's name as a file name: `stack[20:25]` becomes `stack_20-25`; folders stay folders."""
    return name.replace("[", "_").replace(":", "-").replace("]", "")


def _cases(inputs: Sequence[Path], channels: int) -> Iterator[Case]:
    """The images that paths mean."""
    for path in inputs:
        if not path.exists():
            raise DataError(path, expected="an image or a folder", got="nothing there", do="check the path")
        yield from list_images(path, channels=channels)


def _check_out(inputs: Sequence[Path], out: Path) -> None:
    """Refuse to write into a folder of images, where the next call would take predictions for images."""
    for path in inputs:
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise DataError(out, expected=f"a folder outside of the images' {path}", got="one inside", do="give another --out")


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
            )
        if case.images[0].resolve().parent == (out / name).resolve().parent:
            raise DataError(
                out, expected="another folder than the images'", got="theirs", do="give another --out, or images would be overwritten"
            )
        for file in (name + suffix for suffix in LABEL_SUFFIXES):
            if (out / file).exists() and file not in listed.entries and name not in listed.writing:
                raise DataError(
                    out / file, expected="no file of that name", got="one that `predict` did not write", do="give another --out"
                )
        seen[name] = case.images[0]
