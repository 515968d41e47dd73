"""RunConfig: everything that decides a run's numbers. Execution: how it is computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self, get_type_hints

from d3po_bench import own, registry
from d3po_bench.digests import short
from d3po_bench.errors import UserError
from d3po_bench.own import is_name
from d3po_bench.presets import PRESETS
from d3po_bench.rewards import sums
from d3po_bench.setting import fits, require_options, require_ranges, value_of

FEEDBACK = "feedback"
"""The objective of runs that learn from votes: no program could score for it."""

MOST_SEEDS = 10_000
"""Of a command: more are a slip."""

LATER: dict[str, Any] = {
    "sampler": "auto", "long_prompts": "refuse", "lora": "", "sources": {}, "choices": "scores",
    "timestep_spacing": "model", "window": 0, "step_weight": "equal", "updates_per_round": 0,
    "eval_list": "", "eval_noise": 0,
}  # fmt: skip
"""Settings, with their defaults, that configs did not have when the first runs were published."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: a method pushing an objective on a base model from a seed.

    Two runs with equal configs, code, versions and machine write equal numbers. What only
    decides where or how fast is in `Execution`. Defaults are the paper's (Table 2).
    """

    method: str
    objective: str
    model: str = "tiny"
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    """The method's own options that differ from its defaults."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Of `method` and `objective`, those that are the user's own -> what stands for them: a file,
    package.module:NAME, an address, or a sum of objectives."""
    prompts: str = ""
    """A prompt list's name or file; the objective's own if empty."""
    lora: str = ""
    """File or folder of the LoRA that training begins with; empty for the base model."""
    long_prompts: Literal["refuse", "cut"] = "refuse"
    """What becomes of prompts with more tokens than the text encoder reads."""
    rounds: int = 400
    """Sampling rounds; the paper's epochs."""
    prompts_per_round: int = 20
    """One of the four devices' share of the 80 pairs that the published code draws in a round."""
    images_per_prompt: int = 0
    """K; 0 means the method's own."""
    choices: Literal["scores", "random"] = "scores"
    """Random: the scores of a prompt's images change places first, so that they say nothing."""
    sampling_steps: int = 20
    timestep_spacing: Literal["model", "log_snr"] = "model"
    """Where the steps begin: where the model's scheduler has them, or spread evenly over the
    logarithm of the signal-to-noise ratio, so that all steps are about equally sensitive."""
    sampler: Literal["auto", "ddim", "flow_sde", "cps"] = "auto"
    """Auto: ddim, or Flow-GRPO's SDE for a model that is a rectified flow."""
    eta: float = 1.0
    """Strength of the noise in each step: DDIM's eta, or the a of flow_sde and cps."""
    guidance: float = 5.0
    learning_rate: float = 3e-5
    """The paper's, for hundreds of rounds; the embedded model, trained for minutes, takes more."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """The paper says Adam with weight decay, its code is AdamW; "adam" decays through the loss."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    units_per_update: int = 1
    """Pairs (or images) in one optimizer step."""
    updates_per_round: int = 0
    """Optimizer steps in a pass over a round, however many units it has; 0: by units_per_update."""
    timestep_fraction: float = 1.0
    """Share of each unit's denoising steps that is trained on."""
    skip_steps: int = 0
    """Last denoising steps that are sampled but not trained on. The next-to-last is
    23 to 76 times as sensitive to the network's output as the others at T = 20, 40 to 74 at 10."""
    window: int = 0
    """Consecutive steps, begun at a random one in each round, that alone add noise and are trained
    on; the others follow the ODE, as in Flow-GRPO-Fast and MixGRPO. 0: all steps."""
    step_weight: Literal["equal", "inverse"] = "equal"
    """Of each step's gradient; inverse: 1 / w, w = sqrt(r^2 - 1) with r^2 the step's SNR ratio."""
    update_every: Literal["unit", "timestep"] = "unit"
    passes: int = 1
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    full: bool = False
    """Train the whole UNet instead of a LoRA."""
    lora_rank: int = 4
    lora_alpha: float = 0.0
    """Scale times rank; 0 means scale 1."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    eval_every: int = 10
    """Rounds between evaluations; 0 switches evaluation off."""
    eval_list: str = ""
    """A prompt list's name or file to evaluate on; empty for that of training."""
    eval_noise: int = 0
    """Which fixed noise evaluations begin from: one to choose settings on, another to report."""
    eval_prompts: int = 45
    """Prompts of that list, evenly spread."""
    eval_images: int = 2
    """Images for each of them and each sampler (eta 1, eta 0)."""
    eval_scorers: tuple[str, ...] = ()
    """Scorers beside the objective's; name:weights where other weights than the model's suit."""

    def _recorded(self) -> dict[str, Any]:
        """What is written down of it; a setting that came later only where it differs."""
        settings = asdict(self)
        return {k: v for k, v in settings.items() if k not in LATER or v != LATER[k]}

    @property
    def run_id(self) -> str:
        """Twelve hex digits that name this config."""
        return short(json.dumps(self._recorded(), sort_keys=True))

    @property
    def prompt_source(self) -> str:
        """The list or file of its prompts: its own, or the objective's.

        Raises:
            UserError: the objective is a sum of some that have different ones.
        """
        found = self.prompts or registry.objective(self.source("objective")).prompts
        if not found:
            raise UserError(
                f"The parts of {self.source('objective')} have different prompts. Choose with "
                "--prompts, such as --prompts animals."
            )
        return found

    @property
    def eval_source(self) -> str:
        """The list or file of the prompts that it is evaluated on."""
        return self.eval_list or self.prompt_source

    def source(self, kind: Literal["method", "objective"]) -> str:
        """What stands for its method or objective where that is looked up: a name or a text."""
        return self.sources.get(kind, str(getattr(self, kind)))

    def to_json(self) -> str:
        """The config as it lies in a run folder."""
        found = {**self._recorded(), "run_id": self.run_id}
        return json.dumps(found, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """The config that `to_json` wrote, read as JSON; what it does not name has its default.

        Raises:
            ValueError: as "has ...", where a setting is unknown or missing or no run can have it.
        """
        given = {name: value for name, value in found.items() if name != "run_id"}
        kinds = get_type_hints(cls)
        if unknown := sorted(given.keys() - kinds.keys()):
            raise ValueError(f"has unknown settings: {', '.join(unknown)[:80]}")
        for name in ("method", "objective", "model", "seed"):  # which every version has written
            if name not in given:
                raise ValueError(f"has no {name}")
        for name, value in given.items():
            known = fits(value, kinds[name]) and (name != "seed" or value >= 0)
            known = known and (name != "sources" or _are_sources(value))
            if not known or (name in ("method", "objective") and not is_name(value)):
                raise ValueError(f"has {name} = {ascii(value)[:60]}, which no run can have")
        if "objective" in given.get("sources", {}) and not given.get("prompts"):
            raise ValueError("has an objective of the user's own and no prompts")
        values: dict[str, Any] = {k: tuple(v) if type(v) is list else v for k, v in given.items()}
        return cls(**values)

    def check(self) -> None:
        """Refuse values that no run can have, the method's options included.

        Raises:
            UserError: naming the field, what it must be and what it is.
        """
        steps = self.sampling_steps
        of_steps = {"skip_steps": (0, steps - 1), "window": (0, steps - self.skip_steps)}
        require_ranges(self, _RANGES | of_steps)
        if self.lora and self.full:
            raise UserError(
                "A run that trains the whole network cannot begin with a LoRA. Leave out --lora or "
                "full=true."
            )
        if self.objective != FEEDBACK:
            _ = self.prompt_source
        method = method_of(self)
        least = max(least_images(method), 2 if self.choices == "random" else 1)
        images = self.images_per_prompt or method.images_per_prompt
        if images < least:
            raise UserError(
                f"{self.method} compares at least {least} images of each prompt, not {images}. "
                f"Change it with --set images_per_prompt={least}."
            )
        by_step = self.window or self.step_weight != "equal"
        if by_step and not getattr(method, "needs_chain", True):
            raise UserError(
                f"{self.method} learns from finished images: leave out window and step_weight."
            )
        for scorer in self.eval_scorers:
            registry.require_scorer(scorer)
        voted = self.objective == FEEDBACK
        scored = () if voted else registry.scorers_of(self.source("objective"))
        registry.require_apart((*scored, *self.eval_scorers))


def _are_sources(value: Mapping[str, Any]) -> bool:
    known = value.keys() <= {"method", "objective"}
    return known and all(isinstance(text, str) for text in value.values())


_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31), "rounds": (1, 10**6), "prompts_per_round": (1, 10**5),
    "images_per_prompt": (0, 1000), "sampling_steps": (1, 999), "eta": (1e-3, 1),
    "guidance": (0, 100), "learning_rate": (1e-12, 10), "adam_beta1": (0, 0.999999),
    "adam_beta2": (0, 0.999999), "adam_epsilon": (0, 1), "weight_decay": (0, 10),
    "max_grad_norm": (1e-12, 1e12), "units_per_update": (1, 10**6),
    "updates_per_round": (0, 10**6), "timestep_fraction": (1e-3, 1), "passes": (1, 10**4),
    "skip_steps": (0, 998), "window": (0, 999), "lora_rank": (1, 1024), "lora_alpha": (0, 10**4),
    "eval_every": (0, 10**6), "eval_noise": (0, 10**6),
    "eval_prompts": (1, 10**5), "eval_images": (1, 1000),
}  # fmt: skip


BATCHES = {"sample_batch": 128, "micro_batch": 32, "reference_batch": 128, "decode_batch": 16}
"""Settings that say how much is computed at a time, and the most that is chosen for them."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where and how fast: none of it may change a result beyond rounding."""

    device: str = "auto"
    threads: int = 0
    """CPU threads of a run; 0 means 1 for the embedded model and all cores otherwise."""
    sample_batch: int = 0
    """Images sampled side by side; 0 means as many as fit, as for the other batches."""
    micro_batch: int = 0
    """Items (steps of a pair, or of an image) in one forward and backward pass."""
    reference_batch: int = 0
    decode_batch: int = 0
    memory: float = 0.0
    """GB that the run may take, by which its batches are chosen; 0 for what is free on a GPU."""
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    checkpoint_every: int = 1
    """Rounds between checkpoints: what a run that is killed loses at most."""
    deterministic: Literal["auto", "on", "off"] = "auto"
    """Kernels that give the same bits each time, or an error; auto: on for a CPU, off elsewhere."""
    step_gradients: bool = False
    """Also measure the gradient norm of each denoising step, once a round."""
    rank_timeout: int = 1800
    """Seconds that the ranks of one run wait for each other: one must sample a batch in them."""

    def check(self) -> None:
        """Refuse what cannot be done, such as a checkpoint that never comes.

        Raises:
            UserError: naming the field, what it must be and what it is.
        """
        others: dict[str, tuple[float, float]] = {
            "threads": (0, 1024), "rank_timeout": (1, 10**6), "checkpoint_every": (1, 10**6),
            "memory": (0, 10**5),
        }  # fmt: skip
        require_ranges(self, others | dict.fromkeys(BATCHES, (0, 10**6)))

    def usual(self) -> Self:
        """The batches that are left to be chosen as they are where nothing has to be counted."""
        sizes: dict[str, Any] = {n: getattr(self, n) or most for n, most in BATCHES.items()}
        return replace(self, **sizes)


def make(
    method: str, objective: str, preset: str, changes: Mapping[str, str], **given: Any
) -> tuple[RunConfig, Execution]:
    """The config of a command line: defaults, then the preset, then `given` and `changes`.

    Args:
        method: name of a method, or a text that stands for one of the user's own.
        objective: likewise.
        preset: a key of `PRESETS`.
        changes: KEY -> VALUE of `--set`; fields of RunConfig or Execution, or method options.
        given: RunConfig fields that have an option of their own.

    Raises:
        UserError: an unknown name, a value of the wrong type, or a setting that is given twice.
    """
    if preset not in PRESETS:
        raise registry.unknown("preset", preset, list(PRESETS))
    known = settings(method)
    parsed: dict[str, dict[str, Any]] = {"run": {}, "execution": {}, "options": {}}
    for key, text in changes.items():
        group = next((g for g, kinds in known.items() if key in kinds), None)
        if group is None and key in ELSEWHERE:
            raise UserError(f"--set cannot change the {key}. Use {ELSEWHERE[key]}.")
        if group is None:
            names = [name for kinds in known.values() for name in kinds]
            raise registry.unknown("setting", key, names, "`d3po-bench list --settings`")
        if key in given:
            raise UserError(
                f"{key} is {given[key]} here, so --set {key}={text[:40]} cannot change it. Leave "
                "it out."
            )
        parsed[group][key] = value_of(key, text, known[group][key])
    usual = of_preset(method, objective, preset)
    # Presets do not know a method of the user's own, which may have no steps to weigh.
    if not getattr(registry.method(method), "needs_chain", True):
        usual = replace(usual, step_weight="equal", window=0)
    chosen = {"eval_scorers": usual.eval_scorers, **given, **parsed["run"]}
    chosen["eval_scorers"] = tuple(map(own.normal, chosen["eval_scorers"]))
    options = {**usual.options, **parsed["options"]}
    config = replace(usual, **_named(method, objective), **chosen, options=options)
    execution = Execution(**parsed["execution"])
    if "objective" in config.sources:  # nobody who reads the run needs to load it
        config = replace(config, prompts=config.prompt_source)
    config.check()
    execution.check()
    return config, execution


def of_preset(method: str, objective: str, preset: str) -> RunConfig:
    """What a preset makes for a method and an objective, neither of which is looked up.

    Args:
        method: its name.
        objective: likewise.
        preset: a key of `PRESETS`.
    """
    found = dict(PRESETS[preset])
    by_method, by_objective = (found.pop(f"by_{kind}", {}) for kind in ("method", "objective"))
    of, own_settings = registry.variant(method)
    found |= by_objective.get(objective, {}) | by_method.get(of, {}) | own_settings
    found |= by_method.get(method, {}) if method != of else {}
    known = {f.name for f in fields(RunConfig)}
    options = {name: found.pop(name) for name in [*found] if name not in known}
    return RunConfig(method=method, objective=objective, options=options, **found)


def _named(method: str, objective: str) -> dict[str, Any]:
    """The fields that say which method and objective."""
    texts: dict[registry.Kind, str] = {"method": own.normal(method)}
    texts["objective"] = sums.normal(objective)
    names: dict[str, str] = {kind: registry.name_of(kind, text) for kind, text in texts.items()}
    if names["objective"] == FEEDBACK != objective:
        raise UserError(f"{objective} would be called as runs on votes are. Rename that file.")
    own_ones = {kind: text for kind, text in texts.items() if text != names[kind]}
    return {**names, "sources": own_ones}


ELSEWHERE = {
    "method": "--method", "objective": "--objective", "model": "--model",
    "seed": "--seed-start, or seeds of a grid", "device": "--device",
    "lora": "--lora, or lora of a grid",
}  # fmt: skip
"""Fields with an option of their own, which `--set` would only contradict."""


def settings(method: str) -> dict[str, dict[str, Any]]:
    """What `--set` can change: name -> type in each of the groups options, run, execution.

    Raises:
        UserError: a method of another package has options that cannot be told or read.
    """
    kinds: dict[str, Any] = {
        "options": registry.method(method), "run": RunConfig, "execution": Execution
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for group, kind in kinds.items():
        try:
            hints = get_type_hints(kind)
        except NameError as problem:
            raise UserError(
                f"The options of the method {method} cannot be read: {problem}. Correct the types "
                "in its package."
            ) from problem
        names = (f.name for f in fields(kind) if f.name not in {*ELSEWHERE, "options", "sources"})
        found[group] = {name: hints[name] for name in names}
    require_options(method, found["options"], {*found["run"], *found["execution"]})
    return found


def method_of(config: RunConfig) -> Any:
    """The method with its options."""
    return registry.method(config.source("method"))(**config.options)


def least_images(method: Any) -> int:
    """Fewest images of a prompt that it learns from: 2 where it compares them with no others."""
    return int(getattr(method, "least_images", 1))
