"""Trackers show a run while it is going: read back from what they wrote, in the middle of it."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from d3po_bench.training import trainer
from tests.commands import SETTINGS, Command, Stop, refused, run_of, seed_folder

EVENTS = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
RECORDS = pytest.importorskip("wandb.proto.wandb_internal_pb2")

BOTH = ("--track", "tensorboard", "--track", "wandb")
PICTURE, SCORE, GAIN = "samples", "held-out eta1/score", "held-out eta1/gain"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No network and no login, as on a cluster's node."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "0.1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    wandb.teardown()  # of its own process, and of what it knows of the environment


# ---- reading


def of_tensorboard(run: Path) -> Any:
    found = EVENTS.EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0})
    return found.Reload()


def scalars(found: Any) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, each step once."""
    points = {tag: [(e.step, e.value) for e in found.Scalars(tag)]
              for tag in found.Tags()["scalars"]}  # fmt: skip
    for tag, each in points.items():
        assert len(dict(each)) == len(each), tag
    return {tag: dict(each) for tag, each in points.items()}


def records(path: Path) -> Iterator[Any]:
    """What is in a .wandb file: a log of records in blocks of 32 KiB, after LevelDB's."""
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        part, place = data[place + 7 : place + 7 + size], place + 7 + size
        if kind == 0 or len(part) < size:
            return
        whole += part
        if kind in (1, 4):  # whole, or the last part of one
            record = RECORDS.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""
        if -place % 32768 < 7:
            place += -place % 32768


def of_wandb(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows that were logged, and the settings."""
    rows, config = list[dict[str, Any]](), dict[str, Any]()
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            items = {".".join(i.nested_key) or i.key: json.loads(i.value_json)
                     for i in record.history.item}  # fmt: skip
            rows += [items] if items else []
            config |= {c.key: json.loads(c.value_json) for c in record.run.config.update}
    return rows, config


def soon(done: Callable[[], bool]) -> None:
    """wandb writes in a process of its own."""
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# ---- while it runs


def test_both_show_numbers_and_pictures_after_the_first_round_of_a_running_run(
    command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, looked = seed_folder(Path("runs"), micro), list[int]()
    train_round = trainer.Trainer.train_round

    def look(self: trainer.Trainer, working: Any) -> Any:
        if self.round == 1:
            board = of_tensorboard(run)
            shown = scalars(board)
            assert {SCORE, GAIN, "loss", "reward_mean", "seconds/sample"} <= shown.keys()
            assert [*shown[SCORE]] == [0, 1]
            assert shown[GAIN][1] == pytest.approx(shown[SCORE][1] - shown[SCORE][0], abs=1e-6)
            assert [*shown["loss"]] == [1]
            samples = {p.stem for p in (run / "samples" / "round-00001").iterdir()}
            tags = [tag for tag in board.Tags()["images"] if tag.startswith(PICTURE)]
            assert len(tags) == len(samples) == 2
            png = board.Images(tags[0])[-1].encoded_image_string
            assert png.startswith(b"\x89PNG")
            soon(lambda: any("loss" in row for row in of_wandb(run)[0]))
            rows, config = of_wandb(run)
            assert [row["round"] for row in rows] == [0, 1, 1]
            assert rows[1][SCORE] == pytest.approx(shown[SCORE][1])
            assert rows[1][GAIN] == pytest.approx(shown[GAIN][1], abs=1e-6)
            assert len(rows[1]["samples.captions"]) == 2
            assert config["learning_rate"] == 3e-3
            assert config["command"].startswith("d3po-bench run --method d3po --objective incom")
            assert len(list(run.glob("wandb/offline-run-*/files/media/images/*.png"))) == 4
            looked.append(self.round)
        return train_round(self, working)

    monkeypatch.setattr(trainer.Trainer, "train_round", look)
    done = command(*run_of(micro, *BOTH, rounds=2, eval_every=1))
    assert (done.code, looked) == (0, [1]), done.err
    assert "wandb sync" in done.err
    assert of_tensorboard(run).Tags()["tensors"] == ["command/text_summary"]


def test_a_resumed_run_goes_on_there_without_points_twice(
    command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = run_of(micro, *BOTH, rounds=4, checkpoint_every=2, eval_every=1)
    run = seed_folder(Path("runs"), micro)
    with monkeypatch.context() as patch:
        from d3po_bench.training.checkpoints import Checkpoints

        # As a kill does: round 3 was shown, and is not in the checkpoint.
        patch.setattr(Checkpoints, "stopped", lambda self: None)
        stop = Stop(trainer.Trainer.train_round, lambda t, *_: t.round == 3, KeyboardInterrupt())
        patch.setattr(trainer.Trainer, "train_round", stop)
        assert command(*asked).code == 1
    assert [*scalars(of_tensorboard(run))["loss"]] == [1, 2, 3]
    assert command(*asked).code == 0
    shown = scalars(of_tensorboard(run))
    assert [*shown["loss"]] == [1, 2, 3, 4]
    assert [*shown[GAIN]] == [0, 1, 2, 3, 4]
    names = {path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")}
    assert len(names) == 1
    gains = {row["round"]: row[GAIN] for row in of_wandb(run)[0] if GAIN in row}
    assert gains == pytest.approx(shown[GAIN], abs=1e-6)


GRID = """
methods = ["d3po"]
objectives = ["incompress"]
seeds = 2
model = "{model}"
preset = "official_code"
[set]
rounds = 1
eval_every = 1
"""


@pytest.mark.slow
def test_a_sweep_shows_all_its_runs(command: Command, micro: Path) -> None:
    small = "".join(f"{key} = {json.dumps(value)}\n" for key, value in SETTINGS.items()
                    if key != "eval_every")  # fmt: skip
    Path("grid.toml").write_text(GRID.format(model=micro) + small)
    line = ("sweep", "grid.toml", "--track", "tensorboard", "--device", "cpu", "--jobs", "1")
    assert command(*line).code == 0
    for seed in (0, 1):
        shown = scalars(of_tensorboard(seed_folder(Path("runs"), micro, seed)))
        assert ([*shown["loss"]], [*shown[GAIN]]) == ([1], [0, 1])


# ---- what cannot be


def test_nobody_goes_online_without_a_login(
    command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    said = refused(command(*run_of(micro, "--track", "wandb")), "--track wandb", "wandb login")
    assert "WANDB_MODE=offline" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("line", ["sweep grid.toml", "table1", "feedback train nowhere"])
def test_an_unknown_tracker_is_refused_everywhere(line: str, command: Command) -> None:
    text = "methods = ['d3po']\nobjectives = ['incompress']\nseeds = 1\n"
    Path("grid.toml").write_text(text)
    done = refused(command(*line.split(), "--track", "nonsense"))
    assert "No tracker is called 'nonsense'" in done or "nowhere" in done
    assert [path.name for path in Path().iterdir()] == ["grid.toml"]
