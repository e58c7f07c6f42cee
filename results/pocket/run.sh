#!/bin/bash
# What stage 1 alone can do, for nbs/results/pocket_training.ipynb; what ships has had stage 2, and results/evaluation/run.sh measures that on the same texts and questions.
# usage: results/pocket/run.sh DATA RUNS     RUNS of results/pocket/train.sh
set -euo pipefail
D=$1 R=$2 O=results/pocket
new=$D/text/arxiv_2025.jsonl.xz
train="$D/text/arxiv_2017_2019.jsonl.xz $D/text/wikipedia_en.jsonl.xz $D/text/openstax.jsonl.xz $D/qa/squad_v1.1_train_44_articles.json"
stage1="--maker icae 500x -k 16 --compressor icae=$R/embeds-1 500x=$R/kv-1 --check-leakage $train --batch 50"
promptcompress evaluate regenerate --data arxiv=$new --length 96 -n 100 $stage1 --json $O/stage1-regenerate.jsonl
promptcompress evaluate qa --cloze arxivqa=$new --length 96 -n 500 $stage1 --json $O/stage1-qa.jsonl
