"""The networks by name: what each is, and `build`.

To add a network: its file, and one entry in `NETWORKS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from microtome.config import NetworkConfig
from microtome.errors import ConfigError, unknown_choice
from microtome.models.attention_unet import AttentionUNet
from microtome.models.autoencoder import Autoencoder
from microtome.models.canet import CANet
from microtome.models.classifier import Classifier
from microtome.models.dense_unet import FCDenseNet
from microtome.models.laddernet import LadderNet
from microtome.models.modern_unet import ModernUNet
from microtome.models.network import Network, NetworkSpec
from microtome.models.nnunet import NNUNetPlain, NNUNetResEnc
from microtome.models.r2unet import R2UNet
from microtome.models.resunet import ResUNet
from microtome.models.sliding_window import SlidingWindow
from microtome.models.unet import UNet
from microtome.models.unet3d import UNet3D
from microtome.models.unet_same import UNetSame
from microtome.models.unetpp import UNetPlusPlus
from microtome.models.vnet import VNet


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A network that can be built.

    Attributes:
        name: what users type.
        title: of the paper (or page) that describes it.
        authors: of that paper.
        year: of that paper.
        reference: where to read it: arXiv number or DOI; empty where it has neither.
        dims: the numbers of spatial axes it works in.
        variants: the first is the default; empty: there is one form only.
        settings: the fields of `NetworkConfig` that it obeys.
        builder: makes it.
    """

    name: str
    title: str
    authors: str
    year: int
    reference: str = ""
    dims: tuple[int, ...]
    variants: tuple[str, ...] = ()
    settings: frozenset[str] = frozenset({"widths"})
    builder: Callable[[NetworkSpec], Network]


NNUNET_SETTINGS = frozenset({"widths", "strides", "kernels", "convolutions", "supervised_levels"})


def _listed(*entries: Entry) -> Mapping[str, Entry]:
    return MappingProxyType({entry.name: entry for entry in entries})


NETWORKS = _listed(
    Entry(
        name="modern_unet",
        title="nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
        authors="F. Isensee, P. F. Jaeger, S. A. A. Kohl, J. Petersen, K. H. Maier-Hein",
        year=2021,
        reference="doi 10.1038/s41592-020-01008-z",
        dims=(2, 3),
        settings=frozenset(NetworkConfig.model_fields) - {"name", "variant", "dropout", "batch_statistics"},
        builder=ModernUNet,
    ),
    Entry(
        name="unet",
        title="U-Net: Convolutional Networks for Biomedical Image Segmentation",
        authors="O. Ronneberger, P. Fischer, T. Brox",
        year=2015,
        reference="arXiv 1505.04597",
        dims=(2,),
        variants=("paper", "release"),
        settings=frozenset({"widths", "dropout"}),
        builder=UNet,
    ),
    Entry(
        name="unet_same",
        title="U-Net: Convolutional Networks for Biomedical Image Segmentation",
        authors="O. Ronneberger, P. Fischer, T. Brox; padded and with batch norm as in the Paperspace worked example",
        year=2015,
        reference="arXiv 1505.04597",
        dims=(2, 3),
        builder=UNetSame,
    ),
    Entry(
        name="unet3d",
        title="3D U-Net: Learning Dense Volumetric Segmentation from Sparse Annotation",
        authors="Ö. Çiçek, A. Abdulkadir, S. S. Lienkamp, T. Brox, O. Ronneberger",
        year=2016,
        reference="arXiv 1606.06650",
        dims=(3,),
        variants=("paper", "no_bn"),
        settings=frozenset({"widths", "batch_statistics"}),
        builder=UNet3D,
    ),
    Entry(
        name="vnet",
        title="V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation",
        authors="F. Milletari, N. Navab, S.-A. Ahmadi",
        year=2016,
        reference="arXiv 1606.04797",
        dims=(2, 3),
        variants=("paper", "release"),
        builder=VNet,
    ),
    Entry(
        name="attention_unet",
        title="Attention U-Net: Learning Where to Look for the Pancreas",
        authors="O. Oktay, J. Schlemper, L. Le Folgoc, M. Lee, M. Heinrich and others",
        year=2018,
        reference="arXiv 1804.03999",
        dims=(2, 3),
        variants=("single", "double"),
        builder=AttentionUNet,
    ),
    Entry(
        name="r2unet",
        title="Recurrent Residual Convolutional Neural Network based on U-Net (R2U-Net) for Medical Image Segmentation",
        authors="M. Z. Alom, M. Hasan, C. Yakopcic, T. M. Taha, V. K. Asari",
        year=2018,
        reference="arXiv 1802.06955",
        dims=(2, 3),
        builder=R2UNet,
    ),
    Entry(
        name="laddernet",
        title="LadderNet: Multi-path networks based on U-Net for medical image segmentation",
        authors="J. Zhuang",
        year=2018,
        reference="arXiv 1810.07810",
        dims=(2, 3),
        settings=frozenset({"widths", "dropout"}),
        builder=LadderNet,
    ),
    Entry(
        name="resunet",
        title="Road Extraction by Deep Residual U-Net",
        authors="Z. Zhang, Q. Liu, Y. Wang",
        year=2018,
        reference="arXiv 1711.10684",
        dims=(2, 3),
        variants=("paper", "upconv"),
        builder=ResUNet,
    ),
    Entry(
        name="dense_unet",
        title="The One Hundred Layers Tiramisu: Fully Convolutional DenseNets for Semantic Segmentation",
        authors="S. Jégou, M. Drozdzal, D. Vazquez, A. Romero, Y. Bengio",
        year=2016,
        reference="arXiv 1611.09326",
        dims=(2, 3),
        variants=("103", "67", "56"),
        settings=frozenset({"widths", "dropout"}),
        builder=FCDenseNet,
    ),
    Entry(
        name="unetpp",
        title="UNet++: A Nested U-Net Architecture for Medical Image Segmentation",
        authors="Z. Zhou, M. M. R. Siddiquee, N. Tajbakhsh, J. Liang",
        year=2018,
        reference="arXiv 1807.10165",
        dims=(2, 3),
        settings=frozenset({"widths", "dropout", "supervised_levels"}),
        builder=UNetPlusPlus,
    ),
    Entry(
        name="canet",
        title="Attention-guided Chained Context Aggregation for Semantic Segmentation",
        authors="Q. Tang, F. Liu, J. Jiang, Y. Zhang",
        year=2020,
        reference="arXiv 2002.12041",
        dims=(2,),
        variants=("paper", "small"),
        settings=frozenset({"widths", "dropout", "supervised_levels"}),
        builder=CANet,
    ),
    Entry(
        name="nnunet_plain",
        title="nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
        authors="F. Isensee, P. F. Jaeger, S. A. A. Kohl, J. Petersen, K. H. Maier-Hein",
        year=2021,
        reference="doi 10.1038/s41592-020-01008-z",
        dims=(2, 3),
        settings=NNUNET_SETTINGS,
        builder=NNUNetPlain,
    ),
    Entry(
        name="nnunet_resenc",
        title="nnU-Net Revisited: A Call for Rigorous Validation in 3D Medical Image Segmentation",
        authors="F. Isensee and others",
        year=2024,
        reference="arXiv 2404.09556",
        dims=(2, 3),
        settings=NNUNET_SETTINGS,
        builder=NNUNetResEnc,
    ),
    Entry(
        name="autoencoder",
        title="A baseline: the padded U-Net's encoder and decoder without skips",
        authors="after the tutorials that explain the U-Net",
        year=2015,
        dims=(2, 3),
        builder=Autoencoder,
    ),
    Entry(
        name="classifier",
        title="A baseline: the padded U-Net's encoder alone, one answer for all of an image",
        authors="after the tutorials that explain the U-Net",
        year=2015,
        dims=(2, 3),
        builder=Classifier,
    ),
    Entry(
        name="sliding_window",
        title="Deep Neural Networks Segment Neuronal Membranes in Electron Microscopy Images",
        authors="D. C. Cireşan, A. Giusti, L. M. Gambardella, J. Schmidhuber",
        year=2012,
        reference="NIPS 2012",
        dims=(2,),
        builder=SlidingWindow,
    ),
)


def find(name: str) -> Entry:
    """The entry of that name.

    Raises:
        ConfigError: there is none; the nearest names are given.
    """
    if name not in NETWORKS:
        raise unknown_choice("network", name, NETWORKS, most=3)
    return NETWORKS[name]


def build(name: str, *, dims: int, in_channels: int, classes: int, config: NetworkConfig | None = None, variant: str = "") -> Network:
    """A network with fresh weights, in training mode.

    Args:
        name: one of `NETWORKS` (`config.name` is not looked at).
        dims: spatial axes of the images, 2 or 3.
        in_channels: channels of the images.
        classes: channels of the logits.
        config: sizes; without it all is as in the paper.
        variant: one of the entry's variants; empty: its first.

    Returns:
        image_BCS -> logits_BKS; see `Network` for its attributes, `ModernUNet` for deep supervision.

    Raises:
        ConfigError: an unknown name or variant, dimensions it does not have, or a setting that it would not obey.
    """
    entry = find(name)
    variant = variant or (config.variant if config else "")
    if dims not in entry.dims:
        others = [other.name for other in NETWORKS.values() if dims in other.dims]
        expected = " or ".join(f"{n}D" for n in entry.dims)
        do = f"use one of {', '.join(others)}" if others else "give 2D or 3D"
        raise ConfigError(name, expected=f"{expected} images", got=f"{dims}D", do=do, code="C043")
    if variant and variant not in entry.variants:
        expected = f"one of the variants {', '.join(entry.variants)}" if entry.variants else "no variant"
        raise ConfigError(name, expected=expected, got=f"`{variant}`", do="change or leave out the variant", code="C033")
    config = config or NetworkConfig()
    _check_settings(entry, config)
    return entry.builder(NetworkSpec(name=name, dims=dims, in_channels=in_channels, classes=classes, config=config, variant=variant))


def _check_settings(entry: Entry, config: NetworkConfig) -> None:
    """Refuse a setting that the network would pass over in silence."""
    for field, info in NetworkConfig.model_fields.items():
        value = getattr(config, field)
        if field not in ("name", "variant") and field not in entry.settings and value != info.default:
            expected = f"settings that it has ({', '.join(sorted(entry.settings))})"
            raise ConfigError(
                entry.name, expected=expected, got=f"`{field}: {value}`", do=f"remove `network.{field}` or use modern_unet", code="C033"
            )
