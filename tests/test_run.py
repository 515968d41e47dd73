"""A whole run: what it writes, and what changes none of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from d3po_bench.launch import launch
from d3po_bench.runs.run import RunFolder
from eval.tools import TOOLS
from tests.commands import WRITTEN, Command, files, run_of, seed_folder, written


def test_a_run_writes_what_the_architecture_says(finished: Path) -> None:
    pictures = {
        f"samples/round-{n:05d}/{prompt}.png" for n in (0, 2) for prompt in ("cat", "butterfly")
    }
    assert files(finished) == pictures | {
        "config.json", "provenance.json", "metrics.jsonl", "eval.csv", "timing.jsonl",
        "checkpoints/last.safetensors", "checkpoints/previous.safetensors",
        "lora/pytorch_lora_weights.safetensors",
    }  # fmt: skip


def test_a_runs_numbers_add_up(finished: Path) -> None:
    store = RunFolder(finished)
    assert [m["round"] for m in store.metrics] == [1, 2]
    assert [t["round"] for t in store.timing] == [1, 2]
    assert [(m["pairs"], m["images"], m["scorer_calls"]) for m in store.metrics] == [
        (2, 4, 4), (4, 8, 8)
    ]  # fmt: skip
    assert all(m["reward_mean"] == m["score_mean"] > 0 for m in store.metrics)
    assert store.metrics[0]["kl"] == 0 < store.metrics[1]["kl"]
    cells = [(e["round"], e["sampler"], e["prompt"], e["index"]) for e in store.evaluation]
    assert cells == [
        (n, sampler, prompt, 0)
        for n in (0, 2) for sampler in ("eta1", "eta0") for prompt in ("cat", "butterfly")
    ]  # fmt: skip
    assert store.finished
    assert store.facts["execution"]["threads"] == 1
    assert store.facts["device"] == "cpu"


def test_the_same_command_writes_the_same_bytes(
    command: Command, micro: Path, finished: Path
) -> None:
    done = command(*run_of(micro))
    assert done.code == 0
    assert done.err.splitlines()[-1] == "Runs are in runs. Draw them: d3po-bench plot runs"
    assert written(seed_folder(Path("runs"), micro)) == written(finished)
    for n in (0, 2):
        name = f"samples/round-{n:05d}/cat.png"
        assert written(seed_folder(Path("runs"), micro), (name,)) == written(finished, (name,))


@pytest.mark.slow
def test_jobs_seeds_and_batches_do_not_change_what_is_written(
    command: Command, micro: Path, finished: Path
) -> None:
    assert command(*run_of(micro, "--seeds", "2", "--jobs", "2", "--out", "two")).code == 0
    assert command(*run_of(micro, "--seed-start", "1", "--out", "one")).code == 0
    first = written(seed_folder(Path("two"), micro, 0))
    second = written(seed_folder(Path("two"), micro, 1))
    assert first == written(finished)
    assert second == written(seed_folder(Path("one"), micro, 1))
    assert all(first[name] != second[name] for name in WRITTEN)


def test_evaluation_changes_no_weight(command: Command, micro: Path, finished: Path) -> None:
    names = ("metrics.jsonl", "lora/pytorch_lora_weights.safetensors")
    assert command(*run_of(micro, "--out", "never", eval_every=0)).code == 0
    never = seed_folder(Path("never"), micro)
    assert written(never, names) == written(finished, names)
    assert "eval.csv" not in files(never)
    assert command(*run_of(micro, "--out", "always", eval_every=1, eval_images=2)).code == 0
    always = seed_folder(Path("always"), micro)
    assert written(always, names) == written(finished, names)
    assert (always / "eval.csv").read_text().count("\n1,") == 8


def test_a_finished_run_is_not_done_again(command: Command, micro: Path, finished: Path) -> None:
    folder = seed_folder(Path("runs"), micro)
    shutil.copytree(finished, folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if not p.is_dir()}
    done = command(*run_of(micro))
    assert done.code == 0
    assert "finished before" in done.err
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if not p.is_dir()}


def test_plot_draws_a_run(command: Command, finished: Path) -> None:
    done = command("plot", finished, "--out", "figures")
    assert done.code == 0
    assert {Path(line).suffix for line in done.out.splitlines()} >= {".png", ".svg"}
    assert all(Path(line).stat().st_size > 1000 for line in done.out.splitlines())


def test_two_models_have_two_folders_inside_out(micro: Path) -> None:
    def folder(model: str) -> Path:
        request = launch.RunRequest(
            method="d3po", objective="compress", model=model, preset="quick", settings={},
            seeds=range(1), device="cpu", out=Path("runs"), tools=TOOLS,
        )  # fmt: skip
        return launch.run_folder(request.out, launch.configured(request)[0])

    end = "compress/d3po/seed-0"
    assert folder("owner/model") == Path("runs/owner--model") / end
    assert folder(f"{micro}/") == folder(str(micro))
    assert folder(str(micro)).parents[3] == Path("runs")
    assert folder(".") == folder("..") == Path("runs/model") / end
