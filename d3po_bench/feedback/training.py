"""Learn from a round's votes: the trainer of `run`, with stored images and people's scores."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from d3po_bench import registry
from d3po_bench.config import FEEDBACK, Execution, RunConfig, least_images, make, method_of
from d3po_bench.errors import UserError
from d3po_bench.experience.judged import Judged, Votes
from d3po_bench.feedback.agreement import Floats, preferences
from d3po_bench.feedback.questions import Judged as JudgedAs
from d3po_bench.feedback.rounds import ADAPTER, Round, require_files
from d3po_bench.feedback.sampling import FIXED, Sampling, read_rollout
from d3po_bench.models.sources import model_source
from d3po_bench.runs.run import RunFolder, require_inputs
from d3po_bench.training import tracking
from d3po_bench.training.inputs import model_today
from d3po_bench.training.progress import Report
from d3po_bench.training.run import Job, run_seed
from d3po_bench.training.tools import Tools
from d3po_bench.types import Model

DEFAULTS: dict[str, dict[str, Any]] = {
    "d3po": {"pairs": "all", "reference": "sampling", "skip_ties": True},
    "diffusion_dpo": {"pairs": "all", "skip_ties": True},
}
"""Options that differ from a preset's: the paper's section 5.2 compares with the last round's
model, and a tie between votes says nothing."""

ONE_BY_ONE: dict[str, dict[str, Any]] = {
    "kto": {"liked": "above_value"},
    "preferred_images": {"liked": "above_value"},
}
"""The same where images were judged one by one: liked is what less than half of the raters tagged,
or what they rated above the middle of the scale."""


class TiesError(UserError):
    """All votes of a round are alike."""


@dataclass(frozen=True)
class Data:
    """A round as something to learn from."""

    folder: Path
    sampling: Sampling
    scores: Tensor
    """[P, K]; NaN: nobody judged."""
    content: str
    """Names the pictures that were judged."""
    judged: JudgedAs

    @property
    def facts(self) -> dict[str, Any]:
        """What the next round starts from."""
        known = json.loads(json.dumps(asdict(self.sampling)))
        known.pop("prompts")
        return {"round": known}

    def decided(self, request: TrainRequest) -> dict[str, Any]:
        """The settings that the round has decided.

        Raises:
            UserError: the request has one of them.
        """
        own = self.sampling.config(request.method)
        fixed = {f.name: getattr(own, f.name) for f in fields(RunConfig) if f.name in FIXED}
        fixed |= {"images_per_prompt": self.sampling.images, "seed": own.seed}
        own_options = {"model": request.model, "seed": request.seed}
        asked = {k: str(v) for k, v in own_options.items() if v is not None}
        asked |= request.settings
        for key in asked.keys() & fixed.keys():
            how = f"--{key}" if key in ("model", "seed") else f"--set {key}={asked[key]}"
            raise UserError(
                f"The round decides {key}, so {how} cannot change it here. Give it to `feedback "
                "new`."
            )
        return fixed

    def defaults(self, method: str) -> dict[str, Any]:
        """Options of a method that differ from a preset's."""
        if self.judged == "pairs" or method not in ONE_BY_ONE:
            return DEFAULTS.get(method, {})
        middle = {"value": -0.5} if self.judged == "tags" else {}  # tagged is -1, untouched 0
        return ONE_BY_ONE[method] | middle

    @property
    def image_prompts(self) -> Sequence[str]:
        """The prompt of each group of images."""
        return self.sampling.prompts

    def experience(self, config: RunConfig) -> Judged:
        """It, as what a run learns from."""
        return Judged(
            drawn=self, scores=self.scores, seed=config.seed, initial=self.weights(),
            prompts_per_round=config.prompts_per_round,
        )  # fmt: skip

    def weights(self) -> dict[str, Tensor] | None:
        """What drew the round; None for the pretrained model."""
        from safetensors.torch import load_file

        path = self.folder / ADAPTER
        return load_file(path) if path.exists() else None

    def stored(self, rows: Tensor, model: Model) -> dict[str, Tensor]:
        """latents and means of some prompts."""
        size = self.sampling.block
        blocks = {b: read_rollout(self.folder, b) for b in (rows // size).unique().tolist()}
        places = [(r // size, r % size) for r in rows.tolist()]
        return {
            name: torch.stack([blocks[block][name][row] for block, row in places])
            for name in ("latents", "means")
        }


def data_of(
    folder: Path,
    scores: Floats,
    question: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Data:
    """A round and what people said of it, after checking that its files are as they were drawn.

    Args:
        folder: of the round.
        scores: [N, K] of the first N prompts, larger is better, NaN where nobody judged.
        question: what was asked; None where there is one question.
        say: hears how many prompts are left out, since they were not judged whole.

    Raises:
        UserError: a file is missing or altered, the scores are of another round, or no prompt was
            judged whole.
    """
    sampling = Sampling.read(folder)
    require_files(folder)
    today = model_today(model_source(sampling.settings["model"]))
    instead = "go to the folder that its paths begin at"
    require_inputs(f"The round in {folder}", sampling.inputs, today, instead)
    number, images = len(sampling.prompts), sampling.images
    if len(scores) > number or scores.shape[1] != images:
        raise UserError(
            f"These labels are of {scores.shape[0]} x {scores.shape[1]} images; the round in "
            f"{folder} has {number} x {images}. Give those of this round."
        )
    known = np.isfinite(scores)
    begun = int((known.any(1) & ~known.all(1)).sum())
    if not known.all(1).any():
        what = "Nobody has judged all images of a prompt of" if begun else "Nobody has voted on"
        raise UserError(
            f"{what} the round in {folder}. Ask for votes with `d3po-bench feedback serve`, or "
            "give the --labels they are in."
        )
    if begun:
        said = "1 prompt is" if begun == 1 else f"{begun} prompts are"
        say(f"{said} left out: not all images have been judged.")
    whole = torch.full((number, images), float("nan"))
    whole[: len(scores)] = torch.from_numpy(scores).float()
    round_ = Round.read(folder)
    judged = round_.part(question).question.judged
    return Data(folder, sampling, whole, round_.content, judged)


# ---- a training


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What the command line asked for."""

    method: str
    passes: int
    settings: Mapping[str, str]
    preset: str | None
    device: str
    tools: Tools
    track: Sequence[str] = ()
    model: str | None = None
    """Of pictures from elsewhere; of a drawn round it is known."""
    seed: int | None = None
    question: str | None = None
    """Whose answers; None where one question was asked."""
    pictures: Path | None = None
    """Where the paths of a table begin, if not at the table."""


class Learnable(Protocol):
    """Judged pictures, as a training takes them."""

    @property
    def folder(self) -> Path:
        """Of the round, or the table."""

    @property
    def scores(self) -> Tensor:
        """[P, K]; NaN: nobody judged."""

    @property
    def content(self) -> str:
        """Names the pictures that were judged."""

    @property
    def facts(self) -> dict[str, Any]:
        """To keep in provenance.json."""

    def decided(self, request: TrainRequest) -> dict[str, Any]:
        """Fields of RunConfig that are not for the request to choose."""

    def defaults(self, method: str) -> dict[str, Any]:
        """Options of a method that differ from a preset's."""

    def experience(self, config: RunConfig) -> Judged:
        """It, as what a run learns from."""


def configured(
    request: TrainRequest, defaults: Callable[[str], dict[str, Any]], **given: Any
) -> tuple[RunConfig, Execution]:
    """The config of a request, but for the number of rounds.

    Args:
        request: what was asked for.
        defaults: of judged pictures, by method, as in `Learnable`.
        given: settings that are not for the request to choose; the model is one.

    Raises:
        UserError: bad input, or a setting that is given twice.
    """
    preset = request.preset or model_source(given["model"]).preset
    mine = defaults(registry.variant(request.method)[0])
    changes = {name: str(value).lower() for name, value in mine.items()} | {**request.settings}
    return make(request.method, FEEDBACK, preset, changes, eval_every=0, **given)


def planned(data: Learnable, request: TrainRequest) -> tuple[RunConfig, Execution]:
    """The config of a training: the round's settings, the preset's for the rest.

    Raises:
        UserError: bad input, or a setting that the round has decided.
    """
    config, execution = configured(request, data.defaults, **data.decided(request))
    rounds = request.passes * data.experience(config).parts
    return replace(config, rounds=rounds), replace(execution, device=request.device)


def train(
    data: Learnable, request: TrainRequest, out: Path, report: Report = lambda progress: None
) -> None:
    """Learn into `out`, a run folder; the same call resumes where it was interrupted.

    Raises:
        UserError: bad input, or another training lies in the folder.
    """
    config, execution = planned(data, request)
    trackers = tracking.require(request.track)
    experience = data.experience(config)
    _require_differences(data, config, data.scores[experience.judged])
    # Votes may have come in since: a finished training must not pass for one that saw them.
    seen = RunFolder(out).facts.get("inputs", {}).get("scorers", {}).get("votes")
    if seen not in (None, Votes(data.scores, data.content).digest):
        raise UserError(
            f"The training in {out} began with other votes. Give another --out, or remove that "
            "folder."
        )
    run_seed(
        Job(
            config=config, execution=execution, folder=out, tools=request.tools,
            experience=experience, facts=data.facts, trackers=trackers,
            command=_command(data, request, out),
        ),
        report,
    )  # fmt: skip


def _command(data: Learnable, request: TrainRequest, out: Path) -> str:
    """The command line of a training, but for where its votes were."""
    sets = [part for k, v in request.settings.items() for part in ("--set", f"{k}={v}")]
    asked = {"preset": request.preset, "model": request.model, "seed": request.seed,
             "question": request.question, "pictures": request.pictures}  # fmt: skip
    preset = [w for k, v in asked.items() if v is not None for w in (f"--{k}", str(v))]
    words = ["d3po-bench", "feedback", "train", str(data.folder), "--method", request.method]
    return shlex.join([*words, "--passes", str(request.passes), *preset, *sets, "--out", str(out)])


def _require_differences(data: Learnable, config: RunConfig, scores: Tensor) -> None:
    """Refuse votes that teach nothing: some methods compare with other prompts' images, too."""
    within = least_images(method_of(config)) > 1
    if not len(preferences(scores.numpy())) if within else len(scores.unique()) == 1:
        raise TiesError(
            f"All votes in {data.folder} are ties, from which {config.method} learns nothing. Ask "
            "for more votes."
        )
