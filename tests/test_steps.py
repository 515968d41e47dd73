"""Which denoising steps are taken, add noise, and count for how much."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from baselines.ddpo import DDPO, Advantages
from d3po_bench.config import Execution, RunConfig
from d3po_bench.diffusion.gaussian import Gaussian
from d3po_bench.diffusion.policy import Policy
from d3po_bench.diffusion.process import RectifiedFlow, VariancePreserving, even_levels
from d3po_bench.diffusion.sampling import Draws, sample
from d3po_bench.diffusion.seeding import stream
from d3po_bench.diffusion.update import Updates, update
from d3po_bench.errors import UserError
from d3po_bench.training.tools import EvaluationSet
from d3po_bench.types import Metrics
from eval.measure import evaluate
from tests.points import Points
from tests.rounds import KeepGradient, trainer_of

LU = DPMSolverMultistepScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_lu_lambdas=True
)
SD15 = VariancePreserving(LU.alphas_cumprod)


def points() -> Points:
    found = Points(torch.device("cpu"))
    found.process = SD15
    found.add_adapter(0)
    return found


# ---- levels


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [5, 10, 20])
def test_even_steps_in_log_snr_are_those_of_diffusers(steps: int) -> None:
    LU.set_timesteps(steps + 1)
    assert even_levels(SD15, steps).tolist() == LU.timesteps.tolist()


@pytest.mark.parametrize(("process", "steps"), [(SD15, 50), (SD15, 999), (RectifiedFlow(), 20)])
def test_each_level_is_there_once_whatever_the_number_of_steps(process: Any, steps: int) -> None:
    levels = even_levels(process, steps)
    assert len(levels) == steps + 1
    assert (levels.diff() < 0).all()
    assert torch.isin(levels, process.training_levels).all()


def test_more_steps_than_levels_are_refused() -> None:
    with pytest.raises(UserError, match=r"has 998 steps at most\. Use --set sampling_steps=998"):
        even_levels(RectifiedFlow(), 999)  # at s = 1 there is no signal, so no logarithm


def test_no_even_step_is_far_more_sensitive_than_another() -> None:
    shares = {}
    for spacing in ("model", "log_snr"):
        policy = Policy(points(), steps=20, guidance=1.0, timestep_spacing=spacing)
        squares = policy.sensitivity.square()
        shares[spacing] = float(squares.max() / squares.sum())
    assert shares["model"] == pytest.approx(0.73, abs=0.005)
    assert shares["log_snr"] == pytest.approx(0.06, abs=0.005)


class Watching(Points):
    """Remembers the levels that it was asked about."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.process, self.seen = SD15, set[int]()

    def output(self, x: Tensor, s: Tensor, *given: Any, **named: Any) -> Tensor:
        self.seen |= {*s.tolist()}
        return super().output(x, s, *given, **named)


def test_an_evaluation_takes_the_steps_of_training() -> None:
    model = Watching()
    what = EvaluationSet(prompts=["a"], steps=5, guidance=1.0, timestep_spacing="log_snr",
                         untrained=True)  # fmt: skip
    evaluate(model, what, {})
    assert model.seen == {999, 757, 413, 103, 11}


# ---- weights


@pytest.mark.parametrize("spacing", ["model", "log_snr"])
def test_the_sensitivity_is_the_root_of_the_ratio_of_snrs_less_one(spacing: Any) -> None:
    policy = Policy(points(), steps=10, guidance=1.0, timestep_spacing=spacing)
    there = policy.levels[1:] if spacing == "log_snr" else SD15.ends(10)
    (a, b), (a_next, b_next) = SD15.squares(policy.levels[:-1]), SD15.squares(there)
    ratio = (a_next / b_next) / (a / b)
    torch.testing.assert_close(policy.sensitivity, (ratio - 1).sqrt(), rtol=1e-9, atol=0)


def test_the_sensitivity_is_the_slope_of_the_log_density() -> None:
    policy = Policy(points(), steps=10, guidance=1.0)
    output = torch.zeros(10, 3, dtype=torch.float64, requires_grad=True)
    z = torch.randn(10, 3, dtype=torch.float64, generator=stream(0, "rows"))
    mean = policy.table.output.unsqueeze(1) * output
    drawn = (mean + policy.table.std.unsqueeze(1) * z).detach()
    Gaussian(mean, policy.table.std).log_prob(drawn).sum().backward()
    assert output.grad is not None
    slope = 3 * output.grad / z  # the log-density is a mean over three elements
    torch.testing.assert_close(slope.abs(), policy.sensitivity.unsqueeze(1).expand(-1, 3))


def rows_of(policy: Policy) -> Advantages:
    drawn = sample(policy, ["a", "bb"], Draws(seed=0, round=0), images_per_prompt=2)
    judged = replace(drawn, scores=torch.tensor([[1.0, 2.0], [4.0, 3.0]]))
    return DDPO(buffer=0).rows(judged, stream(0, "rows"))


def slope(policy: Policy, step: int) -> Tensor:
    """Gradient of the loss of one step."""
    policy.model.trainable()["shift"].grad = None
    loss, _ = DDPO().loss(policy, rows_of(policy).take(torch.tensor([1]), torch.tensor([step])))
    loss.backward()
    found = policy.model.trainable()["shift"].grad
    assert found is not None
    return torch.cat([loss.detach().view(1), found])


def test_an_inverse_weight_divides_the_gradient_of_a_step_and_not_its_loss() -> None:
    plain, weighted = (
        Policy(points(), steps=5, guidance=1.0, step_weight=kind) for kind in ("equal", "inverse")
    )
    for step in (0, 3, 4):
        before, after = slope(plain, step), slope(weighted, step)
        assert before[1:].norm() > 0
        assert after[0] == before[0]
        w = float(plain.sensitivity[step])
        torch.testing.assert_close(after[1:], before[1:] / w, rtol=1e-4, atol=0)


# ---- windows


def test_outside_its_window_a_policy_follows_the_ode() -> None:
    policy, ode = (Policy(points(), steps=5, guidance=1.0, eta=eta) for eta in (1.0, 0.0))
    whole = policy.table.std.clone()
    policy.add_noise_in(range(1, 3))
    drawn = sample(policy, ["a"], Draws(seed=0, round=0), images_per_prompt=3)
    quiet = (drawn.latents[:, :, 1:] == drawn.means).flatten(3).all(3)[0]
    assert quiet.tolist() == [[True, False, False, True, True]] * 3
    x, step = drawn.latents[0, :, 3], torch.full((3,), 3)
    conditions = drawn.conditions.repeat(3)
    assert torch.equal(policy.step(x, step, conditions).mean, ode.step(x, step, conditions).mean)
    policy.add_noise_in(range(5))
    assert torch.equal(policy.table.std, whole)


class Watched(DDPO):
    """Remembers which steps it was asked for."""

    seen: list[int] = []  # noqa: RUF012

    def loss(self, policy: Any, items: Advantages) -> tuple[Tensor, Metrics]:
        self.seen.extend(items.step.tolist())
        return super().loss(policy, items)


def test_a_window_is_placed_anew_in_each_round_and_trained_on_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = RunConfig(
        method="ddpo", objective="incompress", model=str(Path(__file__).with_name("points.py")),
        sampling_steps=8, skip_steps=2, window=2, prompts_per_round=2, images_per_prompt=2,
        eval_scorers=(),
    )  # fmt: skip
    trainer = trainer_of(config, Execution())
    monkeypatch.setattr(trainer, "method", Watched())
    windows = []
    for _ in range(12):
        Watched.seen.clear()
        trainer.train_round(lambda share: None)
        windows.append(tuple(sorted({*Watched.seen})))
    assert {b - a for a, b in windows} == {1}
    assert {a for a, _ in windows} == {0, 1, 2, 3, 4}  # 6 and 7 are left out


# ---- gradients by step


def test_the_gradient_of_each_step_is_measured_and_changes_nothing() -> None:
    policy = Policy(points(), steps=5, guidance=1.0)
    rows = rows_of(policy)
    kept, found = [], {}
    for measured in (False, True):
        optimizer = KeepGradient(policy.model)
        spent = policy.model.forwards
        updates = Updates(units=4, skip=1, micro_batch=3, step_gradients=measured)
        found = update(policy, DDPO(), rows, optimizer, updates, stream(0, "shuffle"))
        kept.append((optimizer.kept.tolist(), policy.model.forwards - spent))
    assert kept[0] == kept[1]
    assert [name for name in found if "/" in name] == [f"grad_norm/{i}" for i in range(4)]
    for step in range(4):
        policy.model.trainable()["shift"].grad = None
        items = rows.take(torch.arange(4), torch.full((4,), step))
        DDPO().loss(policy, items)[0].backward()
        expected = policy.model.trainable()["shift"].grad
        assert expected is not None
        assert found[f"grad_norm/{step}"] == pytest.approx(float(expected.norm()), rel=1e-4)
