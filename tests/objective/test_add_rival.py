"""A rival recipe from outside the package: one entry in `RIVALS`; it is trained and scored beside the run, and shown."""
import pytest
from moon2_lab.cli.pipeline import main_job
from moon2_lab.files import read_json
from moon2_lab.objective.contrastive import inter_product_loss
from moon2_lab.objective.recipes import RIVALS, Rival
from small import settings

USED = []


def words_only(config):
    "One InfoNCE, the words of a query against the item."
    USED.append(config)

    def objective(views, routing, keys):
        query, item = views.embedding["q"]["t"], views.embedding["p"]["mm"]
        loss = inter_product_loss(query, item, None, config.temperature, keys=keys.positive, mask=views.present["q"]["t"])
        return {"words": loss, "loss": loss}

    return objective


@pytest.fixture
def rival(monkeypatch):
    "All that it takes."
    own = lambda config: config.replace(num_experts=0, filter=False)
    monkeypatch.setitem(RIVALS, "words", Rival("words alone", words_only, own))


def test_it_is_trained_scored_and_shown(rival, drawn_catalogue, tmp_path):
    config = settings(max_steps=2, max_minutes=0.0)
    done = main_job(tmp_path / "run", drawn_catalogue, config, rivals=["words"])
    assert not USED[0].filter and USED[0].num_experts == 0 and USED[0].max_minutes > 0  # as many minutes as the run took
    scores = read_json(tmp_path / "run" / "words" / "metrics.json")
    assert done["rivals"]["words"]["directions"].keys() == scores["directions"].keys() == done["metrics"]["directions"].keys()
    assert done["dense"] is None and (tmp_path / "run" / "words" / "history.parquet").is_file()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "words alone" in page and "dense recipe" not in page


def test_a_run_alone_names_no_rival(rival, drawn_catalogue, tmp_path):
    done = main_job(tmp_path / "run", drawn_catalogue, settings(max_steps=1))
    assert done["rivals"] == {} and "words alone" not in (tmp_path / "run" / "report.html").read_text()
