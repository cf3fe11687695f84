"""The words that a user types -> one call each. Bodies import late, so that `--help` needs no torch."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microtome import cli_doctor, cli_explain, cli_models, cli_networks, cli_predict
from microtome.endings import ending
from microtome.errors import ConfigError
from microtome.options import (
    MOST_SEED,
    AnyRecipe,
    AsJson,
    Data,
    Debug,
    Device,
    Dims,
    Fold,
    Holdout,
    Memory,
    Minutes,
    Network,
    Recipe,
    Run,
    Seed,
    changed_plan,
    check_names,
    check_target,
    check_there,
    checked_fold,
    checked_holdout,
    one_line,
    one_of,
    open_data,
    refuse_beside,
)
from microtome.training.clock import leaving

if TYPE_CHECKING:
    from microtome.config import Plan

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From a folder of images and masks to a trained U-Net, its predictions, its scores and a report.",
)


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


app.registered_commands += cli_doctor.commands.registered_commands


@app.command()
def inspect(
    data: Data,
    html: Annotated[Path | None, typer.Option(help="Write a page with pictures here.")] = None,
    as_json: AsJson = False,
    fold: Fold = "1/5",
    seed: Seed = 0,
) -> None:
    """What was found, how files were paired, and what is wrong, before anyone trains. Exit code 2 if there are errors."""
    from microtome.data.quality import case_table, case_thumbnails, inspect_fold, inspection_html
    from microtome.files import write_text
    from microtome.terminal import print_inspection, print_json

    check_target(html, ".html", ".htm")
    checked_fold(fold)
    dataset = open_data(data)
    inspection = inspect_fold(dataset, fold, seed)
    if html is not None:
        write_text(html, inspection_html(inspection, case_thumbnails(dataset, inspection)))
    if as_json:
        print_json(inspection.to_json())
    else:
        print_inspection(inspection, case_table(inspection), html)
    if not inspection.ok:
        raise typer.Exit(2)


@app.command()
def plan(
    data: Data,
    minutes: Minutes = None,
    memory: Memory = None,
    network: Network = None,
    recipe: Recipe = "default",
    dims: Dims = None,
    holdout: Holdout = "cases",
    out: Annotated[Path | None, typer.Option(help="Write the plan here; edit it and give it to `train --plan`.")] = None,
    fold: Fold = "1/5",
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """The plan for this data on this machine, each value with its reason."""
    from microtome.config import dump_yaml
    from microtome.files import write_text
    from microtome.terminal import Terminal, print_json, print_plan
    from microtome.training.rehearsal import make_plan

    check_target(out, ".yaml", ".yml", new=True)
    checked_fold(fold)
    check_names(network, recipe)
    words: dict[str, Any] = {
        "network": network,
        "recipe": recipe,
        "dims": dims,
        "seed": seed,
        "fold": fold,
        "holdout": checked_holdout(holdout, fold),
    }
    made = make_plan(open_data(data), minutes=minutes, memory_gb=memory, device=device, say=Terminal().say, **words)
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
    network: Network = None,
    recipe: AnyRecipe = None,
    dims: Dims = None,
    holdout: Annotated[
        str | None, typer.Option(help="cases (if not given): whole images validate; slices: annotated slices of volumes.")
    ] = None,
    fold: Annotated[str | None, typer.Option(help="K/N: part K of N validates (1/5 if not given); all: nothing validates.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random; 0 if not given.", min=0, max=MOST_SEED)] = None,
    device: Device = "auto",
    weights: Annotated[
        Path | None, typer.Option(help="Begin with these: a run folder, .safetensors, or a PyTorch checkpoint; what does not fit is said.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of --out, with its plan.")] = False,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="The same bits each time on a GPU too, or an error; on a CPU they always are."),
    ] = False,
) -> None:
    """Train, validate, keep the best, write the report."""
    import time

    started = time.perf_counter()
    check_there(data)
    from microtome.interop.checkpoints import in_our_names, read_weights
    from microtome.terminal import Terminal
    from microtome.training.folder import check_folder, read_plan
    from microtome.training.initial import Start
    from microtome.training.processes import joined
    from microtome.training.rehearsal import make_plan
    from microtome.training.run import train as train_run

    with joined(device) as ranks:
        terminal = Terminal(silent=not ranks.is_first)
        others = {"--network": network, "--recipe": recipe, "--dims": dims, "--memory": memory, "--holdout": holdout}
        if steps is not None:
            refuse_beside("--steps", {"--minutes": minutes})
        if resume:
            refuse_beside("--resume", others | {"--plan": plan, "--fold": fold, "--seed": seed, "--weights": weights})
        elif plan is not None:
            refuse_beside("--plan", others)
        checked_fold(fold)
        check_names(network, recipe)
        if ranks.is_first:
            check_folder(out, resume=resume)
        initial = None if weights is None else in_our_names(read_weights(weights))
        dataset = open_data(data)
        terminal.say_dataset(dataset)
        if fold not in (None, "all") and (dataset.config.validation or dataset.config.validation_sections):
            raise ConfigError(
                "--fold", expected="no fold beside `validation` in microtome.yaml", got=str(fold), do="remove one of the two", code="C003"
            )

        def choose() -> "Plan":
            if resume or plan is not None:
                found = read_plan(out / "plan.yaml" if plan is None else plan)
                return changed_plan(found, minutes=minutes, steps=steps, fold=fold, seed=seed)
            if minutes is None and steps is None:
                terminal.say("neither --minutes nor --steps given: training for 10 minutes")
            words: dict[str, Any] = {"network": network, "recipe": recipe or "default", "dims": dims, "fold": fold or "1/5"}
            words |= {"seed": seed or 0, "holdout": checked_holdout(holdout or "cases", fold)}
            wanted = 10.0 if minutes is None and steps is None else minutes
            words |= {"device": ranks.device(device), "say": terminal.say}
            return make_plan(dataset, minutes=wanted, steps=steps, memory_gb=memory, **words)

        chosen = ranks.same_plan(choose)
        terminal.say_plan(chosen)
        with terminal.training(chosen) as on_event:
            words: dict[str, Any] = {"device": device, "resume": resume, "on_event": on_event, "ranks": ranks}
            folder = train_run(dataset, chosen, out, start=Start(started, initial, deterministic), **words)
        if ranks.is_first:
            terminal.say_result(folder)


@app.command()
def densify(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A volume or a picture, of any format.")],
    annotation: Annotated[Path, typer.Argument(metavar="ANNOTATION", help="A label file of it in which a few planes are annotated.")],
    out: Annotated[Path, typer.Option(help="The label file to write, of the image's format; must be new.")],
    minutes: Minutes = None,
    not_annotated: Annotated[int | None, typer.Option(help="The value of voxels that nobody looked at; found out if not given.")] = None,
    planes: Annotated[
        str, typer.Option(help="Planes of a volume that are annotated in full, and nothing else is painted: z10,z20,y40.")
    ] = "",
    holdout: Annotated[
        str, typer.Option(help="none: all that is annotated trains; slices: a fifth of the planes is kept back and scored.")
    ] = "none",
    network: Network = None,
    recipe: Recipe = "default",
    run: Annotated[Path | None, typer.Option(help="Folder for model and report; beside --out, ending in .run, if not given.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Label a whole volume from a few annotated planes of it: train on these, predict the rest."""
    import time
    import warnings

    started = time.perf_counter()
    from microtome.densify import DensifyOptions, open_sketch
    from microtome.densify import densify as fill
    from microtome.errors import DataWarning
    from microtome.terminal import Terminal

    terminal = Terminal()
    check_names(network, recipe)
    slices = one_of("--holdout", holdout, ("none", "slices")) == "slices"
    if minutes is None:
        minutes = 10.0
        terminal.say("no --minutes given: training for 10 minutes")
    words: dict[str, Any] = {"network": network, "recipe": recipe, "run": run, "device": device, "seed": seed}
    options = DensifyOptions(minutes=minutes, not_annotated=not_annotated, planes=planes, holdout=slices, **words)
    # What the files leave open is among the findings.
    warnings.simplefilter("ignore", DataWarning)
    sketch = open_sketch(image, annotation, out, options)
    terminal.say_dataset(sketch.dataset)
    terminal.say(sketch.reason)
    chosen = sketch.plan(terminal.say)
    terminal.say_plan(chosen)
    with terminal.training(chosen) as on_event:
        fill(sketch, chosen, on_event=on_event, started=started)
    terminal.say_result(sketch.run)
    terminal.say(f"labels: {out}")


app.registered_commands += cli_predict.commands.registered_commands + cli_models.commands.registered_commands


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="A label file, or a folder of them.")],
    truth: Annotated[Path, typer.Argument(help="A label file, a folder of them, or a dataset.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Of the surface Dice (nsd), mm; by default each case's largest voxel side.")
    ] = None,
    instances: Annotated[bool, typer.Option("--instances", help="Values are numbers of objects: AP, PQ, SEG, Rand, VOI instead.")] = False,
) -> None:
    """Overlap and distance scores, by case and class, or of objects; the worst first."""
    from microtome.evaluation.evaluate import evaluate as score
    from microtome.evaluation.pages import write_scores
    from microtome.terminal import print_scores

    check_target(json_file, ".json")
    check_target(html, ".html", ".htm")
    result = score(predictions, truth, tolerance_mm=tolerance, instances=instances, pictures=html is not None)
    print_scores(result, write_scores(result, json_file, html))


@app.command()
def report(run: Run) -> None:
    """Write RUN/report.html anew: curves, worst cases, scores, plan with reasons, data findings."""
    from microtome.evaluation.report import build_report
    from microtome.terminal import Terminal

    Terminal().say(f"report: {build_report(run)}")


@app.command()
def compare(
    data: Data,
    networks: Annotated[str, typer.Option(help="Names of `microtome networks`, separated by commas.")],
    out: Annotated[Path, typer.Option(help="Folder for the runs, compare.json and compare.html; must be new or empty, unless --resume.")],
    minutes: Annotated[float | None, typer.Option(help="Wall time of each training.", min=0.1)] = None,
    steps: Annotated[int | None, typer.Option(help="Exactly so many steps each, instead of minutes.", min=1)] = None,
    fold: Annotated[str | None, typer.Option(help="K/N: part K of N validates (1/5 if not given).")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="The same again, or with more networks: skip what is finished.")] = False,
) -> None:
    """Train several networks on the same split for the same time, and show them side by side. Exit code 1 if one failed."""
    from microtome.compare import Request, parse_names
    from microtome.compare import compare as compare_networks
    from microtome.evaluation.comparison_page import table
    from microtome.terminal import Terminal, print_comparison

    if steps is not None:
        refuse_beside("--steps", {"--minutes": minutes})
    minutes = 10.0 if minutes is None and steps is None else minutes
    request = Request(networks=parse_names(networks), minutes=minutes, steps=steps, fold=fold, seed=seed, device=device)
    comparison = compare_networks(data, out, request, resume=resume, say=Terminal().say)
    print_comparison(table(comparison), out / "compare.html")
    if comparison.failed:
        raise typer.Exit(1)


app.registered_commands += cli_networks.commands.registered_commands
app.registered_commands += cli_explain.commands.registered_commands


def main() -> None:
    """Entry point: errors meant for people become one line and an exit code."""
    import warnings

    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    warnings.formatwarning = one_line
    try:
        with leaving():
            app()
    except BaseException as error:  # Ctrl-C and exits too; what means nothing to a person is raised again
        end = (
            None
            if debug and isinstance(error, Exception)
            else ending(error, next((word for word in sys.argv[1:] if not word.startswith("-")), ""))
        )
        if end is None:
            raise
        sys.stderr.write(f"microtome: {end.line}\n")
        sys.exit(end.exit_code)
