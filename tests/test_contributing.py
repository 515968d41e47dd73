"""The example of CONTRIBUTING.md, as it is printed there, in a package of its own."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from d3po_bench import config, registry

ROOT = Path(__file__).parent.parent


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The example's files, installed the way pip would: module and metadata on the path."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert [name for name, _ in found] == ["my_methods.py", "pyproject.toml"]
    site = tmp_path / "site"
    site.mkdir()
    for name, content in found:
        (site / name).write_text(content, encoding="utf-8")
    project = tomllib.loads((site / "pyproject.toml").read_text())["project"]
    metadata = site / f"my_methods-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    ((group, entries),) = project["entry-points"].items()
    lines = [f"{name} = {where}" for name, where in entries.items()]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))
    return site


def command(package: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(package), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "d3po_bench", *arguments],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_method_of_another_package_runs(package: Path, micro: Path, tmp_path: Path) -> None:
    assert "reinforce" in command(package, "list").stdout
    options = ["rounds=1", "prompts_per_round=2", "sampling_steps=3", "eval_every=0", "scale=2"]
    done = command(
        package, "run", "--method", "reinforce", "--objective", "compress", "--preset",
        "official_code", "--seeds", "1", "--model", str(micro), "--out", str(tmp_path / "runs"),
        *[part for o in [*options, "dtype=fp32"] for part in ("--set", o)],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (metrics,) = (tmp_path / "runs").rglob("metrics.jsonl")
    line = json.loads(metrics.read_text())
    assert line["images"] == 8
    assert math.isfinite(line["log_prob"])
    assert line["grad_norm"] > 0
    facts = json.loads(metrics.with_name("provenance.json").read_text())
    assert facts["plugins"] == {"method reinforce": "my-methods 0.1"}
    assert (
        "method reinforce from  my-methods 0.1" in command(package, "show", metrics.parent).stdout
    )


def test_it_is_found_as_a_file_too(package: Path) -> None:
    path = str(package / "my_methods.py")
    assert config.settings(path)["options"] == {"scale": float}
    assert registry.name_of("method", path) == "my_methods"


def test_its_options_are_checked_like_all_others(package: Path, tmp_path: Path) -> None:
    done = command(
        package, "run", "--method", "reinforce", "--objective", "compress", "--out",
        str(tmp_path), "--set", "scal=2",
    )  # fmt: skip
    assert done.returncode == 2
    assert "Did you mean 'scale'?" in done.stderr
