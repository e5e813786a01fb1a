"Small models of every kind of transformers as encoders, and the stock model's own forward pass in exact arithmetic."
import contextlib
import functools
import tempfile
from pathlib import Path

import torch
from choosing import few
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Item
from moon2_lab.model.certify import stock_hidden
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts
from moon2_lab.tiny_models import TINY_FAMILIES, pictures, tiny_model
from torch import nn

DENSE = tuple(name for name in TINY_FAMILIES if not name.endswith("moe"))  # whose feed-forward blocks can be copied
SPARSE = tuple(name for name in TINY_FAMILIES if name.endswith("moe"))
# three axes of positions and levels of DeepStack; windows and blocks; linear attention and experts of its own
MOST_DIFFERENT = ("qwen3_vl", "gemma3", "qwen3_5_moe")
FEW_FAMILIES = few(TINY_FAMILIES, *MOST_DIFFERENT)
# side of the square that gives 16 tokens on a grid of 4 x 4
PIXELS = {name: 128 if "qwen3" in name else 112 if "qwen" in name or "glm" in name else 64 for name in TINY_FAMILIES}
REFS = [ImageRef.from_pil(image) for image in pictures(6)]
LONG = "a nice plain new finest quality small large red green blue black orange purple box ball bar ring no 1 2 3"
ITEMS = [
    Item("small red ball", REFS[0], "both"), Item("large blue box no 7", None, "text only"),
    Item(None, REFS[1], "picture only"), Item(LONG, REFS[2], "longer than a window"),
    Item("green ring", REFS[3], "two of each", "a nice new green ring", (REFS[4],)),
]


@functools.cache
def folder_of(name: str) -> Path:
    "The folder of the small model of a kind; written once in a process."
    return tiny_model(name, Path(_folders()) / name)


@functools.cache
def _folders() -> str:
    holder = tempfile.TemporaryDirectory(prefix="families")
    _KEPT.append(holder)  # removed when the process ends
    return holder.name


_KEPT: list = []


def encoder_of(name: str, perturbed=False, double=False, folder=None, **fields) -> Moon2Encoder:
    "An encoder on a small model of a kind, its features not rounded; full experts, of a sparse kind its own."
    how = {"experts": "native"} if name in SPARSE else {}
    source = str(folder or folder_of(name))
    encoder = Moon2Encoder.from_backbone(source, **({"image_size": PIXELS[name], "router_std": 0.02} | how | fields))
    encoder = perturb_experts(encoder, 0.02, seed=1) if perturbed else encoder
    if double:
        make_exact(encoder.double())
    keep_exact(encoder.backbone)
    return encoder.eval()


def make_exact(model: nn.Module) -> nn.Module:
    "A model in float64 that no longer rounds to float32 inside: its norms, and the experts of transformers."
    exact_norms(model)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    return model


def keep_exact(backbone) -> None:
    "Take vision features straight from the model: the cache rounds them to 16 bits."
    def exact(refs):
        return backbone.vision([ref.load() for ref in refs])[0].numpy()

    backbone.vision_features = exact


def exact_norms(root: nn.Module) -> set[str]:
    "Make RMS norms calculate in the dtype of their input: w x or (1 + w) x, found by trying. The classes changed."
    done = set()
    for module in root.modules():
        kind = type(module).__name__
        if "RMSNorm" not in kind or "Gated" in kind or isinstance(module, nn.RMSNorm):
            continue
        weight = getattr(module, "weight", torch.ones(1, dtype=torch.float64))  # Gemma 4 has some without
        eps = next(getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name))
        hidden = torch.linspace(-1, 2, 3 * max(len(weight), 4), dtype=weight.dtype).view(3, -1)
        with torch.no_grad():
            stock = module(hidden)
            fitting = [add for add in (0.0, 1.0) if torch.allclose(stock, _norm(weight, eps, add, hidden), atol=1e-4)]
        assert len(fitting) == 1, (kind, fitting)
        module.forward = functools.partial(_norm, weight, eps, fitting[0])
        done.add(kind)
    return done


def _norm(weight, eps, add, hidden):
    return (add + weight) * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps))


@contextlib.contextmanager
def exact_softmax():
    "Softmax in float64 where its input is: the written-out attention of transformers asks for float32."
    own = nn.functional.softmax

    def exact(input, dim=None, dtype=None, **more):
        return own(input, dim=dim, dtype=input.dtype if input.dtype == torch.float64 else dtype, **more)

    nn.functional.softmax = exact
    try:
        yield
    finally:
        nn.functional.softmax = own


def stock(backbone, row, images, gradients=False):
    "(L, D) last hidden states of a row by the stock model's own forward pass over ids and pixels."
    with exact_softmax():
        return (stock_hidden.__wrapped__ if gradients else stock_hidden)(backbone, row, images)


def pictures_of(item, row):
    "The pictures of an item for the stock model, where its row has any."
    return [ref.load() for ref in item.pictures] if row.pictures else ()


def gaps(encoder, reference, items=ITEMS):
    """(item, view) -> how far packed rows of all items, in one pass, are from a stock forward pass for each view: the
    largest difference of hidden states, in units of their root mean square.
    """
    found = {}
    with torch.no_grad():
        rows = encoder.rows_of(items)
        hidden = encoder.run_rows(items, rows)[0].split([len(row) for row in rows])
        for place, item in enumerate(items):
            for alone in encoder.rows_of([item], share=False):
                (view,) = alone.views
                packed = next(h for row, h in zip(rows, hidden, strict=True) if row.item == place and view in row.views)
                right = stock(reference, alone, pictures_of(item, alone))
                gap = (packed[: len(right)] - right).abs().max() / right.pow(2).mean().sqrt()
                found[item.item_id, view] = float(gap)
    return found
