"""Segmentation objects of DICOM, written by us and by highdicom; pydicom and highdicom read them too."""

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.sr.codedict import codes

from microtome.errors import DataError
from microtome.images.files import label_suffix, open_volume, probe_image, read_image, write_image, write_labels
from microtome.images.image import Limits
from tests.dicom_series import AXIAL, VOLUME, dataset, enhanced, oblique, series

RNG = np.random.default_rng(2)
CLASSES = {5: "liver", 10: "tumour", 77: "never there"}


@pytest.mark.parametrize("directions", [AXIAL, oblique()], ids=["axial", "oblique"])
def test_labels_of_a_series_become_a_segmentation_and_come_back(tmp_path, directions):
    # A name of one part, as programs that hide names write it, is no reason for a warning.
    series(tmp_path / "s", directions=directions, PatientName="ANON7")
    image = read_image(tmp_path / "s")
    assert label_suffix(image) == ".dcm"
    image.extra["classes"] = CLASSES
    labels = RNG.choice([0, 5, 10, 200], VOLUME.shape)
    labels[0] = labels[5] = 0  # what is empty at the ends is part of it
    write_labels(tmp_path / "seg.dcm", labels, image)
    again = read_image(tmp_path / "seg.dcm")
    np.testing.assert_array_equal(again.array[0], labels)
    np.testing.assert_allclose(again.affine, image.affine, atol=1e-6)
    assert again.extra["classes"] == CLASSES | {200: "label 200"}
    assert probe_image(tmp_path / "seg.dcm").shape_vox == VOLUME.shape
    # Readers that know nothing of us: pydicom for the references, highdicom for each segment.
    plain = pydicom.dcmread(tmp_path / "seg.dcm")
    assert (plain.Modality, plain.SegmentationType, len(plain.SegmentSequence)) == ("SEG", "BINARY", 4)
    sources = {pydicom.dcmread(path).SOPInstanceUID: number for number, path in enumerate(image.extra["source"])}
    pixels = plain.pixel_array
    for frame, groups in zip(pixels, plain.PerFrameFunctionalGroupsSequence, strict=True):
        value = [5, 10, 77, 200][groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber - 1]
        source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        np.testing.assert_array_equal(frame, labels[sources[source]] == value)
    assert {item.ReferencedSOPInstanceUID for item in plain.ReferencedSeriesSequence[0].ReferencedInstanceSequence} == set(sources)
    segment = highdicom.seg.segread(tmp_path / "seg.dcm").get_volume(segment_numbers=[2], combine_segments=False)
    assert int(np.asarray(segment.array).sum()) == int((labels == 10).sum())


def test_a_folder_with_a_series_and_its_segmentation_is_the_series(tmp_path):
    series(tmp_path / "s")
    write_labels(tmp_path / "s" / "seg.dcm", (VOLUME > 0).astype(int), read_image(tmp_path / "s"))
    np.testing.assert_array_equal(read_image(tmp_path / "s").array[0], VOLUME)
    (tmp_path / "only").mkdir()
    (tmp_path / "s" / "seg.dcm").rename(tmp_path / "only" / "seg.dcm")
    np.testing.assert_array_equal(read_image(tmp_path / "only").array[0], VOLUME > 0)


def test_a_label_map_without_a_voxel_is_written_as_one(tmp_path):
    series(tmp_path / "s")
    write_labels(tmp_path / "seg.dcm", np.zeros(VOLUME.shape, int), read_image(tmp_path / "s"))
    again = read_image(tmp_path / "seg.dcm")
    assert (again.array.shape[1:], again.array.max()) == (VOLUME.shape, 0)


def test_labels_of_a_file_of_many_frames_refer_to_it(tmp_path):
    needed = {"ContentDate": "20260101", "ContentTime": "000000", "DimensionOrganizationSequence": None}
    enhanced(tmp_path / "a.dcm", [3, 0, 5, 1, 4, 2], **needed)
    labels = (VOLUME > 0).astype(np.uint8) * 7
    write_labels(tmp_path / "seg.dcm", labels, read_image(tmp_path / "a.dcm"))
    np.testing.assert_array_equal(read_image(tmp_path / "seg.dcm").array[0], labels)


def foreign(path, folder, arrays, kind="BINARY"):
    """A segmentation by another program, with one segment for each array."""
    sources = [pydicom.dcmread(file) for file in read_image(folder).extra["source"]]
    for source in sources:
        source.SpacingBetweenSlices = 3
    descriptions = [
        highdicom.seg.SegmentDescription(number, f"organ {number}", codes.SCT.Tissue, codes.SCT.Liver, "MANUAL")
        for number in range(1, len(arrays) + 1)
    ]
    pixels = np.stack(arrays, -1).astype(np.uint8 if kind == "BINARY" else np.float32)
    highdicom.seg.Segmentation(sources, pixels, kind, descriptions, highdicom.UID(), 1, highdicom.UID(), 1, "a", "b", "c", "d").save_as(
        path
    )


def test_segmentations_of_other_programs_have_the_numbers_of_their_segments(tmp_path):
    series(tmp_path / "s")
    foreign(tmp_path / "seg.dcm", tmp_path / "s", [VOLUME > 500, VOLUME < -500])
    image = read_image(tmp_path / "seg.dcm")
    np.testing.assert_array_equal(image.array[0], np.where(VOLUME > 500, 1, np.where(VOLUME < -500, 2, 0)))
    assert image.extra["classes"] == {1: "organ 1", 2: "organ 2"}
    foreign(tmp_path / "over.dcm", tmp_path / "s", [VOLUME > 500, VOLUME > 0])
    with pytest.raises(DataError, match=r"over\.dcm: expected segments that do not overlap"):
        read_image(tmp_path / "over.dcm")
    with pytest.raises(DataError, match="max_voxels"):
        open_volume(tmp_path / "seg.dcm", limits=Limits(max_voxels=9))


def test_frames_of_a_segmentation_lie_where_they_say_and_may_begin_within_a_byte(tmp_path):
    # 35 bits a frame.
    arrays = [np.arange(140).reshape(4, 5, 7) % 3 == number for number in (1, 2)]
    series(tmp_path / "s", VOLUME[:4, :5, :7])
    foreign(tmp_path / "seg.dcm", tmp_path / "s", arrays)
    made = pydicom.dcmread(tmp_path / "seg.dcm")
    order = np.random.default_rng(3).permutation(int(made.NumberOfFrames))
    made.PixelData = pydicom.pixels.utils.pack_bits(made.pixel_array[order])
    made.PerFrameFunctionalGroupsSequence = [made.PerFrameFunctionalGroupsSequence[number] for number in order]
    made.save_as(tmp_path / "mixed.dcm")
    assert len(order) == 8
    np.testing.assert_array_equal(read_image(tmp_path / "mixed.dcm").array[0], arrays[0] + 2 * arrays[1])
    # As highdicom has them, which looks along their normal from the other end.
    theirs = highdicom.seg.segread(tmp_path / "mixed.dcm").get_volume(combine_segments=True)
    np.testing.assert_array_equal(read_image(tmp_path / "mixed.dcm").array[0], np.asarray(theirs.array)[::-1])
    made.PixelData = made.PixelData[:20]
    made.save_as(tmp_path / "short.dcm")
    with pytest.raises(DataError, match=r"short\.dcm: .*20 bytes for 8 frames of 35 bits"):
        read_image(tmp_path / "short.dcm")
    made.PerFrameFunctionalGroupsSequence.pop()
    made.save_as(tmp_path / "few.dcm")
    with pytest.raises(DataError, match=r"few\.dcm: expected a position for each frame, got 8 frames and 7 positions"):
        probe_image(tmp_path / "few.dcm")


def test_fractions_that_are_all_or_nothing_are_labels_and_others_are_refused(tmp_path):
    series(tmp_path / "s")
    foreign(tmp_path / "whole.dcm", tmp_path / "s", [VOLUME > 0], "FRACTIONAL")
    np.testing.assert_array_equal(read_image(tmp_path / "whole.dcm").array[0], VOLUME > 0)
    foreign(tmp_path / "half.dcm", tmp_path / "s", [(VOLUME > 0) * 0.5], "FRACTIONAL")
    with pytest.raises(DataError, match=r"half\.dcm: expected whole voxels, got fractions"):
        read_image(tmp_path / "half.dcm")


def test_planes_at_unequal_distances_are_no_segmentation_that_is_read(tmp_path):
    series(tmp_path / "s")
    foreign(tmp_path / "seg.dcm", tmp_path / "s", [np.ones(VOLUME.shape, bool)])
    made = pydicom.dcmread(tmp_path / "seg.dcm")
    made.PerFrameFunctionalGroupsSequence[5].PlanePositionSequence[0].ImagePositionPatient[2] += 2
    made.save_as(tmp_path / "seg.dcm")
    with pytest.raises(DataError, match=r"seg\.dcm: expected planes at equal distances"):
        read_image(tmp_path / "seg.dcm")
    made.PerFrameFunctionalGroupsSequence[5] = made.PerFrameFunctionalGroupsSequence[4]
    made.save_as(tmp_path / "seg.dcm")
    with pytest.raises(DataError, match=r"seg\.dcm: expected segments that do not overlap, got segment 1 over another"):
        read_image(tmp_path / "seg.dcm")


def item(**elements):
    """One of a sequence."""
    made = pydicom.dataset.Dataset()
    for name, value in elements.items():
        setattr(made, name, value)
    return made


def test_tiles_of_a_slide_are_one_plane(tmp_path):
    slide = dataset(
        np.zeros((8, 8, 3), np.uint8),
        "1.2.840.10008.5.1.4.1.1.77.1.6",
        Modality="SM",
        NumberOfFrames=4,
        TotalPixelMatrixRows=16,
        TotalPixelMatrixColumns=16,
        TotalPixelMatrixFocalPlanes=1,
        TotalPixelMatrixOriginSequence=[item(XOffsetInSlideCoordinateSystem=1.0, YOffsetInSlideCoordinateSystem=2.0)],
        ImageOrientationSlide=[0, -1, 0, -1, 0, 0],
        SharedFunctionalGroupsSequence=[item(PixelMeasuresSequence=[item(PixelSpacing=[0.01, 0.02], SliceThickness=0.001)])],
        DimensionOrganizationType="TILED_FULL",
        DimensionOrganizationSequence=[item(DimensionOrganizationUID=highdicom.UID())],
        OpticalPathSequence=[item(OpticalPathIdentifier="1")],
        NumberOfOpticalPaths=1,
        ContainerIdentifier="c",
        PositionReferenceIndicator="",
    )
    labels = np.zeros((1, 16, 16), np.uint8)
    labels[0, 3:9, 5:12] = 1
    segment = highdicom.seg.SegmentDescription(1, "organ", codes.SCT.Tissue, codes.SCT.Liver, "MANUAL")
    highdicom.seg.Segmentation(
        *([slide], labels, "BINARY", [segment], highdicom.UID(), 1, highdicom.UID(), 1, "a", "b", "c", "d"),
        tile_pixel_array=True,
        tile_size=(8, 8),
    ).save_as(tmp_path / "seg.dcm")
    image = read_image(tmp_path / "seg.dcm")
    np.testing.assert_array_equal(image.array[0], labels)
    assert (image.spacing_mm, image.extra["classes"]) == ((1.0, 0.01, 0.02), {1: "organ"})


def test_a_segmentation_with_a_wrong_distance_of_slices_is_read_by_its_positions(tmp_path):
    series(tmp_path / "s")
    write_labels(tmp_path / "seg.dcm", (VOLUME > 0).astype(int), read_image(tmp_path / "s"))
    made = pydicom.dcmread(tmp_path / "seg.dcm")
    assert made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices == 3
    made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = 7
    made.save_as(tmp_path / "seg.dcm")
    again = read_image(tmp_path / "seg.dcm")
    np.testing.assert_array_equal(again.array[0], VOLUME > 0)
    assert again.spacing_mm == pytest.approx((3, 0.75, 0.5))


def test_what_no_segmentation_can_hold_is_refused(tmp_path):
    series(tmp_path / "s")
    image = read_image(tmp_path / "s")
    for labels, words in ((VOLUME, "whole numbers from 0"), (np.arange(480).reshape(VOLUME.shape), "at most 255 segments, got 479")):
        with pytest.raises(DataError, match=words):
            write_labels(tmp_path / "seg.dcm", labels, image)
    with pytest.raises(DataError, match=r"expected a label map of a DICOM series, got 1 channels of 6×8×10 from 0 slices"):
        write_image(tmp_path / "seg.dcm", type(image)(**{**vars(image), "extra": {}}))
    assert not (tmp_path / "seg.dcm").exists()


def test_a_series_whose_patient_was_taken_out_gets_a_segmentation_too(tmp_path):
    series(tmp_path / "s", PatientBirthDate=None, PatientSex=None, AccessionNumber=None, ReferringPhysicianName=None, StudyID=None)
    volume = open_volume(tmp_path / "s")
    labels = np.zeros((1, *volume.shape_vox), np.uint8)
    labels[0, 1, :2] = 3
    write_labels(tmp_path / "seg.dcm", labels[0], like=volume)
    np.testing.assert_array_equal(read_image(tmp_path / "seg.dcm").array, labels)
