"""Finding the subject: against known masks, on real photos, in other processes, and where there is nothing to find."""
import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from moon2_lab.augment.subject_mask import GrabCut, require_subject, tidy_mask
from moon2_lab.data.image_folder import ImageFolder
from moon2_lab.data.images import decode_image
from moon2_lab.data.synthetic.generator import describe
from moon2_lab.data.synthetic.materials import Shot, photo, pose
from moon2_lab.data.synthetic.shapes import draw_look
from moon2_lab.errors import DataError, LabError, UsageError

SCENES = ("room", "studio", "tiles", "outside", "cloth")


def drawn(number, shot, size=160):
    "A drawn photo, and the true mask of its product."
    cut = draw_look(describe(5, number).look, size)
    return photo(cut, shot), np.asarray(pose(cut, shot).getchannel("A")) > 127


def iou(mask, truth):
    "Intersection over union; 0 when nothing was found."
    return float(((mask > 127) & truth).sum() / ((mask > 127) | truth).sum())


def found(cases):
    "IoU of each case."
    scores = []
    for picture, truth in cases:
        try:
            scores.append(iou(GrabCut().extract(picture).mask, truth))
        except DataError:
            scores.append(0.0)
    return np.array(scores)


def digest(number):
    "What extraction gives, in few characters."
    subject = GrabCut().extract(drawn(number, Shot("room", .7, seed=number))[0])
    return hashlib.sha256(subject.image.tobytes() + subject.mask.tobytes()).hexdigest()


def test_outlines_of_drawn_products_are_found_on_white_and_in_scenes():
    "The floors are a little under what was measured; the soft shadow does not count as product."
    plain = found(drawn(number, Shot(scale=.9, seed=number)) for number in range(40))
    scene = found(
        drawn(number, Shot(SCENES[number % 5], 0.72, 8, props=number % 4, seed=number)) for number in range(40)
    )
    assert plain.mean() > .88 and np.mean(plain > .8) > .8, plain.mean()
    assert scene.mean() > .75 and np.median(scene) > .85, (scene.mean(), np.median(scene))


def test_the_same_everywhere():
    "Other processes, other thread counts, another state of OpenCV's random numbers: the same bytes."
    import cv2

    here = [digest(number) for number in range(3)]
    cv2.setNumThreads(2)
    cv2.setRNGSeed(99)
    assert [digest(number) for number in range(3)] == here
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(digest, range(3))) == here
    code = "import sys; sys.path.insert(0, 'tests/augment'); from test_subjects import digest; print(digest(1))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True,
        env=os.environ | {"PYTHONHASHSEED": "5"},
    )
    assert done.stdout.strip() == here[1], done.stderr


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(0, 2**32 - 1),
    st.sampled_from(["noise", "blank", "grey noise", "blocks"]),
)
def test_any_picture_gives_a_subject_or_a_reason(wide, high, seed, what):
    "Never another error, and never a subject of another size or out of bounds."
    random = np.random.default_rng(seed)
    values = {
        "noise": lambda: random.integers(0, 256, (high, wide, 3)),
        "blank": lambda: np.broadcast_to(random.integers(0, 256, 3), (high, wide, 3)),
        "grey noise": lambda: np.repeat(random.integers(0, 256, (high, wide, 1)), 3, axis=2),
        "blocks": lambda: np.kron(random.integers(0, 256, (-(-high // 8), -(-wide // 8), 3)), np.ones((8, 8, 1), int))[
            :high, :wide
        ],
    }[what]()
    try:
        subject = GrabCut().extract(Image.fromarray(values.astype(np.uint8)))
    except DataError as error:
        assert error.what.startswith("no foreground found: ")
    else:
        assert what == "blocks", f"a subject in {what}"
        assert subject.image.size == (wide, high) and subject.mask.shape == (high, wide) and .02 <= subject.share <= .96


@pytest.mark.parametrize("seed", range(8))
def test_noise_is_no_subject(seed):
    "At the sizes of real pictures too."
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, (200, 160, 1 + 2 * (seed % 2)))
    with pytest.raises(DataError, match="no foreground found"):
        GrabCut().extract(Image.fromarray(np.broadcast_to(values, (200, 160, 3)).astype(np.uint8)))


def test_what_is_found_is_judged():
    "Scattered, too small, too large, without an edge: each with its reason."
    lab = np.zeros((60, 60, 3), np.float32)
    y, x = np.mgrid[:60, :60]
    block = (abs(x - 30) < 15) & (abs(y - 30) < 15)
    for mask, reason in (
        ((x + y) % 3 == 0, "scattered"), ((x < 3) & (y < 3), "0.2% of the picture"), (x < 59, "98.3% of the picture"),
        (block, "no edge"),
    ):
        with pytest.raises(DataError, match=reason):
            require_subject(mask, lab, .02, .95)
    lab[block] = 40
    require_subject(block, lab, .02, .95)


def test_parts_that_matter_stay():
    "Two shoes are a pair, crumbs are not."
    mask = np.zeros((60, 60), bool)
    mask[5:25, 5:25] = mask[30:50, 30:50] = True
    mask[2, 55] = mask[55:57, 5:7] = True
    assert tidy_mask(mask).sum() == 800


def test_white_goods_holes_and_cut_off_products():
    "A white shirt keeps its front, a bag's handle is seen through, a model stays cut off at the waist."
    shirt = Image.new("RGB", (120, 150), "white")
    pen = ImageDraw.Draw(shirt)
    pen.ellipse((45, 8, 75, 40), fill=(180, 130, 100))
    pen.rectangle((25, 40, 95, 110), fill=(249, 249, 248), outline=(228, 228, 226), width=2)
    pen.rectangle((25, 80, 27, 84), fill="white")  # where its outline is lost in the light
    pen.rectangle((30, 110, 90, 149), fill=(40, 50, 90))
    mask = GrabCut().extract(shirt).mask
    assert mask[75, 60] == 255 and mask[130, 60] == 255 and mask[149, 60] == 255 and mask[75, 10] == 0
    bag = Image.new("RGB", (120, 120), "white")
    ImageDraw.Draw(bag).ellipse((35, 15, 85, 75), outline=(90, 40, 30), width=6)
    ImageDraw.Draw(bag).rectangle((20, 60, 100, 110), fill=(120, 50, 40))
    mask = GrabCut().extract(bag).mask
    assert mask[40, 60] == 0 and mask[90, 60] == 255 and mask[17, 60] > 127


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA"])
def test_other_kinds_of_pictures(mode):
    "Grey, transparent and palette pictures, wide ones and large ones."
    picture = Image.new("RGB", (700, 300), "white")
    ImageDraw.Draw(picture).ellipse((250, 50, 450, 250), fill=(150, 30, 30))
    subject = GrabCut().extract(picture.convert(mode))
    assert subject.image.mode == "RGB" and subject.image.size == (700, 300)
    assert abs(subject.share - np.pi * 100**2 / 210_000) < .01
    assert json.loads(json.dumps(subject.parameters)) == subject.parameters


def test_settings_are_checked_and_opencv_is_asked_for(monkeypatch):
    "Options that cannot work, and a machine without OpenCV."
    for options in ({"side": 2}, {"iterations": 0}, {"least": .5, "most": .4}):
        with pytest.raises(UsageError):
            GrabCut(**options)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(LabError, match="OpenCV is not installed") as caught:
        GrabCut().extract(Image.new("RGB", (64, 64)))
    assert "moon2_lab[augment]" in str(caught.value)


def real(folder, paths):
    "The pictures of a data set."
    images = ImageFolder(folder)
    return [decode_image(images.find(path).read()) for path in paths]


@pytest.mark.slow
@pytest.mark.data
def test_real_photos(data_root):
    "Shop photos on white nearly always give a subject; photos of full shelves are refused with a reason; both fast."
    shop = pd.read_parquet(data_root / "fashion-product-images" / "products.parquet").sample(80, random_state=1)
    views = pd.read_csv(data_root / "grocery-store" / "image_views.csv")
    views = views[views["view"] == "natural"].sample(80, random_state=1)
    white = real(data_root / "fashion-product-images", [json.loads(paths)[0] for paths in shop["image_paths"]])
    shelf = real(data_root / "grocery-store", views["image_path"])
    shares, spent = {}, {}
    for name, pictures in (("white", white), ("shelf", shelf)):
        start, shares[name] = time.process_time(), []
        for picture in pictures:
            try:
                shares[name].append(GrabCut().extract(picture).share)
            except DataError as error:
                assert error.what.startswith("no foreground found: ")
        spent[name] = (time.process_time() - start) / len(pictures)
    assert len(shares["white"]) >= 78 and .2 < np.median(shares["white"]) < .5
    assert 15 <= len(shares["shelf"]) <= 60
    assert max(spent.values()) < .15, spent
