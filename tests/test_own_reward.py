"""Rewards of one's own: the file of docs/own-reward.md as it is printed, and what is refused."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from d3po_bench import own, registry
from d3po_bench.errors import UserError
from d3po_bench.launch import grid
from d3po_bench.rewards import sums
from d3po_bench.runs.run import RunFolder
from eval.analysis.scores import Score, score_of
from eval.tools import TOOLS
from tests.commands import ROOT, Command, edit_json, refused, run_of
from tests.conftest import CPU

GUIDE = (ROOT / "docs" / "own-reward.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"<!-- example: (\S+) -->\n```python\n(.*?)```", GUIDE, re.DOTALL))
REWARD = FILES["my_reward.py"]
RED = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(2, 3, 4, 4)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that holds the guide's reward, and is the present one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text(REWARD)
    return tmp_path


def run(micro: Path, objective: str, *more: str, **settings: Any) -> list[str]:
    return run_of(micro, "--objective", objective, *more, **settings)


def folder_of(place: Path, micro: Path, name: str, out: str = "runs") -> Path:
    return place / out / str(micro).replace("/", "--").strip("-.") / name / "d3po" / "seed-0"


# ---- in a file


def test_a_ten_line_file_trains_and_carries_its_unit_and_direction(
    here: Path, command: Command, micro: Path
) -> None:
    (here / "my_reward.py").write_text(REWARD.replace("direction = 1", "direction = -1"))
    assert len(REWARD.splitlines()) <= 10
    done = command(*run(micro, "./my_reward.py", eval_scorers="jpeg_size,./my_reward.py:reward"))
    assert done.code == 0, done.err
    made = folder_of(here, micro, "my_reward")
    head = (made / "eval.csv").read_text().splitlines()[0].split(",")
    assert head[4:8] == ["score", "jpeg_size", "reward", "kl"]
    (here / "my_reward.py").unlink()  # whoever reads the run may not have it
    assert score_of(RunFolder(made)) == Score("my_reward", "points", -1)
    facts = RunFolder(made).facts
    assert facts["plugins"]["objective my_reward"] == "my_reward.py"
    assert re.fullmatch("[0-9a-f]{12}", facts["inputs"]["scorers"]["my_reward"])
    assert facts["unchecked_scorers"] == []
    assert "objective my_reward from  my_reward.py" in command("show", made).out
    assert "| my_reward | d3po | 1 |" in command("report", "runs").out
    table = command("report", "runs", "--table", "runs", "--format", "csv").out
    assert "--objective my_reward.py" in table
    assert command("plot", "runs").code == 0
    assert "↓ better" in (here / "runs" / "plots" / "curves.svg").read_text()
    assert "(points)" in (here / "runs" / "plots" / "curves.svg").read_text()
    verdict = command("compare", made, made, "--json")
    assert (json.loads(verdict.out)["unit"], json.loads(verdict.out)["sign"]) == ("points", -1)


def test_evaluation_by_a_file(here: Path, command: Command) -> None:
    Image.new("RGB", (4, 4), (255, 0, 0)).save(here / "red.png")
    (here / "metadata.csv").write_text("file_name,text\nred.png,cat\n")
    done = command("evaluate", here, "--scorers", "./my_reward.py", "--out", "found")
    assert done.code == 0, done.err
    assert "my_reward  1.0000" in done.out
    assert "golden" not in done.err
    refused(command("evaluate", here, "--scorers", "./my_reward.py,a/my_reward.py"), "a/my_reward")
    twice = command("evaluate", here, "--scorers", "my_reward.py,./my_reward.py", "--out", "found")
    assert twice.code == 0


def test_a_run_is_not_resumed_with_another_text(here: Path, command: Command, micro: Path) -> None:
    line = run(micro, "my_reward.py", rounds=1, eval_every=0)
    assert command(*line).code == 0
    assert command(*line).code == 0  # it has finished
    (here / "my_reward.py").write_text(REWARD + "\n# another\n")
    refused(command(*line), "began with other inputs: scorers", "my_reward")
    edit_json(folder_of(here, micro, "my_reward") / "provenance.json", lambda f: f.pop("ended"))
    refused(command(*line), "began with other inputs: scorers", "my_reward")
    (here / "my_reward.py").write_text(REWARD)
    assert command(*line).code == 0


def test_a_run_that_came_to_nothing_begins_again_with_a_corrected_text(
    here: Path, command: Command, micro: Path
) -> None:
    line = run(micro, "my_reward.py", rounds=1, eval_every=0)
    (here / "my_reward.py").write_text(REWARD.replace("return ", "return float('nan') * "))
    assert command(*line).code == 1
    (here / "my_reward.py").write_text(REWARD)
    assert command(*line).code == 0


@pytest.mark.slow
def test_worker_processes_load_it_too(here: Path, command: Command, micro: Path) -> None:
    line = run(micro, "my_reward.py", "--seeds", "2", "--jobs", "2", rounds=1, eval_every=0)
    assert command(*line).code == 0
    assert len(list(here.rglob("metrics.jsonl"))) == 2


def test_a_class_is_made_on_the_device_and_may_say_unit_and_direction_itself(here: Path) -> None:
    (here / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "unit = 'others'\n"
        "class Bright:\n"
        "    unit, direction = 'points', -1\n"
        "    def __init__(self, device): self.device = device\n"
        "    def __call__(self, images, prompts):\n"
        "        return images.to(self.device).float().mean((1, 2, 3))\n"
    )
    assert registry.objective("mine.py:Bright").sign == -1
    scorer = registry.load_scorer("mine.py:Bright", CPU)
    assert (scorer.name, scorer.unit) == ("Bright", "points")
    assert scorer(RED, ["cat", "dog"]).tolist() == [85, 85]


def test_module_and_objective_by_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "shades").mkdir()
    (here / "shades" / "red.py").write_text(
        REWARD + "\nfrom d3po_bench import Objective\n"
        "OBJECTIVE = Objective(prompts='hand', scorer=reward, sign=-1)\n"
    )
    found = registry.objective("shades.red:OBJECTIVE")
    assert (found.prompts, found.sign) == ("hand", -1)
    assert registry.load_scorer(str(found.scorer), CPU)(RED, ["", ""]).tolist() == [1, 1]
    assert registry.objective("shades.red:reward").sign == 1
    assert registry.name_of("objective", "shades.red:reward") == "reward"


def test_a_script_of_somebody_elses_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    with pytest.raises(UserError, match="__main__:reward has no reward"):
        registry.objective("__main__:reward")


def test_the_text_that_is_run_is_the_one_on_record(here: Path) -> None:
    """Within a second, too, in which a compiled file would look as new as its source."""
    path = here / "fast.py"
    for value in (1, 2, 3):
        path.write_text(f"VALUE = {value}")
        assert own.load("fast.py", "VALUE").found == value
    assert not (here / "__pycache__").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "has no OBJECTIVE or reward. Add it"),
        ("def (", "does not load: SyntaxError: invalid syntax (bad.py, line 1)"),
        ("\nimport nowhere", "No module named 'nowhere' (line 2). Install what is missing"),
        ("raise SystemExit(0)", "does not load: SystemExit"),
        (REWARD.replace("direction = 1", "direction = 0"), "has 0 as its direction"),
        (REWARD.replace("direction = 1", "direction = 'up'"), "has 'up' as its direction"),
        (REWARD.replace("direction = 1", "direction = True"), "has True as its direction"),
        (REWARD.replace("direction = 1", ""), "has no direction. Write, beside the reward"),
        (REWARD.replace('unit = "points"', ""), "does not say its unit"),
        (REWARD.replace('unit = "points"', "unit = ' '"), "does not say its unit"),
        (REWARD.replace("def reward", "reward = 3\ndef other"), "is 3. A reward is a function"),
        (REWARD + "prompts = 3", "has the prompts 3. Name a list"),
        (REWARD + "prompts = 'nolist'", "No prompt list is called 'nolist'"),
        (REWARD.replace("return", "return 1 / 0 #"), "fails: ZeroDivisionError: division by"),
        (REWARD.replace("return", "return 1 #"), "numbers of the shape () for 2 pictures"),
        (REWARD.replace("return", "return 'no' #"), "returned no numbers but a str"),
        (REWARD + "class reward:\n    def __init__(self, path): 0\n", "missing 1 required"),
        (REWARD + "class reward: 0", "without a call or a unit"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_reward_is_one_line(
    text: str, said: str, here: Path, command: Command, micro: Path
) -> None:
    (here / "bad.py").write_text(text)
    refused(command(*run(micro, "./bad.py")), said)
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("./nowhere.py", "nowhere.py cannot be read: No such file"),
        ("./compress.py", "would be called compress, as the objective that there is. Rename"),
        ("feedback.py", "would be called as runs on votes are. Rename"),
        ("score.py", "A scorer cannot be called score"),
        ("my reward.py", "would be called 'my reward' in run folders. Rename it"),
        ("my_reward.py:nothing", "my_reward.py:nothing has no nothing"),
        ("nowhere.module:NAME", "No module named 'nowhere'"),
        ("aestetic:tiny", "Did you mean 'aesthetic'?"),
        ("math:pi", "math:pi is 3.14"),
        ("aesthetic+clip:0.3", "Give each part of aesthetic+clip:0.3 a weight"),
        ("aesthetic:0.7+clip:0.3", "have different prompts. Choose with --prompts"),
        ("aesthetic:1+aesthetic:2", "aesthetic is twice in"),
        ("aesthetic:1+compress:0", "compress has the weight 0"),
        ("compress:1+incompress:1", "are scored by jpeg_size. Leave one out"),
        ("http://localhost:80+compress:1", "may be an address with a port"),
        ("http://", "is none. Write http://HOST:PORT/PATH"),
        ("http://me:secret@host/x", "has a user, a query or a fragment"),
        ("https://host/x?token=secret", "has a user, a query or a fragment"),
        ("http://localhost:1/score", "does not answer (ConnectionError). Start it"),
    ],
)
def test_what_is_no_objective_is_one_line(
    objective: str, said: str, here: Path, command: Command, micro: Path
) -> None:
    for name in ("compress.py", "feedback.py", "score.py", "my reward.py"):
        (here / name).write_text(REWARD)
    assert "secret" not in refused(command(*run(micro, objective)), said)
    assert not (here / "runs").exists()


RUN = "run --method d3po --objective compress"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{RUN} --set eval_scorers=./nowhere.py", "nowhere.py cannot be read"),
        (f"{RUN} --set eval_scorers=animal,my_reward.py:x", "my_reward.py:x has no x"),
        (f"{RUN} --set eval_scorers=my_reward.py,a/my_reward.py", "a/my_reward.py cannot be read"),
        (f"{RUN} --set sources=x", "No setting is called 'sources'"),
        ("run --objective compress --method ./nowhere.py", "nowhere.py cannot be read"),
        ("run --objective compress --method my_reward.py", "my_reward.py has no METHOD"),
        ("evaluate tiny --scorers ./nowhere.py", "nowhere.py cannot be read"),
        ("evaluate tiny --scorers http://localhost:1/x", "does not answer"),
        ("table1 --objective ./nowhere.py", "nowhere.py cannot be read"),
        ("sweep grid.toml", "nowhere.py cannot be read"),
    ],
)
def test_what_is_not_there_is_one_line(line: str, said: str, here: Path, command: Command) -> None:
    (here / "grid.toml").write_text(
        'methods = ["d3po"]\nobjectives = ["./nowhere.py"]\nseeds = 1\n'
    )
    before = sorted(here.iterdir())
    refused(command(*line.split()), said)
    assert sorted(here.iterdir()) == before


def test_no_file_that_a_run_names_is_loaded_to_read_it(
    here: Path, command: Command, micro: Path
) -> None:
    """Somebody else may have made the folder, and the file in it."""
    assert command(*run(micro, "my_reward.py", rounds=1)).code == 0
    (here / "my_reward.py").write_text("raise SystemExit('loaded')")
    made = folder_of(here, micro, "my_reward")
    for line in (("show", made), ("report", "runs", "--table", "runs", "--table", "gains"),
                 ("report", "runs", "--table", "settings"), ("plot", "runs"),
                 ("compare", made, made)):  # fmt: skip
        assert command(*line).code == 0
    edit_json(made / "config.json", lambda config: config.update(objective="my_reward.py"))
    refused(command("show", made), "has objective = 'my_reward.py', which no run can have")
    edit_json(made / "config.json", lambda config: config.update(objective="mine", prompts=""))
    refused(command("show", made), "has an objective of the user's own and no prompts")


def test_a_grid_takes_files_and_sums(here: Path) -> None:
    (here / "grid.toml").write_text(
        'methods = ["d3po"]\nobjectives = ["./my_reward.py", "compress:1+./my_reward.py:2"]\n'
        'seeds = 1\n[objective."./my_reward.py"]\nrounds = 3\n'
    )
    one, other = grid.configs(grid.read(here / "grid.toml"), TOOLS)
    assert (one.objective, one.rounds, other.rounds) == ("my_reward", 3, 12)
    assert other.objective == "compress-1-my_reward-2"


# ---- several at once


def test_a_sum_adds_weight_direction_and_score_and_logs_each_part(
    here: Path, command: Command, micro: Path
) -> None:
    objective = "./my_reward.py:2+compress:0.5"
    done = command(*run(micro, objective, eval_scorers="jpeg_size"))
    assert done.code == 0, done.err
    made = RunFolder(folder_of(here, micro, "my_reward-2-compress-0.5"))
    assert made.evaluation[0].keys() >= {"my_reward", "jpeg_size"}
    for row in made.evaluation:
        expected = 2 * row["my_reward"] - 0.5 * row["jpeg_size"]
        assert math.isclose(row["score"], expected, abs_tol=2e-6)
    for line in made.metrics:
        expected = 2 * line["score/my_reward"] - 0.5 * line["score/jpeg_size"]
        assert math.isclose(line["score_mean"], expected, rel_tol=1e-5)
    assert made.config.sources == {"objective": "my_reward.py:2+compress:0.5"}
    assert made.config.prompts == "animals"
    assert made.facts["inputs"]["scorers"].keys() == {"my_reward", "jpeg_size"}
    assert made.facts["score"] == {
        "scorer": "my_reward-2-compress-0.5", "unit": "weighted sum", "sign": 1,
    }  # fmt: skip
    assert command(*run(micro, objective, eval_scorers="jpeg_size")).code == 0  # finished before


def test_the_issues_sum(command: Command) -> None:
    parts = registry.summands("aesthetic:0.7+clip:0.3")
    assert parts == {"aesthetic": ("aesthetic", 0.7), "clip": ("clip", 0.3)}
    assert registry.name_of("objective", "aesthetic:0.7+clip:0.3") == "aesthetic-0.7-clip-0.3"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a:1+b:2", {"a": 1, "b": 2}),
        ("./a.py:0.50+b.py:NAME:-1e-3", {"a.py": 0.5, "b.py:NAME": -0.001}),
        ("p.q:f:.5+http://h:8/s:2", {"p.q:f": 0.5, "http://h:8/s": 2}),
        ("a:1", {}),
        ("a.py", {}),
        ("a+b.py:f", {}),
        ("a:1+b:2+", {}),
        ("http://localhost:8000", {}),
        ("aesthetic:tiny", {}),
    ],
)
def test_what_is_a_sum(text: str, parts: dict[str, float]) -> None:
    assert sums.parts_of(text) == parts


def test_names_of_sums_fit_into_folders() -> None:
    name = sums.name_of({f"reward_number_{n}": 0.1 for n in range(20)})
    assert len(name) <= 100
    assert own.is_name(name)
    assert own.is_name(sums.name_of({"a": -0.5, "b": 1e-9}))
