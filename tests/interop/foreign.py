"""The other direction: a file that GPTQModel writes, read here.

    ENV/bin/python tests/interop/foreign.py write MODEL OUT [--bits 4] [--group 64] [--desc-act] [--asym]     # in the environment of make_env.sh
    python tests/interop/foreign.py check OUT [--results results/interop.jsonl]                              # in ours

`write` quantises the model in the folder MODEL and notes the dense weights that GPTQModel makes of its codes, and its logits; `check` compares both with ours."""
import os
os.environ |= dict(GPTQMODEL_CPU_WORKERS='2', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
import argparse, json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file

def write(args):
    args.out.mkdir(parents=True, exist_ok=True); args.model, args.out = args.model.resolve(), args.out.resolve()
    os.chdir(args.out) # it leaves a folder of logs where it is run
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    ids = torch.randint(3, 4000, (16, 256), generator=torch.Generator().manual_seed(0))
    m = GPTQModel.load(str(args.model), QuantizeConfig(bits=args.bits, group_size=args.group, desc_act=args.desc_act, sym=not args.asym, act_group_aware=False, offload_to_disk=False, device='cpu',
                                                       **({'format': 'gptq_v2'} if args.asym else {})))
    m.quantize([dict(input_ids=s[None], attention_mask=torch.ones_like(s)[None]) for s in ids], batch_size=1)
    m.save(str(args.out/'model'))
    m = GPTQModel.load(str(args.out/'model'), device='cpu', backend=BACKEND.TORCH, dtype=torch.float16).model.eval()
    with torch.no_grad():
        out = dict(ids=ids[:4, :64].clone(), logits=m(input_ids=ids[:4, :64]).logits.float())
        for n,l in m.named_modules(): # their dense weight is [in, out]
            if hasattr(l, 'qweight'): out[f'weight.{n}'] = l.dequantize_weight().reshape(l.in_features, l.out_features).T.contiguous().clone()
    save_file(out, args.out/'foreign.safetensors')

@torch.no_grad()
def check(args):
    from promptcompress.core import append_result, run_info
    from promptcompress.lm import load_lm
    from promptcompress.weights.packed import packed_layers
    lm, want = load_lm(args.out/'model', 'cpu', 'float16'), load_file(args.out/'foreign.safetensors')
    layers, quant = packed_layers(lm), json.loads((args.out/'model'/'quantize_config.json').read_text())
    ours = lm.model(input_ids=want['ids']).logits.float()
    bad = [n for n,m in layers.items() if (m.dense(torch.float16).float() - want[f'weight.{n}'].float()).abs().max() > 1e-3*want[f'weight.{n}'].float().abs().max()]
    off = ((ours - want['logits']).norm()/want['logits'].norm()).item()
    row = dict(check='file of gptqmodel', engine='promptcompress', dtype='float16', **{k: quant.get(k) for k in ('bits','group_size','sym','desc_act','checkpoint_format')}, by=quant['meta']['quantizer'],
               layers=len(layers), permuted=sum(m.permuted for m in layers.values()), layers_off=len(bad), logits_off=off, ok=off <= 1e-2 and not bad, **run_info(device='cpu'))
    print(json.dumps(row))
    if args.results: append_result(args.results, row)
    sys.exit(0 if row['ok'] else 1)

def main():
    p = argparse.ArgumentParser(); sub = p.add_subparsers(required=True)
    w = sub.add_parser('write'); w.set_defaults(run=write); w.add_argument('model', type=Path); w.add_argument('out', type=Path)
    w.add_argument('--bits', type=int, default=4); w.add_argument('--group', type=int, default=64); w.add_argument('--desc-act', action='store_true'); w.add_argument('--asym', action='store_true')
    c = sub.add_parser('check'); c.set_defaults(run=check); c.add_argument('out', type=Path); c.add_argument('--results', type=Path)
    args = p.parse_args(); args.run(args)

if __name__ == '__main__': main()
