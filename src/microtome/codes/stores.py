"""Codes of chunked stores: Zarr, OME-Zarr, N5, precomputed, on disk or behind a URL."""

from types import MappingProxyType

from microtome.codes.fault import Fault

AREA = "Chunked stores (OME-Zarr, N5, precomputed)"

FAULTS = MappingProxyType(
    {
        "D021": Fault(
            "No image in the store",
            "At this address are none of the documents that say what a store holds (.zarray, zarr.json, attributes.json, info), or they name "
            "arrays that are not there. The path may end one folder too early or too late, or a copy left small files out.",
            "Give the image's own folder, as in `STORE.zarr/0`. Copy the store again with its hidden files (`cp -r`, `rsync -a`). "
            "For a URL check the address and whether it may be read without a password.",
        ),
        "D022": Fault(
            "Several images in the store",
            "The store is a plate, a collection of series or a group of arrays, and nothing says which of them is meant.",
            "Give one of them by its path; the line names the first.",
        ),
        "D023": Fault(
            "Metadata of the store that cannot be used",
            "The store's JSON is damaged or says what no image can be: axes without names, transformations that are neither scale nor "
            "translation, sizes, chunks or types beyond the limits.",
            "Write the store again with the program it comes from, in its latest version: OME-Zarr 0.4 or 0.5, axes out of t, c, z, y, x. "
            "Damaged JSON usually means an incomplete copy.",
        ),
        "D024": Fault(
            "The store leads out of its own folder",
            "Its metadata name a path outside of the store, such as `../../etc`. No program writes that by accident.",
            "Do not trust this store. If it is your own, correct the path in its metadata to one inside of it.",
        ),
        "D025": Fault(
            "Not the URL of a store",
            "The address begins like a URL but names no server or bucket that can be: a wrong scheme, a bucket's name with forbidden letters.",
            "Write it as `https://host/path`, `s3://bucket/path` or `gs://bucket/path`. A folder on this machine needs no scheme.",
        ),
        "D026": Fault(
            "The store cannot be read",
            "A chunk is damaged or missing, the server does not answer, or the rights are not enough. The line ends with the reason that was "
            "given.",
            "Try again when it is a connection; check credentials when it is a right. Copy or export the store again when a chunk is damaged.",
        ),
        "D027": Fault(
            "Something else is at the place to write",
            "Another prediction, an unfinished one of another kind, or an array of another shape or type lies where this one would be written. "
            "Nothing is overwritten that was not begun by the same command.",
            "Give another --out, or remove what lies there. To go on with an unfinished prediction give the same image, model and options "
            "as before.",
        ),
        "D028": Fault(
            "The array to write into is not there",
            "The store that a prediction was begun in, or one of its arrays, is gone, is of another shape, or is not visible from the machine "
            "that should write into it.",
            "Begin the prediction again. On a cluster choose an --out that all workers reach under the same name, such as a shared drive.",
        ),
        "D029": Fault(
            "A URL where a folder is needed",
            "This output is written in one step, by renaming a finished folder, which no server offers.",
            "Write it into a folder of this machine and copy it, or give --ome-zarr, which can be written to a URL chunk by chunk.",
        ),
        "D030": Fault(
            "The record of a prediction cannot be read",
            "Beside an unfinished prediction lies a record of what is done. This one is damaged or was written by something else.",
            "Remove this output and predict again.",
        ),
    }
)
