"""The trained model of the repository: python scripts/make_pretrained.py --minutes 90 [--further]

Draws a catalogue, trains the default recipe on it, and writes data/pretrained: what was trained, in float16, beside the
name of its base; its scores on the test split (of what is read back, so of the rounded weights); how it was made; its
card. --further goes on from the model that is there: its weights, a new optimizer, and by --seed another catalogue.
"""
import argparse
import logging
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "data" / "pretrained"
LIMIT = 8_000_000  # bytes of the weights


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="of steps")
    parser.add_argument("--products", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=100, help="of the drawn catalogue and of the training")
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--further", action="store_true", help="go on from the model that is there")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the training")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def trained(config, catalog, before: Path | None):
    "The encoder after its training; before: the folder of the model that it goes on from."
    from moon2_lab.model.encoder import Moon2Encoder
    from moon2_lab.training.callbacks import StepLines
    from moon2_lab.training.trainer import Trainer

    fields = config.encoder_fields()
    if before:
        encoder = Moon2Encoder.from_pretrained(before, merge=False)
    else:
        encoder = Moon2Encoder.from_backbone(fields.pop("backbone"), seed=config.seed, **fields)
    steps = encoder.info.get("trained_steps", 0)
    trainer = Trainer(encoder, catalog, config)
    trainer.callbacks.append(StepLines(trainer))
    trainer.prepare_features()
    trainer.train()
    encoder.info["trained_steps"] = steps + trainer.step
    return encoder


def main() -> None:
    args, command = parsed(), shlex.join(["python", "scripts/make_pretrained.py", *sys.argv[1:]])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from moon2_lab.cli.options import typed_settings
    from moon2_lab.config import TrainConfig
    from moon2_lab.data.catalog import Catalog
    from moon2_lab.data.synthetic.drawn_catalogue import drawn_catalogue
    from moon2_lab.evaluation.evaluate import evaluate
    from moon2_lab.files import read_json, write_json
    from moon2_lab.model.encoder import Moon2Encoder
    from moon2_lab.reporting.model_card import model_card
    from moon2_lab.runtime import run_settings

    args.config = None
    limits = {"backbone": args.backbone, "max_minutes": args.minutes, "seed": args.seed}
    config = TrainConfig(**limits | typed_settings(args))
    catalog = Catalog.load(drawn_catalogue(args.products, args.seed))
    settings = run_settings(config, command, catalog.data_hash)
    if args.further:
        earlier = read_json(args.out / "run_settings.json")
        settings["earlier"] = [*earlier.get("earlier", []), earlier["command"]]
    encoder = trained(config, catalog, args.out if args.further else None)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        encoder.save_pretrained(folder, base="named", dtype="float16")
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert size <= LIMIT, f"{size:,} bytes of weights: more than {LIMIT:,}"
        metrics = evaluate(Moon2Encoder.from_pretrained(folder), catalog, split="test")
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "run_settings.json", settings)
        card = model_card(folder, "data/pretrained", metrics, settings, on_hub=False)
        made = "\n".join([*settings.get("earlier", []), command])
        text = f"{card.rstrip()}\n\n## How it was made\n\n```\n{made}\n```\n"
        (folder / "README.md").write_text(text, encoding="utf-8")
        shutil.rmtree(args.out, ignore_errors=True)
        shutil.copytree(folder, args.out)
    scores = {name: round(block["R@10"]["value"], 3) for name, block in metrics["directions"].items()}
    print(f"{size:,} bytes, {encoder.info['trained_steps']:,} steps; R@10: {scores}")


if __name__ == "__main__":
    main()
