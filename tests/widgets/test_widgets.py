"""The live view with real trainers, and sheets with what people really write."""

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moon2_lab.config import TrainConfig
from moon2_lab.reporting.contact_sheet import Card, _caption_font, card_sheet, cards_html, triplet_cards, wrap
from moon2_lab.testing import made_up_history
from moon2_lab.training.run_folder import RunFolder
from moon2_lab.widgets.training import BatchView, LiveTraining, LiveView


@pytest.fixture(scope="module")
def make_trainer(drawn_catalogue):
    "A function that makes the same tiny trainer again and again."
    from moon2_lab.data.catalog import Catalog
    from moon2_lab.model.encoder import Moon2Encoder
    from moon2_lab.training.trainer import Trainer

    catalog = Catalog.load(drawn_catalogue)
    config = TrainConfig(
        backbone="tiny",
        num_layers=1,
        image_size=32,
        visual_tokens=4,
        max_steps=8,
        per_device_train_batch_size=8,
        num_threads=1,
    )

    def make(**changes):
        encoder = Moon2Encoder.from_backbone("tiny", num_layers=1, image_size=32, visual_tokens=4)
        return Trainer(encoder, catalog, config.replace(**changes))

    return make


@pytest.fixture(scope="module")
def plain_end(make_trainer):
    "Fingerprint of the weights after `train()`."
    trainer = make_trainer()
    trainer.train()
    return trainer.encoder.fingerprint


def no_display(live):
    "The live view without a page to stand on."
    live._handle = SimpleNamespace(update=lambda *args, **kwargs: None)
    return live


def steps_sent(view):
    "The steps of which the browser has numbers."
    return np.frombuffer(view.widget.data, "<f4").reshape(len(view.widget.curves) + 1, -1)[0]


async def reached(holds, seconds=120):
    "Leave the loop to the others until `holds()`."
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        await asyncio.sleep(0)


def test_finish_gives_the_weights_of_train(make_trainer, plain_end):
    live = LiveTraining(make_trainer())
    history = live.finish()
    assert live.trainer.encoder.fingerprint == plain_end
    assert len(history) == 8 and list(history.step) == list(range(8)) and live.state == "done"
    assert steps_sent(live.view).tolist() == list(range(8)) and len(live.view.widget.curves) > 30


def test_background_pause_step_and_takeover_give_the_weights_of_train(make_trainer, plain_end):
    "Buttons come from another thread, as they do in JupyterLab; `finish` takes over in the middle of a step."

    async def session():
        live = no_display(LiveTraining(make_trainer()))
        live.start()
        live.start()  # a second call changes nothing
        live.want("pause")
        await reached(lambda: live.state == "paused")
        assert live.trainer.step == 1
        presser = threading.Thread(target=live.buttons["step"].click)
        presser.start(), presser.join()
        await reached(lambda: live.trainer.step >= 2 and live.state == "paused")
        live.want("run")
        phases = []
        live.trainer.callbacks.append(lambda event: phases.append(event.phase))
        await reached(lambda: phases[-1:] == ["similarity"])
        live.finish()
        await asyncio.sleep(0.05)
        return live

    live = asyncio.run(session())
    assert live.trainer.encoder.fingerprint == plain_end and live.state == "done" and live._task.done()


def test_stop_and_continue_from_another_thread(make_trainer, plain_end):
    async def session():
        live = no_display(LiveTraining(make_trainer()))
        live.start()
        live.want("stop")
        await reached(lambda: live.state == "stopped")
        stopped_at = live.trainer.step
        assert len(live.finish()) == stopped_at  # stopped is stopped
        waker = threading.Thread(target=live.want, args=("resume",))
        waker.start(), waker.join()
        await reached(lambda: live.state == "done")
        return stopped_at, live

    stopped_at, live = asyncio.run(session())
    assert stopped_at == 1 and live.trainer.encoder.fingerprint == plain_end


def test_background_error_is_told_and_raised_by_finish(make_trainer, plain_end):
    "The failed step is taken again by the next call."

    def trip(event):
        if event.step == 3 and event.phase == "loss" and not trip.done:
            trip.done = True
            raise ValueError("a callback's own mistake")

    trip.done = False

    async def session():
        live = no_display(LiveTraining(make_trainer()))
        live.trainer.callbacks.append(trip)
        live.start()
        await reached(lambda: live.state == "failed")
        assert "ValueError: a callback" in live.status.value and not live.buttons["resume"].disabled
        with pytest.raises(ValueError, match="own mistake"):
            live.finish()
        live.finish()
        return live

    live = asyncio.run(session())
    assert live.trainer.encoder.fingerprint == plain_end


def test_await_waits_without_holding_the_loop(make_trainer, plain_end):
    "Buttons are heard meanwhile; a cancelled wait (an interrupted cell) pauses the run; a second one goes on."

    async def session():
        live = no_display(LiveTraining(make_trainer()))
        live.start()
        waiting = asyncio.create_task(live._wait())
        await reached(lambda: live.trainer.step >= 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await reached(lambda: live.state == "paused")
        held = live.trainer.step
        await asyncio.sleep(0.2)
        assert live.trainer.step == held
        waiting = asyncio.create_task(live._wait())
        await asyncio.sleep(0)
        live.want("stop")
        assert 2 <= len(await waiting) < 8 and live.state == "stopped"
        live.start()
        assert len(await live) == 8
        return live

    live = asyncio.run(session())
    assert live.state == "done" and live.trainer.encoder.fingerprint == plain_end


def test_await_starts_a_run_and_raises_its_error(make_trainer):
    async def session(live):
        live.trainer.objective = lambda *parts: {"no": "loss"}
        with pytest.raises(Exception, match="no 'loss'"):
            await live
        return live.state

    assert asyncio.run(session(no_display(LiveTraining(make_trainer())))) == "failed"


def test_interrupt_of_finish_can_be_continued(make_trainer, plain_end, tmp_path):
    "With a run folder the interrupt also leaves a checkpoint."
    trainer = make_trainer()
    trainer.out, trainer.folder = tmp_path / "run", RunFolder(tmp_path / "run")

    def interrupt(event):
        if event.step == 2 and event.phase == "gradients" and not interrupt.done:
            interrupt.done = True
            raise KeyboardInterrupt

    interrupt.done = False
    live = LiveTraining(trainer)
    trainer.callbacks.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        live.finish()
    assert live.state == "interrupted" and (trainer.out / "checkpoints" / "step-000002").is_dir()
    live.finish()
    assert trainer.encoder.fingerprint == plain_end


def test_a_finished_run_stays_with_its_buttons(make_trainer):
    "View and still picture in one output; a click in the background makes the run longer, and the weights move."

    async def session():
        shown, live = [], LiveTraining(make_trainer(max_steps=3))
        live._handle = SimpleNamespace(update=lambda bundle, raw: shown.append(bundle))
        live.start()
        await live
        assert live.state == "done" and {"application/vnd.jupyter.widget-view+json", "image/png"} <= set(shown[-1])
        assert live.widget.comm is not None and not live.buttons["more"].disabled
        assert all(button.disabled for name, button in live.buttons.items() if name != "more")
        before = live.trainer.encoder.fingerprint
        presser = threading.Thread(target=live.buttons["more"].click)
        presser.start(), presser.join()
        await reached(lambda: live.trainer.step >= 5)
        live.want("stop")
        await reached(lambda: live.state == "stopped")
        return live, before

    live, before = asyncio.run(session())
    assert live.trainer.max_steps == 53 and 5 <= live.trainer.step < 53
    assert live.trainer.encoder.fingerprint != before


def losses(trainer):
    "What the history holds of losses and omega, without the times."
    return trainer.table().filter(regex="^(step|loss|omega|p_|phi|grad_norm)")


def test_what_if_changes_nothing_of_the_run(make_trainer):
    """Temperature and omega mode are tried while it trains, in a pause and after a stop: the run ends with the same
    weights, moments and history, bit for bit, as one that nobody asked.
    """
    plain = make_trainer()
    plain.train()

    async def session():
        live = no_display(LiveTraining(make_trainer(), every=3600))  # between two drawings, too
        asks = iter([{"temperature": 0.02}, {"omega_mode": "faithful"}, {"intra_temperature": 0.2}])
        box, shown, number = live.what_if, [], iter(range(1, 9))
        ask = lambda: setattr(box, "asked", {"number": next(number)} | next(asks))
        live.trainer.callbacks.append(lambda event: ask() if (event.step, event.phase) == (1, "similarity") else None)
        box.observe(lambda change: shown.append(change.new | {"at": live.trainer.step, "state": live.state}), "shown")
        live.start()
        await reached(lambda: shown)
        live.want("pause")
        await reached(lambda: live.state == "paused")
        ask()
        await reached(lambda: len(shown) > 1)
        live.want("stop")
        await reached(lambda: live.state == "stopped")
        held, weights = live.trainer.step, live.trainer.encoder.fingerprint
        ask()  # nothing runs: it is computed at once
        assert len(shown) == 3 and (live.trainer.step, live.trainer.encoder.fingerprint) == (held, weights)
        as_is, other = (events[-1].data["row"] for events in live.trainer.what_if(intra_temperature=0.2))
        live.start()
        await live
        return live, shown, as_is, other

    live, shown, as_is, other = asyncio.run(session())
    assert [each["state"] for each in shown] == ["running", "paused", "stopped"] and shown[0]["at"] == 2
    assert not any("error" in each for each in shown)
    told = {name: numbers for name, *numbers, _ in shown[2]["losses"]}
    assert told["intra_p"] == [as_is["loss_intra_p"], other["loss_intra_p"]]
    assert told["intra_p"][0] != told["intra_p"][1]
    faithful = {name: numbers for name, *numbers, _ in shown[1]["omega"]}
    assert any(one != two for one, two in faithful.values())
    assert live.trainer.encoder.fingerprint == plain.encoder.fingerprint
    for one, two in zip(plain.optimizer.state.values(), live.trainer.optimizer.state.values(), strict=True):
        assert all(bool((one[name] == two[name]).all()) for name in ("exp_avg", "exp_avg_sq", "step"))
    pd.testing.assert_frame_equal(losses(live.trainer), losses(plain), check_exact=True)


def test_what_if_of_a_setting_that_there_is_not(make_trainer):
    "The message stands in the widget; the run goes on."
    live = LiveTraining(make_trainer(max_steps=2))
    assert not live.what_if.ready
    live.finish()
    live.what_if.asked = {"number": 1, "temperature": -1.0}
    assert live.what_if.ready and "temperature" in live.what_if.shown["error"] and live.state == "done"
    live.trainer.objective = lambda *parts: {}
    live.what_if.asked = {"number": 2, "temperature": 0.1}
    assert "does not read temperature" in live.what_if.shown["error"]


def test_an_objective_of_ones_own_and_no_experts(make_trainer):
    "What the history lacks is left out of the view."
    trainer = make_trainer(max_steps=3)
    trainer.objective = lambda views, routing, keys: {"loss": views.embedding["q"]["mm"].square().sum()}
    live = LiveTraining(trainer)
    live.finish()
    names = {name for _, name, *_ in live.view.widget.curves}
    assert "total" in names and not names & {"inter_t", "share down-weighted"}


def test_drawing_is_bounded_in_time():
    "At most twice a second, and never more than a tenth of the time."
    view, rows = LiveView(every=0.2), made_up_history(3000).to_dict("records")
    start = time.monotonic()
    for row in rows:
        view.on_step(SimpleNamespace(data={"row": row}))
        time.sleep(0.0003)
    spent = time.monotonic() - start
    assert 1 <= view.drawings <= spent / 0.2 + 1
    assert len(steps_sent(view)) <= 150


def test_start_in_a_plain_script_trains_to_the_end(tmp_path):
    "No kernel, no event loop, nothing displayed."
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        from types import SimpleNamespace
        from moon2_lab.widgets.training import LiveTraining
        class Straw:
            step, max_steps, history, callbacks = 0, 3, [], []
            def __iter__(self): return self
            def __next__(self):
                if self.step == 3: raise StopIteration
                self.step += 1
                self.history.append({"step": self.step, "loss": 1.0, "seconds": 0.0})
                return SimpleNamespace(phase="step", data={"row": self.history[-1]})
        live = LiveTraining(Straw())
        live.start()
        print(live.state, live.trainer.step)
    """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["done", "3"]


def test_batch_view_of_real_triplets(make_trainer):
    batch = make_trainer().current_batch()
    view = BatchView(
        [cards_html(triplet_cards(triplet), side=60) for triplet in batch], [triplet.query_id for triplet in batch]
    )
    for number in range(len(batch)):
        view.slider.value = number
        assert batch[number].query_id in view.page.value and view.page.value.count("<figure") == 3
    assert card_sheet([triplet_cards(triplet) for triplet in batch], side=40).width > 100


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300), st.integers(20, 200), st.integers(1, 4))
def test_wrapped_words_fit(text, width, lines):
    "Whatever a seller writes: emoji, Arabic, one word of a thousand letters, control characters."
    font = _caption_font(text, 12)
    found = wrap(text, font, width, lines)
    assert 1 <= len(found) <= lines
    assert all(font.getlength(line) <= width for line in found)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.text(max_size=60), min_size=1, max_size=4), min_size=1, max_size=3), st.booleans())
def test_a_sheet_of_any_words(rows, pictured):
    picture = Image.new("LA", (7, 300)) if pictured else None
    cards = [[Card(picture, words) for words in row] for row in rows]
    sheet = card_sheet(cards, side=30, titles=[row[0] for row in rows])
    assert sheet.mode == "RGB" and sheet.width >= 30
    assert cards_html([card for row in cards for card in row], side=10).count("<figure") == sum(map(len, rows))


def test_history_of_a_restored_run(make_trainer):
    "After `restore` the curves lose what was undone."
    trainer = make_trainer()
    live = LiveTraining(trainer)
    next(event for event in trainer if event.phase == "step")
    kept = trainer.snapshot()
    next(event for event in trainer if event.phase == "step")
    trainer.restore(kept)
    history = live.finish()
    assert steps_sent(live.view).tolist() == list(range(8)) == list(pd.DataFrame(history).step)
