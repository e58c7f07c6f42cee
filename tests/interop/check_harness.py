"""lm-evaluation-harness and the offline scorer on the same files: `python tests/interop/check_harness.py FILE... [--model pocket] [--n 100] [--out results/interop.jsonl]`.

Each file (HellaSwag, PIQA, OpenBookQA, MMLU, in their own fields) becomes a local task that the harness runs with our model class, without a prefix and behind a hard
prompt; `evaluate_choice` scores the same items. Compared are the log-likelihoods of every choice and the three accuracies of every item.
"""
import argparse, os, sys, tempfile
os.environ |= dict(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1')
from promptcompress.core import append_result, run_info
from promptcompress.corpora import read_choice
from promptcompress.evaluation.harness import run_tasks, sample_rows, task_for
from promptcompress.evaluation.zeroshot import DIVISORS, evaluate_choice
from promptcompress.lm import load_lm
from promptcompress.soft.prompt import hard_prompt

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('files', nargs='+'); p.add_argument('--model', default='pocket'); p.add_argument('--n', type=int, default=100); p.add_argument('--out')
    args = p.parse_args()
    lm, off = load_lm(args.model), 0
    for file in args.files:
        items, name = list(read_choice(file, limit=args.n)), os.path.basename(file).split('.')[0]
        for front in (None, hard_prompt(lm)):
            with tempfile.TemporaryDirectory() as folder:
                task_for(items, name, folder)
                theirs = sample_rows(run_tasks(lm, name, front, folder), name)
            ours = evaluate_choice(lm, items, front)['rows']
            far = max(abs(x - y) for a,b in zip(ours, theirs) for x,y in zip(a['loglikelihoods'], b['loglikelihoods']))
            same = sum(all(a[m] == b[m] for m in DIVISORS) for a,b in zip(ours, theirs))
            off += same < len(items) or len(theirs) != len(items)
            row = dict(task='harness', dataset=name, slots=0 if front is None else len(front), n=len(items), same=same, largest_difference=far,
                       **{m: sum(r[m] for r in theirs)/len(theirs) for m in DIVISORS}, model=lm.name, fingerprint=lm.fingerprint)
            print(f"{name}, {row['slots']} slots in front: {same} of {len(items)} items the same, log-likelihoods within {far:.1e}; accuracy {row['acc']:.3f}, normalised {row['acc_norm']:.3f}", flush=True)
            if args.out: append_result(args.out, row | run_info(0, lm.device))
    return int(off > 0)

if __name__ == '__main__': sys.exit(main())
