"""What a card does, measured within eight minutes: `nox -s gpu`, or `python -m tests.gpu`.

    python -m tests.gpu                  the card that there is
    python -m tests.gpu --parts methods  that part again, into the same file
    python -m tests.gpu --dry-run        a small network on the CPU: shows that all of it works

Stable Diffusion 1.5 with random weights, in the paper's settings: D3PO, 80 pairs a round, guidance
5, LoRA. It writes results/gpu/CARD.json after each part, so that whoever is cut off keeps what was
measured; `python results/make.py` then makes the tables. No network and no downloads; a part that
fails says why in the file, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch

from d3po_bench import api
from d3po_bench.config import Execution, make
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws, sample, with_reference
from d3po_bench.diffusion.seeding import stream
from d3po_bench.diffusion.update import Updates, update
from d3po_bench.machine import device_of
from d3po_bench.models.adapters import DiffusersModel
from d3po_bench.models.memory import Needs
from d3po_bench.models.sources import model_source
from d3po_bench.runs.files import write_atomically
from d3po_bench.runs.provenance import environment
from d3po_bench.runs.run import RunFolder
from d3po_bench.training import sizes
from d3po_bench.training.run import Job, on_policy
from d3po_bench.training.trainer import Trainer
from d3po_bench.types import Rollout
from eval.tools import TOOLS
from tests.bench import published_round
from tests.card import Card

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "gpu"
METHODS = ("d3po", "ddpo", "dpok", "reward_weighted", "preferred_images")
DTYPES = ("fp32", "bf16", "fp16")

Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    model: str
    device: torch.device
    steps: tuple[int, int] = (20, 50)
    """T of sampling; the first is that of training, too."""
    pairs: int = 80
    few: int = 4
    """Pairs of the update alone, and of the plain loop."""
    execution: Execution = field(default_factory=Execution)
    rounds: int = 3
    """Of each method on the embedded model."""
    compiled: bool = True
    """Whether `compile` is tried: on a CPU it is another compiler, and takes minutes."""
    seconds: float = 480
    """For everything."""

    @classmethod
    def dry(cls, folder: Path) -> Plan:
        """For the CPU; `folder` gets the file that names the small network."""
        file = folder / "small.py"
        file.write_text("from tests.random_sd15 import RandomSmall as FAMILY\n", encoding="utf-8")
        # So much that the other batches are counted and chosen as on a card.
        execution = Execution(
            device="cpu", memory=4, threads=1, sample_batch=4, reference_batch=4, decode_batch=2
        )
        return cls(
            model=str(file), device=torch.device("cpu"), steps=(2, 3), pairs=2, few=1,
            execution=execution, rounds=1, compiled=False,
            seconds=3600,
        )  # fmt: skip


class Report:
    """The file that the parts of a measurement go to, as each is done."""

    def __init__(
        self, file: Path, seconds: float, facts: Found, wanted: Collection[str] = ()
    ) -> None:
        """Begin the file.

        Args:
            file: where it lies.
            seconds: for everything.
            facts: what the figures belong to.
            wanted: parts to measure; the others stay as they are in the file. All if empty.
        """
        self.file, self.facts, self.wanted = file, facts, wanted
        self.until = time.monotonic() + seconds
        self.measured: Found = {}
        if not wanted:
            file.unlink(missing_ok=True)

    @property
    def failed(self) -> list[str]:
        """Parts that did not come to a result."""
        parts = self.measured.items()
        return [name for name, found in parts if {"failed", "skipped"} & found.keys()]

    def part(self, name: str, needs: float, work: Callable[[], Found]) -> None:
        """Measure a part, if it is wanted and there is time for it.

        Args:
            name: of the part.
            needs: seconds that it may take.
            work: what measures.
        """
        if self.wanted and name not in self.wanted:
            return
        start = time.monotonic()
        left = self.until - start
        print(f"{name} ... {left:.0f} s left", flush=True)
        if needs > left:
            found: Found = {"skipped": f"needs {needs:.0f} s, and {left:.0f} s were left"}
        else:
            try:
                found = work()
            except Exception as problem:  # the other parts are worth having
                line = " ".join(f"{type(problem).__name__}: {problem}".split())
                found = {"failed": line[:300]}
        gc.collect()  # networks of this part, before the next loads its own
        found["seconds"] = round(time.monotonic() - start, 1)
        print(f"  {json.dumps(found)}", flush=True)
        self.measured[name] = found
        known = self.parts() | {name: found}
        data = json.dumps({**self.facts, "parts": known}, indent=1) + "\n"
        write_atomically(self.file, data.encode())

    def parts(self) -> Found:
        """What the file has."""
        found: Found = {}
        if self.file.exists():
            found = json.loads(self.file.read_text(encoding="utf-8"))["parts"]
        return found


# ---- what is measured


class Subject:
    """A trainer with the paper's settings in some precision, and what it does in a second."""

    def __init__(self, plan: Plan, dtype: str, execution: Execution | None = None) -> None:
        """Load it.

        Args:
            plan: its model and settings.
            dtype: precision.
            execution: with batches that were chosen before; None to count, which takes seconds.
        """
        self.plan, self.card = plan, Card(plan.device)
        changes = {"dtype": dtype, "eval_every": "0", "sampling_steps": str(plan.steps[0]),
                   "prompts_per_round": str(plan.pairs)}  # fmt: skip
        config, _ = make("d3po", "incompress", "paper", changes, model=plan.model)
        asked = execution or plan.execution
        job = Job(config=config, execution=asked, folder=Path("unused"), tools=TOOLS)
        experience = on_policy(job, plan.device, model_source(config.model).scorers)
        self.trainer = Trainer(config, asked, experience, plan.device)
        self.trainer.take(execution or sizes.settled(asked, config, self.model, {}, print))

    @property
    def model(self) -> DiffusersModel:
        """What it trains."""
        model = self.trainer.model
        assert isinstance(model, DiffusersModel)
        return model

    @cached_property
    def planned(self) -> Found:
        """The batches that were chosen, and the gigabytes that they should take."""
        execution, config = self.trainer.execution, self.trainer.config
        needs = Needs(self.model, self.model.encode([""]))
        whole = needs.weights + sizes.peak(execution, config, needs)
        return {
            **{name: getattr(execution, name) for name in sizes.KEPT},
            "planned_gb": round(whole / 1e9, 2),
        }

    def drawn(self, images: int, steps: int) -> Rollout:
        """So many images, in pairs."""
        policy = Policy(self.model, steps=steps, guidance=self.trainer.config.guidance)
        prompts = list(self.trainer.experience.prompts)
        wanted = [prompts[n % len(prompts)] for n in range(images // 2)]
        draws, batch = Draws(seed=0, round=0), self.trainer.execution.sample_batch
        return sample(policy, wanted, draws, images_per_prompt=2, shared_noise=True, batch=batch)

    def sampling(self) -> Found:
        """Images a second of one full batch at each number of steps, and the peak."""
        batch, found = max(2, self.trainer.execution.sample_batch), dict[str, Any]()
        self.drawn(batch, 2)
        most: list[float | None] = []
        for number, steps in enumerate(self.plan.steps):
            images = batch if number == 0 else max(2, batch // 2)
            seconds, peak = self.card.peak(partial(self.drawn, images, steps))
            found[f"images_per_s_{steps}"] = round(images / seconds, 3)
            most.append(peak)
        return {**found, "sampling_gb": rounded(most[0])}

    def learning(self) -> Found:
        """Rows a second of the update, a row being a step of an image with guidance."""
        t, plan = self.trainer, self.plan
        rollout = self.drawn(2 * plan.few, plan.steps[0])
        scores = torch.randn(plan.few, 2, generator=stream(0, "rows"))
        rollout = with_reference(
            t.policy, replace(rollout, scores=scores), t.method, untrained=True, batch=1
        )
        rows = t.method.rows(rollout, stream(0, "rows"))
        updates = Updates(units=plan.few, micro_batch=t.execution.micro_batch)

        def learn() -> None:
            update(t.policy, t.method, rows, t.optimizer, updates, stream(0, "shuffle"), t.scaler)

        learn()
        seconds, peak = self.card.peak(learn)
        return {
            "rows_per_s": round(2 * plan.few * rows.steps / seconds, 3),
            "update_gb": rounded(peak),
        }

    def round(self) -> Found:
        """A round of the paper's size: seconds of each stage, share in the network, peak."""
        timing: Found = {}

        def work() -> None:
            timing.update(self.trainer.train_round(lambda share: None)[1])

        with self.card.inside(self.model) as spent:
            seconds, peak = self.card.peak(work)
            share = spent() / seconds
        timing.pop("round")
        stages = {f"{name}_s": value for name, value in timing.items()}
        return {
            "pairs": self.plan.pairs, "round_s": round(seconds, 2), **stages,
            "inside": round(share, 4), "round_gb": rounded(peak), **self.planned,
        }  # fmt: skip

    def plain(self) -> Found:
        """Seconds of a pair in the plain loop of the bench, with a second network as reference."""
        few = replace(self.plan, pairs=self.plan.few)
        dtype, how = self.trainer.config.dtype, self.trainer.execution
        ours, frozen = (Subject(few, dtype, how).trainer for _ in range(2))
        short = [Policy(t.model, steps=2, guidance=t.config.guidance) for t in (ours, frozen)]
        published_round(short[0], short[1], ours)
        seconds = self.card.seconds(lambda: published_round(ours.policy, frozen.policy, ours))
        return {"pair_s": round(seconds / self.plan.few, 3)}


def rounded(value: float | None) -> float | None:
    """Gigabytes to two places."""
    return None if value is None else round(value, 2)


def begin(plan: Plan, out: Path, rounds: int = 2) -> subprocess.Popen[str]:
    """Make a small run with deterministic kernels, in a process of its own."""
    small = {"prompts_per_round": 2, "sampling_steps": plan.steps[0] // 5 + 2, "eval_every": 0,
             "eval_scorers": "", "dtype": "bf16", "micro_batch": 4, "sample_batch": 4,
             "reference_batch": 4, "decode_batch": 4, "threads": 1}  # fmt: skip
    command = [sys.executable, "-m", "d3po_bench", "run", "--method", "d3po", "--objective",
               "incompress", "--preset", "paper", "--model", plan.model,
               "--rounds", str(rounds), "--deterministic", "--device", str(plan.device),
               *(part for k, v in small.items() for part in ("--set", f"{k}={v}")),
               "--out", str(out)]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def end(plan: Plan, *begun: subprocess.Popen[str]) -> None:
    """Wait for them."""
    for process in begun:
        _, said = process.communicate(timeout=plan.seconds)
        if process.returncode:
            raise RuntimeError(said.strip().splitlines()[-1])


def equal(one: Path, other: Path) -> Found:
    """Whether two runs have written the same metrics and weights."""
    written = [
        {path.name: path.read_bytes() for path in out.rglob("*")
         if path.name in ("metrics.jsonl", "pytorch_lora_weights.safetensors")}
        for out in (one, other)
    ]  # fmt: skip
    return {"equal": written[0] == written[1] and len(written[0]) == 2}


def twice(plan: Plan, folder: Path) -> Found:
    """Two processes make the same run: are the bytes the same?"""
    outs = [folder / name for name in ("one", "two")]
    end(plan, *(begin(plan, out) for out in outs))
    return equal(*outs)


def resumed(plan: Plan, folder: Path) -> Found:
    """Does a run that stopped after a round and went on have the bytes of one that did not?"""
    whole, parts = folder / "whole", folder / "parts"
    end(plan, begin(plan, whole), begin(plan, parts, rounds=1))
    end(plan, begin(plan, parts))
    return equal(whole, parts)


def methods(plan: Plan, folder: Path) -> Found:
    """Every method of the paper on the embedded model in every precision: loss of its last round.

    A loss that is not finite ends a run.
    """
    settings = {"prompts_per_round": plan.few, "sampling_steps": min(4, plan.steps[0]),
                "eval_every": 0, "eval_scorers": ""}  # fmt: skip
    found: Found = {}
    for dtype in DTYPES:
        for method in METHODS:
            out = folder / dtype
            api.run(
                method=method, objective="incompress", model="tiny", preset="paper", out=out,
                settings={**settings, "dtype": dtype}, rounds=plan.rounds, quiet=True,
                device=str(plan.device),
            )  # fmt: skip
            (run,) = out.glob(f"*/*/{method}/seed-0")
            found[f"{method} {dtype}"] = round(float(RunFolder(run).metrics[-1]["loss"]), 5)
    return found


def measure(plan: Plan, report: Report, folder: Path) -> None:
    """All parts, those first that matter most."""

    @cache
    def batches() -> Execution:
        return Subject(plan, "bf16").trainer.execution

    def subject(dtype: str = "bf16", **how: Any) -> Subject:
        return Subject(plan, dtype, replace(batches(), **how))

    report.part("bf16 sampling", 120, lambda: subject().sampling())
    report.part("bf16 update", 40, lambda: subject().learning())
    rows = plan.pairs * 2 * plan.steps[0]
    # The update's share of a round is about six tenths.
    needs = 2 * rows / report.parts().get("bf16 update", {}).get("rows_per_s", rows / 60)
    report.part("bf16 round", needs, lambda: subject().round())
    report.part("bf16 plain loop", 45, lambda: subject().plain())
    report.part("fp16 sampling", 50, lambda: subject("fp16").sampling())
    report.part("fp16 update", 50, lambda: subject("fp16").learning())
    report.part("methods", 60, lambda: methods(plan, folder / "methods"))
    report.part("equal bytes twice", 60, lambda: twice(plan, folder))
    report.part("equal bytes resumed", 90, lambda: resumed(plan, folder))
    if plan.compiled:
        report.part("bf16 compiled sampling", 90, lambda: subject(compile=True).sampling())
        report.part("bf16 compiled update", 90, lambda: subject(compile=True).learning())


def facts(plan: Plan, dry: bool) -> Found:
    """What the figures belong to."""
    if dry or plan.device.type != "cuda":
        card, memory = "CPU, a small network", None
    else:
        card = torch.cuda.get_device_name(plan.device)
        memory = round(torch.cuda.get_device_properties(plan.device).total_memory / 1e9, 1)
    known = environment()
    kept = {
        n: known[n] for n in ("python", "platform", "packages", "commit", "dirty") if n in known
    }
    return {
        "card": card, "gb": memory, "dry": dry, "date": date.today().isoformat(),
        "cuda": torch.version.cuda, "steps": plan.steps,
        **{name: known[name] for name in kept if name in known},
    }  # fmt: skip


def main(given: Sequence[str] | None = None) -> int:
    """Measure; 1 if a part failed or found no time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="a small network on the CPU")
    parser.add_argument("--parts", nargs="+", default=[], help="these again; others stay")
    parser.add_argument("--seconds", type=float, help="for everything; usually 480")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if args.dry_run:
            plan = Plan.dry(folder)
        else:
            plan = Plan(model=str(HERE / "random_sd15.py"), device=device_of("cuda"))
        plan = replace(plan, seconds=args.seconds or plan.seconds)
        known = facts(plan, args.dry_run)
        name = "dry-run" if args.dry_run else re.sub(r"\W+", "-", known["card"]).strip("-").lower()
        report = Report(args.out / f"{name}.json", plan.seconds, known, args.parts)
        measure(plan, report, folder)
    print(f"{report.file}: {', '.join(report.failed) or 'every part'}"
          f"{' without a result' if report.failed else ' measured'}")  # fmt: skip
    return bool(report.failed)


if __name__ == "__main__":
    sys.exit(main())
