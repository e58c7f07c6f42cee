#!/bin/sh
# Compression of weights by this library and by its peers, one process each, back to back; the numbers of nbs/results/weights_peers.ipynb.
#
#   sh tests/interop/peers/run_all.sh DIR LLMC_PYTHON GPTQ_PYTHON        (from the root of the repository)
#
# DIR          model, tokens and runs (made if missing; runs of before are removed; about 1 GB)
# LLMC_PYTHON  python of the environment with llm-compressor: sh tests/interop/peers/make_env.sh FOLDER
# GPTQ_PYTHON  python of the environment with GPTQModel:      sh tests/interop/make_env.sh FOLDER
#
# From the environment:
# PYTHON           python with this package (python)
# OUT              result file, one line per run is added (results/weights_peers.jsonl)
# ROUNDS           how often everything is run; times are reported as medians over the rounds (1; about 45 minutes each on two cores)
# SETTINGS         which settings (all, and then the baselines too)
# SKIP             runs of the peers to leave out, such as 'w4.mse s50-w4.imatrix2' (none)
# BASELINES        not empty: the baselines too
# OMP_NUM_THREADS  threads of every tool (2)
# YARDSTICK        one more program, called as `$YARDSTICK SETTING DIR`, that leaves its run as protocol.py does (none)
set -eu
dir=${1:?usage: run_all.sh DIR LLMC_PYTHON GPTQ_PYTHON} llmc=${2:?python with llm-compressor is missing} gptq=${3:?python with GPTQModel is missing}
here=$(dirname "$0")
ours="${PYTHON:-python} -m promptcompress.benchmarks.weights_peers"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
failed=''; log="$dir/log.txt"
try() { name=$1; shift; "$@" 2>>"$log" || failed="$failed $name"; }
skip() { case " ${SKIP:-} " in *" $1 "*) return 0;; esac; return 1; }
last() { text=$("$@") || return 1; printf '%s\n' "$text" | tail -n 1; } # the tools talk

# compare SETTING 'variants of GPTQModel' 'variants of llm-compressor'   (as it comes, and the best of all options tried)
compare() {
    case " ${SETTINGS:-$1} " in *" $1 "*) ;; *) return 0;; esac
    try "$1" $ours run "$1" --dir "$dir"
    for v in $2; do skip "$1.$v" || try "gptqmodel.$1.$v" last "$gptq" "$here/run_gptqmodel.py" "$1.$v" "$dir"; done
    for v in $3; do skip "$1.$v" || try "llmcompressor.$1.$v" last "$llmc" "$here/run_llmcompressor.py" "$1.$v" "$dir"; done
    if [ -n "${YARDSTICK:-}" ]; then try "yardstick.$1" $YARDSTICK "$1" "$dir"; fi
    try "score $1" $ours score --dir "$dir" >/dev/null # deletes the weights
}
baselines() { for n in $1; do try "$n" $ours run "$n" --dir "$dir"; done; try 'score baselines' $ours score --dir "$dir" >/dev/null; }

mkdir -p "$dir"; rm -rf "$dir/runs.jsonl" "$dir/scores.jsonl" "$dir/weights" "$log"
$ours make "$dir"
round=0
while [ $round -lt "${ROUNDS:-1}" ]; do
    round=$((round + 1))
    compare w4           'default mse' 'default imatrix2'
    compare w4-asym      'plain mse'   'default imatrix2'
    compare w3           'plain mse'   'default imatrix2'
    compare w2           'plain mse'   'default imatrix2'
    compare s50          ''            'default'
    compare s62          ''            'default'
    compare s75          ''            'default'
    compare 2of4         ''            'default'
    compare s50-w4       ''            'default imatrix2'
    compare s50-w4-asym  ''            'default imatrix2'
    compare 2of4-w4      ''            'default imatrix2'
    compare 2of4-w4-asym ''            'default imatrix2'
done
if [ -z "${SETTINGS:-}" ] || [ -n "${BASELINES:-}" ]; then
    baselines 'rtn-w4 rtn-w4-asym rtn-w3 rtn-w2 magnitude-s50 magnitude-s62 magnitude-s75 magnitude-2of4 wanda-s50 wanda-s62 wanda-s75 wanda-2of4'
    baselines 'published-w4 published-w4-asym published-w3 published-w2 published-s50 published-s62 published-s75 published-2of4'
    baselines 'published-s50-w4-asym published-2of4-w4-asym'
fi
$ours score --dir "$dir" --out "${OUT:-results/weights_peers.jsonl}"
if [ -n "$failed" ]; then echo "failed:$failed (see $log)" >&2; exit 1; fi
