"""Codes of image files: reading and writing pictures, volumes, DICOM and HDF5."""

from types import MappingProxyType

from microtome.codes.fault import Fault

AREA = "Image files"

FAULTS = MappingProxyType(
    {
        "D001": Fault(
            "Nothing there, or it cannot be read",
            "The path leads to no file or folder, or to one that this account may not read. "
            "Often a name is misspelt, a drive is not mounted, or the command runs in another folder than its relative path was meant for.",
            "Look with `ls -l PATH` whether it is there and readable. A path with spaces needs quotes around it. "
            "Where it lies on a network drive, mount it again.",
        ),
        "D002": Fault(
            "The file is damaged or was cut off",
            "The file ends before its voxels do, or its bytes cannot be decoded: a copy or download was interrupted, the disk was full while "
            "it was written, or it has the suffix of another format. OME-TIFF may name planes in other files that are not beside it.",
            "Copy, download or export it again and compare its size with the original's. Open it in Fiji or ITK-SNAP: if these refuse it too, "
            "the file itself is broken. If you can do without it, move it out of the folder.",
        ),
        "D003": Fault(
            "Larger than may be read at once",
            "The header claims more voxels, channels or bytes than the limits allow, or a size of 0. A damaged header or a file made to fill "
            "the memory looks like that; so does a very large true image that is asked for in one piece. In HDF5 a chunk that is decoded at "
            "once may be too large, or unpack to more than a chunk.",
            "If the image is not that large, export it again. A true large volume is read part by part when it is predicted or trained on from "
            "OME-Zarr, HDF5 or uncompressed NIfTI and TIFF. From Python, `read_image` takes other `Limits`.",
        ),
        "D004": Fault(
            "Not enough memory to read it",
            "The image, or the part that was asked for, is larger than the memory that is free now.",
            "Close other programs, cut the image into parts, or store it as OME-Zarr or HDF5, from which single parts are read. "
            "`microtome predict` takes such a volume in slabs whatever its size.",
        ),
        "D005": Fault(
            "Not a format that is known",
            "The first bytes of the file belong to no format that microtome reads, or the folder holds no DICOM series, Zarr, N5 or "
            "precomputed store. The suffix alone does not decide.",
            "Convert it to PNG, TIFF, NIfTI, NRRD, HDF5 or OME-Zarr: microscope formats (CZI, LIF, ND2) open in Fiji with Bio-Formats and save "
            "as OME-TIFF. Move what is no image out of the folder.",
        ),
        "D006": Fault(
            "The output's name does not fit its format",
            "Label maps are written in the format of the image they belong to, and the suffix of the name that was given belongs to another, "
            "or to none that can be written.",
            "Rename the output with the suffix that the line names. To change the format, write it first and convert it afterwards.",
        ),
        "D007": Fault(
            "These values cannot be stored in that format",
            "The array has another shape than the image it belongs to, or a type of numbers or channels that the format does not hold, "
            "such as floating-point labels or a PNG of five channels.",
            "Give labels as whole numbers of the image's shape. For values beyond 16 bits or several channels choose .tif or OME-Zarr.",
        ),
        "D008": Fault(
            "The voxels are not real numbers",
            "The file stores complex numbers, records, text or a sample format without a standard meaning. Networks take real intensities.",
            "Save the magnitude or the real part, or convert the image to 8, 16 or 32 bits per channel, and give that file.",
        ),
        "D009": Fault(
            "More axes than an image has",
            "The file holds several time points, positions or stacks, or axes beyond channels and Z, Y, X. Which of them is the image "
            "cannot be told.",
            "Save each time point or stack as a file of its own. If a Z stack was labelled as time, change that: in Fiji, Image > Properties, "
            "swap slices and frames, then save.",
        ),
        "D010": Fault(
            "Voxel size, origin or directions that cannot be",
            "The file gives a voxel size that is 0, negative or not a number, an origin that is not finite, or axes that do not span a volume. "
            "Distances in mm would mean nothing.",
            "Export the file again, or set its voxel size in the program that made it (Fiji: Image > Properties), and save it anew.",
        ),
        "D011": Fault(
            "The header contradicts the file",
            "Offsets, links or names in the header lead nowhere, backwards or in a circle. The file is damaged or was written by a faulty "
            "program.",
            "Export the image again from the program it comes from. A file from an unknown source that does this is better not trusted.",
        ),
        "D012": Fault(
            "The voxels lie in another file",
            "This is a header whose voxels are in a second file that is not beside it, lies outside of the folder, or is one of several: "
            ".hdr with .img, .nhdr, .mhd with .raw, OME-TIFF that names planes elsewhere, or HDF5 with external data.",
            "Copy both files side by side, or write one file that holds both: .nii.gz, .nrrd or .mha. For HDF5, `h5repack OLD.h5 NEW.h5` "
            "or `h5copy` bring the values into one file.",
        ),
        "D014": Fault(
            "Nothing here can unpack its compression",
            "The voxels are packed with a method whose decoder is not installed, such as JPEG 2000 in DICOM or a plugin's filter in HDF5.",
            'Install the decoder: `pip install "microtome[medical]" python-gdcm`. Or store the image without compression: '
            "`h5repack -f GZIP=1 OLD.h5 NEW.h5` for HDF5, `gdcmconv --raw OLD.dcm NEW.dcm` for DICOM.",
        ),
        "D015": Fault(
            "These slices are not one series",
            "The folder holds DICOM files of several series, or slices that differ in size, direction, voxel size or type. "
            "Localisers and reports often lie among the slices.",
            "Put each series into a folder of its own and give that folder; the line names a file that does not belong to the others.",
        ),
        "D016": Fault(
            "Slices are missing or there twice",
            "Two slices of the series are at one place, as with several echoes or time points, or the distance between neighbours changes, "
            "as where slices were lost.",
            "Keep one echo or time point in the folder, and each slice once. Fetch missing slices from the archive again, or resample the "
            "series to equal distances.",
        ),
        "D017": Fault(
            "A DICOM file without a usable image",
            "The file is a report, a plan or a structure set, its frames have no positions, or its colours are of a kind that is not read.",
            "Give the files of the image series itself. Export frames or time points one by one, and colours as RGB or MONOCHROME2.",
        ),
        "D018": Fault(
            "A DICOM segmentation that is no label map",
            "Segments of the file overlap, so that a voxel has several classes, or its planes are not at equal distances.",
            "Export each overlapping segment as a file of its own; export the segmentation again with the series it was drawn on.",
        ),
        "D019": Fault(
            "Labels that DICOM cannot hold",
            "A DICOM segmentation refers to the series it was made from, and names a limited number of segments by whole numbers. "
            "These labels, or the image they belong to, are not like that.",
            "Write .nii.gz, .tif or .png instead, or give the DICOM series itself as the image.",
        ),
        "D020": Fault(
            "Which part of the file is meant?",
            "An HDF5 file or a store holds several arrays that could be the image or the label, or none under the name that was given.",
            "Add the part's name to the path, as in `cells.h5/raw`. For a folder write `images: raw` and `labels: label` into its "
            "microtome.yaml.",
        ),
        "D220": Fault(
            "A header that can be understood in two ways",
            "A line of an NRRD or MetaImage header holds bytes that are no text, is blank or far too long, or names a field a second time. "
            "Readers differ in what they take from such a header, so that the voxels could be another image elsewhere.",
            "Export the image again from the program it comes from. If the header was written by hand, leave one line for each field.",
        ),
        "D221": Fault(
            "The numbers in a MetaImage header do not fit",
            "NDims is missing or is not 1 to 4, or another field has more or fewer numbers than it says, or something that is no number. "
            "Or they do not say where all voxels are: text of several channels, of which the format's library reads the first, or packed voxels "
            "behind a header of unknown size.",
            "Export the image again, in binary; of a series in time save each time point as a file. `NDims = 3` comes first, and then `DimSize`, "
            "`ElementSpacing` and `Offset` have three numbers each.",
        ),
    }
)
