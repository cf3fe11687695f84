"""Series of DICOM files, and files of many frames, that tests write; and what SimpleITK reads in them."""

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 - as its makers write it
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

RNG = np.random.default_rng(0)
VOLUME = RNG.integers(-1000, 1000, (6, 8, 10)).astype(np.int16)
AXIAL = np.array([[1.0, 0, 0], [0, 1, 0]])
STUDY, FRAME = generate_uid(), generate_uid()


def oblique(angle=0.4, tilt=0.3):
    """Directions of rows and columns of slices that are turned about two axes."""
    rows = np.array([np.cos(angle), np.sin(angle), 0])
    columns = np.array([-np.sin(angle) * np.cos(tilt), np.cos(angle) * np.cos(tilt), np.sin(tilt)])
    return np.array([rows, columns])


def dataset(pixels, sop_class=CTImageStorage, syntax=ExplicitVRLittleEndian, **elements):
    """One file with those pixels; elements that are None are left out."""
    signed, samples = pixels.dtype.kind == "i", pixels.shape[-1] if pixels.ndim == 3 else 1
    values = {
        "SOPClassUID": sop_class,
        "SOPInstanceUID": generate_uid(),
        "StudyInstanceUID": STUDY,
        "SeriesInstanceUID": "1.2.3",
        "FrameOfReferenceUID": FRAME,
        "Modality": "CT",
        "PatientID": "p",
        "PatientName": "p^q",
        "PatientBirthDate": "",
        "PatientSex": "",
        "StudyDate": "",
        "StudyTime": "",
        "StudyID": "",
        "AccessionNumber": "",
        "ReferringPhysicianName": "",
        "SeriesNumber": 1,
        "InstanceNumber": 1,
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": samples,
        "PhotometricInterpretation": "RGB" if samples == 3 else "MONOCHROME2",
        "PlanarConfiguration": 0 if samples == 3 else None,
        "BitsAllocated": pixels.itemsize * 8,
        "BitsStored": pixels.itemsize * 8,
        "HighBit": pixels.itemsize * 8 - 1,
        "PixelRepresentation": int(signed),
        "PixelSpacing": [0.75, 0.5],
    } | elements
    made = Dataset()
    for name, value in values.items():
        if value is not None:
            setattr(made, name, value)
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID, made.file_meta.MediaStorageSOPInstanceUID = made.SOPClassUID, made.SOPInstanceUID
    made.set_pixel_data(pixels, made.PhotometricInterpretation, made.BitsStored) if "NumberOfFrames" not in made else None
    if syntax != ExplicitVRLittleEndian:
        made.compress(syntax)
    return made


def series(folder, volume=VOLUME, directions=AXIAL, step=3.0, names=None, **elements):
    """A series of slices under shuffled names; returns the positions."""
    folder.mkdir(exist_ok=True)
    normal = np.cross(*directions)
    positions = [np.array([-20.0, 30.0, 7.0]) + normal * step * number for number in range(len(volume))]
    shuffled = np.random.default_rng(3).permutation(len(volume)) if names is None else names
    for number, (plane, position) in enumerate(zip(volume, positions, strict=True)):
        place = {"ImagePositionPatient": [f"{value:.10g}" for value in position], "ImageOrientationPatient": directions.ravel().tolist()}
        # Deceptive on purpose: neither thickness nor numbers say where a slice is.
        wrong = {"SliceThickness": 99, "SpacingBetweenSlices": 77, "InstanceNumber": int(shuffled[number])}
        made = dataset(plane, **(place | wrong | {name: value(number) if callable(value) else value for name, value in elements.items()}))
        made.save_as(folder / f"IM{shuffled[number]}.dcm", enforce_file_format=True)
    return positions


def by_simpleitk(folder):
    """The same series as SimpleITK reads it: values, and the affine that NIfTI gives it."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    picture = reader.Execute()
    sitk.WriteImage(picture, str(folder.parent / "reference.nii.gz"))
    return sitk.GetArrayFromImage(picture), nib.load(folder.parent / "reference.nii.gz").affine[:, [2, 1, 0, 3]]


def enhanced(path, order, **elements):
    """All slices in one file, in an order."""
    made = dataset(VOLUME[0], EnhancedCTImageStorage, PixelSpacing=None, NumberOfFrames=len(order), **elements)
    made.PixelData = VOLUME[order].tobytes()
    made["PixelData"].VR = "OW"
    shared, frames = Dataset(), []
    for name, item in (
        ("PixelMeasuresSequence", {"PixelSpacing": [0.75, 0.5]}),
        ("PlaneOrientationSequence", {"ImageOrientationPatient": oblique().ravel().tolist()}),
    ):
        group = Dataset()
        for key, value in item.items():
            setattr(group, key, value)
        setattr(shared, name, [group])
    for number in order:
        frame, place, values = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = (np.cross(*oblique()) * 3 * number).round(9).tolist()
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1, -10, "HU"
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [place], [values]
        frames.append(frame)
    made.SharedFunctionalGroupsSequence, made.PerFrameFunctionalGroupsSequence = [shared], frames
    made.save_as(path, enforce_file_format=True)
