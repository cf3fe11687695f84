"""Words are checked like code: what the documents say of files, commands, settings and names is what there is."""

import re
import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import typer
from PIL import Image as Picture

import microtome
from microtome.models.registry import NETWORKS
from tools import docs
from tools.gallery import network_pages
from tools.layers import LAYERS, REPOSITORY

README = REPOSITORY / "README.md"
DOCUMENTS = [README, REPOSITORY / "SECURITY.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def fenced(language: str, text: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def commands() -> dict[str, Any]:
    """Every command of the command line by its name."""
    from microtome.cli import app

    group: Any = typer.main.get_command(app)
    return dict(group.commands)


@pytest.mark.parametrize("path", ["README.md", "docs/cli.md", "docs/settings.md"])
def test_generated_part_is_current(path: str) -> None:
    text = docs.pages()[REPOSITORY / path]
    assert (REPOSITORY / path).read_text(encoding="utf-8") == text, "run `make docs`"


def test_page_and_drawings_of_the_networks_are_current() -> None:
    made = network_pages()
    assert len(made) == len(NETWORKS) + 1
    assert [path.name for path, text in made.items() if path.read_text(encoding="utf-8") != text] == [], "run `make docs`"


def test_map_shows_every_module_once_in_the_order_of_imports() -> None:
    lines = docs.map_of_files().splitlines()
    names = [match[1] for line in lines if (match := re.match(r"\s+(\w+)\.pyi?\s+\S", line))]
    assert names == [module.rpartition(".")[2] for module in LAYERS]


def test_every_command_has_its_chapter() -> None:
    chapters = re.findall(r"^## `microtome (\w+)", (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert chapters == [name for name, command in commands().items() if not command.hidden]
    assert len(chapters) >= 5


def test_every_public_name_is_in_the_readme() -> None:
    readme = README.read_text(encoding="utf-8")
    assert [name for name in microtome.__all__ if not re.search(rf"\b{name}\b", readme)] == []


def test_every_field_of_microtome_yaml_is_in_the_readme() -> None:
    from microtome.data.description import DatasetConfig

    example = "\n".join(fenced("yaml", README.read_text(encoding="utf-8")))
    assert [name for name in DatasetConfig.model_fields if not re.search(rf"^(# )?{name}:", example, flags=re.MULTILINE)] == []


def test_yaml_of_the_readme_is_accepted(tmp_path: Path) -> None:
    from microtome.data.description import load_description

    blocks = fenced("yaml", README.read_text(encoding="utf-8"))
    assert blocks
    for block in blocks:
        (tmp_path / "microtome.yaml").write_text(block, encoding="utf-8")
        load_description(tmp_path)


def shown_commands() -> list[str]:
    """Every `microtome ...` line of every document's shell blocks."""
    blocks = [block for document in DOCUMENTS for block in fenced("sh", document.read_text(encoding="utf-8"))]
    return [line for block in blocks for line in block.splitlines() if line.startswith("microtome ")]


@pytest.mark.parametrize("line", shown_commands())
def test_shown_command_exists_with_its_options(line: str) -> None:
    verb, *words = shlex.split(line, comments=True)[1:]
    known = {option for param in commands()[verb].params for option in (*param.opts, *param.secondary_opts)} | {"--help"}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_inside_the_repository_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", target)]
    assert [target for target in targets if target and not (document.parent / target).exists()] == []


def write_cells(folder: Path) -> None:
    """Six pictures of bright discs on noise, and their masks."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :96]
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(6):
        centres = rng.uniform(10, 86, size=(5, 2))
        mask = np.any([(y - cy) ** 2 + (x - cx) ** 2 < 64 for cy, cx in centres], axis=0)
        Picture.fromarray((60 + 100 * mask + rng.normal(0, 10, mask.shape)).astype(np.uint8)).save(folder / "images" / f"{number}.png")
        Picture.fromarray(np.where(mask, np.uint8(255), np.uint8(0))).save(folder / "masks" / f"{number}.png")


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cells(tmp_path / "cells")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(fenced("python", README.read_text(encoding="utf-8")))
    # Seconds do for seeing that every line runs.
    quick = code.replace("minutes=10", "minutes=0.1")
    assert quick != code
    exec(compile(quick, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "runs" / "cells" / "metrics.json").exists()


# From here on: the generator, on a command line whose page is known.


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


def example_app() -> typer.Typer:
    app = typer.Typer(help="Cut things.", add_completion=False)

    @app.command()
    def cut(
        data: Annotated[Path, typer.Argument(help="what to cut")],
        more: Annotated[list[Path] | None, typer.Argument(help="and these")] = None,
        minutes: Annotated[float | None, typer.Option("--minutes", "-m", help="at most this long | or less")] = None,
        device: Annotated[Literal["cpu", "cuda"], typer.Option(help="where")] = "cpu",
        colour: Annotated[Colour, typer.Option(help="of the cut")] = Colour.RED,
        deep: Annotated[bool, typer.Option("--deep/--flat", help="how")] = False,
        steps: Annotated[int, typer.Option(metavar="N", help="so many")] = 3,
    ) -> None:
        """Cut once.

        Then look.
        """

    @app.command(hidden=True)
    def secret() -> None:
        """Not shown."""

    @app.command()
    def sew() -> None:
        """Sew."""

    return app


def test_page_of_the_command_line_shows_words_defaults_and_meanings() -> None:
    page = docs.cli_page(example_app())
    assert page.splitlines()[2] == "# The command line"
    assert "## `microtome cut DATA [MORE...] [OPTIONS]`\n\nCut once.\n\nThen look.\n" in page
    assert "| `DATA` | must be given | what to cut |\n| `[MORE...]` |  | and these |" in page
    assert "| `--minutes, -m NUMBER` |  | at most this long \\| or less |" in page
    assert "| `--device cpu\\|cuda` | `cpu` | where |" in page
    assert "| `--colour red\\|blue` | `red` | of the cut |" in page
    assert "| `--deep / --flat` | off | how |" in page
    assert "| `--steps N` | `3` | so many |" in page
    assert page.endswith("## `microtome sew`\n\nSew.\n")
    assert "secret" not in page


def test_map_is_put_between_its_marks_and_nowhere_else() -> None:
    readme = f"before\n{docs.MAP_START}what was true once\n{docs.MAP_END}after\n"
    new = docs.with_map(readme)
    assert new.startswith(f"before\n{docs.MAP_START}```text\n")
    assert new.endswith(f"```\n{docs.MAP_END}after\n")
    assert "what was true once" not in new
    assert docs.with_map(new) == new


def test_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="map of files"):
        docs.with_map("no marks\n")


def test_page_of_settings_shows_every_field_of_every_config() -> None:
    from microtome import config
    from microtome.data import description

    page = docs.settings_page(config, description)
    for kind in (config.Plan, config.AugmentConfig, description.DatasetConfig):
        chapter = page.partition(f"## {kind.__name__}\n")[2].partition("\n## ")[0]
        assert re.findall(r"^\| `(\w+)` \|", chapter, flags=re.MULTILINE) == list(kind.model_fields)
    assert "| `steps` | `int` | must be given | optimiser steps" in page
    assert "| `augment` | `AugmentConfig` | see AugmentConfig |" in page
