"""What a command line becomes: presets, --set, and the hash that names a run."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from d3po_bench import config, presets, registry
from d3po_bench.config import Execution, RunConfig, make
from d3po_bench.errors import UserError
from d3po_bench.presets import PRESETS

CONFIG = RunConfig(method="d3po", objective="incompress")


def made(**changes: str) -> tuple[RunConfig, Execution]:
    return make("d3po", "incompress", "quick", changes)


def refused(**changes: str) -> str:
    with pytest.raises(UserError) as problem:
        made(**changes)
    assert problem.value.exit_code == 2
    return str(problem.value)


# ---- presets


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_every_method_and_objective(preset: str) -> None:
    for method, objective in product(registry.names("method"), registry.names("objective")):
        run, execution = make(method, objective, preset, {})
        assert (run.method, run.objective) == (method, objective)
        assert execution == Execution()
        common = dict(PRESETS[preset])
        by_method, (of, variant) = common.pop("by_method", {}), registry.variant(method)
        own = {**by_method.get(of, {}), **variant, **by_method.get(method, {})}
        special = common.pop("by_objective", {}).get(objective, {})
        for name, value in {**common, **special, **own}.items():
            assert (run.options[name] if name in run.options else getattr(run, name)) == value


def test_a_variant_is_its_method_with_settings_and_keeps_its_name() -> None:
    run, _ = make("grpo", "incompress", "quick", {})
    same, _ = make(
        "ddpo", "incompress", "quick",
        {"advantage": "group", "shared_noise": "true", "images_per_prompt": "8"},
    )  # fmt: skip
    assert run == replace(same, method="grpo")
    assert run.run_id != same.run_id
    assert config.method_of(run) == config.method_of(same)
    # What the preset has for the variant stands above it, what is asked for above both.
    run, _ = make("reward_weighted_anchor", "incompress", "quick", {"anchor": "3"})
    assert (run.options["anchor"], run.learning_rate) == (3.0, 2.5e-3)
    assert make("d3po_random", "incompress", "paper", {})[0].choices == "random"


def test_images_of_a_round_are_as_many_for_every_method_and_variant() -> None:
    for preset, images in (("quick", 128), ("paper", 160)):
        for name in registry.names("method"):
            run, _ = make(name, "incompress", preset, {})
            own = run.images_per_prompt or config.method_of(run).images_per_prompt
            # A policy gradient of the paper's draws one image of a prompt.
            assert run.prompts_per_round * own == (80 if own == 1 else images), name


def test_a_preset_weighs_no_steps_of_an_own_method_that_learns_from_finished_images(
    tmp_path: Path,
) -> None:
    own = {name: tmp_path / f"own_{name}.py" for name in ("kto", "ddpo")}
    for name, path in own.items():
        path.write_text(f"from baselines.{name} import METHOD\n")
    found = [make(str(path), "incompress", "weighted", {})[0] for path in own.values()]
    assert [run.step_weight for run in found] == ["equal", "inverse"]


def test_what_finished_images_cannot_have_is_refused() -> None:
    for change in ({"window": "2"}, {"step_weight": "inverse"}):
        with pytest.raises(UserError, match="learns from finished images: leave out window and"):
            make("raft", "incompress", "quick", change)
    with pytest.raises(UserError, match=r"window must be from 0 to 5, not 6"):
        make("d3po", "incompress", "quick", {"window": "6"})
    with pytest.raises(UserError, match=r"ddpo compares at least 2 images of each prompt, not 1"):
        make("ddpo", "incompress", "paper", {"choices": "random"})


def test_every_preset_is_described() -> None:
    assert presets.PRESET_SUMMARIES.keys() == PRESETS.keys()


def test_the_paper_preset_is_table_2() -> None:
    run, _ = make("d3po", "incompress", "paper", {})
    assert (run.rounds, run.learning_rate, run.weight_decay) == (400, 3e-5, 1e-4)
    assert (run.sampling_steps, run.guidance, run.lora_rank) == (20, 5.0, 4)


def test_the_official_codes_dpok_has_no_kl() -> None:
    expected: dict[str, dict[str, str]] = {"dpok": {"kl": "none"}, "ddpo": {}}
    for method, options in expected.items():
        assert make(method, "incompress", "official_code", {})[0].options == options


def test_the_official_codes_aesthetic_runs_are_longer_and_of_fewer_pairs() -> None:
    for objective, rounds, prompts in (("aesthetic", 1000, 8), ("compress", 400, 20)):
        run, _ = make("d3po", objective, "official_code", {})
        assert (run.rounds, run.prompts_per_round) == (rounds, prompts)


def test_later_beats_earlier() -> None:
    given = make("d3po", "incompress", "quick", {}, rounds=3)[0]
    assert PRESETS["quick"]["rounds"] != 3
    assert given.rounds == 3
    assert make("d3po", "incompress", "quick", {"rounds": "4"})[0].rounds == 4
    with pytest.raises(UserError, match="rounds is 3 here, so --set rounds=4 cannot change it"):
        make("d3po", "incompress", "quick", {"rounds": "4"}, rounds=3)


# ---- --set


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("rounds", "7", 7),
        ("learning_rate", "1e-3", 1e-3),
        ("learning_rate", "1", 1.0),
        ("optimizer", "adam", "adam"),
        ("prompts", "hand", "hand"),
        ("prompts", "", ""),
        ("full", "true", True),
        ("full", "TRUE", True),
        ("full", "1", True),
        ("full", "false", False),
        ("full", "0", False),
        ("lora_targets", "to_q,to_v", ("to_q", "to_v")),
        ("lora_targets", "to_q, to_v,", ("to_q", "to_v")),
        ("eval_scorers", "", ()),
        ("eval_scorers", "jpeg_size", ("jpeg_size",)),
    ],
)
def test_a_setting_of_each_type(key: str, text: str, value: Any) -> None:
    found = getattr(made(**{key: text})[0], key)
    assert found == value
    assert type(found) is type(value)


def test_settings_of_execution_and_method() -> None:
    changes = {"micro_batch": "3", "compile": "true", "beta": "2", "clip": "none", "skip_ties": "1"}
    run, execution = make("d3po", "incompress", "paper", changes)
    assert execution == Execution(micro_batch=3, compile=True)
    assert run.options == {"beta": 2.0, "clip": "none", "skip_ties": True}
    method = config.method_of(run)
    assert (method.beta, method.clip, method.skip_ties) == (2.0, "none", True)


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("rounds", "1.5", "rounds must be a whole number, not '1.5'"),
        ("rounds", "", "rounds must be a whole number, not ''"),
        ("rounds", "-1", "rounds must be from 1 to 1e+06, not -1"),
        ("learning_rate", "fast", "learning_rate must be a number such as 0.001, not 'fast'"),
        ("learning_rate", "nan", "learning_rate must be a number such as 0.001, not 'nan'"),
        ("learning_rate", "0", "learning_rate must be from 1e-12 to 10, not 0"),
        ("beta", "inf", "beta must be a number such as 0.001, not 'inf'"),
        ("full", "maybe", "full must be true or false, not 'maybe'"),
        ("clip", "both", "clip must be ratio or one_sided or none, not 'both'"),
        ("dtype", "fp8", "dtype must be fp32 or bf16 or fp16, not 'fp8'"),
        ("micro_batch", "-1", "micro_batch must be from 0 to 1e+06, not -1"),
        ("threads", "-1", "threads must be from 0 to 1024, not -1"),
        ("eval_scorers", "jpegsize", "No scorer is called 'jpegsize'. Did you mean 'jpeg_size'"),
        ("learning_rte", "1", "Did you mean 'learning_rate'? See `d3po-bench list --settings`"),
        ("", "1", "No setting is called ''"),
        ("options", "1", "No setting is called 'options'"),
        ("seed", "3", "--set cannot change the seed. Use --seed-start, or seeds of a grid."),
        ("device", "cpu", "--set cannot change the device. Use --device."),
        ("method", "d3po", "--set cannot change the method. Use --method."),
    ],
)
def test_a_wrong_setting_is_refused(key: str, text: str, said: str) -> None:
    assert said in refused(**{key: text})


def test_a_wrong_preset_method_or_objective_is_refused() -> None:
    with pytest.raises(UserError, match="Did you mean 'quick'"):
        make("d3po", "incompress", "quik", {})
    with pytest.raises(UserError, match="Did you mean 'd3po'"):
        make("d3p", "incompress", "quick", {})
    with pytest.raises(UserError, match="Did you mean 'incompress'"):
        make("d3po", "incompres", "quick", {})


def test_ranges_are_closed_on_both_sides() -> None:
    long = replace(CONFIG, sampling_steps=999)
    for name, (low, high) in config._RANGES.items():
        kind = type(getattr(CONFIG, name))
        step = 1 if kind is int else max(abs(high), 1.0) * 1e-3
        for inside in (low, high):
            replace(long, **{name: kind(inside)}).check()
        for outside in (low - step, high + step):
            with pytest.raises(UserError, match=f"^{name} must be from"):
                replace(long, **{name: kind(outside)}).check()


def test_every_number_has_a_range() -> None:
    numbers = {f.name for f in fields(RunConfig) if type(f.default) in (int, float)}
    assert numbers == config._RANGES.keys()


def test_some_steps_are_left_to_train_on() -> None:
    assert made(sampling_steps="7", skip_steps="6")[0].skip_steps == 6
    said = refused(sampling_steps="6", skip_steps="6")
    assert "skip_steps must be from 0 to 5, not 6" in said


def test_a_preset_holds_options_and_fields_of_a_method() -> None:
    run, _ = made()
    assert run.options == PRESETS["quick"]["by_method"]["d3po"]
    assert made(clip_range="0.05")[0].options == {**run.options, "clip_range": 0.05}
    assert run.units_per_update == PRESETS["quick"]["units_per_update"]
    other = make("ddpo", "incompress", "quick", {})[0]
    assert other.units_per_update == 16
    assert other.options == {"minimum": 8, "clip_range": 0.1}
    assert make("ddpo", "incompress", "quick", {"units_per_update": "3"})[0].units_per_update == 3


def test_what_set_can_change() -> None:
    known = config.settings("d3po")
    own = {"method", "objective", "model", "seed", "options", "lora", "sources"}
    assert known["run"].keys() == {f.name for f in fields(RunConfig)} - own
    assert known["execution"].keys() == {f.name for f in fields(Execution)} - {"device"}
    assert {"beta", "clip", "reference"} <= known["options"].keys()
    assert "images_per_prompt" not in known["options"]


# ---- run_id


def another(value: Any) -> Any:
    """A value of the same type that is not `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return (*value, "x")
    return {**value, "beta": 0.2}


def test_run_id_changes_with_every_field() -> None:
    ids = {CONFIG.run_id}
    for f in fields(RunConfig):
        ids.add(replace(CONFIG, **{f.name: another(getattr(CONFIG, f.name))}).run_id)
    assert len(ids) == 1 + len(fields(RunConfig))


def test_run_id_is_stable() -> None:
    assert CONFIG.run_id == replace(CONFIG, seed=0).run_id
    first = replace(CONFIG, options={"beta": 1.0, "clip": "none"})
    assert first.run_id == replace(CONFIG, options={"clip": "none", "beta": 1.0}).run_id


def test_run_id_does_not_change_with_execution() -> None:
    plain, _ = made()
    for f in fields(Execution):
        if f.name != "device":
            run, execution = made(
                **{f.name: "off" if f.name == "deterministic" else str(another(f.default))}
            )
            assert getattr(execution, f.name) != f.default
            assert run.run_id == plain.run_id


def test_the_json_holds_every_field_and_the_id() -> None:
    other = replace(
        CONFIG, sampler="cps", long_prompts="cut", lora="style.safetensors",
        sources={"objective": "reward.py"}, prompts="animals", choices="random", window=2,
        timestep_spacing="log_snr", step_weight="inverse", updates_per_round=4,
        eval_list="geneval", eval_noise=1,
    )  # fmt: skip
    for made, without in ((CONFIG, set(config.LATER)), (other, set())):
        found = json.loads(made.to_json())
        assert found["run_id"] == made.run_id
        assert found.keys() == {f.name for f in fields(RunConfig)} - without | {"run_id"}
        assert RunConfig.from_json(found) == made


@pytest.mark.parametrize("name", ["method", "objective"])
def test_a_name_that_could_lead_elsewhere_is_no_runs(name: str) -> None:
    """A table writes files named after the methods of the runs that it is given."""
    found = json.loads(RunConfig(method="d3po", objective="incompress").to_json())
    with pytest.raises(ValueError, match=rf"has {name} = '\.\./\.\./x', which no run can have"):
        RunConfig.from_json({**found, name: "../../x"})


@pytest.mark.parametrize("method", ["d3po", "preferred_images"])
def test_methods_that_compare_want_two_images_of_a_prompt(method: str) -> None:
    with pytest.raises(
        UserError, match=f"{method} compares at least 2 images of each prompt, not 1"
    ):
        make(method, "incompress", "quick", {"images_per_prompt": "1"})
    assert make("ddpo", "incompress", "quick", {"images_per_prompt": "1"})
