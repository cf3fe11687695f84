"""A trained model, ready to label images with the engine that suits the job."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from microtome.bundle import Bundle, load_bundle
from microtome.config import Plan
from microtome.data.reading import fit_channels
from microtome.errors import ConfigError, DataError, DataWarning
from microtome.geometry import Shape, Sizes, Spacing
from microtome.images.files import read_image
from microtome.images.image import Image
from microtome.inference.engines import Engines
from microtome.inference.mirroring import TTA, Engine, passes
from microtome.inference.predict import Sized, choose_tile, predict_labels
from microtome.inference.search import Choice, Job
from microtome.machine import recycle_memory
from microtome.preprocess import grid_shape, voxel_size
from microtome.tiling import cover


@dataclass
class KnownSizes:
    """What a bundle says of its network's sizes, so that tiles are planned without the network.

    Attributes:
        sizes: that it takes.
        context_vox: border that its output lacks.
    """

    sizes: Sizes
    context_vox: int

    def nearest_sizes(self, n: int, axis: int) -> tuple[int, int]:
        """The nearest sizes that fit, below or equal and above or equal."""
        return self.sizes.nearest(n, axis)


class Predictor:
    """A bundle ready to label images.

    Args:
        bundle: as `load_bundle` gives it.
        device: "auto", "cpu", "cuda".
        engine: "torch", the reference; "torch-bf16", "openvino", "openvino-bf16", "openvino-int8", "onnxruntime", all of which have
            to agree with it first; "auto": what ends the job soonest, chosen at the first image. Or one that is open already, of this
            bundle, which is taken as it is.
        tta: "none"; "mirror": average over the mirrored versions of each tile, along the axes that training mirrored;
            "rotations": over 7 versions turned in the plane, if training turned by any angle.
        head: answer from a shallower nested U-Net, 1 the shallowest (UNet++ trained with a loss at that level): faster.
        on_choice: is told the engine and why, in a line, when it is known.

    Raises:
        ConfigError: words that do not fit the model, the machine or each other; a named engine that does not agree.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "auto",
        engine: str | Engine = "auto",
        tta: TTA = "none",
        head: int | None = None,
        on_choice: Callable[[str], None] = lambda reason: None,
    ) -> None:
        recycle_memory()
        check_turned(bundle.plan, tta)
        self.bundle, self.tta, self.mirror_axes, self._on_choice = bundle, tta, mirror_axes(bundle.plan, tta), on_choice
        self._engine: Engine | None
        if isinstance(engine, str):
            self._engines = Engines(bundle, engine=engine, device=device, tta=tta, head=head)
            self._engine = self._take(self._engines.named()) if self._engines.only else None
        else:
            self._engine = engine.averaged(tta, self.mirror_axes, bundle.plan.spacing_mm)
        self._sizes = self._known_sizes(head)

    def __call__(self, image: Image | Path | str, *, images: int = 1) -> np.ndarray:
        """The class of each voxel, (*S) int16, counted as in `bundle.legend.names`.

        Args:
            image: as read, or its file.
            images: how many are to come, this one and others about like it: what choosing an engine may cost.

        Raises:
            DataError: other channels or axes than the model was trained on.
        """
        if not isinstance(image, Image):
            image = read_image(Path(image))
        plan = self.bundle.plan
        self._check(image)
        if image.channels < plan.channels:
            warnings.warn(f"{image.path}: grey, and the model learned from colours: it may be wrong here", DataWarning, stacklevel=2)
        image = fit_channels(image, plan.channels)
        if plan.assumed_spacing_mm and not (image.spacing_known or plan.stated_spacing_mm or plan.resize_vox):
            sizes = " × ".join(f"{value:g}" for value in plan.assumed_spacing_mm)
            warnings.warn(f"{image.path}: no voxel size in the file; {sizes} mm is assumed, as in training", DataWarning, stacklevel=2)
        spacing_mm = voxel_size(image, plan)
        engine = self._engine_for(image.shape_vox, spacing_mm, images)
        return predict_labels(image.array, spacing_mm, plan=plan, network=self._sizes, engine=engine)

    @property
    def engine(self) -> Engine | None:
        """What computes; None where `auto` has not seen an image yet."""
        return self._engine

    def _engine_for(self, shape_vox: Shape, spacing_mm: Spacing, images: int) -> Engine:
        """The engine, chosen now if it is not yet."""
        if self._engine is None:
            job = job_of(shape_vox, spacing_mm, self.bundle.plan, self._sizes)
            tiles = job.tiles * images * passes(self.tta, self.mirror_axes)
            self._engine = self._take(self._engines.best(Job(tile_vox=job.tile_vox, tiles=tiles)))
        return self._engine

    def _take(self, choice: Choice) -> Engine:
        """The chosen engine, averaged as asked, and its reason told."""
        self._on_choice(choice.reason)
        return choice.engine.averaged(self.tta, self.mirror_axes, self.bundle.plan.spacing_mm)

    def _known_sizes(self, head: int | None) -> Sized:
        """The sizes by the bundle, or by the network where the bundle is silent or speaks of another head."""
        bundle = self.bundle
        if bundle.sizes is not None and bundle.context_vox is not None and head is None:
            return KnownSizes(bundle.sizes, bundle.context_vox)
        network: Sized | None = getattr(self._engine, "network", None)
        assert network is not None, "such bundles are for torch alone"
        return network

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


def job_of(shape_vox: Shape, spacing_mm: Spacing, plan: Plan, network: Sized) -> Job:
    """The tiles of one image, by its shape and voxel size as in its file."""
    grid = grid_shape(shape_vox, spacing_mm, plan)
    plane = grid[-plan.dims :]
    tile = choose_tile(plane, plan, network)
    context = (network.context_vox,) * plan.dims
    tiles = len(cover(plane, tile, overlap=plan.overlap, context_vox=context))
    tile_vox = tuple(size + 2 * network.context_vox for size in tile)
    return Job(tile_vox=tile_vox, tiles=tiles * math.prod(grid[: -plan.dims]))


def load(
    run: Path | str,
    *,
    device: str = "auto",
    engine: str = "auto",
    tta: TTA = "none",
    head: int | None = None,
    on_choice: Callable[[str], None] = lambda reason: None,
) -> Predictor:
    """The trained model of a run folder; the words are those of `Predictor`."""
    return Predictor(load_bundle(Path(run)), device=device, engine=engine, tta=tta, head=head, on_choice=on_choice)
