"""What a user is told: progress in a terminal, a notebook or a log, and how a model describes itself."""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from scldm_cd4 import CD4Model, _console


def parts(n: int, closed: list[bool] | None = None) -> Iterator[list[int]]:
    try:
        for i in range(n):
            yield [i] * 10
    finally:
        if closed is not None:
            closed.append(True)


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is 4 s later."""
    times = iter(range(0, 10_000, 4))
    monkeypatch.setattr("scldm_cd4._console.time.monotonic", lambda: float(next(times)))


def test_a_log_gets_an_estimate_and_a_line_now_and_then(slow_clock: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "scldm_cd4"):
        done = list(_console.tracked(parts(40), 400, "generating", "cells", size=len, n_bytes=lambda part: 1 << 20))
    assert len(done) == 40
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "generating: 10 of 400 cells, about 2.6 min left, 40.0 MB in all"
    assert len(lines) == 3  # 160 s
    assert "MB" not in lines[1]


def test_short_work_is_silent(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO, "scldm_cd4"):
        assert len(list(_console.tracked(parts(3), 30, "generating", "cells", size=len))) == 3
    assert caplog.text == ""
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_request_tells_memory_and_goes_away(slow_clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    made = []
    real = _console.new_bar
    monkeypatch.setattr(_console, "new_bar", lambda *a, **k: made.append(real(*a, **(k | {"delay": 0}))) or made[0])
    list(_console.tracked(parts(4), 40, "generating", "cells", size=len, n_bytes=lambda p: 1 << 30, progress=True))
    (bar,) = made
    assert bar.n == 40
    assert "about 4.0 GB" in bar.postfix
    assert not bar.leave


def test_work_that_is_left_is_closed() -> None:
    closed: list[bool] = []
    told = _console.tracked(parts(5, closed), 50, "generating", "cells", size=len)
    next(told)
    told.close()
    assert closed == [True]


def test_a_training_without_a_bar_tells_a_log_how_long_it_takes(
    simulated: Any, quick: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_console, "LONG", 0.0)
    monkeypatch.setattr("scldm_cd4.train.progress.WARM", 0.0)
    model = CD4Model(simulated, "tiny", **quick)
    with caplog.at_level(logging.INFO, "scldm_cd4"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The decoder makes little use")
        model.train(max_epochs=2, seed=0, progress=False)
    lines = [record.getMessage() for record in caplog.records]
    n = 2 * len(model.train_indices)
    assert [line.partition(":")[0] for line in lines] == ["autoencoder", "flow"]  # the next line comes after a minute
    assert all(f" of {n} cells, about " in line for line in lines)


def test_terminal_and_log_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not _console.wants_progress(None)
    assert _console.wants_progress(True)
    monkeypatch.setattr("scldm_cd4._console.in_notebook", lambda: True)
    assert _console.wants_progress(None)
    assert not _console.wants_progress(False)


def test_generation_prints_nothing_into_a_log(trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trained.generate(perturbation="NTC", n_cells=2, seed=0)
    assert capsys.readouterr() == ("", "")


def test_a_model_tells_how_it_was_trained(trained: Any, simulated: Any) -> None:
    text = repr(trained)
    history = trained.history_["vae"]
    assert f"training of the autoencoder: {len(history)} epochs, best" in text
    assert "training of the flow" in text
    assert "preset: own configuration" in text
    fresh = repr(CD4Model(simulated, "tiny"))
    assert "preset: tiny" in fresh
    assert "trained: no" in fresh
    assert "epochs" not in fresh
    for fact in ("genes: 50", "2 donors", "device: cpu", "fp32"):
        assert fact in text


def test_labels_are_escaped_in_a_notebook(simulated: Any) -> None:
    cells = simulated.copy()
    cells.obs["perturbation"] = cells.obs["perturbation"].astype(str).replace("NTC", "<img src=x>")
    CD4Model.setup_anndata(cells, perturbation_key="perturbation", control="<img src=x>")
    html = CD4Model(cells, "tiny")._repr_html_()
    assert "<img" not in html
    assert "&lt;img src=x&gt;" in html
