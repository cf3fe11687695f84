"""One kind of fault: what a code stands for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """What is told of a code.

    Attributes:
        title: of at most 60 characters.
        cause: why it happens, in one to three sentences.
        cure: what to do, in one to four sentences; commands between backticks.
    """

    title: str
    cause: str
    cure: str
