"""What the studies share: their trainer, and the paired difference of two arms."""
from pathlib import Path

import numpy as np
import pandas as pd


def make_trainer(catalog, part, config, objective=None):
    "A trainer on fresh triplets of `part` with `config.noise` put in, its vision features ready."
    from moon2_lab.data.label_noise import inject_noise
    from moon2_lab.data.queries import Lexicon
    from moon2_lab.data.triplets import build_triplets
    from moon2_lab.model.encoder import Moon2Encoder
    from moon2_lab.training.trainer import Trainer

    lexicon = Lexicon(catalog)
    clean = build_triplets(
        part, lexicon, config.query_variants, config.negatives_per_query, config.seed, config.paired_negatives
    )
    fields = config.encoder_fields()
    encoder = Moon2Encoder.from_backbone(fields.pop("backbone"), seed=config.seed, **fields)
    trainer = Trainer(
        encoder, catalog, config.replace(noise=0.0), objective=objective,
        triplets=inject_noise(clean, config.noise, lexicon, config.seed),
    )
    trainer.prepare_features()
    return trainer


def paired(out: Path, seeds: list[int], one: str, other: str) -> pd.DataFrame:
    "Difference of R@k (one - other), averaged over the seeds for each query, with an interval over queries."
    tables = {
        (arm, seed): pd.read_parquet(out / f"{arm}-{seed}" / "per_query.parquet").set_index(["direction", "query_id"])[
            "rank"
        ]
        for arm in (one, other)
        for seed in seeds
    }
    rows, rng = [], np.random.default_rng(0)
    for k in (1, 10):
        mean = {arm: pd.concat([tables[arm, seed] <= k for seed in seeds], axis=1).mean(axis=1) for arm in (one, other)}
        for direction, difference in (mean[one] - mean[other]).groupby(level="direction"):
            drawn = rng.choice(difference.to_numpy(), (1000, len(difference))).mean(1)
            rows.append(
                (
                    direction, f"R@{k}", mean[other][direction].mean(), mean[one][direction].mean(), difference.mean(),
                    *np.quantile(drawn, (0.025, 0.975)),
                )
            )
    return pd.DataFrame(rows, columns=["direction", "metric", other, one, "difference", "lo", "hi"])
