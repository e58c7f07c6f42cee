#!/bin/bash
# Every number of nbs/results/qa_table.ipynb and nbs/results/regeneration_curves.ipynb, from the shipped weights. Any of the commands may be killed and given again.
# usage: results/evaluation/run.sh DATA RUNS     DATA holds text/ and qa/ (nbs/recipes/pocket.ipynb says which files), RUNS gets the tuned reader
set -euo pipefail
D=$1 R=$2 O=results/evaluation
train="$D/text/arxiv_2017_2019.jsonl.xz $D/text/wikipedia_en.jsonl.xz $D/text/openstax.jsonl.xz $D/qa/squad_v1.1_train_44_articles.json"

# the gold standard that reads the whole context and was tuned on questions
[ -f $R/instruct/adapter_model.safetensors ] || promptcompress train --stage instruct --bf16 --data $D/qa/squad_v1.1_train_44_articles.json \
    --cloze $D/text/arxiv_2017_2019.jsonl.xz --limit 12000 --length 16 96 --lr 1e-3 --steps 800 --out $R/instruct

promptcompress evaluate qa --data squad=$D/qa/squad_v1.1_dev_half.json hotpotqa=$D/qa/hotpotqa_half.jsonl.xz race=$D/qa/race_half.jsonl.xz \
    relation_extraction=$D/qa/RelationExtraction.dev.half.jsonl.gz --cloze arxivqa=$D/text/arxiv_2025.jsonl.xz --length 96 -n 500 \
    --maker none full instruct truncated bytes icae 500x -k 16 4 1 --compressor instruct=$R/instruct --check-leakage $train --batch 64 --json $O/qa.jsonl

# in pieces of the length that the compressors were trained for; then the whole text in one pass
promptcompress evaluate regenerate --data arxiv=$D/text/arxiv_2025.jsonl.xz --length 96 192 288 384 480 -n 100 --maker none full truncated icae 500x -k 16 4 1 \
    --chunk 96 --check-leakage $train --batch 25 --json $O/regeneration-96.jsonl
promptcompress evaluate regenerate --data arxiv=$D/text/arxiv_2025.jsonl.xz --length 192 288 384 480 -n 100 --maker icae 500x -k 16 4 1 \
    --chunk 480 --check-leakage $train --batch 25 --json $O/regeneration-480.jsonl
for f in qa regeneration-96 regeneration-480; do promptcompress report $O/$f.jsonl --out $O/$f --quiet; done
