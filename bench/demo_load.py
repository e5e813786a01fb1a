"""The search page under load: 20 clients ask 200 searches each, all at the same time, of the app in a process of its
own, on two cores.

Every answer is compared with the exact one, computed beforehand in this process by the same model: a search is lost
when no answer comes, wrong when a hit or a score (beyond 1e-5) differs. Told are lost, wrong,
median, 95th percentile and longest wait, searches a second, and the memory of the app before and after. The clients use
the same cores as the app.

    python bench/demo_load.py --model runs/demo --catalog path/to/catalogue
    python bench/demo_load.py --products 50000 --clients 1    # each product many times, its vectors moved a little
"""
import contextlib
import http.client
import itertools
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SCORE, WAIT = 1e-5, 120.0  # allowed difference of a score; seconds after which a search is lost


# ---------------------------------------------------------------------------------------------- the app


class App(NamedTuple):
    "A running app."
    address: str
    pid: int
    log: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(
    words: Sequence[str], folder: Path, env: dict[str, str], cores: int = 0, seconds: float = 120
) -> Iterator[App]:
    """The program `words` (PORT in them is replaced) while it serves; on `cores` cores, 0 = all. RuntimeError with its
    last lines when it does not start.
    """
    port, places = free_port(), sorted(os.sched_getaffinity(0))[: cores or None]
    with tempfile.TemporaryDirectory() as work:
        log = Path(work) / "log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [word.replace("PORT", str(port)) for word in words], cwd=folder,
                env=env | {"GRADIO_SERVER_PORT": str(port)}, stdout=file, stderr=subprocess.STDOUT,
                preexec_fn=lambda: os.sched_setaffinity(0, places),
            )
        try:
            until = time.monotonic() + seconds
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the app did not start: {log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield App(f"127.0.0.1:{port}", process.pid, log)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/gradio_api/info")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def app_words(model: Path, catalog: Path, vectors: Sequence[Path] = ()) -> list[str]:
    "How the search page is started on all products of a catalogue, of files of vectors where there are some."
    stored = [word for path in vectors for word in ("--vectors", str(path))]
    return [
        sys.executable, str(ROOT / "apps" / "retrieval_demo.py"), str(model), "--catalog", str(catalog), "--split",
        "all", "--port", "PORT", *stored,
    ]


def memory(pid: int) -> float:
    "Resident memory of a process and its children, MiB."
    import psutil

    process = psutil.Process(pid)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True))) / 2**20


def peak_memory(pid: int) -> float:
    "The most it ever was, MiB."
    return (
        next(
            int(line.split()[1])
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        / 1024
    )


# ---------------------------------------------------------------------------------------------- what is asked


class Question(NamedTuple):
    "A search; `picture` is a place in the list of pictures."
    text: str
    picture: int | None
    direction: str
    k: int
    filter: str


def make_questions(shop, count: int, pictures: int, seed: int = 0) -> list[Question]:
    "Different ones: every tenth with a picture, every fifth with a filter, in all three views."
    from moon2_lab.data.queries import Lexicon, search_phrase

    chance, lexicon, filters = (
        random.Random(seed), Lexicon(shop.catalog.whole), [expression for _, expression in shop.categories()],
    )
    found = []
    for number in range(count):
        product = shop.catalog[chance.randrange(len(shop.catalog))]
        text = search_phrase(product, number % 3, lexicon) or product.title or "lamp"
        found.append(
            Question(
                text, number // 10 % pictures if number % 10 == 9 else None, ("mm", "t", "i")[number % 3],
                1 + number % 20, chance.choice(filters) if number % 5 == 3 and filters else "",
            )
        )
    return found


def expected_answers(shop, questions: Sequence[Question], pictures: Sequence[Path]) -> list[dict]:
    "For each question the score of every product that may be found, and the ids of the hits, best first."
    from moon2_lab.retrieval.query_input import query_item

    told = []
    for one in questions:
        found = shop.find(
            query_item(one.text, None if one.picture is None else pictures[one.picture]), one.direction, one.k,
            one.filter, "A",
        )
        told.append(
            {
                "ids": [product.product_id for product, _ in found], "scores": [score for _, score in found],
                "titles": [product.title for product, _ in found],
            }
        )
    return told


def is_right(expected: dict, hits: list[dict]) -> bool:
    "The same products with the same scores and titles, best first; products of equal scores may change places."
    known = {
        name: (score, title) for name, score, title in zip(expected["ids"], expected["scores"], expected["titles"])
    }
    if [hit["score"] for hit in hits] != sorted((hit["score"] for hit in hits), reverse=True) or sorted(
        hit["product_id"] for hit in hits
    ) != sorted(known):
        return False
    return all(
        abs(hit["score"] - known[hit["product_id"]][0]) <= SCORE and hit["title"] == known[hit["product_id"]][1]
        for hit in hits
    )


# ---------------------------------------------------------------------------------------------- who asks


class Client:
    "Asks over one connection that is kept open, in one session, as a page does."

    def __init__(self, address: str):
        self.address, self.connection, self.session = address, None, uuid.uuid4().hex

    def send(
        self, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> tuple[int, bytes]:
        "Status and body of the answer; after an error the next call opens a new connection."
        if self.connection is None:
            self.connection = http.client.HTTPConnection(self.address, timeout=WAIT)
        try:
            self.connection.request(method, path, body, {"Content-Type": kind} if body is not None else {})
            answer = self.connection.getresponse()
            told = answer.status, answer.read()
            if answer.status >= 500:  # the server hangs up after it
                self.close()
            return told
        except (OSError, http.client.HTTPException):
            self.close()
            raise

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def upload(self, content: bytes, name: str = "photo.jpg") -> tuple[int, bytes]:
        "Give a file; on success the body is a list with its path on the server."
        mark = uuid.uuid4().hex
        disposition = f'Content-Disposition: form-data; name="files"; filename="{name}"'
        head = f"--{mark}\r\n{disposition}\r\nContent-Type: application/octet-stream\r\n\r\n"
        return self.send(
            "POST", "/gradio_api/upload", head.encode() + content + f"\r\n--{mark}--\r\n".encode(),
            f"multipart/form-data; boundary={mark}",
        )

    def call(self, data: list | None, endpoint: str = "search", raw: bytes | None = None) -> tuple[int, str, object]:
        "Status, event (complete, error or none) and what came with it."
        status, body = self.send(
            "POST", f"/gradio_api/call/{endpoint}",
            raw if raw is not None else json.dumps({"data": data, "session_hash": self.session}).encode(),
        )
        if status != 200:
            return status, "", body.decode("utf-8", "replace")
        status, body = self.send("GET", f"/gradio_api/call/{endpoint}/{json.loads(body)['event_id']}")
        events = [part for part in body.decode().split("\n\n") if part.strip() and "event: heartbeat" not in part]
        name, _, told = events[-1].strip().partition("\n") if events else ("", "", "")
        return status, name.removeprefix("event: "), json.loads(told.removeprefix("data: ") or "null")


def picture_data(path: str) -> dict:
    "How an uploaded picture is named in a call."
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def ask(client: Client, one: Question, uploaded: Sequence[str]) -> list[dict]:
    "The hits; RuntimeError when there are none."
    status, event, told = client.call(
        [
            one.text, None if one.picture is None else picture_data(uploaded[one.picture]), one.direction, one.k,
            one.filter, "A",
        ]
    )
    if status != 200 or event != "complete":
        raise RuntimeError(f"{status} {event} {str(told)[:200]}")
    return told[0]["hits"]


def load(
    address: str, clients: int, searches: int, questions: Sequence[Question], expected: Sequence[dict],
    pictures: Sequence[Path],
) -> dict:
    "All clients at once; each begins at another question. Counts, waits, and the first complaints."
    waits, wrong, lost = [[] for _ in range(clients)], [], []
    ready = threading.Barrier(clients + 1)

    def work(number: int) -> None:
        client = Client(address)
        try:
            uploaded = [json.loads(client.upload(path.read_bytes())[1])[0] for path in pictures]
        finally:
            ready.wait()
        for place in itertools.islice(itertools.count(number * len(questions) // clients), searches):
            one, begun = place % len(questions), time.perf_counter()
            try:
                hits = ask(client, questions[one], uploaded)
            except (OSError, http.client.HTTPException, RuntimeError, ValueError, LookupError, TypeError) as error:
                lost.append(f"{questions[one]}: {type(error).__name__} {error}")
                continue
            waits[number].append(time.perf_counter() - begun)
            if not is_right(expected[one], hits):
                wrong.append(f"{questions[one]}: {hits[:2]}, expected {expected[one]['ids'][:2]}")
        client.close()

    threads = [threading.Thread(target=work, args=[number]) for number in range(clients)]
    for thread in threads:
        thread.start()
    ready.wait()
    begun = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds, all_waits = time.perf_counter() - begun, sorted(itertools.chain(*waits))
    asked = clients * searches
    told = {
        "asked": asked, "answered": len(all_waits), "lost": asked - len(all_waits), "wrong": len(wrong),
        "seconds": round(seconds, 2), "per_second": round(len(all_waits) / seconds, 1),
        "complaints": (lost + wrong)[:5],
    }
    return told | (
        {
            "p50_ms": _ms(statistics.median(all_waits)), "p95_ms": _ms(all_waits[int(0.95 * (len(all_waits) - 1))]),
            "max_ms": _ms(all_waits[-1]),
        }
        if all_waits
        else {}
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def measure(app: App, shop, clients: int, searches: int, pictures: Sequence[Path], kinds: int = 400) -> dict:
    "Warm the app up, load it, and read its memory before and after."
    questions = make_questions(shop, min(kinds, clients * searches), len(pictures))
    expected = expected_answers(shop, questions, pictures)
    load(app.address, 2, 20, questions, expected, pictures)
    before = memory(app.pid)
    told = load(app.address, clients, searches, questions, expected, pictures)
    return told | {
        "clients": clients, "searches_each": searches, "different_questions": len(questions),
        "memory_mib": {
            "before": round(before, 1), "after": round(memory(app.pid), 1), "peak": round(peak_memory(app.pid), 1),
        },
    }


# ---------------------------------------------------------------------------------------------- the benchmark


def material(args, work: Path) -> tuple[Path, Path]:
    "Folders of the model and the catalogue: those named, else made now."
    from moon2_lab.data.synthetic.generator import make_catalog
    from moon2_lab.model.encoder import Moon2Encoder, perturb_experts

    model, catalog = args.model, args.catalog
    if not catalog:
        catalog = work / "shop"
        make_catalog(catalog, products=60 if args.quick else 300, seed=0, image_size=128)
    if not model:
        model = work / "model"
        perturb_experts(Moon2Encoder.from_backbone(args.backbone), 0.05).eval().save_pretrained(model)
    return Path(model).resolve(), Path(catalog).resolve()


def large_catalogue(encoder, path: Path, products: int, work: Path) -> tuple[Path, Path]:
    """A catalogue of so many products, those of `path` over and over under ids of their own, and a file of its vectors:
    those of `encoder`, each turned a little another way (noise of a third of its length), so that no two are equal.
    """
    import numpy as np
    import pandas as pd

    from moon2_lab.data.catalog import Catalog
    from moon2_lab.retrieval.embed import embed_catalog
    from moon2_lab.retrieval.vectors import VectorBlock, VectorFile

    folder, base, stored = work / "large", work / "base.parquet", work / "large.parquet"
    shutil.copytree(path, folder, ignore=shutil.ignore_patterns("*.parquet"))
    rows = pd.read_parquet(path / "products.parquet")
    copies = -(-products // len(rows))
    many = pd.concat([rows.assign(product_id=rows.product_id + f"-{copy}") for copy in range(copies)])[:products]
    many.to_parquet(folder / "products.parquet", index=False)
    embed_catalog(encoder, Catalog.load(path), base, view="all")
    file, kept, chance = VectorFile(base), set(many.product_id), np.random.default_rng(0)
    block, made = file.read(), []
    for copy in range(copies):
        noise = chance.standard_normal(block.vectors.shape, dtype=np.float32) / np.sqrt(9 * block.vectors.shape[1])
        moved = block.vectors + noise
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        one = VectorBlock([f"{name}-{copy}" for name in block.ids], block.views, moved, block.payload)
        made.append(one.take([place for place, name in enumerate(one.ids) if name in kept]))
    return folder, VectorBlock.join(made).write(stored, about=file.about)


def some_pictures(catalog, work: Path, count: int = 3) -> list[Path]:
    "Photos of products as files."
    products = [product for product in catalog if product.has_image][:count]
    for number, product in enumerate(products):
        product.image().save(work / f"photo{number}.jpg", quality=90)
    return [work / f"photo{number}.jpg" for number in range(len(products))]


def run(args) -> dict:
    from moon2_lab.app.service import SearchService, open_model
    from moon2_lab.data.catalog import Catalog

    with tempfile.TemporaryDirectory() as folder:
        model, path = material(args, work := Path(folder))
        encoder, vectors = open_model(model), []
        if args.products:
            path, stored = large_catalogue(encoder, path, args.products, work)
            vectors = [stored]
        catalog = Catalog.load(path)
        shop, pictures = SearchService(catalog, {"A": encoder}, vectors=vectors), some_pictures(catalog, work)
        env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "GRADIO_TEMP_DIR": str(work / "uploads")}
        begun = time.perf_counter()
        with serving(app_words(model, path, vectors), work, env, args.cores, seconds=600) as app:
            ready = time.perf_counter() - begun
            told = measure(app, shop, args.clients, args.searches, pictures)
        about = {"model": shop.models["A"].label, "products": len(catalog), "cores": args.cores}
        return told | about | {"ready_s": round(ready, 1)}


def main() -> None:
    from common import finish, options, own_cache, start

    parser = options(__doc__)
    parser.add_argument("--model", help="run or model folder; without it an untrained model of --backbone")
    parser.add_argument("--products", type=int, default=0, help="a catalogue of so many, made of those that there are")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--searches", type=int, default=200, help="of each client")
    parser.add_argument("--cores", type=int, default=2, help="that the app may use")
    args = parser.parse_args()
    about = start(args)
    if args.quick:
        args.clients, args.searches = 4, 10
    with own_cache(args.backbone):
        told = run(args)
    memory_, sound = (
        told["memory_mib"],
        "none lost, none wrong"
        if not told["lost"] + told["wrong"]
        else f"{told['lost']} LOST, {told['wrong']} WRONG: {told['complaints']}",
    )
    print(
        f"{told['clients']} clients x {told['searches_each']} searches: {sound}; {told['per_second']:.0f} a second, "
        f"median {told['p50_ms']:.0f} ms, p95 {told['p95_ms']:.0f} ms, longest {told['max_ms']:.0f} ms; "
        f"memory {memory_['before']:.0f} -> {memory_['after']:.0f} MiB"
    )
    finish(args, {"benchmark": "demo_load", **about, "results": [told]})


if __name__ == "__main__":
    main()
