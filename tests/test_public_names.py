"""The public face: few names, sorted, each there when asked for and nothing heavy before that."""

import subprocess
import sys

import microtome


def test_public_names_are_few_and_sorted() -> None:
    assert microtome.__all__ == sorted(microtome.__all__)
    assert len(set(microtome.__all__)) == len(microtome.__all__)
    assert 1 <= len(microtome.__all__) <= 20


def test_each_public_name_is_there_and_documented() -> None:
    for name in microtome.__all__:
        value = getattr(microtome, name)
        assert value.__doc__, name


def test_names_outside_the_list_are_missing_as_python_says() -> None:
    assert not hasattr(microtome, "no_such_name")


def test_dir_shows_every_public_name() -> None:
    assert set(microtome.__all__) <= set(dir(microtome))


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, microtome; print(*sorted({'torch', 'numpy', 'scipy', 'pydantic', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_star_import_brings_exactly_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from microtome import *", names)
    assert set(names) - {"__builtins__"} == set(microtome.__all__)
