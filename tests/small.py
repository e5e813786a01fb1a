"A small shop, small encoders and a small training run, for the tests that need a model."
import dataclasses
import os

import pytest
from moon2_lab.config import TrainConfig
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Product
from moon2_lab.data.queries import Lexicon
from moon2_lab.data.triplets import build_triplets
from moon2_lab.errors import LabError
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts
from PIL import Image, ImageDraw

USERS_CACHE = os.environ.get("MOON2_CACHE")  # before a test file takes a cache of its own
COLOURS, SHAPES, SIZES = (
    ("red", "green", "blue", "black", "orange", "purple"), ("box", "ball", "bar", "ring"), ("small", "large"),
)
TINY = {
    "num_layers": 2, "image_size": 32, "visual_tokens": 4, "num_experts": 4, "top_k": 2, "moe_layers": "all",
    "router_std": 0.02, "attention": "causal", "max_text_tokens": 64,
}
TRAIN = {
    "max_steps": 6, "per_device_train_batch_size": 8, "query_variants": 2, "negatives_per_query": 1,
    "learning_rate": 1e-3, "seed": 0, "num_threads": 1, "device": "cpu",
}


def picture(number):
    "A drawing; no two numbers give the same one."
    colour, shape, size = look(number)
    image = Image.new("RGB", (48, 48), "white")
    draw, edge = ImageDraw.Draw(image), 15 if size == "small" else 6
    box = (edge, edge, 47 - edge, 47 - edge)
    if shape == "ring":
        draw.ellipse(box, outline=colour, width=5)
    else:
        (draw.ellipse if shape == "ball" else draw.rectangle)(
            box if shape != "bar" else (edge, 20, 47 - edge, 28), fill=colour
        )
    draw.point((number % 48, number // 48), fill="grey")
    return ImageRef.from_pil(image)


def look(number):
    "(colour, shape, size)."
    return COLOURS[number % 6], SHAPES[number // 6 % 4], SIZES[number // 24 % 2]


def product(number, **changes):
    "Product `number`, complete unless `changes` take something away."
    colour, shape, size = look(number)
    words = ("plain", "a nice", "finest quality", "new")[number % 4]
    whole = Product(
        f"p{number:03}", f"{words} {size} {colour} {shape} no {number}", category_l1="shapes", category_l2=shape,
        attributes={"colour": colour, "size": size}, refs=(picture(number),), split="train" if number % 5 else "valid",
    )
    return dataclasses.replace(whole, **changes)


def shop(count=60, mixed=False):
    "A catalogue of `count` products; mixed: some lack the title, some the picture."
    lacking = {3: {"title": None}, 4: {"refs": ()}}
    return Catalog.from_products(
        [product(number, **(lacking.get(number % 6, {}) if mixed else {})) for number in range(count)]
    )


def augmented_shop(count=60):
    "Three of four products of the train split have an enriched title and one or two expanded pictures."
    def added(number):
        split = product(number).split
        return (
            {
                "enriched_title": f"a shape of many words no {number}",
                "expanded": tuple(picture(200 + number + 60 * k) for k in range(1 + number % 2)),
            }
            if split == "train" and number % 4
            else {}
        )

    return Catalog.from_products([product(number, **added(number)) for number in range(count)])


def some_triplets(catalog, count=6, negatives=2, first=0):
    "`count` triplets from different places of the list."
    triplets = build_triplets(catalog, Lexicon(catalog), variants=2, negatives_per_query=negatives)
    return [triplets[(11 * first + 17 * place) % len(triplets)] for place in range(count)]


def tiny(perturbed=False, double=False, **fields):
    "A tiny encoder; perturbed: experts, routers and W* pushed apart by noise of 0.02."
    encoder = Moon2Encoder.from_backbone("tiny", **(TINY | fields))
    encoder = perturb_experts(encoder, 0.02, seed=1) if perturbed else encoder
    return encoder.double() if double else encoder


def settings(**changes):
    "The config of a small run; every field that matters is given, so that settings.ini may change."
    return TrainConfig(backbone="tiny", **(TINY | TRAIN | changes))


def pretrained(patch, **fields):
    "A mini encoder from the assets in the user's cache; skips the test when they cannot be had."
    patch.delenv("MOON2_CACHE", raising=False) if USERS_CACHE is None else patch.setenv("MOON2_CACHE", USERS_CACHE)
    try:
        return Moon2Encoder.from_backbone("mini", **fields)
    except (LabError, OSError, ImportError) as error:
        pytest.skip(f"backbone mini cannot be had: {error}")
