"""What a piece of code takes of memory at most, beside what was there before: of all libraries, not of Python's alone."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from microtome.machine import resident_bytes


@contextmanager
def grows_by_at_most(limit: int) -> Iterator[None]:
    """Assert that this process never holds more than `limit` bytes more than now; skips where the kernel keeps no such peak."""
    peak = Path("/proc/self/clear_refs")
    try:
        # The peak begins anew at what is there now.
        peak.write_text("5", encoding="ascii")
    except OSError:
        pytest.skip("the peak of resident memory cannot be set back here")
    before = resident_bytes()
    yield
    grown = resident_bytes(most=True) - before
    assert grown <= limit, f"{grown} bytes"


def packed_zeros(mebibytes: int, frame: int = zlib.MAX_WBITS) -> bytes:
    """Deflate that becomes so many mebibytes of zeros, in the frame of zlib (by default) or of gzip (31); its checksum is wrong."""
    packer = zlib.compressobj(9, zlib.DEFLATED, frame)
    # What lies between two full flushes may be repeated.
    start = packer.compress(b"\0") + packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + piece * mebibytes + packer.flush()
