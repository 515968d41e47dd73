"""Attacks on run folders, rounds and models: links, pipes, odd configs, and files of others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from d3po_bench.cli import main
from d3po_bench.digests import files_below
from d3po_bench.errors import UserError
from d3po_bench.models.sources import content
from d3po_bench.runs.files import readable, taken, write_atomically, write_folder
from d3po_bench.runs.run import find_runs
from eval.analysis.measured import place, row_of
from eval.analysis.pictures import crossed
from eval.analysis.runs import read_groups, read_run
from tests.commands import Command, contents, edit_json, refused, run_of
from tests.conftest import loaded
from tests.made_up import write_run

CELL = Path("runs", "model", "incompress", "d3po")
SETTINGS: dict[str, Any] = {"prompts": "list.txt", "rounds": 1}
NEW = ["feedback", "new", "two", "--prompts", "list.txt", "--kind", "pairs", "--model", "model",
       "--preset", "official_code", "--device", "cpu", "--set=sampling_steps=2",
       "--set=dtype=fp32", "--set=sample_batch=2"]  # fmt: skip
TRAIN = ["--preset", "official_code", "--device", "cpu"]
NEXT = ["feedback", "new", "next", "--prompts", "list.txt", "--kind", "pairs", "--from",
        "one/trained/d3po"]  # fmt: skip


@pytest.fixture(scope="module")
def made(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two runs on it, and two rounds, one of them trained from; to read only."""
    home = tmp_path_factory.mktemp("made")
    shutil.copytree(micro, home / "model")
    (home / "list.txt").write_text("cat\ndog\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        main(run_of("model", "--seeds", "2", "--jobs", "1", **SETTINGS))
        for name, seed in (("one", "0"), ("two", "1")):
            main([*NEW[:2], name, *NEW[3:], "--seed", seed])
        main(["feedback", "simulate", "one"])
        main(["feedback", "train", "one", "--passes", "1", *TRAIN])
    return home


def scaled(path: Path) -> None:
    save_file({n: t * 1.5 for n, t in load_file(path).items()}, path, {"format": "pt"})


# ---- links and pipes


def test_files_behind_links_are_found_and_loops_end(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere"
    (real / "deep").mkdir(parents=True)
    (real / "deep" / "file").touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).symlink_to(real)
    (real / "up").symlink_to(folder)
    found = [path.relative_to(folder).as_posix() for path in files_below(folder)]
    assert found == ["a/deep/file", "b/deep/file"]
    assert list(files_below(tmp_path / "nowhere")) == []


def test_runs_behind_links_are_found(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / "scratch", seed=seed)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "incompress").symlink_to(tmp_path / "scratch/tiny/incompress")
    assert len(find_runs([tmp_path / "runs"])) == 2
    assert len(find_runs([tmp_path / "runs", tmp_path / "scratch"])) == 2, "each once"


def test_a_network_that_a_run_trained_is_no_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "lora" / "unet").mkdir(parents=True)
    (folder / "lora" / "unet" / "config.json").write_text('{"_class_name": "UNet"}')
    assert [run.folder for run in find_runs([tmp_path])] == [folder]


def test_weights_behind_a_link_are_part_of_a_model(micro: Path, tmp_path: Path) -> None:
    model = shutil.copytree(micro, tmp_path / "model")
    before = content(model)
    (model / "unet").rename(tmp_path / "unet")
    (model / "unet").symlink_to(tmp_path / "unet")
    assert content(model) == before
    scaled(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert content(model) != before


def test_nothing_is_written_behind_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "inside").mkdir(parents=True)
    (precious / "file").write_text("precious")
    before = contents(precious)
    run = tmp_path / "run"
    run.mkdir()
    (run / "rows.part").symlink_to(precious / "file")
    (run / "lora.part").symlink_to(precious / "inside")
    (run / "lora").symlink_to(precious / "inside")
    (run / ".lock").symlink_to(precious / "file")
    write_atomically(run / "rows", b"new")

    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").touch()

    write_folder(run / "lora", save)
    with pytest.raises(UserError, match="cannot be written"), taken(run):
        pass
    assert contents(precious) == before
    assert (run / "rows").read_text() == "new"
    assert not (run / "lora").is_symlink()
    assert [path.name for path in (run / "lora").iterdir()] == ["weights"]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("eval.csv", ".lock"):
        os.mkfifo(tmp_path / name)
    path = tmp_path / "eval.csv"
    with pytest.raises(UserError, match="it is no regular file"), readable(path):
        path.read_text()
    with pytest.raises(UserError, match="cannot be written"), taken(tmp_path):
        pass


# ---- models


def test_dropout_of_a_network_is_off(micro: Path, tmp_path: Path) -> None:
    model = shutil.copytree(micro, tmp_path / "model")
    edit_json(model / "unet" / "config.json", lambda config: config.update(dropout=0.5))
    x, s = torch.ones(1, 4, 4, 4), torch.tensor([500])
    outputs = []
    for folder in (micro, model, model):
        found = loaded(folder)
        found.add_adapter(0)
        with torch.no_grad():
            outputs.append(found.output(x, s, found.encode(["cat"])))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[1], outputs[2])


ODD: list[tuple[str, dict[str, Any], str]] = [
    *(("unet/config.json", {"sample_size": size}, 'Set "sample_size" there')
      for size in ("4", 0, -4, 4.5, [4], [4, 4, 4], True)),
    ("scheduler/scheduler_config.json", {"timestep_spacing": "foo"}, "foo is not supported"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2, 0.3]}, "out of bounds"),
    ("scheduler/scheduler_config.json",
     {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "sigmoid is not implemented"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 200}, "max_position_embeddings"),
    ("tokenizer/tokenizer_config.json", {"pad_token": None}, "padding token"),
    ("tokenizer/tokenizer_config.json", {"pad_token": "<new>"}, "out of range"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "said"), ODD)
def test_a_config_that_cannot_be_drawn_with_is_told_as_the_model_loads(
    name: str, changes: dict[str, Any], said: str, micro: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(micro, tmp_path / "model")
    edit_json(model / name, lambda config: config.update(changes))
    if kind := changes.get("_class_name"):
        scheduler = ["diffusers", kind]
        edit_json(model / "model_index.json", lambda index: index.update(scheduler=scheduler))
    with pytest.raises(UserError, match=said) as raised:
        loaded(model)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("factor", [None, "x"])
def test_a_vae_without_a_scale_is_told_as_the_model_loads(
    factor: object, micro: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(micro, tmp_path / "model")
    edit_json(model / "vae" / "config.json", lambda config: config.update(scaling_factor=factor))
    with pytest.raises(UserError, match=r"cannot be drawn with: .*float"):
        loaded(model)


def test_an_index_that_is_nested_too_deep_is_refused(micro: Path, tmp_path: Path) -> None:
    model = shutil.copytree(micro, tmp_path / "model")
    (model / "model_index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"no model_index.json that can be read"):
        loaded(model)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_outside_of_a_model_are_not_its_own(part: str, micro: Path, tmp_path: Path) -> None:
    model = shutil.copytree(micro, tmp_path / "model")
    (weights,) = (model / part).glob("*.safetensors")
    names = dict.fromkeys(load_file(weights), "../../weights.safetensors")
    shutil.move(weights, tmp_path / "weights.safetensors")
    index = {"metadata": {}, "weight_map": names}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"The {part} of .*not a file beside it"):
        loaded(model)


# ---- runs


@pytest.mark.parametrize("name", ["model", "prompts"])
def test_a_run_that_lost_one_input_is_not_evaluated(
    name: str, home: Path, command: Command
) -> None:
    edit_json(CELL / "seed-0" / "provenance.json", lambda facts: facts["inputs"].pop(name))
    refused(command("evaluate", CELL / "seed-0"), f"does not say which {name} the run was trained")


def test_a_checkpoint_of_another_model_is_refused(home: Path, command: Command) -> None:
    """With all its rows: nothing else in the folder names the model."""
    shutil.copytree("model", "kept")
    scaled(home / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert command(*run_of("model", "--out", "other", **SETTINGS)).code == 0
    shutil.rmtree("model")
    Path("kept").rename("model")
    run, other = CELL / "seed-0", Path("other", *CELL.parts[1:], "seed-0")
    for name in ("metrics.jsonl", "timing.jsonl", "eval.csv", "checkpoints/last.safetensors"):
        shutil.copy(other / name, run / name)
    edit_json(run / "provenance.json", lambda facts: [facts.pop(k) for k in ("ended", "content")])
    done = command(*run_of("model", **SETTINGS))
    refused(done, "The run of the checkpoint in", "began with other inputs: model ")


def test_sample_pictures_of_another_run_are_not_shown(home: Path, command: Command) -> None:
    shutil.rmtree(CELL / "seed-0" / "samples")
    shutil.copytree(CELL / "seed-1" / "samples", CELL / "seed-0" / "samples")
    refused(command("plot", "runs"), ".png is missing or was changed after the run had ended")


@pytest.mark.parametrize(
    "setting", [{"guidance": 1.0}, {"sampling_steps": 7}, {"eval_prompts": 3}, {"eta": 0.5}]
)
def test_methods_that_draw_differently_are_not_compared(
    setting: dict[str, Any], tmp_path: Path
) -> None:
    write_run(tmp_path)
    write_run(tmp_path, method="ddpo", **setting)
    with pytest.raises(UserError, match=f"do not share the setting {next(iter(setting))}"):
        read_groups([tmp_path])
    assert len(read_groups([tmp_path / "tiny" / "incompress" / "ddpo"])) == 1


def test_what_can_be_compared_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs", "my grid"), guidance=1.0)
    write_run(Path("runs"), seed=1)
    with pytest.raises(UserError, match="as in `d3po-bench report 'runs/my grid'`"):
        read_groups([Path("runs")])
    Path("runs", "trials.log").touch()
    with pytest.raises(UserError, match=r"trials of a search.* such as runs/my grid/tiny"):
        read_groups([Path()])


@pytest.mark.parametrize("value", ["high", None, [1]])
@pytest.mark.parametrize("name", ["score_mean", "kl"])
def test_a_record_of_runs_has_numbers_alone(
    name: str, value: object, home: Path, command: Command
) -> None:
    path = CELL / "seed-0" / "metrics.jsonl"
    line = json.loads(path.read_text())
    path.write_text(json.dumps(line | {name: value}) + "\n")
    refused(command("report", "runs", "--table", "runs"), f"as {name} of round 1")


def test_rows_of_a_table_are_those_that_were_scored(home: Path, command: Command) -> None:
    done = command("table1", CELL, "--model", "model", "--objective", "incompress", "--out", "t",
                   "--scorers", "jpeg_size", "--prompts", "list.txt")  # fmt: skip
    assert done.code == 0, done.err
    assert command("table1", "--redraw", "--out", "t").out == done.out
    shutil.copy("t/rows/d3po-0.csv", "t/rows/d3po-1.csv")
    refused(command("table1", "--redraw", "--out", "t"), "d3po-1.csv is missing or was changed")


# ---- what is measured beside runs


def measured_by_hand(folder: Path, *, diversity: float) -> None:
    """Write a row of a run, and one of its base model."""
    run = read_run(find_runs([folder])[0])
    rows = [row_of(run, base=base) for base in (True, False)]
    path = place(run)
    assert path is not None
    head = "objective,method,seed,diversity,aesthetic,jpeg_size,of\n"
    path.write_text(head + "".join(
        f"{r['objective']},{r['method']},{r['seed']},{diversity},5.0,{1 + n},{r['of']}\n"
        for n, r in enumerate(rows)
    ))  # fmt: skip


def on_record(folder: Path, run_id: str) -> Path:
    facts = {"run_id": run_id, "ended": "then", "content": {}, "inputs": {"model": "a"}}
    (folder / "provenance.json").write_text(json.dumps(facts))
    return folder


def test_a_run_in_the_place_of_another_has_none_of_its_numbers(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    measured_by_hand(folder, diversity=0.5)
    assert crossed(read_groups([folder])).records[0]["jpeg_size"] == 1
    edit_json(folder / "config.json", lambda config: config.update(learning_rate=1.0))
    (folder / "provenance.json").write_text(json.dumps({"inputs": {"model": "another"}}))
    with pytest.raises(UserError, match=r"no diversity.csv of .* --measure"):
        crossed(read_groups([folder]))


def test_only_the_runs_that_are_asked_for_are_crossed_each_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    measured_by_hand(folder, diversity=0.5)
    other = write_run(tmp_path / "b", method="ddpo")
    shutil.copy(tmp_path / "a/tiny/diversity.csv", tmp_path / "b/tiny")
    found = crossed(read_groups([folder, other])).records
    assert [(row["method"], row["seeds"]) for row in found] == [("d3po", 1)]


def test_a_run_out_of_its_folders_has_no_place_for_numbers(home: Path, command: Command) -> None:
    shutil.copytree(CELL / "seed-0", home / "a" / "b")
    before = contents(home.parent)
    refused(command("report", "a/b", "--measure"), "is not in a folder MODEL/OBJECTIVE/METHOD")
    assert contents(home.parent) == before


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "objective,method,seed,diversity,aesthetic,jpeg_size\na,b,0,x,1,1\n"]
)
def test_numbers_that_are_none_are_refused(text: str, home: Path, command: Command) -> None:
    Path("runs", "model", "diversity.csv").write_text(text)
    for table in ("cost", "crossed"):
        refused(command("report", "runs", "--table", table), "diversity.csv cannot be read")


# ---- rounds


@pytest.mark.parametrize("name", ["rollout/00000.safetensors", "images/00000-0.png"])
def test_a_finished_block_of_another_round_is_drawn_again(
    name: str, home: Path, command: Command
) -> None:
    whole = Path("two", name).read_bytes()
    Path("two", "round.json").unlink()  # as if it had been interrupted
    kept = Path("two", "rollout", "00001.safetensors").stat().st_mtime_ns
    shutil.copy(Path("one", name), Path("two", name))
    assert command(*NEW, "--seed", "1").code == 0
    assert Path("two", name).read_bytes() == whole
    assert Path("two", "rollout", "00001.safetensors").stat().st_mtime_ns == kept


def test_weights_that_were_put_into_a_round_do_not_train(home: Path, command: Command) -> None:
    save_file({"a": torch.ones(1)}, Path("one", "adapter.safetensors"))
    done = command("feedback", "train", "one", "--passes", "1", "--out", "again", *TRAIN)
    refused(done, "adapter.safetensors was not there when the round was made")


def test_a_rollout_that_is_not_on_record_does_not_train(home: Path, command: Command) -> None:
    edit_json(Path("one", "files.json"), lambda known: known.pop("rollout/00000.safetensors"))
    done = command("feedback", "train", "one", "--passes", "1", "--out", "again", *TRAIN)
    refused(done, "rollout/00000.safetensors was not there when the round was made")


@pytest.mark.parametrize("round_", [{}, {"number": "x"}, {"number": -1}, {"number": True}, []])
def test_a_training_whose_round_is_not_on_record_is_refused(
    round_: object, home: Path, command: Command
) -> None:
    path = Path("one", "trained", "d3po", "provenance.json")
    edit_json(path, lambda facts: facts.update(round=round_))
    refused(command(*NEXT), "was not made by `feedback train`")


def test_the_next_round_is_drawn_with_the_settings_of_the_training(
    home: Path, command: Command
) -> None:
    path = Path("one", "trained", "d3po", "provenance.json")
    edit_json(path, lambda facts: facts["round"].update(seed=9, settings={"guidance": 1}))
    assert command(*NEXT).code == 0
    found, before = (json.loads(Path(n, "sampling.json").read_text()) for n in ("next", "one"))
    assert (found["seed"], found["settings"]) == (before["seed"], before["settings"])
