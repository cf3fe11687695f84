"""Codes of trained models and run folders: what is read from them, and the graphs that are made of them."""

from types import MappingProxyType

from microtome.codes.fault import Fault

AREA = "Trained models and run folders"

FAULTS = MappingProxyType(
    {
        "D051": Fault(
            "No trained model here",
            "The folder has no model/model.safetensors: it is not a run folder, or its training was interrupted before the first model was "
            "kept.",
            "Give the folder that `microtome train --out` made. If it was interrupted, finish it: `microtome train DATA --out RUN --resume`.",
        ),
        "D052": Fault(
            "Weights that microtome did not write",
            "The file holds weights without the description (plan, classes, versions) that is needed to use them.",
            "Give a run folder of `microtome train`, or the model.safetensors in its model/.",
        ),
        "D053": Fault(
            "Written by another version of microtome",
            "The model or record has a newer form than this version knows.",
            "Update: `pip install --upgrade microtome`. Or use the version that wrote it, which its model.json names.",
        ),
        "D054": Fault(
            "The model was changed or damaged",
            "What is in the file is not what was written: its hash differs, or it cannot be read. A copy was interrupted, a disk failed, or "
            "somebody edited it. It is not used, as nobody could tell what it would predict.",
            "Copy it again from where it was trained. If that is gone, train again: the checkpoints in RUN/checkpoints may still be whole "
            "(`microtome train DATA --out RUN --resume`).",
        ),
        "D055": Fault(
            "Weights that do not fit the network",
            "The tensors in the model have other names or shapes than the network of its plan has in this version.",
            "Use the version of microtome that trained it, which model.json names under `versions`.",
        ),
        "D056": Fault(
            "The model has no samples to check a graph by",
            "Fast engines are held to the trained network's answers on samples that training stores in the model. This one was written by an "
            "older version, or its run did not finish.",
            "`microtome train DATA --out RUN --resume` on its run adds them; or predict with `--engine torch`.",
        ),
        "D057": Fault(
            "The graph gives other answers than the network",
            "The network was written as a graph for a faster engine, and its answers on the samples differ by more than is allowed, as 8 bits "
            "may be too few for it.",
            "Predict with `--engine torch`, or `auto`, which takes the fastest engine that agrees.",
        ),
        "D059": Fault(
            "A file of the run folder is missing or damaged",
            "dataset.json, metrics.json, log.jsonl or another record that `train` or `compare` writes is not there or is no longer JSON.",
            "Copy the run folder again, with all its files. If that does not help, train again into another --out.",
        ),
        "D200": Fault(
            "The model's description contradicts itself",
            "A value in the description of a bundle is of another kind than it must be, or does not fit the others: its classes, network, "
            "golden input and plan are not of one model. It was edited, or written by another program.",
            "Copy it again from where it was trained, or use the version of microtome that wrote it, which model.json names.",
        ),
        "D230": Fault(
            "None of these weights fits the network",
            "No tensor in the file has the name and shape of one of the network's, nor are their shapes the same in the same order: it is "
            "another architecture, or has other widths.",
            "`microtome import FILE` shows names and shapes, `microtome networks NAME` those of a network. Give --network and a plan with "
            "the same widths and kernels.",
        ),
        "D231": Fault(
            "Weights that are not finite",
            "A tensor that the training was to begin with holds NaN or infinity: the training that wrote it had diverged.",
            "Take an earlier checkpoint of it.",
        ),
        "D232": Fault(
            "No weights can be read from this file",
            "It is neither weights in safetensors nor a checkpoint of PyTorch that holds tensors and nothing else. Checkpoints are read in a "
            "process with limits, where objects of classes are refused: they would run a stranger's code.",
            "In the program that made it save only the weights: `torch.save(model.state_dict(), 'weights.pt')`, or safetensors' `save_file`.",
        ),
        "D240": Fault(
            "A JSON file that cannot be understood",
            "The file is no JSON, is nested too deeply or far too large, or holds a list or a number where names with values belong.",
            "Do what the line ends with. If the file was copied, copy it again; if it was edited by hand, put it back as it was.",
        ),
        "D241": Fault(
            "A JSON file that cannot be opened",
            "The file is not there, is a folder or a pipe, or this account may not read it.",
            "Look with `ls -l FILE` whether it is there and readable, and copy the folder that it belongs to again if it is not.",
        ),
        "C038": Fault(
            "No graph can be made of this model",
            "Graphs are kept beside a saved model, and one ONNX file holds at most 2 GB of weights.",
            "Save the model first (`save_bundle`) and use what it returns. For larger networks predict with `--engine torch`.",
        ),
        "R011": Fault(
            "The engine cannot run this graph",
            "The library that writes or runs graphs failed on this network or file.",
            "Remove the graph that the line names, so that it is written anew, or predict with `--engine torch`.",
        ),
    }
)
