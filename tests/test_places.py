"""Runs on this machine's GPUs, on Ray and on Slurm: the same bytes, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from d3po_bench.errors import TryAgainError, UserError
from d3po_bench.launch import launch, place
from d3po_bench.launch.job import End
from d3po_bench.launch.local import side_by_side
from d3po_bench.launch.place import Task, Work, follow, values
from d3po_bench.launch.places import local as here
from d3po_bench.launch.places import slurm
from d3po_bench.runs.files import FAILED, LOCK
from d3po_bench.runs.holder import Holder
from d3po_bench.runs.run import find_runs
from d3po_bench.training.trainer import Trainer
from tests.commands import ROOT, Command, Stop, contents, refused, run_of, seed_folder

GRID = """
methods = ["d3po", "ddpo"]
objectives = ["compress", "incompress"]
seeds = 2
model = "{model}"
preset = "official_code"
[set]
rounds = {rounds}
sampling_steps = 3
prompts_per_round = 2
units_per_update = 2
learning_rate = 3e-3
eval_prompts = 2
eval_images = 1
eval_every = {rounds}
dtype = "fp32"
threads = 1
"""


# ---- this machine


def visible(task: int, tell: Callable[[Any], None]) -> str:
    """What a worker is given to see, after all workers are there."""
    place = os.environ["CUDA_VISIBLE_DEVICES"]
    Path(f"{task}.there").touch()
    while len(list(Path().glob("*.there"))) < 2:
        time.sleep(0.01)
    return place


@pytest.mark.slow
def test_every_worker_has_a_gpu_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen: dict[int, Any] = {}

    def ended(task: int, found: Any) -> bool:
        seen[task] = found
        return True

    places = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("4", "GPU-b")]
    side_by_side(visible, [1, 2], 2, ended, places=places)
    assert seen == {1: "4", 2: "GPU-b"}
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(
    ("device", "count", "given", "found"),
    [
        ("auto", 3, None, ["0", "1", "2"]), ("cuda", 2, "5,GPU-x", ["5", "GPU-x"]),
        ("cuda:1", 3, None, []), ("auto", 1, None, []), ("cpu", 3, None, []),
    ],
)  # fmt: skip
def test_runs_are_spread_over_the_gpus_that_there_are(
    device: str, count: int, given: str | None, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(name: str) -> torch.device:
        return torch.device("cuda" if name == "auto" else name)

    monkeypatch.setattr(here, "device_of", of)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert here._gpus(device) == found


# ---- what is asked for


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--where", "moon"], "No place is called 'moon'"),
        (["--ask", "num_gpus=1"], "--ask is for a cluster: add --where ray"),
        (["--where", "slurm"], "srun is not found"),
        (
            ["--where", "slurm", "--ask", "cluster=local", "--ask", "timeout_min=soon"],
            "timeout_min",
        ),
        (["--where", "slurm", "--ask", "cluster"], "--ask takes KEY=VALUE"),
        (["--where", "ray", "--ranks", "2"], "Several ranks work on one machine"),
    ],
)
def test_what_no_place_can_do_is_refused(
    options: list[str], said: str, command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "slurm" in options:
        pytest.importorskip("submitit")  # of the extra `cluster`, which tests do not bring
    monkeypatch.setenv("PATH", "")
    refused(command(*run_of(micro, *options)), said)
    assert not Path("runs").exists() or not find_runs([Path("runs")])


def test_the_extra_is_named_where_it_is_missing(
    command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "find_spec", lambda name: None)
    for where in ("ray", "slurm"):
        refused(command(*run_of(micro, "--where", where)), "d3po-bench[cluster]")


def test_values_are_numbers_where_they_look_like_it() -> None:
    asked = {"a": "0.25", "b": "2", "c": "gpu", "d": "true", "e": "04:00"}
    assert values(asked) == {"a": 0.25, "b": 2, "c": "gpu", "d": True, "e": "04:00"}


# ---- a job


@pytest.fixture
def job(micro: Path, tmp_path: Path) -> Any:
    from d3po_bench.setting import pairs_of
    from eval.tools import TOOLS

    sets = [a.removeprefix("--set=") for a in run_of(micro) if a.startswith("--set=")]
    request = launch.RunRequest(
        method="d3po", objective="incompress", model=str(micro), preset="official_code",
        settings=pairs_of(sets), seeds=range(1), device="cpu", out=tmp_path / "runs", rounds=2,
        tools=TOOLS,
    )  # fmt: skip
    return launch.planned(request)[0]


def test_a_job_waits_for_a_folder_until_its_last_process_is_dead(
    job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from d3po_bench.runs import files

    monkeypatch.setattr(files, "SETTLED", 0)
    monkeypatch.setattr(place, "BEAT", 0.1)
    job.folder.mkdir(parents=True)
    lock = job.folder / LOCK
    lock.write_bytes(replace(Holder.here(), host="elsewhere").record())
    monkeypatch.setattr("d3po_bench.runs.holder.DEAD", 3)  # seconds from now
    end, _ = Task.of(job).make()
    assert end.problem is None
    assert not lock.exists()


def test_a_job_says_where_its_folder_is_missing(job: Any) -> None:
    end, _ = replace(Task.of(job), cwd="/no/such/folder").make()
    assert "/no/such/folder is not on" in str(end.problem)


def test_a_run_that_is_not_seen_from_here_is_told(job: Any) -> None:
    """As where the workers of a cluster have disks of their own."""
    ends: list[End] = []

    def ended(job: Any, end: End) -> bool:
        ends.append(end)
        return True

    work = Work(
        jobs=[job], count=1, ended=ended, report=lambda p: None, begin=lambda n: None
    )  # fmt: skip
    follow(work, 1, lambda tasks: [lambda: End()])
    assert "is not seen from this machine" in str(ends[0].problem)


def test_a_slurm_job_goes_back_to_the_queue_after_its_round(
    job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    called: list[int] = []
    monkeypatch.setattr(
        Trainer, "train_round", _signalled(Trainer.train_round, signal.SIGUSR2), raising=True
    )
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    try:
        submitted = slurm._Submitted(Task.of(job))
        assert isinstance(submitted().problem, TryAgainError)
        again = submitted.checkpoint()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert called == [signal.SIGUSR2]  # submitit's handler, once the round was written
    assert len((job.folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert again.result().problem is None


def _signalled(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The function, with a signal before its first call."""
    calls: list[int] = []

    def call(*arguments: Any) -> Any:
        if not calls:
            calls.append(number)
            os.kill(os.getpid(), number)
        return function(*arguments)

    return call


# ---- where runs are


def test_status_is_read_from_the_folders_alone(
    command: Command, micro: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    grid = tmp_path / "grid.toml"
    text = GRID.format(model=micro, rounds=2).replace("seeds = 2", "seeds = 3")
    grid.write_text(text.replace('["d3po", "ddpo"]', '["d3po"]'))
    stop = Stop(
        Trainer.train_round, lambda t, _: t.config.seed == 1 and t.round == 1, UserError("told.")
    )
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_round", stop)
        assert command("sweep", grid, "--jobs", "1").code == 1
    folders = {
        run.folder.parts[-3] + run.folder.name: run.folder for run in find_runs([Path("runs")])
    }
    assert (folders["compressseed-1"] / FAILED).read_text() == "told.\n"
    far = replace(Holder.here(), host="node7")
    (folders["incompressseed-1"] / LOCK).write_bytes(far.record())
    _not_ended(folders["incompressseed-2"])
    (folders["incompressseed-2"] / LOCK).write_bytes(
        far.record().replace(b'"time": ', b'"time": -')
    )
    _not_ended(folders["compressseed-2"])
    for file in folders["compressseed-0"].rglob("*"):
        if file.is_file():
            file.unlink()
    done = command("sweep", grid, "--status", "--json")
    found = {row["run"].replace("d3po ", ""): row for row in json.loads(done.out)["runs"]}
    assert {name: (row["state"], row["rounds"]) for name, row in found.items()} == {
        "compress seed 0": ("not begun", 0), "incompress seed 0": ("finished", 2),
        "compress seed 1": ("failed", 1), "incompress seed 1": ("running", 1),
        "compress seed 2": ("stopped", 2), "incompress seed 2": ("dead", 2),
    }  # fmt: skip
    assert found["compress seed 1"]["why"] == "told."
    assert "on node7" in found["incompress seed 1"]["why"]
    gain = found["incompress seed 0"]["gain"]
    shown = command("sweep", grid, "--status")
    assert f"incompress seed 0  finished       2/2  {gain:+.3f} kB" in shown.out
    assert "1 not begun" in shown.err


def _not_ended(folder: Path) -> None:
    facts = json.loads((folder / "provenance.json").read_text())
    del facts["ended"]
    (folder / "provenance.json").write_text(json.dumps(facts))


# ---- a grid on a cluster, of which a worker is killed


@pytest.fixture(scope="module")
def grid(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grid") / "grid.toml"
    path.write_text(GRID.format(model=micro, rounds=16))
    return path


@pytest.fixture(scope="module")
def whole(grid: Path) -> dict[str, bytes]:
    """What the runs of the grid write on this machine, never killed."""
    assert _begin(grid, grid.parent / "local", "--jobs", "1").wait() == 0
    return _written(grid.parent / "local")


def _begin(grid: Path, out: Path, *more: str, **env: str) -> subprocess.Popen[bytes]:
    arguments = ["sweep", str(grid), "--device", "cpu", "--out", str(out), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "d3po_bench", *arguments], cwd=ROOT, env={**os.environ, **env}
    )


def _written(out: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "eval.csv", "pytorch_lora_weights.safetensors")
    found = {name: data for name, data in contents(out).items() if name.endswith(names)}
    assert len(found) == 24
    return found


def _kill_one(out: Path, process: subprocess.Popen[bytes]) -> None:
    """Kill the process of the first run that has done a round."""
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        for path in out.rglob("metrics.jsonl"):
            holder = None
            if (path.parent / LOCK).exists():
                holder = Holder.read((path.parent / LOCK).read_bytes())
            if holder is not None and path.read_text().count("\n") < 13:
                os.kill(holder.pid, signal.SIGKILL)
                return
        time.sleep(0.02)
    raise AssertionError("no run was there to be killed")


def _sessions(out: Path) -> int:
    return sum(len(run.facts["sessions"]) for run in find_runs([out]))


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two nodes with a core each."""
    pytest.importorskip("ray")
    code = (
        "import ray.cluster_utils as u, sys\n"
        "c = u.Cluster(initialize_head=True, head_node_args={'num_cpus': 1})\n"
        "c.add_node(num_cpus=1)\nprint(c.address, flush=True)\nsys.stdin.read()\nc.shutdown()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=ROOT, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdin is not None
        yield next(line for line in process.stdout if ":" in line).strip()
        process.stdin.close()


@pytest.mark.slow
def test_on_ray_a_killed_worker_leaves_the_same_bytes(
    grid: Path, whole: dict[str, bytes], cluster: str, tmp_path: Path
) -> None:
    process = _begin(grid, tmp_path / "ray", "--where", "ray", RAY_ADDRESS=cluster)
    _kill_one(tmp_path / "ray", process)
    assert process.wait() == 0
    assert _sessions(tmp_path / "ray") == 9
    assert _written(tmp_path / "ray") == whole


@pytest.mark.slow
def test_on_slurm_a_killed_job_leaves_the_same_bytes(
    grid: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    pytest.importorskip("submitit")
    process = _begin(
        grid, tmp_path / "slurm", "--where", "slurm", "--ask", "cluster=local", "--jobs", "2"
    )
    _kill_one(tmp_path / "slurm", process)
    assert process.wait() == 0
    assert _sessions(tmp_path / "slurm") == 9
    assert _written(tmp_path / "slurm") == whole


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its open logs
def test_the_debug_executor_runs_in_this_process(command: Command, micro: Path) -> None:
    pytest.importorskip("submitit")
    done = command(*run_of(micro, "--where", "slurm", "--ask", "cluster=debug"))
    assert done.code == 0, done
    assert seed_folder(Path("runs"), micro).exists()
