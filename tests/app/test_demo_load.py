"""The search page under load, and under 500 requests that are wrong: every answer right, every error clear, nothing
told that is nobody's business."""
import http.client
import io
import json
import os
import random
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from choosing import few
from PIL import Image

pytest.importorskip("gradio")

from bench.demo_load import (
    App, Client, app_words, ask, expected_answers, is_right, large_catalogue, make_questions, measure, memory,
    peak_memory, picture_data, serving, some_pictures,
)
from moon2_lab.app.service import SearchService
from moon2_lab.data.catalog import Catalog
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts
from moon2_lab.retrieval.vectors import VectorFile

pytestmark = pytest.mark.usefixtures("own_cache")
REQUESTS, SECRET = 500, "the-secret-of-the-shop"
GOOD = ["red bag", None, "mm", 3, "", "A"]
MEGABYTE = 2**20


class Place(NamedTuple):
    "What the wrong requests know: folders of the server, and the file of a picture that was not uploaded."
    work: Path
    uploads: Path
    picture: Path
    secret: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    work = tmp_path_factory.mktemp("server")
    (work / "uploads").mkdir()
    (work / "secret.ini").write_text(SECRET)
    Image.new("RGB", (64, 64), "red").save(work / "photo.png")
    for number, target in enumerate((work / "photo.png", work / "secret.ini")):
        (work / "uploads" / f"link{number}.png").symlink_to(target)
    return Place(work, work / "uploads", work / "photo.png", work / "secret.ini")


@pytest.fixture(scope="module")
def shop(drawn_catalogue, place) -> SearchService:
    "The same model and products as in the app."
    encoder = perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=2, seed=1), 0.05, seed=1).eval()
    encoder.save_pretrained(place.work / "run" / "model")
    return SearchService(Catalog.load(drawn_catalogue), {"A": encoder})


@pytest.fixture(scope="module")
def app(shop, drawn_catalogue, place) -> App:
    "The app, in a process of its own."
    env = os.environ | {"OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(place.uploads)}
    with serving(app_words(place.work / "run", drawn_catalogue), place.work, env, cores=2) as running:
        yield running


# ---------------------------------------------------------------------------------------------- memory


def reset_peak(pid: int) -> None:
    "Begin to measure the most memory anew."
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def many_pixels(kind: str) -> bytes:
    "A file of a few kilobytes with nearly as many pixels as are allowed."
    Image.new("RGBA" if kind in ("WEBP", "PNG") else "RGB", (5000, 5000), "#33669980").save(
        buffer := io.BytesIO(), kind, **({"lossless": True} if kind == "WEBP" else {})
    )
    return buffer.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", few(["WEBP", "PNG", "JPEG"], "JPEG"))
def test_pictures_of_many_pixels_take_turns(app, kind):
    "Six at once of 25 million pixels: they are decoded one at a time, and what that took is given back."
    data, answers, first = many_pixels(kind), [], Client(app.address)
    assert with_file(first, data, f"first.{kind.lower()}").event == "complete"  # the readers of this format are loaded
    before = memory(app.pid)
    reset_peak(app.pid)

    def work():
        client = Client(app.address)
        answers.append(with_file(client, data, f"large.{kind.lower()}"))
        client.close()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.event for answer in answers] == ["complete"] * 6, answers
    most = peak_memory(app.pid) - before
    first.close()
    with_file(
        first, jpeg(), "small.jpg"
    )  # the answers are over now; what they took is given back with the next picture
    after = memory(app.pid) - before
    first.close()
    print(f"{kind}: {len(data):,} bytes, at most {most:.0f} MiB more, {after:.0f} MiB after")
    assert most < 700 and after < 200, (most, after)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_body_is_not_kept(app):
    "50 MB of JSON are refused in words, and take no memory."
    client = Client(app.address)
    call(client, GOOD)
    before = memory(app.pid)
    reset_peak(app.pid)
    status, body = client.send("POST", "/gradio_api/call/search", b"[" + b" " * 50 * MEGABYTE + b"]")
    client.close()
    assert status == 413 and "at most 1 MB" in body.decode()
    assert peak_memory(app.pid) - before < 40


# ---------------------------------------------------------------------------------------------- load


def under_load(app, shop, place, clients, searches):
    told = measure(app, shop, clients, searches, some_pictures(shop.catalog, place.work), kinds=120)
    assert (told["asked"], told["lost"], told["wrong"]) == (clients * searches, 0, 0), told["complaints"]
    assert (
        0 < told["p50_ms"] <= told["p95_ms"] <= told["max_ms"] < 20_000
        and told["memory_mib"]["after"] - told["memory_mib"]["before"] < 150
    ), told


def test_a_few_clients_at_once(app, shop, place):
    "5 clients x 20 searches by words and pictures, in all views, with filters: none lost, each answer exact."
    under_load(app, shop, place, 5, 20)


@pytest.mark.slow
def test_many_clients_at_once(app, shop, place):
    "20 clients x 200 searches."
    under_load(app, shop, place, 20, 200)


def test_a_large_catalogue_of_a_small_one(shop, tmp_path):
    "So many products with a vector of each view that they have; no two are equal, all stay near the one they are of."
    path = Path(shop.catalog.folder)
    folder, stored = large_catalogue(shop.models["A"].encoder, path, 150, tmp_path)
    many, block = Catalog.load(folder), VectorFile(stored).read()
    assert len(many) == 150 and set(block.ids) == {product.product_id for product in many}
    view = np.array(block.views) == "t"
    first = VectorFile(tmp_path / "base.parquet").read()
    known = dict(zip(zip(first.ids, first.views), first.vectors))
    lines = zip(np.array(block.ids)[view], block.vectors[view])
    near = [known[name.rsplit("-", 1)[0], "t"] @ vector for name, vector in lines]
    assert len(np.unique(block.vectors[view], axis=0)) == view.sum() and 0.9 < min(near) < max(near) < 0.99


def test_a_wrong_answer_would_be_seen(shop):
    "The comparison of the load test: order, scores, titles and number count; equal scores may change places."
    expected = {"ids": ["a", "b", "c"], "scores": [0.9, 0.5, 0.5], "titles": ["A", "B", "C"]}
    hits = [{"product_id": name, "score": score, "title": title} for name, score, title in zip(*expected.values())]
    assert is_right(expected, hits) and is_right(expected, [hits[0], hits[2], hits[1]])
    assert (
        not is_right(expected, hits[:2])
        and not is_right(expected, [hits[1], hits[0], hits[2]])
        and not is_right(expected, [hits[0] | {"product_id": "d"}, *hits[1:]])
    )
    assert not is_right(expected, [hits[0] | {"score": 0.91}, *hits[1:]]) and not is_right(
        expected, [hits[0] | {"title": "B"}, *hits[1:]]
    )
    questions = make_questions(shop, 40, 2)
    assert (
        len({(one.text, one.k) for one in questions}) > 20
        and {one.direction for one in questions} == {"t", "i", "mm"}
        and {one.picture for one in questions} == {None, 0, 1}
        and any(one.filter for one in questions)
    )


# ---------------------------------------------------------------------------------------------- wrong requests


class Answer(NamedTuple):
    "Of the app to a request; `event` is complete, error, or empty when there was none."
    status: int
    event: str
    body: str
    sent: str  # what may come back: an error may repeat what was asked


def call(client: Client, data: list | None = None, endpoint: str = "search", raw: bytes | None = None) -> Answer:
    status, event, told = client.call(data, endpoint, raw)
    return Answer(
        status, event, json.dumps(told) if event else str(told),
        json.dumps(data) if raw is None else raw.decode("utf-8", "replace"),
    )


def fetch(client: Client, method: str, path: str, body: bytes | None = None) -> Answer:
    status, content = client.send(method, path, body)
    return Answer(status, "", content.decode("utf-8", "replace"), path)


def with_file(client: Client, content: bytes, name: str) -> Answer:
    "Upload it, and search by it where it was taken."
    status, body = client.upload(content, name)
    if status != 200:
        return Answer(status, "", body.decode("utf-8", "replace"), name)
    path = json.loads(body)[0]
    answer = call(client, ["red bag", picture_data(path), "mm", 3, "", "A"])
    return answer._replace(sent=answer.sent + path)


def png(width: int, height: int, rows: int) -> bytes:
    "A grey PNG that claims width x height and holds `rows` black rows."
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(bytes(width + 1)) for _ in range(rows)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((300, 300), 80).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


BODY = json.dumps({"data": GOOD}).encode()
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><image href="file:///etc/passwd"/></svg>'
LINK = {"_type": "gradio.FileData"}
TRICKS = [
    "/etc/passwd", "../../settings.ini", "../../../../../../etc/passwd", "file:///etc/passwd", "/proc/self/environ",
    "~/.ssh/id_rsa", "/tmp/\0", "/", ".", "a" * 5000, "settings.ini", "\\\\host\\share", "C:\\x",
]
STREAMS = [{"is_stream": True}, {"url": "/gradio_api/file=/etc/passwd"}, {"orig_name": "a.png"}]
CODE = [
    "__import__('os').system('id')", "().__class__.__bases__", "open('/etc/passwd').read()", "colour == open('x')",
    "lambda: 1", "[x for x in ()]", "colour == f'{1}'", "1/0",
    "(" * 900,
    "-" * 990 + "1", "colour == 'a'; import os", "colour == 'red'\0",
    "'); DROP TABLE products; --",
    "{{7*7}}", "colour == 'red' or True", "not " * 200 + "colour", "x" * MEGABYTE, "colour ==", "size < 3",
    "no_field == 'a'", "\ud7ff\U0010ffff == 1",
]
VALUES: dict[str, tuple[int, list]] = {  # kind -> which of the six values, and what it is instead
    "text that is no text": (0, [5, 0.5, True, ["red", "bag"], {"text": "red"}, [["red"]]]),
    "giant text": (0, [part * MEGABYTE for part in ("red ", "x", "\u4e2d", "\0")]),
    "nothing but blanks": (0, ["", " ", "\n\t", "\u3000", None]),
    "nothing but control characters": (0, ["\0", "\x01\x02\x1b", "\x7f\x85", " \0 \0 "]),
    "half of a character": (0, ["\ud800", "\udfff", "\ud83d \ud83d"]),
    "picture by a path of the server": (
        1,
        [picture_data(path) for path in [*TRICKS, "SECRET", "PICTURE"]]
        + [picture_data("/etc/passwd") | more for more in STREAMS],
    ),
    "picture by a path, not as a file": (
        1,
        [
            {"path": "PICTURE"}, {"path": "SECRET"}, {"path": "/dev/null"}, {"path": "PICTURE", "meta": {}},
            {"path": "UPLOADS/../nothing.png"},
        ],
    ),
    "picture by a link in the upload folder": (1, [picture_data(f"UPLOADS/link{number}.png") for number in range(2)]),
    "picture by an address": (
        1,
        [
            picture_data(f"http://{host}")
            for host in (
                "127.0.0.1:1/x.png", "169.254.169.254/latest/meta-data", "localhost/x.png", "[::1]/x.png", "0/", "",
            )
        ],
    ),
    "picture that is no file": (
        1,
        [
            3, True, "/etc/passwd", "data:image/png;base64,AAAA", [1, 2], {"path": 3}, {"x": 1},
            {"path": "x", "meta": []}, {"path": "x", "meta": LINK, "size": "big"},
        ],
    ),
    "direction that is not there": (2, ["x", "", "MM", "mm ", "t->mm", None, 3, ["mm"], {"mm": 1}, "\0", "x" * 3000]),
    "k that is no number": (3, ["x", "3", "", [3], {}, [], None, float("nan"), float("inf"), float("-inf")]),
    "k out of range": (3, [-1, 0, -1e9, 1e9, 1e18, 10**30, 101, -0.2]), "k that is not whole": (3, [5.7, 2.5, True]),
    "filter with code": (4, CODE), "filter that is no text": (4, [1, ["colour == 'red'"], {"colour": "red"}]),
    "model that is not there": (5, ["C", "B", "", "a", None, 1, ["A"], {"A": 1}, "../A", "A\0"]),
    "giant value where a word is expected": (5, ["x" * MEGABYTE, ["x" * MEGABYTE]]),
}
NO_BODY = [
    b"{}", b"[]", b"null", b"3", b'"data"', b'{"data": {"text": "red"}}', b'{"data": "red bag"}', b'{"data": null}',
    b'{"dta": []}',
]
ENDPOINTS = ["nothing", "look_up", "predict", "lambda", "search2", "__init__", "%2e%2e%2fsearch", "0", "x" * 3000]
ROUTES = [
    "file=/etc/passwd", "file=%2fetc%2fpasswd", "file=../../settings.ini", "file=..%2f..%2fsettings.ini",
    "file=settings.ini", "file=file:///etc/passwd", "file=http://127.0.0.1:1/x", "proxy=http://127.0.0.1:1/x",
    "file=SECRET", "file=PICTURE", "file=UPLOADS/link1.png", "stream/..%2f..%2f/x/y", "run/search", "queue/join",
    "component_server", "file=/proc/self/environ", "file=", "file=/", "upload",
]
NO_PICTURES = [b"hello", SVG, b"%PDF-1.4", b"PK\x03\x04", b"GIF89a", b"<html>" * 1000, b"MZ" + bytes(500)]
NAMES = ["photo.png", "photo.svg", "../../photo.png", "photo.jpg\0.png", "..", "a" * 300 + ".png", "photo.html"]
CLAIMED = [(60_000, 60_000), (2**31 - 1, 1), (1, 2**31 - 1), (100_000, 3_000)]
NO_HEAT = [
    ["red", None, name, method, -1, -1, "A"] for name in ("nobody", None, "x" * MEGABYTE) for method in ("ig", "magic")
] + [["", None, "nobody", "ig", -1, -1, "A"], ["red"]]


def one_value(kind: str) -> Callable:
    "A good request in which one value is another one."
    def send(client, chance, place):
        position, values = VALUES[kind]
        return call(client, placed([*GOOD[:position], chance.choice(values), *GOOD[position + 1 :]], place))

    return send


def placed(given, place: Place):
    "With the places that only the server's owner knows."
    if isinstance(given, str):
        return (
            given.replace("SECRET", str(place.secret))
            .replace("PICTURE", str(place.picture))
            .replace("UPLOADS", str(place.uploads))
            if len(given) < 99
            else given
        )
    if isinstance(given, dict):
        return {name: placed(value, place) for name, value in given.items()}
    return [placed(value, place) for value in given] if isinstance(given, list) else given


KINDS: dict[str, list[Callable]] = (
    {kind: [one_value(kind)] for kind in VALUES}
    | {  # kind -> ways: (client, chance, place) -> Answer
        "body that is no JSON": [
            lambda client, chance, place: call(client, raw=BODY[: chance.randrange(len(BODY) - 1)]),
            lambda client, chance, place: call(client, raw=chance.randbytes(chance.randrange(1, 300))),
            lambda client, chance, place: call(client, raw=b"[" * chance.randrange(1, 50_000)),
            lambda client, chance, place: call(client, raw=BODY + b"}"),
        ],
        "JSON of another form": [lambda client, chance, place: call(client, raw=chance.choice(NO_BODY))],
        "too few values": [lambda client, chance, place: call(client, GOOD[: chance.randrange(6)])],
        "too many values": [
            lambda client, chance, place: call(
                client, GOOD + [chance.choice([None, 1, "x", {}])] * chance.randrange(1, 50)
            )
        ],
        "endpoint that is not there": [lambda client, chance, place: call(client, GOOD, chance.choice(ENDPOINTS))],
        "cut or broken picture": [
            lambda client, chance, place: with_file(
                client, (whole := jpeg())[: chance.randrange(1, len(whole) // 2)], "photo.jpg"
            ),
            lambda client, chance, place: with_file(client, chance.randbytes(2000), "photo.webp"),
            lambda client, chance, place: with_file(client, b"", "empty.png"),
            lambda client, chance, place: with_file(
                client, png(3000, 3000, 3000)[: chance.randrange(60, 3000)], "cut.png"
            ),
        ],
        "file that is no picture": [
            lambda client, chance, place: with_file(client, chance.choice(NO_PICTURES), chance.choice(NAMES))
        ],
        "picture that claims too much": [
            lambda client, chance, place: with_file(client, png(*chance.choice(CLAIMED), 0), "photo.png")
        ],
        "picture that is a bomb": [lambda client, chance, place: with_file(client, bomb(), "bomb.png")],
        "file that is too large": [lambda client, chance, place: with_file(client, bytes(40 * MEGABYTE), "large.png")],
        "file asked by its path": [
            lambda client, chance, place: fetch(
                client, chance.choice(["GET", "GET", "POST"]), "/gradio_api/" + placed(chance.choice(ROUTES), place)
            )
        ],
        "heatmap of nothing": [lambda client, chance, place: call(client, chance.choice(NO_HEAT), "heatmap")],
    }
)
FEW = {
    "picture that is a bomb": 3, "file that is too large": 2, "giant text": 10,
    "giant value where a word is expected": 4,
}  # what takes long


def bomb() -> bytes:
    "25 kB that decode to 67 million pixels, just too many."
    return png(8192, 8193, 8193)


def plan(seed: int = 7) -> list[str]:
    "The kinds of all requests, in a mixed order."
    often = [kind for kind in KINDS if kind not in FEW]
    rest = REQUESTS - sum(FEW.values())
    kinds = [kind for kind, count in FEW.items() for _ in range(count)] + [
        often[number % len(often)] for number in range(rest)
    ]
    random.Random(seed).shuffle(kinds)
    return kinds


@pytest.fixture(scope="module")
def wrong_requests(app, place) -> dict:
    "What the app said to all of them, by kind; its memory at the start, in the middle and at the end."
    client, chance, answers = Client(app.address), random.Random(11), {kind: [] for kind in KINDS}
    call(client, GOOD)
    held, begun = [memory(app.pid)], time.monotonic()
    for number, kind in enumerate(plan(), 1):
        ways = KINDS[kind]
        try:
            answers[kind].append(ways[len(answers[kind]) % len(ways)](client, chance, place))
        except (OSError, http.client.HTTPException) as error:  # a connection has to be closed in order, with an answer
            answers[kind].append(Answer(0, "", f"{type(error).__name__}: {error}", ""))
        if number % (REQUESTS // 2) == 0:
            held.append(memory(app.pid))
    client.close()
    return {"answers": answers, "memory": held, "seconds": time.monotonic() - begun}


def complaints(answer: Answer, private: list[str]) -> list[str]:
    "What is wrong with an answer to a wrong request."
    found, said = [], answer.body
    if '"hits"' in said or answer.event == "complete":
        found.append("hits for nonsense")
    if answer.status == 0 or answer.status >= 500:
        found.append(f"no orderly answer: {answer.status} {said[:80]}")
    if any(word in said for word in ("Traceback", "site-packages", 'File "', " object at 0x")):
        found.append("the inside of the program")
    found += [f"content or place of a file: {word}" for word in private if word in said and word not in answer.sent]
    if answer.event == "error" and (
        not isinstance(told := json.loads(said), dict)
        or not told.get("error")
        or "failed on the server" in told["error"]
    ):
        found.append(f"no clear error: {said[:120]}")
    if len(said) > 20_000:
        found.append(f"an error of {len(said):,} characters")
    return found


@pytest.fixture(scope="module")
def private(place, root, drawn_catalogue) -> list[str]:
    "What no answer may hold, if it was not in the request."
    return [
        SECRET, "root:x:0:0",
        *map(str, (place.work, place.uploads, root, drawn_catalogue, Path.home() / ".cache", sys.prefix)),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_requests_get_clear_errors(wrong_requests, private, kind):
    "No hits for nonsense, no traceback, no content or place of a file, and words that say what is wrong."
    answers = wrong_requests["answers"][kind]
    assert len(answers) >= 2
    found = [(answer.sent[:120], complaint) for answer in answers for complaint in complaints(answer, private)]
    assert not found, f"{len(found)} of {len(answers)}: {found[:6]}"


def test_after_all_of_them(wrong_requests, app, shop, place):
    """500 were sent; the app lives, has not grown, has written nothing outside its upload folder, and gives right
    answers."""
    assert sum(map(len, wrong_requests["answers"].values())) == REQUESTS
    start, middle, end = wrong_requests["memory"]
    assert end - start < 400 and end - middle < 100, wrong_requests["memory"]
    assert {path.name for path in place.work.iterdir()} <= {
        "run", "uploads", "photo.png", "secret.ini", "photo0.jpg", "photo1.jpg", "photo2.jpg",
    }
    pictures = some_pictures(shop.catalog, place.work)
    questions, client = make_questions(shop, 20, len(pictures), seed=5), Client(app.address)
    uploaded = [json.loads(client.upload(path.read_bytes())[1])[0] for path in pictures]
    assert all(
        is_right(expected, ask(client, one, uploaded))
        for one, expected in zip(questions, expected_answers(shop, questions, pictures))
    )
    client.close()


def test_a_bad_answer_would_be_seen():
    "The checks find what they are there for."
    private = ["/srv/app", SECRET]
    fine = Answer(200, "error", '{"error": "K=0. 1 or more."}', "[0]")
    assert (
        not complaints(fine, private)
        and not complaints(Answer(422, "", "not JSON", ""), private)
        and not complaints(fine._replace(body='{"error": "no /srv/app/x"}', sent="/srv/app/x"), private)
    )
    errors = [None, "no /srv/app/x", "<A object at 0x7f>", SECRET, "This failed on the server", "x" * 30_000]
    for wrong in (
        {"event": "complete", "body": '[{"hits": []}]'}, {"status": 500, "event": "", "body": "Internal Server Error"},
        {"status": 0}, *({"body": json.dumps({"error": error})} for error in errors),
    ):
        assert len(complaints(fine._replace(**wrong), private)) == 1, wrong
