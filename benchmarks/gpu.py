"""`make bench-gpu`: training, prediction and the feeding of samples on a GPU; writes results/gpu.json. Left out where there is none.

    python -m benchmarks.gpu [--minutes 7] [--only WORDS] [--out gpu]

"default" is plain PyTorch as people write it: float32 as torch sets it up (TF32 in convolutions), eager, contiguous; of the samples:
made by the processor's threads. The limit is the rate of a bf16 matrix product of 8192 measured in the same run; operations are
counted as `models.trace` does, a training step as three forward passes. Everything runs in one process, one row after another; a
row that fails says why and the others go on; what the minutes do not suffice for says so. Each row is written when it is done.
"""

import argparse
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rows import about, rounded, say, write_results
from microtome.config import AugmentConfig, LossConfig, NetworkConfig, OptimiserConfig, Plan
from microtome.inference.cuda_graphs import graphed, plain_forward
from microtome.inference.devices import arithmetic, to_device
from microtome.models.network import Network
from microtome.models.registry import build
from microtome.models.trace import trace
from microtome.training.compiled import compiled, fast_kernels
from microtome.training.losses import segmentation_loss

GPU = torch.device("cuda")
CLASSES = 3
SIDE = 8192
# Steps before timing begins: kernels are chosen and memory is taken in them.
WARM_UP = 3


class Work(NamedTuple):
    """A network and the batch that it learns from.

    Attributes:
        network: a name of the registry.
        patch_vox: of one sample, and of a tile.
        batch: samples a step.
    """

    network: str
    patch_vox: tuple[int, ...]
    batch: int

    @property
    def name(self) -> str:
        """As rows call it."""
        return f"{self.network} {'x'.join(map(str, self.patch_vox))}"


class Job(NamedTuple):
    """A row to be measured.

    Attributes:
        work: what is done.
        engine: how; the first of a work is "default".
        measure: gives the row's numbers.
        seconds: that it may take; with fewer left it is not begun.
    """

    work: str
    engine: str
    measure: Callable[[], dict[str, Any]]
    seconds: float = 30.0


WORKS = (
    Work("nnunet_plain", (128, 128, 128), 2),
    Work("unet_same", (512, 512), 8),
    Work("modern_unet", (512, 512), 16),
    Work("modern_unet", (128, 128, 128), 2),
)
TRAINING = ("default", "bf16", "bf16, channels last", "bf16, channels last, compiled")
PREDICTION = ("default", "fp32 exact", "bf16, channels last", "graph", "graph, compiled")
FEEDING = ("default", "on the GPU")
# torch.compile, forward and backward.
COMPILING_SECONDS = 120.0
FEEDING_SECONDS = 4.0


def main() -> None:
    """Measure, write, print."""
    options = parsed()
    if not torch.cuda.is_available():
        print(f"bench-gpu: left out, torch {torch.__version__} finds no GPU here")
        return
    ends = time.perf_counter() + 60 * options.minutes
    chosen = [job for job in jobs() if options.only.lower() in f"{job.work}, {job.engine}".lower()]
    if not chosen:
        sys.exit(f"bench-gpu: nothing has `{options.only}` in its name")
    properties = torch.cuda.get_device_properties(0)
    limits = {"bf16": measured("matrix product", matrix_rate).get("rate")}
    facts = about(" ".join(["python -m benchmarks.gpu", *sys.argv[1:]]), limits)
    facts["machine"] += f"; {properties.name}, {properties.total_memory / 2**30:.0f} GB, CUDA {torch.version.cuda}"
    say(f"{facts['machine']}: bf16 {(limits['bf16'] or 0) / 1e12:.0f} TFLOP/s")
    rows: list[dict[str, Any]] = []
    for job in chosen:
        left = ends - time.perf_counter()
        found = measured(job.work, job.measure) if left > job.seconds else {"error": f"not begun, {left:.0f} s were left"}
        rows.append(row_of(job, found, rows, limits["bf16"]))
        write_results(options.out, rows, facts)
        say("  ".join(f"{name} {value}" for name, value in rounded(rows[-1]).items() if value is not None))


def jobs() -> list[Job]:
    """All rows, those that compile last: they take most of the time."""
    quick, slow = [], []
    for work in WORKS:
        for engine in TRAINING:
            job = Job(f"train {work.name} x{work.batch}", engine, partial(train, work, engine))
            (slow if "compiled" in engine else quick).append(job)
        for engine in PREDICTION:
            job = Job(f"predict {work.name}", engine, partial(predict, work, engine))
            (slow if "compiled" in engine else quick).append(job)
    for work in WORKS[1], WORKS[3]:
        shape = work.name.removeprefix(work.network)
        quick += [Job(f"samples{shape} x{work.batch}", engine, partial(feed, work, engine)) for engine in FEEDING]
        quick.append(Job(f"run {work.name} x{work.batch}", "microtome", partial(run, work)))
    return quick + [job._replace(seconds=COMPILING_SECONDS) for job in slow]


def measured(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Its numbers with the most memory that it took on the GPU, or why there are none."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        with warnings.catch_warnings():
            # Both go on without what was to be measured.
            warnings.filterwarnings("error", message="no CUDA graph|torch.compile failed")
            return {**measure(), "peak_mb": torch.cuda.max_memory_allocated() / 2**20}
    except Exception as error:  # noqa: BLE001 - the other rows are worth as much
        say(f"{name}: {type(error).__name__}: {error}")
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def row_of(job: Job, found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], rate: float | None) -> dict[str, Any]:
    """The row of a job: its numbers, compared with the default's and with the limit."""
    row: dict[str, Any] = {"work": job.work, "engine": job.engine, "seconds": None, "ratio_to_default": None}
    row |= {"labels_equal": None, "limit_ratio": None} | dict(found)
    operations = row.pop("operations", None)
    first = next((other for other in rows if other["work"] == job.work and other["engine"] == "default"), row)
    if row["seconds"] and first["seconds"]:
        row["ratio_to_default"] = first["seconds"] / row["seconds"]
    if row["seconds"] and operations:
        row["tflops"] = operations / row["seconds"] / 1e12
        row["limit_ratio"] = operations / row["seconds"] / rate if rate else None
    return row


def matrix_rate() -> dict[str, Any]:
    """Operations a second of a product of bf16 matrices."""
    a, b = (torch.randn(SIDE, SIDE, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return {"rate": 2 * SIDE**3 / timed(lambda: torch.mm(a, b, out=out))["seconds"]}


def train(work: Work, engine: str) -> dict[str, Any]:
    """A training step: forward, loss, backward, length of the gradient, AdamW; without averaging and samples (see `run`)."""
    precision = "fp32" if engine == "default" else "bf16"
    network, (image_BCS, label_BS) = built(work).to(GPU), blobs(work.batch, work.patch_vox)
    if "channels last" in engine:
        network, image_BCS = to_device(network, GPU, len(work.patch_vox)), image_BCS.contiguous(memory_format=layout(work))
    began = time.perf_counter()
    with nullcontext() if engine == "default" else fast_kernels(GPU):
        call = compiled(network, image_BCS, precision) if "compiled" in engine else network
        prepared = time.perf_counter() - began
        found = timed(training_step(call, network, image_BCS, label_BS, precision))
    torch.compiler.reset()
    return {
        **found,
        "samples_per_second": work.batch / found["seconds"],
        "operations": 3 * work.batch * operations(work),
        "compile_seconds": prepared if "compiled" in engine else None,
    }


def training_step(call: Callable[..., Any], network: Network, image_BCS: Tensor, label_BS: Tensor, precision: str) -> Callable[[], None]:
    """A step, but for its learning rate and the averaging of its weights that of the training loop."""
    parameters, loss = list(network.parameters()), LossConfig()
    optimiser = torch.optim.AdamW(parameters, lr=1e-3)

    def step() -> None:
        with arithmetic(image_BCS.device, precision):
            outputs = call(image_BCS)
        value = segmentation_loss(outputs if isinstance(outputs, list) else [outputs], label_BS, loss)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 12.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def predict(work: Work, engine: str) -> dict[str, Any]:
    """One tile, labels compared with those of exact float32."""
    image_BCS, _ = blobs(1, work.patch_vox, seed=1)
    network = taught(work)
    exact = plain_forward(network, GPU, "fp32")(image_BCS).argmax(1)
    if engine not in ("default", "fp32 exact"):
        network = to_device(network, GPU, len(work.patch_vox))
    began = time.perf_counter()
    calls: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "default": lambda: network,
        "fp32 exact": lambda: plain_forward(network, GPU, "fp32"),
        "bf16, channels last": lambda: plain_forward(network, GPU, "bf16"),
        "graph": lambda: graphed(network, image_BCS, precision="bf16"),
        "graph, compiled": lambda: graphed(network, image_BCS, precision="bf16", compile_first=True),
    }
    call = calls[engine]()
    prepared = time.perf_counter() - began
    with torch.inference_mode():
        found = timed(lambda: call(image_BCS))
        equal = (call(image_BCS).argmax(1) == exact).float().mean().item()
    torch.compiler.reset()
    return {**found, "operations": operations(work), "labels_equal": equal, "prepare_seconds": prepared}


def taught(work: Work) -> Network:
    """A network that has seen some blobs, so that its labels mean something, in evaluation mode; contiguous."""
    network, (image_BCS, label_BS) = built(work).to(GPU), blobs(work.batch, work.patch_vox)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            # So few steps: with the 0.01 of some papers the running statistics would still be those of the beginning.
            module.momentum = 0.2
    step = training_step(network, network, image_BCS, label_BS, "bf16")
    for _ in range(30):
        step()
    return network.eval()


def feed(work: Work, engine: str) -> dict[str, Any]:
    """Batches and nothing else, at the augmentation of a default plan: seconds a sample."""
    # Late: this brings the readers of images with it, and the rows above do without.
    from microtome.training.feeding import Batches

    with Batches([stored(work)], plan_of(work), GPU, on_device=engine != "default") as batches:
        for step in range(WARM_UP):
            batches.get(step)
        torch.cuda.synchronize()
        began, step = time.perf_counter(), WARM_UP
        while time.perf_counter() - began < FEEDING_SECONDS:
            batches.get(step)
            torch.cuda.synchronize()
            step += 1
    seconds = (time.perf_counter() - began) / (step - WARM_UP) / work.batch
    return {"seconds": seconds, "samples_per_second": 1 / seconds, "threads": batches.pool._max_workers}


def run(work: Work) -> dict[str, Any]:
    """The training loop itself: samples, step, averaging; seconds a step without the first ones."""
    from microtome.training.checkpoint import new_state
    from microtome.training.loop import Hooks, train_steps

    plan = plan_of(work)
    state = new_state(to_device(built(work), GPU, plan.dims), plan)
    hooks = Hooks(log=lambda event: None, validate=lambda state: {"score": 0.0}, save=lambda state, best: None, seconds_left=lambda: None)
    clock = train_steps(state, [stored(work)], plan, GPU, hooks)
    seconds = statistics.median(clock.step_seconds[WARM_UP:])
    return {"seconds": seconds, "samples_per_second": work.batch / seconds, "operations": 3 * work.batch * operations(work)}


def timed(call: Callable[[], object], budget_seconds: float = 2.0, most: int = 30) -> dict[str, float]:
    """Median wall time of a call, the GPU waited for each time, after some to warm up; and of the first."""
    times = []
    while len(times) < WARM_UP + 1 or (sum(times[WARM_UP:]) < budget_seconds and len(times) < WARM_UP + most):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return {"seconds": statistics.median(times[WARM_UP:]), "first_seconds": times[0]}


def config_of(work: Work) -> NetworkConfig:
    """The paper's sizes; of the modern U-Net those that a plan gives on a GPU."""
    if work.network != "modern_unet":
        return NetworkConfig(name=work.network)
    from microtome.plan import choose_network
    from microtome.step_memory import Resources

    resources = Resources(minutes=60, memory_bytes=2**36, gpu=True)
    return choose_network(work.network, work.patch_vox, (1.0,) * len(work.patch_vox), resources)[0]


def built(work: Work) -> Network:
    """Its network, freshly initialised from one seed."""
    torch.manual_seed(0)
    return build(work.network, dims=len(work.patch_vox), in_channels=1, classes=CLASSES, config=config_of(work))


def operations(work: Work) -> float:
    """Floating-point operations of a forward pass of one sample: two a multiply-add, padding counted as image."""
    return 2.0 * trace(built(work), (1, *work.patch_vox)).multiply_adds


def layout(work: Work) -> torch.memory_format:
    """Channels last."""
    return torch.channels_last if len(work.patch_vox) == 2 else torch.channels_last_3d


def blobs(batch: int, shape_vox: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (B, 1, *S) in which classes are brighter, and noisy, and their labels (B, *S) int16, on the GPU."""
    generator = torch.Generator(GPU).manual_seed(seed)
    field = torch.randn(batch, 1, *shape_vox, device=GPU, generator=generator)
    for _ in range(3):
        field = (F.avg_pool2d if len(shape_vox) == 2 else F.avg_pool3d)(field, 9, stride=1, padding=4)
    field = field / field.std()
    label = (field > 0.3).to(torch.int16) + (field > 1.0).to(torch.int16)
    image = label + 0.4 * torch.randn(field.shape, device=GPU, generator=generator)
    return (image - image.mean()) / image.std(), label[:, 0]


def plan_of(work: Work) -> Plan:
    """A plan of 40 steps with the augmentation that `plan` gives to microscopy."""
    dims = len(work.patch_vox)
    gap = max(8.0, min(32.0, max(work.patch_vox) / 4))
    augment = AugmentConfig(
        flip_axes=tuple(range(dims)),
        rotation_deg=(180.0,) if dims == 2 else (180.0, 30.0, 30.0),
        elastic_spacing=(gap,) * dims,
        elastic_sd=(gap / 8,) * dims,
    )
    return Plan(
        dims=dims,  # type: ignore[arg-type]
        channels=1,
        classes=tuple(f"class {k}" for k in range(CLASSES)),
        spacing_mm=(1.0,) * dims,
        network=config_of(work),
        patch_vox=work.patch_vox,
        batch=work.batch,
        steps=40,
        precision="bf16",
        augment=augment,
        optimiser=OptimiserConfig(learning_rate=3e-4),
    )


def stored(work: Work) -> Any:
    """One case in memory, half as large again as a patch along each axis."""
    from microtome.training.store import StoredCase

    image, label = (values[0].cpu().numpy() for values in blobs(1, tuple(n + n // 2 for n in work.patch_vox)))
    voxels = {k: np.argwhere(label == k)[::97] for k in range(CLASSES)}
    quantiles = np.quantile(image[:, ::4, ::4].reshape(1, -1), np.linspace(0, 1, 257), axis=1).T.astype(np.float32)
    counts = {k: int((label == k).sum()) for k in range(CLASSES)}
    return StoredCase("blobs", image=image, label=label, class_voxels=voxels, class_counts=counts, weight=1.0, quantiles=quantiles)


def parsed() -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.0, help="begin no row that may end later")
    parser.add_argument("--only", default="", help="rows with these words in their name")
    parser.add_argument("--out", default="gpu", help="name of the file of results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
