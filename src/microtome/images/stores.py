"""Where chunked stores are, folders or URLs, and the small documents in them: JSON, and marks of what is done.

A place is a folder of this machine, or a URL kept in a `Path` (see `volume.url_of`): `s3://`, `gs://`, `http(s)://`, `memory://`.
S3 takes its keys, region and endpoint from the variables that Amazon's own tools take: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
`AWS_REGION`, `AWS_ENDPOINT_URL`; with `AWS_NO_SIGN_REQUEST=1` public data are read without keys. Google's storage takes
`GOOGLE_APPLICATION_CREDENTIALS`, and `TENSORSTORE_GCS_HTTP_URL` for another endpoint.
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tensorstore as ts

from microtome.errors import DataError, MicrotomeError, RunError
from microtome.images.volume import url_of

# Decoded chunks that are kept, of all stores of a process together.
_CACHE_BYTES = 64 * 2**20
# Threads that unpack chunks, and requests under way to disks and to servers.
_THREADS, _FILES, _REQUESTS = 2, 4, 16
# A server that does not answer is asked for about half a minute.
_RETRIES = MappingProxyType({"max_retries": 6, "initial_delay": "0.5s", "max_delay": "8s"})
# Metadata are kilobytes; consolidated ones of a large plate some megabytes.
_MOST_JSON_BYTES = 2**28
_CODE = re.compile(r"([A-Z]{2,}(?:_[A-Z]+)*): ")
OURS = ".microtome"


@cache
def context() -> ts.Context:
    """What all stores of this process share: a bounded cache of chunks and few threads."""
    retried = {f"{scheme}_request_retries": dict(_RETRIES) for scheme in ("http", "s3", "gcs")}
    requests = {f"{scheme}_request_concurrency": {"limit": _REQUESTS} for scheme in ("http", "s3", "gcs")}
    pool = {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}, "data_copy_concurrency": {"limit": _THREADS}}
    return ts.Context({**pool, "file_io_concurrency": {"limit": _FILES}, **retried, **requests})


def kvstore_of(place: Path) -> dict[str, Any]:
    """The place as tensorstore names it, as a folder: its path ends in a slash.

    Raises:
        DataError: it is no URL of a store, such as one with a bucket's name that cannot be.
    """
    url = url_of(place)
    if url is None:
        # The root of all folders ends in a slash already.
        return {"driver": "file", "path": os.path.join(os.path.abspath(place), "")}
    try:
        if url.startswith("s3://"):
            spec = _s3(url)
            ts.KvStore.Spec(spec)
        else:
            spec = ts.KvStore.Spec(url).to_json()
    except (ValueError, NotImplementedError) as error:
        raise DataError(url, expected="the URL of a store", got=reason_of(error), do="check the URL", code="D025") from None
    return {**spec, "path": f"{spec.get('path', '').rstrip('/')}/"}


def name_of(place: Path) -> str:
    """The place for people: as it was typed."""
    return url_of(place) or str(place)


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Turn whatever reading a store raises into a DataError that names it.

    Raises:
        DataError: metadata or a chunk are damaged, or cannot be had; or memory is too small.
    """
    try:
        yield
    except (MicrotomeError, Warning):
        raise
    except MemoryError:
        raise DataError(
            name_of(place), expected="a part that fits in memory", got="too little memory", do="read less at a time", code="D004"
        ) from None
    except Exception as error:  # tensorstore has a type for each code of an error, and metadata of any shape fail anyhow
        got = f"what cannot be read ({reason_of(error)})"
        do = "copy or export it again, and check address and rights"
        raise DataError(name_of(place), expected="a whole chunked store", got=got, do=do, code="D026") from error


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn whatever writing to a store raises into a RunError that names it.

    Raises:
        RunError: the disk is full, rights lack, or a server does not answer.
    """
    try:
        yield
    except (MicrotomeError, Warning):
        raise
    except Exception as error:  # as above
        do = "free space, check the rights, or choose another --out"
        raise RunError(name_of(place), expected="a store that can be written", got=reason_of(error), do=do, code="R001") from error


def reason_of(error: Exception) -> str:
    """What went wrong in one line, without the code before and the specification behind."""
    line = " ".join(str(error).split())
    if _CODE.match(line) is None:
        return f"{type(error).__name__}: {line}"[:200]
    return _CODE.sub("", line.split(" [", 1)[0], count=1)[:300]


def read_json(place: Path, name: str) -> dict[str, Any] | None:
    """The JSON object `name` at a place; None where there is none.

    Raises:
        DataError: it is no JSON object, or the place cannot be read.
    """
    if url_of(place) is None:
        text = _local(place, name)
        return None if text is None else _object_of(text, place, name)
    spec = kvstore_of(place)
    with reading(place):
        try:
            store = ts.KvStore.open(spec, context=context()).result()
            found = store.read(name).result()
        except (ValueError, PermissionError) as error:
            # Servers that hide the names of what they hold refuse what they do not hold.
            if not str(error).startswith("PERMISSION_DENIED"):
                raise
            return None
    return None if found.state == "missing" else _object_of(found.value, place, name)


def write_json(place: Path, name: str, value: dict[str, Any]) -> None:
    """Write a JSON object in one step.

    Raises:
        RunError: it cannot be written.
    """
    _write(place, name, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def folders(place: Path) -> list[str]:
    """The names of the folders at a place, sorted; none at a URL, where listing would go through all chunks."""
    if url_of(place) is not None or not place.is_dir():
        return []
    with reading(place), os.scandir(place) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


class Documents:
    """JSON documents and marks under `<place>/.microtome/`; each is a key of its own, which appears whole or not at all.

    Any number of processes and machines may read and write them at once.
    """

    def __init__(self, place: Path) -> None:
        self.place = place / OURS

    def read(self, name: str) -> dict[str, Any] | None:
        """The document of that name; None where there is none.

        Raises:
            DataError: it is damaged, or the place cannot be read.
        """
        return read_json(self.place, f"{name}.json")

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write a document in one step, over an older one.

        Raises:
            RunError: it cannot be written.
        """
        write_json(self.place, f"{name}.json", value)

    def mark(self, key: str) -> None:
        """Remember that `key` (parts of letters, digits, `-_.,`, between single slashes) is done; twice is as good as once.

        Raises:
            RunError: it cannot be written.
        """
        _write(self.place / "marks", key, b"")

    def marked(self, prefix: str = "") -> set[str]:
        """The keys that begin so and were marked.

        Raises:
            DataError: the place cannot be listed.
        """
        with reading(self.place):
            store = ts.KvStore.open(kvstore_of(self.place / "marks"), context=context()).result()
            keys = [bytes(key).decode() for key in store.list(_starting(prefix)).result()]
        # What a writer that was killed leaves beside a key.
        return {key for key in keys if not key.endswith(".__lock")}

    def remove(self, prefix: str = "") -> None:
        """Remove what begins so: `""` everything, `"marks/"` all marks, `"marks/a"` those of keys that begin with a.

        Raises:
            RunError: it cannot be written.
        """
        with writing(self.place):
            store = ts.KvStore.open(kvstore_of(self.place), context=context()).result()
            store.delete_range(_starting(prefix)).result()
        if url_of(self.place) is None:
            for folder, _, _ in os.walk(self.place, topdown=False):
                with suppress(OSError):
                    os.rmdir(folder)


def remove_store(place: Path) -> None:
    """Remove everything at a place.

    Raises:
        RunError: it cannot be written.
    """
    with writing(place):
        if url_of(place) is None:
            shutil.rmtree(place)
        else:
            store = ts.KvStore.open(kvstore_of(place), context=context()).result()
            store.delete_range(ts.KvStore.KeyRange()).result()


def _s3(url: str) -> dict[str, Any]:
    """An S3 URL with the endpoint, region and keys that the environment names."""
    bucket, _, path = url.removeprefix("s3://").partition("/")
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        spec["endpoint"] = endpoint.rstrip("/")
        region = region or "us-east-1"
    if region:
        spec["aws_region"] = region
    if os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in {"1", "yes", "true"}:
        spec["aws_credentials"] = {"type": "anonymous"}
    elif os.environ.get("AWS_ACCESS_KEY_ID"):
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def _local(place: Path, name: str) -> bytes | None:
    """The bytes of a file of this machine, read in a twentieth of the time that a store takes to look for it; None where there is none."""
    with reading(place):
        try:
            # A pipe, for which nobody may ever write, is not waited for.
            handle = os.open(f"{place}/{name}", os.O_RDONLY | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            os.close(handle)
            raise IsADirectoryError(f"{name} is a folder")
        with open(handle, "rb") as file:
            # One byte more than may be, which is then said; memory is taken for as many as are asked for.
            return file.read(min(found.st_size or _MOST_JSON_BYTES, _MOST_JSON_BYTES) + 1)


def _object_of(text: bytes, place: Path, name: str) -> dict[str, Any]:
    """The JSON object that bytes are."""
    where = f"{name_of(place)}/{name}"
    try:
        if len(text) > _MOST_JSON_BYTES:
            raise ValueError(f"{len(text)} bytes")
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        got = f"damaged metadata ({reason_of(error)})"
        raise DataError(where, expected="JSON", got=got, do="copy or export the store again", code="D023") from None
    if not isinstance(value, dict):
        raise DataError(where, expected="a JSON object", got=f"a {type(value).__name__}", do="copy or export the store again", code="D023")
    return value


def _write(place: Path, name: str, value: bytes) -> None:
    """Write a key in one step."""
    spec = kvstore_of(place)
    with writing(place):
        ts.KvStore.open(spec, context=context()).result().write(name, value).result()


def _starting(prefix: str) -> ts.KvStore.KeyRange:
    """All keys that begin so."""
    if not prefix:
        return ts.KvStore.KeyRange()
    return ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))
