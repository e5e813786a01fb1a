"Entities: the lexicon learned from a catalogue, what it finds in texts of many scripts, and what is cut from a title."
import json
import os
import string
from pathlib import Path

import pytest
from choosing import few
from hypothesis import given, settings
from hypothesis import strategies as st
from moon2_lab.augment.entities import (
    AttributeLexicon, Entity, drop_repeats, drop_talk, find_entities, is_mentioned, role_of, single_values,
)
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.products import Product
from moon2_lab.data.words import is_negated, words


def shop(values, name="colour", **fields):
    "Two products for each value."
    return [
        Product(f"{value}{copy}", f"Thing {value}", attributes={name: value}, **fields)
        for value in values
        for copy in range(2)
    ]


# ---------------------------------------------------------------------------------------------- the lexicon


def test_values_count_products_not_mentions():
    "A value that one product repeats is not known twice."
    alone = Product("a", "Mug", attributes={"colour": "red|red|Red", "shade": "red"})
    assert AttributeLexicon([alone]).counts("colour") == {}
    assert AttributeLexicon([alone, Product("b", "Cup", attributes={"colour": "RED"})]).counts("colour") in (
        {"red": 2}, {"Red": 2}, {"RED": 2},
    )


def test_longest_match_wins_and_leaves_the_rest():
    "Dark blue is not blue, and what follows is still found."
    lexicon = AttributeLexicon([*shop(["blue", "dark blue", "blue jeans"]), *shop(["Denim"], "material")])
    assert [value for _, value, _, _ in lexicon.find("Dark-Blue denim, blue")] == ["dark blue", "Denim", "blue"]
    for _, value, start, end in lexicon.find("A dark  blue thing"):
        assert ("A dark  blue thing"[start:end], value) == ("dark  blue", "dark blue")


def test_an_ambiguous_value_is_reported_under_each_name():
    "The attribute that has it more often comes first."
    lexicon = AttributeLexicon(
        [*shop(["orange"], "flavour"), *shop(["orange"]), Product("o", "Orange", attributes={"colour": "orange"})]
    )
    assert [name for name, *_ in lexicon.find("Orange juice")] == ["colour", "flavour"]


def test_identifying_attributes_teach_no_value():
    "Model numbers and years are no words to write; brands are known as brands."
    products = [
        Product(
            f"p{i}", f"Lamp {i}",
            attributes={"Model Number": "Falcon", "year": "MMXX", "Brand": "Umberly", "Size": "Large"},
        )
        for i in range(3)
    ]
    lexicon = AttributeLexicon(products)
    assert lexicon.names == ["Brand"] and lexicon.is_value_word("umberly") and not lexicon.is_value_word("falcon")
    assert {entity.name for entity in find_entities(products[0], lexicon)} == {"Brand"}


def test_sentences_and_truth_values_are_no_values():
    "Yes, NA and a line of care instructions."
    assert len(AttributeLexicon(shop(["Yes", "NA", "None", "Wash it by hand in warm water", "12", "Other"]))) == 0


@pytest.mark.parametrize(("values", "title", "expected"), [
    (["红色", "深红色"], "北欧深红色陶瓷杯", ["深红色"]),  # Chinese: no spaces, the longest wins
    (["อะลูมิเนียม"], "โคมไฟอะลูมิเนียมตั้งโต๊ะ", ["อะลูมิเนียม"]),  # Thai: vowels are marks
    (["コットン"], "レディースコットンシャツ", ["コットン"]),
    (["أحمر"], "كوب أحمر كبير", ["أحمر"]),
    (["कपास"], "नीली कपास कमीज", ["कपास"]),
    (["красный"], "Красный чайник", ["красный"]),
    (["red"], "北欧深红色陶瓷杯", []),
])
def test_scripts(values, title, expected):
    "Values are found in any script the catalogue is written in, and nothing in others."
    assert [value for _, value, _, _ in AttributeLexicon(shop(values)).find(title)] == expected


def test_a_catalogue_and_a_list_teach_the_same():
    "A Catalog is one more iterable of products; a split teaches only what it holds."
    products = [
        Product(f"p{i}", f"Mug {i}", attributes={"colour": colour}, split=split)
        for i, (colour, split) in enumerate([("red", "train")] * 2 + [("blue", "test")] * 2)
    ]
    catalog = Catalog.from_products(products)
    assert (
        AttributeLexicon(catalog).counts("colour")
        == AttributeLexicon(products).counts("colour")
        == {"blue": 2, "red": 2}
    )
    assert AttributeLexicon(catalog.split("train")).counts("colour") == {"red": 2}


# ---------------------------------------------------------------------------------------------- entities of a product


def test_sources_in_order_and_extractors():
    "The record is believed first; a value is listed once; extractors add their own."
    lexicon = AttributeLexicon([*shop(["red", "blue"]), *shop(["leather"], "material")])
    product = Product("x", "Red bag", "Blue lining, red leather.", "Bags", attributes={"colour": "red"})
    found = find_entities(product, lexicon, [lambda p: [Entity("strap", "long", "image")]], "LEATHER BAG")
    assert [(e.value, e.source) for e in found] == [
        ("red", "attribute"), ("Bags", "category"), ("blue", "description"), ("leather", "description"),
        ("long", "image"),
    ]


def test_what_a_text_denies_is_no_entity():
    "Nor is it taken from a less certain text; a value whose name holds the denial is one."
    lexicon = AttributeLexicon([*shop(["leather", "cotton"], "material"), *shop(["collar", "no collar"], "collar")])
    for title, values in {
        "Shirt without leather, cotton": ["cotton"], "Leather-free shirt": [],
        "Shirt no collar": ["no collar", "leather"],
        "Shirt without collar": ["leather"], "Non-stick leather": ["leather"], "Shirt": ["leather"],
    }.items():
        found = find_entities(Product("x", title, "Leather"), lexicon)
        assert [entity.value for entity in found] == values, title


def test_a_product_without_text():
    "Nothing to read is no error."
    assert find_entities(Product("x"), AttributeLexicon(shop(["red"]))) == []


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_find_reports_true_places(text):
    "Any text at all: the places are in it, in order, without overlap."
    lexicon = AttributeLexicon([*shop(["red", "dark red", "红色"]), *shop(["red"], "shade")])
    places = sorted({(start, end) for _, _, start, end in lexicon.find(text)})
    assert all(0 <= start < end <= len(text) for start, end in places)
    assert all(one[1] <= two[0] for one, two in zip(places, places[1:], strict=False))


# ---------------------------------------------------------------------------------------------- titles


@pytest.mark.parametrize(("title", "expected"), [
    ("Buy Umberly Oak Lamp for Rs.450 online", "Umberly Oak Lamp"),
    ("Umberly Oak Lamp at Rs. 1,395/- only at Shop.com", "Umberly Oak Lamp"),
    ("Umberly Oak Lamp | Best Quality | Free Shipping", "Umberly Oak Lamp"),
    ("Umberly Lamp Lamp Oak", "Umberly Lamp Oak"),
    ("Oak Lamp by Umberly Oak Lamp", "Oak Lamp by Umberly"),
    ("Oak Lamp, Set of 2, Oak Lamp", "Oak Lamp, Set of 2"),
    ("Umberly Oak Lamp | Umberly Oak Lamp | Premium, Blue", "Umberly Oak Lamp | Blue"),
    ("Buy", "Buy"),
    ("Best Quality", "Best Quality"),
    ("Rs 500 Note Print", "Note Print"),
    ("For Him & For Her Set of 2", "For Him & For Her Set of 2"),
    ("2 x 2 x 2 Cube", "2 x 2 x 2 Cube"),
])
def test_titles_are_cleaned(title, expected):
    "Shop talk and repetition go; numbers, small words and all else stay."
    assert drop_repeats(drop_talk(title, AttributeLexicon([]))) == expected


@given(
    st.lists(
        st.sampled_from(["Red", "red,", "Mug", "mugs", "of", "2", "Best", "Quality", "|", "Oak"]), max_size=12
    ).map(" ".join)
)
@settings(max_examples=200, deadline=None)
def test_repeats_lose_no_word(title):
    "Every word that was there is still there, and doing it again changes nothing more than the first time did."
    once = drop_repeats(title)
    assert {word.casefold().rstrip("s") for word in words(once)} == {
        word.casefold().rstrip("s") for word in words(title)
    }
    assert len(words(once)) <= len(words(title))
    if once != title:
        assert not once.endswith((",", "|")) and "| |" not in once


def test_roles_and_denials():
    "What attribute names mean, in the ways shops write them."
    names = {
        "base_colour": ("colour", ""), "Dial Color": ("colour", "dial"), "Ideal For": ("audience", ""),
        "Outer Material": ("material", ""), "Suitable For": ("audience", ""), "Case / Bezel Material": (None, ""),
        "Warranty Summary": (None, ""), "颜色": (None, ""), "": (None, ""),
    }
    assert {name: role_of(name) for name in names} == names
    assert single_values("audience", "Men, Women") == ["Men", "Women"] and single_values("size", "10 cm") == []
    assert is_negated("leather", "faux leather") and not is_negated("leather", "soft leather")
    assert is_mentioned("Casual Shoes", "Red Shoe") and not is_mentioned("Shoe Rack", "Red Shoe")


@pytest.mark.data
@pytest.mark.parametrize(
    "name", few(["fashion-product-images", "flipkart-general", "ikea-home", "magento-luma"], "magento-luma")
)
def test_real_catalogues_teach_their_words(name):
    "Colours and brands of a real catalogue are learned, and each product has entities."
    import pyarrow.parquet as pq

    rows = pq.read_table(Path(os.environ["MOON2_DATA"]) / name / "products.parquet").to_pylist()
    products = [
        Product(
            r["product_id"], r["title"], r["description"], r["category_l1"], r["category_l2"], r["category_l3"],
            json.loads(r["attributes"]),
        )
        for r in rows
        if r["split"] == "train"
    ]
    lexicon = AttributeLexicon(products)
    colours = {
        value.casefold() for known in lexicon.names if role_of(known)[0] == "colour" for value in lexicon.counts(known)
    }
    assert {"black", "white", "blue"} <= colours
    assert all(find_entities(product, lexicon) for product in products[:300])
    assert not set(string.digits) & {key for key in lexicon.counts("brand")}
