"The transfer matrix: killed and gone on with, known by content and never by name, cells that can't be measured, and the share of a gap"
import json, math, subprocess, sys
from functools import partial
import numpy as np, pandas as pd, pytest, torch
from promptcompress.core import InputError
from promptcompress.data import Text
from promptcompress.evaluation.perplexity import perplexity
from promptcompress.kv.prefix import KVPrefix, read
from promptcompress.lm import LM, tiny_lm
from promptcompress.evaluation.results import content_key
from promptcompress.soft.transfer import COLUMNS, gap_closed, heat_map, read_matrix, relative, transfer_matrix
from promptcompress.weights.recipe import Recipe
from promptcompress.weights.walk import compress_weights

lm, two, gpt2 = tiny_lm(), tiny_lm(seed=1), tiny_lm('gpt2')
def hard(text): return lambda lm: read(lm, [[lm.bos_id, *lm.encode(text)]])[0]
prompts = dict(none=None, a=hard('Read with care.'), b=hard('Think.'))
lms = dict(full=lm, small=two)
texts = dict(x=['one text', 'and another'], y=['a b c', 'd e f'])

class Metric:
    "Counts its calls, and stops as a run does that is killed"
    __name__ = 'tokens_read'
    def __init__(self, die_at=None): self.calls, self.die_at = [], die_at
    def __call__(self, lm, data, prefix=None, scale=1.):
        if len(self.calls) == self.die_at: raise KeyboardInterrupt
        self.calls.append((lm.name, len(data), 0 if prefix is None else len(prefix)))
        return scale*(1 + sum(map(len, data)) + 100*(0 if prefix is None else prefix.keys.abs().sum().item()) + lm.embed.weight.sum().item())

def same(a, b): pd.testing.assert_frame_equal(a.drop(columns='seconds'), b.drop(columns='seconds'))

@pytest.mark.parametrize('cut', [None, 5, 1], ids=['whole lines', 'half a line', 'no line end'])
def test_killed_and_gone_on_with(tmp_path, cut):
    whole = transfer_matrix(prompts, lms, texts, Metric())
    out = tmp_path/'new'/'cells.jsonl'
    with pytest.raises(KeyboardInterrupt): transfer_matrix(prompts, lms, texts, Metric(7), out)
    assert len(out.read_text().splitlines()) == 7
    if cut: out.write_bytes(out.read_bytes()[:-cut])
    m, lost = Metric(), cut == 5
    if lost:
        with pytest.warns(UserWarning, match='the last line is cut off'): rest = transfer_matrix(prompts, lms, texts, m, out)
    else: rest = transfer_matrix(prompts, lms, texts, m, out)
    assert len(m.calls) == 12 - 7 + lost
    same(rest, whole); same(read_matrix(out), whole)
    assert all(json.loads(l)['commit'] for l in out.read_text().splitlines()) and len(out.read_text().splitlines()) == 12
    m = Metric(); same(transfer_matrix(prompts, lms, texts, m, out), whole); assert not m.calls
    m = Metric(); same(transfer_matrix(prompts, lms, texts, m, out, resume=False), whole); assert len(m.calls) == 12
    assert len(out.read_text().splitlines()) == 24, 'what was measured before must stay'
    assert list(whole) == list(COLUMNS) and not list(tmp_path.rglob('*.tmp'))

def count(lm, data, prefix=None): # as in the process below: a function counts by its name
    count.calls += 1
    return len(data)

KILLED = """
import os, sys
from promptcompress.lm import tiny_lm
from promptcompress.soft.transfer import transfer_matrix
def count(lm, data, prefix=None): return len(data) if data != ['w'] else os.kill(os.getpid(), 9)
transfer_matrix(dict(none=None), dict(a=tiny_lm()), {c: [c] for c in 'uvwx'}, count, sys.argv[1])
"""
@pytest.mark.skipif(sys.platform == 'win32', reason='no SIGKILL')
def test_a_process_that_is_killed(tmp_path):
    out, count.calls = tmp_path/'c.jsonl', 0
    assert subprocess.run([sys.executable, '-c', KILLED, str(out)]).returncode == -9
    transfer_matrix(dict(none=None), dict(a=lm), {c: [c] for c in 'uvwx'}, count, out)
    assert count.calls == 2 and read_matrix(out).dataset.tolist() == [*'uvwx']

def test_a_cell_is_known_by_content(tmp_path):
    out, count = tmp_path/'c.jsonl', lambda *args, **kw: (transfer_matrix(*args, m := Metric(), out, **kw), len(m.calls))
    first, n = count(prompts, lms, texts); assert n == 12
    renamed = dict(nothing=None, c=prompts['b'], d=prompts['a'](lm)) # d: made once, used on both
    t, n = count(renamed, dict(big=lm), dict(z=list(texts['x'])))
    assert n == 0 and t.value.tolist() == first[(first.lm == 'full') & (first.dataset == 'x')].value.iloc[[0,2,1]].tolist()
    t, n = count(prompts | dict(a=hard('Read with calm.')), lms, texts); assert n == 4 # same name, same length, other words
    assert set(t.key) - set(first.key) == set(t[t.prompt == 'a'].key)
    t, n = count(prompts, lms, texts); assert n == 0; same(t, first) # and back: known
    assert read_matrix(out).set_index(['prompt','lm','dataset']).value['a','full','x'] == first.value[4]
    assert count(prompts, dict(full=two, small=lm), texts)[1] == 0    # names exchanged
    assert count(prompts, lms, dict(texts, y=['a b c', 'd e g']))[1] == 6
    assert count(prompts, lms, texts, scale=2.)[1] == 12
    assert count(prompts, lms, texts, seed=1)[1] == 12
    assert count(prompts, dict(full=LM(tiny_lm().model.bfloat16(), lm.tokenizer)), texts)[1] == 6
    wide = LM(tiny_lm().model.bfloat16().float(), lm.tokenizer) # the same numbers, computed with in another type
    half = LM(tiny_lm().model.bfloat16(), lm.tokenizer)
    assert content_key(wide) != content_key(half) and wide.fingerprint == half.fingerprint

def test_twice_in_one_table():
    "The same prompt under two names is measured once; a cell does not depend on those before it"
    m = Metric(); t = transfer_matrix(dict(a=prompts['a'], same=prompts['a'](lm)), dict(full=lm), texts, m)
    assert len(m.calls) == 2 and t.value[0] == t.value[2] and t.key[1] == t.key[3]
    def draw(lm, data, prefix=None): return torch.rand(1).item()
    t = transfer_matrix(prompts, lms, texts, draw); assert t.value.nunique() == 1
    assert transfer_matrix(prompts, lms, texts, draw, seed=1).value[0] != t.value[0]

def test_files_and_streams(tmp_path):
    f, g, out = tmp_path/'a.txt', tmp_path/'b.txt', tmp_path/'c.jsonl'
    f.write_text('some words'); g.write_text('some words')
    def table(**data): return transfer_matrix(dict(none=None), dict(full=lm), data, out=out, window=64)
    assert table(one=str(f)).key[0] == table(two=g).key[0]
    g.write_text('some wards'); assert table(one=str(f)).key[0] != table(two=g).key[0]
    words = '{"text": "some words"}'; (h := tmp_path/'h.txt').write_text(words); (i := tmp_path/'h.jsonl').write_text(words)
    assert table(one=h).value[0] != table(two=i).value[0], 'the same bytes, read as text and as JSON'
    t = table(stream=(s for s in texts['x']), stored=texts['x'])
    assert t.key[0] == t.key[1] and t.value[0] == float(perplexity(lm, texts['x'], window=64)) and (t.ci_low < t.value).all()
    with pytest.raises(InputError, match='does not exist'): table(one=tmp_path/'none.txt')

def test_keys_tell_apart_what_differs():
    p = prompts['a'](lm)
    def changed(**kw): return content_key(KVPrefix(**{**vars(p), **kw}))
    x = p.values.clone(); x[-1,-1,-1,-1] += 1e-4
    keys = [content_key(p), changed(values=x), changed(positions=p.positions + 1), changed(next_position=99), content_key(p.to(dtype=torch.float16))]
    assert len(set(keys)) == 5 and changed(info={}) == keys[0]
    calib = torch.arange(256).view(4, 64) % 250 + 5
    recipes = [Recipe(sparsity=s, bits=b, group=32, method=m) for s,b,m in [(0.,4,'rtn'), (0.,4,'obs'), (0.,3,'rtn'), (.5,4,'obs'), (.625,4,'obs'), (.5,None,'obs'), (.625,None,'obs')]]
    small = [compress_weights(lm, r, calib) for r in [*recipes, recipes[0]]]
    prints = [m.fingerprint for m in [lm, *small]]
    assert len(set(prints)) == 8 and prints[-1] == prints[1], 'models of different recipes, even with codes of the same shape, are different'
    def f(k): return lambda x: x + 3 if k else x
    objects = [f, partial(f, 1), partial(f, 2), lambda x: x + 1, lambda x: x + 2, Text('1', 'a'), Text('1', 'b'), np.zeros(2), np.zeros(2, int), np.zeros((2,1)), {'a': 1}, [('a', 1)], {1, 2}, None]
    assert len({content_key(o) for o in objects}) == len(objects)
    assert content_key({'a': 1, 'b': 2}) == content_key({'b': 2, 'a': 1}) and content_key([]) != content_key({})

def test_damage_that_no_kill_does(tmp_path):
    out = tmp_path/'c.jsonl'
    args = dict(none=None), dict(full=lm), texts
    transfer_matrix(*args, Metric(), out)
    good = out.read_text().splitlines()
    out.write_text('\n'.join([good[0], '{"prompt": ', good[1]]) + '\n')
    with pytest.raises(InputError, match='line 2 of 3 is not JSON'): transfer_matrix(*args, Metric(), out)
    assert len(out.read_text().splitlines()) == 3, 'a file with damage stays as it is'
    out.write_text('\n'.join(['{"metric": "of another kind"}', '3', *good]) + '\n')
    m = Metric(); transfer_matrix(*args, m, out); assert not m.calls and len(out.read_text().splitlines()) == 4
    out.write_bytes(good[0].encode() + b'\n\x00\x00\xff'); m = Metric()
    with pytest.warns(UserWarning, match='cut off'): transfer_matrix(*args, m, out)
    assert len(m.calls) == 1 and len(read_matrix(out)) == 2
    out.write_text(good[0] + '\n{"prompt": "no\n')
    with pytest.warns(UserWarning, match='cut off'): transfer_matrix(*args, m, out)
    assert [json.loads(l)['dataset'] for l in out.read_text().splitlines()] == ['x', 'y']
    with pytest.raises(InputError, match='is a folder'): transfer_matrix(*args, Metric(), tmp_path)

def test_cells_that_cannot_be(tmp_path):
    p = dict(none=None, fixed=prompts['a'](lm), long=hard('x'*254))
    args, out = (p, dict(full=lm, other=gpt2), dict(x=texts['x'])), tmp_path/'c.jsonl'
    m = Metric()
    with pytest.raises(InputError, match="prompt 'fixed' on model 'other': This prefix is for"): transfer_matrix(*args, m)
    assert not m.calls, 'said before anything is measured'
    t = transfer_matrix(*args, m, out, errors='keep')
    assert len(m.calls) == 3 and t.value.isna().tolist() == [False, False, False, True, True, True] == t.error.notna().tolist()
    assert 'This prefix is for' in t.error[3] and 'window of 256' in t.error[4] and t.key.isna().sum() == 3
    same(read_matrix(out), t)
    n = len(out.read_text().splitlines()); same(transfer_matrix(*args, m, out, errors='keep'), t)
    assert len(m.calls) == 3 and len(out.read_text().splitlines()) == n == 6
    r = relative(t); assert r.ratio[:2].tolist() == [1, 1] and r.ratio.isna().sum() == 3
    def refuse(lm, data, prefix=None):
        if prefix is not None: raise InputError('no prefixes here')
        return 1
    t = transfer_matrix(dict(none=None, a=prompts['a']), dict(full=lm), texts, refuse, errors='keep')
    assert t.error.tolist()[2:] == ['no prefixes here']*2 and t.value.tolist()[:2] == [1, 1]
    with pytest.raises(InputError, match="prompt 'a' on model 'full' and dataset 'x': no prefixes"): transfer_matrix(prompts, lms, texts, refuse)

def test_one_window_for_all():
    t = transfer_matrix(dict(none=None, long=hard('x'*200)), dict(full=lm), dict(x=['z '*100]))
    assert t.value[0] == float(perplexity(lm, ['z '*100], window=55)) != float(perplexity(lm, ['z '*100]))
    with pytest.raises(InputError, match="behind prompt 'long'"): transfer_matrix(dict(long=hard('x'*200)), dict(full=lm), texts, window=100)

@pytest.mark.parametrize('bad, message', [(dict(prompts={}), 'prompts is a dict with nothing in it'), (dict(prompts=[None]), 'prompts is a list'), (dict(lms=dict(a='pocket')), "model 'a' is a str"),
    (dict(errors='ignore'), "errors='ignore'"), (dict(prompts=dict(p='Think.')), 'it is a str, which gives no KVPrefix'), (dict(prompts=dict(p=lambda lm: 3)), 'gives no KVPrefix'), (dict(datasets=dict(x=object())), "can't read from")])
def test_bad_input(bad, message):
    with pytest.raises(InputError, match=message): transfer_matrix(**(dict(prompts=prompts, lms=lms, datasets=texts) | bad))

def test_gap_closed():
    assert gap_closed(np.exp(2.), np.exp(3.), np.exp(1.)) == pytest.approx(.5) and gap_closed(6, 10, 2, nats=False) == .5
    assert gap_closed(20, 90, 9) == pytest.approx(math.log(90/20)/math.log(10))
    assert gap_closed(2, 10, 2) == 1 and gap_closed(10, 10, 2) == 0 and gap_closed(11, 10, 2) < 0 and gap_closed(1.5, 10, 2) > 1
    assert all(math.isnan(gap_closed(*x, nats=n)) for x in [(3, 2, 2), (2, 2, 2), (2, 2, 3), (math.nan, 3, 2), (2, math.nan, 2)] for n in (True, False))
    p = perplexity(lm, texts['x']); assert gap_closed(p, float(p)*2, p) == 1
    assert np.isnan(gap_closed(pd.Series([4., 3.]), [8., 2.], 2)).tolist() == [False, True]

def test_heat_map(tmp_path):
    import matplotlib; matplotlib.use('agg')
    from matplotlib import pyplot as plt
    t = transfer_matrix(prompts, lms, texts, Metric())
    fig, data = heat_map(t, columns='dataset', path=tmp_path/'deep'/'map.png')
    assert (tmp_path/'deep'/'map.png').read_bytes()[:4] == b'\x89PNG' and len(fig.axes) == 2
    np.testing.assert_allclose(pd.read_csv(tmp_path/'deep'/'map.csv').ratio, data.ratio)
    shown = [x.get_text() for x in fig.axes[0].texts]
    assert shown[:2] == ['1.00']*2 and len(shown) == 6
    wide = data[data.lm == 'full'].set_index(['prompt','dataset']).ratio
    assert float(shown[3].replace(',', '')) == pytest.approx(wide['a','y'], rel=.01)
    norm = fig.axes[0].collections[0].norm
    assert norm(1.) == pytest.approx(.5), 'white is at 1'
    twice = pd.concat([t, t.assign(metric='other')])
    with pytest.raises(InputError, match='choose those of one metric'): heat_map(twice, values='value')
    plt.close('all')
