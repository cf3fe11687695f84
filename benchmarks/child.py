"""One work by one engine in a process of its own: `python -m benchmarks.child '{"kind": ..., ...}'` prints what it took as JSON.

A process of its own, because memory once taken stays taken, the first engine would leave caches warm for the next, and how
memory is recycled can be set once only.
"""

import json
import resource
import sys
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

# Kind -> module and function, imported when asked for: a process holds no more than its work needs.
KINDS: Mapping[str, str] = MappingProxyType(
    {
        "prepare": "benchmarks.forward:prepare",
        "forward": "benchmarks.forward:forward",
        "train": "benchmarks.step:train",
        "command": "benchmarks.startup:command",
        "augment": "benchmarks.parts:augment",
        "resample_image": "benchmarks.parts:resample_image",
        "logits_to_labels": "benchmarks.parts:logits_to_labels",
        "store": "benchmarks.parts:store",
        "stream": "benchmarks.stream:stream",
    }
)


def answer(kinds: Mapping[str, str]) -> None:
    """Do what the first argument asks for, and print the result as the last line."""
    request = json.loads(sys.argv[1])
    module, _, function = kinds[request.pop("kind")].partition(":")
    result = getattr(import_module(module), function)(**request)
    # Linux counts in KB, macOS in bytes.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    result.setdefault("peak_mb", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    answer(KINDS)
