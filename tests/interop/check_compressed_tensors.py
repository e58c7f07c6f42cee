"""Write a model of write_reference.py in the compressed-tensors format, open that with transformers, and compare logits with ours.

    PYTHONPATH=. ENV/bin/python tests/interop/check_compressed_tensors.py OUT [--dtype bfloat16] [--results results/interop.jsonl]

Runs where both this package and compressed-tensors are: in any environment with transformers, after `pip install compressed-tensors`."""
import argparse, json, shutil, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from promptcompress.core import append_result, run_info
from promptcompress.lm import load_lm
from promptcompress.weights.store import save_compressed_tensors

@torch.no_grad()
def main():
    p = argparse.ArgumentParser()
    p.add_argument('out', type=Path); p.add_argument('--dtype', default='bfloat16'); p.add_argument('--results', type=Path)
    args = p.parse_args()
    lm, ref = load_lm(args.out/'model', 'cpu', args.dtype), json.loads((args.out/'reference.json').read_text())
    shutil.rmtree(args.out/'compressed-tensors', ignore_errors=True)
    save_compressed_tensors(lm, args.out/'compressed-tensors')
    other = AutoModelForCausalLM.from_pretrained(args.out/'compressed-tensors', dtype=lm.dtype)
    off = []
    for ids in ref['prompts']:
        a, b = (m(input_ids=torch.tensor([ids])).logits.float() for m in (other, lm.model))
        off.append(((a - b).norm()/b.norm()).item())
    row = dict(check='compressed-tensors file', engine='transformers', dtype=args.dtype, **{k: ref['about'][k] for k in ('model','bits','group','sym','sparsity','solver')},
               prompts=len(off), logits_off_max=max(off), logits_off_mean=sum(off)/len(off), ok=max(off) <= 1e-2, **run_info(device='cpu'))
    print(json.dumps(row))
    if args.results: append_result(args.results, row)
    sys.exit(0 if row['ok'] else 1)

if __name__ == '__main__': main()
