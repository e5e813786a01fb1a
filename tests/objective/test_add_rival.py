"""A rival recipe from outside the package: one entry in `RIVALS`; it is trained and scored beside the run, and shown.
"""
from dataclasses import replace

import pandas as pd
import pytest
from moon2_lab.cli.pipeline import main_job
from moon2_lab.data.products import Item
from moon2_lab.data.triplets import Triplet
from moon2_lab.files import read_json
from moon2_lab.objective.contrastive import inter_product_loss
from moon2_lab.objective.recipes import RIVALS, Rival
from small import settings

USED, WITH_PICTURE = [], []  # settings of each objective made; of each of its batches: has a query a picture?


def words_only(config):
    "One InfoNCE, the words of a query against the item."
    USED.append(config)

    def objective(views, routing, keys):
        WITH_PICTURE.append(bool(views.present["q"]["i"].any()))
        query, item = views.embedding["q"]["t"], views.embedding["p"]["mm"]
        loss = inter_product_loss(
            query, item, None, config.temperature, keys=keys.positive, mask=views.present["q"]["t"]
        )
        return {"words": loss, "loss": loss}

    return objective


def own_triplets(products):
    "The product's own title is the query of each triplet; no negatives."
    return [Triplet(f"title of {p.product_id}", Item(p.title, None, "query"), p, []) for p in products if p.title]


@pytest.fixture
def rival(monkeypatch):
    "All that it takes."
    USED.clear(), WITH_PICTURE.clear()
    own = lambda config: config.replace(num_experts=0, filter=False)
    monkeypatch.setitem(RIVALS, "words", Rival("words alone", words_only, own))


def test_it_is_trained_scored_and_shown(rival, drawn_catalogue, tmp_path):
    config = settings(max_steps=2, max_minutes=0.0)
    done = main_job(tmp_path / "run", drawn_catalogue, config, rivals=["words"])
    assert len(USED) == 1 and not USED[0].filter and USED[0].num_experts == 0
    assert USED[0].max_minutes > 0  # as many minutes as the run took
    assert any(WITH_PICTURE)  # the triplets of the run
    scores = read_json(tmp_path / "run" / "words" / "metrics.json")
    directions = [known["directions"].keys() for known in (scores, done["rivals"]["words"], done["metrics"])]
    assert directions[0] == directions[1] == directions[2] and done["dense"] is None
    history = pd.read_parquet(tmp_path / "run" / "words" / "history.parquet")
    assert (history["term_words"] == history["loss"]).all()  # a number beside "loss" is a column
    page = (tmp_path / "run" / "report.html").read_text()
    assert "words alone" in page and "dense recipe" not in page


def test_it_can_have_triplets_of_its_own(rival, monkeypatch, drawn_catalogue, tmp_path):
    monkeypatch.setitem(RIVALS, "titles", replace(RIVALS["words"], title="titles alone", triplets=own_triplets))
    main_job(tmp_path / "run", drawn_catalogue, settings(max_steps=1), rivals=["titles"])
    assert WITH_PICTURE and not any(WITH_PICTURE)
    assert "titles alone" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_alone_names_no_rival(rival, drawn_catalogue, tmp_path):
    done = main_job(tmp_path / "run", drawn_catalogue, settings(max_steps=1))
    assert done["rivals"] == {} and "words alone" not in (tmp_path / "run" / "report.html").read_text()
