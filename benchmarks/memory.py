"""`make bench-memory`: what predicting ever longer OME-Zarr volumes takes; rows of results/memory.json.

    python -m benchmarks.memory [--quick] [--engine openvino] [--only CLASSES]

Each is a `microtome predict` of its own; the peak is the largest resident set of that process, as the kernel counted it. The network
is thin, so that most of the time goes into what is measured: reading, tiles, slabs, writing. `base_bytes` is the same command for a
volume of one tile: the process, its libraries and the network.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from benchmarks.cases import SETTINGS, bundle_of, case
from benchmarks.forward import write_graphs
from benchmarks.rows import CACHE, about, read_results, say, write_results
from benchmarks.startup import microtome
from microtome.files import write_json

CLASSES = (2, 14, 100)
DEPTHS = (256, 1024, 4096)
SIDE = 512
CHUNK = (64, 128, 128)
# A process begins with the peak of the one that made it: it is made by a small one.
WATCH = """
import json, os, resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak}))
sys.exit(code)
"""
# Rows of blobs that are written again and again.
PERIOD = 64


def main() -> None:
    """Run, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="depths of 64 and 256, 2 and 14 classes")
    parser.add_argument("--engine", default="openvino", help="what computes")
    parser.add_argument("--only", type=int, help="this number of classes alone")
    options = parser.parse_args()
    depths, counts = ((64, 256), (2, 14)) if options.quick else (DEPTHS, CLASSES)
    name = "memory-quick" if options.quick else "memory"
    # Those that are not measured now stay.
    rows = [row for row in read_results(name)[0] if options.only not in (None, row["classes"])]
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        for classes in counts if options.only is None else (options.only,):
            base, _ = measured(classes, (32, 128, 128), options.engine, Path(folder))
            for depth in depths:
                shape = (depth, SIDE, SIDE)
                peak, seconds = measured(classes, shape, options.engine, Path(folder))
                row = {"shape": list(shape), "classes": classes, "peak_bytes": peak, "seconds": seconds, "base_bytes": base}
                what = f"{'x'.join(map(str, shape))}, {classes} classes"
                say(f"{what}: {peak / 2**20:.0f} MB ({base / 2**20:.0f} MB of it the process), {seconds:.0f} s")
                rows.append(row)
                command = " ".join(["python -m benchmarks.memory", *sys.argv[1:]])
                write_results(name, sorted(rows, key=lambda row: row["classes"]), about(command))


def measured(classes: int, shape_vox: tuple[int, int, int], engine: str, folder: Path) -> tuple[int, float]:
    """Peak resident bytes and seconds of `microtome predict` of a volume of that shape."""
    setting = SETTINGS["thin 32x128x128"]._replace(classes=classes)
    bundle = bundle_of(setting)
    write_graphs(bundle)
    volume, out = volume_of(shape_vox), folder / "out"
    words = microtome("predict", bundle, volume, "--out", out, "--engine", engine)
    done = subprocess.run([sys.executable, "-c", WATCH, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    shutil.rmtree(out)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"] * (1 if sys.platform == "darwin" else 1024), found["seconds"]


def volume_of(shape_vox: tuple[int, int, int]) -> Path:
    """An OME-Zarr of blobs, the same rows again and again, made when it is missing."""
    place = CACHE / "memory" / f"{'x'.join(map(str, shape_vox))}.ome.zarr"
    if (place / ".zattrs").exists():
        return place
    shutil.rmtree(place, ignore_errors=True)
    rows = min(PERIOD, shape_vox[0])
    image_CS, _ = case(SETTINGS["thin 32x128x128"], (rows, *shape_vox[1:]), seed=5)
    block = np.clip(image_CS[0] * 40 + 100, 0, 255).astype(np.uint8)
    metadata = {
        "shape": shape_vox,
        "chunks": [min(*pair) for pair in zip(CHUNK, shape_vox, strict=True)],
        "dtype": "|u1",
        "dimension_separator": "/",
    }
    spec: dict[str, Any] = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{place}/0/"}, "metadata": metadata}
    store = ts.open(spec, create=True).result()
    for first in range(0, shape_vox[0], rows):
        store[first : first + rows].write(block[: min(rows, shape_vox[0] - first)]).result()
    axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
    scale = [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]
    write_json(place / ".zgroup", {"zarr_format": 2})
    write_json(
        place / ".zattrs",
        {"multiscales": [{"version": "0.4", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}]},
    )
    return place


if __name__ == "__main__":
    main()
