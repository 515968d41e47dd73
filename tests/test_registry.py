"""Names on the command line find their files, and a wrong one finds the nearest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from baselines.ddpo import DDPO
from d3po_bench import config, prompts, registry
from d3po_bench.cli import list as listing
from d3po_bench.d3po import D3PO
from d3po_bench.errors import UserError
from d3po_bench.models.adapters import Training
from d3po_bench.models.sources import Source, load
from d3po_bench.prompts import read_prompts

ROOT = Path(__file__).parent.parent


def test_names_are_the_files() -> None:
    assert registry.names("method")[0] == "d3po"
    assert {"compress", "incompress"} <= set(registry.names("objective"))
    assert {"animal", "jpeg_size"} <= set(registry.names("scorer"))
    assert {"tiny", "sd15"} <= set(registry.names("model"))
    # modules beside the methods, and packages' own files, answer to no name
    assert not {"registry", "engine", "types", "__init__"} & set(registry.names("method"))
    assert not {"stable_diffusion", "__init__"} & set(registry.names("model"))


@pytest.mark.parametrize("kind", get_args(registry.Kind))
def test_every_name_has_a_summary(kind: registry.Kind) -> None:
    for name in registry.names(kind):
        assert len(registry.summary(kind, name)) > 10


def test_every_objective_resolves() -> None:
    for name in registry.names("objective"):
        objective = registry.objective(name)
        assert objective.prompts in prompts.names()
        assert objective.scorer in registry.names("scorer")
        assert objective.sign in (-1, 1)


def test_names_give_the_objects() -> None:
    assert registry.method("d3po") is D3PO
    assert registry.load_scorer("jpeg_size", torch.device("cpu")).unit == "kB"
    assert registry.model_source("sd15").revision is not None


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("method", "d3p", "No method is called 'd3p'. Did you mean 'd3po'? Known: d3po"),
        ("objective", "incompres", "No objective is called 'incompres'. Did you mean 'incompress'"),
        ("scorer", "jpegsize", "Did you mean 'jpeg_size'?"),
        ("model", "tinny", "Did you mean 'tiny'?"),
    ],
)
def test_a_wrong_name_gets_a_suggestion(kind: registry.Kind, name: str, said: str) -> None:
    with pytest.raises(UserError) as problem:
        registry._module(kind, name)
    assert said in str(problem.value)


def test_a_name_like_no_other_gets_the_list_alone() -> None:
    said = str(registry.unknown("preset", "zzz", ["quick", "paper"]))
    assert said == "No preset is called 'zzz'. Known: quick, paper."
    said = str(registry.unknown("setting", "quik", ["quick"], "`list`"))
    assert said == "No setting is called 'quik'. Did you mean 'quick'? See `list`."


@pytest.mark.parametrize("package", ["eval", "baselines"])
def test_a_strangers_package_is_refused(tmp_path: Path, package: str) -> None:
    (tmp_path / package / "scorers").mkdir(parents=True)
    for folder in (package, f"{package}/scorers"):
        (tmp_path / folder / "__init__.py").touch()
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "d3po_bench", "list"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: The package '{package}")
    assert f"was found in {tmp_path}" in done.stderr
    assert done.stderr.count("\n") == 1


def test_plugins_come_after_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def entries(group: str) -> list[EntryPoint]:
        here = {"d3po_bench.methods": ["mine", "d3po"]}.get(group, [])
        return [EntryPoint(name, "baselines.ddpo:METHOD", group) for name in here]

    monkeypatch.setattr(registry, "entry_points", entries)
    assert "mine" in registry.names("method")
    assert registry.names("method").count("d3po") == 1
    found: Any = registry.method("mine")
    assert found is DDPO
    assert registry.method("d3po") is D3PO
    assert registry.summary("method", "mine") == "from baselines.ddpo:METHOD"


def test_two_packages_with_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def entries(group: str) -> list[EntryPoint]:
        return [EntryPoint("mine", f"{package}:load", group) for package in ("one", "other")]

    monkeypatch.setattr(registry, "entry_points", entries)
    with pytest.raises(UserError, match="Two packages bring a scorer called 'mine': "):
        registry.require_scorer("mine")


METHODS = """
from dataclasses import dataclass
from typing import ClassVar
from d3po_bench.d3po import D3PO

class Plain: ...

@dataclass(frozen=True)
class Lacks: ...

@dataclass(frozen=True)
class Text(D3PO):
    least_images: ClassVar = "two"

@dataclass(frozen=True, kw_only=True)
class Needs(D3PO):
    option: int

@dataclass(frozen=True)
class Union(D3PO):
    option: int | None = None

@dataclass(frozen=True)
class Unknown(D3PO):
    option: "Nowhere" = 3

@dataclass(frozen=True)
class Hides(D3PO):
    guidance: float = 1.0

MADE, NUMBER = D3PO(), 3
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("MADE", "not a dataclass"),
        ("NUMBER", "is 3, not a dataclass"),
        ("Plain", "not a dataclass"),
        ("Lacks", "has no rows"),
        ("Text", "has least_images = 'two', not a whole number"),
        ("Needs", "has an option option without a default"),
        ("Union", "has an option option, of the type int | None"),
        ("Unknown", "cannot be read: name 'Nowhere' is not defined"),
        ("Hides", "has an option guidance, as every run has"),
    ],
)
def test_what_is_no_method_is_one_line(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_methods.py").write_text(METHODS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_methods", raising=False)
    entry = EntryPoint("mine", f"own_methods:{name}", "d3po_bench.methods")
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with pytest.raises(UserError, match=f"method mine .*{re.escape(said)}") as refusal:
        config.settings("mine")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys; sys.exit(0)", "does not load: SystemExit"),
        ("", "has no FAMILY with a function load"),
        ("FAMILY = 3", "has no FAMILY with a function load"),
        ("class FAMILY:\n    load = lambda *given: 3", "loads a int, which lacks a part"),
    ],
)
def test_a_file_without_a_family_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / f"own{abs(hash(text))}.py"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        load(Source(path=str(path)), torch.device("cpu"), Training())


@pytest.mark.parametrize("kind", get_args(registry.Kind))
@pytest.mark.parametrize(
    "name", ["../../x", "a/b", "..", ".x", "-x", "a b", "a\\b", "", "é", "a\n"]
)
def test_a_plugin_whose_name_could_lead_elsewhere_is_refused(
    kind: registry.Kind, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names become those of folders and columns."""
    group = f"d3po_bench.{'families' if kind == 'family' else kind + 's'}"
    entry = EntryPoint(name, "decimal:Decimal", group)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    for ask in (lambda: registry.names(kind), lambda: registry._module(kind, name)):
        with pytest.raises(UserError, match=rf"brings a {kind} called .*fix or remove"):
            ask()


@pytest.mark.parametrize("value", ["nowhere:METHOD", "decimal:nothing", "broken:METHOD"])
def test_a_plugin_that_does_not_load_is_one_line(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("def (")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = EntryPoint("mine", value, "d3po_bench.methods")
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [entry] if group == entry.group else []
    )
    with pytest.raises(UserError, match=r"The method mine of .* does not load .*Fix or remove"):
        registry.method("mine")


def test_plugins_are_named_by_package_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "my_scorers-2.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: my-scorers\nVersion: 2.5\n")
    groups = ("methods", "objectives", "scorers", "models", "families", "trackers", "places")
    text = "".join(f"[d3po_bench.{group}]\nmine = decimal:Decimal\n" for group in groups)
    (metadata / "entry_points.txt").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    used = [(kind, "mine") for kind in get_args(registry.Kind)]
    found = registry.plugins([*used, ("method", "d3po"), ("scorer", "clip"), ("model", "a/b")])
    assert found == {"plugins": {f"{kind} mine": "my-scorers 2.5" for kind, _ in used}}
    assert registry.plugins([("method", "d3po")]) == {}


# ---- prompt lists


def test_the_papers_prompt_lists() -> None:
    assert len(read_prompts("animals")) == 45
    assert len(read_prompts("safety")) == 14
    assert read_prompts("hand") == ["1 hand"]


def test_a_prompt_file_is_read_without_blank_lines_and_mark(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffcat\r\n\r\n  a dog \r\nécureuil\n\n".encode())
    assert read_prompts(str(path)) == ["cat", "a dog", "écureuil"]


# ---- listing


def test_the_list_has_every_name() -> None:
    found = dict(listing.everything())
    for kind in set(get_args(registry.Kind)) - {"family"}:  # the model's own files name that
        assert [*found[f"{kind}s"]] == registry.names(kind)
    assert "paper" in found["presets"]
    assert found["prompts"]["hand"] == "1 prompt"


def test_the_settings_have_defaults_choices_and_meanings() -> None:
    told = {k: v for _, rows in listing.settings_of("d3po") for k, v in rows.items()}
    assert told["eval_every=10"] == "Rounds between evaluations; 0 switches evaluation off."
    assert told["dtype=fp32"] == "fp32 or bf16 or fp16"
    assert told["beta=0.1"].startswith("The loss's temperature: 0.1 in paper and code")
    assert not [name for name in told if name.startswith(("seed=", "device=", "options="))]
