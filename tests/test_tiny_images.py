"""Images of one pixel and volumes thinner than the patch go the whole road: inspect, plan, train, predict."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from microtome.data.dataset import open_dataset
from microtome.data.quality import inspect_fold
from microtome.images.files import read_image
from microtome.inference.predict_files import predict_files
from microtome.inference.predictor import load
from microtome.training.rehearsal import make_plan
from microtome.training.run import train
from tests.folders import nifti, png
from tests.small import one_thread

__all__ = ["one_thread"]

Shapes = Sequence[tuple[int, ...]]
ONE_PIXEL, ONE_VOXEL = [(1, 1)] * 4, [(1, 1, 1)] * 4
LINES_2D, PLANES_3D = [(1, 1), (1, 7), (9, 1), (33, 5)], [(1, 1, 1), (1, 12, 12), (12, 1, 12), (12, 12, 1)]


@pytest.mark.parametrize(
    ("write", "shapes", "unseen", "dims", "thin"),
    [
        (png, ONE_PIXEL, [(1, 1), (30, 20)], 2, 4),
        (png, LINES_2D, [(1, 1), (1, 40)], 2, 3),
        (nifti, ONE_VOXEL, [(1, 1, 1), (3, 12, 9)], 2, 4),
        (nifti, PLANES_3D, [(1, 1, 1), (2, 30, 1)], 3, 3),
        (nifti, [(12, 14, 16)] * 4, [(1, 1, 1), (2, 14, 16), (12, 3, 40)], 3, 0),
    ],
    ids=["pixels", "lines", "voxels", "planes", "thinner than the patch"],
)
def test_it_is_inspected_planned_trained_on_and_predicted(
    write: Callable[..., Path], shapes: Shapes, unseen: Shapes, dims: int, thin: int, tmp_path: Path
) -> None:
    rng, suffix = np.random.default_rng(0), ".png" if write is png else ".nii.gz"
    for number, shape in enumerate(shapes):
        write(tmp_path / "data" / "images" / f"c{number}{suffix}", rng.integers(0, 256, shape).astype(np.uint8))
        # Of a single voxel too both classes are there, in one case or another.
        label = (np.arange(np.prod(shape)).reshape(shape) + number) % 2
        write(tmp_path / "data" / "labels" / f"c{number}{suffix}", label.astype(np.uint8))
    for number, shape in enumerate(unseen):
        write(tmp_path / "unseen" / f"u{number}{suffix}", rng.integers(0, 256, shape).astype(np.uint8))
    dataset = open_dataset(tmp_path / "data")
    inspection = inspect_fold(dataset, "1/2", 0)
    assert inspection.ok
    assert sum(len(finding.files) for finding in inspection.findings if finding.code == "thin-image") == thin
    plan = make_plan(dataset, steps=2, fold="1/2", device="cpu", memory_gb=2)
    assert plan.dims == dims
    if not thin:
        assert min(plan.patch_vox) > min(unseen[1])
    # As it was planned, but narrower, with fewer patches at a time.
    network = plan.network.model_copy(update={"widths": tuple(4 for _ in plan.network.widths)})
    train(dataset, plan.model_copy(update={"network": network, "batch": 2}), tmp_path / "run", device="cpu")
    predict_files(load(tmp_path / "run", device="cpu", engine="torch"), [tmp_path / "unseen"], tmp_path / "out")
    for number, shape in enumerate(unseen):
        found = read_image(tmp_path / "out" / f"u{number}{suffix}").array[0]
        assert found.shape == shape
        assert set(np.unique(found)) <= {0, 1}
