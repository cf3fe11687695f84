"""The words that a user types -> one call each. Bodies import late, so that `--help` needs no torch."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microtome.errors import ConfigError, MicrotomeError

if TYPE_CHECKING:
    from microtome.config import Plan
    from microtome.data.dataset import Dataset

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From a folder of images and masks to a trained U-Net, its predictions, its scores and a report.",
)

Data = Annotated[Path, typer.Argument(metavar="DATA", help="Folder with images and masks.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `train --out` made.")]
Minutes = Annotated[float | None, typer.Option(help="Wall time of the whole run.", min=0.1)]
Memory = Annotated[float | None, typer.Option(help="GB that training may use; by default most of what is free.", min=0.1)]
Network = Annotated[str, typer.Option(help="One of `microtome networks`.")]
Seed = Annotated[int, typer.Option(help="Of everything random.", min=0)]
Fold = Annotated[str, typer.Option(help="K/N: part K of N validates; all: everything trains, nothing validates.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs: JSON on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.callback()
def _options(debug: Debug = False) -> None:
    """Options of every command; `main` looks at --debug itself."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for its data, runs and reports; a number is added if it is taken.")] = Path("demo"),
    minutes: Annotated[float, typer.Option(help="Wall time of all of it.", min=0.5)] = 4.0,
) -> None:
    """The whole road on built-in data: sparse 3D annotation, training, dense prediction, scores, report; then 2D cells."""
    from microtome.demo import run_demo
    from microtome.terminal import Terminal

    run_demo(out, minutes, Terminal())


@app.command()
def inspect(
    data: Data,
    html: Annotated[Path | None, typer.Option(help="Write a page with pictures here.")] = None,
    as_json: AsJson = False,
    fold: Fold = "1/5",
    seed: Seed = 0,
) -> None:
    """What was found, how files were paired, and what is wrong, before anyone trains. Exit code 2 if there are errors."""
    from microtome.data.quality import case_thumbnails, inspect_fold, inspection_html
    from microtome.files import write_text
    from microtome.terminal import print_inspection, print_json

    _target(html, ".html", ".htm")
    dataset = _open(data)
    inspection = inspect_fold(dataset, fold, seed)
    if html is not None:
        write_text(html, inspection_html(inspection, case_thumbnails(dataset, inspection)))
    if as_json:
        print_json(inspection.to_json())
    else:
        print_inspection(inspection, html)
    if not inspection.ok:
        raise typer.Exit(2)


@app.command()
def plan(
    data: Data,
    minutes: Minutes = None,
    memory: Memory = None,
    network: Network = "modern_unet",
    out: Annotated[Path | None, typer.Option(help="Write the plan here; edit it and give it to `train --plan`.")] = None,
    fold: Fold = "1/5",
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """The plan for this data on this machine, each value with its reason."""
    from microtome.config import dump_yaml
    from microtome.files import write_text
    from microtome.terminal import print_json, print_plan
    from microtome.training.rehearsal import make_plan

    _target(out, ".yaml", ".yml")
    made = make_plan(_open(data), minutes=minutes, memory_gb=memory, network=network, device=device, seed=seed, fold=fold)
    if out is not None:
        write_text(out, dump_yaml(made))
    if as_json:
        print_json(made.model_dump(mode="json"))
    else:
        print_plan(made, out)


@app.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="The run folder; must be new or empty, unless --resume.")],
    plan: Annotated[Path | None, typer.Option(help="A plan.yaml, instead of planning now.")] = None,
    minutes: Minutes = None,
    steps: Annotated[int | None, typer.Option(help="Exactly so many steps, instead of minutes.", min=1)] = None,
    memory: Memory = None,
    network: Annotated[str | None, typer.Option(help="One of `microtome networks`; modern_unet if not given.")] = None,
    fold: Annotated[str | None, typer.Option(help="K/N: part K of N validates (1/5 if not given); all: nothing validates.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random; 0 if not given.", min=0)] = None,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of --out, with its plan.")] = False,
) -> None:
    """Train, validate, keep the best, write the report."""
    import time

    started = time.perf_counter()
    from microtome.terminal import Terminal
    from microtome.training.rehearsal import make_plan
    from microtome.training.run import check_folder, read_plan
    from microtome.training.run import train as train_run

    terminal = Terminal()
    others = {"--network": network, "--memory": memory}
    if steps is not None:
        _refuse("--steps", {"--minutes": minutes})
    if resume:
        _refuse("--resume", others | {"--plan": plan, "--fold": fold, "--seed": seed})
    elif plan is not None:
        _refuse("--plan", others)
    check_folder(out, resume=resume)
    dataset = _open(data)
    terminal.say_dataset(dataset)
    if fold not in (None, "all") and (dataset.config.validation or dataset.config.validation_sections):
        raise ConfigError("--fold", expected="no fold beside `validation` in microtome.yaml", got=str(fold), do="remove one of the two")
    chosen: Plan
    if resume or plan is not None:
        chosen = read_plan(out / "plan.yaml" if plan is None else plan)
        changes = {"minutes": minutes, "steps": steps, "fold": fold, "seed": seed}
        chosen = chosen.model_copy(update={name: value for name, value in changes.items() if value is not None})
        chosen = chosen if steps is None else chosen.model_copy(update={"minutes": None})
    else:
        if minutes is None and steps is None:
            minutes = 10.0
            terminal.say("neither --minutes nor --steps given: training for 10 minutes")
        terminal.say("timing a few steps to plan ...")
        words: dict[str, Any] = {"network": network or "modern_unet", "fold": fold or "1/5", "seed": seed or 0}
        chosen = make_plan(dataset, minutes=minutes, steps=steps, memory_gb=memory, device=device, **words)
    terminal.say_plan(chosen)
    with terminal.training(chosen) as on_event:
        folder = train_run(dataset, chosen, out, device=device, resume=resume, on_event=on_event, started=started)
    terminal.say_result(folder)


@app.command()
def predict(
    run: Run,
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Images, folders of images, datasets.")],
    out: Annotated[Path, typer.Option(help="Folder for the label files.")],
    tta: Annotated[bool, typer.Option("--tta", help="Average over mirrored versions: slower, a little better.")] = False,
    device: Device = "auto",
) -> None:
    """Label images in their own format and geometry, with the values of the training labels."""
    from microtome.inference.predictor import load, predict_files
    from microtome.terminal import Terminal

    terminal = Terminal()
    with terminal.counting("predicting") as on_done:
        written = predict_files(load(run, device=device, tta=tta), inputs, out, on_done=on_done)
    terminal.say(f"{len(written)} {'file' if len(written) == 1 else 'files'} written to {out}")


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="A label file, or a folder of them.")],
    truth: Annotated[Path, typer.Argument(help="A label file, a folder of them, or a dataset.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Of the surface Dice (nsd), mm; by default each case's largest voxel side.")
    ] = None,
) -> None:
    """Overlap and distance scores, by case and class, the worst first."""
    from microtome.evaluation.evaluate import evaluate as score
    from microtome.evaluation.pages import scores_html
    from microtome.files import write_json, write_text
    from microtome.terminal import print_scores

    _target(json_file, ".json")
    _target(html, ".html", ".htm")
    result = score(predictions, truth, tolerance_mm=tolerance)
    if json_file is not None:
        write_json(json_file, result)
    if html is not None:
        write_text(html, scores_html(result))
    print_scores(result, [path for path in (json_file, html) if path is not None])


@app.command()
def report(run: Run) -> None:
    """Write RUN/report.html anew: curves, worst cases, scores, plan with reasons, data findings."""
    from microtome.evaluation.report import build_report
    from microtome.terminal import Terminal

    Terminal().say(f"report: {build_report(run)}")


@app.command()
def networks(as_json: AsJson = False) -> None:
    """The networks with their papers."""
    from microtome.models.registry import NETWORKS
    from microtome.terminal import print_json, print_networks

    if as_json:
        fields = ("name", "title", "authors", "year", "reference", "dims", "variants")
        print_json([{field: getattr(entry, field) for field in fields} for entry in NETWORKS.values()])
    else:
        print_networks(NETWORKS.values())


def _target(path: Path | None, *suffixes: str) -> None:
    """Refuse a file to write that is not named as what it will be: it may be somebody's image."""
    if path is not None and (path.suffix.lower() not in suffixes or path.is_dir()):
        got = "a folder" if path.is_dir() else f"`{path.name}`"
        raise ConfigError(path, expected=f"the name of a file ending in {' or '.join(suffixes)}", got=got, do="give another name")


def _refuse(word: str, others: Mapping[str, object]) -> None:
    """Options that would be ignored in silence beside `word`."""
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ConfigError(
            word, expected="none of " + ", ".join(others), got=" ".join(given), do="change the plan instead, or start a new run"
        )


def _open(data: Path) -> "Dataset":
    """The dataset; what its files leave open is among its findings, so it is not said a second time as a warning."""
    import warnings

    from microtome.data.dataset import open_dataset
    from microtome.errors import DataWarning

    warnings.simplefilter("ignore", DataWarning)
    return open_dataset(data)


def main() -> None:
    """Entry point: errors meant for people become one line and an exit code."""
    import warnings

    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    warnings.formatwarning = _one_line
    try:
        app()
    except MicrotomeError as error:
        if debug:
            raise
        sys.stderr.write(f"microtome: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("microtome: stopped; a training run goes on with --resume\n")
        sys.exit(130)


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning for people: without the place in the code that gave it."""
    return f"warning: {message}\n"
