"""Drawings of networks: XML that parses, words that can be read, and the graph that the paper has."""

from collections import Counter
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree

import pytest

from microtome.models.drawing import draw
from microtome.models.figure import MOST_BARS, Bar, columns, figure
from microtome.models.layout import WIDTH, lay_out, size_words
from tests.traced import FORMS, traced

SVG = "{http://www.w3.org/2000/svg}"
every = pytest.mark.parametrize(("name", "dims", "variant"), FORMS)


def texts(svg: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(f"{SVG}text"))


def links(name: str, dims: int, variant: str = "") -> Counter[str]:
    return Counter(link.kind for bar in figure(traced(name, dims, variant)) for link in bar.links)


def levels(bars: tuple[Bar, ...]) -> dict[object, set[str]]:
    found: dict[object, set[str]] = {}
    for bar in bars:
        found.setdefault(bar.level, set()).add(size_words(bar))
    return found


@every
def test_a_drawing_is_xml_that_names_every_level(name: str, dims: int, variant: str) -> None:
    found = traced(name, dims, variant)
    words = {text.text for text in texts(draw(found))}
    for sizes in levels(figure(found)).values():
        assert sizes & words, sizes
    assert name + (f" ({variant})" if variant else "") in words
    assert any(f"{found.parameters:,} parameters" in (word or "") for word in words)


@every
def test_words_can_be_read_and_cover_nothing(name: str, dims: int, variant: str) -> None:
    bars = figure(traced(name, dims, variant))
    layout = lay_out(bars)
    assert all(float(text.get("font-size", "0")) >= 11 for text in texts(draw(traced(name, dims, variant))))
    channels = Counter(str(bar.shape[0]) for bar in bars if bar.kind not in ("gate", "pool"))
    assert channels <= Counter(label.text for label in layout.labels)
    boxes = [label.box for label in layout.labels]
    assert not [pair for pair in combinations(boxes, 2) if pair[0].covers(pair[1])]
    assert not [box for box in boxes for bar in layout.boxes.values() if box.covers(bar)]
    assert all(box.x >= 0 and box.right <= WIDTH for box in [*boxes, *layout.boxes.values()])


@every
def test_bars_are_few_stand_apart_and_links_run_forward(name: str, dims: int, variant: str) -> None:
    bars = figure(traced(name, dims, variant))
    assert 2 < len(bars) <= MOST_BARS
    layout, column = lay_out(bars), columns(bars)
    assert not [pair for pair in combinations(layout.boxes.values(), 2) if pair[0].covers(pair[1])]
    places = {bar.place for bar in bars}
    for bar in bars:
        assert all(link.source in places and column[link.source] <= column[bar.place] for link in bar.links)
        assert bool(bar.links) == (bar.kind != "image")
    assert sum(bar.head for bar in bars) >= 1


def test_the_unet_has_its_four_levels_of_arrows() -> None:
    assert links("unet", 2, "paper") == {"conv": 19, "down": 4, "up": 4, "skip": 4}
    concats = [bar for bar in figure(traced("unet", 2, "paper")) if bar.kind == "concat"]
    assert [bar.segments for bar in concats] == [((n, "up"), (n, "skip")) for n in (512, 256, 128, 64)]


def test_the_unets_rows_are_the_sizes_of_its_figure() -> None:
    words = {text.text for text in texts(draw(traced("unet", 2, "paper")))}
    assert {"572×572", "284×284", "140×140", "68×68", "32×32", "388×388", "crop and concatenate", "2×2 max-pooling"} <= words


def test_vnet_adds_at_each_of_its_nine_stages() -> None:
    bars = figure(traced("vnet", 3))
    assert sum(bar.plus for bar in bars) == 9
    assert links("vnet", 3)["residual"] == 9


def test_attention_gates_are_symbols_with_a_skip_and_a_signal() -> None:
    gates = [bar for bar in figure(traced("attention_unet", 3)) if bar.kind == "gate"]
    assert [Counter(link.kind for link in gate.links) for gate in gates] == [{"skip": 1, "gate": 1}] * 3


def test_unetpp_takes_every_map_of_its_level() -> None:
    """X(i, j) takes j maps of level i: 10 nodes with 20 skips, and one up-sampled map each."""
    assert links("unetpp", 2)["skip"] + links("unetpp", 2)["join"] == 20
    assert links("unetpp", 2)["up"] == 10


def test_a_hundred_layers_are_folded_into_their_blocks() -> None:
    boxes = [bar for bar in figure(traced("dense_unet", 2)) if bar.kind == "box"]
    assert [bar.words[0] for bar in boxes] == [f"{n} × (3×3)" for n in (5, 5, 7, 10, 12, 15, 12, 10, 7, 5, 4)]
    assert all(bar.words[1] == "16 maps each" for bar in boxes[1:])


def test_a_w_goes_down_and_up_twice() -> None:
    depths = [bar.depth for bar in figure(traced("laddernet", 2))]
    turns = [b for a, b, c in zip(depths, depths[1:], depths[2:], strict=False) if (b - a) * (c - b) < 0]
    assert turns == [16, 1, 16]


def test_a_name_with_marks_of_xml_stays_a_name() -> None:
    svg = draw(replace(traced("unet_same", 2), network='<b>&"net'))
    assert '<b>&"net' in {text.text for text in texts(svg)}
