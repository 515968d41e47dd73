"""Write the versions and checksums of all packages anew, or say that they are out of date.

    nox -s lock                                 after a change of pyproject.toml
    nox -s lock -- --upgrade-package rich       a newer version of one package
    nox -s lock -- --check                      exits with 1 where the files would change

pyproject.toml says what is needed, and what is there says which versions stay. constraints.txt has
the versions alone: pip does not install a folder (`-e .`) with constraints that have checksums.
constraints-hashes.txt has the checksums too, but none of PyTorch and the CUDA packages that its
build for NVIDIA GPUs brings: the CPU build is another file of the same version. Asks the package
index alone.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSIONS, HASHES = "constraints.txt", "constraints-hashes.txt"

HEAD = {
    VERSIONS: """\
# Every install here is `pip install -c constraints.txt ...`, so that equal commands give equal
# numbers; without it pip takes a newer torch, with gigabytes of CUDA packages that a laptop has no
# use for. Written by `nox -s lock`.
""",
    HASHES: """\
# The packages of constraints.txt with the checksums of their files, without PyTorch's two builds:
#     pip install --no-deps --require-hashes -r constraints-hashes.txt
# Written by `nox -s lock`.
""",
}

TWO_BUILDS = re.compile(r"(torch|torchvision|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==")


def main() -> None:
    """The command line; what it does not know is an option of `uv pip compile`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="write nothing")
    given, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        made = split(resolved(Path(scratch) / "locked.txt", options))
    changed = [name for name, text in made.items() if (ROOT / name).read_text() != text]
    if given.check and changed:
        sys.exit(f"{' and '.join(changed)} out of date. Run `nox -s lock` and commit them.")
    for name in changed:
        (ROOT / name).write_text(made[name])
    print(f"changed: {', '.join(changed) or 'nothing'}")


def resolved(path: Path, options: list[str]) -> str:
    """Versions and checksums for every platform and Python, of all extras."""
    # uv keeps the versions and checksums that it finds in the file that it writes.
    known = (ROOT / VERSIONS).read_text().splitlines()
    hashed = (ROOT / HASHES).read_text()
    rest = [line for line in known if TWO_BUILDS.match(line) or not hashed]
    path.write_text(hashed + "\n".join(rest) + "\n")
    command = [
        sys.executable, "-m", "uv", "pip", "compile", "--no-config", "--quiet", "--universal",
        "--python-version", "3.11", "--all-extras", "--generate-hashes", "--no-header",
        "--no-annotate", "pyproject.toml", "--output-file", str(path), *options,
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return path.read_text()


def split(locked: str) -> dict[str, str]:
    """The two files, from one that has everything."""
    packages = re.split(r"\n(?=\S)", locked.strip())  # checksums are indented
    versions = [package.partition(" \\\n")[0] for package in packages]
    hashes = [package for package in packages if not TWO_BUILDS.match(package)]
    return {
        VERSIONS: "\n".join([HEAD[VERSIONS], *versions, ""]),
        HASHES: "\n".join([HEAD[HASHES], *hashes, ""]),
    }


if __name__ == "__main__":
    main()
