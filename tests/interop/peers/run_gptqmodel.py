"""GPTQModel on the benchmark of nbs/results/weights_peers.ipynb:   PYTHON run_gptqmodel.py NAME DIR

PYTHON is that of an environment with gptqmodel (tests/interop/make_env.sh makes one); DIR is made by
`python -m promptcompress.benchmarks.weights_peers make DIR`. NAME is SETTING.VARIANT, see CONFIGS below; all options that
change the result are named there. Variants:

default   what `QuantizeConfig(bits, group_size, sym)` gives: groups ordered by activation (GAR), damping 0.05
plain     as the published code: columns in their order, damping 0.01
desc_act  columns by descending activation, damping 0.01
mse       desc_act, and scales searched for the least error of the weights to the power of 2.4

Version 7.7.0 works in bf16 on a CPU, and has no pruning. It fails on machines with one or two processors unless told that it may use two workers.
"""
import os
os.environ.setdefault('GPTQMODEL_CPU_WORKERS', '2')
import shutil, tempfile
import torch
from protocol import Stopwatch, arguments, calibration, write_run

VARIANTS = dict(default=dict(desc_act=False, act_group_aware=True, damp_percent=.05, mse=0.),
                plain=dict(desc_act=False, act_group_aware=False, damp_percent=.01, mse=0.),
                desc_act=dict(desc_act=True, act_group_aware=False, damp_percent=.01, mse=0.),
                mse=dict(desc_act=True, act_group_aware=False, damp_percent=.01, mse=2.4))
SETTINGS = {'w4': dict(bits=4, sym=True), 'w4-asym': dict(bits=4, sym=False), 'w3': dict(bits=3, sym=False), 'w2': dict(bits=2, sym=False)}
CONFIGS = {f'{s}.{v}': asked | how for s,asked in SETTINGS.items() for v,how in VARIANTS.items()}

def dense(layer): # packed layer -> `[out, in]`
    w = layer.dequantize_weight().float().T # it is kept `[in, out]`
    assert w.shape == (layer.out_features, layer.in_features), w.shape
    return w

if __name__ == '__main__':
    setting, variant, options, folder = arguments(CONFIGS)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        os.chdir(work) # it writes logs where it stands
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
        options = options | dict(group_size=128, true_sequential=True, offload_to_disk=False)
        model = GPTQModel.load(str(folder/'model'), QuantizeConfig(**options, device='cpu'))
        rows = [dict(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]) for ids in calibration(folder)]
        with Stopwatch(model.model) as watch: model.quantize(rows, batch_size=1)
        model.save(f'{work}/checkpoint')
        packed = GPTQModel.load(f'{work}/checkpoint', device='cpu', backend=BACKEND.TORCH).model
        layers = {n.replace('model.model.', 'model.'): l for n,l in packed.named_modules() if hasattr(l, 'dequantize_weight') and '.layers.' in n}
        weights, scales = {n: dense(l) for n,l in layers.items()}, {n: l.scales.T for n,l in layers.items()}
        groups = {n: l.g_idx.int() for n,l in layers.items()}
        options = ', '.join(f'{k}={v}' for k,v in options.items())
        write_run(folder, 'gptqmodel', setting, variant, weights, watch.cost, 'gptqmodel', scales, groups, options)
        os.chdir(folder)
