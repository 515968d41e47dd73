"""The command line as people use it: what it says, what it writes, and what it refuses."""

from __future__ import annotations

import errno
import fcntl
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from d3po_bench.cli import cli
from d3po_bench.training import tracking
from tests.commands import (
    ROOT,
    Command,
    files,
    refused,
    run_of,
    seed_folder,
    written,
)

# ---- help


def commands() -> Iterator[tuple[str, click.Command]]:
    yield "d3po-bench", cli
    yield from cli.commands.items()


@pytest.mark.parametrize("name", dict(commands()))
def test_help_has_examples_that_parse(name: str, command: Command) -> None:
    done = command(*([] if name == "d3po-bench" else [name]), "--help")
    assert done.code == 0
    assert "Example" in done.out
    examples = re.findall(r"^ +d3po-bench (.*)$", done.out, re.MULTILINE)
    assert examples
    for example in examples:
        first, *rest = shlex.split(example)
        found = cli.commands[first]
        if isinstance(found, click.Group):
            first, *rest = rest
            found = found.commands[first]
        assert found.make_context(first, rest).command is found


def test_every_command_is_in_the_help(command: Command) -> None:
    out = command("--help").out
    assert all(re.search(rf"^  {name} +\w", out, re.MULTILINE) for name in cli.commands)


def test_no_arguments_show_the_help(command: Command) -> None:
    done = command()
    assert done.code == 2
    assert done.err.startswith("Usage: d3po-bench [OPTIONS] COMMAND")
    assert "error:" not in done.err


def test_version_and_list(command: Command) -> None:
    assert command("--version").out == "d3po-bench, version 0.1.0\n"
    assert "\nobjectives:\n" in command("list").out
    assert "\nd3po options:\n" in command("list", "--settings").out
    assert " advantage=group " in command("list", "--settings", "--method", "grpo").out
    refused(command("list", "--settings", "--method", "d3p"), "'d3po'")


def test_a_closed_pipe_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "d3po_bench", "list"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


# ---- bad input, found before anything is written

RUN = "run --method d3po --objective incompress"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("rum --method d3po", "No command is called 'rum'. Did you mean 'run'?"),
        ("--versio", "No option is called '--versio'. Did you mean '--version'?"),
        ("run --methd d3po", "No option is called '--methd'. Did you mean '--method'?"),
        ("run --objective incompress", "Missing option '--method'. See `d3po-bench run --help`"),
        ("run --method d3po", "Missing option '--objective'"),
        ("run --method d3p --objective incompress", "Did you mean 'd3po'?"),
        ("run --method d3po --objective incompres", "Did you mean 'incompress'?"),
        (f"{RUN} --model tinny", "Did you mean 'tiny'?"),
        (f"{RUN} --model tinny --preset paper", "Did you mean 'tiny'?"),
        (f"{RUN} --model ./nowhere", "No model is called './nowhere'"),
        (f"{RUN} --preset papr", "Did you mean 'paper'?"),
        (f"{RUN} --set lerning_rate=1", "Did you mean 'learning_rate'?"),
        (f"{RUN} --set rounds", "--set takes KEY=VALUE, not 'rounds'"),
        (f"{RUN} --set rounds=-1", "rounds must be from 1 to 1e+06, not -1"),
        (f"{RUN} --set learning_rate=nan", "not 'nan'"),
        (f"{RUN} --set clip=both", "clip must be ratio or one_sided or none, not 'both'"),
        (f"{RUN} --set micro_batch=-1", "micro_batch must be from 0"),
        (f"{RUN} --set seed=1", "--set cannot change the seed. Use --seed-start"),
        (f"{RUN} --seeds 0", "'--seeds': 0 is not in the range 1<=x<=10000"),
        (f"{RUN} --seeds two", "'--seeds': 'two' is not a valid integer"),
        (f"{RUN} --seeds", "Option '--seeds' requires an argument"),
        (f"{RUN} --seed-start -1", "'--seed-start': -1 is not"),
        (f"{RUN} --rounds 0", "'--rounds': 0 is not in the range 1<=x"),
        (f"{RUN} --jobs 0", "'--jobs': 0 is not"),
        (f"{RUN} --track wand", "No tracker is called 'wand'. Did you mean 'wandb'?"),
        (f"{RUN} -q -v", "--quiet and --verbose contradict each other"),
        (f"{RUN} --set lr=1e-3", "Did you mean 'learning_rate'?"),
        (f"{RUN} --set batch_size=4", "Did you mean 'units_per_update'?"),
        (f"{RUN} --set cfg=7", "Did you mean 'guidance'?"),
        (f"{RUN} --set guidance_scale=7", "Did you mean 'guidance'?"),
        (f"{RUN} --set steps=7", "Did you mean 'sampling_steps'?"),
        (f"{RUN} --set epochs=7", "Did you mean 'rounds'?"),
        (f"{RUN} --epochs 7", "Did you mean '--rounds'?"),
        (f"{RUN} --device gpu", "torch cannot use the device 'gpu' here"),
        (f"{RUN} again", "unexpected extra argument (again)"),
        ("plot --x hours", "'hours' is not one of 'rounds', 'pairs', 'images', 'scorer_"),
        ("plot nowhere", "nowhere"),
        ("plot", "runs"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    line: str, said: str, command: Command, tmp_path: Path
) -> None:
    refused(command(*line.split()), said)
    assert files(tmp_path) == set()


def test_a_missing_extra_is_told_before_the_run(
    command: Command, micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    refused(command(*run_of(micro, "--track", "tensorboard")), "pip install", "track")
    assert list(tmp_path.iterdir()) == []


# ---- models


def damage(part: str, keep: int | None = None, text: str | None = None) -> Callable[[Path], None]:
    """Cut a file of the pipeline off after `keep` bytes, or put `text` in its place."""

    def change(folder: Path) -> None:
        path = folder / part
        path.write_bytes(path.read_bytes()[:keep] if text is None else text.encode())

    return change


def remove(part: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / part)


def of_another_class(folder: Path) -> None:
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "_class_name": "AudioLDMPipeline"}))


UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(damage(UNET, keep=5000), id="unet cut off"),
        pytest.param(damage(UNET, text="x" * 5000), id="unet of garbage"),
        pytest.param(damage(UNET, text=""), id="unet empty"),
        pytest.param(damage("unet/config.json", text="{broken"), id="unet config broken"),
        pytest.param(damage("unet/config.json", text='{"down_block_types": 3}'), id="unet odd"),
        pytest.param(damage(TEXT, keep=3000), id="text encoder cut off"),
        pytest.param(damage("tokenizer/tokenizer.json", text="{}"), id="tokenizer broken"),
        pytest.param(damage("model_index.json", text="{broken"), id="index broken"),
        pytest.param(remove("unet"), id="no unet"),
        pytest.param(remove("tokenizer"), id="no tokenizer"),
        pytest.param(remove("scheduler"), id="no scheduler"),
        pytest.param(of_another_class, id="of another class"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_damaged_model_is_refused(
    change: Callable[[Path], None], command: Command, micro: Path, tmp_path: Path
) -> None:
    model = tmp_path / "damaged"
    shutil.copytree(micro, model)
    change(model)
    refused(command(*run_of(model)), str(model))
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


def test_a_folder_that_is_no_pipeline_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(command(*run_of("empty")), "empty has no model_index.json")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_an_absent_hub_model_says_how_to_get_it(command: Command, tmp_path: Path) -> None:
    # tests have no network: conftest.py
    refused(command(*run_of("nobody/nothing")), "hf download nobody/nothing")
    assert list(tmp_path.iterdir()) == []


def test_lora_targets_that_the_unet_lacks_are_refused(command: Command, micro: Path) -> None:
    for targets, named in (("to_x", "to_x"), ("", ""), ("to_q,to_x,q", "to_x,q")):
        said = f"lora_targets={named} names no layer"
        refused(command(*run_of(micro, lora_targets=targets)), said)
    assert not Path("runs").exists()


# ---- prompts


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "No such file"),
        (b"", "list.txt holds no prompt"),
        (b"\n \n", "list.txt holds no prompt"),
        (b"caf\xe9\n", "list.txt is not UTF-8 text (byte 0xe9 at position 3)"),
        (b"cat\n" + b"a " * 15, "1 of 2 prompts have more tokens than the text encoder reads: 'a"),
    ],
)
def test_a_bad_prompt_file_is_refused(
    data: bytes | None, said: str, command: Command, micro: Path, tmp_path: Path
) -> None:
    if data is not None:
        (tmp_path / "list.txt").write_bytes(data)
    refused(command(*run_of(micro, prompts="list.txt")), said)
    assert files(tmp_path) <= {"list.txt"}


def test_a_run_is_not_resumed_with_a_changed_prompt_file(command: Command, micro: Path) -> None:
    Path("list.txt").write_text("cat\ndog\n")
    assert command(*run_of(micro, rounds=1, prompts="list.txt")).code == 0
    folder = seed_folder(Path("runs"), micro)
    facts = json.loads((folder / "provenance.json").read_text())
    assert set(facts["inputs"]) == {"model", "prompts", "scorers"}
    assert facts["inputs"]["scorers"]["jpeg_size"] == "code"
    del facts["ended"]
    (folder / "provenance.json").write_text(json.dumps(facts))
    Path("list.txt").write_text("cat\nfox\n")
    before = files(Path("runs"))
    refused(command(*run_of(micro, rounds=1, prompts="list.txt")), "other inputs: prompts ")
    assert files(Path("runs")) == before


def test_prompts_at_the_token_limit_are_used(command: Command, micro: Path) -> None:
    Path("list.txt").write_text("a " * 14 + "\ncat\n")
    assert command(*run_of(micro, rounds=1, prompts="list.txt")).code == 0
    table = (seed_folder(Path("runs"), micro) / "eval.csv").read_text()
    assert {line.split(",")[2] for line in table.splitlines()[1:]} == {"a " * 13 + "a", "cat"}


# ---- the out folder


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_an_out_that_is_a_file_is_refused(out: str, command: Command, micro: Path) -> None:
    Path("file").write_text("kept")
    refused(command(*run_of(micro, "--out", out)), "file in its place")
    assert Path("file").read_text() == "kept"


def test_a_read_only_out_is_refused(
    command: Command, micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refused(command(*run_of(micro)), "runs/", "cannot be written: Read-only file system", "--out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_config_is_refused(
    command: Command, micro: Path, half: Path, finished: Path
) -> None:
    refused(command(*run_of(micro, rounds=1)), "a run of 2 rounds, and 1 are fewer", "--out")
    refused(command(*run_of(micro, learning_rate=1e-2)), "learning_rate is 0.003 there, not 0.01")
    refused(command(*run_of(micro, "--no-resume")), "--resume", "remove that folder")
    assert written(seed_folder(half, micro)) == written(finished)


def test_other_seeds_do_not_start_beside_a_folder_of_another_config(
    command: Command, micro: Path, half: Path
) -> None:
    shutil.move(seed_folder(half, micro), seed_folder(half, micro, 1))
    refused(command(*run_of(micro, "--seeds", "2")), "seed is 0 there, not 1")
    assert not seed_folder(half, micro).exists()


def test_a_folder_in_use_is_refused(command: Command, micro: Path, half: Path) -> None:
    with (seed_folder(half, micro) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(command(*run_of(micro)), "Another process is running in")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", "config.json cannot be read: JSONDecodeError"),
        ("provenance.json", "provenance.json cannot be read"),
        ("metrics.jsonl", "metrics.jsonl cannot be read"),
        ("checkpoints/last.safetensors", "last.safetensors is damaged"),
    ],
)
def test_a_damaged_run_folder_is_refused(
    name: str, said: str, command: Command, micro: Path, half: Path
) -> None:
    path = seed_folder(half, micro) / name
    path.write_bytes(path.read_bytes()[:-20])
    (seed_folder(half, micro) / "checkpoints" / "previous.safetensors").unlink()
    before = files(half)
    refused(command(*run_of(micro)), said)
    assert files(half) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl", "eval.csv"])
def test_rows_that_the_checkpoint_does_not_know_are_refused(
    name: str, command: Command, micro: Path, half: Path
) -> None:
    path = seed_folder(half, micro) / name
    text = path.read_text()
    last = re.findall(r"[1-9]", text)[-1]
    head, _, tail = text.rpartition(last)
    path.write_text(head + str(int(last) % 9 + 1) + tail)
    refused(command(*run_of(micro)), "the checkpoint knows other rows", str(path.name))
