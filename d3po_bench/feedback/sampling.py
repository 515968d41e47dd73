"""Draw the images of a round, and keep everything that training from them needs.

A round's folder: `sampling.json` what decides the images, `images/` what people judge, `rollout/`
every latent on the way and the mean of every step, `adapter.safetensors` the weights that drew
them (not in a first round), and, once all are there, `round.json` and `files.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from d3po_bench.config import FEEDBACK, LATER, Execution, RunConfig
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws, sample
from d3po_bench.diffusion.seeding import stream
from d3po_bench.digests import changed, sha256_of
from d3po_bench.errors import UserError
from d3po_bench.feedback import rounds
from d3po_bench.feedback.rounds import Item, Round
from d3po_bench.feedback.study import Study
from d3po_bench.machine import device_of
from d3po_bench.models.sources import load, model_source, threads_of
from d3po_bench.runs.files import png_bytes, taken, write_atomically
from d3po_bench.runs.run import LAST, RunFolder
from d3po_bench.runs.store import RunStore
from d3po_bench.training.inputs import require_unchanged
from d3po_bench.training.sizes import settled
from d3po_bench.training.trainer import compute_as, training_of
from d3po_bench.types import Model

FIXED = (
    "model", "long_prompts", "sampling_steps", "timestep_spacing", "sampler", "eta", "guidance",
    "dtype", "full", "lora_rank", "lora_alpha", "lora_targets",
)  # fmt: skip
"""Fields of RunConfig that a round decides, for its training and for the rounds after it."""

Told = Callable[[int, int], None]
"""Called with pictures done and pictures in all."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Everything that decides a round's images."""

    settings: Mapping[str, Any]
    """The fields FIXED of RunConfig."""
    seed: int
    number: int
    """Rounds before this one; draws differ from round to round."""
    adapter: str
    """sha256 of adapter.safetensors; empty where the pretrained model draws."""
    prompts: tuple[str, ...]
    images: int
    """K of each prompt, from one noise."""
    block: int
    """Prompts of a file in rollout/."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """What names the content of the base model; {} of a round of an earlier version."""

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """From JSON; of an older round the settings that came later have their defaults."""
        later = {name: default for name, default in LATER.items() if name in FIXED}
        own = {"settings": {**later, **data["settings"]}, "inputs": {**data.get("inputs", {})}}
        return cls(**{**data, **own, "prompts": tuple(data["prompts"])})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What is written in a round's folder.

        Raises:
            UserError: it is not there, which is so for pictures from elsewhere, or damaged.
        """
        path = folder / rounds.SAMPLING
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found = cls.of(data)
            found.config("d3po")
            return found
        except FileNotFoundError as problem:
            raise UserError(
                f"{folder} has no {path.name}, so `feedback new` did not draw it. Make the "
                "round again."
            ) from problem
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as problem:
            raise UserError(
                f"{path} is not as `feedback new` wrote it: {problem}. {rounds.REMEDY}"
            ) from problem

    def config(self, method: str) -> RunConfig:
        """The settings as a run's.

        Raises:
            ValueError: no run can have them.
        """
        named = {"method": method, "objective": FEEDBACK, "seed": self.seed}
        return RunConfig.from_json({**self.settings, **named})


def chosen_prompts(known: Sequence[str], count: int | None, seed: int, number: int) -> list[str]:
    """`count` prompts at random, each of `known` as often as any other, or one more often."""
    drawn: list[str] = []
    rng = stream(seed, "prompts", number)
    while len(drawn) < (count or len(known)):
        drawn += [known[i] for i in torch.randperm(len(known), generator=rng)]
    return drawn[:count]


@dataclass(frozen=True)
class Before:
    """What a round starts from: a finished training from the round before it."""

    weights: dict[str, Tensor]
    settings: Mapping[str, Any]
    """The fields FIXED of RunConfig."""
    seed: int
    number: int
    """Of the round before."""

    @classmethod
    def read(cls, run: Path) -> Self:
        """The run folder that `feedback train` wrote.

        Raises:
            UserError: it is none, or not finished.
        """
        state, trained = RunStore(run).load_checkpoint(), RunFolder(run)
        if state is None or not trained.finished:
            raise UserError(
                f"{run} holds no finished `feedback train`. Run it to its end, or leave --from out."
            )
        found = trained.facts.get("round")
        number = found.get("number") if isinstance(found, dict) else None
        if type(number) is not int or number < 0:
            raise UserError(
                f"The run in {run} was not made by `feedback train`. Give one such as "
                "round-1/trained/d3po."
            )
        require_unchanged(trained, LAST, None)  # not the checkpoint before a damaged one
        weights = {k.removeprefix("weight/"): v for k, v in state[0].items() if "weight/" in k}
        # Nothing checks provenance.json; the config is what the weights were trained with.
        config = trained.config
        return cls(weights, {n: getattr(config, n) for n in FIXED}, config.seed, number)


# ---- drawing


def draw(
    folder: Path,
    sampling: Sampling,
    asked: tuple[Study, Path],
    weights: Mapping[str, Tensor] | None = None,
    execution: Execution | None = None,
    told: Told = lambda done, total: None,
) -> Round:
    """Draw a round into `folder`; what an interrupted call left there is kept.

    Args:
        folder: of the round.
        sampling: what decides the images.
        asked: what people will be asked, and where the paths of its own pictures begin.
        weights: trained weights to draw with, see `Before`; None for the pretrained model.
        execution: device and batches.
        told: called with how far it is.

    Raises:
        UserError: another round lies in the folder, or it cannot be written.
    """
    study, known_pictures = rounds.placed(*asked)
    with taken(folder):
        _require_same(folder, sampling, study)
        if (folder / rounds.FILE).exists():
            return Round.read(folder)
        execution = execution or Execution()
        # What it refuses leaves nothing behind.
        drawn_by = prepared(sampling, weights, execution.usual())
        execution = _fitted(sampling, drawn_by[0], execution)
        rounds.write_json(folder / rounds.SAMPLING, asdict(sampling))
        if weights is not None:
            write_atomically(folder / rounds.ADAPTER, adapter_bytes(weights))
        known = rounds.recorded(folder) if (folder / rounds.FILES).exists() else {}
        starts = range(0, len(sampling.prompts), sampling.block)
        blocks = {start: _files_of_block(sampling, start) for start in starts}
        rest = {start: n for start, n in blocks.items() if _is_to_draw(folder, n, known)}
        total = sum(len(names) - 1 for names in blocks.values())
        left = sum(len(names) - 1 for names in rest.values())
        told(total - left, total)
        for start, names in rest.items():
            _draw_block(folder, sampling, drawn_by, start, execution)
            known |= {name: sha256_of(folder / name) for name in names}
            rounds.write_json(folder / rounds.FILES, known)
            left -= len(names) - 1
            told(total - left, total)
        rounds.save_pictures(folder, known_pictures)
        return _described(sampling, study).finish(folder)


def _is_to_draw(folder: Path, names: Sequence[str], known: Mapping[str, str]) -> bool:
    return not known.keys() >= {*names} or bool(changed(folder, {n: known[n] for n in names}))


def adapter_bytes(weights: Mapping[str, Tensor]) -> bytes:
    """Weights as the file that a round keeps."""
    return save({name: t.detach().cpu().contiguous() for name, t in sorted(weights.items())})


def _require_same(folder: Path, sampling: Sampling, study: Study) -> None:
    mine = json.loads(json.dumps(asdict(sampling)))
    found = mine
    if (folder / rounds.SAMPLING).exists():
        found = json.loads(json.dumps(asdict(Sampling.read(folder))))
        # A commit is known once the model has been fetched; an earlier version named nothing.
        found["inputs"] = {**mine["inputs"], **found["inputs"]}
    differing = [name for name in mine if found[name] != mine[name]]
    if (folder / rounds.FILE).exists():
        there = Round.read(folder)
        differing += ["kind, question or study"] if there.study != study else []
        differing += [] if (folder / rounds.SAMPLING).exists() else ["pictures"]
    if differing:
        raise UserError(
            f"{folder} holds another round: its {', '.join(differing)} differ. Give another "
            "folder, or remove that one."
        )


def prepared(
    sampling: Sampling, weights: Mapping[str, Tensor] | None, execution: Execution
) -> tuple[Model, Policy]:
    """The model that draws, and the policy it makes."""
    c = sampling.config("d3po")
    source = model_source(c.model)
    torch.set_num_threads(threads_of(source, execution.threads))
    model = load(source, device_of(execution.device), training_of(c, execution))
    model.encode([*dict.fromkeys(sampling.prompts), ""])
    if weights is not None:
        model.add_adapter(c.seed)
        model.load_trainable(dict(weights))
    policy = Policy(
        model, steps=c.sampling_steps, eta=c.eta, guidance=c.guidance, sampler=c.sampler,
        timestep_spacing=c.timestep_spacing,
    )  # fmt: skip
    policy.require_noise(policy.steps - 1)  # training may leave the last step out
    return model, policy


def _fitted(sampling: Sampling, model: Model, asked: Execution) -> Execution:
    """The batches by which the model now draws: on a card those that fit, as for a run."""
    config = replace(
        sampling.config("d3po"), prompts_per_round=sampling.block, images_per_prompt=sampling.images
    )
    execution = settled(asked, config, model, {}, lambda note: None)
    compute_as(model, config, execution)
    return execution


def _draw_block(
    folder: Path,
    sampling: Sampling,
    drawn_by: tuple[Model, Policy],
    start: int,
    execution: Execution,
) -> None:
    """Write the files of a block; it counts as drawn once their checksums are on record."""
    model, policy = drawn_by
    prompts = sampling.prompts[start : start + sampling.block]
    draws = Draws(seed=sampling.seed, round=sampling.number, first=start)
    rollout = sample(
        policy, prompts, draws, images_per_prompt=sampling.images, shared_noise=True,
        batch=execution.sample_batch,
    )  # fmt: skip
    latents = rollout.latents[:, :, -1].flatten(0, 1)
    pictures = model.decode(latents.to(model.device))
    names = _files_of_block(sampling, start)[1:]
    for name, picture in zip(names, pictures, strict=True):
        write_atomically(folder / name, png_bytes(picture))
    kept = {"latents": rollout.latents, "means": rollout.means}
    data = save({name: t.cpu().contiguous() for name, t in kept.items()})
    write_atomically(rollout_file(folder, start // sampling.block), data)


def _files_of_block(sampling: Sampling, start: int) -> list[str]:
    """Its file in rollout/, and its pictures, as paths in the round's folder."""
    end = min(start + sampling.block, len(sampling.prompts))
    pictures = [name for p in range(start, end) for name in names_of(p, sampling.images)]
    return [str(rollout_file(Path(), start // sampling.block)), *pictures]


def names_of(prompt: int, images: int) -> list[str]:
    """Where the pictures of a prompt lie in the round's folder."""
    return [f"images/{prompt:05d}-{k}.png" for k in range(images)]


def _described(sampling: Sampling, study: Study) -> Round:
    groups = tuple(
        Item(f"{n:05d}", prompt, tuple(names_of(n, sampling.images)))
        for n, prompt in enumerate(sampling.prompts)
    )
    return Round(study, groups)


# ---- files


def rollout_file(folder: Path, block: int) -> Path:
    """Where the latents and means of a block lie."""
    return folder / "rollout" / f"{block:05d}.safetensors"


def read_rollout(folder: Path, block: int) -> dict[str, Tensor]:
    """latents [P, K, T+1, C, H, W] and means [P, K, T, C, H, W] of a block.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = rollout_file(folder, block)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as problem:
        raise UserError(
            f"{path} is not as `feedback new` wrote it: {problem}. {rounds.REMEDY}"
        ) from problem
