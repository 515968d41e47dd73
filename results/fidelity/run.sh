#!/usr/bin/env bash
# One difference between paper and code at a time, on the embedded model: the runs behind the table
# of docs/fidelity.md. With d3po-bench installed, from the project's root:
#   bash results/fidelity/run.sh runs/fidelity && python results/publish.py runs/fidelity results/fidelity --no-figures
# An interrupted call goes on where it was.
set -euo pipefail
out=${1:-runs/fidelity}
try() { # NAME METHOD SETTING ...
    local name=$1 method=$2 settings=()
    shift 2
    for setting in "$@"; do settings+=(--set "$setting"); done
    d3po-bench run --method "$method" --objective incompress --seed-start 200 --seeds 3 \
        --set eval_every=12 "${settings[@]}" --out "$out/$name"
}
try default d3po
try joint d3po log_prob=sum beta=76.8
try no-clip d3po clip=none
try one-sided-clip d3po clip=one_sided
try reference-sampling d3po reference=sampling
try update-per-timestep d3po update_every=timestep
try own-noise d3po shared_noise=false
try two-images d3po pairs=all images_per_prompt=2 prompts_per_round=64 units_per_update=8
try adam d3po optimizer=adam
try one-of-two-copies d3po prompts_per_round=8 units_per_update=1
try dpok-gaussian dpok
try dpok-noise-mse dpok kl=noise_mse
try dpok-none dpok kl=none
try dpok-fast dpok learning_rate=6e-3
try ddpo-clip ddpo clip_range=1e-4
try ddpo-batch-wise ddpo buffer=0
