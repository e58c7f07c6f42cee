#!/bin/bash
# The commands that make promptcompress/pocket, one per step; training steps can be interrupted and continued with --resume.
# On 2 CPU cores: steps 1 and 2 some 50 minutes, step 3 a hundred on both cores, step 4 a hundred per carrier on one core (side by side), the rest half an hour.
# usage: results/pocket/train.sh DATA RUNS     DATA holds text/ and qa/ (nbs/recipes/pocket.ipynb says which files), RUNS gets everything that is made
set -euo pipefail
D=$1 R=$2
old=$D/text/arxiv_2017_2019.jsonl.xz

# 1: tokenizer, packed text and questions
promptcompress recipe prepare --text arxiv=$old:0.6 wikipedia=$D/text/wikipedia_en.jsonl.xz:0.28 openstax=$D/text/openstax.jsonl.xz:0.12 \
    --squad $D/qa/squad_v1.1_train_44_articles.json --cloze arxiv --wh wikipedia --out $R/data

# 2 and 3: the language model, in two runs. (What the second began with was trained on the mixture of commit 1284e62: fewer questions, and every token of them counted.)
promptcompress recipe lm --data $R/data --depth 6 --steps 1400 --out $R/lm-1
promptcompress recipe lm --data $R/data --start $R/lm-1/model --steps 3600 --out $R/lm

# 4: compressors that give texts back, the same examples in the same order for both carriers
for carrier in kv embeds; do
    promptcompress train --model $R/lm/model --carrier $carrier --bf16 --stage pretrain --data $R/data/arxiv $R/data/wikipedia \
        --length 16 96 --lr 2e-3 --train-k 1 4 8 16 16 16 --per-slot 6 --steps 5000 --out $R/$carrier-1
done

# 5: answers, with regeneration mixed in
for carrier in kv embeds; do
    promptcompress train --model $R/lm/model --carrier $carrier --bf16 --stage finetune --from $R/$carrier-1 --data $D/qa/squad_v1.1_train_44_articles.json --cloze $old \
        --mix-text $old --limit 12000 --length 16 96 --lr 3e-4 --train-k 1 4 16 16 --steps 600 --out $R/$carrier-2
done

# 6: healing prompts, and the model with half of its weights in 4 bits
promptcompress recipe heal --model $R/lm/model --data $old $D/text/wikipedia_en.jsonl.xz --out $R/heal

# 7: everything into the package, with a card
promptcompress recipe export --model $R/lm/model --kv $R/kv-2 --icae $R/embeds-2 --heal $R/heal --out promptcompress/pocket \
    --test "arXiv abstracts of 2025=$D/text/arxiv_2025.jsonl.xz" "TinyStories=$D/text/tinystories_slice.jsonl.xz" \
    --questions "SQuAD v1.1 dev, half=$D/qa/squad_v1.1_dev_half.json" --lm-run $R/lm-1 $R/lm --packed $R/data
for c in kv embeds; do for s in 1 2; do cp $R/$c-$s/log.jsonl results/pocket/$c-$s.log.jsonl; done; done
for l in lm-1 lm; do cp $R/$l/log.jsonl results/pocket/$l.log.jsonl; done
