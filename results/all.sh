#!/bin/bash
# Every number that depends on the pocket model, again from the weights that ship, one step after the other. A step that was interrupted goes on where its command can;
# a step that has ended is not repeated. Times of other machines (soft_latency, cost, qa_throughput, training_step) and comparisons that use other models
# (weights_peers, weights_memory) don't depend on the weights: their notebooks have the commands.
# usage: results/all.sh DATA RUNS [STEP ...]     DATA holds text/ and qa/ (nbs/recipes/pocket.ipynb says which files), RUNS is that of results/pocket/train.sh, and keeps prompts, readers and which steps are done
set -euo pipefail
D=$1 R=$2; shift 2
T=$D/text old=$T/arxiv_2017_2019.jsonl.xz new=$T/arxiv_2025.jsonl.xz
texts="--c4 $T/c4_slice.jsonl.xz --wikipedia $T/wikipedia_en.jsonl.xz --arxiv $old --arxiv-test $new"
bench() { python -m promptcompress.benchmarks."$@"; }
only=" $* "
mkdir -p $R

step() { # name, its result files, then a command: results of other weights are removed before it begins
    local name=$1 files=$2; shift 2
    [ "$only" = "  " ] || [[ "$only" == *" $name "* ]] || return 0
    [ -f $R/$name.done ] && return
    [ -f $R/$name.begun ] || { rm -f $files; touch $R/$name.begun; }
    echo "== $name"; "$@"; touch $R/$name.done
}
step pocket "results/pocket/stage1-*.jsonl" results/pocket/run.sh $D $R
step evaluation "results/evaluation/*.jsonl" results/evaluation/run.sh $D $R
step token_usage results/token_usage.jsonl bench token_usage --data $new --compressor pocket-kv pocket-icae -k 16 4 1 -n 100 --out results/token_usage.jsonl
step errors results/errors.jsonl bench errors --data $new --compressor pocket-kv pocket-icae -k 16 4 1 -n 100 --out results/errors.jsonl
step frozen results/frozen.jsonl bench frozen --data $new -n 100 --out results/frozen.jsonl
step combinations results/combinations.jsonl bench combinations --arxiv $old --arxiv-test $new --work $R/combinations --out results/combinations.jsonl
step weights_levels results/weights_levels.jsonl bench weights_levels --calibration $old --arxiv $new --wikitext2 $T/wikitext2_valid.jsonl.xz --c4 $T/c4_slice.jsonl.xz --out results/weights_levels.jsonl
step soft_perplexity results/soft_perplexity.jsonl bench soft_perplexity $texts --work $R/soft --out results/soft_perplexity.jsonl
step soft_seeds results/soft_seeds.jsonl bench soft_seeds $texts --work $R/seeds --out results/soft_seeds.jsonl
step soft_transfer results/soft_transfer.jsonl bench soft_transfer $texts --wikitext2 $T/wikitext2_valid.jsonl.xz --work $R/soft --out results/soft_transfer.jsonl
step compressors results/compressors/regeneration.jsonl results/compressors/run.sh $D $R/compressors
step soft_steps results/soft_steps.jsonl bench soft_steps $texts --work $R/steps --out results/soft_steps.jsonl
