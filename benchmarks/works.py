"""What `make bench` times: the list of works and their engines."""

from benchmarks.rows import CACHE
from benchmarks.timing import Work

TORCH = ("torch", "torch-bf16")
GRAPHS = ("onnxruntime", "openvino", "openvino-bf16", "openvino-int8")
TRAINING = ("default", "recycled memory", "microtome-fp32", "microtome-bf16")
# Every engine on the networks of the papers, those that a person gets on ours.
FORWARD = {
    "unet_same 512x512": ("default", "recycled memory", *TORCH, *GRAPHS),
    "unet3d 116x132x132": ("default", "recycled memory", *TORCH, *GRAPHS),
    "nnunet_plain 64x128x128": ("default", "recycled memory", *TORCH, *GRAPHS),
    "modern_unet 512x512": ("default", "torch-bf16", "openvino-bf16", "openvino-int8"),
    "modern_unet 64x128x128": ("default", "torch-bf16", "openvino-bf16", "openvino-int8"),
}
STEPS = {
    "unet_same 512x512": TRAINING,
    "unet3d 116x132x132": ("default", "microtome-bf16"),
    "nnunet_plain 64x128x128": TRAINING,
    "modern_unet 512x512": ("default", "microtome-bf16"),
    "modern_unet 64x128x128": ("default", "microtome-bf16"),
}
# From the network's grid of a volume of 256 x 256 x 160 whose voxels are 0.8 of the plan's.
GRID, VOLUME = (128, 205, 205), (160, 256, 256)
PAIR = ("default", "microtome")


def works(tiny: bool = False) -> list[Work]:
    """All works in the order of the page; with `tiny` small ones of each kind, for tests."""
    if tiny:
        return tiny_works()
    parts = [Work("help", {"kind": "command", "what": "help"}, PAIR)]
    parts += [Work("predict one PNG, cold", {"kind": "command", "what": "predict"}, ("default", *TORCH, *GRAPHS))]
    parts += [Work(f"forward {name}", {"kind": "forward", "setting": name}, engines) for name, engines in FORWARD.items()]
    parts += [Work(f"training step {name}", {"kind": "train", "setting": name}, engines) for name, engines in STEPS.items()]
    for shape in ((512, 512), (64, 128, 128)):
        parts.append(Work(f"augmentation {'x'.join(map(str, shape))}, one core", augment(shape), PAIR, threads=1))
    image = {"kind": "resample_image", "shape_vox": VOLUME, "new_shape_vox": GRID}
    parts += [Work("resampling 160x256x256 to 128x205x205", image, ("default", "linear", "cubic"))]
    parts += [Work(f"logits to labels 128x205x205 to 160x256x256, {classes} classes", labels(classes), PAIR) for classes in (3, 14)]
    parts.append(Work("patch 128x128x128 of a 320x320x320 volume", {"kind": "store", "size": 320, "patch": 128}, PAIR))
    request = {"kind": "stream", "setting": "nnunet_plain 64x128x128", "shape_vox": VOLUME}
    return [*parts, Work("volume 160x256x256 streamed, beside its tiles alone", request, PAIR)]


def augment(shape: tuple[int, ...]) -> dict[str, object]:
    """The request of an augmentation."""
    return {"kind": "augment", "shape_vox": shape}


def labels(classes: int, grid: tuple[int, ...] = GRID, volume: tuple[int, ...] = VOLUME) -> dict[str, object]:
    """The request of logits to labels."""
    return {"kind": "logits_to_labels", "classes": classes, "shape_vox": grid, "new_shape_vox": volume, "folder": str(CACHE)}


def tiny_works() -> list[Work]:
    """One of each kind, a second each."""
    setting = "tiny 32x32"
    return [
        Work("help", {"kind": "command", "what": "help"}, PAIR),
        Work("forward tiny", {"kind": "forward", "setting": setting}, ("default", "torch-bf16")),
        Work("training step tiny", {"kind": "train", "setting": setting}, ("default", "microtome-bf16")),
        Work("augmentation 32x32, one core", augment((32, 32)), PAIR, threads=1),
        Work("resampling", {"kind": "resample_image", "shape_vox": (8, 16, 16), "new_shape_vox": (6, 12, 12)}, ("default", "cubic")),
        Work("logits to labels", labels(3, (6, 12, 12), (8, 16, 16)), PAIR),
        Work("patch", {"kind": "store", "size": 32, "patch": 16}, PAIR),
        Work("stream", {"kind": "stream", "setting": setting, "shape_vox": (50, 60), "by": "torch"}, PAIR),
    ]
