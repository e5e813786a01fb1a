"""Search in a store of Milvus Lite against plain faiss-cpu, at equal recall.

Clustered random vectors (--count, --dim). Both arms build the same indexes with the same parameters: HNSW (M 16,
efConstruction 200) and IVF (nlist about the square root of the count), and exact search. Each search
parameter gives a point: recall@10 against exact search, queries a second when asked one by one, and in batches of 100.
Told are the curves, the ratio of queries a second at recall .95 and .99 (interpolated on a log
scale), build seconds and bytes. The same number of queries is also sent to a store of one vector: that is what the way
to the store costs, whatever the index does; and it is told in which functions of the store the time of a request goes.

With --filtered instead: `MilvusSearcher.search` with filters that keep from a thousandth of the products to all of
them, against exact arithmetic: recall@10, the fewest hits, seconds a search; beside it the recall of the graph alone.

    python bench/index.py [--filtered]
"""
import collections
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import faiss
import numpy as np
from common import finish, median, options, start

EF, NPROBE, K = (16, 32, 64, 128, 256), (1, 4, 16, 64, 128, 256), 10
SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6, 1)  # of the products that a filter keeps


def clustered(count: int, dim: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    "Vectors of length one around a centre for every 50 of them, and queries of the same kind."
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(8, count // 50), dim)).astype(np.float32)
    rows = centres[rng.integers(len(centres), size=count + queries)] + 1.5 * rng.normal(
        size=(count + queries, dim)
    ).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows[:count], rows[count:]


def recall(found: list, exact: np.ndarray) -> float:
    "Mean share of the exact K that were found."
    return float(np.mean([len(np.intersect1d(one, other)) / K for one, other in zip(found, exact, strict=True)]))


def timed(ask, queries: np.ndarray, size: int, repeats: int) -> float:
    "Queries a second in batches of `size`, median over the repeats."
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        for place in range(0, len(queries), size):
            ask(queries[place : place + size])
        seconds.append(time.perf_counter() - begun)
    return len(queries) / median(seconds)


class Faiss:
    "An index of faiss."
    name = "faiss"

    def __init__(self, kind: str, rows: np.ndarray, nlist: int, folder: Path):
        begun, dim = time.perf_counter(), rows.shape[1]
        if kind == "HNSW":
            self.index = faiss.IndexHNSWFlat(dim, 16, faiss.METRIC_INNER_PRODUCT)
            self.index.hnsw.efConstruction = 200
        elif kind == "IVF_FLAT":
            self.index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, nlist, faiss.METRIC_INNER_PRODUCT)
            self.index.train(rows)
        else:
            self.index = faiss.IndexFlatIP(dim)
        self.index.add(rows)
        self.build = time.perf_counter() - begun
        faiss.write_index(self.index, str(folder / f"{kind}.faiss"))
        self.bytes = (folder / f"{kind}.faiss").stat().st_size

    def asker(self, parameter: int | None):
        "A function from queries to ids."
        if parameter and hasattr(self.index, "hnsw"):
            self.index.hnsw.efSearch = parameter
        elif parameter:
            self.index.nprobe = parameter
        return lambda queries: self.index.search(queries, K)[1]


class Milvus:
    "The same through a store."
    name = "milvus_lite"

    def __init__(self, kind: str, rows: np.ndarray, nlist: int, folder: Path):
        from moon2_lab.retrieval.milvus import IndexChoice, build_index, make_collection
        from moon2_lab.retrieval.milvus_client import open_store, quiet

        self.client, begun = open_store(folder / f"{kind}.db", create=True), time.perf_counter()
        self.kind = kind
        choice = IndexChoice(
            kind, {"HNSW": {"M": 16, "efConstruction": 200}, "IVF_FLAT": {"nlist": nlist}}.get(kind, {}), {}
        )
        with quiet():
            make_collection(self.client, "bench", rows.shape[1], choice, key="id")
            self.client.release_collection("bench")
            for place in range(0, len(rows), 2000):
                self.client.insert(
                    "bench", [{"id": str(place + n), "vector": row} for n, row in enumerate(rows[place : place + 2000])]
                )
        build_index(self.client, "bench")
        self.build = time.perf_counter() - begun
        self.bytes = sum(path.stat().st_size for path in folder.glob(f"{kind}.db/**/*") if path.is_file())

    def asker(self, parameter: int | None):
        params = {
            "metric_type": "IP",
            "params": {"ef": parameter}
            if self.kind == "HNSW"
            else {"nprobe": parameter}
            if self.kind == "IVF_FLAT"
            else {},
        }
        return lambda queries: [
            [int(hit["id"]) for hit in hits]
            for hits in self.client.search("bench", data=list(queries), limit=K, search_params=params)
        ]


def curve(arm, kind: str, queries: np.ndarray, exact: np.ndarray, repeats: int) -> list[dict]:
    "One point for each search parameter."
    points = []
    for parameter in {"HNSW": EF, "IVF_FLAT": NPROBE}.get(kind, (None,)):
        ask = arm.asker(parameter)
        found = ask(queries)
        points.append(
            {
                "arm": arm.name, "index": kind, "parameter": parameter, "recall": round(recall(found, exact), 4),
                "one_by_one": round(timed(ask, queries[:200], 1, repeats), 1),
                "batches": round(timed(ask, queries, 100, repeats), 1),
            }
        )
        print(json.dumps(points[-1]), flush=True)
    return points


def where_time_goes(ask, queries: np.ndarray, most: int = 6) -> dict[str, float]:
    """Share of the time in each innermost Python function of the store, whose server runs in this process: its threads'
    stacks, looked at every 2 ms while queries are asked one by one.
    """
    seen, done = collections.Counter(), threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            for frame in sys._current_frames().values():
                if "milvus_lite" in frame.f_code.co_filename or (
                    frame.f_back
                    and "milvus_lite" in frame.f_back.f_code.co_filename
                    and "faiss" in frame.f_code.co_filename
                ):
                    seen[f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"] += 1

    watcher = threading.Thread(target=look)
    watcher.start()
    for query in queries:
        ask(query[None])
    done.set()
    watcher.join()
    return {name: round(count / max(1, seen.total()), 3) for name, count in seen.most_common(most)}


def at_recall(points: list[dict], wanted: float, what: str) -> float | None:
    "Queries a second at this recall, between the points around it; None where the curve does not reach it."
    points = sorted(points, key=lambda point: point["recall"])
    if not points or points[-1]["recall"] < wanted:
        return None
    if points[0]["recall"] >= wanted:
        return points[0][what]
    return float(
        np.exp(np.interp(wanted, [point["recall"] for point in points], np.log([point[what] for point in points])))
    )


def filtered(rows: np.ndarray, queries: np.ndarray, folder: Path, batch: int = 50) -> list[dict]:
    "A row for each share of the products that a filter keeps; None: without a filter."
    from moon2_lab.data.products import Product
    from moon2_lab.retrieval.filters import milvus_filter
    from moon2_lab.retrieval.milvus import index_vectors
    from moon2_lab.retrieval.search import MilvusSearcher
    from moon2_lab.retrieval.vectors import VectorBlock

    drawn, queries = np.random.default_rng(1).random(len(rows)), queries[:batch]
    goods = [
        Product(f"p{number}", attributes={"shares": "|".join(str(share) for share in SHARES if chance < share)})
        for number, chance in enumerate(drawn)
    ]
    VectorBlock.of(goods, "mm", rows).write(folder / "v.parquet")
    done, = index_vectors(folder / "v.parquet", folder / "v.db")
    print(f"{done.rows:,} vectors, index {done.index}, {done.seconds:.0f} s", flush=True)
    scores, table = queries @ rows.T, []
    with MilvusSearcher(folder / "v.db") as store:
        for share in (*SHARES, None):
            fitting = np.flatnonzero(drawn < (share or 1))
            exact = fitting[np.argsort(-scores[:, fitting], axis=1)[:, :K]]
            expression = f"shares == {share}" if share else ""
            seconds, hits = timed_call(store.search, queries, K, expression)
            alone, _ = timed_call(store.search, queries[:1], K, expression)
            graph = store._ask_index(queries, K, milvus_filter(expression, store.fields), {"ef": 128})
            table.append(
                {
                    "share": share, "matches": len(fitting), "recall": shared(hits, exact),
                    "fewest_hits": min(map(len, hits)), "batch_ms_a_query": round(1000 * seconds / len(queries), 1),
                    "alone_ms": round(1000 * alone, 1), "graph_alone_recall": shared(graph, exact),
                    "graph_alone_fewest_hits": min(map(len, graph)),
                }
            )
            print(json.dumps(table[-1]), flush=True)
    return table


def timed_call(act, *given):
    "(seconds, what it returns)."
    begun = time.perf_counter()
    made = act(*given)
    return time.perf_counter() - begun, made


def shared(hits: list, exact: np.ndarray) -> float:
    "Mean share of the exact nearest products (at most K) that were found."
    return round(
        float(
            np.mean(
                [
                    len({int(hit.product_id[1:]) for hit in found} & set(one.tolist())) / len(one)
                    for found, one in zip(hits, exact, strict=True)
                ]
            )
        ),
        4,
    )


def main() -> None:
    parser = options(__doc__, repeats=5)
    parser.add_argument(
        "--filtered", action="store_true",
        help="filters that keep more and fewer products, instead of the comparison with faiss",
    )
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=1000)
    args = parser.parse_args()
    result = {"benchmark": "index", **start(args), "faiss": faiss.__version__}
    count = 5000 if args.quick else args.count
    faiss.omp_set_num_threads(args.threads)
    rows, queries = clustered(count, args.dim, 200 if args.quick else args.queries)
    if args.filtered:
        with tempfile.TemporaryDirectory() as folder:
            finish(args, result | {"count": count, "dim": args.dim, "filtered": filtered(rows, queries, Path(folder))})
        return
    exact, nlist, points, built = (
        np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :K], round(count**0.5), [], [],
    )
    time_goes = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn, kind in enumerate(("FLAT", "HNSW", "IVF_FLAT")):
            for make in (Faiss, Milvus)[:: 1 if turn % 2 == 0 else -1]:
                arm = make(kind, rows, nlist, Path(folder))
                built.append({"arm": arm.name, "index": kind, "seconds": round(arm.build, 2), "bytes": arm.bytes})
                print(json.dumps(built[-1]), flush=True)
                points += curve(arm, kind, queries, exact, args.repeats)
                if arm.name == "milvus_lite":
                    time_goes[kind] = where_time_goes(arm.asker({"HNSW": 64, "IVF_FLAT": 64}.get(kind)), queries[:200])
                    print(json.dumps({"time goes to": time_goes[kind]}), flush=True)
        empty = Milvus("FLAT", rows[:1], nlist, Path(folder) / "one")
        way = {
            what: round(timed(empty.asker(None), part, size, args.repeats), 1)
            for what, part, size in (("one_by_one", queries[:200], 1), ("batches", queries, 100))
        }
    result |= {
        "count": count, "dim": args.dim, "built": built, "points": points, "way_alone": way, "time_goes": time_goes,
        "at_equal_recall": {},
    }
    for kind in ("FLAT", "HNSW", "IVF_FLAT"):
        for wanted in (0.95, 0.99):
            for what in ("one_by_one", "batches"):
                speeds = {
                    arm: at_recall(
                        [point for point in points if (point["arm"], point["index"]) == (arm, kind)], wanted, what
                    )
                    for arm in ("faiss", "milvus_lite")
                }
                if all(speeds.values()):
                    result["at_equal_recall"][f"{kind}, recall {wanted}, {what}"] = {
                        **{arm: round(speed, 1) for arm, speed in speeds.items()},
                        "ratio": round(speeds["milvus_lite"] / speeds["faiss"], 4),
                    }
    for name, row in result["at_equal_recall"].items():
        print(
            f"{name:38} Milvus Lite {row['milvus_lite']:9.1f}/s  faiss {row['faiss']:9.1f}/s  ratio {row['ratio']:.3f}"
        )
    print(f"the way to the store alone: {way}")
    finish(args, result)


if __name__ == "__main__":
    main()
