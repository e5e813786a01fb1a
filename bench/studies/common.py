"""What the studies share: their products and their trainer."""
import hashlib


def chosen_products(catalog, count: int):
    "The train products of the study, the first by a hash of the id."
    from moon2_lab.catalog import Catalog

    train = catalog.split("train")
    if count >= len(train):
        return train
    order = sorted(train, key=lambda product: hashlib.sha256(f"study:{product.product_id}".encode()).digest())
    return Catalog(order[:count], folder=catalog.folder, whole=catalog)


def make_trainer(catalog, part, config, objective=None):
    "A trainer on fresh triplets of `part` with `config.noise` put in, its vision features ready."
    from moon2_lab.encoder import Moon2Encoder
    from moon2_lab.noise import inject_noise
    from moon2_lab.text import Lexicon
    from moon2_lab.train import Trainer
    from moon2_lab.triplets import build_triplets

    lexicon = Lexicon(catalog)
    clean = build_triplets(part, lexicon, config.query_variants, config.negatives_per_query, config.seed, config.paired_negatives)
    fields = config.encoder_fields()
    encoder = Moon2Encoder.from_backbone(fields.pop("backbone"), seed=config.seed, **fields)
    trainer = Trainer(encoder, catalog, config.replace(noise=0.0), objective=objective, triplets=inject_noise(clean, config.noise, lexicon, config.seed))
    trainer.prepare_features()
    return trainer
