"""What the runners of the peers share: the benchmark's data, the stopwatch, and how a run is left for `score`.

The same as `Stopwatch` and `write_run` of promptcompress.benchmarks.weights_peers, for environments that can't import it.
Needs torch and safetensors only, which every peer brings.
"""
import gc, json, os, resource, sys, time
from importlib.metadata import version
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file

def arguments(configs): # 'SETTING.VARIANT' -> options
    "NAME and DIR from the command line, as setting, variant, options, folder"
    if len(sys.argv) != 3 or sys.argv[1] not in configs:
        sys.exit(f"usage: {Path(sys.argv[0]).name} NAME DIR\nDIR is made by `python -m promptcompress.benchmarks.weights_peers make DIR`\n"
                 f"NAME is one of {' '.join(configs)}")
    folder = Path(sys.argv[2]).resolve()
    if not (folder/'tokens.safetensors').exists(): sys.exit(f"There is no benchmark in {sys.argv[2]}: write it with `make` first")
    return *sys.argv[1].split('.'), configs[sys.argv[1]], folder

def calibration(folder): return load_file(folder/'tokens.safetensors')['calibration'] # `[sequences, length]`

def layer_names(model): return [n for n,m in model.named_modules() if isinstance(m, torch.nn.Linear) and '.layers.' in n]

class Stopwatch:
    "`with Stopwatch(model) as w:` measures `w.cost`: seconds of wall and processor time, MB of peak memory"
    def __init__(self, model=None): # Its weights are brought into the process's own memory
        for p in model.parameters() if model else (): p.data = p.data.clone()
    def memory(self): # peak of the process so far, in use now
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)
        try: return peak, int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE') / 2**20
        except OSError: return peak, None
    def __enter__(self):
        gc.collect()
        try: Path('/proc/self/clear_refs').write_text('5') # forget earlier peaks
        except OSError: pass
        base, resident = self.memory()
        self.cost, self.start = dict(base_mb=base, resident_mb=resident), (time.perf_counter(), time.process_time())
        return self
    def __exit__(self, *_):
        seconds, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        self.cost |= dict(seconds=seconds, cpu_seconds=cpu, peak_mb=self.memory()[0])

def write_run(folder, tool, setting, variant, # The three make the run's name
              weights,       # Layer -> dense weight `[out, in]`
              cost,          # `Stopwatch.cost`
              package,       # Whose version is noted
              scales, groups,# Layer -> `[out, groups]`, layer -> group of each column `[in]`; empty if not quantised
              options):      # What the tool was given, as text
    "Leave weights and cost of a run"
    name = f'{tool}.{setting}.{variant}'
    (folder/'weights').mkdir(exist_ok=True)
    tensors = {n: w.detach().float().contiguous().clone() for n,w in weights.items()}
    tensors |= {f'{n}.scales': s.detach().float().contiguous().clone() for n,s in scales.items()}
    tensors |= {f'{n}.groups': g.contiguous().clone() for n,g in groups.items()}
    save_file(tensors, folder/'weights'/f'{name}.safetensors')
    row = dict(name=name, tool=tool, setting=setting, variant=variant, threads=torch.get_num_threads(), **cost, options=options,
               tool_version=version(package), tool_torch=version('torch'), tool_transformers=version('transformers'))
    with open(folder/'runs.jsonl', 'a', encoding='utf-8') as f: f.write(json.dumps(row) + '\n')
    print(f"{name:40}{row['seconds']:8.1f} s {row['peak_mb'] - row['base_mb']:8.0f} MB", flush=True)
