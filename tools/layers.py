"""The order of the modules: the way data travels, and the only direction in which imports may run."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SOURCE = REPOSITORY / "src" / "microtome"

# A module may import only from rows above its own; tests/test_layers.py holds it, README's map shows it.
LAYERS = (
    "errors",
    "files",
    "config",
    "geometry",
    "tiling",
    "images.image",
    "images.raster",
    "images.tiff",
    "images.medical",
    "images.files",
    "models.network",
    "models.blocks",
    "models.unet",
    "models.unet_same",
    "models.unet3d",
    "models.modern_unet",
    "models.registry",
    "data.case",
    "data.names",
    "data.description",
    "data.legend",
    "data.labels",
    "data.classes",
    "data.listing",
    "data.documents",
    "data.layouts",
    "data.reading",
    "data.dataset",
    "data.split",
    "data.thumbnails",
    "data.checks",
    "data.quality",
    "data.synthetic",
    "preprocess",
    "fingerprint",
    "appearance",
    "plan",
    "evaluation.metrics",
    "evaluation.bootstrap",
    "evaluation.pairing",
    "evaluation.scores",
    "evaluation.evaluate",
    "evaluation.pages",
    "evaluation.curves",
    "evaluation.gallery",
    "evaluation.report",
    "bundle",
    "inference.engines",
    "inference.predict",
    "inference.predictor",
    "training.store",
    "training.augment",
    "training.sampling",
    "training.losses",
    "training.checkpoint",
    "training.loop",
    "training.validation",
    "training.rehearsal",
    "training.run",
    "terminal",
    "demo",
    "cli",
)


def path_of(module: str) -> Path:
    """The file of a module named as in LAYERS."""
    return SOURCE.joinpath(*module.split(".")).with_suffix(".py")


def modules_on_disk() -> set[str]:
    """Every module of the package, named as in LAYERS; `__init__` files are not modules of their own."""
    files = (file.relative_to(SOURCE).with_suffix("") for file in SOURCE.rglob("*.py"))
    return {".".join(file.parts) for file in files if file.name != "__init__"}
