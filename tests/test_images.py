"""Which reader a file gets, what names mean, and what is refused, whatever the format."""

import gzip
import io
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from microtome.errors import DataError, DataWarning, RunError
from microtome.geometry import affine_from_spacing
from microtome.images.files import is_image_name, label_suffix, probe_image, read_image, stem_of, write_image, write_labels
from microtome.images.image import Header, Image, Limits, decoding, native

GREY = np.random.default_rng(0).integers(0, 256, (3, 16, 18)).astype(np.uint8)


def encoded(write, **options):
    """The bytes that a writer of images puts into a stream."""
    stream = io.BytesIO()
    write(stream, **options)
    return stream.getvalue()


CONTENT = {
    "png": encoded(PIL.Image.fromarray(GREY[0]).save, format="PNG"),
    "jpeg": encoded(PIL.Image.fromarray(GREY[0]).save, format="JPEG"),
    "bmp": encoded(PIL.Image.fromarray(GREY[0]).save, format="BMP"),
    "gif": encoded(PIL.Image.fromarray(GREY[0]).save, format="GIF"),
    "tiff": encoded(tifffile.imwrite, data=GREY, compression="zlib", imagej=True, metadata={"axes": "ZYX", "unit": "um", "spacing": 2}),
    "nifti": nib.Nifti1Image(GREY, np.eye(4)).to_bytes(),
}
SUFFIX = {"png": ".png", "jpeg": ".jpg", "bmp": ".bmp", "gif": ".gif", "tiff": ".tif", "nifti": ".nii"}


def picture(array=GREY[:1], **fields):
    """An image in memory."""
    spacing_mm = (1.0,) * (array.ndim - 1)
    values = {"affine": affine_from_spacing(spacing_mm), "axes": "CYX", "path": Path("pet_3.png"), "format": "png"} | fields
    return Image(array=array, spacing_mm=spacing_mm, **values)


@pytest.mark.parametrize("suffix", [*SUFFIX.values(), ".JPEG", ".ome.tiff"])
@pytest.mark.parametrize("kind", CONTENT)
def test_a_file_is_read_for_what_it_is_with_a_warning_where_its_suffix_lies(tmp_path, kind, suffix):
    path = tmp_path / f"case_07{suffix}"
    path.write_bytes(CONTENT[kind])
    claimed = {".JPEG": "jpeg", ".ome.tiff": "tiff"}.get(suffix) or next(name for name, own in SUFFIX.items() if own == suffix)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image, header = read_image(path), probe_image(path)
    assert image.format == header.format == kind
    messages = [str(warning.message) for warning in caught if warning.category is DataWarning]
    expected = [] if claimed == kind else [f"{path}: the suffix says {claimed} but the file is {kind}; it is read as {kind}"] * 2
    assert messages == expected
    if kind != "jpeg":
        np.testing.assert_array_equal(
            image.array[0] if image.array.ndim == 3 else image.array[0, 0], GREY[0, :16, :18] if kind != "nifti" else GREY[:, :, 0].T
        )


def test_a_file_without_a_suffix_is_read(tmp_path):
    (tmp_path / "case_07").write_bytes(CONTENT["png"])
    np.testing.assert_array_equal(read_image(tmp_path / "case_07").array, GREY[:1])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"RIFF\x24\0\0\0WEBPVP8 " + bytes(99), "a WebP picture"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99), "a JPEG 2000 picture"),
        (b"PK\x03\x04" + bytes(99), "a ZIP archive"),
        (b"<!DOCTYPE html><title>404</title>", "text such as HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (gzip.compress(b"no image", mtime=0), "packed data that are not NIfTI"),
        (b"hello world", "bytes 68 65 6c 6c 6f 20 77 6f"),
        (b"\x89PNG", "bytes 89 50 4e 47"),
    ],
)
@pytest.mark.parametrize("read", [read_image, probe_image])
def test_what_is_no_image_is_refused_with_what_it_is(tmp_path, content, words, read):
    (tmp_path / "case_07.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"case_07\.png: expected a PNG.*, got {words}"):
        read(tmp_path / "case_07.png")


def test_a_packed_file_that_was_cut_off_in_its_header_is_an_error(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(CONTENT["nifti"])[:20])
    with pytest.raises(DataError, match=r"a\.nii\.gz: expected a whole gzip file, got damaged data"):
        read_image(tmp_path / "a.nii.gz")


def test_what_is_not_there_or_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"b\.png.*No such file"):
        read_image(tmp_path / "b.png")
    with pytest.raises(DataError, match="got a folder that is no store of one"):
        probe_image(tmp_path)


def attempt(read, path):
    """What reading gives: a result, or the error that a user may see."""
    try:
        return read(path)
    except DataError as error:
        return error


@pytest.mark.parametrize("kind", CONTENT)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_an_image_or_a_data_error_and_nothing_else(tmp_path_factory, kind, data):
    content = bytearray(CONTENT[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("d") / f"a{SUFFIX[kind]}"
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (lambda path: read_image(path, limits=Limits(max_voxels=10**6)), probe_image):
            outcome = attempt(read, path)
            assert str(outcome.where) == str(path) if isinstance(outcome, DataError) else isinstance(outcome, Image | Header)


NAMES = [
    ("a.png", True, "a"),
    ("a.b.nii.gz", True, "a.b"),
    ("A.OME.TIF", True, "A"),
    ("x.ome.tiff", True, "x"),
    ("a.TIFF", True, "a"),
    ("a.jpeg", True, "a"),
    ("a.gif", True, "a"),
    ("._a.png", False, "._a"),
    (".hidden.nii.gz", False, ".hidden"),
    ("Thumbs.db", False, "Thumbs"),
    ("notes.txt", False, "notes"),
    ("volume.tar.gz", False, "volume.tar"),
    ("png", False, "png"),
]


@pytest.mark.parametrize(("name", "is_image", "stem"), NAMES)
def test_names_of_images_and_their_stems(name, is_image, stem):
    assert is_image_name(Path("folder.png") / name) == is_image
    assert stem_of(Path("folder.png") / name) == stem


def test_labels_of_another_shape_are_refused_with_both_shapes(tmp_path):
    with pytest.raises(DataError, match=r"b\.png: expected labels of 16×18, got 18×16 int64; label pet_3\.png itself"):
        write_labels(tmp_path / "b.png", np.zeros((18, 16), int), picture())


def test_labels_that_are_no_integers_are_refused(tmp_path):
    with pytest.raises(DataError, match="whole numbers, got float32"):
        write_labels(tmp_path / "b.png", np.zeros((16, 18), np.float32), picture())


def test_labels_under_a_name_of_another_format_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a name ending in \.png, got `b\.tif`"):
        write_labels(tmp_path / "b.tif", np.zeros((16, 18), int), picture())
    with pytest.raises(DataError, match=r"a name ending in \.png, got `b\.jpg`"):
        write_labels(tmp_path / "b.jpg", np.zeros((16, 18), int), picture(format="jpeg"))


@pytest.mark.parametrize("name", ["a.jpg", "a.bmp", "a.webp", "a"])
def test_an_image_is_written_only_to_a_format_that_keeps_its_values(tmp_path, name):
    with pytest.raises(DataError, match=r"ending in \.png, \.tif, \.nii"):
        write_image(tmp_path / name, picture())


def test_a_mask_of_truth_values_is_written_as_zero_and_one(tmp_path):
    for name in ("a.png", "a.tif", "a.nii"):
        write_image(tmp_path / name, picture(GREY[:1] > 99))
        np.testing.assert_array_equal(read_image(tmp_path / name).array.reshape(16, 18), GREY[0] > 99)
    write_labels(tmp_path / "b.png", GREY[0] > 99, picture())
    np.testing.assert_array_equal(read_image(tmp_path / "b.png").array, GREY[:1] > 99)


def test_the_suffix_of_labels_is_that_of_the_images_own_format():
    assert [label_suffix(picture(format=kind)) for kind in ("png", "jpeg", "bmp", "gif", "tiff")] == [".png"] * 4 + [".tif"]
    assert label_suffix(picture(format="nifti", extra={"compressed": False})) == ".nii"
    assert label_suffix(picture(format="nifti")) == ".nii.gz"


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.nii.gz"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, name, monkeypatch):
    write_image(tmp_path / name, picture())
    old = (tmp_path / name).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("microtome.files._flush", full)
    with pytest.raises(RunError, match="No space left"):
        write_image(tmp_path / name, picture(GREY[1:2]))
    assert (tmp_path / name).read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_image_that_does_not_fit_in_memory_is_a_data_error():
    with pytest.raises(DataError, match=r"a\.png: expected an image that fits in memory"), decoding(Path("a.png"), "PNG"):
        raise MemoryError


def test_native_copies_only_what_has_to_change():
    assert np.shares_memory(native(GREY), GREY)
    assert native(np.broadcast_to(GREY, GREY.shape)).flags.writeable
    swapped = np.arange(3, dtype=">u2")
    assert native(swapped).dtype.isnative
    np.testing.assert_array_equal(native(swapped), [0, 1, 2])


def test_an_empty_picture_is_beyond_every_limit(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    header = Header(shape_vox=(0, 5), channels=1, dtype="uint8", spacing_mm=(1, 1), spacing_known=False, format="png")
    with pytest.raises(DataError, match="at least one voxel along each axis"):
        Limits().check(tmp_path / "a.png", header)


def test_an_almost_empty_mask_is_no_bomb(tmp_path):
    write_image(tmp_path / "a.tif", picture(np.zeros((1, 8, 2048, 2048), np.uint8), axes="CZYX"))
    assert (tmp_path / "a.tif").stat().st_size * 300 < 8 * 2048**2
    assert read_image(tmp_path / "a.tif").array.max() == 0


def test_the_pet_whose_jpg_is_a_png_is_read_as_rgb_with_a_warning(data_folder):
    path = data_folder("oxford_pets") / "images" / "Abyssinian_5.jpg"
    with pytest.warns(DataWarning, match=r"Abyssinian_5\.jpg: the suffix says jpeg but the file is png"):
        image = read_image(path)
    with PIL.Image.open(path) as pil:
        np.testing.assert_array_equal(image.array, np.asarray(pil)[..., :3].transpose(2, 0, 1))
    assert image.format == "png"


def test_pets_and_their_trimaps_have_one_shape(data_folder):
    folder = data_folder("oxford_pets")
    for path in sorted(folder.glob("images/Abyssinian_1*.jpg")):
        label = read_image(folder / "annotations" / "trimaps" / f"{path.stem}.png", palette="indices")
        assert probe_image(path).shape_vox == label.shape_vox
        assert set(np.unique(label.array)) <= {1, 2, 3}


def test_kaggles_rgba_pictures_have_three_channels_and_masks_one(data_folder):
    case = sorted((data_folder("dsb2018") / "stage1_train").iterdir())[0]
    image = read_image(next((case / "images").iterdir()))
    assert image.channels == 3
    for path in (case / "masks").iterdir():
        mask = read_image(path)
        assert (mask.channels, mask.shape_vox) == (1, image.shape_vox)
        assert set(np.unique(mask.array)) == {0, 255}
