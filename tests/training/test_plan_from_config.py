"What an encoder without weights says of pictures and rows, beside the encoder itself."
from dataclasses import asdict

import pytest
from families import FEW_FAMILIES, ITEMS, PIXELS, SPARSE, encoder_of, folder_of
from moon2_lab.config import EncoderConfig
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Item
from moon2_lab.errors import DataError
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.tiny_models import TINY_REFUSED, tiny_model
from moon2_lab.training.memory_plan import encoder_without_weights
from PIL import Image
from transformers import LlamaConfig


@pytest.mark.parametrize("name", FEW_FAMILIES)
def test_tokens_and_numbers_of_weights_are_known_before_weights_are_read(name):
    real, how = encoder_of(name), {"experts": "native"} if name in SPARSE else {}
    config = EncoderConfig(backbone=str(folder_of(name)), image_size=PIXELS[name], **how)
    ahead = encoder_without_weights(config)
    assert ahead.backbone.vision.picture_size == real.backbone.vision.picture_size
    assert [len(row) for row in ahead.rows_of(ITEMS)] == [len(row) for row in real.rows_of(ITEMS)]
    assert sum(p.numel() for p in ahead.parameters()) == sum(p.numel() for p in real.parameters())


def test_pictures_of_their_own_aspect_are_counted_as_they_are_read():
    real = encoder_of("qwen3_vl", image_fit="native")
    config = EncoderConfig(backbone=str(folder_of("qwen3_vl")), image_size=PIXELS["qwen3_vl"], image_fit="native")
    ahead = encoder_without_weights(config)
    wide = [Item("red bar", ImageRef.from_pil(Image.new("RGB", size, "red"))) for size in ((300, 60), (60, 300))]
    rows = [[len(row) for row in encoder.rows_of(wide)] for encoder in (ahead, real)]
    assert rows[0] == rows[1] and asdict(ahead.config) == asdict(real.config)
    assert rows[0] != [len(row) for row in encoder_of("qwen3_vl").rows_of(wide)]


@pytest.mark.parametrize("kind", [*TINY_REFUSED, "llama"])
def test_what_cannot_be_trained_cannot_be_planned(kind, tmp_path):
    "The plan says what the training would say."
    folder = tiny_model("llava" if kind == "llama" else kind, tmp_path / "model")
    if kind == "llama":
        LlamaConfig(vocab_size=64).save_pretrained(folder)
    said = []
    for make in (encoder_without_weights, lambda config: Moon2Encoder.from_backbone(config.backbone)):
        with pytest.raises(DataError, match=f"{kind} cannot be a backbone") as caught:
            make(EncoderConfig(backbone=str(folder)))
        said.append(str(caught.value))
    assert said[0] == said[1]
