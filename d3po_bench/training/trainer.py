"""Trainer: a model, a method and an objective, and the rounds between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from d3po_bench import registry
from d3po_bench.config import Execution, RunConfig, method_of
from d3po_bench.diffusion.finite import require_finite
from d3po_bench.diffusion.gaussian import Gaussian
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.sampling import Draws, learnt_images, sample, with_reference
from d3po_bench.diffusion.seeding import stream
from d3po_bench.diffusion.update import Updates, update
from d3po_bench.errors import RunError
from d3po_bench.launch.devices import device_of
from d3po_bench.models.sources import fingerprint, model_source
from d3po_bench.models.stable_diffusion import Training, load
from d3po_bench.prompts import digest, read_prompts
from d3po_bench.runs.files import Row
from d3po_bench.types import Rollout

HISTORY = 64
"""Rewards of each prompt that are kept from round to round."""


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


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - start
