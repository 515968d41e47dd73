"""A run under a limit of 3 GiB of memory works; one that asks for more says how to need less."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, Outcome, refused

LIMIT = 3 * 2**30
"""Of the address space, which is stricter than one of the memory in use."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no limit on the address space")


def limited(out: Path, **settings: int) -> Outcome:
    """One round of the embedded model, in a process that may not have more than the limit."""
    pairs = [part for k, v in settings.items() for part in ("--set", f"{k}={v}")]
    done = subprocess.run(
        [sys.executable, "-m", "d3po_bench", "run", "--method", "ddpo", "--objective", "compress",
         "--rounds", "1", "--set", "eval_every=0", *pairs, "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)),
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_three_gibibytes_are_enough_for_the_embedded_model(tmp_path: Path) -> None:
    done = limited(tmp_path, prompts_per_round=4, sampling_steps=6)
    assert done.code == 0, done.err
    assert list(tmp_path.rglob("lora"))


def test_a_batch_that_needs_more_names_the_option(tmp_path: Path) -> None:
    done = limited(tmp_path, prompts_per_round=45, images_per_prompt=128, sample_batch=5760)
    refused(done, "enough memory for a batch", "--set micro_batch=8", code=1)
    assert not list(tmp_path.rglob("*.part"))
