"""Pictures with their own aspect: packed rows are those of the stock forward pass over pictures of 3:1, 1:3 and 1:1 in
one batch, for every kind of model that can; the others refuse; the explanations have the grid of the picture.
"""
import warnings

import numpy as np
import pytest
import torch
from choosing import few
from families import PIXELS, encoder_of, exact_softmax, folder_of, gaps, make_exact
from moon2_lab.config import EncoderConfig
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Item
from moon2_lab.errors import DataError, UsageError
from moon2_lab.explain.content_focus import _subject_patches, focus_table
from moon2_lab.explain.expert_routing import token_routing
from moon2_lab.explain.explainer import Explainer
from moon2_lab.model.backbone_check import check_backbone
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.model.hf_backbone import pil_processor
from moon2_lab.reporting.heatmap_figures import pair_map_figure, pair_map_plot, static_png
from moon2_lab.reporting.routing_figures import expert_map_figure, routing_png
from moon2_lab.reporting.routing_maps import routing_maps, routing_payload
from moon2_lab.tiny_models import TINY_FAMILIES
from PIL import Image
from small import product

pytestmark = pytest.mark.usefixtures("own_cache")
NATIVE = tuple(name for name in TINY_FAMILIES if name.startswith(("qwen", "glm4v", "mistral3")))
FEW_NATIVE = few(NATIVE, "qwen3_vl", "glm4v", "mistral3")
EXACT = 1e-12


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


SHAPES = [(180, 60), (60, 180), (100, 100)]  # 3:1, 1:3, 1:1
REFS = [ImageRef.from_pil(noise(*size, seed)) for seed, size in enumerate(SHAPES)]
ITEMS = [
    Item("small red ball", REFS[0], "wide"), Item("large blue box no 7", REFS[1], "tall"),
    Item(None, REFS[2], "square"),
    Item("green ring", REFS[1], "two", "a nice new green ring", (REFS[0],)),
]


@pytest.mark.parametrize("name", FEW_NATIVE)
def test_step_0_equals_the_stock_forward(name):
    "float64, three shapes in one batch; positions in rows of a square grid are the control that fails."
    encoder = encoder_of(name, double=True, image_fit="native")
    dense = encoder_of(name, num_experts=0, experts="full", image_fit="native").backbone
    make_exact(dense.double())
    with exact_softmax():
        found = gaps(encoder, dense, ITEMS)
    assert len(found) == 3 + 3 + 2 + 3 and max(found.values()) < EXACT, found
    grids = [size.grid for size in encoder.backbone.picture_sizes(REFS)]
    assert grids[0][1] > grids[0][0] and grids[1] == grids[0][::-1] and grids[2][0] == grids[2][1]
    if encoder.backbone.placing.axes == 3:
        turned = encoder.backbone.picture_positions
        encoder.backbone.picture_positions = lambda size: turned(size._replace(grid=size.grid[::-1]))
        found = gaps(encoder, dense, ITEMS)
        assert found["wide", "i"] > 0.01 and found["square", "i"] < EXACT, found


@pytest.mark.parametrize("name", FEW_NATIVE)
def test_the_grid_is_that_of_the_own_processor(name):
    "Within the bounds, pixels are those that the processor makes of the picture itself; in a batch as alone."
    vision = encoder_of(name, num_experts=0, experts="full", image_fit="native").backbone.vision
    images = [noise(*size) for size in ((64, 96), (96, 64), (90, 70), (50, 50))]
    features, sizes = vision(images)
    alone = [vision([image])[0] for image in images]
    parts = features.split([size.tokens for size in sizes])
    for together, single in zip(parts, alone, strict=True):  # several threads may round another way
        torch.testing.assert_close(together, single, rtol=0, atol=1e-5)
    if "mistral3" not in name:  # there a side is rounded up, and bounded instead of the area
        own = pil_processor(folder_of(name))(images=images, return_tensors="pt")
        given = vision.inputs(images)
        assert torch.equal(own["image_grid_thw"], given["image_grid_thw"])
        assert torch.equal(own["pixel_values"], given["pixel_values"])


@pytest.mark.parametrize("name", FEW_NATIVE)
def test_no_picture_is_too_long_or_too_small(name):
    vision = encoder_of(name, num_experts=0, experts="full", image_fit="native").backbone.vision
    sizes = [vision([noise(*size)])[1][0] for size in ((4000, 1), (1, 4000), (1, 1), (3000, 2000), (400, 30))]
    assert all(1 < size.tokens <= vision.most_tokens == 16 for size in sizes)
    assert all(size.tokens == size.grid[0] * size.grid[1] for size in sizes)
    assert sizes[0].grid == sizes[1].grid[::-1] and sizes[0].grid[0] == 1


@pytest.mark.parametrize("name", sorted(set(TINY_FAMILIES) - set(NATIVE)))
def test_kinds_that_are_given_squares_refuse(name):
    with pytest.raises(UsageError, match="image_fit=native: .* squares") as refused:
        encoder_of(name, image_fit="native")
    assert "image_fit=square" in refused.value.advice


def test_vectors_alone_in_a_batch_and_from_the_cache(tmp_path):
    "Features of squares are not read for pictures of their own aspect; saved and loaded it stays as it is."
    fields = {"image_size": PIXELS["qwen3_vl"], "num_experts": 0}
    source = str(folder_of("qwen3_vl"))
    square = Moon2Encoder.from_backbone(source, **fields).eval()
    native = Moon2Encoder.from_backbone(source, image_fit="native", **fields).eval()
    before = square.encode(ITEMS)
    together = native.encode(ITEMS)
    alone = np.concatenate([native.encode([item]) for item in ITEMS])
    assert np.abs(together - alone).max() < 1e-5 and np.abs(together - before).max() > 1e-3
    assert square.backbone.features.folder != native.backbone.features.folder
    assert np.array_equal(square.encode(ITEMS), before) and square.fingerprint != native.fingerprint
    native.save_pretrained(tmp_path)
    again = Moon2Encoder.from_pretrained(tmp_path)
    assert again.config.image_fit == "native" and np.abs(again.encode(ITEMS) - together).max() < 1e-5
    assert again.fingerprint == native.fingerprint


def test_a_config_of_before_means_squares():
    fields = EncoderConfig().identity()
    assert "image_fit" not in fields and EncoderConfig.of_saved(fields).image_fit == "square"
    assert EncoderConfig(backbone="somewhere", image_fit="native").identity()["image_fit"] == "native"
    with pytest.raises(UsageError, match="one of square, native"):
        EncoderConfig(image_fit="stretched")


def test_the_check_tries_pictures_that_are_not_square():
    checked = check_backbone(str(folder_of("qwen2_5_vl")), image_size=112, image_fit="native")
    assert checked.certificate.holds and checked.certificate.grid == (2, 6)
    assert (checked.facts["image_fit"], checked.facts["most_tokens"]) == ("native", 16)
    assert "at most 16 tokens; tried: 12 on a grid of 2 x 6" in "\n".join(checked.lines())
    with pytest.raises(DataError, match="less than one patch"):
        check_backbone(str(folder_of("qwen2_5_vl")), image_size=20, image_fit="native")


def test_explanations_lie_on_the_grid_of_the_picture():
    "Maps, routing and focus of a wide picture: 2 rows of 6 patches over a picture of 3 to 1."
    encoder = encoder_of("qwen3_vl", perturbed=True, image_fit="native")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = Explainer(encoder, ITEMS[1], ITEMS[0], trials=20).maps(["occlusion", "gradient"])
    assert (maps.item.grid, maps.query.grid) == ((2, 6), (6, 2))
    assert maps.item.maps["occlusion"].patches.shape == (2, 6) and maps.item.image.size == (320, 107)
    assert maps.item.patch_shape == pytest.approx(1, abs=0.01)
    figure = pair_map_figure(maps, "occlusion")
    assert np.shape(figure.data[-2].z) == (2, 6) and pair_map_plot(maps, "gradient") is not None and static_png(maps)
    routing = routing_maps(token_routing(encoder, ITEMS[0]))
    side = routing_payload(routing)[0]["side"]
    assert (side["grid"], side["image"]["aspect"]) == ([2, 6], pytest.approx(3, abs=0.02)) and routing_png(routing)
    assert np.shape(expert_map_figure(routing).data[0].z) == (2, 6)
    drawn = Image.new("RGB", (180, 60), "white")
    drawn.paste("red", (60, 0, 120, 60))
    table = focus_table(encoder, Catalog.from_products([product(1, refs=(ImageRef.from_pil(drawn),))]), split="all")
    cells = table[(table.part == "cells") & (table.layer == "mean")]
    assert cells.left_out.tolist() == [""]
    subject = _subject_patches(drawn, (2, 6), encoder.backbone.vision.fit)
    assert subject.tolist() == 2 * [False, False, True, True, False, False]
