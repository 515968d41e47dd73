"""Everything CI runs, each session in a virtual environment of its own.

`nox` runs lint, types and tests; `nox -s bench` the speed benchmark. Another Python version:
`nox --force-python 3.12`.
"""

import tempfile
from datetime import date
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests"]


def _install(session: nox.Session) -> None:
    """The README's install, with the pinned versions that the numbers depend on."""
    session.install("-c", "constraints.txt", "-e", ".[test]")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    _install(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    _install(session)
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests without network; `nox -s tests -- -m slow` chooses another tier."""
    _install(session)
    session.run("pytest", "-n", "2", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session
def lock(session: nox.Session) -> None:
    """Write the versions and checksums of all packages; `-- --check`: say if they are too old."""
    session.install("-c", "constraints.txt", "uv")
    session.run("python", "-m", "tests.lock", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the docs site into build/site; `-- -b linkcheck` asks for other people's pages, too."""
    session.install("-c", "constraints.txt", "-e", ".[docs]")
    site = ["-c", "docs/site", ".", "build/site"]
    session.run("sphinx-build", "-EaW", "--keep-going", *session.posargs, *site)


@nox.session(reuse_venv=False)
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it and nothing else, and use it in an empty folder; minutes."""
    walk = Path("tests/wheel.py").resolve()
    with tempfile.TemporaryDirectory() as place:
        session.run("pip", "wheel", "--no-deps", "--wheel-dir", place, ".")
        (built,) = Path(place).glob("*.whl")
        session.install("-c", "constraints.txt", f"{built}[feedback]")
        with session.chdir(place):
            session.run("python", "-P", str(walk), env={"HF_HUB_OFFLINE": "1"})


@nox.session
def bench(session: nox.Session) -> None:
    """Print how fast rounds are beside the published loops and the network alone; CPU minutes."""
    _install(session)
    session.run("python", "-m", "tests.bench", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """Measure the card that there is, in eight minutes; `-- --dry-run` does so on the CPU."""
    _install(session)
    # 1: a part has no result, and says why in the file.
    session.run("python", "-m", "tests.gpu", *session.posargs, success_codes=[0, 1])
    session.run("python", "results/make.py")


@nox.session
def reproduce(session: nox.Session) -> None:
    """Run the published comparison on version 2 again; a run takes about 100 seconds of a core.

    An interrupted call resumes. `-- --objective incompress --seeds 5` makes a part and prints its
    gains; all of it replaces what is published.
    """
    _install(session)
    for grid in (Path("results/tiny2", f"{name}.toml") for name in ("grid", "further")):
        if grid.is_file():
            session.run("d3po-bench", "sweep", grid, "--out", "runs/reproduce", *session.posargs)
    if session.posargs:
        session.run("d3po-bench", "report", "runs/reproduce/tiny2")
    else:
        varied = sorted(Path("runs/reproduce/tiny2").glob("*/*/seed-100[0-4]"))
        session.run("d3po-bench", "report", *varied, "--measure")
        _publish(session, "tiny2", "--pack", "--no-sheets")


@nox.session
def reproduce_version1(session: nox.Session) -> None:
    """Run version 1's grid again, 1.5 hours on two cores; an interrupted call resumes."""
    _install(session)
    session.run("d3po-bench", "sweep", "results/tiny/grid.toml", "--out", "runs/reproduce")
    session.run("d3po-bench", "report", "runs/reproduce/tiny", "--measure")
    _publish(session, "tiny", "--pack")


def _publish(session: nox.Session, model: str, *how: str) -> None:
    """Replace published runs, and write tables, figures and the manifest again."""
    runs, target = f"runs/reproduce/{model}", f"results/{model}"
    session.run("python", "results/measure.py", "publish", runs, target, *how)
    session.run("python", "results/make.py")
    session.run("d3po-bench", "verify", "results", "--record")


@nox.session
def nightly(session: nox.Session) -> None:
    """Check the published results and make one of them again, another each day; minutes."""
    _install(session)
    seed = str(date.today().toordinal())
    session.run("d3po-bench", "verify", "results", "--rerun", "1", "--seed", seed)


@nox.session
def kills(session: nox.Session) -> None:
    """Kill 50 runs at random moments, go on with them, and compare their bytes; ten minutes."""
    _install(session)
    session.run("python", "-m", "tests.kills", *(session.posargs or ["--kills", "50"]))


@nox.session
def parity(session: nox.Session) -> None:
    """Score random weights with the official packages, then with ours; `-- --full`: real sizes."""
    folder = Path(session.cache_dir, "parity").resolve()
    session.install("-r", "tests/parity/requirements.txt")
    session.install("--no-deps", "-r", "tests/parity/requirements-no-deps.txt")
    offline = {"HF_HUB_OFFLINE": "1"}
    session.run("python", "-m", "tests.parity.oracle", str(folder), *session.posargs, env=offline)
    session.run("python", "-m", "tests.parity.newer", str(folder), env=offline)
    session.notify("parity_compare", [str(folder)])


@nox.session
def parity_compare(session: nox.Session) -> None:
    """Compare our scorers with the folder that `parity` wrote; it calls this itself."""
    session.install("-c", "constraints.txt", "-e", ".[test,open-clip]")
    session.run("python", "-m", "tests.parity.compare", *session.posargs)
