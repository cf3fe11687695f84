"""One image -> a finished OME-Zarr store: predicted brick by brick, by one process or many, then mended from store to store."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from microtome.data.case import Case
from microtome.data.legend import Legend
from microtome.data.parts import parts_of
from microtome.data.reading import open_case
from microtome.errors import DataError
from microtome.geometry import Shape
from microtome.images.chunked import ChunkedArray
from microtome.images.omezarr import create_image, create_labels, finish, source_of
from microtome.images.stores import OURS, Documents, name_of, read_json, remove_store
from microtome.images.volume import Volume, url_of
from microtome.inference.asked import Options
from microtome.inference.bricks import LABELS, RECORD, Bricks, recorded, same_request, stored_names, stored_values
from microtome.inference.finishing import wanted_of
from microtome.inference.mending import Mending
from microtome.inference.predictor import Predictor
from microtome.inference.stored import OnVoxels, Worker, fill_here, job_of, open_store, request_of
from microtome.machine import shortage_of


def write_store(
    predictor: Predictor,
    case: Case,
    place: Path,
    options: Options,
    *,
    images: int = 1,
    say: Callable[[str], None] = lambda line: None,
    on_voxels: OnVoxels = lambda done, of: None,
) -> Path:
    """Predict one case into an OME-Zarr store, going on where a killed call left it; returns its place.

    What is to be mended is predicted into a store beside it first, which goes when all is done.

    Raises:
        ConfigError: the memory is not enough.
        DataError: another prediction lies there, or the image does not fit the model.
        RunError: the store cannot be written, or workers were lost.
    """
    stage = place.with_name(f".stage-{place.name}") if options.mending else place
    wanted, request, found = wanted_of(predictor, options), {"clean-up and instances": options.words}, recorded(place)
    if found is None and recorded(stage) is None:
        _check_empty(place)
    if found is not None and found.complete and same_request(found.request, request_of(predictor, case, open_case(case), wanted) | request):
        say(f"{name_of(place)}: finished already")
        _remove_stage(stage, place)
        return place
    if options.mending and found is not None:
        raise DataError(
            name_of(place), expected="nothing there", got="another prediction", do="give another --out, or remove it", code="D027"
        )
    bricks, volume = open_store(predictor, case, stage, wanted, limit_bytes=options.limit_bytes, images=images, request=request)
    say(bricks.record.layout.words)
    if not bricks.record.complete:

        def fill() -> None:
            job = job_of(predictor, case, bricks)
            if options.cluster:
                from microtome.inference.cluster import fill_on_cluster

                fill_on_cluster(options.cluster, job, bricks, on_voxels=on_voxels, say=say)
            else:
                fill_here(Worker(job, predictor), on_voxels)

        while said := shortage_of(fill):
            # From the first brick: of two sizes of tile the labels would tell where one ends and the other begins.
            bricks.begin_anew(predictor.smaller(volume, wanted, bricks.record.layout, said, say=say))
        bricks.complete(volume, source_of(case.images[0], place), pyramids=not options.mending)
    if options.mending:
        mend_store(bricks, place, volume, options, predictor.bundle.legend, source=source_of(case.images[0], place))
        _remove_stage(stage, place)
    return place


def _check_empty(place: Path) -> None:
    """Refuse to write into what somebody else has made; of ours a kill may have left no more than the folder of the record.

    Raises:
        DataError: something lies there.
    """
    if url_of(place) is not None:
        held = any(read_json(place, name) is not None for name in (".zattrs", ".zgroup", "zarr.json"))
    else:
        held = place.is_file() or (place.is_dir() and any(path.name != OURS for path in place.iterdir()))
    if held:
        raise DataError(
            name_of(place), expected="nothing there", got="what `predict` did not write", do="give another --out, or remove it", code="D027"
        )


def _remove_stage(stage: Path, place: Path) -> None:
    """Remove what was only on the way, or what a kill left of it."""
    if stage != place and (url_of(stage) is not None or stage.exists()):
        remove_store(stage)


def mend_store(stage: Bricks, place: Path, volume: Volume, options: Options, legend: Legend, *, source: str) -> None:
    """Bring a finished prediction to another store, its labels mended and its objects numbered, a few bricks in memory at a time.

    After a kill it is done again from the beginning: nothing in the stage is changed.
    """
    values = stored_values(legend)
    background = legend.background
    assert background is not None, "it was checked"
    classes = tuple(int(values[index]) for index in legend.foreground)
    shape, block = volume.shape_vox, stage.chunk_vox
    mending = Mending(
        options=options,
        background=int(values[background]),
        classes=classes,
        spacing_mm=volume.spacing_mm,
        block_vox=block,
        scratch=lambda shape_vox, kind: create_image(stage.place, "scratch", shape_vox, kind, block),
    )
    found = stage.opened()
    made: dict[str, Mapping[int, str] | None] = {LABELS: stored_names(legend)}
    labels = create_labels(place, LABELS, shape, values.dtype, block)
    if options.clean:
        mending.labels(found["labels"], labels)
    else:
        copy_array(found["labels"], labels, block)
    if options.instances:
        made["instances"] = None
        mending.instances(labels, found.get("foreground"), create_labels(place, "instances", shape, np.dtype(np.uint32), block))
    for name, (layers, kind) in stage.wanted.arrays(len(legend.names)).items():
        if name not in ("labels", "foreground"):
            made[name] = None
            copy_array(found[name], create_image(place, name, shape, kind, block, layers=layers or None), block)
    for name, names in made.items():
        finish(place, name, like=volume, values=names, source=source)
    Documents(place).write(RECORD, replace(stage.record, complete=True).to_json())


def copy_array(source: ChunkedArray, target: ChunkedArray, block_vox: Shape) -> None:
    """Copy an array (*S) or (layers, *S) block by block, a layer at a time."""
    lead = len(source.shape) - len(block_vox)
    for box in parts_of(source.shape[lead:], block_vox, math.prod(block_vox)):
        for layer in np.ndindex(source.shape[:lead]):
            part = (*(slice(i, i + 1) for i in layer), *box)
            target[part] = source[part]
