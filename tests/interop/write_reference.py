"""Save a 4-bit model in the GPTQ format, with the logits and texts that it gives here, for check_gptq.py in another environment.

    python tests/interop/write_reference.py OUT [--model pocket] [--bits 4] [--group 64] [--asym] [--sparsity 0.5] [--format gptq_v2]

OUT gets the folder `model` and the file `reference.json` + `reference.safetensors`: for each dtype the logits of 50 prompts and the greedy texts behind them."""
import argparse, json
from pathlib import Path
import torch
from safetensors.torch import save_file
from promptcompress.core import run_info
from promptcompress.lm import load_lm
from promptcompress.weights.packed import packed_layers, use_kernel
from promptcompress.weights.recipe import Recipe
from promptcompress.weights.store import save_gptq
from promptcompress.weights.walk import compress_weights

TOPICS = ['graph neural networks', 'the cosmic microwave background', 'prime numbers', 'language models', 'superconductors', 'protein folding', 'quantum error correction',
          'the French Revolution', 'traffic flow', 'gravitational waves']
OPENINGS = ['In this paper we study {}.', 'We present a new method for {}, which', 'Recent work on {} has shown that', 'The history of {} begins', 'We prove that {}']
PROMPTS = [o.format(t) for o in OPENINGS for t in TOPICS]

def shrink(lm, args):
    "Compress the model; what it is calibrated on does not matter here, so random tokens do"
    recipe = Recipe(sparsity=args.sparsity, bits=args.bits, group=args.group, sym=not args.asym, method='rtn' if args.nearest else 'obs')
    ids = torch.randint(3, lm.embed.num_embeddings, (8, 256), generator=torch.Generator().manual_seed(0))
    return compress_weights(lm, recipe, None if args.nearest else ids)

@torch.no_grad()
def answers(lm, new):
    "Logits of each prompt, and the greedy text behind it"
    rows = [torch.tensor([lm.start_ids + lm.encode(p)]) for p in PROMPTS]
    logits = [lm.model(input_ids=r).logits[0].float() for r in rows]
    out = [lm.model.generate(input_ids=r, attention_mask=torch.ones_like(r), max_new_tokens=new, do_sample=False, pad_token_id=lm.pad_id)[0, r.shape[1]:] for r in rows]
    return rows, logits, [o.tolist() for o in out]

def main():
    p = argparse.ArgumentParser()
    p.add_argument('out', type=Path); p.add_argument('--model', default='pocket'); p.add_argument('--bits', type=int, default=4); p.add_argument('--group', type=int, default=64)
    p.add_argument('--asym', action='store_true'); p.add_argument('--sparsity', type=float, default=0.); p.add_argument('--nearest', action='store_true', help='round to nearest, without the solver')
    p.add_argument('--format', default=None); p.add_argument('--new', type=int, default=32); p.add_argument('--dtypes', nargs='+', default=['float32','bfloat16','float16'])
    args = p.parse_args()
    opens = save_gptq(shrink(load_lm(args.model, 'cpu'), args), args.out/'model', args.format, dtype='bfloat16')
    tensors, texts = {}, {}
    for dtype in args.dtypes:
        lm = load_lm(args.out/'model', 'cpu', dtype); use_kernel(lm, 'cached')
        rows, logits, texts[dtype] = answers(lm, args.new)
        tensors |= {f'{dtype}.{i}': l for i,l in enumerate(logits)}
    save_file(tensors, args.out/'reference.safetensors')
    first = next(iter(packed_layers(lm).values()))
    about = dict(run_info(device='cpu'), model=args.model, bits=first.bits, group=first.group, sym=first.sym, sparsity=args.sparsity, solver='nearest' if args.nearest else 'compress_weights')
    (args.out/'reference.json').write_text(json.dumps(dict(about=about, opens_with=opens, new=args.new, pad=lm.pad_id, prompts=[r[0].tolist() for r in rows], texts=texts)))
    print(json.dumps(dict(opens_with=opens, **about)))

if __name__ == '__main__': main()
