#!/bin/bash
# Every number of nbs/results/pocket_regeneration.ipynb, from the shipped weights; with RUNS of train.sh also those of stage 2.
# usage: results/pocket/run.sh DATA [RUNS]
set -euo pipefail
D=$1 O=results/pocket
new=$D/text/arxiv_2025.jsonl.xz old=$D/text/arxiv_2017_2019.jsonl.xz

for task in regenerate qa; do
    data=$([ $task = qa ] && echo --cloze || echo --data)
    for maker in none full; do promptcompress evaluate $task $data $new --maker $maker --length 96 -n 200 --check-leakage $old --json $O/$task-$maker.json; done
    for maker in truncated icae 500x; do for k in 16 4 1; do
        promptcompress evaluate $task $data $new --maker $maker --k $k --length 96 -n 200 --check-leakage $old --json $O/$task-$maker-$k.json --predictions $O/$task-$maker-$k.rows.jsonl
    done; done
done

if [ $# -gt 1 ]; then for c in 500x:kv icae:embeds; do for task in regenerate qa; do # what stage 2 changed
    data=$([ $task = qa ] && echo --cloze || echo --data)
    promptcompress evaluate $task $data $new --maker ${c%:*} --k 16 --compressor $2/${c#*:}-2 --length 96 -n 200 --check-leakage $old --json $O/stage2-$task-${c%:*}-16.json
done; done; fi
