"""Writes requirements.lock from the environment: what pyproject.toml asks for and what that needs, pinned.

`make lock` runs it after `pip install --upgrade ...` in `.venv`. torch is left out: the Makefile installs it
first and alone, so that the builds for other machines (CUDA, CPU) are chosen by pip's index and by nothing here.
"""

import re
import tomllib
from importlib.metadata import distribution, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.layers import REPOSITORY

HEADER = """\
# Made by `make lock` (tools/lock.py): every package of `make`'s .venv except torch, which the Makefile installs by itself.
# importlib_resources is for Python 3.11 only and harmless on 3.12.
"""


def needed(roots: list[str]) -> set[str]:
    """The canonical names of what the requirements lead to, without torch and what its CUDA builds bring."""
    found: set[str] = set()
    todo = [Requirement(text) for text in roots]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = name + (f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else "")
        if key not in found and not name.startswith(("nvidia", "cuda", "triton")):
            found.add(key)
            todo += _needs(requirement)
    return {key.partition("[")[0] for key in found} - {"torch"}


def _needs(requirement: Requirement) -> list[Requirement]:
    """What one requirement needs on this interpreter, with the extras that it asks for."""
    wants = [Requirement(text) for text in distribution(requirement.name).requires or ()]
    extras = ("", *requirement.extras)
    return [want for want in wants if want.marker is None or any(want.marker.evaluate({"extra": extra}) for extra in extras)]


def main() -> None:
    """Write requirements.lock."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    roots = project["project"]["dependencies"] + project["dependency-groups"]["dev"] + project["build-system"]["requires"]
    pins = [f"{distribution(name).name}=={re.sub(r'[+].*', '', version(name))}\n" for name in sorted(needed(roots))]
    (REPOSITORY / "requirements.lock").write_text(HEADER + "".join(pins), encoding="utf-8")
    print(f"requirements.lock: {len(pins)} packages")


if __name__ == "__main__":
    main()
