"""What README and docs claim is what the committed rows say."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from d3po_bench import registry
from d3po_bench.config import make
from d3po_bench.errors import UserError
from d3po_bench.launch import grid as sweep
from tests.test_report import write_run

ROOT = Path(__file__).parent.parent
CLAIMS = json.loads((ROOT / "results" / "claims.json").read_text(encoding="utf-8"))


def loaded(path: Path) -> ModuleType:
    """A committed script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def summary() -> ModuleType:
    return loaded(ROOT / "results" / "summary.py")


def printed(*command: str) -> list[str]:
    """Lines that a committed script prints."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()


@pytest.mark.parametrize(
    ("document", "script"),
    [(claim["document"], tuple(claim["command"])) for claim in CLAIMS["tables"]],
)
def test_tables_are_what_the_rows_say(document: str, script: tuple[str, ...]) -> None:
    text = (ROOT / document).read_text(encoding="utf-8").splitlines()
    lines = printed(*script)
    assert len(lines) > 2
    assert [line for line in lines if line not in text] == []


def test_commands_of_tries_give_their_configs() -> None:
    searched = ROOT / "results" / "search"
    commands = loaded(searched / "commands.py")
    tries = sorted(searched.rglob("config.json"))
    assert len(tries) > 50
    for path in tries:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        arguments = commands.command(recorded)
        changes = dict(a.split("=", 1) for a in arguments if "=" in a)
        run, _ = make(
            recorded["method"], recorded["objective"], "quick", changes, seed=recorded["seed"]
        )
        made = {**vars(run), **registry.method(run.method)(**run.options).__dict__}
        for key, value in {**recorded, **recorded["options"]}.items():
            if key not in ("options", "run_id"):
                assert made[key] == (tuple(value) if isinstance(value, list) else value), path


def test_the_grid_makes_the_published_configs() -> None:
    published = ROOT / "results" / "tiny"
    grid = sweep.read(published / "grid.toml")
    cells = set(product(grid.methods, grid.objectives, grid.seeds))
    for path in published.rglob("config.json"):
        recorded = path.read_text(encoding="utf-8")
        found = json.loads(recorded)
        cell = found["method"], found["objective"], found["seed"]
        cells.remove(cell)
        changes = grid.settings_of(*cell[:2])
        run, _ = make(*cell[:2], "quick", changes, model=grid.model, seed=cell[2])
        assert run.to_json() == recorded
    assert cells == set()


# ---- the summary, of made-up runs: `write_run` has score 7 + seed / 10 + gain * round


def rows(text: str) -> list[dict[str, dict[str, str]]]:
    """The cells of each table by "objective method" and heading."""
    found = []
    for part in text.split("\n\n")[1::2]:
        names, _, *lines = ([c.strip() for c in ln.split("|")[1:-1]] for ln in part.splitlines())
        cells = [dict(zip(names, line, strict=True)) for line in lines]
        found.append({f"{c.pop('objective')} {c.pop('method')}": c for c in cells})
    return found


def add_columns(folder: Path, costs: dict[str, Any], **columns: str) -> None:
    """Further columns of eval.csv, the same in all rows, and of metrics.jsonl, by round."""
    head, *body = (folder / "eval.csv").read_text().splitlines()
    text = [",".join([head, *columns]), *(",".join([row, *columns.values()]) for row in body)]
    (folder / "eval.csv").write_text("\n".join(text) + "\n")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [json.dumps(m | {k: v * m["round"] for k, v in costs.items()}) for m in metrics]
    (folder / "metrics.jsonl").write_text("\n".join(logged) + "\n")


@pytest.fixture
def two_methods(tmp_path: Path) -> Path:
    for seed in range(3):
        write_run(tmp_path, seed=seed)
        write_run(tmp_path, method="ddpo", seed=seed, gain=0.05 * seed)
    return tmp_path


def test_gains_by_hand(summary: ModuleType, two_methods: Path) -> None:
    learnt, _ = rows(summary.tables([two_methods]))
    # d3po: 7.0, 7.1, 7.2 at first and 0.1 * 10 = 1 more at the end, with both samplers
    assert learnt["incompress d3po"] == {
        "seeds": "3",
        "base": "7.100",
        "end": "8.100",
        "gain (95 % interval)": "+1.000 (+1.000 to +1.000)",
        "worst seed": "+1.000",
        "share of excess": f"{1 / (7.1 - summary.flat_size(32)):+.0%}",
        "IQM of the gain (95 % interval)": "+1.000 (+1.000 to +1.000)",
        "difference to d3po (95 % interval)": "",
        "gain, eta 0": "+1.000",
    }
    ddpo = learnt["incompress ddpo"]
    assert ddpo["gain (95 % interval)"] == "+0.500 (+0.000 to +1.000)"
    assert ddpo["worst seed"] == "+0.000"


def test_difference_to_d3po_by_hand(summary: ModuleType, two_methods: Path) -> None:
    learnt, _ = rows(summary.tables([two_methods]))
    found = learnt["incompress ddpo"]["difference to d3po (95 % interval)"]
    # ends 7.0, 7.6, 8.2 against 8.0, 8.1, 8.2; the interval lies within the extremes of both
    difference, low, _, high = found.replace("(", "").replace(")", "").split()
    assert difference == "-0.500"
    assert 7.0 - 8.2 < float(low) < -0.9
    assert -0.1 < float(high) < 8.2 - 8.0


def test_difference_is_of_the_training_sampler(summary: ModuleType, two_methods: Path) -> None:
    before, _ = rows(summary.tables([two_methods]))
    for path in two_methods.glob("*/*/ddpo/*/eval.csv"):
        path.write_text(re.sub(r"(eta0,.*),[\d.]+,", r"\1,99,", path.read_text()))
    after, _ = rows(summary.tables([two_methods]))
    name = "difference to d3po (95 % interval)"
    assert after["incompress ddpo"][name] == before["incompress ddpo"][name]
    assert after["incompress ddpo"]["gain, eta 0"] == "+0.000"


def test_costs_by_hand(summary: ModuleType, two_methods: Path) -> None:
    _, cost = rows(summary.tables([two_methods]))
    # 10 rounds of 32 pairs, 64 images and 3 s; UNet passes, KL and diversity are not there
    assert cost["incompress ddpo"] == {
        "recognised": "0.80 -> 0.80",
        "diversity": "",
        "KL at the end": "",
        "pairs (or single images)": "320",
        "images": "640",
        "UNet passes": "",
        "backward passes": "",
        "seconds a seed": "30",
    }


def test_summary_of_what_newer_runs_measure(summary: ModuleType, tmp_path: Path) -> None:
    add_columns(write_run(tmp_path), {"unet_forwards": 200}, kl="0.25", diversity="0.5")
    learnt, cost = rows(summary.tables([tmp_path]))
    found = cost["incompress d3po"]
    assert found["KL at the end"] == "0.250"
    assert found["diversity"] == "0.50 -> 0.50"
    assert found["UNet passes"] == "2,000"
    # one seed: no interval
    assert learnt["incompress d3po"]["gain (95 % interval)"] == "+1.000"


def test_diversity_that_was_measured_beside_the_runs(summary: ModuleType, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path, seed=seed)
    beside = tmp_path / "tiny" / "diversity.csv"
    lines = ["objective,method,seed,diversity", "incompress,d3po,0,0.2", "incompress,d3po,1,0.3"]
    beside.write_text("\n".join([*lines, "incompress,no-fine-tune,,0.5"]) + "\n")
    assert rows(summary.tables([tmp_path]))[1]["incompress d3po"]["diversity"] == "0.50 -> 0.25"
    # one run was not measured: no mean over the others
    write_run(tmp_path, seed=2)
    assert rows(summary.tables([tmp_path]))[1]["incompress d3po"]["diversity"] == ""


def test_summary_of_empty_columns(summary: ModuleType, tmp_path: Path) -> None:
    folder = write_run(tmp_path, animal=False)
    add_columns(folder, {}, kl="", diversity="")
    (folder / "timing.jsonl").unlink()
    _, cost = rows(summary.tables([tmp_path]))
    empty = {k for k, cell in cost["incompress d3po"].items() if cell == ""}
    assert empty == {
        "recognised", "diversity", "KL at the end", "UNet passes", "backward passes",
        "seconds a seed",
    }  # fmt: skip


def test_worst_seed_of_an_objective_that_wants_less(summary: ModuleType, tmp_path: Path) -> None:
    for seed, gain in enumerate((-0.1, 0.02, -0.3)):
        write_run(tmp_path, "compress", seed=seed, gain=gain)
    learnt, _ = rows(summary.tables([tmp_path]))
    assert learnt["compress d3po"]["worst seed"] == "+0.200"


def test_share_of_excess_of_an_unknown_model_is_empty(summary: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path, model="hub/other")
    learnt, _ = rows(summary.tables([tmp_path]))
    assert learnt["incompress d3po"]["share of excess"] == ""


def test_images_without_a_score_are_not_compared(summary: ModuleType, two_methods: Path) -> None:
    before, _ = rows(summary.tables([two_methods]))
    path = two_methods / "tiny" / "incompress" / "ddpo" / "seed-0" / "eval.csv"
    path.write_text(path.read_text().replace("10,eta1,cat,0,6.500000", "10,eta1,cat,0,"))
    after, _ = rows(summary.tables([two_methods]))
    name = "difference to d3po (95 % interval)"
    assert after["incompress ddpo"][name] == before["incompress ddpo"][name]


def test_methods_judged_on_other_images_are_not_compared(
    summary: ModuleType, two_methods: Path
) -> None:
    for path in two_methods.glob("*/*/ddpo/*/eval.csv"):
        path.write_text(path.read_text().replace("sea horse", "dog"))
    with pytest.raises(UserError, match=r"same evaluation images in .*ddpo.* and .*d3po"):
        summary.tables([two_methods])


def test_summary_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "results/summary.py", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: Expected run folders")
    assert done.stderr.count("\n") == 1
