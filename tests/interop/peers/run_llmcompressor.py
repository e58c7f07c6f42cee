"""llm-compressor on the benchmark of nbs/results/weights_peers.ipynb:   PYTHON run_llmcompressor.py NAME DIR

PYTHON is that of an environment with llmcompressor (make_env.sh beside this file makes one); DIR is made by
`python -m promptcompress.benchmarks.weights_peers make DIR`. NAME is SETTING.VARIANT, see CONFIGS below; all options that
change the result are named there. Variants:

default   GPTQModifier and SparseGPTModifier as they come: columns by descending activation, static groups; scales from minimum and maximum
noact     columns in their order
imatrix   default, and scales searched for the least error weighted by the inputs' energy (`imatrix_mse` as it comes: error to the power of 3)
imatrix2  imatrix with squared errors and down to half the width instead of 5 % of it
wanda     WandaPruningModifier

Pruning and quantising are two modifiers that run one after the other in 0.14; the second does not keep the zeros of the first.
"""
import torch
from protocol import Stopwatch, arguments, calibration, layer_names, write_run

QUANTISED = {'w4': dict(num_bits=4, symmetric=True), 'w4-asym': dict(num_bits=4, symmetric=False),
             'w3': dict(num_bits=3, symmetric=False), 'w2': dict(num_bits=2, symmetric=False)}
PRUNED = {'s50': dict(sparsity=.5, mask_structure='0:0'), 's62': dict(sparsity=.625, mask_structure='0:0'),
          's75': dict(sparsity=.75, mask_structure='0:0'), '2of4': dict(sparsity=.5, mask_structure='2:4')}
HOW = dict(default=dict(actorder='static', observer='memoryless_minmax'), noact=dict(actorder=None, observer='memoryless_minmax'),
           imatrix=dict(actorder='static', observer='imatrix_mse'),
           imatrix2=dict(actorder='static', observer='imatrix_mse', observer_kwargs=dict(norm=2., maxshrink=.5)))

def _configs(): # name -> (options of pruning or None, options of quantising or None)
    c = {f'{s}.{v}': (None, w | how) for s,w in QUANTISED.items() for v,how in HOW.items()}
    c |= {f'{s}.{v}': (p | dict(method=v), None) for s,p in PRUNED.items() for v in ('default','wanda')}
    both = [(s, q, v) for s in ('s50','2of4') for q in ('w4','w4-asym') for v in ('default','imatrix','imatrix2')]
    return c | {f'{s}-{q}.{v}': (PRUNED[s] | dict(method='default'), QUANTISED[q] | HOW[v]) for s,q,v in both}
CONFIGS = _configs()

def modifiers(pruned, quantised):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import GPTQModifier
    recipe = []
    if pruned:
        kw = {k: v for k,v in pruned.items() if k != 'method'} | dict(targets=['Linear'], ignore=['re:.*lm_head'])
        recipe.append(WandaPruningModifier(**kw) if pruned['method'] == 'wanda' else SparseGPTModifier(**kw, block_size=128, dampening_frac=.01))
    if quantised:
        kw = {k: v for k,v in quantised.items() if k != 'actorder'}
        scheme = QuantizationScheme(targets=['Linear'], weights=QuantizationArgs(**kw, strategy='group', group_size=128))
        recipe.append(GPTQModifier(ignore=['lm_head'], config_groups=dict(all=scheme), actorder=quantised['actorder'],
                                   block_size=128, dampening_frac=.01))
    return recipe

def main():
    setting, variant, (pruned, quantised), folder = arguments(CONFIGS)
    from compressed_tensors.quantization import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import LlamaForCausalLM
    model = LlamaForCausalLM.from_pretrained(folder/'model', dtype=torch.float32).eval()
    tokens = calibration(folder)
    rows = Dataset.from_list([dict(input_ids=ids.tolist(), attention_mask=[1]*len(ids)) for ids in tokens])
    names, recipe = layer_names(model), modifiers(pruned, quantised)
    with Stopwatch(model) as watch:
        oneshot(model=model, dataset=rows, recipe=recipe, tokenizer=str(folder/'model'), max_seq_length=tokens.shape[1],
                num_calibration_samples=len(tokens), shuffle_calibration_samples=False)
    layers, weights, scales, groups = {n: model.get_submodule(n) for n in names}, {}, {}, {}
    for n,l in layers.items():
        weights[n] = l.weight.data
        if quantised: # weights are left in floating point beside their grid: put them on it, as the runtime does
            weights[n] = fake_quantize(l.weight.data, l.weight_scale, getattr(l, 'weight_zero_point', None), l.quantization_scheme.weights)
            scales[n], groups[n] = l.weight_scale, torch.arange(l.in_features, dtype=torch.int32)//128
    asked = [pruned, quantised and quantised | dict(group_size=128)]
    options = ' then '.join(', '.join(f'{k}={v}' for k,v in (o | dict(block_size=128, dampening_frac=.01)).items()) for o in asked if o)
    write_run(folder, 'llmcompressor', setting, variant, weights, watch.cost, 'llmcompressor', scales, groups, options)

if __name__ == '__main__': main()
