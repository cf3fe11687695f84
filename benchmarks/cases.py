"""What the benchmarks run on: networks with briefly trained weights, images of blobs, bundles; made from seeds, kept in build/."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import Tensor, nn

from benchmarks.rows import CACHE
from microtome.bundle import Bundle, Samples, load_bundle, save_bundle
from microtome.config import NetworkConfig, Plan
from microtome.data.legend import Legend
from microtome.errors import DataError
from microtome.files import atomic_path
from microtome.inference.devices import to_device
from microtome.inference.restore import arrays_of
from microtome.machine import recycle_memory
from microtome.models.blocks import InstanceNorm
from microtome.models.network import Network
from microtome.models.registry import build
from microtome.models.trace import trace
from microtome.plan import choose_network
from microtome.step_memory import Resources
from microtome.training.loop import crop_border
from microtome.training.losses import segmentation_loss

# Enough for sharp classes, which engines must agree on; a step of a volume has as many voxels as many of a picture.
STEPS = {2: 50, 3: 20}
# More classes would take hundreds of steps to learn, and only make logits and labels more.
LEARNED_CLASSES = 3
# Less of a logit.
UNLIKELY = 5.0
# Side of the blocks that share a class, voxels.
BLOCK = 16


class Setting(NamedTuple):
    """A network and the image that it is timed on.

    Attributes:
        name: as rows call it.
        network: a name of the registry.
        shape_vox: of the timed image, ZYX or YX.
        learned_vox: of the images that it learns from.
        planned: the sizes that a plan of ten minutes on this image gives it, instead of the paper's.
        classes: how many.
        supervised: decoder levels with a loss.
        steps: of learning; 0 means those of its number of axes.
    """

    name: str
    network: str
    shape_vox: tuple[int, ...]
    learned_vox: tuple[int, ...]
    planned: bool = False
    classes: int = 3
    supervised: int = 1
    steps: int = 0

    @property
    def dims(self) -> int:
        """Axes of S."""
        return len(self.shape_vox)

    @property
    def learning_steps(self) -> int:
        """Steps of learning, enough for sharp classes."""
        return self.steps or STEPS[self.dims]


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        setting.name: setting
        for setting in (
            Setting("unet_same 512x512", "unet_same", (512, 512), (128, 128)),
            # The input of the paper: unpadded, so that 116 x 132 x 132 gives 28 x 44 x 44, and a cube of 116 to learn from gives 28 a side.
            # A step is told about 28 x 28 x 28 voxels only: more steps.
            Setting("unet3d 116x132x132", "unet3d", (116, 132, 132), (116, 116, 116), steps=100),
            Setting("nnunet_plain 64x128x128", "nnunet_plain", (64, 128, 128), (64, 64, 64)),
            # As nnU-Net trains it.
            Setting("nnunet_plain 64x128x128 5 heads", "nnunet_plain", (64, 128, 128), (64, 64, 64), supervised=5),
            Setting("modern_unet 512x512", "modern_unet", (512, 512), (128, 128), planned=True),
            Setting("modern_unet 64x128x128", "modern_unet", (64, 128, 128), (64, 64, 64), planned=True),
            # So little of a network that memory and time are those of what surrounds it.
            Setting("thin 32x128x128", "modern_unet", (32, 128, 128), (32, 64, 64)),
            # For tests: seconds matter, numbers do not.
            Setting("tiny 32x32", "unet_same", (32, 32), (32, 32)),
        )
    }
)


def network_config(setting: Setting) -> NetworkConfig:
    """The sizes of its network."""
    if setting.name.startswith("tiny"):
        return NetworkConfig(name=setting.network, widths=(4, 8))
    if setting.name.startswith("thin"):
        return NetworkConfig(name=setting.network, widths=(8, 16), strides=((1, 1, 1), (2, 2, 2)), kernels=((3, 3, 3),) * 2)
    if not setting.planned:
        return NetworkConfig(name=setting.network, supervised_levels=setting.supervised)
    resources = Resources(minutes=10, memory_bytes=2**34)
    return choose_network(setting.network, setting.shape_vox, (1.0,) * setting.dims, resources)[0]


def plan_of(setting: Setting) -> Plan:
    """A plan as it would stand in its bundle: the patch is the timed image."""
    return Plan(
        dims=setting.dims,  # type: ignore[arg-type]
        channels=1,
        classes=tuple(f"class {k}" for k in range(setting.classes)),
        spacing_mm=(1.0,) * setting.dims,
        network=network_config(setting),
        patch_vox=setting.shape_vox,
        batch=1,
        steps=setting.learning_steps,
        precision="bf16",
        overlap=0.0 if setting.name.startswith("thin") else 0.5,
    )


def blobs(shape_vox: tuple[int, ...], classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (1, *S) float32 of mean 0 and sd 1 in which classes are brighter and noisy, and its labels (*S) int16.

    Four tenths of the voxels lie in blobs; their class is that of the block of 16 voxels a side in which they lie.
    """
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal(shape_vox, dtype=np.float32), 5)
    kind = rng.integers(1, classes, [-(-n // BLOCK) for n in shape_vox])
    for axis in range(len(shape_vox)):
        kind = kind.repeat(BLOCK, axis)
    kind = kind[tuple(slice(n) for n in shape_vox)]
    label = np.where(field > np.quantile(field, 0.6), kind, 0).astype(np.int16)
    image = label + 0.4 * rng.standard_normal(shape_vox, dtype=np.float32)
    return ((image - image.mean()) / image.std())[None].astype(np.float32), label


def built(setting: Setting) -> Network:
    """Its network, freshly initialised."""
    torch.manual_seed(0)
    config = network_config(setting)
    return build(setting.network, dims=setting.dims, in_channels=1, classes=setting.classes, config=config)


def operations(setting: Setting) -> float:
    """Floating-point operations of a forward pass: two a multiply-add, padding counted as image."""
    return 2.0 * trace(built(setting), (1, *setting.shape_vox)).multiply_adds


def trained(setting: Setting, folder: Path = CACHE) -> Network:
    """Its network after a few steps on blobs, so that its classes mean something; the same weights for every engine."""
    network = built(setting)
    if setting.classes > LEARNED_CLASSES:
        few = trained(setting._replace(classes=LEARNED_CLASSES), folder)
        network.load_state_dict({name: widened(few.state_dict()[name], value.shape) for name, value in network.state_dict().items()})
        return network.eval()
    path = weights_file(setting, folder)
    if not path.exists():
        learn(network, setting)
        with atomic_path(path) as part:
            save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, part)
        # A new one: that which has learned is channels last.
        network = built(setting)
    network.load_state_dict(load_file(path))
    return network.eval()


def widened(values: Tensor, shape: torch.Size) -> Tensor:
    """A head's weights or biases for more classes than it learned, of which it never chooses one: theirs again, their biases lower."""
    if values.shape == shape:
        return values
    chosen = values[torch.arange(shape[0]) % len(values)].clone()
    if chosen.dim() == 1:
        chosen[len(values) :] -= UNLIKELY
    return chosen


def weights_file(setting: Setting, folder: Path = CACHE) -> Path:
    """Where `trained` keeps its weights."""
    return folder / "weights" / f"{setting.network}-{_key(setting)}.safetensors"


def bundle_of(setting: Setting, folder: Path = CACHE) -> Path:
    """The folder of a bundle with those weights, samples to check engines by and to calibrate int8; made when it is missing.

    The sample and its calibration are other blobs than the timed image.
    """
    place = folder / "bundles" / f"{setting.name.replace(' ', '-')}-{_key(setting)}"
    try:
        load_bundle(place)
    except DataError:
        network = trained(setting, folder)
        plan = plan_of(setting)
        golden_CS, *others = [case(setting, setting.learned_vox, seed=1000 + n)[0].astype(np.float16) for n in range(13)]
        with torch.inference_mode():
            logits_KS = network(torch.from_numpy(golden_CS.astype(np.float32))[None])[0].numpy()
        samples = Samples(golden_CS.astype(np.float32), logits_KS, tuple(others))
        save_bundle(
            place,
            Bundle(
                plan=plan,
                legend=legend_of(plan.classes),
                weights=arrays_of(network.state_dict()),
                samples=samples,
                sizes=network.sizes,
                context_vox=network.context_vox,
            ),
        )
    return place


def learn(network: Network, setting: Setting) -> None:
    """A few steps of AdamW on small images."""
    recycle_memory()
    network = to_device(network, torch.device("cpu"), setting.dims).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            # So few steps: with the 0.01 of some papers the running statistics would still be those of the beginning.
            module.momentum = 0.2
    for step in range(setting.learning_steps):
        pairs = [case(setting, setting.learned_vox, seed=2 * step + 1 + i) for i in range(2 if setting.dims == 2 else 1)]
        image_BCS = torch.from_numpy(np.stack([image for image, _ in pairs]))
        label_BS = crop_border(torch.from_numpy(np.stack([label for _, label in pairs])), network.context_vox)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = network(image_BCS)
        segmentation_loss(outputs if isinstance(outputs, list) else [outputs], label_BS, plan_of(setting).loss).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def as_shipped(network: nn.Module) -> nn.Module:
    """The network with torch's own instance norm in the place of ours, weights kept: what a user of torch has."""
    for name, module in network.named_children():
        if isinstance(module, InstanceNorm):
            setattr(network, name, _torch_norm(module, network))
        else:
            as_shipped(module)
    return network


def _torch_norm(norm: InstanceNorm, parent: nn.Module) -> nn.Module:
    flat = any(isinstance(module, nn.Conv2d) for module in parent.children())
    made = (nn.InstanceNorm2d if flat else nn.InstanceNorm3d)(len(norm.weight), eps=norm.eps, affine=True)
    made.weight, made.bias = norm.weight, norm.bias
    return made


def case(setting: Setting, shape_vox: tuple[int, ...] = (), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An image (1, *S) of the classes that its network learns, and its labels; without a shape the timed one."""
    return blobs(shape_vox or setting.shape_vox, min(setting.classes, LEARNED_CLASSES), seed)


def legend_of(classes: tuple[str, ...]) -> Legend:
    """Class k is written as k."""
    return Legend(names=classes, values=tuple((k,) for k in range(len(classes))), background=0)


def _key(setting: Setting) -> str:
    """Changes with what the weights depend on."""
    config = network_config(setting).model_dump_json()
    return hashlib.blake2b(
        json.dumps([config, setting.learned_vox, setting.classes, setting.learning_steps]).encode(), digest_size=6
    ).hexdigest()
