"""Beside nnU-Net, MONAI, TorchIO and batchgeneratorsv2, in an environment of their own: `make bench-peers`."""
