"""An edited pair has the score, the rank and the hits that a fresh search gives over a catalogue in which the product
really has that title and that picture.
"""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moon2_lab.data.products import Item, Product
from moon2_lab.errors import DataError, UsageError
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts
from moon2_lab.retrieval.search import MemorySearcher
from moon2_lab.retrieval.vectors import VectorBlock, normalised
from moon2_lab.retrieval.what_if import PairEditor, side_edit, what_if_pair
from moon2_lab.testing import flat_picture, made_up_shop

WORDS = ("red", "blue", "mug", "bowl", "lamp", "number")


class Counting:
    "A model with few values, so that many scores are equal: it counts words, and adds the picture's first pixel."
    fingerprint = "counting"

    def encode(self, items, view="mm", *_):
        items = [one.item(view) if isinstance(one, Product) else one for one in items]
        rows = [[1.0, *((one.text or "").split().count(word) for word in WORDS), self._pixel(one)] for one in items]
        return normalised(np.array(rows, dtype=np.float32))

    def _pixel(self, item) -> float:
        return 0.0 if item.image is None else 1.0 + item.image.load().getpixel((0, 0))[0] // 90


def fresh(encoder, query, products, edited, k, view="mm"):
    "Score, rank and ids of the hits from a search over products one of which is the edited one."
    products = [edited if one.product_id == edited.product_id else one for one in products]
    ids = [one.product_id for one in products]
    block = VectorBlock.of(products, view, encoder.encode(products, view))
    hits = MemorySearcher(block, view, products=products).search(encoder.encode([query])[0], len(products))[0]
    rank = 1 + [hit.product_id for hit in hits].index(edited.product_id)
    assert len(hits) == len(ids)
    return hits[rank - 1].score, rank, [hit.product_id for hit in hits[:k]]


def agrees(encoder, editor, result, products, edited, view="mm"):
    score, rank, ids = fresh(encoder, result.query, products, edited, editor.k, view)
    assert result.after.score == pytest.approx(score, abs=2e-6)
    assert (result.after.rank, [hit.product_id for hit in result.after.hits]) == (rank, ids)
    if view == "i":
        return  # a title that is not read is not edited
    titles = {hit.product_id: hit.title for hit in result.after.hits}
    assert titles.get(edited.product_id, edited.title) == edited.title


@given(
    place=st.integers(0, 17), query=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3),
    title=st.lists(st.sampled_from(WORDS), max_size=3), picture=st.sampled_from([None, 0, 5, 11]),
    k=st.integers(1, 30),
)
@settings(max_examples=60, deadline=None)
def test_many_edits_with_many_equal_scores(place, query, title, picture, k):
    encoder, combinations = Counting(), [(a, b) for a in WORDS[:3] for b in WORDS[3:]]
    products = [Product(f"p{n}", " ".join(combinations[n % 9]), refs=(flat_picture(n % 4),)) for n in range(18)]
    editor = PairEditor(encoder, Item("red mug", None, "q"), products[place].item(), products, k)
    item = Item(" ".join(title) or None, None if picture is None else flat_picture(picture))
    if not title and picture is None:
        with pytest.raises(DataError, match="nothing is left to read"):
            editor.edit(item=item)
        return
    result = editor.edit(Item(" ".join(query), None, "q"), item)
    edited = replace(products[place], title=item.text, refs=() if picture is None else (item.image,))
    agrees(encoder, editor, result, products, edited)
    came, went = ({hit.product_id for hit in hits} for hits in (result.came_in, result.went_out))
    before, after = ({hit.product_id for hit in one.hits} for one in (result.before, result.after))
    assert (came, went) == (after - before, before - after)


@pytest.fixture(scope="module")
def encoder():
    return perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=2, seed=1), std=0.1).eval()


@pytest.mark.parametrize("view", ["t", "i", "mm"])
def test_a_real_encoder_in_every_view(encoder, view):
    products = made_up_shop(24).products
    gallery = MemorySearcher.from_products(encoder, products, view)
    for place in (0, 7, 23):
        product = products[place]
        editor = PairEditor(encoder, Item("red mug", None, "q"), product.item(view), gallery, k=6)
        edits = ("blue bowl", product.refs), (product.title, products[3].refs), ("lamp", products[5].refs)
        for title, picture in edits:
            edited = replace(product, title=title, refs=picture)
            agrees(encoder, editor, editor.edit(item=edited.item()), products, edited, view)
        twin = products[(place + 1) % 24]  # level with another product, which stands before or after it
        edited = replace(product, title=twin.title, refs=twin.refs)
        result = editor.edit(item=edited.item())
        rank = gallery.rank(editor.query, twin.product_id, gallery.vector(twin.product_id))
        assert result.after.score == rank[1]
        ids = [hit.product_id for hit in what_if_pair(
            encoder, editor.query, product.item(view), gallery, edited_item=edited.item(), k=24).after.hits]
        first, second = sorted((product.product_id, twin.product_id))
        assert ids.index(second) == ids.index(first) + 1


def test_pictures_that_are_only_named_are_not_taken_for_none(encoder):
    "Vectors from a file know titles and paths: a product whose picture was dropped is encoded anew."
    products = [replace(product, image_paths=[f"{product.product_id}.png"]) for product in made_up_shop(12)]
    block = VectorBlock.of(products, "mm", encoder.encode(products))
    gallery = MemorySearcher(block, "mm", about={"model_fingerprint": encoder.fingerprint})
    result = what_if_pair(encoder, Item("red mug", None, "q"), products[2].item(), gallery,
                          edited_item=Item(products[2].title, None))
    assert result.edits[1].picture == "dropped" and result.difference != 0
    assert result.after.score == pytest.approx(
        fresh(encoder, result.query, products, replace(products[2], refs=()), 10)[0], abs=2e-6)


def test_what_is_asked_wrongly_is_told(encoder):
    products = made_up_shop(12).products
    gallery, query = MemorySearcher.from_products(encoder, products), Item("mug", None, "q")
    with pytest.raises(UsageError, match="no such product.*p003"):
        PairEditor(encoder, query, Item("mug", None, "p03"), gallery)
    editor = PairEditor(encoder, query, products[0].item(), gallery)
    with pytest.raises(DataError, match="nothing is left to read of the query"):
        editor.edit(query=Item("  ", None))
    with pytest.raises(UsageError, match="no such product"):
        editor.picture("elsewhere")
    with pytest.raises(UsageError, match="no gallery"):
        PairEditor(encoder, query, products[0].item()).picture("p000")


@given(st.lists(st.sampled_from("abc"), max_size=5), st.lists(st.sampled_from("abc"), max_size=5))
def test_words_added_and_removed_lead_from_one_text_to_the_other(old, new):
    edit = side_edit("item", Item(" ".join(old) or None, None), Item(" ".join(new) or None, None))
    assert sorted([*old, *edit.added]) == sorted([*new, *edit.removed])
    assert not set(edit.added) & set(edit.removed)
    assert edit.reordered == (sorted(old) == sorted(new) and old != new)
