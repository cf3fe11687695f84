"""Codes of networks: their settings, and the images they take."""

from types import MappingProxyType

from microtome.codes.fault import Fault

AREA = "Networks"

FAULTS = MappingProxyType(
    {
        "C033": Fault(
            "Network settings that cannot be",
            "`network:` in the plan has widths, levels or a variant that this network does not have, or a setting that it does not obey.",
            "Change the setting that the line names, or remove it: the defaults are those of the paper. `microtome networks NAME` shows what a "
            "network has.",
        ),
        "C034": Fault(
            "An image of a size that the network cannot take",
            "Networks that halve an image several times, or have no padding, take certain sizes only, and each network its channels and axes.",
            "Pad or crop to one of the sizes that the line names. `predict` and `train` do that by themselves; this concerns networks that are "
            "called or drawn directly.",
        ),
        "C035": Fault(
            "Too few values for batch normalisation",
            "In training, batch norm needs more than one value a channel at its deepest level, and a batch of one small image has just one.",
            "Train with `batch: 2` or more, or with larger patches (`patch_vox` in the plan).",
        ),
        "C036": Fault(
            "A patch that the network cannot take",
            "`patch_vox` in the plan is not a size that this network can halve as often as it has to.",
            "Change it in plan.yaml to one of the sizes that the line names.",
        ),
        "C037": Fault(
            "--input is not an image's size",
            "The size of an image is written with its channels first, as whole numbers with an x between them.",
            "Write `--input 1x572x572` for a picture (C, Y, X) or `--input 1x64x128x128` for a volume (C, Z, Y, X).",
        ),
        "C039": Fault(
            "A recipe that does not fit",
            "A recipe repeats how a paper trained: with its networks, for pictures or volumes, on images of a certain least size. What was "
            "asked for beside it, or the images, are others.",
            "Leave out --network, --dims or --recipe. The default recipe takes every network and every image.",
        ),
        "C040": Fault(
            "Images of other axes than --dims says",
            "Pictures cannot be trained in 3D, and what --dims asked for is not what these images allow.",
            "Leave --dims out: 2 or 3 is chosen by the images.",
        ),
        "C043": Fault(
            "The network is made for images of other axes",
            "Some networks are for volumes only and others for pictures only, as in their papers.",
            "Choose one that the line names; `microtome networks` shows the axes of each.",
        ),
        "C044": Fault(
            "Networks to compare are named twice, or not at all",
            "`compare` trains each network once, and needs at least one name.",
            "Write the names with commas, each once: `--networks unet,modern_unet`. `microtome networks` lists them.",
        ),
    }
)
