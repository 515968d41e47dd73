"""Named settings to start a run from."""

from __future__ import annotations

from typing import Any

_SIXTEEN = {"units_per_update": 16}
"""As many images in an update as D3PO samples for one."""

_EACH_IMAGE = {**_SIXTEEN, "minimum": 8}
"""8 of a prompt are enough to compare."""


_OF_TWO = {"prompts_per_round": 64, "units_per_update": 8}
"""As many images in a round and in an update as with the preset's eight of a prompt."""


def _as_many(prompts: int, images: int) -> dict[str, dict[str, int]]:
    """For variants with eight images of a prompt, as many images in a round as D3PO draws.

    Args:
        prompts: of a round.
        images: in an update, for methods whose units are images.
    """
    eight, units = {"prompts_per_round": prompts}, {"units_per_update": images}
    return {
        "grpo": eight | units, "awm": eight | units, "raft": eight | {"units_per_update": 1},
        "d3po_best_of_k": eight | {"units_per_update": 1},
    }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "rounds": 12,
        "prompts_per_round": 16,
        "images_per_prompt": 8,
        "sampling_steps": 10,
        "skip_steps": 5,
        "timestep_fraction": 0.8,
        "units_per_update": 2,
        "learning_rate": 2.5e-3,
        "eval_every": 4,
        "eval_images": 1,
        "eval_scorers": ("animal",),
        "by_method": {
            "d3po": {"pairs": "extremes", "clip_range": 0.2},
            "ddpo": {**_EACH_IMAGE, "clip_range": 0.1},
            "dpok": {**_EACH_IMAGE, "clip_range": 0.1, "kl_weight": 0.03},
            "reward_weighted": {
                **_EACH_IMAGE,
                "skip_steps": 0,
                "timestep_fraction": 0.5,
                "learning_rate": 4e-4,
            },
            "preferred_images": {"skip_steps": 0, "timestep_fraction": 1.0, "learning_rate": 4e-4},
            "diffusion_dpo": {
                "skip_steps": 0,
                "timestep_fraction": 1.0,
                "pairs": "extremes",
                "learning_rate": 4e-4,
            },
            "kto": {
                **_SIXTEEN,
                "skip_steps": 0,
                "timestep_fraction": 0.5,
                "learning_rate": 4e-4,
            },
            "d3po_of_two": _OF_TWO,
            "preferred_of_two": _OF_TWO,
            "dpok_value": {"value_rate": 1e-3, "value_steps": 40},
            "reward_weighted_anchor": {"inverse_temperature": 2.0, "learning_rate": 2.5e-3},
            "awm": {"learning_rate": 2.5e-3},
        },
    },
    "paper": {
        "prompts_per_round": 80,
        "units_per_update": 4,
        "dtype": "fp16",
        "lora_targets": ("to_q", "to_k", "to_v"),
        "eval_scorers": ("clip", "diversity"),
        # Images of four pairs.
        "by_method": {"reward_weighted": {"units_per_update": 8}, **_as_many(20, 8)},
    },
    "official_code": {
        "prompts_per_round": 20,
        "units_per_update": 1,
        "dtype": "fp16",
        "by_method": {
            "dpok": {"kl": "none"},  # its KL is exactly 0
            "reward_weighted": {"units_per_update": 2},  # images of a pair
            **_as_many(5, 2),
        },
        "by_objective": {"aesthetic": {"rounds": 1000, "prompts_per_round": 8}},
    },
}
"""`by_method` and `by_objective` hold what differs between them: options of the method, or fields
of RunConfig as the rest. What it has for a variant stands above the variant's own.

quick: minutes on a laptop, for the embedded model. alignment: the same for Table 1, in five steps,
with which the embedded model makes mistakes to unlearn. paper: Table 2 on synchronised
devices. official_code: what one of the published code's devices runs."""

_FINISHED = {"step_weight": "equal", "timestep_fraction": 1.0, "updates_per_round": 2}
"""Methods that learn from finished images have no steps to weigh."""

_REWARDED = {
    "learning_rate": 9.43e-4, "updates_per_round": 4, "shared_noise": True, "clip_range": 0.339,
    "minimum": 8,
}  # fmt: skip

PRESETS["weighted"] = {
    "rounds": 16,
    "prompts_per_round": 4,
    "images_per_prompt": 8,
    "sampling_steps": 10,
    "guidance": 1.0,
    "step_weight": "inverse",
    "timestep_fraction": 0.8,
    "updates_per_round": 16,
    "learning_rate": 7.5e-4,
    "eval_every": 4,
    "eval_images": 1,
    "eval_scorers": ("animal",),
    "by_method": {
        "d3po": {"pairs": "extremes", "shared_noise": True, "clip_range": 0.0547},
        "d3po_of_two": {"prompts_per_round": 16, "learning_rate": 5.3e-4},
        "d3po_random": {
            "prompts_per_round": 16, "images_per_prompt": 2, "pairs": "all",
            "learning_rate": 5.3e-4,
        },
        "ddpo": _REWARDED,
        "dpok": {**_REWARDED, "kl_weight": 3.65e-3},
        "dpok_value": {
            "prompts_per_round": 16, "images_per_prompt": 2, "shared_noise": False,
            "learning_rate": 7.5e-3, "updates_per_round": 1, "clip_range": 0.0152,
            "kl_weight": 8.66e-3, "value_rate": 2.37e-4, "value_steps": 40,
        },
        "reward_weighted": {
            **_FINISHED, "learning_rate": 3.77e-4, "inverse_temperature": 4.18, "minimum": 8,
            "shared_noise": False,
        },
        "reward_weighted_anchor": {
            "learning_rate": 8.06e-3, "updates_per_round": 4, "timestep_fraction": 0.5,
            "inverse_temperature": 0.31, "anchor": 3.36, "shared_noise": True,
        },
        "awm": {
            "learning_rate": 1.5e-3, "updates_per_round": 16, "inverse_temperature": 1.0,
            "anchor": 0.184, "shared_noise": True,
        },
        "preferred_images": {**_FINISHED, "learning_rate": 3.77e-4, "shared_noise": False},
        "preferred_of_two": {"prompts_per_round": 16},
        "raft": {"learning_rate": 2.98e-4, "updates_per_round": 8, "timestep_fraction": 0.25},
        "diffusion_dpo": {**_FINISHED, "pairs": "extremes", "learning_rate": 4e-4},
        "kto": {**_FINISHED, "timestep_fraction": 0.5, "learning_rate": 4e-4},
    },
}  # fmt: skip
"""What the published search chose for `tiny2`, but for the steps: all of them, weighted. Three
rows were not searched: diffusion_dpo, kto and preferred_of_two."""

PRESETS["alignment"] = PRESETS["quick"] | {
    "sampling_steps": 5,
    "skip_steps": 2,
    "timestep_fraction": 1.0,
    "by_method": {
        # 128 images are all of a round: one update, whether a unit is an image or a pair.
        method: {**own, "units_per_update": 128}
        for method, own in PRESETS["quick"]["by_method"].items()
    },
}


PRESET_SUMMARIES = {
    "quick": "minutes on one core, for the embedded model",
    "weighted": "minutes on one core, for its second version: steps weighted by 1/w, gentler rates",
    "alignment": "quick with five steps and one update a round, for Table 1 on the embedded model",
    "paper": "Table 2: 80 pairs a round, 400 rounds, lr 3e-5, LoRA on q, k, v",
    "official_code": "one device of the published code: 20 pairs, one pair per update",
}

ELSEWHERE = {
    "lr": "learning_rate", "batch_size": "units_per_update", "steps": "sampling_steps",
    "num_inference_steps": "sampling_steps", "num_steps": "sampling_steps", "cfg": "guidance",
    "cfg_scale": "guidance", "guidance_scale": "guidance", "epochs": "rounds",
    "num_epochs": "rounds", "rank": "lora_rank", "alpha": "lora_alpha", "wd": "weight_decay",
    "grad_clip": "max_grad_norm", "precision": "dtype", "mixed_precision": "dtype",
    "eval_freq": "eval_every", "target_modules": "lora_targets", "num_images": "images_per_prompt",
}  # fmt: skip
"""What other programs call a setting -> what it is called here."""
