"""`evaluate`: the same rows whatever the processes, the kills and the cuts; clear refusals."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from d3po_bench import cli
from d3po_bench.errors import RunError, UserError
from eval.evaluate import plan, summary, work
from eval.evaluate.plan import EvaluateRequest
from tests.conftest import disturb, loaded
from tests.gallery import gallery

PROMPTS = [f"{number} {animal}" for number in range(4)
           for animal in ("cat", "dog", "cow", "fox", "bee")]  # fmt: skip


MY_SCORER = """
import torch

class Width:
    unit = "px"

    def __call__(self, images, prompts):
        return torch.full((len(images),), float(images.shape[3]))

def load(device):
    return Width()
"""


def request(target: Path, **changes: Any) -> EvaluateRequest:
    plain: dict[str, Any] = {
        "scorers": ("jpeg_size",), "model": None, "prompts": None, "count": None, "images": 2,
        "steps": 2, "guidance": None, "device": "cpu", "jobs": 1, "out": None,
    }  # fmt: skip
    return EvaluateRequest(target=target, **{**plain, **changes})


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "rows.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)


@pytest.fixture(scope="module")
def adapter(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the micro model that changes its pictures."""
    model = loaded(micro)
    model.add_adapter(seed=0)
    disturb(model)
    folder = tmp_path_factory.mktemp("adapter")
    model.save(folder)
    return folder


# ---- pictures


def test_pictures_are_scored_one_by_one(tmp_path: Path) -> None:
    folder = gallery(tmp_path / "pictures", 11)
    out = work.run(request(folder))
    assert out == folder / "evaluation"
    found = rows(out)
    assert [row["file"] for row in found] == [f"{n}.png" for n in range(11)]
    assert found[3]["size"] == "11x11"
    assert float(found[0]["jpeg_size"]) > 0.5
    assert found[0]["weights"] == "jpeg_size=code"


def test_the_model_of_pictures_says_which_weights_suit_them(tmp_path: Path) -> None:
    folder = gallery(tmp_path / "pictures", 1)
    weights = [
        plan.planned(request(folder, model=m)).weights for m in (None, "tiny", "tiny2", "sd15")
    ]
    assert weights == ["official", "tiny", "tiny2", "official"]
    for name in ("nonsense", "some/model"):
        with pytest.raises(UserError, match=f"No model is called '{name}'. Known: sd15, tiny"):
            plan.planned(request(folder, model=name))


def test_what_compares_pictures_of_a_prompt_is_refused_for_a_folder(tmp_path: Path) -> None:
    folder = gallery(tmp_path / "pictures", 2)
    with pytest.raises(UserError, match="diversity, vendi would say nothing"):
        work.run(request(folder, model="tiny", scorers=("jpeg_size", "diversity", "vendi")))
    assert not (folder / "evaluation").exists()


def test_a_column_without_any_number_is_told(tmp_path: Path) -> None:
    folder = gallery(tmp_path / "pictures", 2)
    said: list[str] = []
    work.run(request(folder, scorers=("jpeg_size", "animal")), note=said.append)
    assert said == []
    table = folder / "metadata.csv"
    table.write_text(table.read_text().replace("cat", "car"))
    asked = request(folder, scorers=("jpeg_size", "animal"), out=tmp_path / "out")
    work.run(asked, note=said.append)
    assert len(said) == 1
    assert said[0].startswith("no image has a number of animal: ")


def test_packages_that_brought_a_scorer_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "my_scorers-2.5.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: my-scorers\nVersion: 2.5\n")
    (package / "entry_points.txt").write_text("[d3po_bench.scorers]\nwidth = my_scorers:load\n")
    (tmp_path / "my_scorers.py").write_text(MY_SCORER)
    monkeypatch.syspath_prepend(str(tmp_path))
    out = work.run(request(gallery(tmp_path / "pictures", 1), scorers=("width", "jpeg_size")))
    assert float(rows(out)[0]["width"]) == 8
    facts = json.loads((out / "provenance.json").read_text())
    assert facts["plugins"] == {"scorer width": "my-scorers 2.5"}
    assert facts["unchecked_scorers"] == ["width"]


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "d3po_bench", "evaluate", str(folder), "--scorers",
               "jpeg_size,animal", "--out", str(out)]  # fmt: skip
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)


@pytest.mark.slow
def test_a_killed_worker_is_told_and_what_is_scored_is_kept(tmp_path: Path) -> None:
    asked = request(gallery(tmp_path / "pictures", 40), jobs=2)
    whole = work.run(replace(asked, jobs=1, out=tmp_path / "whole"))

    def kill(done: int, total: int) -> None:
        if done:
            for worker in multiprocessing.active_children():
                worker.kill()

    with pytest.raises(RunError, match=r"was killed .* Run the same command again"):
        work.run(asked, kill)
    told: list[int] = []
    out = work.run(replace(asked, jobs=1), lambda done, total: told.append(done))
    assert told[0] > 0, "something was kept"
    assert len(rows(out)) == 40
    assert (out / "rows.csv").read_bytes() == (whole / "rows.csv").read_bytes()


@pytest.mark.parametrize(
    ("pictures", "shares"),
    [
        pytest.param(240, (0.3,), marks=pytest.mark.slow),
        pytest.param(1000, (0.1, 0.5), marks=pytest.mark.slow),
    ],
)
def test_many_pictures_survive_kills(
    pictures: int, shares: tuple[float, ...], tmp_path: Path
) -> None:
    folder, out = gallery(tmp_path / "pictures", pictures), tmp_path / "out"
    pieces = pictures // 8
    for share in shares:
        process = start(folder, out)
        deadline = time.monotonic() + 120
        while len(list(out.glob("pieces/*.json"))) < share * pieces and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done = len(list(out.glob("pieces/*.json")))
        assert share * pieces <= done < pieces, "it was killed on its way"
        assert not (out / "rows.csv").exists()
    stamp = {path: path.stat().st_mtime_ns for path in out.glob("pieces/*.json")}
    process = start(folder, out)
    assert process.wait() == 0
    assert {path: path.stat().st_mtime_ns for path in stamp} == stamp, "nothing is scored twice"
    found = rows(out)
    assert [row["file"] for row in found] == [f"{n}.png" for n in range(pictures)]
    whole = work.run(request(folder, scorers=("jpeg_size", "animal"), out=tmp_path / "whole"))
    assert (whole / "rows.csv").read_bytes() == (out / "rows.csv").read_bytes()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name\n1.png", "needs a file_name and a text for each picture, and row 1 is"),
        ("file_name,text\n../secret.png,a cat", "not a picture inside"),
        ("file_name,text\n/etc/passwd,a cat", "not a picture inside"),
        ("file_name,text\nmissing.png,a cat", "not a picture inside"),
        ("file_name,text\nmetadata.csv", "row 1 has more or fewer values"),
        ("file_name,prompt\nmetadata.csv,a cat,red", "row 1 has more or fewer values"),
        ("file_name,text,text\nmetadata.csv,a cat,red", "two columns have the same name"),
        ("file_name,text\nmetadata.csv,", "a text for each picture, and row 1 is"),
        ("file_name,text,prompt\nmetadata.csv,,a cat", "a text for each picture, and row 1 is"),
        ("file_name,text\nmetadata.csv,a\x07cat", "holds the control character"),
        ("file_name,text\n", "names no picture"),
        ("file_name,text\nmetadata.csv,a cat", "is not a picture that can be read"),
    ],
)
def test_bad_pictures_are_one_line(text: str, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    (folder / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        work.run(request(folder))


# ---- models


@pytest.fixture(scope="module")
def evaluation(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished evaluation of the micro model on all prompts, to read only."""
    folder = tmp_path_factory.mktemp("evaluation")
    listed = folder / "prompts.txt"
    listed.write_text("\n".join(PROMPTS))
    return work.run(request(micro, prompts=str(listed), out=folder / "out"))


def test_every_prompt_is_drawn_with_both_samplers_and_noise_of_its_own(evaluation: Path) -> None:
    found = rows(evaluation)
    assert len(found) == 2 * 2 * len(PROMPTS)
    assert {row["sampler"] for row in found} == {"eta1", "eta0"}
    assert [row["prompt"] for row in found[: 2 * len(PROMPTS)]] == [
        prompt for prompt in PROMPTS for _ in range(2)
    ]
    assert len({row["jpeg_size"] for row in found}) > 20, "every image has noise of its own"


def test_rows_do_not_depend_on_cuts(
    evaluation: Path, micro: Path, prompts: str, tmp_path: Path
) -> None:
    out = shutil.copytree(evaluation, tmp_path / "out")
    for piece in sorted((out / "pieces").glob("*.csv"))[::2]:
        piece.unlink()
    (out / "rows.csv").unlink()
    work.run(request(micro, prompts=prompts, out=out))
    assert (out / "rows.csv").read_bytes() == (evaluation / "rows.csv").read_bytes()


@pytest.mark.slow
def test_rows_do_not_depend_on_processes(
    evaluation: Path, micro: Path, prompts: str, tmp_path: Path
) -> None:
    out = work.run(request(micro, prompts=prompts, jobs=2, out=tmp_path / "out"))
    assert (out / "rows.csv").read_bytes() == (evaluation / "rows.csv").read_bytes()


def test_the_base_model_has_not_drifted_and_a_lora_has(
    evaluation: Path, micro: Path, adapter: Path, prompts: str, tmp_path: Path
) -> None:
    before = rows(evaluation)
    after = rows(work.run(request(adapter, model=str(micro), prompts=prompts, out=tmp_path / "b")))
    assert {row["kl"] for row in before if row["sampler"] == "eta1"} == {"0.0"}
    assert all(float(row["kl"]) > 0 for row in after if row["sampler"] == "eta1")
    assert [row["jpeg_size"] for row in before] != [row["jpeg_size"] for row in after]


@pytest.mark.parametrize("full", [False, True])
def test_saved_weights_answer_as_those_in_training(full: bool, micro: Path, tmp_path: Path) -> None:
    live = loaded(micro, full=full)
    live.add_adapter(seed=0)
    disturb(live)
    live.save(tmp_path)
    saved = loaded(micro)
    saved.load_saved(tmp_path)
    x = torch.randn(2, *live.latent_shape, generator=torch.Generator().manual_seed(0))
    asked = x, torch.tensor([500, 20]), live.encode(["cat", "dog"])
    with torch.no_grad():
        trained = saved.output(*asked)
        torch.testing.assert_close(trained, live.output(*asked))
        base = saved.output(*asked, weights="base")
        torch.testing.assert_close(base, live.output(*asked, weights="base"))
        assert not torch.allclose(base, trained, atol=1e-3)


def test_a_run_is_evaluated_as_it_was_trained(micro: Path, tmp_path: Path) -> None:
    cli.cli(
        ["run", "--method", "d3po", "--objective", "incompress", "--model", str(micro),
         "--preset", "quick", "--rounds", "1", "--set", "sampling_steps=3", "--set",
         "skip_steps=0", "--set", "prompts_per_round=2", "--set", "images_per_prompt=2",
         "--set", "eval_prompts=45", "--out", str(tmp_path / "runs")],
        standalone_mode=False,
    )  # fmt: skip
    run = next((tmp_path / "runs").rglob("seed-0"))
    out = work.run(request(run, steps=None, images=1, scorers=("jpeg_size",)))
    assert out == run / "evaluation"
    with (run / "eval.csv").open(newline="") as file:
        trained = [row for row in csv.DictReader(file) if row["round"] == "1"]
    again = rows(out)
    assert [row["prompt"] for row in again] == [row["prompt"] for row in trained]
    for a, b in zip(again, trained, strict=True):
        # A size may move by a few bytes: the saved scale is folded into the weights.
        assert abs(float(a["jpeg_size"]) - float(b["score"])) <= 0.01


# ---- refusals


def test_another_evaluation_in_the_folder_is_refused(
    evaluation: Path, micro: Path, prompts: str
) -> None:
    before = (evaluation / "rows.csv").read_bytes()
    with pytest.raises(UserError, match="holds another evaluation"):
        work.run(request(micro, prompts=prompts, out=evaluation, count=4))
    assert (evaluation / "rows.csv").read_bytes() == before


def test_what_cannot_be_evaluated_is_one_line(
    micro: Path, adapter: Path, prompts: str, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text("{}")
    (half / "metrics.jsonl").write_text("")
    asked = {
        "No scorer is called 'jpeg'": request(micro, prompts=prompts, scorers=("jpeg",)),
        "Add --prompts with a list": request(micro),
        "LoRA or unet .* does not fit this model": request(
            adapter, prompts=prompts, out=tmp_path / "x"
        ),
        "No model is called 'nothing'": request(Path("nothing"), prompts=prompts),
        "--model sd15 would be ignored": request(micro, prompts=prompts, model="sd15"),
        "is not finished. Run its command again": request(half),
    }
    for said, wanted in asked.items():
        with pytest.raises(UserError, match=said):
            work.run(wanted)


@pytest.mark.parametrize("command", [["evaluate", "tiny"], ["table1"]])
def test_no_scorer_is_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--scorers", ",,", "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ',,' names no scorer.")
    assert not (tmp_path / "out").exists()


def test_a_model_is_known_by_its_name_beside_a_folder_of_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (gallery(tmp_path / "tiny", 1) / "metadata.csv").unlink()
    assert plan.planned(request(Path("tiny"))).model == "tiny"


def test_a_model_has_no_scorers_of_its_own() -> None:
    with pytest.raises(UserError, match="tiny is not a run"):
        plan.scorers_of(Path("tiny"))


def test_absent_weights_stop_it_before_anything_is_drawn(
    micro: Path, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PO_BENCH_CACHE", str(tmp_path / "cache"))
    work._scorer.cache_clear()
    with pytest.raises(UserError, match="weights fetch clip"):
        work.run(request(micro, prompts=prompts, scorers=("clip",), out=tmp_path / "out"))
    assert not list((tmp_path / "out").glob("pieces/*"))


def test_stable_diffusion_has_a_list_that_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Absent, it is named before anything of the model is looked for."""
    monkeypatch.setenv("D3PO_BENCH_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "sd15", "--scorers", "jpeg_size", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert "d3po-bench weights fetch prompts-image-reward" in said
    assert not (tmp_path / "out").exists()


def test_what_was_evaluated_must_not_change_on_the_way(
    micro: Path, adapter: Path, prompts: str, tmp_path: Path
) -> None:
    lora = shutil.copytree(adapter, tmp_path / "lora")
    asked = request(lora, model=str(micro), prompts=prompts, out=tmp_path / "out", count=2)
    facts = json.loads((work.run(asked) / "provenance.json").read_text())
    assert facts["content"] == plan.planned(asked).content
    assert facts["packages"]["torch"] == torch.__version__
    (lora / "pytorch_lora_weights.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="another evaluation: content differs"):
        work.run(asked)


def test_pictures_must_not_change_on_the_way(tmp_path: Path) -> None:
    folder = gallery(tmp_path / "pictures", 3)
    asked = request(folder, out=tmp_path / "out")
    work.run(asked)
    shutil.copy(folder / "0.png", folder / "1.png")
    with pytest.raises(UserError, match="another evaluation: content differs"):
        work.run(asked)


def test_provenance_names_scorers_and_versions(evaluation: Path) -> None:
    facts = json.loads((evaluation / "provenance.json").read_text())
    assert facts["scorers"] == {"jpeg_size": "code"}
    assert set(facts["versions"]) == {"torch", "transformers", "pillow", "numpy"}
    assert {mean["column"] for mean in summary.summary(evaluation)} >= {"jpeg_size"}


def test_saved_pictures_are_those_that_were_scored(
    evaluation: Path, micro: Path, prompts: str, tmp_path: Path
) -> None:
    """The JPEG size of each kept picture is its row's; a finished evaluation can still be kept."""
    out = shutil.copytree(evaluation, tmp_path / "out")
    before = rows(out)
    work.run(request(micro, prompts=prompts, out=out, save=True))
    assert rows(out) == before
    kept = work.run(request(out / "pictures" / "eta0", out=tmp_path / "again"))
    sizes = [row["jpeg_size"] for row in before if row["sampler"] == "eta0"]
    assert [row["jpeg_size"] for row in rows(kept)] == sizes
    assert [row["prompt"] for row in rows(kept)] == [p for p in PROMPTS for _ in range(2)]


def test_options_for_drawing_do_not_go_with_pictures(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(b"")
    (tmp_path / "metadata.csv").write_text("file_name,text\none.png,a cat\n")
    for name, value in (("save", True), ("prompts", "animals"), ("count", 3)):
        with pytest.raises(UserError, match=f"Leave --{name} out"):
            work.run(request(tmp_path, **{name: value}))
