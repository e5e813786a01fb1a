"The small models for tests agree with the table of families: every kind has one, with the tokens of its frame."
import pytest
from moon2_lab.model.families import FAMILIES, Family, REFUSED, frame_of
from moon2_lab.tiny_models import TINY_REFUSED, TINY_WORDS, _TINY, _tokenizer


def test_every_family_has_a_tiny_model_and_the_refused_ones_are_refused():
    "A family that nobody can build small cannot be tested."
    assert set(FAMILIES) <= {tiny.model_type for tiny in _TINY.values()}
    assert set(TINY_REFUSED) <= set(REFUSED)


@pytest.mark.parametrize("name", _TINY)
def test_tokens_of_the_frame_are_single_tokens_of_the_tiny_tokenizer(name):
    "The strings stand in two tables, from memory in both."
    family, tokenizer = FAMILIES.get(_TINY[name].model_type, Family()), _tokenizer(_TINY[name], TINY_WORDS)
    frame = frame_of(family, tokenizer, name)
    tokens = family.start + family.before + family.after
    ids = tokenizer(" ".join(tokens), add_special_tokens=False)["input_ids"]
    spaces = {tokenizer.convert_tokens_to_ids("Ġ")} if _TINY[name].byte_level else set()
    assert [number for number in ids if number not in spaces] == [*frame.start, *frame.before, *frame.after]
