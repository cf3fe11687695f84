"""What is found, in lines: of the machine, and of the self-test with what it measured."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["good", "note", "warning", "bad"]


@dataclass(frozen=True)
class Line:
    """One line of what was found.

    Attributes:
        what: in one or two words.
        finding: in a few more.
        do: what can be done about it; "" where nothing needs to be.
        level: good; note: could be better or is not needed; warning: will cost something; bad: does not work.
    """

    what: str
    finding: str
    do: str = ""
    level: Level = "good"


@dataclass(frozen=True)
class Check(Line):
    """What came of one part of the self-test, and its wall time."""

    seconds: float = 0.0


@dataclass
class Result:
    """What came of the self-test.

    Attributes:
        checks: in the order in which they were made.
        tile_seconds: engine -> wall time of one patch of the volumes' small network.
        step_seconds: precision -> wall time of a training step of the default network on pictures; empty where there is no choice.
    """

    checks: list[Check] = field(default_factory=list)
    tile_seconds: dict[str, float] = field(default_factory=dict)
    step_seconds: dict[str, float] = field(default_factory=dict)


def is_well(lines: Sequence[Line]) -> bool:
    """Whether nothing of it is bad."""
    return all(line.level != "bad" for line in lines)
