"""Open a folder written by save_gptq with another engine, and compare logits and greedy text with what write_reference.py noted beside it.

    ENV/bin/python tests/interop/check_gptq.py OUT --engine gptqmodel|transformers [--dtype bfloat16] [--backend auto] [--results results/interop.jsonl]

Runs in the environment of make_env.sh, without promptcompress. Prints one line of JSON; exit code 1 if the logits are off by more than 1e-2 or a text differs.
Two engines add in different orders, so a text may part where two tokens are as good as equal: where their logits are closer than the engines' largest difference on the
same logits. Such a text is counted under `ties`, not under `same_texts`."""
import os
os.environ |= dict(GPTQMODEL_CPU_WORKERS='2', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false') # 7.7 does not start on two cores without the first
import argparse, json, subprocess, sys
from collections import Counter
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
import torch
from safetensors.torch import load_file

def load(args, dtype):
    "The model, as the engine gives it"
    if args.engine == 'gptqmodel':
        from gptqmodel import BACKEND, GPTQModel
        backend = BACKEND.AUTO if args.backend == 'auto' else BACKEND.TORCH
        return GPTQModel.load(str(args.out/'model'), device='cpu', backend=backend, dtype=dtype).model
    from transformers import AutoModelForCausalLM, GPTQConfig
    quant = json.loads((args.out/'model'/'quantize_config.json').read_text())
    extra = {} if args.backend == 'auto' else dict(quantization_config=GPTQConfig(bits=quant['bits'], backend='torch'))
    return AutoModelForCausalLM.from_pretrained(args.out/'model', dtype=dtype, device_map='cpu', **extra)

def commit():
    git = lambda *a: subprocess.run(['git', '-C', str(Path(__file__).parent), *a], capture_output=True, text=True).stdout.strip()
    return git('rev-parse', '--short=12', 'HEAD') + ('+' if git('status', '--porcelain', '--untracked-files=no') else '')

@torch.no_grad()
def main():
    p = argparse.ArgumentParser()
    p.add_argument('out', type=Path); p.add_argument('--engine', required=True, choices=['gptqmodel','transformers']); p.add_argument('--dtype', default='bfloat16')
    p.add_argument('--backend', default='torch', choices=['torch','auto']); p.add_argument('--results', type=Path)
    args = p.parse_args()
    ref, want = json.loads((args.out/'reference.json').read_text()), load_file(args.out/'reference.safetensors')
    model = load(args, getattr(torch, args.dtype)).eval()
    kernels = Counter(type(m).__name__ for m in model.modules() if hasattr(m, 'qweight'))
    def off(got, i, dtype): return ((got - want[f'{dtype}.{i}']).norm()/want[f'{dtype}.{i}'].norm()).item()
    same, exact, texts, apart, noise = [], [], 0, [], 0.
    for i,ids in enumerate(ref['prompts']):
        ids = torch.tensor([ids]); got = model(input_ids=ids).logits[0].float()
        same.append(off(got, i, args.dtype)); exact += [off(got, i, 'float32')] if f'float32.{i}' in want else []
        new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=ref['new'], do_sample=False, pad_token_id=ref['pad'])[0, ids.shape[1]:].tolist()
        old = ref['texts'][args.dtype][i]
        texts += new == old; noise = max(noise, (got - want[f'{args.dtype}.{i}']).abs().max().item())
        if new != old: # how much better is the token it took than ours, to its own mind?
            at = next(j for j,(a,b) in enumerate(zip(new, old)) if a != b)
            last = model(input_ids=torch.cat([ids, torch.tensor([new[:at]], dtype=torch.long)], 1)).logits[0, -1].float()
            apart.append((last[new[at]] - last[old[at]]).item())
    config = json.loads((args.out/'model'/'quantize_config.json').read_text())
    about = {k: ref['about'][k] for k in ('model','bits','group','sym','sparsity','solver')}
    row = dict(check='gptq file', engine=args.engine, kernels=dict(kernels), dtype=args.dtype, format=config['checkpoint_format'], **about, prompts=len(same), new_tokens=ref['new'],
               logits_off_max=max(same), logits_off_mean=sum(same)/len(same), logits_off_fp32_max=max(exact, default=None), same_texts=texts, ties=sum(a <= noise for a in apart), apart=apart, noise=noise, ok=max(same) <= 1e-2 and texts + sum(a <= noise for a in apart) == len(same),
               versions={n: version(n) for n in ('gptqmodel','transformers','optimum','torch')}, commit=commit(),
               command=' '.join([Path(sys.argv[0]).name, *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])]), time=datetime.now(timezone.utc).isoformat(timespec='seconds'))
    print(json.dumps(row))
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with open(args.results, 'a') as f: f.write(json.dumps(row) + '\n')
    sys.exit(0 if row['ok'] else 1)

if __name__ == '__main__': main()
