"""Edits keep what must not change and are the same everywhere; real pipelines and real servers, with all that goes
wrong with them."""
import base64
import hashlib
import io
import json
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from moon2_lab.augment.image_edits import (
    ClassicalEditor, DiffusersEditor, KINDS, ServerEditor, edit_prompt, make_editor,
)
from moon2_lab.augment.image_transforms import MAX_SHIFT, load_cv2, mean_lab
from moon2_lab.augment.subject_mask import GrabCut, Subject
from moon2_lab.data.synthetic.generator import describe
from moon2_lab.data.synthetic.materials import Shot, photo
from moon2_lab.data.synthetic.shapes import DRAWINGS as DRAWN, draw_look
from moon2_lab.errors import DataError, LabError, UsageError
from moon2_lab.http import Refused


def subject_of(number, size=160):
    "The subject of a drawn product, with its true mask."
    cut = draw_look(describe(5, number).look, size)
    white = Image.alpha_composite(Image.new("RGBA", cut.size, "white"), cut).convert("RGB")
    mask = np.asarray(cut.getchannel("A")).copy()
    return Subject(white, mask, float((mask > 127).mean()), "drawn")


def digest(seed):
    "All edits of one product with one seed, in few characters."
    subject = GrabCut().extract(photo(draw_look(describe(5, seed).look, 96), Shot()))
    return hashlib.sha256(
        b"".join(ClassicalEditor().edit(subject, None, kind, seed).image.tobytes() for kind in KINDS)
    ).hexdigest()


def kept(subject, edited):
    "The image and alpha that a new background was laid behind, made again from its parameters."
    told, cv2 = edited.parameters, load_cv2()
    (x, y), (left, top, wide, high) = told["at"], told["from"]
    size = round(told["scale"] * wide), round(told["scale"] * high)
    image, alpha = np.full((*subject.mask.shape, 3), 255, np.uint8), np.zeros(subject.mask.shape, np.float32)
    for whole, part in ((image, np.asarray(subject.image)), (alpha, subject.mask / np.float32(255))):
        whole[y : y + size[1], x : x + size[0]] = cv2.resize(
            part[top : top + high, left : left + wide], size, interpolation=cv2.INTER_AREA
        )
    return image, alpha


# ---------------------------------------------------------------------------------------------- the classical editor


def test_a_new_background_leaves_the_product_alone():
    "Inside the outline every pixel is the product's own, up to its scale; around it nothing is left of the white."
    for number in range(12):
        subject = subject_of(number)
        edited = ClassicalEditor().edit(subject, None, "background", number)
        image, alpha = kept(subject, edited)
        values, inside = np.asarray(edited.image), alpha == 1
        assert inside.mean() > .01 and (values[inside] == image[inside]).all()
        assert (values[alpha == 0] == 255).all(axis=1).mean() < .05, edited.parameters["scene"]
        assert .7 <= edited.parameters["scale"] <= 1


def test_colour_survives_another_light():
    "The mean colour of the product, its mask taken through the same perspective."
    cv2 = load_cv2()
    shifts = []
    for number in range(25):
        subject = subject_of(number)
        edited = ClassicalEditor().edit(subject, None, "viewpoint", number)
        wide, high = subject.image.size
        matrix = cv2.getPerspectiveTransform(
            np.float32([(0, 0), (wide, 0), (wide, high), (0, high)]), np.float32(edited.parameters["corners"])
        )
        alpha = cv2.warpPerspective(subject.mask / np.float32(255), matrix, (wide, high))
        now, before = mean_lab(np.asarray(edited.image), alpha), mean_lab(np.asarray(subject.image), subject.mask / 255)
        shifts.append((np.linalg.norm(now - before), np.linalg.norm((now - before)[1:])))
        assert edited.image.tobytes() != subject.image.tobytes()
    worst = np.max(shifts, axis=0)
    assert worst[0] < MAX_SHIFT + 2 and worst[1] < MAX_SHIFT / 2 + 1, worst  # resampling adds a little
    assert np.mean(shifts, axis=0)[0] > 1, "the light should change something"


def test_what_the_frame_cuts_off_stays_on_the_frame():
    "A model cut off at the waist does not float."
    picture = Image.new("RGB", (120, 160), "white")
    ImageDraw.Draw(picture).ellipse((40, 10, 80, 50), fill=(190, 140, 110))
    ImageDraw.Draw(picture).rectangle((30, 50, 90, 159), fill=(150, 30, 40))
    subject = GrabCut().extract(picture)
    for seed in range(6):
        for kind in ("background", "viewpoint"):
            lowest = np.asarray(ClassicalEditor().edit(subject, None, kind, seed).image)[-1].astype(int)
            assert (lowest[:, 0] - lowest[:, 1] > 70).mean() > .25, (kind, seed)


def test_the_closer_look_finds_the_mark():
    "Drawn brand marks, at a known place of plain products: most windows hold their middle."
    hits = []
    for number in range(160):
        look = describe(5, number).look
        if not look.mark or look.pattern != "plain":
            continue
        told = ClassicalEditor().edit(subject_of(number), None, "detail", number).parameters
        x, y, wide, high = (value / 160 for value in told["window"])
        (mark_x, mark_y) = DRAWN[look.kind].mark_at
        hits.append(x <= mark_x <= x + wide and y <= mark_y <= y + high)
        assert 1.5 <= told["zoom"] <= 2.2
    assert len(hits) > 20 and np.mean(hits) > .6, (len(hits), np.mean(hits))


def test_the_same_bytes_in_other_processes():
    "And whatever was drawn before."
    here = [digest(seed) for seed in range(3)]
    np.random.seed(5)
    load_cv2().setRNGSeed(17)
    assert [digest(seed) for seed in reversed(range(3))] == here[::-1]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(digest, range(3))) == here


def test_shapes_from_tiny_to_wide_are_edited():
    "Odd sizes, subjects that fill the picture or hardly show in it."
    for size in ((16, 16), (17, 90), (224, 40), (333, 224)):
        for box in ((.4, .4, .6, .6), (0, 0, 1, 1), (0, .3, 1, .9), (.05, 0, .3, 1)):
            mask = np.zeros(size[::-1], np.uint8)
            mask[
                int(box[1] * size[1]) : max(int(box[3] * size[1]), 1),
                int(box[0] * size[0]) : max(int(box[2] * size[0]), 1),
            ] = 255
            image = np.where(mask[..., None] > 0, np.uint8([180, 60, 40]), np.uint8(255))
            for kind in KINDS:
                edited = ClassicalEditor().edit(Subject(Image.fromarray(image), mask, 0.1, "drawn"), None, kind, 3)
                assert edited.image.size == size and edited.image.mode == "RGB" and edited.kind == kind
                assert json.loads(json.dumps(edited.parameters)) == edited.parameters


def test_a_product_costs_little():
    "Subject and three edits of a 224 pixel scene, processor time of one thread."
    pictures = [
        photo(draw_look(describe(5, number).look, 224), Shot(("room", "tiles")[number % 2], 0.7, props=2, seed=number))
        for number in range(10)
    ]
    spent = []
    for seed, picture in enumerate(pictures):
        start = time.process_time()
        try:
            subject = GrabCut().extract(picture)
        except DataError:
            continue
        for kind in KINDS:
            ClassicalEditor().edit(subject, None, kind, seed)
        spent.append(time.process_time() - start)
    assert len(spent) >= 5 and np.median(spent) < .25, spent


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.one_of(st.none(), st.text(max_size=600)))
def test_prompts_are_one_line_and_controlled(kind, title):
    "A title can fill its place and nothing else."
    plain, told = edit_prompt(kind, None), edit_prompt(kind, title)
    before, after = plain.split("the product", 1)
    assert told.startswith(before + "the product") and told.endswith(after) and len(told) < len(plain) + 210
    assert len(told.splitlines()) == 1 and told.count('"') in (0, 2)


# ---------------------------------------------------------------------------------------------- diffusers


@pytest.fixture(scope="module")
def tiny_pipelines(tmp_path_factory):
    "Two folders with diffusion pipelines of random weights: one that follows instructions, one made for text alone."
    import torch
    from diffusers import (
        AutoencoderKL, DDIMScheduler, StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("pipelines")
    letters = [chr(code) for code in range(33, 127)]
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    torch.manual_seed(0)
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=77, **ends,
        )
    )
    blocks = {"block_out_channels": (32, 64), "norm_num_groups": 8}
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4,
        **blocks,
    )
    for name, channels, made in (
        ("instructed", 8, StableDiffusionInstructPix2PixPipeline), ("text", 4, StableDiffusionPipeline),
    ):
        unet = UNet2DConditionModel(
            sample_size=16, in_channels=channels, out_channels=4, layers_per_block=1, cross_attention_dim=32,
            attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **blocks,
        )
        parts = {
            "vae": vae, "text_encoder": text, "tokenizer": tokenizer, "unet": unet,
            "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False), "safety_checker": None,
            "feature_extractor": None,
        }
        made(**parts, requires_safety_checker=False).save_pretrained(folder / name)
    return folder


def test_a_real_pipeline_edits(tiny_pipelines):
    "Loaded from a folder, run with the prompt of the kind; the seed decides."
    subject = subject_of(2, 72)
    editor = make_editor("diffusers", model=str(tiny_pipelines / "instructed"), steps=2, side=64, device="cpu")
    one, again, other = (editor.edit(subject, "Canvas Backpack", "background", seed) for seed in (1, 1, 2))
    assert one.image.size == (72, 72) and one.image.mode == "RGB"
    assert one.image.tobytes() == again.image.tobytes() != other.image.tobytes()
    assert (
        one.parameters["prompt"] == edit_prompt("background", "Canvas Backpack")
        and one.parameters["num_inference_steps"] == 2
    )
    assert (
        "strength" not in one.parameters and one.parameters["image_guidance_scale"] == 1.5
    )  # what this pipeline knows
    assert json.loads(json.dumps(one.parameters)) == one.parameters
    assert editor.edit(subject, "Canvas Backpack", "viewpoint", 1).image.tobytes() != one.image.tobytes()


def test_a_text_pipeline_is_taken_as_image_to_image(tiny_pipelines):
    "A model that knows no picture gets one; then there is a strength."
    editor = DiffusersEditor(str(tiny_pipelines / "text"), steps=2, strength=.9, side=64, device="cpu")
    picture = Image.new("RGB", (90, 50), "navy")
    edited = editor.edit(Subject(picture, np.full((50, 90), 255, np.uint8), 1.0, "drawn"), None, "detail", 0)
    assert (
        edited.image.size == (90, 50)
        and edited.parameters["strength"] == 0.9
        and "image_guidance_scale" not in edited.parameters
    )


def test_a_refusal_of_the_safety_checker_is_about_one_record():
    "A flagged picture (black, by the library's custom) is never taken for an edit."

    class Flags:
        def __call__(self, prompt, image, generator):
            return type("Output", (), {"images": [image], "nsfw_content_detected": [True]})

    editor = DiffusersEditor("somewhere")
    editor._pipeline = Flags()
    with pytest.raises(DataError, match="safety checker"):
        editor.edit(subject_of(1, 64), None, "detail", 0)


def test_no_pipeline_no_library(tmp_path, monkeypatch):
    "A folder without a pipeline, and a machine without diffusers."
    with pytest.raises(UsageError, match="no image-editing pipeline"):
        DiffusersEditor(str(tmp_path)).edit(subject_of(1, 64), None, "detail", 0)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(LabError, match="diffusers is not installed") as caught:
        DiffusersEditor(str(tmp_path)).edit(subject_of(1, 64), None, "detail", 0)
    assert "moon2_lab[diffusers]" in str(caught.value)


# ---------------------------------------------------------------------------------------------- servers


def picture_answer(picture):
    "A good answer of the images/edits protocol."
    saved = io.BytesIO()
    picture.save(saved, "PNG")
    return json.dumps({"data": [{"b64_json": base64.b64encode(saved.getvalue()).decode()}]}).encode()


@contextmanager
def serving(*answers):
    """A server that gives one answer after the other: (status, body, headers) or a function of the handler. Yields
    (address, requests)."""
    waiting, seen = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append((self.path, dict(self.headers), self.rfile.read(int(self.headers["content-length"]))))
            answer = waiting.pop(0)
            if callable(answer):
                return answer(self)
            status, body, headers = (*answer, {})[:3]
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *parts):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def silent(handler):
    "Says nothing for a while."
    time.sleep(.8)


def dripping(handler):
    "Sends a little at a time, for longer than anybody waits."
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    try:
        for _ in range(30):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(.05)
    except OSError:
        pass


def cut(handler):
    "Promises more than it sends."
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b"{")


GOOD = picture_answer(Image.new("RGB", (512, 512), "teal"))


def ask(url, **options):
    "One edit with a server that is asked again quickly."
    return ServerEditor(url, **({"backoff": 0.01, "retries": 2, "timeout": 0.4} | options)).edit(
        subject_of(1, 96), "Blue Mug", "background", 3
    )


def test_what_is_sent_and_what_comes_back(monkeypatch):
    "Path, key, prompt, picture and mask go out; a picture of the subject's size comes back; the key is in no record."
    monkeypatch.setenv("IMAGE_KEY", "sesame-123")
    with serving((200, GOOD)) as (url, seen):
        edited = ask(url, model="painter", key_variable="IMAGE_KEY", extra={"quality": "low"})
    path, headers, body = seen[0]
    assert path == "/v1/images/edits" and headers["Authorization"] == "Bearer sesame-123"
    for part in (
        b"painter", b'the product "Blue Mug"', b'name="image"; filename="image.png"', b'name="mask"', b"quality",
    ):
        assert part in body
    assert edited.image.size == (96, 96) and edited.image.getpixel((5, 5)) == (0, 128, 128)
    assert "sesame" not in json.dumps(edited.parameters) and edited.parameters["model"] == "painter"
    with serving((200, GOOD)) as (url, seen):
        ServerEditor(url, send_mask=False).edit(subject_of(1, 96), None, "background", 0)
    assert b'name="mask"' not in seen[0][2] and b"painter" not in seen[0][2]


@pytest.mark.parametrize(
    "first", [silent, dripping, cut, (500, b""), (503, b"busy"), (429, b"slow down", {"retry-after": "0"})],
    ids=lambda one: getattr(one, "__name__", str(one)[:6]),
)
def test_what_may_pass_is_tried_again(first):
    "Timeouts, drips, cuts, 5xx, 429."
    with serving(first, (200, GOOD)) as (url, seen):
        assert ask(url).image.size == (96, 96)
    assert len(seen) == 2


def test_a_server_that_stays_down_is_no_fault_of_the_record():
    "A LabError that says how often was tried; a server that asks for an hour gets no further try."
    with serving(*[(502, b"")] * 3) as (url, seen), pytest.raises(LabError, match="in 3 tries: HTTP 502") as caught:
        ask(url)
    assert len(seen) == 3 and not isinstance(caught.value, DataError)
    with serving((429, b"", {"retry-after": "3600"})) as (url, seen), pytest.raises(LabError, match="in 1 tries"):
        ask(url)
    with pytest.raises(LabError, match="ConnectError"):
        ask(url, retries=0)  # nobody listens there any more


@pytest.mark.parametrize(
    "body",
    [
        b"", b"hello", b"[]", b'{"data": []}', b'{"data": [{"url": "http://x"}]}', b'{"data": [{"b64_json": "%%"}]}',
        b'{"data": [{"b64_json": "aGVsbG8="}]}',
        b"[" * 100_000,
    ],
    ids=range(8),
)
def test_rubbish_is_a_data_error(body):
    "Whatever a confused server says."
    with serving((200, body)) as (url, seen), pytest.raises(DataError):
        ask(url, timeout=5)
    assert len(seen) == 1


def test_refusals(monkeypatch):
    "About this picture: set aside. About everything: stop. The key is never repeated, however the server shouts it."
    monkeypatch.setenv("IMAGE_KEY", "sesame-123")
    with serving((400, b"moderation: blocked")) as (url, _), pytest.raises(DataError, match="moderation: blocked"):
        ask(url)
    for status in (401, 403, 404, 302):
        with serving((status, b"bad key sesame-123")) as (url, seen), pytest.raises(Refused) as caught:
            ask(url, key_variable="IMAGE_KEY")
        assert "sesame" not in str(caught.value) and len(seen) == 1
    monkeypatch.setattr("moon2_lab.augment.image_edits._MAX_PICTURE_BYTES", 1000)
    with serving((200, GOOD)) as (url, _), pytest.raises(DataError, match="more than 1,000 bytes"):
        ask(url)
