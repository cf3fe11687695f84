"""Codes of prediction: its images and outputs, engines, clean-up, many workers."""

from types import MappingProxyType

from microtome.codes.fault import Fault

AREA = "Prediction"

FAULTS = MappingProxyType(
    {
        "D058": Fault(
            "An image unlike those of the training",
            "The model was trained on images of other channels or axes, such as grey volumes where this is a colour picture.",
            "Convert the image (grey, RGB, the same stains in the same order), or use a model that was trained on such images.",
        ),
        "D062": Fault(
            "--memory is too small for this image",
            "With so little memory not even one column of tiles, or the label map that is written in one piece, can be held.",
            "Give what the line says. With --ome-zarr the labels are written part by part and less is enough.",
        ),
        "D063": Fault(
            "The output would mix with other files",
            "--out is the folder of the images or lies in it, or holds a file of the same name that `predict` did not write. Images or labels "
            "of yours could be overwritten, or predictions taken for images the next time.",
            "Give another --out, best a new folder.",
        ),
        "D064": Fault(
            "Two images of one name",
            "Predictions are named after their images, and two of these would get the same name, as with a.tif and a.png.",
            "Rename one, or predict them in two calls with two --out folders.",
        ),
        "D065": Fault(
            "The list of predictions cannot be read",
            "`predict` keeps a list of what it wrote in its --out folder. This one is damaged or was written by something else.",
            "Remove it and predict again, or predict into a new folder.",
        ),
        "D066": Fault(
            "Predictions of other classes are in this folder",
            "The folder holds predictions of a model whose values mean other classes. Beside each other nobody could tell what a value means.",
            "Give another --out for this model.",
        ),
        "C023": Fault(
            "Classes that the clean-up cannot work on",
            "--keep-largest, --fill-holes, --min-size and --instances work on classes that stand out from a background. The model has none, or "
            "the class that was named is the background or no class.",
            "Name classes that the line lists, or leave the option out.",
        ),
        "C025": Fault(
            "This engine cannot do what is asked",
            "Graphs (openvino, onnxruntime) run on the CPU, hold the whole network and are checked by samples in the model; bfloat16 needs a "
            "processor or GPU that has it. What was asked beside --engine, the model or this machine do not allow it.",
            "Use `--engine torch`, which can do everything, or `--engine auto`, which takes the fastest that can.",
        ),
        "C026": Fault(
            "The engine disagrees with the trained network",
            "Before an engine is used its answers are compared with those of the network. These differ by more than its precision explains.",
            "Use `--engine torch`, or `auto`, which takes the fastest that agrees.",
        ),
        "C027": Fault(
            "The prediction was begun with another engine",
            "Half of this store was written by one engine. Another would leave a seam between the halves.",
            "Give the engine and the words of the first call, or begin anew in another --out.",
        ),
        "C028": Fault(
            "--tta that the model was not trained for",
            "Averaging over mirrored or turned versions helps where the network learned such versions. This one did not.",
            "Leave --tta out, or train with `augment.flip_axes` or `augment.rotation_degrees` set in the plan.",
        ),
        "C029": Fault(
            "--head of a network that has no such head",
            "Only nested U-Nets (unetpp) answer from shallower heads, and only from those that were trained.",
            "Leave --head out, or choose one that the line names.",
        ),
        "C030": Fault(
            "--cluster is not the address of a cluster",
            "It takes `local:N`, the address of a scheduler of Dask, or the file that the scheduler wrote.",
            "Write `--cluster local:2`, `--cluster tcp://host:8786` or `--cluster scheduler.json`; docs/cluster.md shows how to start one.",
        ),
        "C031": Fault(
            "The cluster has another version of microtome",
            "Scheduler, workers and this command must be of one version, or parts of one volume would be computed differently.",
            "Give all of them one environment or one container image.",
        ),
        "C032": Fault(
            "The workers have too little memory",
            "A block needs more memory than the workers are allowed for each of their threads; Dask would end them again and again.",
            "Start workers with `--nthreads 1 --memory-limit 0`, or on machines with more memory.",
        ),
        "R007": Fault(
            "A block could not be computed",
            "The workers that tried it died, usually for lack of memory, or an error occurred that is none of those with a code of their own. "
            "What was computed before is kept.",
            "Read the workers' logs, give them more memory or fewer threads, and run the same command again: only what is missing is computed.",
        ),
        "R008": Fault(
            "Blocks that workers wrote are not there",
            "The workers say that they are done, and this process does not see all they wrote: they write into another store of the same name.",
            "Choose an --out on a drive that all machines share under one name, and run the same command again.",
        ),
        "R009": Fault(
            "The cluster was lost",
            "The connection to the scheduler broke, or all workers of this machine ended and none came back. What was computed is kept.",
            "See whether memory ran out or the scheduler was stopped, and run the same command again.",
        ),
        "R010": Fault(
            "The cluster cannot be started or reached",
            "No scheduler answers at the address, or the workers of this machine cannot be started.",
            "Start `dask scheduler` and `dask worker`, and give the address that the scheduler shows. For `local:N` try a smaller N; "
            "a script needs `if __name__ == '__main__':`.",
        ),
        "R123": Fault(
            "Not even the smallest tile fits into memory",
            "The memory of this machine or of its GPU ran out. The tile was halved as often as the network allows, and that did not fit either.",
            "Close other programs that use this memory, give `--device cpu` where it was the GPU's, or predict on a machine with more.",
        ),
        "R124": Fault(
            "The memory ran out",
            "An image, a report or something else needed more memory than the system would give, in a place that has no smaller way to do it.",
            "Close other programs, or allow a smaller part of the memory with --memory. What was saved is good: a training goes on with "
            "--resume, a prediction into a store with the same command.",
        ),
        "R012": Fault(
            "Too many separate pieces",
            "The prediction falls into more connected pieces than can be numbered, as noise does.",
            "Remove small pieces first (`--min-size`), raise the threshold, or train longer: a good model makes no such noise.",
        ),
    }
)
