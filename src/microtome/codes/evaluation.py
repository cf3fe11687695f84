"""Codes of evaluation: predictions and what they are compared with."""

from types import MappingProxyType

from microtome.codes.fault import Fault

AREA = "Evaluation"

FAULTS = MappingProxyType(
    {
        "D071": Fault(
            "A case without a prediction",
            "There is no prediction of the name of one or more cases. A score without them would be too good.",
            "Predict these images too, or evaluate against a folder that holds only the others.",
        ),
        "D072": Fault(
            "A prediction without a truth",
            "The folder of predictions holds files that no case of the truth is named like.",
            "Add their truth, move them away, or name them like the cases.",
        ),
        "D073": Fault(
            "Several files could be the same case",
            "Two predictions, or two truths, have names that mean one case, such as `a_pred.png` beside `a.png`.",
            "Keep the right one in the folder, or give them names that differ by more than words such as labels or prediction.",
        ),
        "D074": Fault(
            "No label images in the folder",
            "The folder holds no file that can be read as a label map.",
            "Check the path: the folder that `predict --out` wrote, or one of label files.",
        ),
        "D075": Fault(
            "No numbers of objects beside the prediction",
            "`evaluate --instances` compares objects, and this prediction has classes only.",
            "Predict again with --instances, or evaluate without it.",
        ),
        "D076": Fault(
            "Files that `predict` did not write",
            "The folder holds label images that the list of predictions does not name: of an unfinished call, or put there by hand. "
            "It cannot be told whether they count.",
            "Predict again, which completes the list, or move these files away.",
        ),
        "D077": Fault(
            "Prediction and truth differ in shape",
            "The two have other sizes, so that their voxels cannot be compared: another image, a cropped or a resampled one.",
            "Predict this very image again, or check that the two belong together.",
        ),
    }
)
