"""A volume file to a label file as MONAI's users write it: transforms, sliding window, inverse transforms.

python -m benchmarks.peers.monai_predict WEIGHTS.pt CLASSES PATCH IMAGE OUT
"""

import json
import sys
from pathlib import Path

import torch
from monai.data import DataLoader, Dataset, decollate_batch
from monai.inferers import SlidingWindowInferer
from monai.transforms import AsDiscreted, Compose, EnsureChannelFirstd, Invertd, LoadImaged, NormalizeIntensityd, SaveImaged, Spacingd

from benchmarks.peers.nnunet import their_network


def main(weights: str, classes: str, patch: str, image: str, out: str) -> None:
    """Predict one file."""
    network = their_network(int(classes), deep_supervision=False)
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.eval()
    prepare = Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Spacingd("image", pixdim=(1.0, 1.0, 1.0), mode="bilinear"),
            NormalizeIntensityd("image"),
        ]
    )
    finish = Compose(
        [
            Invertd("pred", transform=prepare, orig_keys="image", nearest_interp=False, to_tensor=True),
            AsDiscreted("pred", argmax=True),
            SaveImaged("pred", output_dir=str(Path(out)), output_postfix="", separate_folder=False, print_log=False),
        ]
    )
    # MONAI keeps the file's order of axes, X Y Z.
    inferer = SlidingWindowInferer(roi_size=tuple(reversed(json.loads(patch))), sw_batch_size=1, overlap=0.5, mode="gaussian")
    with torch.inference_mode():
        for batch in DataLoader(Dataset([{"image": image}], prepare), batch_size=1):
            batch["pred"] = inferer(batch["image"], network)
            for one in decollate_batch(batch):
                finish(one)


if __name__ == "__main__":
    main(*sys.argv[1:])
