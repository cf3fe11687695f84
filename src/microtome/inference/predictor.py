"""A trained model, ready to label images with the engine that suits the job."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from microtome.bundle import Bundle, load_bundle
from microtome.config import Plan
from microtome.errors import ConfigError, DataError, DataWarning
from microtome.geometry import Shape, Sizes, Spacing
from microtome.images.files import open_volume
from microtome.images.image import Image
from microtome.images.volume import Volume, volume_of
from microtome.inference.engines import Engines
from microtome.inference.layout import Layout, Sized, choose_tile
from microtome.inference.mirroring import TTA, Engine, passes, with_spread
from microtome.inference.predict import Task, TileMemory, Wanted, layout_for, predict_fitting, smaller
from microtome.inference.search import Choice, Job
from microtome.inference.source import Grey, measure
from microtome.machine import recycle_memory, resident_bytes
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
        self.device, self.head = device, head
        self.asked = engine if isinstance(engine, str) else engine.name
        self._engine: Engine | None
        if isinstance(engine, str):
            self._engines = Engines(bundle, engine=engine, device=device, tta=tta, head=head)
            self._engine = self._take(self._engines.named()) if self._engines.only else None
        else:
            self._engine = engine.averaged(tta, self.mirror_axes, bundle.plan.spacing_mm)
        self._sizes = self._known_sizes(head)
        self._base: Base | None = None

    def __call__(self, image: Image | Path | str, *, images: int = 1) -> np.ndarray:
        """The class of each voxel, (*S) int16, counted as in `bundle.legend.names`.

        Args:
            image: as read, or its file.
            images: how many are to come, this one and others about like it: what choosing an engine may cost.

        Raises:
            DataError: other channels or axes than the model was trained on.
        """
        volume = volume_of(image) if isinstance(image, Image) else open_volume(Path(image))
        return self.maps(volume, Wanted(), images=images)["labels"]

    def maps(
        self,
        volume: Volume,
        wanted: Wanted,
        *,
        images: int = 1,
        limit_bytes: int | None = None,
        on_voxels: Callable[[int, int], None] = lambda done, of: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> dict[str, np.ndarray]:
        """All that is wanted of a volume, in memory; with smaller tiles where memory turns out to be short. The words are those of `task`.

        Args:
            volume: an image.
            wanted: what is to come of it.
            images: how many are to come.
            limit_bytes: memory that this process may take, all in all.
            on_voxels: is told (done, of).
            say: is told how the volume is cut where memory is to be kept, and of smaller tiles.

        Raises:
            ConfigError: the memory that is allowed is not enough.
            DataError: other channels or axes than the model was trained on.
            RunError: memory is too short for the smallest tile.
        """
        task = self.task(volume, wanted, images=images, limit_bytes=limit_bytes)
        if limit_bytes is not None:
            say(f"{volume.path}: {task.layout.words}")
        layout_of = partial(self._cut, volume, wanted, limit_bytes, None)
        return predict_fitting(task, layout_of, on_voxels, say)

    def smaller(self, volume: Volume, wanted: Wanted, layout: Layout, said: str, *, say: Callable[[str], None]) -> Layout:
        """The layout of a smaller tile for a store, of the same bricks, as memory was too short for this one.

        Raises:
            RunError: there is no smaller one.
        """
        plan = self.bundle.plan
        spacing_mm = voxel_size(volume, plan)
        words: dict[str, Any] = {"wanted": wanted, "bricks": layout.brick, "limit_bytes": layout.peak_bytes}
        layout_of = partial(layout_for, volume, spacing_mm, plan, self._sizes, **words)
        return smaller(layout, lambda halvings: layout_of(tile=TileMemory(halvings=halvings)), said, str(volume.path), say)

    def task(
        self,
        volume: Volume,
        wanted: Wanted = Wanted(),  # noqa: B008 - frozen
        *,
        images: int = 1,
        limit_bytes: int | None = None,
        bricks: Shape | None = None,
    ) -> Task:
        """What there is to do for a volume, all that must be known of it measured.

        Args:
            volume: an image.
            wanted: what is to come of it.
            images: as above.
            limit_bytes: memory that this process may take, all in all.
            bricks: sides (*S) of what is written at once; None where all comes into arrays.

        Raises:
            ConfigError: the memory is not enough; says how much is.
            DataError: other channels or axes than the model was trained on.
        """
        layout = self.layout(volume, wanted, images=images, limit_bytes=limit_bytes, bricks=bricks)
        grey = Grey(self.bundle.plan.normalisation, measure(volume, layout.shapes.grid, self.bundle.plan))
        return self.task_of(volume, wanted, layout, grey)

    def task_of(self, volume: Volume, wanted: Wanted, layout: Layout, grey: Grey) -> Task:
        """The same with what was decided and measured before; the engine is there already."""
        assert self._engine is not None, "a layout was made with it"
        engine = with_spread(self._engine) if wanted.spread else self._engine
        return Task(volume=volume, plan=self.bundle.plan, layout=layout, grey=grey, engine=engine, wanted=wanted)

    def layout(
        self, volume: Volume, wanted: Wanted, *, images: int = 1, limit_bytes: int | None = None, bricks: Shape | None = None
    ) -> Layout:
        """How a volume is cut, the engine chosen for it if it is not yet; the words are those of `task`."""
        plan = self.bundle.plan
        self._check(volume)
        if volume.channels < plan.channels:
            warnings.warn(f"{volume.path}: grey, and the model learned from colours: it may be wrong here", DataWarning, stacklevel=2)
        if plan.assumed_spacing_mm and not (volume.spacing_known or plan.stated_spacing_mm or plan.resize_vox):
            sizes = " × ".join(f"{value:g}" for value in plan.assumed_spacing_mm)
            warnings.warn(f"{volume.path}: no voxel size in the file; {sizes} mm is assumed, as in training", DataWarning, stacklevel=2)
        engine = self._engine_for(volume.shape_vox, voxel_size(volume, plan), images)
        if limit_bytes is not None and self._base is None:
            self._base = measure_base(engine, volume.shape_vox, plan, self._sizes)
        return self._cut(volume, wanted, limit_bytes, bricks, 0)

    def _cut(self, volume: Volume, wanted: Wanted, limit_bytes: int | None, bricks: Shape | None, halvings: int) -> Layout:
        """How a volume is cut, with a tile that is halved so often."""
        plan = self.bundle.plan
        words: dict[str, Any] = {"wanted": wanted, "bricks": bricks, "tile": TileMemory(halvings=halvings)}
        if limit_bytes is not None:
            assert self._base is not None, "it was measured"
            words |= {"limit_bytes": limit_bytes - self._base.resident, "tile": TileMemory(self._base.each, halvings)}
        return layout_for(volume, voxel_size(volume, plan), plan, self._sizes, **words)

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
        # The samples that it was held to are of no more use, and those of many classes take as much memory as a tile does.
        del self._engines
        self.bundle = replace(self.bundle, samples=None)
        return choice.engine.averaged(self.tta, self.mirror_axes, self.bundle.plan.spacing_mm)

    def _known_sizes(self, head: int | None) -> Sized:
        """The sizes by the bundle, or by the network where the bundle is silent or speaks of another head."""
        bundle = self.bundle
        if bundle.sizes is not None and bundle.context_vox is not None and head is None:
            return KnownSizes(bundle.sizes, bundle.context_vox)
        network: Sized | None = getattr(self._engine, "network", None)
        assert network is not None, "such bundles are for torch alone"
        return network

    def _check(self, image: Volume) -> None:
        """Refuse an image of another kind than the training images."""
        plan = self.bundle.plan
        if image.channels not in (plan.channels, 1 if plan.channels == 3 else plan.channels):
            expected = f"{plan.channels} channel{'s' if plan.channels > 1 else ''} as in training"
            raise DataError(
                image.path, expected=expected, got=str(image.channels), do="convert the image, or train on such images", code="D058"
            )
        if len(image.shape_vox) != len(plan.spacing_mm):
            got = f"{len(image.shape_vox)} axes"
            raise DataError(
                image.path,
                expected=f"{len(plan.spacing_mm)} axes as in training",
                got=got,
                do="use a model trained on such images",
                code="D058",
            )


class Base(NamedTuple):
    """Memory of a process with its engine warm, and of each voxel of a tile in the engine."""

    resident: int
    each: float


def measure_base(engine: Engine, shape_vox: Shape, plan: Plan, network: Sized) -> Base:
    """What the process holds once the network has computed a tile of a patch's size, measured by computing one."""
    before = resident_bytes()
    tile = choose_tile(shape_vox[-plan.dims :], plan, network, grow=False)
    engine(np.zeros((plan.channels, *(side + 2 * network.context_vox for side in tile)), np.float32))
    after = resident_bytes(most=True)
    return Base(after, max(0, after - before) / math.prod(tile))


def mirror_axes(plan: Plan, tta: TTA) -> tuple[int, ...]:
    """The axes along which prediction may mirror: those that training mirrored.

    Raises:
        ConfigError: mirrored averaging for a network that never saw a mirrored image.
    """
    if tta != "mirror":
        return ()
    if not plan.augment.flip_axes:
        raise ConfigError(
            "--tta mirror", expected="a model trained on mirrored images", got="augment.flip_axes ()", do="leave it out", code="C028"
        )
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
        raise ConfigError(
            "--tta rotations", expected="a model trained on images turned by any angle, up to 180", got=got, do=do, code="C028"
        )


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
