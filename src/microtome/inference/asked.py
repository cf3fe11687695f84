"""What is asked of a prediction beside a label of each voxel, and the rules by which labels are cleaned."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from microtome.data.legend import Legend
from microtome.errors import ConfigError
from microtome.geometry import Spacing
from microtome.inference.predict import Wanted

_SIZE = re.compile(r"(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>mm|)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class CleanUp:
    """What is cleaned; without a value nothing is.

    Attributes:
        keep_largest: of every class but the background, or of these, only the largest component stays, of equal ones the first.
        fill_holes: the holes in every class but the background, or in these, become that class.
        min_size_vox: components of fewer voxels become background.
        min_size_mm: components of less volume do, in mm³, in two axes of less area, in mm².

    Raises:
        ConfigError: a size is negative or no number.
    """

    keep_largest: bool | tuple[int, ...] = False
    fill_holes: bool | tuple[int, ...] = False
    min_size_vox: float = 0
    min_size_mm: float = 0

    def __post_init__(self) -> None:
        for name in ("min_size_vox", "min_size_mm"):
            size = getattr(self, name)
            if not (0 <= size < math.inf):
                raise ConfigError(f"clean-up: {name}", expected="a size, 0 or more", got=f"{size}", do="change it", code="C022")

    @property
    def removes(self) -> bool:
        """Whether any component may become background."""
        return bool(self.keep_largest or self.min_size_vox or self.min_size_mm)

    def __bool__(self) -> bool:
        """Whether anything is to be done."""
        return bool(self.removes or self.fill_holes)


def parse_size(text: str) -> tuple[float, str]:
    """A size as it is typed -> (number, "vox" or "mm"); "mm" stands for mm³, with two axes for mm².

    >>> parse_size("50"), parse_size("0.5mm")
    ((50.0, 'vox'), (0.5, 'mm'))

    Raises:
        ConfigError: it is anything else; names it.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or not math.isfinite(float(match["number"])):
        raise ConfigError(
            "--min-size",
            expected="a number of voxels (50), or of mm³ (0.5mm; of mm² in an image of two axes)",
            got=f"`{text}`",
            do="write it like that, without a sign",
            code="C022",
        )
    return float(match["number"]), match["unit"] or "vox"


def least_voxels(rules: CleanUp, spacing_mm: Spacing) -> int:
    """The fewest voxels of a component that is large enough; 0 or 1 where all are."""
    of_mm = rules.min_size_mm / math.prod(spacing_mm)
    # 2.1 mm of voxels of 0.3 mm are 7 and not 7.000000000000001.
    return math.ceil(max(rules.min_size_vox, of_mm * (1 - 1e-9)))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked for beside a label of each voxel.

    Attributes:
        probabilities: of each class, "uint8" (times 255) or "float16"; "" for none.
        uncertainty: entropy, and how far averaged passes differ, 0 to 1 as uint8 times 255.
        instances: a number for each object.
        clean: what is mended in the labels.
        memory_gb: that this process may take; None: what is usual.
        cluster: `local:N` or the address of a scheduler of Dask; "" for this process alone.
        store: OME-Zarr whatever the image is.

    Raises:
        ConfigError: memory that is no number above 0.
    """

    probabilities: Literal["", "uint8", "float16"] = ""
    uncertainty: bool = False
    instances: bool = False
    clean: CleanUp = field(default_factory=CleanUp)
    memory_gb: float | None = None
    cluster: str = ""
    store: bool = False

    def __post_init__(self) -> None:
        if self.memory_gb is not None and not (0 < self.memory_gb < math.inf):
            raise ConfigError("--memory", expected="a number of GB above 0", got=f"{self.memory_gb:g}", do="change it", code="C022")

    def check(self, legend: Legend) -> None:
        """Refuse what cannot be made of a model's classes.

        Raises:
            ConfigError: objects or mending without a background.
        """
        if self.mending and legend.background is None:
            word = "--instances" if self.instances else "--keep-largest, --fill-holes, --min-size"
            do = "name the class `background` in microtome.yaml and train again"
            raise ConfigError(word, expected="a model with a background between objects", got=legend.words, do=do, code="C023")

    def wanted(self, legend: Legend, *, averaged: bool, temperature: float = 1.0) -> Wanted:
        """What has to come of the logits of a model, which may be the mean of several passes."""
        return Wanted(
            probabilities=self.probabilities,
            uncertainty=self.uncertainty,
            spread=self.uncertainty and averaged,
            # Objects of several classes are parted by their classes alone.
            foreground=legend.background if self.instances and len(legend.foreground) == 1 else None,
            temperature=temperature,
        )

    @property
    def mending(self) -> bool:
        """Whether labels are changed, or objects numbered, once all are there."""
        return self.instances or bool(self.clean)

    @property
    def words(self) -> dict[str, Any]:
        """What is mended, as JSON has it."""
        return {"instances": self.instances, **vars(self.clean)} if self.mending else {}

    @property
    def limit_bytes(self) -> int | None:
        """The memory in bytes."""
        return None if self.memory_gb is None else round(self.memory_gb * 1e9)
