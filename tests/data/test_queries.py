"The protocols' queries, written a second time as plainly as they read, and golden values that must not change."

import io
import os
import pickle
import re
import unicodedata
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from choosing import few
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance

from moon2_lab.data.catalog import Catalog
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Product
from moon2_lab.data.queries import (
    Lexicon, PROTOCOLS, own_words, photo_settings, photo_view, query_image_ref, search_phrase,
)
from moon2_lab.data.words import fold, words
from moon2_lab.errors import DataError

DATA = os.environ.get("MOON2_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="MOON2_DATA is not set")
REAL_SETS = {  # products whose evaluation query is another real photo
    "fashion-product-images": 0,
    "flipkart-general": 0,
    "ikea-home": 0,
    "grocery-store": 67,
    "magento-luma": 125,
}


def draw(colour, size=(48, 64)):
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    pen.rectangle([8, 10, 30, 50], fill=colour)
    pen.line([0, 0, *size], fill="black", width=3)
    return picture


# ---- the protocol, a second time


def plain_fold(word):
    kept = re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", word).casefold())
    return kept[:-1] if len(kept) > 3 and re.search(r"(?<!s)s$", kept) else kept


def plain_words(title):
    return re.findall(r"[^\W_]+(?:['’.&/-][^\W_]+)*", title or "")


def plain_own(product):
    left_out = ("brand", "series", "model name", "model number", "model id", "shop_title", "size", "year")
    texts = [product.category_l1, product.category_l2, product.category_l3] + [
        v for k, v in product.attributes.items() if k.lower() not in left_out
    ]
    return {plain_fold(w) for text in texts if text for w in plain_words(text)}


def plain_prefixes(products):
    "product_id -> length of the brand prefix, by counting every prefix of every distinct title."
    own = set().union(*map(plain_own, products))
    distinct = {
        " ".join(unicodedata.normalize("NFKC", p.title).casefold().split()): p.title for p in products if p.has_text
    }
    starts = Counter()
    for title in distinct.values():
        folded = tuple(map(plain_fold, plain_words(title)))
        starts.update(folded[:k] for k in range(1, min(len(folded), 30) + 1))
    lengths = {}
    for p in products:
        folded = tuple(map(plain_fold, plain_words(p.title)))
        good = [k for k in range(1, len(folded) - 1) if not own & set(folded[:k]) and starts[folded[:k]] >= 3]
        lengths[p.product_id] = max(good, default=0)
    return lengths


def plain_phrase(product, variant, prefix, protocol):
    rest = plain_words(product.title)[prefix:]
    own = plain_own(product)
    stay = [
        plain_fold(w) in own
        or sha256(f"{protocol}:phrase:{variant}:{product.product_id}:{j}".encode()).digest()[0] < 128
        for j, w in enumerate(rest)
    ]
    for j in range(len(rest)):
        if sum(stay) < 2:
            stay[j] = True
    return " ".join(w for w, s in zip(rest, stay) if s) or None


def plain_photo(image, product_id, variant, protocol):
    rng = np.random.Generator(
        np.random.PCG64(int.from_bytes(sha256(f"{protocol}:photo:{variant}:{product_id}".encode()).digest()[:8], "big"))
    )
    area, x, y, angle, brightness, contrast, colour = (
        rng.uniform(low, high)
        for low, high in ((0.6, 0.9), (0, 1), (0, 1), (-8, 8), (0.8, 1.2), (0.8, 1.2), (0.8, 1.2))
    )
    w, h = round(image.width * np.sqrt(area)), round(image.height * np.sqrt(area))
    left, top = round(x * (image.width - w)), round(y * (image.height - h))
    image = image.crop((left, top, left + w, top + h)).rotate(angle, resample=Image.BICUBIC, fillcolor=(255, 255, 255))
    image = ImageEnhance.Color(
        ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(brightness)).enhance(contrast)
    ).enhance(colour)
    held = io.BytesIO()
    image.save(held, "JPEG", quality=60)
    return Image.open(held).convert("RGB")


# ---- words


@pytest.mark.parametrize(
    "title, expected",
    [
        ("Men's T-Shirt", ["Men's", "T-Shirt"]),
        ("AT&T 3.5mm 1/2", ["AT&T", "3.5mm", "1/2"]),
        ("a--b c-", ["a", "b", "c"]),
        ("x_y", ["x", "y"]),
        ("Ö’Neil ÅRE", ["Ö’Neil", "ÅRE"]),
        ("👟 ★", []),
        ("", []),
    ],
)
def test_words(title, expected):
    assert words(title) == expected


@pytest.mark.parametrize(
    "word, expected",
    [
        ("Shirts", "shirt"),
        ("Dress", "dress"),
        ("bus", "bus"),
        ("cars", "car"),
        ("T-Shirts", "tshirt"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("Ⅷ", "viii"),
        ("Men’s", "men"),
        ("x²", "x2"),
        ("ss", "ss"),
    ],
)
def test_fold(word, expected):
    assert fold(word) == expected


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30))
def test_words_hold_letters_and_fold_is_stable(text):
    "Of any text, marks and all: every word begins with a letter or digit, and folds to letters, digits and marks."
    for word in words(text):
        assert word[0].isalnum() and fold(word) and words(word) == [word]
        assert all(letter.isalnum() or unicodedata.category(letter)[0] == "M" for letter in fold(word))


# ---- golden values: a change here makes every stored score incomparable

GOLDEN = Product(
    "golden-1",
    "Acme Lux Premium Quality Soft Touch Men Navy Blue Polo T-shirts Pack",
    category_l3="Tshirts",
    attributes={"gender": "Men", "base_colour": "Navy Blue", "Brand": "Acme"},
)


def golden_lexicon(protocol):
    more = [
        Product(f"golden-{i}", f"Acme Lux {kind}", attributes={"kind": kind})
        for i, kind in ((2, "Wool Cap"), (3, "Silk Scarf"))
    ]
    return Lexicon(Catalog.from_products([GOLDEN, *more]), protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_golden_phrases(protocol):
    lexicon = golden_lexicon(protocol)
    assert lexicon.brand_prefix_length(GOLDEN) == 2
    assert [search_phrase(GOLDEN, variant, lexicon) for variant in range(3)] == GOLDEN_PHRASES[protocol]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_golden_photo_settings(protocol):
    drawn = [list(vars(photo_settings("golden-1", variant, protocol)).values()) for variant in (0, 1)]
    assert np.allclose(drawn, GOLDEN_PHOTOS[protocol], rtol=0, atol=1e-12)


GOLDEN_PHRASES = {
    "catalog-v1": [
        "Touch Men Navy Blue T-shirts Pack",
        "Soft Men Navy Blue Polo T-shirts Pack",
        "Quality Men Navy Blue T-shirts",
    ],
    "catalog-v2": [
        "Premium Quality Men Navy Blue T-shirts Pack",
        "Premium Quality Men Navy Blue T-shirts Pack",
        "Premium Touch Men Navy Blue T-shirts",
    ],
}
GOLDEN_PHOTOS = {  # area, x, y, angle, brightness, contrast, colour
    "catalog-v1": [
    [
        0.8611092503688456,
        0.9000000622913503,
        0.5371821468522725,
        -4.579960081804444,
        0.9121285328271772,
        1.158439730974066,
        0.9374856654393227,
    ],
    [
        0.6154154608184234,
        0.19735783401153273,
        0.7332365234341308,
        1.4649571049862153,
        1.1612619037138494,
        1.122415662322891,
        0.9482570415749052,
    ],
],
    "catalog-v2": [
        [
            0.7727381675213059,
            0.8528495547928948,
            0.64167851382521,
            -1.6818262836745852,
            0.9937425112457812,
            0.95017620209302,
            1.1191225626046688,
        ],
        [
            0.7719077603833208,
            0.7492656094112135,
            0.23580093970494986,
            3.520643952152529,
            1.188378512108235,
            1.1273880964348861,
            1.0363203190836605,
        ],
    ],
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_golden_photo_pixels(protocol):
    view, golden = np.asarray(photo_view(draw("teal"), "golden-1", 0, protocol)).astype(float), GOLDEN_VIEW[protocol]
    assert view.shape == (*golden[:2], 3)
    assert np.allclose(view.mean((0, 1)), golden[2:], atol=1.0)


GOLDEN_VIEW = {  # height, width, mean red, green, blue
    "catalog-v1": [59, 45, 147.8, 177.9, 178.1],
    "catalog-v2": [56, 42, 140.1, 184.4, 184.2],
}


# ---- phrases


TITLE = st.lists(st.sampled_from("kiff bros oak blue red Shirts shirt TOP 👟 men's x-1".split()), max_size=7).map(
    " ".join
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(TITLE, st.sampled_from(["", "blue", "shirts|top", "red|men"])), min_size=1, max_size=12),
    st.sampled_from(PROTOCOLS),
)
def test_lexicon_and_phrases_agree_with_the_plain_text(drawn, protocol):
    catalog = Catalog.from_products(
        [Product(f"p{i}", title or "x", attributes={"kind": kind}) for i, (title, kind) in enumerate(drawn)]
    )
    lexicon, expected = Lexicon(catalog, protocol), plain_prefixes(list(catalog))
    for product in catalog:
        assert own_words(product) == plain_own(product)
        assert lexicon.brand_prefix_length(product) == expected[product.product_id]
        for variant in range(3):
            phrase = plain_phrase(product, variant, expected[product.product_id], protocol)
            assert search_phrase(product, variant, lexicon) == phrase


def test_lexicon_sees_the_whole_catalogue_and_travels():
    products = [
        Product(f"p{i}", f"Kiff {word} Cap", split="train" if i < 2 else "test", attributes={"kind": f"{word} cap"})
        for i, word in enumerate(("Red", "Blue", "Green"))
    ]
    catalog = Catalog.from_products(products)
    lexicon = pickle.loads(pickle.dumps(Lexicon(catalog.split("test"))))
    assert [lexicon.brand_prefix_length(product) for product in catalog] == [1, 1, 1]


def test_a_title_of_10_000_characters_is_quick():
    long = [Product(f"p{i}", " ".join(f"w{i}x{j}" for j in range(1500)), attributes={"kind": "cap"}) for i in range(5)]
    lexicon = Lexicon(Catalog.from_products(long))
    assert len(search_phrase(long[0], 0, lexicon).split()) > 500


def test_titles_without_words_ask_nothing():
    lexicon = golden_lexicon(PROTOCOLS[0])
    assert [search_phrase(Product("a", title), 0, lexicon) for title in (None, "", "👟👟", "***")] == [None] * 4
    assert search_phrase(Product("a", "Mug"), 0, lexicon) == "Mug"
    with pytest.raises(DataError, match="negative"):
        search_phrase(GOLDEN, -1, lexicon)


# ---- photos


@settings(max_examples=40, deadline=None)
@given(
    st.text(min_size=1, max_size=12).filter(lambda text: text.isprintable()), st.integers(0, 9),
    st.sampled_from(PROTOCOLS),
)
def test_photo_view_agrees_with_the_plain_text(product_id, variant, protocol):
    picture, options = draw("teal"), (product_id, variant, protocol)
    assert photo_view(picture, *options).tobytes() == plain_photo(picture, *options).tobytes()
    drawn = photo_settings(*options)
    assert (
        0.6 <= drawn.area < 0.9 and -8 <= drawn.angle < 8 and 0.8 <= min(drawn.brightness, drawn.contrast, drawn.colour)
    )


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (224, 168)])
def test_photo_view_of_any_size(size):
    assert photo_view(Image.new("RGB", size, "red"), "p", 1).mode == "RGB"


def test_photo_view_leaves_the_picture_alone():
    picture = draw("teal")
    before = picture.tobytes()
    photo_view(picture, "p", 0)
    assert picture.tobytes() == before


def test_query_pictures_are_bounded_and_cachable():
    refs = tuple(ImageRef.from_pil(draw(colour)) for colour in ("teal", "red", "blue"))
    single, several = Product("s", "Cup", refs=refs[:1]), Product("m", "Cup", refs=refs)
    assert query_image_ref(several, 0) == refs[1]
    assert [query_image_ref(several, v) for v in (1, 3, 5)] == [refs[1], refs[2], refs[1]]
    assert query_image_ref(several, 2).load().tobytes() == photo_view(draw("teal"), "m", 2).tobytes()
    assert query_image_ref(single, 4).load().tobytes() == photo_view(draw("teal"), "s", 4).tobytes()
    keys = [query_image_ref(single, v).key for v in range(5)]
    assert len(set(keys)) == 5 and keys == [query_image_ref(single, v).key for v in range(5)]
    assert all(re.fullmatch(r"[0-9a-f]{64}\.photo\d-[0-9a-f]{12}", key) for key in keys)
    assert query_image_ref(Product("other", "Cup", refs=refs[:1]), 0).key != keys[0], (
        "the view depends on the product id"
    )
    assert query_image_ref(Product("none", "Cup"), 0) is None


# ---- real products


@needs_data
@pytest.mark.data
@pytest.mark.parametrize("name", few(REAL_SETS, "grocery-store", "magento-luma"))
def test_real_set(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MOON2_CACHE", os.environ.get("MOON2_CACHE") or str(tmp_path))
    catalog = Catalog.load(Path(DATA) / name)
    lexicon, expected = Lexicon(catalog.split("test")), plain_prefixes(list(catalog))
    assert sum(query_image_ref(product, 0) == product.image_ref(1) for product in catalog) == REAL_SETS[name]
    for product in catalog:
        assert lexicon.brand_prefix_length(product) == expected[product.product_id]
        phrase = search_phrase(product, 0, lexicon)
        assert phrase == plain_phrase(product, 0, expected[product.product_id], PROTOCOLS[0])
        assert len(phrase.split()) >= min(2, len(words(product.title)))
    for product in catalog[:: max(1, len(catalog) // 10)]:
        if product.n_images == 1:
            assert (
                query_image_ref(product, 0).load().tobytes()
                == plain_photo(product.image(), product.product_id, 0, PROTOCOLS[0]).tobytes()
            )


# ---------------------------------------------------------------------------------------------- marks


latin = st.text(st.characters(codec="utf-8", max_codepoint=0x24F), max_size=60).map(
    lambda text: unicodedata.normalize("NFC", text)
)
segmented = st.text(st.characters(codec="utf-8", exclude_categories=("M", "C")), max_size=60).filter(
    lambda text: not any(unicodedata.category(letter)[0] == "M" for letter in unicodedata.normalize("NFKC", text))
)  # Arabic presentation forms hold some


@settings(max_examples=300, deadline=None)
@given(st.one_of(latin, segmented))
def test_texts_without_marks_are_cut_and_folded_as_ever(text):
    "Scores of other days compare: nothing changes for plain composed Latin, nor for text without combining marks."
    assert words(text) == plain_words(text)
    assert [fold(word) for word in words(text)] == [plain_fold(word) for word in plain_words(text)]


def test_a_mark_without_a_letter_is_dropped():
    "U+FE70 is a blank and a mark: there is no letter for it to stay with."
    assert [fold(word) for word in ("\ufe70", "a\ufe70b", "\u0639\u064f")] == ["", "ab", "\u0639\u064f"]


@pytest.mark.parametrize(
    "title, count",
    [
        ("लाल सूती साड़ी महिलाओं के लिए", 6),
        ("فُسْتَانٌ أَحْمَرُ قُطْنِيٌّ", 3),
        ("שָׁלוֹם עוֹלָם", 2),
        ("কালো চামড়ার জুতা", 3),
        ("சிவப்பு சட்டை", 2),
        ("กระเป๋าหนังแท้สีดำ ขนาดเล็ก", 2),
        (unicodedata.normalize("NFD", "crème brûlée à l'été, 3.5 mm"), 6),
        (unicodedata.normalize("NFD", "Đèn bàn gỗ trắng"), 4),
        ("می\u200cخواهم کتاب", 2),
        ("क्\u200dष कम", 2),
    ],
)
def test_no_word_is_cut_at_a_mark(title, count):
    assert len(words(title)) == count == len(title.split()), words(title)
    assert all(fold(word) for word in words(title))


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8", min_codepoint=0x20, max_codepoint=0x1EFF), max_size=40))
def test_decomposed_titles_give_the_folded_terms_of_composed_ones(text):
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert [fold(word) for word in words(decomposed)] == [fold(word) for word in words(composed)]


def test_phrases_do_not_depend_on_the_normal_form():
    titles = ["crème brûlée ramekin blanc émaillé", "crème brûlée plat rond", "tasse à café bleue"]
    phrases = []
    for form in ("NFC", "NFD"):
        catalog = Catalog.from_products(
            [Product(f"p{n}", unicodedata.normalize(form, title)) for n, title in enumerate(titles)]
        )
        phrases.append(
            [
                unicodedata.normalize("NFC", search_phrase(product, v, Lexicon(catalog)))
                for product in catalog
                for v in range(4)
            ]
        )
    assert phrases[0] == phrases[1]
