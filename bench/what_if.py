"""How long an edit of a pair takes: from the edited words, or picture, to score, rank and hits before and after.

The model of the repository (`data/pretrained`, backbone mini) and the drawn products that it is shown on. The gallery
is embedded before; each edit is one that was not seen yet, so that it is encoded. Pages wait for a pause in the typing
before they ask (0.35 s in the demo, 0.3 s in the widget); that comes on top, and is not in the figures.

    python bench/what_if.py
"""
import time
from dataclasses import replace
from pathlib import Path

from common import finish, median, options, start

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ("red", "blue", "green", "black", "white", "pink", "grey", "yellow", "brown", "orange", "purple", "teal")


def edits(query, product, others, repeats: int) -> dict[str, list[dict]]:
    "Kind of edit -> what `PairEditor.edit` is given, a new one each time."
    item, pictures = product.item(), [other.image_ref() for other in others[:repeats]]
    words = COLOURS[:repeats]
    return {
        "words of the query": [{"query": replace(query, text=f"{word} {query.text}")} for word in words],
        "title of the product": [{"item": replace(item, text=f"{item.text} {word}")} for word in words],
        "picture dropped": [{"item": replace(item, text=f"{word} {item.text}", image=None)} for word in words],
        "picture swapped": [{"item": replace(item, image=picture)} for picture in pictures],
    }


def main() -> None:
    from moon2_lab import Catalog, Item, Moon2Encoder
    from moon2_lab.app.interface import pretrained_catalogue
    from moon2_lab.retrieval.search import MemorySearcher
    from moon2_lab.retrieval.what_if import PairEditor

    args = options(__doc__, repeats=11).parse_args()
    about = start(args)
    products = [one for one in Catalog.load(args.catalog or pretrained_catalogue()) if one.has_image and one.has_text]
    tiny = {"num_layers": 1, "image_size": 32, "visual_tokens": 4}
    saved = ROOT / "data" / "pretrained"
    encoder = Moon2Encoder.from_backbone("tiny", **tiny) if args.quick else Moon2Encoder.from_pretrained(saved)
    gallery, query = MemorySearcher.from_products(encoder, products), Item("red mug", None, "query")
    best = gallery.product(gallery.search(query, 1)[0][0].product_id)
    others = [product for product in products if product.product_id != best.product_id]
    rows = []
    for kind, asked in edits(query, best, others, args.repeats).items():
        editor, times, busy, moved = PairEditor(encoder, query, best.item(), gallery), [], [], 0
        for given in asked:
            begun, worked = time.perf_counter(), time.process_time()
            result = editor.edit(**given)
            times.append(time.perf_counter() - begun)
            busy.append(time.process_time() - worked)
            moved += result.hit_words != "the same hits"
        rows.append({"edit": kind, "median_s": round(median(times), 3), "processor_s": round(median(busy), 3)})
        rows[-1] |= {"edits": len(times), "hits_moved": moved}
        print(rows[-1], flush=True)
    finish(args, about | {"benchmark": "what_if", "products": len(products), "rows": rows})


if __name__ == "__main__":
    main()
