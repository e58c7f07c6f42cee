#!/bin/bash
# The commands that made promptcompress/pocket, one per step; steps 2 to 4 can be interrupted and continued with --resume.
# On 2 CPU cores: step 1 a minute, step 2 45 minutes on one core, steps 3 and 4 some 50 minutes per carrier on one core (they ran side by side).
# usage: results/pocket/train.sh DATA RUNS     DATA holds text/ and qa/ (nbs/recipes/pocket.ipynb says which files), RUNS gets everything that is made
set -euo pipefail
D=$1 R=$2

promptcompress recipe prepare --text arxiv=$D/text/arxiv_2017_2019.jsonl.xz:0.6 wikipedia=$D/text/wikipedia_en.jsonl.xz:0.28 openstax=$D/text/openstax.jsonl.xz:0.12 \
    --squad $D/qa/squad_v1.1_train_44_articles.json --cloze arxiv --wh wikipedia --out $R/data
promptcompress recipe lm --data $R/data --depth 6 --steps 1400 --out $R/lm

for carrier in kv embeds; do # the same examples in the same order for both
    promptcompress train --model $R/lm/model --carrier $carrier --bf16 --stage pretrain --data $D/text/arxiv_2017_2019.jsonl.xz --limit 60000 \
        --length 16 96 --lr 2e-3 --train-k 1 4 16 16 16 16 --steps 2400 --out $R/$carrier-1
    promptcompress train --model $R/lm/model --carrier $carrier --bf16 --stage finetune --from $R/$carrier-1 --data $D/qa/squad_v1.1_train_44_articles.json \
        --cloze $D/text/arxiv_2017_2019.jsonl.xz --mix-text $D/text/arxiv_2017_2019.jsonl.xz --limit 12000 --length 16 96 --lr 3e-4 --train-k 1 4 16 16 \
        --steps 400 --out $R/$carrier-2
done

# stage 2 cost regeneration and brought no answers (results/pocket/stage2-*.json), so what ships is stage 1
promptcompress recipe export --model $R/lm/model --kv $R/kv-1 --icae $R/embeds-1 --out promptcompress/pocket \
    --test "arXiv abstracts of 2025=$D/text/arxiv_2025.jsonl.xz" "TinyStories=$D/text/tinystories_slice.jsonl.xz" --lm-run $R/lm --packed $R/data
for c in kv embeds; do for s in 1 2; do cp $R/$c-$s/log.jsonl results/pocket/$c-$s.log.jsonl; done; done
cp $R/lm/log.jsonl results/pocket/lm.log.jsonl
