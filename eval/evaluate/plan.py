"""What `d3po-bench evaluate` was asked to score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from d3po_bench import own, registry
from d3po_bench.config import FEEDBACK, RunConfig
from d3po_bench.digests import sha256_of, short
from d3po_bench.errors import UserError
from d3po_bench.models.sources import Source, fingerprint, model_source
from d3po_bench.pictures import read_pictures, table_of, without_table
from d3po_bench.prompts import read_prompts
from d3po_bench.runs.run import LORA, RunFolder
from d3po_bench.training.inputs import require_unchanged
from d3po_bench.training.tools import spread

if TYPE_CHECKING:
    from d3po_bench.diffusion.process import Sampler, Spacing

Dtype = Literal["fp32", "bf16", "fp16"]

BOTH = ("eta1", "eta0")
"""Samplers: with the noise of training, and with none."""

FETCHED = "prompts-image-reward"
"""The prompts that Stable Diffusion is asked for, among the weights."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the numbers of an evaluation."""

    model: str
    """Name or folder of the base model, or the folder of the pictures."""
    adapter: str
    """A LoRA's folder or file, or the folder of a trained UNet; empty for the base model itself."""
    prompts: tuple[str, ...]
    content: str = ""
    """What names the files of the model and the adapter, or the pictures."""
    files: tuple[str, ...] = ()
    """The picture of each prompt, where there are pictures to score instead of a model."""
    images: int = 1
    steps: int = 20
    guidance: float = 5.0
    sampler: Sampler | Literal["auto"] = "auto"
    """Of training, with its `eta`."""
    eta: float = 1.0
    timestep_spacing: Spacing = "model"
    scorers: tuple[str, ...] = ()
    weights: str = "official"
    """Which weights scorers have that do not say so themselves."""
    long_prompts: Literal["refuse", "cut"] = "refuse"
    samplers: tuple[str, ...] = BOTH
    dtype: Dtype = "fp32"
    full: bool = False
    """Whether the whole network was trained, which is then computed otherwise in half precision."""


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """What the command line asked for."""

    target: Path
    scorers: tuple[str, ...]
    model: str | None
    prompts: str | None
    count: int | None
    images: int
    steps: int | None
    guidance: float | None
    device: str
    jobs: int
    out: Path | None
    save: bool = False
    """Keep the pictures that were drawn, too."""
    samplers: tuple[str, ...] = BOTH
    """With which noise a model draws: eta1 as in training, eta0 with none."""
    sampler: Sampler | Literal["auto"] = "auto"
    """Of a model that is no run, with its `eta`, levels, `dtype` and `full`; a run has its own."""
    eta: float = 1.0
    timestep_spacing: Spacing = "model"
    dtype: Dtype = "fp32"
    full: bool = False
    long_prompts: Literal["refuse", "cut"] | None = None
    """None: as a run has it, or refuse."""


def scorers_of(target: Path) -> tuple[str, ...]:
    """The scorers that a run was evaluated with: its objective's first.

    Raises:
        UserError: it is not a run, or people scored it.
    """
    config = RunFolder(target).config if (target / "config.json").is_file() else None
    if config is None or config.objective == FEEDBACK:
        raise UserError(
            f"{target} is not a run that a program scored, which would say what to score with. "
            "Give --scorers, such as --scorers jpeg_size,clip; `d3po-bench list` names them."
        )
    scored = registry.scorers_of(config.source("objective"))
    return tuple(dict.fromkeys((*scored, *config.eval_scorers)))


def planned(request: EvaluateRequest) -> Plan:
    """What a request means, after looking at what its target is.

    Raises:
        UserError: it is nothing that can be evaluated.
    """
    target = request.target
    if table_of(target):
        return _pictures(request)
    if (target / "config.json").is_file() and (target / LORA).is_dir():
        return _of_run(request)
    if (target / "config.json").is_file() and (target / "metrics.jsonl").is_file():
        raise UserError(
            f"The run in {target} is not finished. Run its command again: it resumes from the "
            "last checkpoint."
        )
    if _is_adapter(target):
        return _of_model(request, request.model or "tiny", str(target))
    named = str(target) in registry.names("model") or (target / "model_index.json").is_file()
    if not named and (lacking := without_table(target)):
        raise UserError(lacking)
    _require_no_other_model(request, str(target))
    return _of_model(request, str(target), "")


def _is_adapter(target: Path) -> bool:
    """Whether it is what goes onto a base model: a LoRA of any name, or a network alone."""
    if (target / "pytorch_lora_weights.safetensors").is_file():
        return True
    if target.suffix == ".safetensors" and target.is_file():
        return True
    network = any((target / name).is_dir() for name in ("unet", "transformer"))
    alone = network or any(target.glob("*.safetensors"))
    return alone and not (target / "model_index.json").is_file()


def _require_no_other_model(request: EvaluateRequest, model: str) -> None:
    """Refuse a --model that would be ignored.

    Raises:
        UserError: naming both.
    """
    if request.model not in (None, model):
        raise UserError(
            f"{request.target} has a model, {model}: --model {request.model} would be ignored. "
            "Leave --model out."
        )


def _of_run(request: EvaluateRequest) -> Plan:
    run = RunFolder(request.target)
    config = run.config
    _require_no_other_model(request, config.model)
    wanted = request.prompts or _default_prompts(config.model, config)
    held_out = model_source(config.model).prompts
    if config.objective == FEEDBACK:
        trained_on = None
        if wanted == held_out:
            raise UserError(
                f"The run in {run.folder} was trained on votes, so nothing says which prompts it "
                "has not seen. Give some with --prompts."
            )
    else:
        used = wanted in (held_out, config.prompt_source)
        trained_on = read_prompts(config.prompt_source) if used else None
    require_unchanged(run, LORA, trained_on)
    plan = _of_model(request, config.model, str(request.target / LORA), config)
    require_held_out(config, wanted, plan.prompts, run.folder)
    return plan


def require_held_out(config: RunConfig, wanted: str, prompts: Sequence[str], folder: Path) -> None:
    """Refuse `prompts` of the model's held-out list, if that is wanted, that a run learns from.

    Raises:
        UserError: naming one, and the run's folder.
    """
    if wanted != model_source(config.model).prompts:
        return
    seen = sorted(set(prompts) & set(read_prompts(config.prompt_source)))
    if seen:
        raise UserError(
            f"The run in {folder} learns from {seen[0]!r} and {len(seen) - 1} more of these "
            "prompts, so they are not held out. Give others with --prompts."
        )


def _of_model(
    request: EvaluateRequest, model: str, adapter: str, config: RunConfig | None = None
) -> Plan:
    source = model_source(model)
    prompts = read_prompts(request.prompts or _default_prompts(model, config))
    trained = f" + {fingerprint(Source(path=adapter))}" if adapter else ""
    guidance = config.guidance if config else 5.0
    how = config or request
    return Plan(
        model=model,
        adapter=adapter,
        content=fingerprint(source) + trained,
        prompts=tuple(spread(prompts, request.count or len(prompts))),
        images=request.images,
        steps=request.steps or (config.sampling_steps if config else 20),
        guidance=guidance if request.guidance is None else request.guidance,
        sampler=how.sampler,
        eta=how.eta,
        timestep_spacing=how.timestep_spacing,
        dtype=how.dtype,
        full=how.full,
        long_prompts=request.long_prompts or (config.long_prompts if config else "refuse"),
        scorers=_checked(request.scorers),
        samplers=request.samplers,
        weights=source.scorers,
    )


def _default_prompts(model: str, config: RunConfig | None) -> str:
    """Held-out captions for the embedded model, else what a run was trained on.

    Stable Diffusion has the paper's alignment prompts, which are fetched by checksum.
    """
    suited = model_source(model).prompts
    if suited:
        return suited
    if config:
        return config.prompt_source
    if model == "sd15":
        from eval import downloads

        return str(downloads.find(FETCHED)[0])
    raise UserError(
        "Only a run or the embedded model has prompts of its own. Add --prompts with a list, or "
        "with a file that has one prompt a line."
    )


def _checked(scorers: Sequence[str]) -> tuple[str, ...]:
    for name in scorers:
        registry.require_scorer(name)
    found = tuple(dict.fromkeys(map(own.normal, scorers)))
    registry.require_apart(found)
    return found


def _pictures(request: EvaluateRequest) -> Plan:
    """A folder of pictures with metadata.csv or metadata.jsonl.

    The model that drew them only says which weights of the scorers suit them.
    """
    given = {"save": request.save, "prompts": request.prompts, "count": request.count}
    if pointless := [name for name, value in given.items() if value]:
        raise UserError(
            f"--{pointless[0]} is for what a model draws, and {request.target} holds pictures "
            f"already. Leave --{pointless[0]} out."
        )
    named = registry.names("model")
    if request.model is not None and request.model not in named:
        raise registry.unknown("model", request.model, named)
    files, prompts = zip(*read_pictures(request.target), strict=True)
    digests = (sha256_of(request.target / name) for name in files)
    return Plan(
        model=str(request.target), adapter="", prompts=prompts, files=files,
        content=short(" ".join(digests)), scorers=_checked(request.scorers), samplers=("",),
        weights=model_source(request.model).scorers if request.model else "official",
    )  # fmt: skip
