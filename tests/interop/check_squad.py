"""SQuAD's official script and ours on the same answers: `python tests/interop/check_squad.py evaluate-v1.1.py dev-v1.1.json [--n 1000] [--out results/interop.jsonl]`.

The script is SQuAD's own (rajpurkar.github.io/SQuAD-explorer), the data any file in its format. Compared are the official answers as predictions, each question's
second reference against the others, and `n` predictions that were cut, scrambled, recased or garnished: item by item, and in the mean.
"""
import argparse, importlib.util, random, sys
from promptcompress.core import append_result, read_json, run_info
from promptcompress.evaluation.metrics import squad_em, squad_f1

def perturbed(answer, context, rng):
    "What a model might say instead of `answer`"
    words, i = answer.split(), rng.randrange(max(len(context.split()), 1))
    return rng.choice([' '.join(words[:-1]), ' '.join(words[1:]), f'the {answer}.', answer.upper(), answer.replace(' ', '-'), f'“{answer}”', ' '.join(reversed(words)),
                       f'{answer} {" ".join(context.split()[i:i+3])}', ' '.join(context.split()[i:i+len(words)]), 'a', '', f'an {answer} , a', answer.replace('.', ' .')])

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('script'); p.add_argument('data'); p.add_argument('--n', type=int, default=1000); p.add_argument('--out')
    args = p.parse_args()
    spec = importlib.util.spec_from_file_location('official', args.script)
    official = importlib.util.module_from_spec(spec); spec.loader.exec_module(official)
    asked = [(q['id'], par['context'], [a['text'] for a in q['answers']]) for art in read_json(args.data)['data'] for par in art['paragraphs'] for q in par['qas']]
    rng = random.Random(0)
    sets = dict(official=[(a[0], a) for _,_,a in asked], second=[(a[1], a[:1] + a[2:]) for _,_,a in asked if len(a) > 1],
                perturbed=[(perturbed(rng.choice(a), c, rng), a) for _,c,a in rng.choices(asked, k=args.n)])
    row, wrong = dict(task='squad_script', data=args.data.split('/')[-1]), 0
    for name,some in sets.items():
        theirs = [[official.metric_max_over_ground_truths(f, p, refs) for f in (official.f1_score, official.exact_match_score)] for p,refs in some]
        ours = [[squad_f1(p, refs), squad_em(p, refs)] for p,refs in some]
        off = [(s, t, o) for s,t,o in zip(some, theirs, ours) if any(abs(float(x) - y) > 1e-12 for x,y in zip(t, o))]
        wrong += len(off)
        for s,t,o in off[:5]: print('different:', s, 'official', t, 'ours', o)
        mean = lambda x: [100*sum(float(v[i]) for v in x)/len(x) for i in (0, 1)]
        print(f'{name}: {len(some)} items, {len(off)} different; F1 {mean(theirs)[0]:.4f} and {mean(ours)[0]:.4f}, EM {mean(theirs)[1]:.4f} and {mean(ours)[1]:.4f}')
        row[name] = dict(n=len(some), different=len(off), f1=mean(ours)[0], f1_official=mean(theirs)[0], em=mean(ours)[1], em_official=mean(theirs)[1])
    if args.out: append_result(args.out, row | run_info(0))
    return int(wrong > 0)

if __name__ == '__main__': sys.exit(main())
