"""metrics.jsonl, TensorBoard events, the loss curve, the report's formats, stopping on signals."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quant.common.errors import NibbleError
from quant.common.words import counted, format_bytes, format_seconds, table
from train.output.metrics import MetricsLog, read_metrics
from train.output.plots import _running_mean, loss_curve
from train.output.report import Report, log_path
from train.signals import StopOnSignal


def step(number: int, loss: float) -> dict[str, Any]:
    return {"kind": "train", "step": number, "loss": loss, "learning_rate": 1e-4}


def held_out(number: int, loss: float) -> dict[str, Any]:
    return {"kind": "eval", "step": number, "loss": loss}


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Writing beyond the first `size` bytes of a file fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_records_are_written_line_by_line_and_as_events(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, tmp_path / "events", resume_step=None) as log:
        log.write(held_out(0, 3.0))
        log.write(step(1, 2.5))
        assert [json.loads(line) for line in path.read_text().splitlines()] == [held_out(0, 3.0), step(1, 2.5)]
        log.write(step(2, 2.25))
    assert scalars(tmp_path / "events", "train/loss") == [(1, 2.5), (2, 2.25)]
    assert scalars(tmp_path / "events", "eval/loss") == [(0, 3.0)]


def test_resuming_drops_the_steps_that_will_be_made_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, tmp_path / "events", resume_step=None) as log:
        for record in (held_out(0, 3.0), step(1, 2.5), step(2, 2.25), held_out(2, 2.0), step(3, 1.5)):
            log.write(record)
    with path.open("a") as file:
        file.write('{"kind": "train", "st')  # torn by a kill
    with MetricsLog(path, tmp_path / "events", resume_step=2) as log:
        assert log.evaluated(0)
        assert log.evaluated(2)
        assert not log.evaluated(3)
        log.write(step(3, 1.25))
    assert read_metrics(path) == [held_out(0, 3.0), step(1, 2.5), step(2, 2.25), held_out(2, 2.0), step(3, 1.25)]
    assert scalars(tmp_path / "events", "train/loss") == [(1, 2.5), (2, 2.25), (3, 1.25)]


def test_a_fresh_start_empties_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "eval", "step": 0, "loss": 3.0}\n')
    with MetricsLog(path, None, resume_step=None) as log:
        assert not log.evaluated(0)
    assert read_metrics(path) == []


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "eval", "step": 0}\nnot json\n')
    with pytest.raises(NibbleError, match=r"metrics\.jsonl:2: not a metrics record"):
        read_metrics(path)


def test_no_file_means_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def write_much() -> None:
        with full_disk(200), MetricsLog(path, None, resume_step=None) as log:
            for number in range(1, 9):
                log.write(step(number, 2.5))

    with pytest.raises(NibbleError) as caught:
        write_much()
    assert str(caught.value) == (
        f"the disk is full: {path} can't be written (File too large).\nMake room and run again."
    )
    assert [record["step"] for record in read_metrics(path)] == [1, 2]

    folder = tmp_path / "file"
    folder.touch()
    with pytest.raises(NibbleError, match=r"file/metrics\.jsonl can't be written: (Not a directory|File exists)\."):
        MetricsLog(folder / "metrics.jsonl", None, resume_step=None)


def test_events_on_a_full_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "events", resume_step=None) as log:
        log.write({"kind": "train", "step": 1, "loss": 2.5})
        size = next((tmp_path / "events").iterdir()).stat().st_size
        expected = rf"^the disk is full: {tmp_path / 'events'} can't be written"
        with full_disk(size + 10), pytest.raises(NibbleError, match=expected):
            log.write({"kind": "train", "step": 2, "loss": 2.5})
    assert "Traceback" not in capfd.readouterr().err


def test_loss_curve_on_a_full_disk(tmp_path: Path) -> None:
    loss_curve([step(1, 2.5)], tmp_path / "loss.png", "a run")
    before = (tmp_path / "loss.png").read_bytes()
    with full_disk(1000), pytest.raises(NibbleError, match=r"^the disk is full: .*/loss\.png can't be written"):
        loss_curve([step(1, 2.5), step(2, 2.0)], tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_loss_curve_is_a_png(tmp_path: Path) -> None:
    records = [held_out(0, 3.0), *(step(i, 3.0 / i) for i in range(1, 41)), held_out(40, 0.5)]
    for shown in (records, records[1:2], []):
        loss_curve(shown, tmp_path / "loss.png", "a run")
        data = (tmp_path / "loss.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(data[16:20]) == 960
        assert int.from_bytes(data[20:24]) == 540


def test_running_mean_is_centred() -> None:
    assert _running_mean([1.0, 2.0, 6.0, 4.0], reach=1) == [1.5, 3.0, 4.0, 5.0]


def test_report_sends_results_and_progress_their_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def speak_and_fail() -> None:
        with Report(tmp_path / "run.log") as report:
            report.result("a result")
            report.note("a note")
            report.progress("step 1", keep=True)
            report.progress("step 2", keep=False)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        speak_and_fail()
    out, err = capsys.readouterr()
    assert out == "a result\n"
    assert err == "a note\nstep 1\n"
    log = (tmp_path / "run.log").read_text()
    for text in ("a result", "a note", "step 1", "Traceback (most recent call last)", "ValueError: broken"):
        assert text in log
    assert "step 2" not in log


def test_a_quiet_report_writes_the_log_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = log_path(tmp_path, 3)
    assert path == tmp_path / "ranks" / "rank-3.log"
    assert log_path(tmp_path, 0) == tmp_path / "run.log"
    with Report(path, quiet=True) as report:
        report.result("a result")
        report.note("a note")
        report.progress("step 1", keep=True)
        report.progress("step 2", keep=False)
        logging.getLogger("nibble").info("from a model")
    report.log("too late")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert path.read_text().splitlines()[1:] == ["a result", "a note", "step 1", "from a model"]


def test_a_line_for_the_log_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Report(tmp_path / "run.log") as report:
        report.log("a line")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert (tmp_path / "run.log").read_text().endswith("---\na line\n")


def test_a_log_on_a_full_disk_hides_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def speak_and_fail() -> None:
        with full_disk(100), Report(tmp_path / "run.log") as report:
            for _ in range(5):
                report.result("a result that takes some room in the log")
            raise NibbleError("broken")

    with pytest.raises(NibbleError, match="broken"):
        speak_and_fail()
    assert capsys.readouterr().out.count("a result") == 5
    assert (tmp_path / "run.log").stat().st_size <= 100


def test_a_log_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "run.log").mkdir()
    with pytest.raises(NibbleError, match=r"run\.log can't be written: Is a directory\."):
        Report(tmp_path / "run.log")


def test_a_terminal_that_was_closed_takes_only_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        terminal = False

        def isatty(self) -> bool:
            return self.terminal

        def write(self, text: str) -> int:
            raise BrokenPipeError if not self.terminal else OSError(5, "Input/output error")

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", Closed())
    monkeypatch.setattr("sys.stderr", stream := Closed())
    with Report(tmp_path / "run.log") as report:
        for stream.terminal in (False, True):
            report.result("a result")
            report.note("a note")
            report.progress("step 1", keep=True)
            report.end_progress()
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert lines[1:] == ["a result", "a note", "step 1"] * 2


def test_on_a_terminal_the_progress_line_is_redrawn_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with Report(tmp_path / "run.log") as report:
        report.progress("step 1", keep=False)
        report.progress("step 2", keep=True)
        report.note("a note")
        report.progress("step 3", keep=True)
    shown = terminal.getvalue()
    assert "step 1\r\x1b[2Kstep 2" in shown  # back to the beginning of the line, erase it
    assert shown.index("step 2") < shown.index("\n") < shown.index("a note\n") < shown.index("step 3")
    assert "step 1" not in (tmp_path / "run.log").read_text()


def test_what_the_models_log_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("nibble")
    level, handlers = logger.level, list(logger.handlers)
    with Report(tmp_path / "run.log"):
        logger.info("using the converted copy %s", "x-nf4")
    assert (logger.level, logger.handlers) == (level, handlers)
    assert "using the converted copy x-nf4\n" in capsys.readouterr().err
    assert "using the converted copy x-nf4\n" in (tmp_path / "run.log").read_text()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (512, "512 B"), (2048, "2.00 KiB"), (3_565_158, "3.40 MiB"), (16_406_776_013, "15.28 GiB")],
)
def test_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.25, "1.2 s"), (45.2, "45 s"), (59.7, "60 s"), (1380, "23 min"), (7500, "2 h 05 min"), (273_600, "3 d 4 h")],
)
def test_lengths_of_time(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_counts_agree_with_their_nouns() -> None:
    counts = [(0, "0 steps"), (1, "1 step"), (1214, "1,214 steps"), (1.0, "1 step"), (0.5, "0.5 steps")]
    assert [counted(number, "step") for number, _ in counts] == [text for _, text in counts]


def test_table_aligns_its_columns() -> None:
    rows = [["group", "size"], ["experts", "1,024"], ["head", "8"]]
    assert table(rows, right=[1]) == "  group      size\n  experts   1,024\n  head          8"


@pytest.mark.usefixtures("signals_heeded")
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_and_the_second_interrupts(
    first: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with StopOnSignal() as stop:
        assert not stop.requested
        signal.raise_signal(first)
        assert stop.requested
        assert stop.name == first.name
        signal.raise_signal(first)  # a scheduler's second reminder changes nothing
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    assert f"{first.name}: finishing this step, then saving" in capfd.readouterr().err


@pytest.mark.usefixtures("signals_heeded")
def test_of_several_processes_a_second_interrupt_changes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """With torchrun and without: one that left the step would leave the others waiting for it."""
    with StopOnSignal(launched=True) as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested
    assert capfd.readouterr().err == "\nSIGINT: finishing this step, then saving.\n"


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopOnSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)
