"""A training run can be watched, paused, interrupted, killed and continued, and always gives the same weights."""
import copy
import dataclasses
import errno
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from choosing import few
from moon2_lab.config import OBJECTIVES, TrainConfig, VIEWS
from moon2_lab.data.catalog import Catalog
from moon2_lab.errors import DataError, DriftError, LabError, UsageError
from moon2_lab.files import read_json
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.objective.contrastive import inter_product_loss
from moon2_lab.objective.objective import Moon2Objective, TripletKeys, TripletRouting, TripletViews, objective_routing
from moon2_lab.training import trainer as trainer_module
from moon2_lab.training.callbacks import KeepWithin
from moon2_lab.training.checkpoint import load_checkpoint, load_tensors, newest_checkpoint
from moon2_lab.training.collate import collate
from moon2_lab.training.step import PHASES
from moon2_lab.training.trainer import Trainer
from small import product, settings, shop, tiny

TESTS = Path(__file__).resolve().parents[1]
CLOCK = ["seconds", "rss_mb"]  # columns that differ from run to run


@pytest.fixture(autouse=True, scope="module")
def same_threads(own_cache):
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def catalog():
    return shop(60)


@pytest.fixture(scope="module")
def straight(catalog):
    "(fingerprint, history) of the run that nothing happened to."
    trainer = Trainer(tiny(), catalog, settings())
    history = trainer.train()
    return trainer.encoder.fingerprint, history


def same_history(one, other):
    pd.testing.assert_frame_equal(one.drop(columns=CLOCK), other.drop(columns=CLOCK), check_exact=True)


def first(trainer, phase, step=0):
    return next(event for event in trainer if (event.step, event.phase) == (step, phase))


# ---------------------------------------------------------------------------------------------- an iterator of events


def test_events_come_in_order_and_hold_what_the_lesson_shows(catalog):
    trainer = Trainer(tiny(), catalog, settings(max_steps=2))
    events = list(trainer)
    assert [(event.step, event.phase) for event in events] == [(step, phase) for step in range(2) for phase in PHASES]
    batch, views, routing, similarity, loss, gradients, step = (event.data for event in events[:7])
    assert len(batch["triplets"]) == 8 and len(batch["items"]) == 24 and batch["keys"].progress == 0
    assert views["views"].embedding["n"]["mm"].shape == (8, 1, 64)
    assert all(abs(float(routing["load"][view].sum()) - 1) < 1e-5 for view in VIEWS)
    assert similarity["similarity"]["t"].shape == (8, 8)
    assert set(OBJECTIVES) | {"aux", "sparsity", "loss"} <= set(loss["terms"])
    assert (
        gradients["finite"]
        and gradients["grad_norm"] > 0
        and set(gradients["by_group"]) == {"connector", "router", "experts", "rest"}
    )
    assert step["row"] == trainer.history[0]


def test_walking_gives_the_weights_of_running(catalog, straight):
    "Also when somebody looks at everything, pauses in the middle of steps, plans, copies and scores on the way."
    trainer = Trainer(tiny(), catalog, settings(), callbacks=[lambda event: event.data.get("terms")])
    trainer.plan()
    first(trainer, "similarity", 1)
    kept = trainer.snapshot()
    assert next(trainer).phase == "loss"
    first(trainer, "step", 2)
    trainer.encoder.encode_views([catalog[0]])
    for _event in trainer:
        pass
    assert trainer.encoder.fingerprint == straight[0] and kept[1]["step"] == 1
    same_history(trainer.table(), straight[1])
    assert list(trainer) == [] and trainer.train() is not None and trainer.step == 6  # it is over


def test_another_seed_is_another_run(catalog, straight):
    trainer = Trainer(tiny(), catalog, settings(seed=1))
    assert not trainer.train()["loss"].equals(straight[1]["loss"])


def test_history_has_the_documented_columns(straight):
    "Those of the interface, and these; nothing else."
    documented = [
        "step", "loss", "loss_aux", "loss_sparsity", "phi_q05", "phi_q50", "phi_q95", "share_down_weighted",
        "masked_pairs", "grad_norm", "seconds", "rss_mb",
    ]
    documented += [
        f"{kind}_{name}" for kind in ("loss", "unfiltered", "omega", "p_0", "p_1", "p_2", "p_3") for name in OBJECTIVES
    ] + [f"load_{view}_{z}" for view in VIEWS for z in range(4)]
    more = [
        "loss_balance", "omega_sum_raw", "repeated_pairs", "negatives_per_query", "margin", "alarm", "lr_factor",
        "skipped", "tokens",
    ]
    more += [f"grad_norm_{group}" for group in ("connector", "router", "experts", "rest")]
    history = straight[1]
    assert sorted(history.columns) == sorted(documented + more)
    assert (
        history["step"].tolist() == list(range(6))
        and (history["skipped"] == 0).all()
        and (history["rss_mb"] > 50).all()
        and (history["seconds"] > 0).all()
    )
    numbers = history.drop(columns="alarm")
    assert numbers.notna().all().all() and np.isfinite(numbers.astype(float)).all().all()
    np.testing.assert_allclose(history[[f"omega_{name}" for name in OBJECTIVES]].sum(axis=1), 1, atol=1e-5)
    for z in range(4):
        np.testing.assert_allclose(history[[f"p_{z}_{name}" for name in OBJECTIVES]].sum(axis=1), 1, atol=1e-5)
    for view in VIEWS:
        np.testing.assert_allclose(history[[f"load_{view}_{z}" for z in range(4)]].sum(axis=1), 1, atol=1e-5)
    total = (
        sum(history[f"omega_{name}"] * history[f"loss_{name}"] for name in OBJECTIVES)
        + 0.01 * (history["loss_aux"] + history["loss_sparsity"])
        + history["loss_balance"]
    )
    np.testing.assert_allclose(history["loss"], total, rtol=1e-4)


def test_progress_margin_filter_and_learning_rate_follow_the_steps(catalog):
    config = settings(
        max_steps=10, filter_warmup_ratio=0.3, filter_margin_start=0.4, filter_margin_end=0.1, warmup_ratio=0.2
    )
    seen = {"progress": [], "active": [], "rates": []}

    class Note:
        def on_batch(self, event):
            seen["progress"].append(event.data["keys"].progress)
            seen["active"].append(event.data["keys"].filter_active)

        def on_step(self, event):
            seen["rates"].append({group["name"]: group["lr"] for group in trainer.optimizer.param_groups})

    trainer = Trainer(tiny(), catalog, config, callbacks=[Note()])
    history = trainer.train()
    np.testing.assert_allclose(seen["progress"], np.arange(10) / 10)
    assert seen["active"] == [False] * 3 + [True] * 7
    expected = [0.1 + 0.3 * (1 + np.cos(np.pi * min(max((step / 10 - 0.3) / 0.7, 0), 1))) / 2 for step in range(10)]
    np.testing.assert_allclose(history["margin"], expected, atol=1e-6)
    assert (history["share_down_weighted"][:3] == 0).all() and (history["share_down_weighted"][3:] > 0).any()
    inter = [name for name in OBJECTIVES if name.startswith("inter")]
    taken = pd.DataFrame({name: history[f"unfiltered_{name}"] - history[f"loss_{name}"] for name in inter})
    assert (taken[:3] == 0).all(axis=None) and (taken[3:] > 0).any(axis=None)  # weights of 0 to 1 only take away
    np.testing.assert_allclose(history["lr_factor"][:2], [1 / 3, 2 / 3])
    assert history["lr_factor"].idxmax() == 2 and history["lr_factor"][2:].is_monotonic_decreasing
    for name, rate in (
        ("connector", config.connector_learning_rate), ("router", config.router_learning_rate),
        ("experts", config.learning_rate), ("rest", config.learning_rate),
    ):
        np.testing.assert_allclose([rates[name] for rates in seen["rates"]], rate * history["lr_factor"])
    assert not any(Trainer(tiny(), catalog, config.replace(filter=False, max_steps=4)).train()["share_down_weighted"])


# ---------------------------------------------------------------------------------------------- callbacks, objectives,
# stopping


def test_callbacks_are_functions_or_objects(catalog, straight):
    log = []

    class OnlySteps:
        def on_step(self, event):
            log.append(("object", event.step, event.phase))

    trainer = Trainer(
        tiny(), catalog, settings(),
        callbacks=[OnlySteps(), lambda event: log.append(("function", event.step, event.phase)), object()],
    )
    trainer.train()
    assert [entry for entry in log if entry[0] == "object"] == [("object", step, "step") for step in range(6)]
    assert [entry[1:] for entry in log if entry[0] == "function"] == [
        (step, phase) for step in range(6) for phase in PHASES
    ]
    assert trainer.encoder.fingerprint == straight[0]


@pytest.mark.parametrize("phase", few(PHASES, "views", "step"))
def test_an_error_in_a_callback_loses_nothing(catalog, straight, phase):
    "The step it came in is made again, or was made; never twice, never by half."
    def fail(event):
        if (event.step, event.phase) == (2, phase) and not failed:
            failed.append(1)
            raise ValueError("callback")

    failed = []
    trainer = Trainer(tiny(), catalog, settings(), callbacks=[fail])
    with pytest.raises(ValueError, match="callback"):
        trainer.train()
    assert trainer.step == len(trainer.history) == (3 if phase == "step" else 2)
    same_history(trainer.train(), straight[1])
    assert trainer.encoder.fingerprint == straight[0]


def test_an_objective_of_ones_own(catalog):
    "It gets the views, the routing and the keys; its scalar terms are in the history; its loss is what is followed."
    seen = []

    def objective(views, routing, keys):
        seen.append((type(views), type(routing), type(keys)))
        scores = views.embedding["q"]["t"] @ views.embedding["p"]["i"].T / 0.1
        return {
            "loss": torch.nn.functional.cross_entropy(scores, torch.arange(len(scores))),
            "hardest": scores.detach().max(), "table": scores.detach(),
        }

    trainer = Trainer(
        tiny(), catalog, settings(max_steps=30, connector_learning_rate=5e-3, learning_rate=3e-3), objective=objective
    )
    history = trainer.train()
    assert set(seen) == {(TripletViews, TripletRouting, TripletKeys)}
    assert (
        "term_hardest" in history
        and "term_table" not in history
        and history[[f"loss_{name}" for name in OBJECTIVES]].isna().all().all()
    )
    assert history["loss"][-5:].mean() < history["loss"][:5].mean()
    with pytest.raises(UsageError, match="no 'loss'"):
        Trainer(tiny(), catalog, settings(), objective=lambda *_: {"total": 1}).train()


def test_stop_and_go_on(catalog, straight):
    "From a callback in the middle of a step, from outside, and before the first step."
    def brake(event):
        if (event.step, event.phase) == (1, "views"):
            trainer.stop()

    trainer = Trainer(tiny(), catalog, settings(), callbacks=[brake])
    assert len(trainer.train()) == 2 == trainer.step
    trainer.stop()
    assert list(trainer) == []
    same_history(trainer.train(), straight[1])
    assert trainer.encoder.fingerprint == straight[0]


def test_a_stopped_run_can_be_resumed_from_disk(catalog, straight, tmp_path):
    "A stop between two checkpoints leaves one."
    trainer = Trainer(
        tiny(), catalog, settings(), out=tmp_path / "run",
        callbacks=[lambda event: trainer.stop() if event.step == 2 else None],
    )
    trainer.train()
    assert (tmp_path / "run" / "model").is_dir() and len(pd.read_parquet(tmp_path / "run" / "history.parquet")) == 3
    resumed = Trainer(tiny(), catalog, settings(), out=tmp_path / "run", resume=True)
    assert resumed.step == 3
    same_history(resumed.train(), straight[1])
    assert resumed.encoder.fingerprint == straight[0]


# ---------------------------------------------------------------------------------------------- going back, what if


def test_snapshot_and_restore(catalog, straight):
    trainer = Trainer(tiny(), catalog, settings())
    first(trainer, "step", 1)
    kept = trainer.snapshot()
    trainer.train()
    first_end = trainer.encoder.fingerprint
    for _ in range(2):  # a snapshot can be used again
        trainer.restore(kept)
        assert trainer.step == trainer.encoder.info["trained_steps"] == 2 and len(trainer.history) == 2
        first(trainer, "loss", 3)  # a half-made step is forgotten
    trainer.restore(kept)
    same_history(trainer.train(), straight[1])
    assert trainer.encoder.fingerprint == first_end == straight[0]


def state(trainer):
    "All of a trainer's state, comparable."
    tensors, meta, history = trainer.snapshot()
    ledger = {name: part.to_json() if isinstance(part, pd.DataFrame) else part for name, part in meta["ledger"].items()}
    return (
        {name: tensor.tolist() for name, tensor in tensors.items()}, meta | {"ledger": ledger}, copy.deepcopy(history),
    )


def test_what_if_leaves_nothing(catalog, straight):
    trainer = Trainer(tiny(), catalog, settings())
    first(trainer, "step", 2)
    before = state(trainer)
    as_is, changed = trainer.what_if(temperature=0.02, omega_mode="faithful")
    assert state(trainer) == before
    assert [event.phase for event in as_is] == [event.phase for event in changed] == list(PHASES)
    assert all(event.step == 3 for event in as_is + changed)
    row, other = as_is[-1].data["row"], changed[-1].data["row"]
    assert (
        row["loss_inter_t"] != other["loss_inter_t"]
        and row["loss_aux"] == other["loss_aux"]
        and "loss_balance" not in other
    )
    same_history(trainer.train(), straight[1])
    assert trainer.encoder.fingerprint == straight[0]
    assert {name: row[name] for name in row if name not in CLOCK} == {
        name: trainer.history[3][name] for name in row if name not in CLOCK
    }  # as_is is the step that was then taken
    with pytest.raises(UsageError, match="temprature.*temperature"):
        trainer.what_if(temprature=1)


def test_what_if_it_were_the_paper(catalog):
    "The preset is every field of the method; what was given stays."
    trainer = Trainer(
        tiny(), catalog,
        TrainConfig(max_steps=6, per_device_train_batch_size=8, num_threads=1, device="cpu", aux_weight=0.5),
    )
    as_is, paper = trainer.what_if(preset="paper")
    row, other = as_is[-1].data["row"], paper[-1].data["row"]
    assert row["loss_intra_p"] != other["loss_intra_p"] and "loss_balance" in row and "loss_balance" not in other
    terms = (
        sum(other[f"omega_{name}"] * other[f"loss_{name}"] for name in OBJECTIVES)
        + 0.5 * other["loss_aux"]
        + 0.01 * other["loss_sparsity"]
    )
    assert other["loss"] == pytest.approx(terms, rel=1e-5)


def test_what_if_in_the_middle_of_a_step(catalog, straight):
    trainer = Trainer(tiny(), catalog, settings())
    first(trainer, "gradients", 2)
    trainer.what_if(learning_rate=0.1)
    same_history(trainer.train(), straight[1])
    assert trainer.encoder.fingerprint == straight[0]


def noisy(views, routing, keys):
    "An objective that draws random numbers, of every generator there is."
    noise = torch.randn_like(views.embedding["q"]["mm"]) * (random.random() + np.random.rand()) * 0.1
    return {"loss": -((views.embedding["q"]["mm"] + noise) * views.embedding["p"]["mm"]).sum(), "noise": noise.sum()}


def test_what_if_gives_both_the_same_chances(catalog):
    "Random draws of an objective: both twins get those of the step that is due, and the run gets them again."
    def run(asking):
        trainer = Trainer(tiny(), catalog, settings(max_steps=3), objective=noisy)
        first(trainer, "step", 0)
        pair = trainer.what_if(learning_rate=1e-3) if asking else None
        return trainer.train(), pair

    (plain, _), (asked, (as_is, changed)) = run(False), run(True)
    assert as_is[-1].data["row"]["term_noise"] == changed[-1].data["row"]["term_noise"]
    same_history(plain, asked)
    assert as_is[-1].data["row"]["term_noise"] == asked["term_noise"][1]


def test_calibration_changes_nothing(catalog):
    "max_steps = 0: some steps are run without an update to find out how many fit."
    trainer = Trainer(tiny(), catalog, settings(max_steps=0, max_minutes=0.005), objective=noisy)
    before = state(trainer)
    trainer.prepare_features()
    steps = trainer.calibrate()
    after = state(trainer)
    assert steps >= 1 and after[0] == before[0] and after[2] == before[2]
    assert {name: value for name, value in after[1].items() if name != "seconds"} == {
        name: value for name, value in before[1].items() if name != "seconds"
    }
    started = time.perf_counter()
    history = trainer.train()
    assert len(history) == trainer.max_steps >= 1 and trainer.progress == 1
    assert time.perf_counter() - started < 60  # asked for a third of a second


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_calibration_leaves_nothing(catalog, straight, error):
    "Ctrl-C in the first seconds: the run that is then started is the run that was asked for."
    class Once(Poison):
        def __call__(self, *parts):
            if self.calls == 0:
                self.calls = 1
                raise error
            return self.inner(*parts)

    trainer = Trainer(tiny(), catalog, settings(max_steps=0, max_minutes=0.001), objective=Once((), 1))
    with pytest.raises(error):
        trainer.train()
    assert trainer.max_steps == 0 and trainer.step == 0
    events = [event for _, event in zip(range(2 * len(PHASES)), trainer)]
    if trainer.max_steps > 1:
        assert events[0].data["triplets"] != events[len(PHASES)].data["triplets"]
    assert trainer.max_steps < 1000


def slow(seconds):
    "The paper's objective, so many seconds slower."
    objective = Moon2Objective(settings())
    return lambda *parts: (time.sleep(seconds), objective(*parts))[1]


def test_minutes_are_a_limit_beside_steps(catalog):
    "A run that would pass the clock has fewer steps, and the learning rate comes to its end all the same."
    trainer = Trainer(tiny(), catalog, settings(max_steps=5000, max_minutes=4 / 60), objective=slow(0.05))
    history = trainer.train()
    assert trainer.seconds["steps"] == pytest.approx(history["seconds"].sum())
    assert 10 < len(history) < 100 and trainer.step == trainer.max_steps and trainer.progress == 1
    assert trainer.seconds["steps"] < 4 + 1.5 * history["seconds"].max()
    assert history["lr_factor"].iloc[-1] < 0.05 < history["lr_factor"].max()
    assert trainer.seconds["features"] > 0  # made before, not on the clock


@pytest.mark.parametrize("clock", ["wall", "processor"])
def test_the_clock_of_the_processor_does_not_count_naps(catalog, clock):
    "Runs that share a machine: what the others take is not counted."
    trainer = Trainer(tiny(), catalog, settings(max_steps=3, max_minutes=1, clock=clock), objective=slow(0.5))
    seconds = trainer.train()["seconds"]
    assert len(seconds) == 3 and (seconds.min() > 0.5 if clock == "wall" else seconds.max() < 0.5)
    assert trainer.seconds["steps"] == pytest.approx(seconds.sum())


def made_up_steps(trainer, seconds):
    "Let the trainer believe that it took steps of so many seconds; the number of steps it plans after each."
    planned = []
    for taken in seconds:
        if trainer.step >= trainer.max_steps:
            break
        trainer.history.append({"seconds": taken})
        trainer.step, trainer.seconds["steps"] = trainer.step + 1, trainer.seconds["steps"] + taken
        trainer.keep_time()
        planned.append(trainer.max_steps)
    return planned


def test_the_clock(catalog):
    "Steps of made-up length under a limit of one minute."
    def planned(seconds, found=60, **changes):
        trainer = Trainer(tiny(), catalog, settings(**({"max_steps": 0, "max_minutes": 1} | changes)))
        trainer.max_steps = found
        return made_up_steps(trainer, seconds), trainer

    plans, trainer = planned([1.0] * 100)
    assert plans[-1] == trainer.step and 58 <= trainer.step <= 60  # as calibrated
    plans, trainer = planned([1.0] * 30 + [2.0] * 70)  # a busier machine from the middle on
    assert 43 <= trainer.step <= 46 and trainer.seconds["steps"] <= 61 and plans[29] == 60
    assert plans[-2] - (trainer.step - 1) <= 2, "the last step should be near the end of the schedule"
    plans, trainer = planned([0.1] * 1000)  # the calibration was six times too slow: seen early, and once
    assert 560 <= trainer.step <= 600 and trainer.seconds["steps"] < 60 and len(set(plans)) <= 3
    plans, trainer = planned([0.1] * 1000, found=70, max_steps=70)
    assert trainer.step == 70  # steps that were asked for are not exceeded
    plans, trainer = planned(
        [5.0] * 2 + [300.0] + [1.0] * 9
    )  # put to sleep for five minutes: one last step, with the smallest rate
    assert trainer.step == 4
    for steps in (0, 60):  # calibrated, or asked for: a single pause costs its own seconds and no more
        plans, trainer = planned([1.0] * 9 + [20.0] + [1.0] * 90, max_steps=steps)
        assert 40 <= trainer.step <= 41 and 58 <= trainer.seconds["steps"] <= 60
    plans, trainer = planned([100.0] * 70, found=70, max_steps=70, max_minutes=0)
    assert trainer.step == 70  # no limit


def test_a_job_that_must_end_in_time_lets_its_steps_give_way(catalog):
    """One minute for everything, 0.15 of it kept for the end; steps of a second, scores of three; the time before the
    first step counts, too.
    """
    def steps_taken(spent_before, step=1.0, score=3.0, asked=5, points=8):
        trainer = Trainer(tiny(), catalog, settings(max_steps=0, max_minutes=asked, eval_points=points))
        clock = [1000.0]
        with mock.patch("moon2_lab.training.callbacks.time.monotonic", lambda: clock[0]):
            keeper = KeepWithin(trainer, 1, 1000.0 - spent_before)
            trainer.max_steps = int(60 * trainer.config.max_minutes / step)
            while trainer.step < trainer.max_steps:
                row = {"seconds": step}
                trainer.step, clock[0] = trainer.step + 1, clock[0] + step
                trainer.seconds["steps"] += step
                trainer.history.append(row)
                due = trainer._score_is_due()
                trainer.keep_time()
                if points and (due or trainer.step >= trainer.max_steps):
                    row["valid_score"], clock[0] = 0.5, clock[0] + score
                    trainer.seconds["evaluation"] += score
                keeper.on_step()
        return trainer.step, clock[0] - 1000.0 + spent_before, trainer

    steps, ended, trainer = steps_taken(0)
    assert 51 - 8 * 3 - 2 <= steps <= 35 and 43 <= ended <= 55, (steps, ended)
    steps, ended, trainer = steps_taken(0, score=0.0, points=0)
    assert 49 <= steps <= 51 and ended <= 52 and trainer.progress == 1
    steps, ended, trainer = steps_taken(30, score=0.0, points=0)  # features took half of it
    assert 19 <= steps <= 21 and ended <= 52
    steps, ended, trainer = steps_taken(500, points=0)  # too late before it began: one step, and no endless run
    assert steps <= 2 and 0 < trainer.config.max_minutes < 0.1
    steps, ended, trainer = steps_taken(0, score=0.0, points=0, asked=0.25)
    assert steps <= 15 and trainer.config.max_minutes == 0.25  # never more than was asked for


def test_steps_without_minutes_have_no_clock(catalog):
    assert (
        settings(max_steps=6).max_minutes, settings(max_steps=0).max_minutes,
        settings(max_steps=6, max_minutes=2).max_minutes,
    ) == (0, 5, 2)


def test_scores_at_even_distances(catalog, straight):
    trainer = Trainer(tiny(), catalog, settings(eval_points=3), evaluate_fn=lambda encoder: {"score": 0.5})
    history = trainer.train()
    assert history["valid_score"].notna().tolist() == [False, True] * 3
    assert trainer.encoder.fingerprint == straight[0]


def test_checkpoints_by_time(catalog, tmp_path):
    "By default every five minutes; here after every step, since each takes longer than a hundredth of a second."
    assert settings().save_minutes == 5.0
    trainer = Trainer(tiny(), catalog, settings(save_minutes=0.01 / 60), objective=slow(0.02), out=tmp_path / "run")
    first(trainer, "step", 3)
    assert sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").glob("step-*")) == [
        "step-000003", "step-000004",
    ]
    trainer = Trainer(tiny(), catalog, settings(), out=tmp_path / "other")
    first(trainer, "step", 3)
    assert not (tmp_path / "other" / "checkpoints").exists()  # it is younger than five minutes


def test_plan_comes_before_the_first_step(catalog):
    trainer = Trainer(tiny(), catalog, settings())
    before = trainer.encoder.fingerprint
    plan = trainer.plan()
    assert (
        plan["products"], plan["triplets"], plan["triplets_per_step"], plan["steps"], plan["hard_negatives_per_query"],
    ) == (48, 96, 8, 6, 1)
    assert (
        plan["parameters_trained"] < plan["parameters"] == sum(p.numel() for p in trainer.encoder.parameters())
        or plan["parameters_trained"] == plan["parameters"]
    )
    assert (
        plan["predicted_memory_mb"] > 100
        and plan["tokens_per_step"] > 8 * 2 * 4
        and trainer.encoder.fingerprint == before
        and trainer.step == 0
    )
    assert plan["tokens_per_step"] == first(trainer, "views").data["tokens"]


# ---------------------------------------------------------------------------------------------- on disk


def test_what_a_run_leaves(catalog, straight, tmp_path):
    run = tmp_path / "run"
    trainer = Trainer(tiny(), catalog, settings(save_steps=2), out=run, command="moon2 train ...")
    trainer.train()
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "filter_ledger.parquet", "history.parquet", "model", "quarantine.parquet", "run_settings.json",
        "training_products.parquet",
    ]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-000004", "step-000006",
    ]  # the two newest
    same_history(pd.read_parquet(run / "history.parquet"), straight[1])
    assert Moon2Encoder.from_pretrained(run / "model").fingerprint == straight[0] == trainer.encoder.fingerprint
    about = read_json(run / "run_settings.json")
    assert (
        about["config"]["max_steps"] == 6
        and about["choices"]["num_threads"] == 1
        and about["command"] == "moon2 train ..."
        and about["data_hash"] == catalog.data_hash
        and about["steps"] == 6
    )
    with pytest.raises(UsageError, match="not empty.*--resume"):
        Trainer(tiny(), catalog, settings(), out=run)
    with pytest.raises(DataError, match="no checkpoint"):
        Trainer(tiny(), catalog, settings(), out=tmp_path / "nothing", resume=True)


def test_best_and_last_model_are_kept(catalog, straight, tmp_path):
    scores, prints = iter([0.3, 0.5, 0.4]), {}

    def score(encoder):
        prints[len(prints)] = encoder.fingerprint
        random.random(), np.random.rand(), torch.rand(1)  # an evaluation may draw; the run must not notice
        return {"score": next(scores), "R@10": 0.1}

    trainer = Trainer(tiny(), catalog, settings(eval_steps=2), evaluate_fn=score, out=tmp_path / "run")
    history = trainer.train()
    assert trainer.best == {"step": 4, "score": 0.5, "R@10": 0.1}
    best = Moon2Encoder.from_pretrained(tmp_path / "run" / "checkpoints" / "best")
    assert (best.fingerprint, best.info["trained_steps"], trainer.encoder.info["trained_steps"]) == (prints[1], 4, 6)
    assert Moon2Encoder.from_pretrained(tmp_path / "run" / "model").fingerprint == prints[2] == straight[0]
    assert (
        history["valid_score"].dropna().tolist() == [0.3, 0.5, 0.4]
        and history["valid_score"].notna().tolist() == [False, True] * 3
    )
    assert trainer.encoder.training


def interrupted_run(catalog, run, last, **changes):
    "A run folder whose newest checkpoint is `last`, as if the process had died after it."
    trainer = Trainer(tiny(), catalog, settings(save_steps=1, **changes), out=run)
    for event in trainer:
        if (event.step, event.phase) == (last - 1, "step"):
            break
    return trainer


@pytest.fixture(scope="module")
def two_steps(catalog, tmp_path_factory):
    "The folder of a run that was left after two steps; for those who are refused: nobody goes on with it."
    run = tmp_path_factory.mktemp("two") / "run"
    interrupted_run(catalog, run, 2)
    return run


@pytest.mark.parametrize("changes", few([{}, {"lora_r": 2}, {"moe_layers": "none"}], {"lora_r": 2}), ids=str)
def test_resume_is_bit_equal(catalog, straight, tmp_path, changes):
    fields = {"moe_layers": "none"} if "moe_layers" in changes else {}
    make = lambda: tiny(**fields)
    whole = Trainer(make(), catalog, settings(**changes))
    history = whole.train()
    trainer = Trainer(make(), catalog, settings(save_steps=1, **changes), out=tmp_path / "run")
    first(trainer, "step", 2)
    resumed = Trainer(make(), catalog, settings(**changes), out=tmp_path / "run", resume=True)
    assert resumed.step == 3
    same_history(resumed.train(), history)
    assert resumed.encoder.fingerprint == whole.encoder.fingerprint


def test_random_numbers_go_on_too(catalog, tmp_path):
    "An objective that draws: Python's, NumPy's and torch's generators are in the checkpoint."
    whole = Trainer(tiny(), catalog, settings(max_steps=4), objective=noisy).train()
    trainer = Trainer(tiny(), catalog, settings(max_steps=4, save_steps=1), objective=noisy, out=tmp_path / "run")
    first(trainer, "step", 1)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    same_history(
        Trainer(tiny(), catalog, settings(max_steps=4), objective=noisy, out=tmp_path / "run", resume=True).train(),
        whole,
    )


@pytest.mark.parametrize("changes", few([{"num_threads": 2}, {"dtype": "bfloat16"}], {"dtype": "bfloat16"}), ids=str)
def test_resume_under_other_rounding_is_refused(catalog, tmp_path, changes):
    interrupted_run(catalog, tmp_path / "run", 2, dtype="float32")
    name, value = next(iter(changes.items()))
    with pytest.raises(DriftError, match=rf"{name}.*--allow-drift"):
        Trainer(tiny(), catalog, settings(**changes), out=tmp_path / "run", resume=True)
    drifted = Trainer(tiny(), catalog, settings(**changes), out=tmp_path / "run", resume=True, allow_drift=True)
    assert getattr(drifted.choices, name) == value and drifted.step == 2
    torch.set_num_threads(1)  # two threads are slow beside other work
    assert len(drifted.train()) == 6 and read_json(tmp_path / "run" / "run_settings.json")["choices"][name] == value


def test_resume_keeps_the_choices_of_the_run(catalog, tmp_path):
    "Nothing asked: threads and dtype are those of the checkpoint, whatever this machine would choose."
    interrupted_run(catalog, tmp_path / "run", 2)
    resumed = Trainer(tiny(), catalog, settings(num_threads=0), out=tmp_path / "run", resume=True)
    assert resumed.choices.num_threads == 1 == torch.get_num_threads()


def test_resume_with_something_else_is_refused(catalog, two_steps):
    with pytest.raises(UsageError, match="another catalogue"):
        Trainer(tiny(), shop(66), settings(), out=two_steps, resume=True)
    with pytest.raises(UsageError, match="seed"):
        Trainer(tiny(), catalog, settings(seed=5), out=two_steps, resume=True)
    with pytest.raises(LabError, match="another|config|shape|num_experts"):
        Trainer(tiny(num_experts=2), catalog, settings(), out=two_steps, resume=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.1}, {"omega_mode": "faithful"}, {"learning_rate": 1e-4}, {"max_steps": 9},
        {"max_steps": 0, "max_minutes": 2}, {"preset": "paper"},
    ],
    ids=str,
)
def test_a_resumed_run_keeps_its_settings(catalog, two_steps, changes):
    "In Python as on the command line: every field that differs is named."
    with pytest.raises(UsageError, match="a resumed run keeps its settings") as refused:
        Trainer(tiny(), catalog, settings(**changes), out=two_steps, resume=True)
    for name, value in changes.items():
        assert f"{name}: {getattr(settings(), name)} -> {value}" in str(refused.value)


def test_what_does_not_change_the_result_is_free_on_resume(catalog, straight, tmp_path):
    "And without a config the run's own settings are used."
    interrupted_run(catalog, tmp_path / "run", 2, temperature=0.05)
    free = settings(save_steps=2, save_minutes=1.0, eval_steps=3, max_nonfinite_steps=9)
    assert Trainer(tiny(), catalog, free, out=tmp_path / "run", resume=True).step == 2
    resumed = Trainer(tiny(), catalog, out=tmp_path / "run", resume=True)
    assert (resumed.config.learning_rate, resumed.config.max_steps, resumed.config.save_steps) == (1e-3, 6, 1)
    same_history(resumed.train(), straight[1])


def test_the_encoder_is_not_what_the_config_says(catalog):
    "Who gives another number of experts is told that the encoder's counts; who gives none is not."
    with pytest.warns(UserWarning, match=r"num_experts: 4 -> 2.*top_k: 2 -> 1"):
        trainer = Trainer(tiny(num_experts=2, top_k=1, gate_scale=True), catalog, settings(max_steps=1))
    assert trainer.config.num_experts == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(tiny(), catalog, TrainConfig(max_steps=1, per_device_train_batch_size=8, num_threads=1, device="cpu"))
        Trainer(tiny(), catalog, settings(max_steps=1))


def test_a_cut_checkpoint_falls_back_to_the_one_before(catalog, straight, tmp_path):
    interrupted_run(catalog, tmp_path / "run", 4)
    newest = tmp_path / "run" / "checkpoints" / "step-000004"
    for name in ("state.safetensors", "trainer.json", "history.parquet"):
        data = (newest / name).read_bytes()
        for part in (len(data) // 2, 0):
            (newest / name).write_bytes(data[:part])
            with pytest.warns(UserWarning, match="step-000004"):
                folder, (_, meta, history) = newest_checkpoint(tmp_path / "run")
            assert folder.name == "step-000003" and meta["step"] == len(history) == 3
        (newest / name).unlink()
        with pytest.raises(DataError, match="step-000004"):
            load_checkpoint(newest)
        (newest / name).write_bytes(data)
    (newest / "state.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="step-000004"):
        resumed = Trainer(tiny(), catalog, settings(), out=tmp_path / "run", resume=True)
    assert resumed.step == 3
    same_history(resumed.train(), straight[1])
    assert resumed.encoder.fingerprint == straight[0]
    for folder in (tmp_path / "run" / "checkpoints").glob("step-*"):
        (folder / "state.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="no checkpoint.*all of them are cut"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(tiny(), catalog, settings(), out=tmp_path / "run", resume=True)


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def full_safetensors(tensors, path, metadata=None):
    "What safetensors does when the disk is full: an error of its own, and nothing or half a file."
    from safetensors import SafetensorError

    Path(path).write_bytes(b"half a file")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "target, broken",
    [
        ("safetensors.torch.save_file", full_safetensors),
        *(
            pytest.param(target, full_disk, marks=pytest.mark.slow)
            for target in ("os.fsync", "pandas.DataFrame.to_parquet", "pathlib.Path.write_text", "tempfile.mkdtemp")
        ),
    ],
)
def test_a_full_disk_while_writing_a_checkpoint(catalog, straight, tmp_path, monkeypatch, target, broken):
    """A clear message; the earlier checkpoint is untouched, nothing half-written stays, and the run goes on from memory
    or from disk when there is space again.
    """
    run = tmp_path / "run"
    trainer = interrupted_run(catalog, run, 3)
    before = tree(run)
    with monkeypatch.context() as patch:
        patch.setattr(target, broken)
        with pytest.raises(LabError, match=r"(disk is full|cannot write|No space).*free some space"):
            for _event in trainer:
                pass
    assert (
        tree(run) == before
        and [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []
    )
    assert newest_checkpoint(run)[0].name == "step-000003"
    resumed = Trainer(tiny(), catalog, settings(), out=run, resume=True)
    same_history(resumed.train(), straight[1])
    same_history(trainer.train(), straight[1])  # and the one that met the full disk
    assert trainer.encoder.fingerprint == resumed.encoder.fingerprint == straight[0]


def test_a_full_disk_at_the_end_can_be_mended(catalog, straight, tmp_path, monkeypatch):
    "The model cannot be written: the checkpoint is there, and resuming writes what is missing."
    run = tmp_path / "run"
    trainer = interrupted_run(catalog, run, 6)
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full_safetensors)
        with pytest.raises(LabError, match="free some space"):
            list(trainer)
    assert not (run / "model" / "model.safetensors").exists()
    resumed = Trainer(tiny(), catalog, settings(), out=run, resume=True)
    resumed.train()
    assert Moon2Encoder.from_pretrained(run / "model").fingerprint == straight[0]


# ---------------------------------------------------------------------------------------------- killed, interrupted

CHILD = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and a run leaves it so
sys.path.insert(0, {tests!r})
import torch
from moon2_lab.training.trainer import Trainer
from small import settings, shop, tiny

def tell(event):
    print("event", event.step, event.phase, flush=True)
    if (event.step, event.phase) >= tuple(({step}, {phase!r})):
        time.sleep(0.02)
    if (event.step, event.phase) == (7, "batch"):  # on a busy machine the signal comes late: it is waited for
        time.sleep(60)

trainer = Trainer(tiny(), shop(60), settings(max_steps=8, save_steps=1), callbacks=[tell], out={out!r})
try:
    trainer.train()
except KeyboardInterrupt:
    print("interrupted", trainer.step, len(trainer.history), torch.get_num_threads(), flush=True)
    trainer.callbacks.clear()
    trainer.train()
print("end", trainer.encoder.fingerprint, flush=True)
"""


def child(out, step, phase):
    "A training run in a process of its own, slowed down from (step, phase) on."
    code = CHILD.format(tests=str(TESTS), step=step, phase=phase, out=str(out))
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=TESTS.parent
    )


def until(process, line):
    "Read the process's output up to `line`."
    seen = []
    for text in process.stdout:
        seen.append(text.strip())
        if seen[-1] == line:
            return seen
    raise AssertionError(f"{line!r} never came: {seen[-3:]} {process.stderr.read()[-2000:]}")


@pytest.fixture(scope="module")
def eight_steps(catalog):
    trainer = Trainer(tiny(), catalog, settings(max_steps=8))
    history = trainer.train()
    return trainer.encoder.fingerprint, history


@pytest.mark.slow
def test_a_killed_run_continues_bit_equal(catalog, eight_steps, tmp_path):
    "kill -9 at a random moment from the second step on, also while a checkpoint is written."
    chance = random.Random()
    step, phase, delay = chance.randrange(2, 6), chance.choice(PHASES), chance.uniform(0, 0.15)
    process = child(tmp_path / "run", step, phase)
    until(process, f"event {step} {phase}")
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == -signal.SIGKILL and "end" not in rest, "the process was too fast to be killed"
    resumed = Trainer(tiny(), catalog, settings(max_steps=8), out=tmp_path / "run", resume=True)
    print(f"killed {delay:.3f} s after step {step}, phase {phase}; resumed at step {resumed.step}")
    assert step <= resumed.step < 8
    same_history(resumed.train(), eight_steps[1])
    assert (
        resumed.encoder.fingerprint
        == eight_steps[0]
        == Moon2Encoder.from_pretrained(tmp_path / "run" / "model").fingerprint
    )


@pytest.mark.parametrize(
    "number", few([signal.SIGINT, signal.SIGTERM, signal.SIGHUP], signal.SIGTERM),
    ids=lambda number: number.name,
)
def test_an_interrupted_run_goes_on(catalog, eight_steps, tmp_path, number):
    """A real signal: the run stops between two updates, leaves a checkpoint, and goes on in the same process or in
    another.
    """
    chance = random.Random()
    step, phase, delay = chance.randrange(2, 6), chance.choice(PHASES), chance.uniform(0, 0.1)
    process = child(tmp_path / "run", step, phase)
    until(process, f"event {step} {phase}")
    time.sleep(delay)
    process.send_signal(number)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    told = next(line.split() for line in out.splitlines() if line.startswith("interrupted"))
    assert told[1] == told[2] and step <= int(told[1]) < 8, (
        f"interrupted {delay:.3f} s after step {step}, phase {phase}: {told}"
    )
    assert f"end {eight_steps[0]}" in out.splitlines()
    same_history(pd.read_parquet(tmp_path / "run" / "history.parquet"), eight_steps[1])


@pytest.mark.parametrize("phase", few(PHASES, "similarity", "step"))
def test_an_interrupt_leaves_a_checkpoint(catalog, straight, tmp_path, phase):
    "Ctrl-C or the notebook's stop button in any phase: whole steps only, on disk too."
    def press(event):
        if (event.step, event.phase) == (2, phase):
            raise KeyboardInterrupt

    trainer = Trainer(tiny(), catalog, settings(), callbacks=[press], out=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = Trainer(tiny(), catalog, settings(), out=tmp_path / "run", resume=True)
    assert resumed.step == trainer.step == (3 if phase == "step" else 2)
    same_history(resumed.train(), straight[1])
    assert resumed.encoder.fingerprint == straight[0]


def test_an_interrupt_during_the_update_waits_for_its_end(catalog, straight):
    "A half-made update would be lost for ever: SIGINT in the middle of the optimizer is held back."
    trainer = Trainer(tiny(), catalog, settings())
    first(trainer, "step", 1)
    update, pressed = trainer.optimizer.step, []

    def step(*args, **kwargs):
        if not pressed:
            pressed.append(1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        return update(*args, **kwargs)

    trainer.optimizer.step = step
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert pressed and trainer.step == len(trainer.history) == 3
    same_history(trainer.train(), straight[1])
    assert trainer.encoder.fingerprint == straight[0]


def test_an_interrupt_while_a_checkpoint_is_written(catalog, straight, tmp_path, monkeypatch):
    import safetensors.torch

    trainer = interrupted_run(catalog, tmp_path / "run", 2)
    real, pressed = safetensors.torch.save_file, []

    def save(*args, **kwargs):
        if not pressed:
            pressed.append(1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        return real(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = Trainer(tiny(), catalog, settings(), out=tmp_path / "run", resume=True)
    assert resumed.step == trainer.step == 3
    same_history(resumed.train(), straight[1])


# ---------------------------------------------------------------------------------------------- not finite


class Poison:
    "The paper's objective, spoilt at some steps."

    def __init__(self, steps, value):
        self.inner, self.steps, self.value, self.calls = Moon2Objective(settings()), steps, value, 0

    def __call__(self, *parts):
        terms = self.inner(*parts)
        self.calls += 1
        return terms | {"loss": terms["loss"] * self.value} if self.calls - 1 in self.steps else terms


@pytest.mark.parametrize("value", few([float("nan"), float("inf"), 1e38], 1e38))
def test_a_loss_that_is_not_finite_moves_nothing(catalog, value):
    "Skipped and counted; the next step is as good as ever. 1e38: the loss is finite, its gradient is not."
    trainer = Trainer(tiny(), catalog, settings(), objective=Poison({2, 4}, value))
    prints = [(trainer.step, trainer.encoder.fingerprint)]
    for event in trainer:
        if event.phase == "step":
            prints.append((trainer.step, trainer.encoder.fingerprint))
    history = trainer.table()
    assert history["skipped"].tolist() == [0, 0, 1, 0, 1, 0] and trainer.skipped == 2
    assert [before == after for (_, before), (_, after) in zip(prints, prints[1:])] == [
        False, False, True, False, True, False,
    ]
    assert (
        all(bool(p.isfinite().all()) for p in trainer.encoder.parameters())
        and np.isfinite(history["loss"][[0, 1, 3, 5]]).all()
    )


def test_too_many_of_them_stop_the_run(catalog, tmp_path):
    trainer = Trainer(
        tiny(), catalog, settings(save_steps=1, max_nonfinite_steps=2), objective=Poison(range(2, 99), float("nan")),
        out=tmp_path / "run",
    )
    with pytest.raises(
        LabError, match=r"2 steps had a loss or gradient that is not finite \[step 3\].*lower the learning rates"
    ):
        trainer.train()
    assert trainer.step == 4 and trainer.table()["skipped"].tolist() == [0, 0, 1, 1]
    good = newest_checkpoint(tmp_path / "run")[1][0]
    assert all(bool(tensor.isfinite().all()) for name, tensor in good.items() if tensor.is_floating_point())


def test_only_steps_in_a_row_stop_the_run(catalog):
    "Every other step is bad, five in all: each time the next one was good."
    trainer = Trainer(
        tiny(), catalog, settings(max_steps=10, max_nonfinite_steps=2), objective=Poison({1, 3, 5, 7, 9}, float("nan"))
    )
    assert trainer.train()["skipped"].sum() == 5 == trainer.skipped


def test_nan_in_the_features_is_caught(catalog, monkeypatch):
    "A damaged feature cache poisons the loss, not the weights."
    trainer = Trainer(tiny(), catalog, settings(max_nonfinite_steps=2))
    start, real = trainer.encoder.fingerprint, trainer.encoder.backbone.vision_features
    monkeypatch.setattr(trainer.encoder.backbone, "vision_features", lambda refs: real(refs) * np.float16("nan"))
    with pytest.raises(LabError, match="not finite"):
        trainer.train()
    assert trainer.encoder.fingerprint == start


# ---------------------------------------------------------------------------------------------- trackers, config


def test_tensorboard_gets_the_history(catalog, straight, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = Trainer(tiny(), catalog, settings(report_to="tensorboard"), out=tmp_path / "run")
    trainer.train()
    files = list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert files
    curves = {}
    for folder in {path.parent for path in files}:
        events = EventAccumulator(str(folder))
        events.Reload()
        curves |= {
            tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]
        }
    assert [step for step, _ in curves["loss"]] == list(range(6))
    np.testing.assert_allclose([value for _, value in curves["loss"]], straight[1]["loss"], rtol=1e-6)
    assert {"omega_inter_t", "p_0_inter_t", "load_t_0", "grad_norm", "phi_q50"} <= set(curves)
    assert trainer.encoder.fingerprint == straight[0]


@pytest.mark.filterwarnings("ignore:.*no supported trackers")
def test_a_tracker_that_is_missing_is_named(catalog, monkeypatch):
    "Before the first step, with what to install."
    with pytest.raises(UsageError, match="report_to.*none, tensorboard, trackio, wandb"):
        settings(report_to="tensorbord")
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(LabError, match="trackio"):
        Trainer(tiny(), catalog, settings(report_to="trackio"))


def test_an_unknown_config_key_names_its_neighbours():
    with pytest.raises(UsageError, match=r"unknown config field \[omega_mod\].*omega_mode"):
        settings(omega_mod="faithful")
    with pytest.raises(UsageError, match="learning_rate"):
        settings(learning_rat=1)
    for name, value in (
        ("omega_mode", "fair"), ("temperature", 0), ("top_k", 9), ("per_device_train_batch_size", 1),
        ("visual_tokens", 5), ("lr_scheduler_type", "step"), ("max_steps", "many"),
    ):
        with pytest.raises(UsageError, match=name):
            settings(**{name: value})


# ---------------------------------------------------------------------------------------------- every way to train

VARIANTS = [
    {"omega_mode": "faithful"}, {"omega_mode": "detached"}, {"omega_mode": "floored"},
    {"omega_mode": "balanced", "omega_routing": "shared"}, {"preset": "paper"},
    {"omega_times_m": True, "intra_omega": False}, {"filter_on_intra": True, "filter_warmup_ratio": 0.0},
    {"in_batch_negatives": False}, {"negatives_per_query": 3, "paired_negatives": False},
    {"intra_negatives": "other_polarity", "intra_symmetric": False}, {"num_experts": 0}, {"top_k": 4},
    {"moe_layers": "1"}, {"attention": "bidirectional"}, {"dtype": "bfloat16"}, {"lora_r": 2},
    {"train_word_embeddings": True}, {"lr_scheduler_type": "linear"},
]


@pytest.mark.filterwarnings("ignore:attention=bidirectional")
@pytest.mark.parametrize("changes", few(VARIANTS, *VARIANTS[::3]), ids=str)
def test_every_mode_runs(catalog, changes):
    "Two steps of each: finite, something moved, omega as the mode promises."
    fields = {
        name: value for name, value in changes.items() if name in ("num_experts", "top_k", "moe_layers", "attention")
    }
    trainer = Trainer(tiny(**fields), catalog, settings(max_steps=2, **changes))
    start = trainer.encoder.fingerprint
    history = trainer.train()
    assert (
        np.isfinite(history[["loss", *(f"loss_{name}" for name in OBJECTIVES)]]).all().all()
        and not history["skipped"].any()
    )
    assert trainer.encoder.fingerprint != start
    total = history[[f"omega_{name}" for name in OBJECTIVES]].sum(axis=1)
    if changes.get("omega_mode") == "faithful" or changes.get("preset") == "paper":
        assert ((total > 0) & (total <= 5)).all()
    elif "omega_times_m" not in changes:
        np.testing.assert_allclose(total, 1, atol=1e-5)
    assert ("loss_aux" in history) == (changes.get("num_experts") != 0) and ("loss_balance" in history) == (
        changes.get("omega_mode", "balanced") == "balanced"
        and changes.get("preset") != "paper"
        and "num_experts" not in changes
    )


def test_products_without_picture_or_title(tmp_path):
    "Mixed catalogues train; what a step lacks is absent from its terms, not zero and not NaN."
    trainer = Trainer(tiny(), shop(60, mixed=True), settings(), out=tmp_path / "run")
    history = trainer.train()
    assert (
        np.isfinite(history["loss"]).all()
        and not history["skipped"].any()
        and (tmp_path / "run" / "filter_ledger.parquet").is_file()
    )
    resumed = Trainer(tiny(), shop(60, mixed=True), settings(), out=tmp_path / "run", resume=True)
    same_history(resumed.table(), history)


@pytest.mark.parametrize(
    "lacking, absent",
    [
        ({"refs": ()}, {"inter_i", "inter_mm", "intra_p", "intra_n"}),
        ({"title": None}, {"inter_t", "inter_mm", "intra_p", "intra_n"}),
    ],
    ids=["no pictures", "no titles"],
)
def test_a_catalogue_of_one_modality(lacking, absent):
    catalog = Catalog.from_products([product(number, **lacking) for number in range(40)])
    history = Trainer(tiny(), catalog, settings(max_steps=3)).train()
    gone = {name for name in OBJECTIVES if history[f"loss_{name}"].isna().all()}
    assert (
        np.isfinite(history["loss"]).all()
        and gone == absent
        and (history[[f"omega_{name}" for name in gone]] == 0).all().all()
    )
    np.testing.assert_allclose(history[[f"omega_{name}" for name in OBJECTIVES]].sum(axis=1), 1, atol=1e-5)


def test_too_few_products_for_a_batch():
    few = Catalog.from_products([product(number, split="train") for number in range(3)])
    with pytest.raises(DataError, match=r"6 triplets do not fill one batch of 8.*lower per_device_train_batch_size"):
        Trainer(tiny(), few, settings())
    assert len(Trainer(tiny(), few, settings(per_device_train_batch_size=2, max_steps=2)).train()) == 2
    with pytest.raises(DataError, match="no negatives"):
        Trainer(tiny(), Catalog.from_products([product(1)]), settings())
    with pytest.raises(UsageError, match="even"):
        Trainer(tiny(), shop(60), settings(per_device_train_batch_size=7))


def test_only_the_train_split_is_trained_on(catalog):
    trainer = Trainer(tiny(), catalog, settings())
    assert (
        {triplet.positive.split for triplet in trainer.triplets}
        == {"train"}
        == {negative.split for triplet in trainer.triplets for negative in triplet.negatives}
    )


def test_it_learns(catalog):
    config = settings(max_steps=60, connector_learning_rate=3e-3, learning_rate=3e-3, filter_warmup_ratio=0.3)
    loss = Trainer(tiny(), catalog, config).train()
    for name in ("inter_t", "inter_i", "inter_mm", "intra_p"):
        assert loss[f"loss_{name}"][-6:].mean() < 0.75 * loss[f"loss_{name}"][:6].mean(), name


# ---------------------------------------------------------------------------------------------- queries with one
# modality


def test_queries_with_one_modality_are_not_multimodal():
    "They have no part in inter_mm, in its phi, in the load of the multimodal view or in the balance of the experts."
    trainer = Trainer(tiny(perturbed=True), shop(60, mixed=True), settings(filter_warmup_ratio=0.0))
    events = {event.phase: event.data for event in (next(trainer) for _ in PHASES[:-1])}
    queries, views = [triplet.query for triplet in events["batch"]["triplets"]], events["views"]["views"]
    both = torch.tensor([query.has_text and query.image is not None for query in queries])
    assert both.any() and (~both).any(), "the batch should hold both kinds"
    assert torch.equal(views.present["q"]["mm"], both) and views.present["p"]["mm"].all()
    terms, keys = events["loss"]["terms"], events["batch"]["keys"]
    assert torch.equal(terms["phi"][2].isnan(), ~both)
    parts = [views.embedding[role]["mm"] for role in "qpn"]
    options = {
        "keys": keys.positive, "negative_keys": keys.negative, "query_keys": keys.query, "unique": True,
        "negative_mask": keys.negative_mask,
    }
    rows = inter_product_loss(*parts, 0.05, weight=terms["filter_weight"][2], reduction="none", **options)
    torch.testing.assert_close(terms["inter_mm"], rows[both].mean())
    weights, items = events["routing"]["routing"].weights, len(events["batch"]["items"])
    assert torch.allclose(
        objective_routing(events["routing"]["routing"], views, keys.negative_mask)[2], weights["q"]["mm"][both].mean(0)
    )
    whole = trainer.encoder.forward_items(events["batch"]["items"])
    used = torch.cat([both, torch.ones(items - len(both), dtype=torch.bool)])
    torch.testing.assert_close(events["routing"]["load"]["mm"], whole.routing["mm"][used].mean(0))
    assert not torch.allclose(whole.routing["mm"].mean(0), whole.routing["mm"][used].mean(0), rtol=1e-3)


def test_a_query_of_words_alone_counts_once_for_the_load():
    "Its tokens serve the view t; L_aux counted them for mm as well."
    catalog = Catalog.from_products([product(number, refs=()) for number in range(40)])
    trainer = Trainer(tiny(perturbed=True), catalog, settings())
    event = first(trainer, "routing")
    queries = {triplet.query.content for triplet in trainer.current_batch()}
    rows = trainer.encoder.rows_of([triplet.query for triplet in trainer.current_batch()])
    products = trainer.encoder.rows_of(collate(trainer.current_batch())[0][8:])
    assert len(queries) > 4 and event.data["routing"].layers[0].weight.sum().item() == sum(map(len, rows)) + 2 * sum(
        map(len, products)
    )
    history = trainer.train()
    assert (
        history["loss_inter_mm"].isna().all()
        and history["loss_inter_i"].isna().all()
        and history["omega_inter_mm"].eq(0).all()
    )
    assert history["loss_inter_t"].notna().all()


# ---------------------------------------------------------------------------------------------- devices


def on_meta(choices):
    "The choices of a machine with another device: torch's meta, which has shapes and no numbers."
    return dataclasses.replace(choices, device="meta")


def test_a_second_trainer_has_a_device_of_its_own(catalog, monkeypatch):
    "The encoder stands where its own config says, whatever the first trainer of the process did."
    first_one = Trainer(tiny(), catalog, settings())
    real = trainer_module.choose_numerics
    monkeypatch.setattr(trainer_module, "choose_numerics", lambda *args, **options: on_meta(real(*args, **options)))
    second = Trainer(tiny(), catalog, settings())
    assert (
        {p.device.type for p in second.encoder.parameters()}
        == {"meta"}
        == {p.device.type for g in second.optimizer.param_groups for p in g["params"]}
    )
    assert {p.device.type for p in first_one.encoder.parameters()} == {"cpu"} and len(first_one.train()) == 6


def test_resumed_moments_stand_where_the_optimizer_reads_them():
    "Fused AdamW reads its step count on the device; the plain one on the CPU."
    for fused, place in ((True, "meta"), (False, "cpu")):
        layer = torch.nn.Linear(2, 2, device="meta")
        optimizer = torch.optim.AdamW(layer.parameters())
        optimizer.param_groups[0]["fused"] = fused
        stored = {f"model.{name}": torch.zeros(p.shape) for name, p in layer.named_parameters()} | {
            "rng": torch.get_rng_state()
        }
        stored |= {
            f"optimizer.{name}.{key}": torch.tensor(3.0) if key == "step" else torch.zeros(p.shape)
            for name, p in layer.named_parameters()
            for key in ("step", "exp_avg")
        }
        load_tensors(stored, layer, optimizer)
        found = optimizer.state[layer.weight]
        assert (found["step"].device.type, found["exp_avg"].device.type) == (place, "meta")
