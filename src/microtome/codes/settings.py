"""Codes of what is typed: options, plans, YAML files, folds."""

from types import MappingProxyType

from microtome.codes.fault import Fault

AREA = "Options, plans and YAML files"

FAULTS = MappingProxyType(
    {
        "C001": Fault(
            "A word that is none of the known ones",
            "The name that was given is misspelt, or belongs to another version of microtome.",
            "Take one of the names that the line lists; it proposes the nearest. `microtome networks` lists the networks, "
            "`microtome COMMAND --help` the other choices.",
        ),
        "C002": Fault(
            "A package is not installed",
            "Some formats and engines need packages that are not part of the plain installation.",
            "Run the `pip install` that the line ends with, in the environment in which microtome is installed.",
        ),
        "C003": Fault(
            "Options that cannot stand together",
            "One of them would be passed over in silence, or they contradict each other. For example, a finished plan already says what "
            "--network would, and `validation` in microtome.yaml says what --fold would.",
            "Leave out one of the two, or give the other one that is missing. To change a plan, edit plan.yaml and give it with --plan.",
        ),
        "C004": Fault(
            "The name of the file to write has another suffix",
            "The suffix decides what a file is taken for, and this one belongs to another kind of file, or the path is a folder. "
            "It may be an image of yours, so it is not overwritten.",
            "Give a name that ends as the line says.",
        ),
        "C005": Fault(
            "The place to write to is taken",
            "There are files where a new folder or file would be made. Nothing of yours is overwritten or mixed with a new run.",
            "Give another --out. To go on with an interrupted training use --resume; if the old result is not needed, remove it first.",
        ),
        "C006": Fault(
            "No run in this folder",
            "A folder that `microtome train --out` or `microtome compare --out` made was expected, and plan.yaml or compare.json is not there.",
            "Check the path: the run folder itself, neither its parent nor its model/. If nothing was begun yet, leave out --resume.",
        ),
        "C007": Fault(
            "Resumed with something else than before",
            "`compare --resume` goes on with the same data, time, fold and seed, or its numbers could not be compared. "
            "One of these differs from the call before, or a network of it was left out.",
            "Give the same words as before; networks may be added. For other settings give another --out.",
        ),
        "C008": Fault(
            "The YAML file cannot be read",
            "There is no such file, this account may not read it, or it is far too large for a plan or a microtome.yaml.",
            "Check the path. If it is large, it is probably another file.",
        ),
        "C009": Fault(
            "Not valid YAML",
            "The file breaks the rules of YAML at the line that is named, or is no list of names with values. "
            "Usual causes are tabs, a missing space after a colon, and unequal indentation.",
            "Correct that line: `steps: 1000`, indented by spaces. `microtome plan DATA --out plan.yaml` writes a plan to start from.",
        ),
        "C010": Fault(
            "A setting that does not exist",
            "The name is misspelt, stands in the wrong group, or is of another version of microtome. It would have no effect.",
            "Correct or remove it; the line proposes the nearest name. All settings are in docs/settings.md.",
        ),
        "C011": Fault(
            "A setting is missing",
            "The file leaves out a value that has no default.",
            "Add it; docs/settings.md says what it means. A plan that `microtome plan` wrote has all of them.",
        ),
        "C012": Fault(
            "A setting's value is not allowed",
            "The value is of another kind or outside of its range, such as text for a number or a negative size.",
            "Change it as the line says; docs/settings.md lists the values of each setting.",
        ),
        "C013": Fault(
            "Settings that do not fit together",
            "Each value is allowed by itself, and two of them contradict each other, such as a patch of three sizes in a plan of two axes.",
            "Change one of those that the line names.",
        ),
        "C014": Fault(
            "A fold that cannot be",
            "A fold is written K/N: part K of N validates, with K from 1 to N and N of at least 2, and as many cases or groups as parts. "
            "`all` validates nothing, so that networks cannot be compared by it.",
            "Try `--fold 1/5`; with few cases, a smaller N, such as 1/2.",
        ),
        "C015": Fault(
            "Too little annotation to keep any back",
            "Validation needs cases, sections or planes that the training does not see, and there is only one.",
            "Annotate another one, or train on everything with `--fold all`: then nothing is measured.",
        ),
        "C022": Fault(
            "A number outside of its range",
            "An option or argument takes numbers of a certain range or form, and this one is outside, such as a negative size.",
            "Give one as the line says. `microtome COMMAND --help` shows the forms.",
        ),
        "C045": Fault(
            "Fewer steps than were made",
            "A run is resumed with --steps, or with an edited plan.yaml, that asks for fewer steps than it has already made. Steps cannot be "
            "taken back; the run is unchanged.",
            "Set `steps` in plan.yaml, or --steps, to at least as many as the line says are made, or train anew into another --out.",
        ),
        "C024": Fault(
            "The device cannot be used",
            "--device takes auto, cpu, cuda or cuda:N. Here torch finds no GPU, or fewer than N + 1: none is there, the driver is too old, or "
            "torch was installed without CUDA.",
            "Give `--device cpu`, or leave it out. To use a GPU check `nvidia-smi` and "
            '`python -c "import torch; print(torch.cuda.is_available())"`, and install the torch build of your CUDA version.',
        ),
    }
)
