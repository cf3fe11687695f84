"""`microtome predict`: its words -> options -> one call."""

from pathlib import Path
from typing import Annotated, Any

import typer

from microtome.errors import ConfigError
from microtome.options import Averaged, Device, Engine, Head, Run, one_of, refuse_beside

# `cli` takes its command over, in its own place among the others.
commands = typer.Typer()


@commands.command()
def predict(
    run: Run,
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT...", help="Images, folders of them, OME-Zarr, N5 or DICOM folders, URLs (s3://...), file.h5/name."),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder for the label files; for OME-Zarr, which chunked images get, it may be a URL."),
    ],
    tta: Averaged = "none",
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Those of each class too, times 255 as bytes, in OUT/probabilities.")
    ] = False,
    float16: Annotated[bool, typer.Option("--float16", help="Probabilities as 16-bit floating point instead of bytes.")] = False,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty", help="Entropy too, 0 to 255, in OUT/uncertainty; with --tta, how far the passes differ in OUT/disagreement."
        ),
    ] = False,
    instances: Annotated[
        bool, typer.Option("--instances", help="A number for each object too, touching ones apart, in OUT/instances.")
    ] = False,
    keep_largest: Annotated[bool, typer.Option("--keep-largest", help="Of each class only the largest connected part.")] = False,
    fill_holes: Annotated[bool, typer.Option("--fill-holes", help="What a class encloses becomes that class.")] = False,
    min_size: Annotated[str, typer.Option(help="Smaller parts become background: 50 (voxels), or 0.5mm (mm³, in a picture mm²).")] = "",
    memory: Annotated[float | None, typer.Option(help="GB that this process may take; refused if that cannot be.", min=0.1)] = None,
    cluster: Annotated[str, typer.Option(help="local:N, or the address of a Dask scheduler: many workers, one OME-Zarr.")] = "",
    ome_zarr: Annotated[bool, typer.Option("--ome-zarr", help="Write OME-Zarr whatever the images are.")] = False,
    head: Head = None,
    device: Device = "auto",
    engine: Engine = "auto",
) -> None:
    """Label images in their own format and geometry, with the values of the training labels; in stores a killed call goes on."""
    from microtome.inference.asked import CleanUp, Options, parse_size
    from microtome.inference.predict_files import predict_files
    from microtome.inference.predictor import load
    from microtome.terminal import Terminal

    if float16 and not probabilities:
        raise ConfigError("--float16", expected="--probabilities beside it", got="--float16 alone", do="give both, or neither", code="C003")
    if cluster:
        from microtome.inference.cluster import check_address

        refuse_beside("--cluster", {"--memory": memory}, "limit the memory of the workers instead")
        check_address(cluster)
    kind: Any = ("float16" if float16 else "uint8") if probabilities else ""
    least, unit = parse_size(min_size) if min_size else (0.0, "")
    clean = CleanUp(
        keep_largest=keep_largest,
        fill_holes=fill_holes,
        min_size_vox=0 if unit == "mm" else least,
        min_size_mm=least if unit == "mm" else 0,
    )
    options = Options(
        probabilities=kind, uncertainty=uncertainty, instances=instances, clean=clean, memory_gb=memory, cluster=cluster, store=ome_zarr
    )
    terminal, averaged = Terminal(), one_of("--tta", tta, ("none", "mirror", "rotations"))
    predictor = load(run, device=device, engine=engine, tta=averaged, head=head, on_choice=terminal.say)
    with terminal.predicting() as view:
        count = len(predict_files(predictor, inputs, out, options=options, on_done=view.done, on_voxels=view.voxels, say=terminal.say))
    terminal.say(f"{count} image{'' if count == 1 else 's'} labelled in {out}")
