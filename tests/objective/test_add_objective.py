"""A sixth alignment objective from outside the package: one entry in `ALIGNMENT`; it has omega, columns, curves."""
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from moon2_lab.config import OBJECTIVES
from moon2_lab.errors import UsageError
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.objective.contrastive import intra_product_loss
from moon2_lab.objective.objective import ALIGNMENT, AlignmentObjective, Moon2Objective
from moon2_lab.objective.omega_alarm import objectives_in
from moon2_lab.training.trainer import Trainer
from small import settings, shop, tiny

SIX = (*OBJECTIVES, "query_pair")


@dataclass(frozen=True)
class QueryPair(AlignmentObjective):
    "The picture of a query finds the query's own words."

    def samples(self, views, negative_mask):
        return views.present["q"]["i"] & views.present["q"]["t"]

    def routing(self, weights):
        return (weights["q"]["i"] + weights["q"]["t"]) / 2

    def loss(self, batch, masks):
        query, mask = batch.views.embedding["q"], self.samples(batch.views, batch.keys.negative_mask)
        temperature, keys = batch.config.intra_temperature, batch.keys.query
        return intra_product_loss(query["i"], query["t"], None, temperature, keys=keys, in_batch=True, mask=mask)


@pytest.fixture
def sixth(monkeypatch):
    "All that it takes."
    monkeypatch.setitem(ALIGNMENT, "query_pair", QueryPair())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of three steps that was saved: (folder, trainer, history)."
    folder = tmp_path_factory.mktemp("sixth") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALIGNMENT, "query_pair", QueryPair())
        trainer = Trainer(tiny(), shop(40), settings(max_steps=3, save_steps=1), out=folder)
        history = trainer.train()
    return folder, trainer, history


def test_it_has_weight_preferences_and_columns(run):
    _, trainer, history = run
    assert tuple(trainer.encoder.alignment.shape) == (4, 6) and trainer.objective.names == SIX == objectives_in(history)
    np.testing.assert_allclose(history[[f"omega_{name}" for name in SIX]].sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(history[[f"p_2_{name}" for name in SIX]].sum(axis=1), 1, atol=1e-5)
    assert (history["omega_query_pair"] > 0).all() and (history["loss_query_pair"] > 0).all()
    total = sum(history[f"omega_{name}"] * history[f"loss_{name}"] for name in SIX) + history["loss_balance"]
    np.testing.assert_allclose(
        history["loss"], total + 0.01 * (history["loss_aux"] + history["loss_sparsity"]), rtol=1e-4
    )
    assert trainer.encoder.alignment.grad is None and trainer.encoder.info["objectives"] == list(SIX)


def test_the_five_lose_nothing(sixth):
    "Their columns of W* and their losses at the first step are those of a run without the sixth."
    five = Moon2Objective(settings(), {name: ALIGNMENT[name] for name in OBJECTIVES})
    with_it, without = Trainer(tiny(), shop(40), settings()), Trainer(tiny(), shop(40), settings(), objective=five)
    assert torch.equal(with_it.encoder.alignment[:, :5], without.encoder.alignment)
    rows = [next(event for event in trainer if event.phase == "step").data["row"] for trainer in (with_it, without)]
    assert [rows[0][f"loss_{name}"] for name in OBJECTIVES] == [rows[1][f"loss_{name}"] for name in OBJECTIVES]
    assert "loss_query_pair" not in rows[1]


def test_its_model_is_read_by_whoever_does_not_know_it(run):
    folder, trainer, _ = run
    loaded = Moon2Encoder.from_pretrained(folder / "model", "cpu")
    assert loaded.fingerprint == trainer.encoder.fingerprint and loaded.info["objectives"] == list(SIX)


def test_its_run_is_resumed(run, sixth, tmp_path):
    import shutil

    shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000003")
    resumed = Trainer(tiny(), shop(40), settings(max_steps=3), out=tmp_path / "run", resume=True)
    assert resumed.step == 2
    resumed.train()
    assert resumed.encoder.fingerprint == run[1].encoder.fingerprint


def test_the_page_has_its_curve(run):
    from moon2_lab.reporting.run_report import write_report
    from moon2_lab.testing import made_up_metrics

    folder, _, history = run
    five = history[[name for name in history if "query_pair" not in name]]
    page, plain = (
        write_report(folder / f"{name}.html", metrics=made_up_metrics(), history=table).read_text()
        for name, table in (("six", history), ("five", five))
    )
    assert page.count("query_pair") >= 3 and "query_pair" not in plain  # loss, omega, preference


def test_the_widgets_have_it(run):
    from moon2_lab.reporting.routing_figures import routing_picture
    from moon2_lab.reporting.routing_maps import routing_payload, training_steps
    from moon2_lab.testing import made_up_routing
    from moon2_lab.widgets.run_curves import _live_figure

    _, _, history = run
    assert [trace.name for trace in _live_figure(history).data].count("query_pair") == 3  # loss, omega, preference
    steps = training_steps(history)
    assert steps.objectives == SIX and steps.preference.shape == (3, 4, 6) and steps.omega.shape == (3, 6)
    maps = replace(made_up_routing(), training=steps)
    payload, _ = routing_payload(maps)
    assert payload["objectives"] == list(payload["objective_words"]) == list(SIX)
    assert np.shape(payload["training"]["omega"]) == (3, 6) and routing_picture(maps).width == 640


def test_an_encoder_for_five_is_refused(sixth):
    trainer = Trainer(tiny(), shop(40), settings(), objective=Moon2Objective(settings()))
    trainer.encoder.set_objectives(5)
    with pytest.raises(UsageError, match="5 columns for 6 alignment objectives"):
        trainer.train()
