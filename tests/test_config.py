import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from microtome.config import (
    AugmentConfig,
    Config,
    LossConfig,
    NetworkConfig,
    NormalisationConfig,
    OptimiserConfig,
    Plan,
    dump_yaml,
    parse_config,
)
from microtome.errors import ConfigError
from microtome.yaml_files import load_yaml

SMALL: dict[str, Any] = {
    "dims": 2,
    "channels": 1,
    "classes": ["nothing", "cell"],
    "spacing_mm": [0.5, 0.5],
    "patch_vox": [64, 64],
    "batch": 2,
    "steps": 100,
}


def refusal(values: object, kind: type[Config] = Plan) -> str:
    """The line that refuses these values."""
    with pytest.raises(ConfigError) as caught:
        parse_config(kind, values, "plan.yaml")
    line = str(caught.value)
    assert line.startswith("plan.yaml: expected ")
    assert "\n" not in line
    assert len(line) < 500
    assert caught.value.exit_code == 2
    return line


def yaml_refusal(path: Path, content: str | bytes) -> str:
    """The line that refuses a file of this content; must come within seconds."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    began = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        parse_config(Plan, load_yaml(path), path)
    assert time.perf_counter() - began < 5
    line = str(caught.value)
    assert line.startswith(f"{path}: expected ")
    assert "\n" not in line
    assert len(line) < 500 + len(str(path))
    return line


# reading


def test_a_small_plan_takes_the_defaults_for_the_rest() -> None:
    plan = parse_config(Plan, SMALL, "plan.yaml")
    assert plan.classes == ("nothing", "cell")
    assert plan.network == NetworkConfig()
    assert plan.precision == "fp32"
    assert plan.minutes is None


@pytest.mark.parametrize(
    ("values", "unknown", "near"),
    [
        ({**SMALL, "stpes": 5}, "stpes", "steps"),
        ({**SMALL, "netwrok": {}}, "netwrok", "network"),
        ({**SMALL, "network": {"width": [4]}}, "network.width", "widths"),
        ({**SMALL, "augment": {"flip_axis": [0]}}, "augment.flip_axis", "flip_axes"),
        ({**SMALL, "optimiser": {"learning-rate": 1}}, "optimiser.learning-rate", "learning_rate"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(values: object, unknown: str, near: str) -> None:
    assert f"got the unknown name `{unknown}`; did you mean `{near}`?" in refusal(values)


def test_a_name_like_no_other_is_to_be_removed() -> None:
    assert refusal({**SMALL, "xyzzy": 1}).endswith("got the unknown name `xyzzy`; remove it")


@pytest.mark.parametrize("missing", sorted(SMALL))
def test_a_missing_value_is_named_alone(missing: str) -> None:
    line = refusal({name: value for name, value in SMALL.items() if name != missing})
    assert line == f"plan.yaml: expected a value for `{missing}`, got none; add `{missing}`"


@pytest.mark.parametrize(
    ("change", "field", "shown"),
    [
        ({"steps": "many"}, "steps", "'many'"),
        ({"steps": 0}, "steps", "0"),
        ({"steps": 1.5}, "steps", "1.5"),
        ({"dims": 4}, "dims", "4"),
        ({"batch": -1}, "batch", "-1"),
        ({"overlap": 1}, "overlap", "1"),
        ({"overlap": math.nan}, "overlap", "nan"),
        ({"precision": "fp16"}, "precision", "'fp16'"),
        ({"classes": ["one"]}, "classes", "['one']"),
        ({"classes": "nothing"}, "classes", "'nothing'"),
        ({"minutes": 0}, "minutes", "0"),
        ({"network": 5}, "network", "5"),
        ({"network": {"convolutions": 33}}, "network.convolutions", "33"),
        ({"network": {"convolutions": "x"}}, "network.convolutions", "'x'"),
        ({"network": {"strides": [[1, "x"]]}}, "network.strides.0.1", "'x'"),
        ({"augment": {"scale": [1]}}, "augment.scale.1", "[1]"),
        ({"seed": None}, "seed", "None"),
        ({"spacing_mm": [math.inf, 1]}, "spacing_mm.0", "inf"),
        ({"optimiser": {"weight_decay": math.nan}}, "optimiser.weight_decay", "nan"),
        ({1: 2}, "1", "1"),
    ],
)
def test_a_wrong_value_is_shown_with_its_field(change: dict[Any, Any], field: str, shown: str) -> None:
    line = refusal({**SMALL, **change})
    if field == "augment.scale.1":
        assert line == "plan.yaml: expected a value for `augment.scale.1`, got none; add `augment.scale.1`"
    else:
        assert f"expected {field}: " in line
        assert line.endswith(f", got {shown}; change `{field}`")
        assert "should" not in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": "many"}, "steps: a whole number, got"),
        ({"steps": 0}, "steps: greater than 0, got"),
        ({"overlap": "x"}, "overlap: a number, got"),
        ({"precision": "fp16"}, "precision: 'fp32' or 'bf16', got"),
        ({"classes": ["one"]}, "classes: at least 2 items"),
        ({"checkpointing": "perhaps"}, "checkpointing: true or false, got"),
    ],
)
def test_what_a_value_should_be_is_said_in_a_few_words(change: dict[Any, Any], words: str) -> None:
    assert f"plan.yaml: expected {words}" in refusal({**SMALL, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_vox": [8, 8, 8]}, "patch_vox (8, 8, 8) must have 2 sizes"),
        ({"dims": 3, "patch_vox": [8, 8, 8]}, "must have at least 3 values"),
        ({"patch_vox": [0, 8]}, "patch_vox (0, 8)"),
        ({"spacing_mm": [0, 1]}, "spacing_mm (0.0, 1.0)"),
        ({"spacing_mm": [1, -1]}, "spacing_mm (1.0, -1.0)"),
        ({"assumed_spacing_mm": [1, 0]}, "assumed_spacing_mm (1.0, 0.0)"),
        ({"normalisation": {"kind": "dataset"}}, "low, high, mean and sd of 1 values"),
        ({"normalisation": {"kind": "dataset", "low": [0], "high": [1, 2], "mean": [0], "sd": [1]}}, "of 1 values"),
    ],
)
def test_values_that_do_not_fit_together_are_refused_with_the_reason(change: dict[str, Any], words: str) -> None:
    line = refusal({**SMALL, **change})
    assert line.startswith("plan.yaml: expected settings that fit together, got ")
    assert words in line


@pytest.mark.parametrize("values", [None, [], "steps: 5", 5, [SMALL]])
def test_what_is_no_mapping_is_refused(values: object) -> None:
    assert f"got {type(values).__name__}" in refusal(values)


def test_a_huge_value_is_cut_short_in_the_line() -> None:
    huge: Any = ["x" * 10_000] * 10_000
    for _ in range(3):
        huge = [huge] * 100
    assert "got [[[" in refusal({**SMALL, "steps": huge})


# files


@pytest.mark.parametrize(
    "content",
    [
        "steps: [1",
        "steps: 2024-99-99",
        "steps: !!float many",
        "steps: !!timestamp many",
        "steps: 1" + "0" * 5000,
        "? [a]\n: b",
        "a: \x00",
        b"\xff\xfe\x00\x01",
        "a: !!python/object/apply:os.system ['exit 1']",
        "a: b\n---\nc: d",
        "[" * 3000,
    ],
    ids=range(11),
)
def test_what_is_not_plain_yaml_is_refused_in_one_line(tmp_path: Path, content: str | bytes) -> None:
    assert "expected valid YAML, got " in yaml_refusal(tmp_path / "plan.yaml", content)


def test_the_place_of_a_fault_in_yaml_is_told_without_the_librarys_name_for_the_file(tmp_path: Path) -> None:
    line = yaml_refusal(tmp_path / "plan.yaml", "steps: [1, 2\nbatch: 3\n")
    assert "unicode string" not in line
    assert "at line 2, column 6" in line


@pytest.mark.parametrize("empty", ["", "# only a comment\n"])
def test_an_empty_file_is_refused(tmp_path: Path, empty: str) -> None:
    assert "got NoneType" in yaml_refusal(tmp_path / "plan.yaml", empty)


@pytest.mark.parametrize("level", ["[" + ",".join(["*{}"] * 9) + "]", "{{<<: [" + ",".join(["*{}"] * 9) + "]}}"], ids=["lists", "merges"])
def test_a_yaml_bomb_is_refused_before_it_grows(tmp_path: Path, level: str) -> None:
    lines = ["a: &a {k: 1}"]
    lines += [
        f"{name}: &{name} {level.replace('{{', '{').replace('}}', '}').replace('*{}', '*' + before)}"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    assert "alias" in yaml_refusal(tmp_path / "plan.yaml", "\n".join([*lines, "steps: *i"]))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("- a\n" * 125)
    with pytest.raises(ConfigError, match="expected at most 499 bytes, got 500"):
        load_yaml(path, limit_bytes=499)
    assert load_yaml(path, limit_bytes=500) == ["a"] * 125


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: expected a readable file, got No such file"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="expected a readable file, got Is a directory"):
        load_yaml(tmp_path)


# frozen, and there and back


def test_a_config_is_frozen() -> None:
    plan = parse_config(Plan, SMALL, "plan.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        plan.steps = 5  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        plan.network.name = "unet"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({"cross_entropy": 0, "dice": 0}, "one of cross_entropy, dice, focal and tversky must be above 0"),
        ({"cross_entropy": 0, "class_weights": (1.0, 2.0)}, "weigh the cross-entropy, and cross_entropy is 0"),
        ({"cross_entropy": 0, "border_weight": 10}, "weighs cross-entropy and focal loss, and both are 0"),
        ({"balance_classes": True}, "is a part of the border map, and border_weight is 0"),
        ({"class_weights": (1.0, -2.0)}, "class_weights and level_weights must be 0 or more"),
        ({"level_weights": (0.0, 0.0)}, "one of level_weights must be above 0"),
    ],
)
def test_a_loss_that_would_do_something_else_than_it_says_is_refused(loss: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LossConfig(**loss)


def test_every_field_of_the_plan_that_is_not_plain_says_what_it_is() -> None:
    groups = {"normalisation", "network", "loss", "augment", "optimiser", "seed"}
    assert {name for name, field in Plan.model_fields.items() if not field.description} == groups


lengths = st.floats(1e-9, 1e9)
shares = st.floats(0, 1)
# PyYAML writes some control characters and line separators (U+0085) in a way that it does not read back.
words = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=12)
networks = st.builds(
    NetworkConfig,
    name=words,
    widths=st.lists(st.integers(1, 999), max_size=4).map(tuple),
    strides=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2)), max_size=3).map(tuple),
    residual=st.booleans(),
    norm=st.sampled_from(["batch", "instance", "none"]),
)
augments = st.builds(AugmentConfig, rotation_p=shares, scale=st.tuples(lengths, lengths).map(sorted).map(tuple), gamma=st.just((0.5, 2.0)))
normalisations = st.builds(
    lambda values: NormalisationConfig(kind="dataset", low=values, high=values, mean=values, sd=values),
    st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=2).map(tuple),
)
plans = st.builds(
    Plan,
    dims=st.just(2),
    channels=st.just(2),
    classes=st.lists(words, min_size=2, max_size=4).map(tuple),
    spacing_mm=st.lists(lengths, min_size=2, max_size=3).map(tuple),
    normalisation=st.just(NormalisationConfig()) | normalisations,
    network=networks,
    patch_vox=st.tuples(st.integers(1, 2048), st.integers(1, 2048)),
    batch=st.integers(1, 99),
    augment=augments,
    optimiser=st.builds(OptimiserConfig, learning_rate=lengths, weight_decay=lengths),
    steps=st.integers(1, 10**12),
    minutes=st.none() | lengths,
    fold=words,
    reasons=st.dictionaries(words, words, max_size=3),
)


@given(plans)
@settings(max_examples=60, deadline=None)
def test_a_plan_comes_back_from_its_yaml_as_it_was(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> None:
    path = tmp_path_factory.getbasetemp() / "plan.yaml"
    path.write_bytes(dump_yaml(plan).encode())
    assert parse_config(Plan, load_yaml(path), path) == plan


def test_yaml_keeps_the_order_of_the_fields() -> None:
    plan = parse_config(Plan, SMALL, "plan.yaml")
    names = [line.partition(":")[0] for line in dump_yaml(plan).splitlines() if not line.startswith((" ", "-"))]
    assert names == list(Plan.model_fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rotation_deg": (20.0,) * 3}, "must have 1 angles"),
        ({"flip_axes": (5,)}, "must be among (0, 1)"),
        ({"elastic_spacing": (8.0,)}, "must have 2 values each"),
        ({"scale": (0.0, 1.0)}, "two numbers above 0"),
        ({"gamma": (2.0, 1.0)}, "the smaller first"),
    ],
)
def test_an_augmentation_that_does_not_fit_the_dimensions_is_refused_when_it_is_read(change: dict[str, Any], words: str) -> None:
    values = {"dims": 2, "channels": 1, "classes": ["a", "b"], "spacing_mm": [1, 1], "patch_vox": [8, 8], "batch": 1, "steps": 1}
    with pytest.raises(ConfigError) as caught:
        parse_config(Plan, {**values, "augment": change}, "plan.yaml")
    assert words in str(caught.value)
    assert str(caught.value).startswith("plan.yaml")
