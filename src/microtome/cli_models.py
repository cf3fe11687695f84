"""`microtome model` and `microtome import`: their words -> options -> one call."""

from pathlib import Path
from typing import Annotated

import typer

from microtome.options import AsJson, Run, check_target

# `cli` takes its commands over, in their own place among the others.
commands = typer.Typer()


@commands.command()
def model(run: Run, as_json: AsJson = False) -> None:
    """What a trained model is, what it learned from and how; its hashes are checked. Exit code 2 if it was changed."""
    import warnings

    from microtome.bundle import CHANGED, load_bundle
    from microtome.errors import DataWarning
    from microtome.inference.graphs import faults_of_graphs
    from microtome.model_card import card, card_rows
    from microtome.terminal import print_card, print_json

    # What the warning says is a row of the card.
    warnings.simplefilter("ignore", DataWarning)
    bundle = load_bundle(run)
    found = card(bundle) | {"graphs": faults_of_graphs(bundle)}
    if as_json:
        print_json(found)
    else:
        print_card(found["folder"], card_rows(found))
    if CHANGED in (found["copy_for_people"], *found["graphs"].values()):
        raise typer.Exit(2)


@commands.command("import")
def import_weights(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of PyTorch (.pt, .pth, .ckpt), .safetensors, or a run folder.")
    ],
    out: Annotated[Path | None, typer.Option(help="Write the tensors here, as .safetensors.")] = None,
    as_json: AsJson = False,
) -> None:
    """What another program's checkpoint holds, read in a process that can do no harm, and the same as a file without code."""
    from microtome.interop.checkpoints import read_weights, save_weights
    from microtome.terminal import print_json, print_tensors

    check_target(out, ".safetensors")
    weights = read_weights(checkpoint)
    if out is not None:
        save_weights(out, weights)
    tensors = [{"name": name, "shape": list(array.shape), "type": str(array.dtype)} for name, array in weights.arrays.items()]
    if as_json:
        found = {"source": weights.source, "hash": weights.hash, "place": weights.place, "left_out": list(weights.left_out)}
        print_json(found | {"shared_names": weights.shared, "tensors": tensors})
    else:
        print_tensors(weights, tensors, out)
