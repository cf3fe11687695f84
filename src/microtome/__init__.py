"""A folder of images and masks in; a trained U-Net, predictions, scores and a report out."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microtome.config import Plan
    from microtome.data.dataset import Dataset, open_dataset
    from microtome.errors import MicrotomeError
    from microtome.evaluation.evaluate import evaluate
    from microtome.images.image import Image
    from microtome.inference.predictor import Predictor, load
    from microtome.models.registry import build
    from microtome.training.rehearsal import make_plan
    from microtome.training.run import train

__version__ = metadata.version("microtome")
__all__ = ["Dataset", "Image", "MicrotomeError", "Plan", "Predictor", "build", "evaluate", "load", "make_plan", "open_dataset", "train"]

_HOMES = (
    ("Dataset", "data.dataset"),
    ("Image", "images.image"),
    ("MicrotomeError", "errors"),
    ("Plan", "config"),
    ("Predictor", "inference.predictor"),
    ("build", "models.registry"),
    ("evaluate", "evaluation.evaluate"),
    ("load", "inference.predictor"),
    ("make_plan", "training.rehearsal"),
    ("open_dataset", "data.dataset"),
    ("train", "training.run"),
)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import microtome` and `--help` need no torch."""
    for public, home in _HOMES:
        if name == public:
            return getattr(import_module(f"microtome.{home}"), name)
    raise AttributeError(f"module 'microtome' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return [*__all__, "__version__"]
