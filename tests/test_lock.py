"""Every package is pinned, with checksums where pip can check them."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.lock import HASHES, HEAD, ROOT, TWO_BUILDS, VERSIONS, split

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, list[Requirement]]:
    """Name -> its versions in constraints.txt, which differ by marker."""
    lines = [line for line in (ROOT / VERSIONS).read_text().splitlines() if "==" in line]
    found: dict[str, list[Requirement]] = {}
    for pin in map(Requirement, (line for line in lines if not line.startswith("#"))):
        found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


def here(name: str) -> str:
    """The version that a package is pinned to on this machine."""
    (pin,) = [p for p in pins()[name] if p.marker is None or p.marker.evaluate()]
    (version,) = pin.specifier
    return version.version


def asked() -> list[Requirement]:
    """What pyproject.toml asks for, with all extras."""
    extras = PROJECT["optional-dependencies"].values()
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]
    return [r for r in map(Requirement, texts) if r.name != PROJECT["name"]]


def test_what_is_asked_for_is_pinned_to_a_version_that_will_do() -> None:
    for requirement in asked():
        version = here(canonicalize_name(requirement.name))
        assert requirement.specifier.contains(version), requirement


def test_whatever_an_install_brings_is_pinned_to_that_version() -> None:
    waiting, seen = asked(), set[tuple[str, str]]()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), requirement.extras or {""}
        for extra in extras - {e for n, e in seen if n == name}:
            seen.add((name, extra))
            try:
                found = distribution(name)
            except PackageNotFoundError:  # of an extra that is not installed here
                continue
            assert found.version.partition("+")[0] == here(name), name
            for needed in map(Requirement, found.requires or []):
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    assert len({name for name, _ in seen}) > 60


def test_both_files_name_the_same_versions_but_for_pytorchs() -> None:
    versions = [
        line for line in (ROOT / VERSIONS).read_text().splitlines()
        if line and not line.startswith("#") and not TWO_BUILDS.match(line)
    ]  # fmt: skip
    packages = re.split(r"\n(?=\S)", (ROOT / HASHES).read_text().partition("\n\n")[2].strip())
    assert [package.partition(" \\\n")[0] for package in packages] == versions
    for package in packages:
        assert re.fullmatch(r"\S.*(?: \\\n    --hash=sha256:[0-9a-f]{64})+", package), package


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("torch==2.13.0", False), ("triton==3.7.1 ; sys_platform == 'linux'", False),
        ("nvidia-cudnn-cu13==9.20", False), ("open-clip-torch==3.3.0", True),
    ],
)  # fmt: skip
def test_files_with_two_builds_have_a_version_and_no_checksum(line: str, kept: bool) -> None:
    made = split(f"{line} \\\n    --hash=sha256:00 \\\n    --hash=sha256:11\n")
    assert made[VERSIONS] == f"{HEAD[VERSIONS]}\n{line}\n"
    assert ("sha256:11" in made[HASHES]) == kept
