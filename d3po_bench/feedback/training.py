"""Learn from a round's votes: the trainer of `run`, with stored images and people's scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d3po_bench.config import FEEDBACK, Execution, RunConfig, least_images, make, method_of
from d3po_bench.diffusion.seeding import stream
from d3po_bench.errors import UserError
from d3po_bench.feedback.agreement import Floats, preferences
from d3po_bench.feedback.sampling import (
    ADAPTER,
    FIXED,
    Sampling,
    adapter_bytes,
    read_rollout,
    require_files,
)
from d3po_bench.models.sources import model_source
from d3po_bench.runs.store import RunStore
from d3po_bench.training.progress import Report
from d3po_bench.training.run import run_seed
from d3po_bench.training.trainer import Trainer
from d3po_bench.types import Objective, Rollout

DEFAULTS: dict[str, dict[str, Any]] = {
    "d3po": {"pairs": "all", "reference": "sampling", "skip_ties": True},
}
"""Options that differ from a preset's: the paper's section 5.2 compares with the last round's
model, and a tie between votes says nothing."""


@dataclass(frozen=True)
class Data:
    """A round as something to learn from."""

    folder: Path
    sampling: Sampling
    scores: Tensor
    """[P, K]; NaN: nobody judged."""

    @property
    def judged(self) -> Tensor:
        """Numbers of the prompts that somebody judged, ascending."""
        return self.scores.isfinite().all(1).nonzero().squeeze(1)

    @property
    def prompts(self) -> list[str]:
        """The prompts that somebody judged, each once."""
        return list(dict.fromkeys(self.sampling.prompts[i] for i in self.judged.tolist()))

    def weights(self) -> dict[str, Tensor] | None:
        """What drew the round; None for the pretrained model."""
        from safetensors.torch import load_file

        path = self.folder / ADAPTER
        return load_file(path) if path.exists() else None

    def stored(self, rows: Tensor) -> dict[str, Tensor]:
        """latents and means of some prompts."""
        size = self.sampling.block
        blocks = {b: read_rollout(self.folder, b) for b in (rows // size).unique().tolist()}
        places = [(r // size, r % size) for r in rows.tolist()]
        return {
            name: torch.stack([blocks[block][name][row] for block, row in places])
            for name in ("latents", "means")
        }


def data_of(folder: Path, scores: Floats) -> Data:
    """A round and what people said of it, after checking that its files are as they were drawn.

    Args:
        folder: of the round.
        scores: [N, K] of the first N prompts, larger is better, NaN where nobody judged.

    Raises:
        UserError: a file is missing or altered, the scores are of another round, or there are
            none.
    """
    sampling = Sampling.read(folder)
    require_files(folder)
    number, images = len(sampling.prompts), sampling.images
    if len(scores) > number or scores.shape[1] != images:
        raise UserError(
            f"Expected labels of at most {number} prompts with {images} images each, as the round "
            f"in {folder} has, got {scores.shape[0]} x {scores.shape[1]}. Give those of this round."
        )
    if not np.isfinite(scores).all(1).any():
        raise UserError(
            f"Expected votes on the round in {folder}, got none. Ask for some with `d3po-bench "
            "feedback serve`, or give the --labels they are in."
        )
    whole = torch.full((number, images), float("nan"))
    whole[: len(scores)] = torch.from_numpy(scores).float()
    return Data(folder, sampling, whole)


class _Votes:
    """Stands where a run has its scorer: people have scored already."""

    unit = "votes"

    def __init__(self, scores: Tensor) -> None:
        self.digest = hashlib.sha256(scores.numpy().tobytes()).hexdigest()[:12]

    def __call__(self, images: Tensor, prompts: object) -> Tensor:
        raise TypeError("people score these images, not a program")


class FeedbackTrainer(Trainer):
    """A trainer whose rounds are parts of one drawn round; all parts make a pass."""

    def __init__(self, data: Data, config: RunConfig, execution: Execution) -> None:
        """Load the model and put on the weights that drew the round."""
        self.data = data
        super().__init__(config, execution)
        weights = data.weights()
        if weights is not None:
            self.model.load_trainable(weights)

    def _choose_task(self) -> None:
        self.objective = Objective(prompts="", scorer="votes", sign=1)
        self.scorer = _Votes(self.data.scores)
        self.prompts = self.data.prompts
        self.images = self.data.sampling.images

    def _untrained(self) -> bool:
        return self.round == 0 and not self.data.sampling.adapter

    def _sample(self, report: Any) -> Rollout:
        rows = self.data.judged[part_of(self.data, self.config, self.round)]
        prompts = [self.data.sampling.prompts[i] for i in rows.tolist()]
        stored = self.data.stored(rows)
        return Rollout(
            prompts=prompts, text=self.model.encode(prompts), timesteps=self.policy.timesteps,
            latents=stored["latents"].to(self.device), means=stored["means"].to(self.device),
            scores=self.data.scores[rows],
        )  # fmt: skip

    def _score(self, rollout: Rollout) -> tuple[Rollout, Tensor]:
        if self.round < parts(self.data, self.config):  # later passes look at them again
            self.counts["images"] += rollout.scores.numel()
        return replace(rollout, history=self.history, memory=self.memory), rollout.scores


def parts(data: Data, config: RunConfig) -> int:
    """Parts of a pass."""
    return -(-len(data.judged) // config.prompts_per_round)


def part_of(data: Data, config: RunConfig, number: int) -> Tensor:
    """Which of the judged prompts round `number` learns from; another order in every pass."""
    passed, part = divmod(number, parts(data, config))
    order = torch.randperm(len(data.judged), generator=stream(config.seed, "prompts", passed))
    size = config.prompts_per_round
    return order[part * size : (part + 1) * size].sort().values


# ---- a training


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for."""

    method: str
    passes: int
    settings: Mapping[str, str]
    preset: str | None
    device: str


def planned(data: Data, request: Request) -> tuple[RunConfig, Execution]:
    """The config of a training: the round's settings, the preset's for the rest.

    Raises:
        UserError: bad input, or a setting that the round has decided.
    """
    sampling = data.sampling
    fixed = next((key for key in request.settings if key in (*FIXED, "images_per_prompt")), None)
    if fixed is not None:
        raise UserError(
            f"Expected {fixed} to be the round's, got --set {fixed}={request.settings[fixed]}. "
            "Give it to `feedback new`."
        )
    own = sampling.config(request.method)
    given = {f.name: getattr(own, f.name) for f in fields(RunConfig) if f.name in FIXED}
    preset = request.preset or model_source(own.model).preset
    config, execution = make(
        request.method, FEEDBACK, preset, request.settings, seed=own.seed,
        images_per_prompt=sampling.images, eval_every=0, **given,
    )  # fmt: skip
    options = {**config.options, **_defaults(request)}
    rounds = request.passes * parts(data, config)
    config = replace(config, options=options, rounds=rounds)
    config.check()
    return config, replace(execution, device=request.device)


def _defaults(request: Request) -> dict[str, Any]:
    mine = DEFAULTS.get(request.method, {})
    return {name: value for name, value in mine.items() if name not in request.settings}


def train(data: Data, request: Request, out: Path, report: Report = lambda progress: None) -> None:
    """Learn into `out`, a run folder; the same call goes on where it was interrupted.

    Raises:
        UserError: bad input, or another training lies in the folder.
    """
    config, execution = planned(data, request)
    _require_differences(data, config)
    _require_same_votes(data, out)
    trainer = partial(FeedbackTrainer, data)
    run_seed(
        config, execution, out, report=report, make=trainer, facts={"round": _facts(data)},
        prompts=data.prompts,
    )  # fmt: skip


def _require_differences(data: Data, config: RunConfig) -> None:
    """Refuse votes that teach nothing: some methods compare with other prompts' images, too."""
    scores = data.scores[data.judged]
    within = least_images(method_of(config)) > 1
    if not len(preferences(scores.numpy())) if within else len(scores.unique()) == 1:
        raise UserError(
            f"Expected votes that prefer an image to another in {data.folder}, got ties alone: "
            f"{config.method} has nothing to learn from them. Ask for more votes."
        )


def _require_same_votes(data: Data, out: Path) -> None:
    """Votes may have come in since: a finished training must not pass for one that saw them."""
    seen = RunStore(out).provenance().get("inputs", {}).get("scorers", {}).get("votes")
    if seen not in (None, _Votes(data.scores).digest):
        raise UserError(
            f"Expected the votes that the training in {out} began with, got others. Give another "
            "--out, or remove that folder."
        )


def _facts(data: Data) -> dict[str, Any]:
    """What the next round goes on from."""
    known = json.loads(json.dumps(asdict(data.sampling)))
    known.pop("prompts")
    return dict(known)


def adapter_of(weights: Mapping[str, Tensor]) -> str:
    """sha256 of the weights as a round keeps them."""
    return hashlib.sha256(adapter_bytes(weights)).hexdigest()
