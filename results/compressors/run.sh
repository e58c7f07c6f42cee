#!/bin/bash
# Three seeds of each compressor, and one checkpoint for every k against one for each, with equal budgets: nbs/results/compressors.ipynb.
# An any-k run draws k from 1, 4, 16, 16; so its 400 steps are 100, 100 and 200 of the three, which is what the fixed ones get.
# whole16 gives all 400 steps to k = 16: what sharing costs the k that matters most.
# Trainings can be interrupted and go on. On one CPU core about ten minutes for an any-k run; SEEDS="1 2" makes some of them only.
# usage: results/compressors/run.sh DATA RUNS     DATA holds text/ (nbs/recipes/pocket.ipynb says which files), RUNS gets the checkpoints
set -euo pipefail
D=$1 R=$2 O=results/compressors/regeneration.jsonl
old=$D/text/arxiv_2017_2019.jsonl.xz new=$D/text/arxiv_2025.jsonl.xz

learn() { # name, steps, then options
    local out=$R/$1 steps=$2; shift 2
    [ -f $out/trained.safetensors ] && return
    promptcompress train --stage pretrain --bf16 --data $old --limit 60000 --length 16 96 --lr 2e-3 --steps $steps --out $out $([ -d $out ] && echo --resume) "$@"
}
for seed in ${SEEDS:-0 1 2}; do
    learn kv-$seed 400 --carrier kv --train-k 1 4 16 16 --seed $seed
    learn embeds-$seed 400 --carrier embeds --train-k 1 4 16 16 --seed $seed
    learn only16-$seed 200 --carrier kv -k 16 --train-k 16 --seed $seed
    learn whole16-$seed 400 --carrier kv -k 16 --train-k 16 --seed $seed
    learn only4-$seed 100 --carrier kv -k 4 --train-k 4 --seed $seed
    learn only1-$seed 100 --carrier kv -k 1 --train-k 1 --seed $seed
    measure() { promptcompress evaluate regenerate --data arxiv=$new --length 96 -n 200 --check-leakage $old --batch 50 --json $O "$@"; }
    measure --maker 500x icae -k 16 4 1 --compressor 500x=$R/kv-$seed icae=$R/embeds-$seed
    for k in 16 4 1; do measure --maker 500x -k $k --compressor 500x=$R/only$k-$seed; done
    measure --maker 500x -k 16 --compressor 500x=$R/whole16-$seed
done
