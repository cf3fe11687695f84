"""Codes of a folder of images and labels: what is found in it, and what its microtome.yaml or dataset.json says."""

from types import MappingProxyType

from microtome.codes.fault import Fault

AREA = "Folders of images and labels"

FAULTS = MappingProxyType(
    {
        "D031": Fault(
            "No images and labels that belong together",
            "Images and labels are paired by name (images/ + labels/, x.png + x_mask.png, dataset.json). In this folder there are none of one "
            "of the two, their names do not agree, or several candidates fit one image.",
            "Name each label like its image, or put both into images/ and labels/. Otherwise say what belongs together in microtome.yaml: "
            "`images:`, `labels:` or `pairs:`. `microtome inspect DATA` shows what was found.",
        ),
        "D032": Fault(
            "No case with a label",
            "Images were found, but not one label that belongs to them and can be read. A network learns from labels.",
            "Run `microtome inspect DATA` to see which labels were found and why they were left out. Annotate some images, or correct names "
            "and paths of the labels.",
        ),
        "D033": Fault(
            "Nothing is annotated",
            "Every voxel of the labels counts as not annotated: they hold only the value that stands for it, or `not_annotated` in "
            "microtome.yaml names a value that is a class.",
            "Check the values in the label files with any viewer, and correct `not_annotated`. Annotate at least a part of a case, background "
            "included.",
        ),
        "D034": Fault(
            "Image and label differ in shape",
            "The label has other sizes than its image: it was drawn on a scaled copy, cropped, rotated, or belongs to another image. "
            "Masks of single objects must all have the image's shape.",
            "Export the label again at the image's size. If the two do not belong together, correct names or `pairs:` in microtome.yaml. "
            "To train without the case, move it out of the folder.",
        ),
        "D035": Fault(
            "Image and label lie in different places",
            "Shapes agree but the headers put the two files at different origins, directions or voxel sizes, so that a voxel of one is not "
            "the voxel of the other.",
            "Resample the label to the image's grid (3D Slicer: Resample Scalar/Vector/DWI Volume, nearest neighbour). If the voxels do agree "
            "and only the header is wrong, copy the image's header to the label.",
        ),
        "D036": Fault(
            "Images with different numbers of channels",
            "Some images are grey and others RGB, or some have more channels than the rest. A network takes one number of channels.",
            "Convert all images to one kind. Pictures with an alpha channel or a scale bar in colour are the usual cause.",
        ),
        "D037": Fault(
            "Pictures and volumes in one folder",
            "Some images have two axes and others three. A network is trained for one of the two.",
            "Put them into two folders and train twice.",
        ),
        "D038": Fault(
            "The voxel size is not known",
            "Some images say how large their voxels are and others do not, or a size in mm was asked for where the file says none. "
            "Nothing is guessed there.",
            "State `spacing_mm: [z, y, x]` in the folder's microtome.yaml, which holds for all images, or give sizes in voxels.",
        ),
        "D039": Fault(
            "The label file is no label map",
            "A label map has one whole number, or one colour, for each class. This one has fractions (it was resampled with interpolation), "
            "several channels, or numbers where the other labels have colours.",
            "Export the labels as integers in one channel, as PNG or TIFF and never as JPEG; resample labels with nearest neighbour.",
        ),
        "D040": Fault(
            "A label value that no class has",
            "A file holds a value that is in none of the classes: of the predictions, the model or microtome.yaml.",
            "Compare the values that the line lists. Give labels of the same classes, or add the value to `classes:` or to `not_annotated:` "
            "in microtome.yaml.",
        ),
        "D041": Fault(
            "dataset.json cannot be understood",
            "The file is no JSON, is far too large, or its `training`, `dataset` or `labels` entries are not as nnU-Net or the Medical "
            "Segmentation Decathlon write them. Regions, several values for a class, are not supported.",
            "Correct the entry that the line shows. Without dataset.json the folder is read by the names of its files; classes can then be "
            "given in microtome.yaml.",
        ),
        "D042": Fault(
            "A name that leads out of the folder",
            "microtome.yaml or dataset.json names a file above the folder or by an absolute path. Only files inside are read, so that a folder "
            "from somebody else cannot reach yours.",
            "Copy that file into the folder and write its path relative to the folder.",
        ),
        "D043": Fault(
            "A file that is named is not there",
            "microtome.yaml or dataset.json names a file that the folder does not hold.",
            "Correct the name, capital letters and suffix included, or add the file.",
        ),
        "D044": Fault(
            "Fewer than two classes are annotated",
            "A network learns to tell classes apart, and this annotation shows only one, or nothing. Often masks were exported empty, or only "
            "the foreground was painted.",
            "Look at the label files with any viewer: `microtome inspect DATA` shows what each holds. Paint the background too, in a few "
            "places or planes: it is a class like the others. For `densify`, if 0 is your background, name the planes painted in full with "
            "`--planes z10,z20`.",
        ),
        "D067": Fault(
            "An image in training and in validation",
            "Files of the same pixels are on both sides of the split, so that the network is scored on what it learned by heart.",
            "Remove all but one of them, or put them into one group with `groups:` or `group_by:` in microtome.yaml.",
        ),
        "D068": Fault(
            "Pixels that are not finite",
            "The image holds NaN or infinite values, which programs write where nothing was measured. Training and prediction take them as "
            "the image's mean.",
            "Set them to a number, such as that of the background, or leave the case out.",
        ),
        "D069": Fault(
            "A value of 255 that may be a class or mean not annotated",
            "Some masks hold 0 and 255 alone, others smaller numbers. By custom 255 beside class numbers means that nobody annotated there; "
            "two programs may as well have written the same class as 1 and as 255.",
            "State it in microtome.yaml: `classes: {background: 0, foreground: [1, 255]}` where both are the foreground, else "
            "`not_annotated: 255`.",
        ),
        "D070": Fault(
            "dataset.json and the files do not agree",
            "A case has another number of image files than dataset.json has channels, or is listed twice. It is left out.",
            "Add or remove files until each case has one for each channel (`NAME_0000`, `NAME_0001`, ...), and list each case once.",
        ),
        "D045": Fault(
            "Nothing is left to fill",
            "Every voxel of the annotation counts as annotated, so that `densify` has nothing to add.",
            "Say which value means that nobody looked (`--not-annotated 0`), or which planes are painted in full (`--planes z10,z20`).",
        ),
        "D046": Fault(
            "Something is painted outside of the named planes",
            "--planes says where the annotation is, and there are painted voxels elsewhere. They would be thrown away.",
            "Name these planes too, or leave out --planes.",
        ),
        "D047": Fault(
            "More classes than a network should tell apart",
            "The annotation has very many values: usually a number for each object instead of one for each class.",
            "Give all objects of a class one value. For folders with numbers of objects write `instances: true` into microtome.yaml.",
        ),
        "D048": Fault(
            "A voxel size far from that of the training",
            "The image's voxels are so much larger or smaller than those the network learned from that a wrong unit is the likely reason: "
            "µm read as mm, or a scale that was never set.",
            "Correct the voxel size in the file (Fiji: Image > Properties), or use a model that was trained at this resolution.",
        ),
        "D049": Fault(
            "A case larger than the memory",
            "The case does not fit in the memory that is free, and it can neither be read nor be prepared part by part, for the reason "
            "that the line gives: its file is packed as a whole, its label is in several files, or border weights are asked for.",
            "Remove that reason: store image and label as OME-Zarr or HDF5, train without border weights, or cut the volume into parts.",
        ),
        "D050": Fault(
            "A name that is not UTF-8",
            "The name of a file or folder was written in another encoding, as old archives have it. Reports, models and lists of predictions "
            "are UTF-8 and could not name it.",
            "Rename it. `convmv -f latin1 -t utf-8 -r FOLDER` shows how it would rename all, and does so with `--notest`; "
            "`unzip -O cp1252 FILE` unpacks an archive with the right names.",
        ),
        "C016": Fault(
            "`validation` in microtome.yaml cannot be",
            "`validation` or `validation_sections` names cases without labels, leaves nothing to train on, or sections that the stack does "
            "not have.",
            "Correct the names. Cases of one group stay together, so that each group is named in full or not at all.",
        ),
        "C017": Fault(
            "microtome.yaml names an unknown case",
            "A name under `pairs:`, `groups:`, `validation:` or a similar entry is that of no case in the folder.",
            "`microtome inspect DATA` lists the cases; write the name as it stands there.",
        ),
        "C018": Fault(
            "Classes in microtome.yaml that do not fit the labels",
            "`classes`, `background`, `not_annotated` or `instances` contradict the values in the label files, or one another.",
            "Write `classes:` as `name: value`, `background:` as one of these names or null, and `not_annotated:` as values that are no class. "
            "`microtome inspect DATA` shows the values in the labels.",
        ),
        "C019": Fault(
            "`spacing_mm` has another number of axes",
            "The voxel size in microtome.yaml must have one number for each axis of the images, two for pictures and three for volumes.",
            "Write `spacing_mm: [y, x]` or `spacing_mm: [z, y, x]`.",
        ),
        "C020": Fault(
            "Planes that are not in the image",
            "A plane was named that the volume does not have, or planes of a picture.",
            "Write them as `z10,z20,y40`, counted from 0; the line names the last of each axis.",
        ),
        "C021": Fault(
            "What nobody looked at cannot be told",
            "In a partly painted volume 0 may mean background or not looked at, and nothing shows which; or the value of --not-annotated "
            "occurs nowhere in the annotation.",
            "Name the planes painted in full (`--planes z10,z20`), or paint the background with a value of its own, or give the value "
            "that nobody looked at with `--not-annotated`.",
        ),
    }
)
