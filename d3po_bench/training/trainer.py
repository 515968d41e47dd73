"""Trainer: a model, a method and an experience, and the rounds between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from d3po_bench.config import Execution, RunConfig, method_of
from d3po_bench.diffusion import parallel
from d3po_bench.diffusion.advantages import MOST_KEPT
from d3po_bench.diffusion.finite import require_finite
from d3po_bench.diffusion.gaussian import Gaussian
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.preferences import shuffled
from d3po_bench.diffusion.sampling import images_used, needs_chain, with_reference
from d3po_bench.diffusion.seeding import stream
from d3po_bench.diffusion.update import Updates, require_own_names, update
from d3po_bench.errors import RunError
from d3po_bench.experience import Experience
from d3po_bench.experience.on_policy import OnPolicy
from d3po_bench.models import start
from d3po_bench.models.adapters import DiffusersModel, Training
from d3po_bench.models.sources import fingerprint, load, model_source
from d3po_bench.prompts import digest
from d3po_bench.runs.files import Row
from d3po_bench.training.evaluation import Evaluation
from d3po_bench.training.inputs import eval_digest, method_digest
from d3po_bench.training.listeners import Listener
from d3po_bench.training.sizes import watched
from d3po_bench.types import Model, Rollout

TRIED_TOGETHER = 1024
"""Prompts that are encoded at a time before the first round: data sets have a hundred thousand."""


def training_of(config: RunConfig, execution: Execution) -> Training:
    """What trains and how it is computed, as a config says it."""
    return Training(
        dtype=config.dtype,
        full=config.full,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha or None,
        lora_targets=config.lora_targets,
        long_prompts=config.long_prompts,
        gradient_checkpointing=execution.gradient_checkpointing,
        channels_last=execution.channels_last,
        compile=execution.compile,
        decode_batch=execution.decode_batch,
    )


def compute_as(model: Model, config: RunConfig, execution: Execution) -> None:
    """Let a model that is loaded compute as much at a time as these settings say.

    Args:
        model: of the config; a family of somebody's own computes as it does.
        config: of the run.
        execution: with batches that are chosen.
    """
    if isinstance(model, DiffusersModel):
        model.training = training_of(config, execution)
        if execution.gradient_checkpointing:
            model.network.enable_gradient_checkpointing()


class Trainer:
    """A model, a method and an experience, and the rounds between them."""

    def __init__(
        self,
        config: RunConfig,
        execution: Execution,
        experience: Experience,
        device: torch.device,
    ) -> None:
        """Load the model that the config names; nothing is written yet.

        Raises:
            UserError: the model does not load, or its sampler leaves nothing to train.
        """
        self.config, self.execution, self.experience = config, execution.usual(), experience
        self.device = device
        self.method = method_of(config)
        source = model_source(config.model)
        self.model = load(source, device, training_of(config, self.execution))
        # Once it has loaded: what is no model may be a folder of any size.
        self.inputs = {"model": fingerprint(source), "prompts": digest(experience.prompts)}
        if self.model.commit:
            self.inputs["model_commit"] = self.model.commit
        asked = list(dict.fromkeys([*experience.prompts, ""]))
        for first in range(0, len(asked), TRIED_TOGETHER):
            self.model.encode(asked[first : first + TRIED_TOGETHER])
        self.inputs |= start.digest(config.lora) | method_digest(config) | eval_digest(config)
        start.begin(self.model, config.seed, config.lora)
        self.policy = Policy(
            self.model,
            steps=config.sampling_steps,
            eta=config.eta,
            guidance=config.guidance,
            sampler=config.sampler,
            timestep_spacing=config.timestep_spacing,
            step_weight=config.step_weight,
        )
        self.trained = range(config.sampling_steps - config.skip_steps)
        """The steps that are trained on, in this round."""
        if needs_chain(self.method):
            self.policy.require_noise(len(self.trained))
        self.optimizer = self._optimizer()
        scaled = config.dtype == "fp16"
        self.scaler = torch.amp.GradScaler(device.type) if scaled else None
        if experience.initial is not None:
            self.model.load_trainable(experience.initial)
        self.pairs = 0
        self.history: dict[str, list[float]] = {}
        self.memory: dict[str, Tensor] = {}
        self.round = 0

    def _optimizer(self) -> torch.optim.Optimizer:
        c = self.config
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[c.optimizer]
        optimizer: torch.optim.Optimizer = kind(
            list(self.model.trainable().values()),
            lr=c.learning_rate,
            betas=(c.adam_beta1, c.adam_beta2),
            eps=c.adam_epsilon,
            weight_decay=c.weight_decay,
            # One kernel for all weights; its rounding is another, so not where bytes are published.
            **({"fused": True} if self.device.type == "cuda" else {}),
        )
        return optimizer

    def take(self, execution: Execution) -> None:
        """Compute as much at a time as these settings say, from now on.

        Args:
            execution: with batches that are chosen.
        """
        self.execution = execution
        if isinstance(self.experience, OnPolicy):
            self.experience.batch = execution.sample_batch
            self.experience.decode_batch = execution.decode_batch
        compute_as(self.model, self.config, execution)

    def train(self, evaluation: Evaluation, listeners: Sequence[Listener], measured: bool) -> None:
        """Rounds until the last.

        Args:
            evaluation: of held-out prompts.
            listeners: hear of what happens.
            measured: whether the base model was evaluated before.

        Raises:
            RunError: something is not finite, with round and seed.
        """
        try:
            if self.round == 0 and not measured:
                self._evaluate(evaluation, listeners)
            while self.round < self.config.rounds:
                done = self.round

                def working(share: float, done: int = done) -> None:
                    for listener in listeners:
                        listener.working(done, share)

                working(0)  # from now on it takes time
                try:
                    metrics, timing = self.train_round(working)
                except RunError as problem:
                    where = f"Round {done + 1}, seed {self.config.seed}"
                    raise RunError(f"{where}: {problem}") from problem
                start = time.monotonic()
                self._evaluate(evaluation, listeners)
                timing["evaluate"] = round(time.monotonic() - start, 3)
                for listener in listeners:
                    listener.round(metrics, timing)
        except BaseException:
            for listener in listeners:
                listener.stopped()
            raise
        for listener in listeners:
            listener.finished()

    def _evaluate(self, evaluation: Evaluation, listeners: Sequence[Listener]) -> None:
        def working(share: float) -> None:
            for listener in listeners:
                listener.evaluating(self.round, share)

        if evaluation.due(self.round):
            working(0)
            with watched("evaluate", self.execution):
                found = evaluation(self.model, self.round, working)
            for listener in listeners:
                listener.evaluated(self.round, found)

    # ---- a round

    def train_round(self, working: Callable[[float], None]) -> tuple[Row, Row]:
        """Collect and learn: the round's line of metrics and its seconds by stage.

        Args:
            working: called with the share of the round that is done.
        """
        seconds: dict[str, float] = {}
        began = time.process_time()
        before = self.model.forwards, self.model.backwards

        def stage(name: str) -> AbstractContextManager[None]:
            return _timed(seconds, name, self.execution)

        if self.config.window:
            self._place_window()
        rollout = self.experience.collect(
            self.policy, self.round, stage, lambda share: working(share / 2)
        )
        if self.config.choices == "random":
            rng = stream(self.config.seed, "choices", self.round)
            rollout = replace(rollout, scores=shuffled(rollout.scores, rng))
        rollout = replace(rollout, history=self.history, memory=self.memory)
        with stage("reference"):
            from_base = self.experience.initial is None and not self.config.lora
            untrained = self.round == 0 and from_base
            rollout = with_reference(
                self.policy, rollout, self.method, untrained=untrained,
                batch=self.execution.reference_batch, skip=self.policy.steps - self.trained.stop,
            )  # fmt: skip
        # Before the method sees them, which may write into them.
        measured = self._measured(rollout)
        with stage("update"):
            learned = self._learn(rollout, working)
            self._agree(before)
        self.round += 1
        metrics = {"round": self.round, **self._spent(), **measured}
        require_own_names(self.config.method, learned, metrics)
        seconds["cpu"] = sum(parallel.gather(time.process_time() - began))
        timing = {"round": self.round, **{k: round(v, 3) for k, v in seconds.items()}}
        return {**metrics, **learned}, timing

    def _place_window(self) -> None:
        """Choose the steps that add noise and are trained on in this round, for all its images."""
        places = self.config.sampling_steps - self.config.skip_steps - self.config.window + 1
        rng = stream(self.config.seed, "window", self.round)
        start = int(torch.randint(places, (), generator=rng))
        self.trained = range(start, start + self.config.window)
        self.policy.add_noise_in(self.trained)

    def _measured(self, rollout: Rollout) -> dict[str, float]:
        scores = rollout.scores * self.experience.objective.sign
        found = {
            "score_mean": float(scores.mean()),
            "score_std": float(scores.std(correction=0)),
            "reward_mean": float(rollout.scores.mean()),
        }
        found |= {f"score/{name}": mean for name, mean in self.experience.part_means.items()}
        drift = {"kl": self._kl(rollout)} if self.method.reference == "pretrained" else {}
        return found | drift

    def _learn(self, rollout: Rollout, working: Callable[[float], None]) -> dict[str, float]:
        c = self.config
        scores = rollout.scores.tolist()  # as they are before the method may write into them
        rows = self.method.rows(rollout, stream(c.seed, "rows", self.round))
        self.pairs += len(rows)
        for prompt, rewards in zip(rollout.prompts, scores, strict=True):
            self.history[prompt] = (self.history.get(prompt, []) + rewards)[-MOST_KEPT:]
        updates = Updates(
            units=c.units_per_update,
            timestep_fraction=c.timestep_fraction,
            skip=rollout.steps - self.trained.stop,
            first=self.trained.start,
            count=c.updates_per_round,
            every=c.update_every,
            passes=c.passes,
            micro_batch=self.execution.micro_batch,
            max_grad_norm=c.max_grad_norm,
            step_gradients=self.execution.step_gradients,
        )
        return update(
            self.policy, self.method, rows, self.optimizer, updates,
            stream(c.seed, "shuffle", self.round), self.scaler,
            progress=lambda share: working(0.5 + share / 2),
        )  # fmt: skip

    def _agree(self, before: tuple[int, int]) -> None:
        """Add up what the ranks spent of the network since `before`, and see to equal weights.

        Raises:
            RunError: the ranks have come to different weights.
        """
        if parallel.world() == 1:
            return
        weights = torch.stack([p.detach().double().sum() for p in self.model.trainable().values()])
        spent = self.model.forwards - before[0], self.model.backwards - before[1]
        found = parallel.gather((*spent, weights.cpu().numpy().tobytes()))
        self.model.forwards = before[0] + sum(forwards for forwards, _, _ in found)
        self.model.backwards = before[1] + sum(backwards for _, backwards, _ in found)
        if len({digest for _, _, digest in found}) > 1:
            raise RunError(
                "The ranks have come to different weights, so one of them computes otherwise. "
                "Use devices of one kind with --deterministic, or a single rank."
            )

    def _spent(self) -> Row:
        return {
            "pairs": self.pairs,
            **self.experience.counts,
            "unet_forwards": self.model.forwards,
            "unet_backwards": self.model.backwards,
        }

    def _kl(self, rollout: Rollout) -> float:
        """KL of a step to the pretrained model, mean over the images and steps trained on."""
        if rollout.reference is None:
            raise ValueError("the rollout carries no reference")
        used = images_used(self.method, rollout)
        steps = slice(self.trained.start, self.trained.stop)
        std = self.policy.table.std[steps].float().to(rollout.means.device)
        means = (m[used][:, steps] for m in (rollout.means, rollout.reference))
        ours, theirs = (m.flatten(0, 1) for m in means)
        kl = Gaussian(ours, std.repeat(int(used.sum()))).kl(theirs)
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
        names = enumerate(self.model.trainable())
        state = {i: {k: v[name] for k, v in parts.items() if name in v} for i, name in names}
        # It knows which of these belong on the device: a fused optimizer counts its steps there.
        self.optimizer.load_state_dict({
            **self.optimizer.state_dict(), "state": {i: kept for i, kept in state.items() if kept}
        })  # fmt: skip
        self.round = facts["round"]
        self.pairs = facts["pairs"]
        for name in self.experience.counts:
            self.experience.counts[name] = facts[name]
        self.model.forwards, self.model.backwards = facts["unet_forwards"], facts["unet_backwards"]
        if self.scaler is not None:
            self.scaler.load_state_dict(facts["scaler"])


@contextmanager
def _timed(seconds: dict[str, float], stage: str, execution: Execution) -> Iterator[None]:
    start = time.monotonic()
    with parallel.at(stage), watched(stage, execution):
        yield
    seconds[stage] = time.monotonic() - start
