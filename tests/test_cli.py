"""The command line as people use it: what it says, what it writes, and what it refuses."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import torch
from safetensors import SafetensorError

from d3po_bench.cli import cli, main
from d3po_bench.d3po import D3PO
from d3po_bench.errors import RunError, UserError
from d3po_bench.launch import launch, local
from d3po_bench.models.stable_diffusion import StableDiffusion
from d3po_bench.runs.store import RunStore
from d3po_bench.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "prompts_per_round": 2, "sampling_steps": 3, "units_per_update": 2, "learning_rate": 3e-3,
    "dtype": "fp32", "eval_every": 2, "eval_prompts": 2, "eval_images": 1, "threads": 1,
}  # fmt: skip
WRITTEN = ("metrics.jsonl", "eval.csv", "lora/pytorch_lora_weights.safetensors")
"""What two equal runs write equally."""


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    """Call the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call


def run_of(model: Path | str, *more: str | Path, rounds: int = 2, **settings: Any) -> list[str]:
    """The arguments of a run of a second."""
    sets = [f"--set={key}={value}" for key, value in {**SETTINGS, **settings}.items()]
    wanted = ["run", "--method", "d3po", "--objective", "incompress", "--model", str(model)]
    tail = ["--preset", "official_code", "--rounds", str(rounds), "--device", "cpu", *sets]
    return [*wanted, *tail, *map(str, more)]


def seed_folder(out: Path, model: Path, seed: int = 0) -> Path:
    name = str(model).replace("/", "--").strip("-.")
    return out / name / "incompress" / "d3po" / f"seed-{seed}"


def written(folder: Path, names: tuple[str, ...] = WRITTEN) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


def refused(outcome: Outcome, *words: str, code: int = 2) -> str:
    """Check that a command ended in one line of three parts; returns the line."""
    lines = outcome.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert outcome.code == code, outcome
    assert len(errors) == 1, outcome
    assert lines[-1] == errors[0]
    if code == 2:  # a run that had begun has shown progress before
        assert lines == errors
    assert "Traceback" not in outcome.err + outcome.out
    for word in ("xpected", "got", *words):
        assert word in errors[0]
    return errors[0]


@pytest.fixture(scope="module")
def finished(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished run, for reading and comparing only."""
    out = tmp_path_factory.mktemp("finished")
    main(run_of(micro, "--out", out))
    return seed_folder(out, micro)


@pytest.fixture
def half(finished: Path, micro: Path, tmp_path: Path) -> Path:
    """An --out with a copy of the finished run that lacks the mark of its end."""
    folder = seed_folder(tmp_path / "runs", micro)
    shutil.copytree(finished, folder)
    facts = json.loads((folder / "provenance.json").read_text())
    del facts["ended"]
    (folder / "provenance.json").write_text(json.dumps(facts))
    return tmp_path / "runs"


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
        ("rum --method d3po", "Expected a command, got 'rum'. Did you mean 'run'?"),
        ("--versio", "Expected an option, got '--versio'. Did you mean '--version'?"),
        ("run --methd d3po", "Expected an option, got '--methd'. Did you mean '--method'?"),
        ("run --objective incompress", "Expected --method"),
        ("run --method d3po", "Expected --objective"),
        ("run --method d3p --objective incompress", "Did you mean 'd3po'?"),
        ("run --method d3po --objective incompres", "Did you mean 'incompress'?"),
        (f"{RUN} --model tinny", "Did you mean 'tiny'?"),
        (f"{RUN} --model tinny --preset paper", "Did you mean 'tiny'?"),
        (f"{RUN} --model ./nowhere", "Expected a model, got './nowhere'"),
        (f"{RUN} --preset papr", "Did you mean 'paper'?"),
        (f"{RUN} --set lerning_rate=1", "Did you mean 'learning_rate'?"),
        (f"{RUN} --set rounds", "Expected --set KEY=VALUE, got 'rounds'"),
        (f"{RUN} --set rounds=-1", "Expected rounds from 1 to 1e+06, got -1"),
        (f"{RUN} --set learning_rate=nan", "got 'nan'"),
        (f"{RUN} --set clip=both", "Expected ratio or one_sided or none for clip, got 'both'"),
        (f"{RUN} --set micro_batch=0", "Expected micro_batch from 1"),
        (f"{RUN} --set seed=1", "Expected --seed-start"),
        (f"{RUN} --seeds 0", "--seeds, got another: 0 is not in the range 1<=x<=10000"),
        (f"{RUN} --seeds two", "--seeds, got another: 'two' is not a valid integer"),
        (f"{RUN} --seeds", "Option '--seeds' requires an argument"),
        (f"{RUN} --seed-start -1", "--seed-start, got another: -1 is not"),
        (f"{RUN} --rounds 0", "--rounds, got another: 0 is not in the range 1<=x"),
        (f"{RUN} --jobs 0", "--jobs, got another: 0 is not"),
        (f"{RUN} --track wandb", "'wandb' is not 'tensorboard'"),
        (f"{RUN} --device gpu", "Expected a device that torch can use, got 'gpu'"),
        (f"{RUN} again", "unexpected extra argument (again)"),
        ("plot --x hours", "'hours' is not one of 'pairs', 'images', 'scorer_calls', '"),
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
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
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


def as_xl(folder: Path) -> None:
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "text_encoder_2": index["text_encoder"]}))


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
        pytest.param(as_xl, id="two text encoders"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_damaged_model_is_refused(
    change: Callable[[Path], None], command: Command, micro: Path, tmp_path: Path
) -> None:
    model = tmp_path / "damaged"
    shutil.copytree(micro, model)
    change(model)
    refused(command(*run_of(model)), "pipeline", str(model))
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


def test_a_folder_that_is_no_pipeline_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(command(*run_of("empty")), "model_index.json", "got empty")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_an_absent_hub_model_says_how_to_get_it(command: Command, tmp_path: Path) -> None:
    # tests have no network: conftest.py
    refused(command(*run_of("nobody/nothing")), "hf download nobody/nothing")
    assert list(tmp_path.iterdir()) == []


def test_lora_targets_that_the_unet_lacks_are_refused(command: Command, micro: Path) -> None:
    refused(command(*run_of(micro, lora_targets="to_x")), "lora_targets", "'to_x'")
    assert not Path("runs").exists()


# ---- prompts


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "No such file"),
        (b"", "at least one prompt"),
        (b"\n \n", "at least one prompt"),
        (b"caf\xe9\n", "UTF-8 text in list.txt, got byte 0xe9 at position 3"),
        (b"cat\n" + b"a " * 15, "at most 14 tokens, got 15 in 'a a a"),
    ],
)
def test_a_bad_prompt_file_is_refused(
    data: bytes | None, said: str, command: Command, micro: Path, tmp_path: Path
) -> None:
    if data is not None:
        (tmp_path / "list.txt").write_bytes(data)
    refused(command(*run_of(micro, prompts="list.txt")), said)
    assert files(tmp_path) <= {"list.txt"}


def test_a_run_does_not_go_on_with_a_changed_prompt_file(command: Command, micro: Path) -> None:
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
    refused(command(*run_of(micro, rounds=1, prompts="list.txt")), "Expected the prompts that")
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
    refused(command(*run_of(micro, "--out", out)), "Expected a folder at file", "a file")
    assert Path("file").read_text() == "kept"


def test_a_read_only_out_is_refused(
    command: Command, micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refused(command(*run_of(micro)), "write runs/", "Read-only file system", "--out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_config_is_refused(
    command: Command, micro: Path, half: Path, finished: Path
) -> None:
    refused(command(*run_of(micro, rounds=3)), "rounds 2 -> 3", "--out")
    refused(command(*run_of(micro, learning_rate=1e-2)), "learning_rate 0.003 -> 0.01")
    refused(command(*run_of(micro, "--no-resume")), "--resume", "remove that folder")
    assert written(seed_folder(half, micro)) == written(finished)


def test_other_seeds_do_not_start_beside_a_folder_of_another_config(
    command: Command, micro: Path, half: Path
) -> None:
    shutil.move(seed_folder(half, micro), seed_folder(half, micro, 1))
    refused(command(*run_of(micro, "--seeds", "2")), "seed 0 -> 1")
    assert not seed_folder(half, micro).exists()


def test_a_folder_in_use_is_refused(command: Command, micro: Path, half: Path) -> None:
    with (seed_folder(half, micro) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(command(*run_of(micro)), "got another process running in it")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", "config.json, got JSONDecodeError"),
        ("provenance.json", "Expected a readable"),
        ("metrics.jsonl", "metrics.jsonl, got a damaged file"),
        ("checkpoints/last.safetensors", "last.safetensors, got a damaged one"),
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
    refused(command(*run_of(micro)), "the rows that the checkpoint knows", str(path.name))


# ---- a whole run


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
    store = RunStore(finished)
    assert [m["round"] for m in store.metrics] == [1, 2]
    assert [t["round"] for t in store.timing] == [1, 2]
    assert [(m["pairs"], m["images"], m["scorer_calls"]) for m in store.metrics] == [
        (2, 4, 4), (4, 8, 8)
    ]  # fmt: skip
    assert all(m["reward_mean"] == m["score_mean"] > 0 for m in store.metrics)
    assert store.metrics[0]["kl"] == 0 < store.metrics[1]["kl"]
    cells = [(e["round"], e["sampler"], e["prompt"], e["index"]) for e in store.evaluation]
    assert cells == [
        (n, sampler, prompt, "0")
        for n in ("0", "2") for sampler in ("eta1", "eta0") for prompt in ("cat", "butterfly")
    ]  # fmt: skip
    assert store.finished
    assert store.provenance()["execution"]["threads"] == 1
    assert store.provenance()["device"] == "cpu"


def test_the_same_command_writes_the_same_bytes(
    command: Command, micro: Path, finished: Path
) -> None:
    done = command(*run_of(micro))
    assert done.code == 0
    assert done.out == ""
    assert done.err.splitlines()[-1] == "Runs are in runs. Draw them: d3po-bench plot runs"
    assert written(seed_folder(Path("runs"), micro)) == written(finished)
    for n in (0, 2):
        name = f"samples/round-{n:05d}/cat.png"
        assert written(seed_folder(Path("runs"), micro), (name,)) == written(finished, (name,))


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
        request = launch.Request(
            method="d3po", objective="compress", model=model, preset="quick", settings={},
            rounds=None, seeds=range(1), device="cpu", jobs=1, out=Path("runs"), resume=True,
        )  # fmt: skip
        return launch._folder(request, launch.configured(request)[0])

    end = "compress/d3po/seed-0"
    assert folder("owner/model") == Path("runs/owner--model") / end
    assert folder(f"{micro}/") == folder(str(micro))
    assert folder(str(micro)).parents[3] == Path("runs")
    assert folder(".") == folder("..") == Path("runs/model") / end


# ---- runs that stop


class Stop:
    """Stands in for a method of a class, and raises instead of the call that `when` picks."""

    def __init__(self, target: Any, when: Callable[..., bool], problem: BaseException) -> None:
        self.target, self.when, self.problem = target, when, problem

    def __get__(self, owner: Any, kind: Any = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.when(owner, *args):
                raise self.problem
            return self.target(owner, *args, **kwargs)

        return call


def in_round_2(trainer: Trainer, *_: Any) -> bool:
    return trainer.round == 1


def of_round(number: int) -> Callable[..., bool]:
    return lambda store, tensors, facts: bool(facts["round"] == number)


@pytest.mark.parametrize(
    ("owner", "name", "when", "rounds_kept"),
    [
        (Trainer, "train_round", in_round_2, 1),
        (RunStore, "checkpoint", of_round(0), 0),
        (RunStore, "checkpoint", of_round(1), 1),
        (RunStore, "checkpoint", of_round(2), 2),
        (RunStore, "log", lambda store, *_: len(store.metrics) == 1, 1),
        (StableDiffusion, "save", lambda *_: True, 2),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    owner: type, name: str, when: Callable[..., bool], rounds_kept: int,
    command: Command, micro: Path, finished: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = seed_folder(Path("runs"), micro)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, Stop(getattr(owner, name), when, KeyboardInterrupt()))
        done = command(*run_of(micro))
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("error: Interrupted. The same command goes on")
    store = RunStore(folder)
    assert len(store.metrics) == rounds_kept
    assert not store.finished
    assert command(*run_of(micro)).code == 0
    assert written(folder) == written(finished)
    assert files(folder) == files(finished)


def test_a_loss_of_nan_ends_the_run_and_keeps_what_is_written(
    command: Command, micro: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    loss = D3PO.loss

    def broken(self: D3PO, *args: Any) -> Any:
        value, metrics = loss(self, *args)
        calls.append(1)
        return (value if len(calls) == 1 else value * torch.nan), metrics

    with monkeypatch.context() as patch:
        patch.setattr(D3PO, "loss", broken)
        done = command(*run_of(micro))
    refused(done, "Round 2, seed 0", "got nan for loss", "learning_rate", code=1)
    folder = seed_folder(Path("runs"), micro)
    assert (folder / "metrics.jsonl").read_text().splitlines() == (
        finished / "metrics.jsonl"
    ).read_text().splitlines()[:1]
    assert not (folder / "lora").exists()
    assert command(*run_of(micro)).code == 0
    assert written(folder) == written(finished)


def test_a_failed_seed_does_not_stop_the_next(
    command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop(Trainer.train_round, lambda t, _: t.config.seed == 0, RunError("Expected, got"))
    monkeypatch.setattr(Trainer, "train_round", stop)
    refused(command(*run_of(micro, "--seeds", "2")), "Round 1, seed 0", code=1)
    assert not RunStore(seed_folder(Path("runs"), micro, 0)).finished
    assert RunStore(seed_folder(Path("runs"), micro, 1)).finished


@pytest.mark.parametrize("writes", [0, 1, 2, 12, 14, 25, 28])
def test_a_full_disk_ends_the_run_which_goes_on_when_there_is_room(
    writes: int, command: Command, micro: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(range(writes))
    fsync = os.fsync

    def full(number: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    folder = seed_folder(Path("runs"), micro)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = command(*run_of(micro))
    refused(done, "Expected room to write", "got a full disk", code=1)
    assert not [name for name in files(Path()) if name.endswith((".part", ".lock"))]
    assert folder.exists() == (writes > 0)
    assert command(*run_of(micro)).code == 0
    assert written(folder) == written(finished)


def test_a_full_disk_at_the_lora_is_told(
    command: Command, micro: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(StableDiffusion, "save", Stop(None, lambda *_: True, problem))
    refused(command(*run_of(micro)), "got a full disk", "lora", code=1)
    assert not RunStore(seed_folder(half, micro)).finished


@pytest.mark.parametrize(
    "problem",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_too_little_memory_says_how_to_need_less(
    problem: Exception, command: Command, micro: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusion, "save", Stop(None, lambda *_: True, problem))
    refused(command(*run_of(micro)), "enough memory", "--set micro_batch=8", code=1)


def wait_for(condition: Callable[[], bool]) -> None:
    """Look every tenth of a second, for a minute at most."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def in_group(number: int) -> bool:
    """Whether a process of that group is left."""
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("number", "jobs"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_stopped_command_takes_its_workers_along_and_keeps_its_rounds(
    number: signal.Signals, jobs: int, micro: Path, tmp_path: Path
) -> None:
    arguments = run_of(
        micro, "--seeds", str(jobs), "--jobs", str(jobs),
        rounds=10**5, eval_every=0, checkpoint_every=10**5,
    )  # fmt: skip

    def rounds() -> list[int]:
        return [p.read_text().count("\n") for p in tmp_path.rglob("metrics.jsonl")]

    with subprocess.Popen(
        [sys.executable, "-m", "d3po_bench", *arguments, "--out", tmp_path / "runs"],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        # A background job of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        try:
            wait_for(lambda: len(rounds()) == jobs and min(rounds()) > 1)
            assert not list(tmp_path.rglob("*.safetensors"))
            process.send_signal(number)
            error = process.communicate(timeout=60)[1]
            wait_for(lambda: not in_group(process.pid))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    assert error.splitlines()[-1].startswith("error: Interrupted. The same command goes on")
    assert "Traceback" not in error
    assert not [name for name in files(tmp_path) if name.endswith((".lock", ".part"))]
    for folder in (path.parent for path in tmp_path.rglob("metrics.jsonl")):
        store = RunStore(folder)
        checkpoint = store.load_checkpoint()
        assert checkpoint is not None
        # the signal may come between a round's line and its state
        assert checkpoint[1]["round"] in (len(store.metrics) - 1, len(store.metrics))


def endless(micro: Path, out: Path) -> subprocess.Popen[str]:
    """A command with two workers that will not end by itself, in a process group of its own."""
    arguments = run_of(micro, "--seeds", "2", "--jobs", "2", rounds=10**5, eval_every=0)
    return subprocess.Popen(
        [sys.executable, "-m", "d3po_bench", *arguments, "--out", out],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip


def test_a_killed_command_takes_its_workers_along(micro: Path, tmp_path: Path) -> None:
    with endless(micro, tmp_path / "runs") as process:
        try:
            wait_for(lambda: len(list(tmp_path.rglob("metrics.jsonl"))) == 2)
            process.kill()
            wait_for(lambda: not list(tmp_path.rglob(".lock")))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-signal.SIGKILL, "got one that was killed (out of memory?)."),
        (-signal.SIGSEGV, f"got one that died of signal {signal.SIGSEGV:d} (Segmentation fault)."),
        (3, "got one that ended with status 3."),
    ],
)
def test_what_ended_a_worker_is_told(code: int, said: str) -> None:
    problem = local._died(code).problem
    assert isinstance(problem, RunError)
    assert said in str(problem)


def workers(number: int) -> list[int]:
    """The worker processes of a command."""
    children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
    return [int(c) for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers in Linux's /proc")
def test_workers_that_the_kernel_killed_for_their_memory_are_told(
    micro: Path, tmp_path: Path
) -> None:
    with endless(micro, tmp_path / "runs") as process:
        try:
            wait_for(lambda: len(list(tmp_path.rglob("metrics.jsonl"))) == 2)
            for worker in workers(process.pid):
                os.kill(worker, signal.SIGKILL)
            error = process.communicate(timeout=60)[1]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    refused(Outcome(process.returncode, "", error), "error: seed 0, seed 1: Expected",
            "killed (out of memory?)", "--jobs 1", "--set micro_batch=8", code=1)  # fmt: skip


def test_errors_of_several_seeds_become_one_line() -> None:
    failed = {"seed 0": RunError("one."), "seed 1": UserError("two."), "seed 3": RunError("one.")}
    assert str(launch._joined(failed)) == "seed 0, seed 3: one. seed 1: two."
    assert str(launch._joined({"": RunError("one.")})) == "one."
