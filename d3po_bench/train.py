"""One run: the rounds of sampling, scoring and learning, with evaluation and checkpoints."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from d3po_bench import registry
from d3po_bench.config import Execution, RunConfig, method_of
from d3po_bench.engine import (
    Draws,
    Updates,
    learnt_images,
    require_finite,
    sample,
    update,
    with_reference,
)
from d3po_bench.errors import RunError, UserError
from d3po_bench.gaussian import Gaussian
from d3po_bench.machine import determine
from d3po_bench.models.stable_diffusion import Source, Training, fingerprint, load
from d3po_bench.policy import Policy
from d3po_bench.prompts import read_prompts
from d3po_bench.seeding import stream
from d3po_bench.store import Row, RunStore, write_folder
from d3po_bench.types import Rollout, Scorer

HISTORY = 64
"""Rewards of each prompt that are kept from round to round."""

SHOWN = 10
"""Prompts whose evaluation images are kept as PNG files."""


@dataclass(frozen=True)
class Progress:
    """Where a run is, for whoever shows it."""

    run: str
    """Which run: see `label`."""
    done: float
    """Share of the run, 0 to 1."""
    text: str
    note: str = ""
    """Something to say once, however many runs say it; the rest then tells nothing new."""


Report = Callable[[Progress], None]


def label(config: RunConfig) -> str:
    """What a run is called where several are shown."""
    return f"{config.method} {config.objective} seed {config.seed}"


def model_source(name: str) -> Source:
    """A named model, or a diffusers folder, or a hub id.

    Raises:
        UserError: `name` looks like neither.
    """
    if name in registry.names("model"):
        source: Source = registry.model_source(name)
        return source
    if Path(name).exists() or (name.count("/") == 1 and not name.startswith((".", "/"))):
        return Source(path=name)
    raise registry.unknown("model", name, [*registry.names("model"), "FOLDER", "HUB/ID"])


def device_of(name: str) -> torch.device:
    """The device of that name; auto takes the first accelerator there is.

    Raises:
        UserError: torch cannot use it here.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as problem:
        raise UserError(
            f"Expected a device that torch can use, got {name!r}. Give --device auto, cpu or cuda."
        ) from problem


class Trainer:
    """A model, a method and an objective, and the rounds between them."""

    def __init__(self, config: RunConfig, execution: Execution) -> None:
        """Load what the config names; nothing is written yet."""
        self.config, self.execution = config, execution
        self.device = device_of(execution.device)
        self.method = method_of(config)
        self.images = config.images_per_prompt or self.method.images_per_prompt
        source = model_source(config.model)
        self.weights = source.scorers
        self._choose_task()
        self.inputs = {"model": fingerprint(source), "prompts": digest(self.prompts)}
        self.model = load(source, self.device, self._training())
        if self.model.commit:
            self.inputs["model_commit"] = self.model.commit
        self.model.encode([*self.prompts, ""])
        self.model.add_adapter(config.seed)
        self.policy = Policy(
            self.model, steps=config.sampling_steps, eta=config.eta, guidance=config.guidance
        )
        self.policy.schedule.require_noise()
        self.optimizer = self._optimizer()
        scaled = config.dtype == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type) if scaled else None
        self.counts = {"pairs": 0, "images": 0, "scorer_calls": 0}
        self.history: dict[str, list[float]] = {}
        self.memory: dict[str, Tensor] = {}
        self.round = 0

    def _choose_task(self) -> None:
        """What the method learns to please: objective, scorer and prompts."""
        self.objective = registry.objective(self.config.objective)
        self.scorer = registry.scorer(self.objective.scorer, self.device, self.weights)
        self.prompts = read_prompts(self.config.prompts or self.objective.prompts)

    def _training(self) -> Training:
        c, e = self.config, self.execution
        return Training(
            dtype=c.dtype,
            full=c.full,
            lora_rank=c.lora_rank,
            lora_alpha=c.lora_alpha or None,
            lora_targets=c.lora_targets,
            gradient_checkpointing=e.gradient_checkpointing,
            channels_last=e.channels_last,
            compile=e.compile,
            decode_batch=e.decode_batch,
        )

    def _optimizer(self) -> torch.optim.Optimizer:
        c = self.config
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[c.optimizer]
        optimizer: torch.optim.Optimizer = kind(
            list(self.model.trainable().values()),
            lr=c.learning_rate,
            betas=(c.adam_beta1, c.adam_beta2),
            eps=c.adam_epsilon,
            weight_decay=c.weight_decay,
        )
        return optimizer

    # ---- a round

    def train_round(self, report: Callable[[str, float], None]) -> tuple[Row, Row]:
        """Sample, score, learn: the round's line of metrics and its seconds by stage."""
        seconds: dict[str, float] = {}
        with _timed(seconds, "sample"):
            rollout = self._sample(report)
        with _timed(seconds, "score"):
            rollout, scores = self._score(rollout)
        with _timed(seconds, "reference"):
            rollout = with_reference(
                self.policy, rollout, self.method,
                untrained=self._untrained(), batch=self.execution.reference_batch,
                skip=self.config.skip_steps,
            )  # fmt: skip
        with _timed(seconds, "update"):
            learnt = self._learn(rollout, report)
        self.round += 1
        metrics = {
            "round": self.round,
            **self._spent(),
            "score_mean": float(scores.mean()),
            "score_std": float(scores.std(correction=0)),
            "reward_mean": float(rollout.scores.mean()),
            **({"kl": self._kl(rollout)} if self._reference_is_pretrained() else {}),
            **learnt,
        }
        return metrics, {"round": self.round, **{k: round(v, 3) for k, v in seconds.items()}}

    def _sample(self, report: Callable[[str, float], None]) -> Rollout:
        c = self.config
        rng = stream(c.seed, "prompts", self.round)
        drawn = torch.randint(len(self.prompts), (c.prompts_per_round,), generator=rng)
        return sample(
            self.policy,
            [self.prompts[i] for i in drawn],
            Draws(seed=c.seed, round=self.round),
            images_per_prompt=self.images,
            shared_noise=self.method.shared_noise,
            batch=self.execution.sample_batch,
            progress=lambda share: report("sampling", share * 0.5),
        )

    def _score(self, rollout: Rollout) -> tuple[Rollout, Tensor]:
        """The rollout with its rewards, and the raw scores [P, K]."""
        p, k = rollout.means.shape[:2]
        images = self.model.decode(rollout.latents[:, :, -1].flatten(0, 1))
        prompts = [prompt for prompt in rollout.prompts for _ in range(k)]
        scores = self.scorer(images, prompts).view(p, k)
        if not bool(torch.isfinite(scores).all()):
            raise RunError(
                f"Expected finite scores, got {scores[~torch.isfinite(scores)][0]} from "
                f"{self.objective.scorer}. Check that scorer."
            )
        self.counts["images"] += p * k
        self.counts["scorer_calls"] += p * k
        rewards = scores * self.objective.sign
        return replace(rollout, scores=rewards, history=self.history, memory=self.memory), scores

    def _learn(self, rollout: Rollout, report: Callable[[str, float], None]) -> dict[str, float]:
        c = self.config
        rows = self.method.rows(rollout, stream(c.seed, "rows", self.round))
        self.counts["pairs"] += len(rows)
        self._remember(rollout)
        updates = Updates(
            units=c.units_per_update,
            timestep_fraction=c.timestep_fraction,
            skip=c.skip_steps,
            every=c.update_every,
            passes=c.passes,
            micro_batch=self.execution.micro_batch,
            max_grad_norm=c.max_grad_norm,
        )
        return update(
            self.policy, self.method, rows, self.optimizer, updates,
            stream(c.seed, "shuffle", self.round), self.scaler,
            progress=lambda share: report("learning", 0.5 + share * 0.5),
        )  # fmt: skip

    def _remember(self, rollout: Rollout) -> None:
        """Keep each prompt's newest rewards for the methods that compare with them."""
        for prompt, rewards in zip(rollout.prompts, rollout.scores.tolist(), strict=True):
            self.history[prompt] = (self.history.get(prompt, []) + rewards)[-HISTORY:]

    def _spent(self) -> Row:
        return {
            **self.counts,
            "unet_forwards": self.model.forwards,
            "unet_backwards": self.model.backwards,
        }

    def _untrained(self) -> bool:
        """Whether the policy still equals the pretrained model."""
        return self.round == 0

    def _reference_is_pretrained(self) -> bool:
        return bool(self.method.reference == "pretrained")

    def _kl(self, rollout: Rollout) -> float:
        """KL of a step to the pretrained model, mean over the images and steps learnt from."""
        if rollout.reference is None:
            raise ValueError("the rollout carries no reference")
        learnt = self.config.sampling_steps - self.config.skip_steps
        chosen = learnt_images(self.method, rollout)
        std = self.policy.schedule.std[:learnt].float().to(rollout.means.device)
        means = (m[chosen][:, :learnt] for m in (rollout.means, rollout.reference))
        ours, theirs = (m.flatten(0, 1) for m in means)
        kl = Gaussian(ours, std.repeat(int(chosen.sum()))).kl(theirs)
        require_finite("kl of the steps to the pretrained model", kl)  # its squares can overflow
        return float(kl.mean())

    # ---- checkpoints

    def state(self) -> tuple[dict[str, Tensor], Row]:
        """Everything that the next round depends on: tensors and numbers."""
        tensors = {f"weight/{n}": p for n, p in self.model.trainable().items()}
        for name, p in self.model.trainable().items():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{key}/{name}"] = value
        tensors |= {f"memory/{name}": value for name, value in self.memory.items()}
        facts = {"round": self.round, **self._spent(), "history": dict(self.history)}
        if self.scaler is not None:
            facts["scaler"] = self.scaler.state_dict()
        return tensors, facts

    def restore(self, tensors: dict[str, Tensor], facts: Row) -> None:
        """Go back to a state that `state` returned."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            key, _, parameter = name.partition("/")
            parts.setdefault(key, {})[parameter] = value
        self.model.load_trainable(parts.pop("weight"))
        self.memory = parts.pop("memory", {})
        self.history = facts["history"]
        for name, p in self.model.trainable().items():
            kept = {k: v[name] for k, v in parts.items() if name in v}
            if kept:
                moved = {k: v if k == "step" else v.to(p.device) for k, v in kept.items()}
                self.optimizer.state[p] = moved
        self.round = facts["round"]
        self.counts = {name: facts[name] for name in self.counts}
        self.model.forwards, self.model.backwards = facts["unet_forwards"], facts["unet_backwards"]
        if self.scaler is not None:
            self.scaler.load_state_dict(facts["scaler"])


def digest(prompts: Sequence[str]) -> str:
    """Twelve hex digits that name a list of prompts."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12]


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - start


class Evaluation:
    """The evaluations of one run; their passes do not count as the run's cost."""

    def __init__(self, trainer: Trainer) -> None:
        """Load the further scorers."""
        c = trainer.config
        self.trainer = trainer
        self.evaluator: Any = registry.evaluator()
        self.scorers: dict[str, Scorer] = {"score": trainer.scorer}
        for name in c.eval_scorers:
            self.scorers[name] = self._further(name)
        self.what = self.evaluator.EvaluationSet(
            prompts=self.evaluator.spread(trainer.prompts, c.eval_prompts),
            images=c.eval_images,
            steps=c.sampling_steps,
            guidance=c.guidance,
            batch=trainer.execution.sample_batch,
        )

    def _further(self, name: str) -> Scorer:
        """A scorer that the objective does not need, so that a run can do without it."""
        try:
            return registry.scorer(name, self.trainer.device, self.trainer.weights)
        except UserError as problem:
            others = ",".join(s for s in self.trainer.config.eval_scorers if s != name)
            raise UserError(f"{problem} Or leave it out: --set eval_scorers={others}") from problem

    def named(self) -> dict[str, Scorer]:
        """The scorers by the names that they have on the command line."""
        objective = self.trainer.objective.scorer
        return {objective if name == "score" else name: s for name, s in self.scorers.items()}

    def fingerprints(self) -> dict[str, str]:
        """Scorer -> what names its weights."""
        selfcheck: Any = registry.selfcheck()
        return {name: selfcheck.fingerprint(scorer) for name, scorer in self.named().items()}

    def unchecked(self) -> list[str]:
        """Scorers without golden scores for their weights; people's votes are no such scorer."""
        known = registry.names("scorer")
        named = {n: s for n, s in self.named().items() if n.partition(":")[0] in known}
        found: list[str] = registry.selfcheck().unchecked(named)
        return found

    def due(self) -> bool:
        """Whether to evaluate now: at the start, every `eval_every` rounds, and at the end."""
        c, done = self.trainer.config, self.trainer.round
        return c.eval_every > 0 and (done % c.eval_every == 0 or done == c.rounds)

    def run(self, store: RunStore) -> float:
        """Draw, score and write; returns the mean score with the training sampler."""
        model = self.trainer.model
        spent = model.forwards, model.backwards
        try:
            rows, pictures = self.evaluator.evaluate(model, self.what, self.scorers)
        except RunError as problem:
            where = f"Evaluation after round {self.trainer.round}, seed {self.trainer.config.seed}"
            raise RunError(f"{where}: {problem}") from problem
        model.forwards, model.backwards = spent
        store.log_evaluation([{"round": self.trainer.round, **row} for row in rows])
        self._save_samples(store, pictures["eta0"])
        scores = [row["score"] for row in rows if row["sampler"] == "eta1"]
        return float(sum(scores) / len(scores))

    def _save_samples(self, store: RunStore, images: Tensor) -> None:
        """The first image of some evenly spread prompts, deployment sampler, as PNG."""
        prompts = list(self.what.prompts)
        for prompt in self.evaluator.spread(prompts, SHOWN):
            image = images[prompts.index(prompt) * self.what.images]
            store.save_sample(self.trainer.round, prompt, image)


def run_seed(
    config: RunConfig,
    execution: Execution,
    folder: Path,
    *,
    resume: bool = True,
    report: Report = lambda progress: None,
    make: Callable[[RunConfig, Execution], Trainer] = Trainer,
    facts: Row | None = None,
    prompts: Sequence[str] | None = None,
) -> None:
    """Run one seed into `folder`, going on from its checkpoint if there is one.

    Args:
        config: of the run.
        execution: where and how fast.
        folder: the run's.
        resume: go on, or refuse a folder with a run in it.
        report: called with how far it is.
        make: the trainer.
        facts: to keep in provenance.json.
        prompts: those of `make`'s trainers; None for those that the config names.

    Raises:
        UserError: bad input, found before the first round, or a run in the folder that was begun
            with other inputs or packages.
        RunError: the run failed on the way; what it had written is kept.
    """
    with RunStore.open(folder, config, resume=resume) as store:
        if store.finished:
            store.require_content()
            store.require_inputs(_inputs(config, store, prompts))
            report(Progress(label(config), 1.0, "finished before"))
            return
        store.require_packages()
        torch.set_num_threads(threads_of(config, execution))
        on = determine(device_of(execution.device), execution.deterministic)
        trainer = make(config, execution)
        after = _restore(trainer, store, report)
        evaluation = Evaluation(trainer)
        unchecked = _tell_unchecked(trainer, evaluation, report)
        store.start(
            config, {**trainer.inputs, "scorers": evaluation.fingerprints()}, after=after,
            facts={"unchecked_scorers": unchecked, **(facts or {})},
            device=str(trainer.device), threads=torch.get_num_threads(), deterministic=on,
            execution=vars(execution).copy(), **_plugins(config, evaluation),
        )  # fmt: skip
        _rounds(trainer, store, evaluation, report)
        write_folder(folder / "lora", trainer.model.save)
        store.finish()


def _inputs(config: RunConfig, store: RunStore, prompts: Sequence[str] | None) -> Row:
    """What the inputs of a finished run are today, told without loading its model."""
    source = model_source(config.model)
    if prompts is None:
        prompts = read_prompts(config.prompts or registry.objective(config.objective).prompts)
    found: Row = {"model": fingerprint(source), "prompts": digest(prompts)}
    inputs = store.provenance().get("inputs")
    began = inputs.get("scorers", {}) if isinstance(inputs, dict) else {}
    known = began if isinstance(began, dict) else {}  # what is none is none of today's, either
    today = {name: _scorer_fingerprint(name, source.scorers) for name in known}
    return found | {"scorers": {name: today[name] or known[name] for name in known}}


def _scorer_fingerprint(name: str, weights: str) -> str | None:
    """What names a scorer's weights; None where it cannot be loaded here, so scores nothing."""
    selfcheck: Any = registry.selfcheck()
    try:
        return str(selfcheck.fingerprint(_origin(name, weights)))
    except (UserError, ImportError):
        return None


@cache
def _origin(name: str, weights: str) -> SimpleNamespace:
    """What a scorer comes from, without its network; loaded once for all runs of a command."""
    scorer = registry.load_scorer(name, torch.device("cpu"), weights)
    known = {k: getattr(scorer, k) for k in ("sources", "digest") if hasattr(scorer, k)}
    return SimpleNamespace(**known)


def _plugins(config: RunConfig, evaluation: Evaluation) -> dict[str, dict[str, str]]:
    """Which packages brought what a run uses, if any did."""
    used: list[tuple[registry.Kind, str]] = [
        ("method", config.method), ("objective", config.objective), ("model", config.model),
        *(("scorer", name.partition(":")[0]) for name in evaluation.named()),
    ]  # fmt: skip
    return registry.plugins(used)


def _tell_unchecked(trainer: Trainer, evaluation: Evaluation, report: Report) -> list[str]:
    """The scorers that nothing was compared with, after saying so."""
    names, done = evaluation.unchecked(), trainer.round / trainer.config.rounds
    if names:
        note = registry.selfcheck().note(names)
        report(Progress(label(trainer.config), done, "", note))
    return names


def threads_of(config: RunConfig, execution: Execution) -> int:
    """CPU threads of a run: two of the embedded model beat one on two threads."""
    if execution.threads:
        return execution.threads
    return 1 if config.model == "tiny" else torch.get_num_threads()


def _restore(trainer: Trainer, store: RunStore, report: Report) -> int | None:
    """Go back to the newest whole checkpoint, and drop the rows of later rounds.

    Returns:
        The checkpoint's round; None without one.
    """
    checkpoint = store.load_checkpoint()
    store.require_rest(checkpoint=checkpoint is not None)
    if checkpoint is None:
        store.keep_until(-1)
        return None
    tensors, facts = checkpoint
    trainer.restore(tensors, facts)
    store.keep_until(trainer.round)
    store.require_digests(facts["rows"])
    if store.damaged:
        place = trainer.round / trainer.config.rounds
        text = f"the newest checkpoint is damaged: going on from round {trainer.round}"
        report(Progress(label(trainer.config), place, text))
    return trainer.round


class _Checkpoints:
    """The checkpoints of a run: one every few rounds, and one when it is stopped in between."""

    def __init__(self, trainer: Trainer, store: RunStore) -> None:
        self.trainer, self.store = trainer, store
        self.pending: tuple[dict[str, Tensor], Row] | None = None
        """The state after the last finished round, where it is not on disk."""

    def take(self) -> None:
        """Write the state after a round, or only keep it while the next checkpoint is not due."""
        every, last = self.trainer.execution.checkpoint_every, self.trainer.config.rounds
        tensors, facts = self.trainer.state()
        facts["rows"] = self.store.digests()
        due = self.trainer.round % every == 0 or self.trainer.round == last
        if not due:  # the next round changes the tensors
            tensors = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        self.pending = tensors, facts
        if due:
            self.store.checkpoint(tensors, facts)
            self.pending = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Write what is pending if the run ends on the way, whatever ended it."""
        try:
            yield
        except BaseException:
            if self.pending is not None:
                with suppress(UserError, MemoryError):  # what ended the run is what is told
                    self.store.checkpoint(*self.pending)
            raise


def _rounds(trainer: Trainer, store: RunStore, evaluation: Evaluation, report: Report) -> None:
    """Rounds until the last, each written before its checkpoint."""
    config, text = trainer.config, ""
    checkpoints = _Checkpoints(trainer, store)
    with checkpoints.kept():
        if trainer.round == 0 and evaluation.due() and not store.evaluation:
            report(Progress(label(config), 0.0, "evaluating the base model"))
            text = f"held-out {evaluation.run(store):.3f} {trainer.scorer.unit}"
            checkpoints.take()
        while trainer.round < config.rounds:
            text = _round(trainer, store, evaluation, report, text)
            checkpoints.take()
    report(Progress(label(config), 1.0, text))


def _round(
    trainer: Trainer, store: RunStore, evaluation: Evaluation, report: Report, before: str
) -> str:
    """One round, evaluated if that is due, and written; returns what to show of it."""
    config, done = trainer.config, trainer.round

    def stage(name: str, share: float) -> None:
        place = (done + share) / config.rounds
        report(Progress(label(config), place, f"round {done + 1}/{config.rounds} {before}"))

    try:
        metrics, timing = trainer.train_round(stage)
    except RunError as problem:
        raise RunError(f"Round {done + 1}, seed {config.seed}: {problem}") from problem
    start = time.monotonic()
    if evaluation.due():
        evaluation.run(store)
    store.log(metrics, timing | {"evaluate": round(time.monotonic() - start, 3)})
    return f"reward {metrics['reward_mean']:+.3f} {trainer.scorer.unit}"
