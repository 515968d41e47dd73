"""A run under a limit of 3 GiB of memory works; one that asks for more says how to need less."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, Outcome, refused

LIMIT = 3 * 2**30
"""Of the address space, which is stricter than one of the memory in use."""

TWO_COMMANDS = """
import json, sys
from d3po_bench.cli import main
for arguments in json.loads(sys.argv[1]):
    main(arguments)
"""


def one_round(out: Path, **settings: int) -> list[str]:
    """The arguments of a run of the embedded model."""
    pairs = [part for k, v in settings.items() for part in ("--set", f"{k}={v}")]
    return [
        "run", "--method", "ddpo", "--objective", "compress", "--rounds", "1",
        "--set", "eval_every=0", *pairs, "--out", str(out),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no limit on the address space")
def test_three_gibibytes_are_enough_and_a_batch_that_needs_more_names_the_option(
    tmp_path: Path,
) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    commands = [
        one_round(small, prompts_per_round=2, sampling_steps=6),
        one_round(
            large,
            prompts_per_round=45,
            images_per_prompt=256,
            sample_batch=45 * 256,
            sampling_steps=6,
        ),
    ]
    done = subprocess.run(  # one process: most of the time goes into starting it
        [sys.executable, "-c", TWO_COMMANDS, json.dumps(commands)],
        capture_output=True, text=True, check=False, cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)),
    )  # fmt: skip
    assert list(small.rglob("lora")), done.stderr
    ended = Outcome(done.returncode, done.stdout, done.stderr)
    refused(ended, "ut of memory", "--set sample_batch=5760", code=1)
    assert not list(tmp_path.rglob("*.part"))
