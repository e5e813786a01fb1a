"What an encoder without weights says of pictures and rows, beside the encoder itself."
import pytest
from families import FEW_FAMILIES, ITEMS, PIXELS, SPARSE, encoder_of, folder_of
from moon2_lab.config import EncoderConfig
from moon2_lab.training.memory_plan import encoder_without_weights


@pytest.mark.parametrize("name", FEW_FAMILIES)
def test_tokens_and_numbers_of_weights_are_known_before_weights_are_read(name):
    real, how = encoder_of(name), {"experts": "native"} if name in SPARSE else {}
    config = EncoderConfig(backbone=str(folder_of(name)), image_size=PIXELS[name], **how)
    ahead = encoder_without_weights(config)
    assert ahead.backbone.vision.picture_size == real.backbone.vision.picture_size
    assert [len(row) for row in ahead.rows_of(ITEMS)] == [len(row) for row in real.rows_of(ITEMS)]
    assert sum(p.numel() for p in ahead.parameters()) == sum(p.numel() for p in real.parameters())
