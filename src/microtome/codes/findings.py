"""The codes of what `microtome inspect` calls an error: the word that programs see -> the page that people read."""

from collections.abc import Mapping
from types import MappingProxyType

BY_FINDING: Mapping[str, str] = MappingProxyType(
    {
        "unreadable": "D002",
        "ambiguous-pair": "D031",
        "nothing-annotated": "D033",
        "grid-mismatch": "D034",
        "mixed-channels": "D036",
        "mixed-dimensions": "D037",
        "mixed-spacing": "D038",
        "label-not-in-legend": "D040",
        "missing-channel": "D070",
        "repeated-case": "D070",
        "missing-file": "D043",
        "one-class": "D044",
        "no-foreground": "D044",
        "leak": "D067",
        "not-finite": "D068",
        "void-or-class": "D069",
    }
)
