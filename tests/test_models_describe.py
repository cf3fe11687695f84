"""The table of layers: its rows and totals, and the words of `--input`."""

import pytest
import torch
from torch import Tensor, nn

from microtome.errors import ConfigError
from microtome.geometry import Sizes
from microtome.models.describe import default_input, layer_rows, layer_table, nearest_input, parse_input, short_number
from microtome.models.network import Network, NetworkSpec
from microtome.models.registry import build
from microtome.models.trace import trace
from tests.traced import FORMS, traced


class Tiny(Network):
    """A strided convolution with norm and activation, used twice in part, and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__(NetworkSpec(name="tiny", dims=2, in_channels=1, classes=3), Sizes((8, 8), (8, 8)))
        self.down = nn.Sequential(nn.Conv2d(1, 1000, 3, stride=2, padding=1), nn.BatchNorm2d(1000), nn.LeakyReLU(), nn.Dropout2d())
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.wide = nn.Conv2d(1000, 1000, 3, padding=2, dilation=2)
        self.head = nn.Conv2d(1000, 3, 1)
        self.spare = nn.Conv2d(1, 1, 1, bias=False)

    def forward(self, image_BCS: Tensor) -> Tensor:
        features_BCS = self.wide(self.wide(self.down(image_BCS)))
        logits_BKS: Tensor = self.head(self.up(features_BCS))
        return logits_BKS


def test_the_table_has_a_row_a_layer_with_its_norm_and_activation() -> None:
    table = layer_table(trace(Tiny(), (1, 8, 8)))
    assert table.titles == ("layer", "kind", "output", "parameters", "multiply-adds", "sees at most")
    assert table.rows == (
        ("image", "image", "1×8×8", "0", "0", "1×1"),
        ("down.0", "3×3 convolution, stride 2, batch norm, leaky ReLU, dropout", "1000×4×4", "12,000", "144,000", "3×3"),
        ("wide", "3×3 convolution, dilation 2", "1000×4×4", "9,001,000", "144,000,000", "11×11"),
        ("wide", "3×3 convolution, dilation 2", "1000×4×4", "0 (+ 9,001,000 shared)", "144,000,000", "19×19"),
        ("up", "bilinear up-sampling", "1000×8×8", "0", "0", "21×21"),
        ("head", "1×1 convolution", "3×8×8", "3,003", "192,000", "21×21"),
        ("spare.weight", "not used in this pass", "", "1", "0", ""),
    )
    assert table.totals == "total: 9,016,004 parameters, 288,336,000 multiply-adds (288.3 M), 1×8×8 -> 3×8×8"


def test_a_unet_of_572_pixels_has_23_convolutions_and_ends_at_388() -> None:
    rows = layer_rows(traced("unet", 2, "paper"))
    words = [row.kind.partition(",")[0] for row in rows if "convolution" in row.kind]
    assert len(words) == 23
    assert (words.count("3×3 convolution"), words.count("2×2 up-convolution"), words.count("1×1 convolution")) == (18, 4, 1)
    assert rows[0].shape == (1, 572, 572)
    assert rows[-1].shape == (2, 388, 388)
    assert sum(row.parameters for row in rows) == 31_030_658


def test_vnet_sees_in_its_table_what_its_paper_says() -> None:
    table = layer_table(traced("vnet", 3))
    sees = [row[5] for row in table.rows if row[1].startswith("sum")]
    assert sees == [f"{n}×{n}×{n}" for n in (5, 22, 72, 172, 372, 476, 528, 546, 551)]
    assert "65,175,314 parameters" in table.totals


@pytest.mark.parametrize(("name", "dims", "variant"), FORMS)
def test_the_rows_add_up_to_the_network(name: str, dims: int, variant: str) -> None:
    found = traced(name, dims, variant)
    rows = layer_rows(found)
    assert sum(row.parameters for row in rows) + sum(number for _, number in found.unused) == found.parameters
    assert sum(row.multiply_adds for row in rows) == found.multiply_adds > 0
    cells = layer_table(found).rows
    assert len(cells) == len(rows) + len(found.unused)
    assert all(len(row) == 6 and row[0] and row[1] for row in cells)


@pytest.mark.parametrize("text", ["1x64x128x128", "1X64X128X128", "1×64×128×128", " 1 x 64 x 128 x 128 ", "1*64*128*128"])
def test_an_input_is_read_as_people_write_it(text: str) -> None:
    assert parse_input(text) == (1, 64, 128, 128)


def test_an_input_of_three_numbers_is_a_picture() -> None:
    assert parse_input("3x160x192") == (3, 160, 192)


@pytest.mark.parametrize("text", ["", "572", "572x572", "1x2x3x4x5", "1x0x572", "1x-5x572", "1x5.5x572", "axbxc", "1x572x572x", "1x²x5"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"whole numbers above 0, got `.*`; write it as 1x572x572") as caught:
        parse_input(text)
    assert f"`{text}`" in str(caught.value)


@pytest.mark.parametrize(("name", "dims", "variant"), FORMS)
def test_every_network_has_a_size_that_it_is_shown_with(name: str, dims: int, variant: str) -> None:
    wanted = default_input(name, (dims,))
    shape = traced(name, dims, variant).operations[0].shape
    assert len(shape) == 1 + dims
    assert shape[0] == wanted[0]


def test_a_paper_that_draws_a_size_is_shown_with_it() -> None:
    assert default_input("unet", (2,)) == (1, 572, 572)
    assert default_input("unet3d", (3,)) == (3, 116, 132, 132)
    assert default_input("modern_unet", (2, 3)) == (1, 256, 256)
    assert default_input("modern_unet", (3,)) == (1, 64, 64, 64)


def test_the_nearest_size_fits_and_is_the_larger_of_two_as_near() -> None:
    with torch.device("meta"):
        network = build("unet", dims=2, in_channels=3, classes=2)
    assert nearest_input(network, (1, 256, 571)) == (3, 252, 572)
    assert nearest_input(network, (1, 10, 196)) == (3, 188, 204)


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0"), (999, "999"), (1000, "1.0 k"), (31_030_658, "31.0 M"), (150_428_424_448, "150.4 G"), (2 * 10**12, "2.0 T")],
)
def test_large_numbers_are_said_shortly(number: int, words: str) -> None:
    assert short_number(number) == words
