#!/usr/bin/env bash
# Every try behind the preset `quick`, in the order they were made, each run to its end (many were
# stopped early: see the table). With d3po-bench installed, from the project's root:
# bash results/tiny/quick-search/run.sh [OUT]
set -euo pipefail
out=${1:-runs/search}
seed=100
try() { # NAME SETTING ...
    local name=$1 settings=()
    shift
    for setting in "$@"; do settings+=(--set "$setting"); done
    d3po-bench run --method d3po --objective "${objective:-incompress}" --seed-start "$seed" \
        --set rounds=12 --set skip_steps=0 --set clip_range=0.1 --set learning_rate=3e-3 \
        --set timestep_fraction=0.5 --set units_per_update=4 --set eval_every=12 \
        "${settings[@]}" --out "$out/$name"
}
try ref-sampling-u8 reference=sampling units_per_update=8
try ref-sampling-u4 reference=sampling
try u4
try ref-sampling-u8-lr6 reference=sampling units_per_update=8 learning_rate=6e-3
try five-steps sampling_steps=5 timestep_fraction=1 units_per_update=8 rounds=16
try u4-all-steps timestep_fraction=1 rounds=10
try u4-lr5 learning_rate=5e-3
try u2 units_per_update=2
try u4-clip003 clip_range=0.03
seed=101
try u4-seed101
seed=100
try skip2-lr2 skip_steps=2 learning_rate=2e-3
try skip4 skip_steps=4 timestep_fraction=0.67
try skip4-lr5 skip_steps=4 timestep_fraction=0.67 learning_rate=5e-3
try skip6-12 skip_steps=6 timestep_fraction=1
try skip4-lr4-ref-sampling skip_steps=4 timestep_fraction=0.67 learning_rate=4e-3 reference=sampling
try skip4-lr4-clip3 skip_steps=4 timestep_fraction=0.67 learning_rate=4e-3 clip_range=0.3
try skip6 skip_steps=6 timestep_fraction=1 rounds=14 eval_every=14
chosen=(skip_steps=5 timestep_fraction=0.8 learning_rate=2.5e-3 clip_range=0.2)
seed=101
try skip5-lr25-clip2 "${chosen[@]}" rounds=14 eval_every=14
for seed in 0 1 2 3; do # published seeds: 2 and 3 were stopped after 5 rounds
    try quick-14-rounds "${chosen[@]}" rounds=14 eval_every=3 eval_scorers=animal
done
seed=100
try skip6-clip3 skip_steps=6 timestep_fraction=1 clip_range=0.3 rounds=16 eval_every=8
try skip7-clip3 skip_steps=7 timestep_fraction=1 clip_range=0.3 rounds=16 eval_every=8
objective=compress try quick-compress "${chosen[@]}" rounds=24 eval_every=6
