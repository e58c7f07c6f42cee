"Counts against closed forms on every family, clocks and memory against things of known size, and the table of variants"
import sys, time
import pytest, torch
from promptcompress.core import InputError, StateError
from promptcompress.evaluation import cost
from promptcompress.evaluation.cost import (PACKED_NOTE, Peak, behind, beside, context_variants, cost_line, cost_rows, count_flops, count_generation, counting, default_makers,
    measure_cost, pass_flops, peak_memory, random_llama, random_texts, series, time_rounds, token_seconds, unbaked, watch_tokens, watched_cache)
from promptcompress.kv.generate import generate
from promptcompress.kv.makers import Maker
from promptcompress.kv.prefix import collate, empty_prefix, read
from promptcompress.lm import FAMILIES, load_lm, tiny_lm
from promptcompress.soft.prompt import SoftPrompt
from promptcompress.weights.lowrank import adapt, layer_ranks
from promptcompress.weights.packed import use_kernel
from promptcompress.weights.recipe import Recipe
from promptcompress.weights.walk import compress_weights
from torch.nn.attention import SDPBackend, sdpa_kernel

models = {f: tiny_lm(f) for f in FAMILIES}
linux = pytest.mark.skipif(sys.platform != 'linux', reason='only Linux lets a process reset its peak')

def run_behind(lm, slots, tokens, batch=1):
    made = collate((read(lm, [[5]*slots]) if slots else [empty_prefix(lm)])*batch, lm)
    return behind(lm, lambda: made, [[7]*tokens]*batch)

@pytest.mark.parametrize('f', models)
@pytest.mark.parametrize('slots,tokens,batch', [(0, 11, 1), (20, 7, 3), (9, 1, 2)])
def test_count_is_the_closed_form(f, slots, tokens, batch):
    "Attention that is not counted, or counted with the wrong number of heads"
    lm = models[f]
    run = run_behind(lm, slots, tokens, batch)
    assert count_flops(lambda: run(1)) == sum(pass_flops(lm, tokens, slots, batch).values())

@pytest.mark.parametrize('backend', [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_kernels_of_attention_count_alike(backend):
    "On a CPU torch counts attention in its plain form only, and passes over the fast kernel"
    lm, ids = models['llama'], torch.full((2, 30), 5)
    with sdpa_kernel(backend): assert count_flops(lambda: lm.model(ids)) == sum(pass_flops(lm, 30, batch=2, logits=30).values())

def test_eager_attention_counts_alike():
    lm, ids = tiny_lm('llama', attn_implementation='eager'), torch.full((1, 30), 5)
    assert count_flops(lambda: lm.model(ids)) == sum(pass_flops(lm, 30, logits=30).values())

def test_what_has_no_formula_is_an_error():
    "A product that is passed over makes every ratio wrong, and nobody sees it"
    w = torch.ones(4, 4)
    for f in (lambda: torch.mv(w, w[0]), lambda: torch._int_mm(torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 32, dtype=torch.int8))):
        with pytest.raises(StateError, match='no formula for aten'): count_flops(f)
    assert count_flops(lambda: (w + w).cummax(0)) == 0

@pytest.mark.parametrize('runtime', ['reference', 'cached', 'int4'])
def test_packed_layers_count_as_dense_ones(runtime):
    "The int4 product has no formula in torch; unpacking must not be counted for one runtime and not for another"
    dense = tiny_lm('llama', hidden_size=128, intermediate_size=128)
    lm, ids = compress_weights(dense, Recipe(bits=4, group=32), torch.randint(3, 259, (4, 32))), torch.full((1, 9), 5)
    lm.model.to(torch.bfloat16); stay = use_kernel(lm, runtime)
    assert not stay
    with counting() as c: lm.model(ids, logits_to_keep=1)
    assert c.get_total_flops() == sum(pass_flops(lm, 9).values()) == sum(pass_flops(dense, 9).values())
    assert any('int4pack' in str(op) for op in c.flop_counts['Global']) == (runtime == 'int4')

@pytest.mark.parametrize('f', ['llama', 'gpt2', 'opt'])
@pytest.mark.parametrize('slots', [0, 13])
def test_generation_is_counted_from_three_tokens(f, slots):
    "Off by one in the series: the last token is never read, so n tokens take n passes and leave n - 1 slots"
    lm = models[f]
    run = run_behind(lm, slots, 6, 2)
    got = count_generation(lm, run, [1, 2, 3, 4, 17])
    for i,n in enumerate((1, 2, 3, 4, 17)):
        assert got['flops'][i] == count_flops(lambda: run(n)) == sum(sum(pass_flops(lm, t, s, 2).values()) for t,s in [(6, slots)] + [(1, slots + 6 + j) for j in range(n - 1)])
        assert got['kv_bytes'][i] == 2*(slots + 6 + n - 1)*lm.n_layers*2*lm.kv_heads*lm.head_dim*4
        assert got['attention'][i] == sum(pass_flops(lm, t, s, 2)['attention'] for t,s in [(6, slots)] + [(1, slots + 6 + j) for j in range(n - 1)])
    assert got['slots'] == slots + 6

def test_what_happens_once_is_not_counted():
    "The first prefix of a model makes it find out whether its keys can be turned, which takes two passes"
    counts = [count_generation(lm, lambda new, **options: generate(lm, None, [7]*6, max_new_tokens=new, min_new_tokens=new, **options), [3]) for lm in [tiny_lm('llama')] for _ in range(2)]
    assert counts[0] == counts[1]

def test_sliding_attention_is_not_extrapolated():
    lm = tiny_lm('mistral', sliding_window=20)
    with pytest.raises(InputError, match='sliding attention'): count_generation(lm, run_behind(lm, 0, 5), [3])

def test_hooks_are_gone_afterwards():
    "A hook that is left on a model keeps its last cache alive"
    lm = models['llama']
    with pytest.raises(ZeroDivisionError):
        with watched_cache(lm): 1/0
    assert not lm.model._forward_hooks and not lm.body._forward_hooks

def test_watching_changes_nothing():
    "A stopping criterion that stops, or one that is asked before the first token"
    lm = load_lm('pocket', 'cpu')
    for prompt in ('Rain fell on the', ['Rain fell', 'The snow that fell last year']):
        def run(new, **options): return generate(lm, None, prompt, max_new_tokens=new, min_new_tokens=new, **options)
        seen = []
        assert len(watch_tokens(lambda new, **o: seen.append(run(new, **o)), 12, time.perf_counter)) == 12 and seen[0] == run(12)
    with pytest.raises(StateError, match='0 tokens were generated, not 4'): watch_tokens(lambda new, **options: run(new), 4, time.perf_counter)

def test_embeddings_in_front_are_watched_too():
    "generate() starts from an empty list of ids when it is given embeddings"
    lm = models['llama']
    prompt, rows = SoftPrompt(lm, 5), [[7]*9, [8]*9]
    baked = prompt.bake()
    flops = [count_generation(lm, r, [1, 6])['flops'] for r in (unbaked(prompt, rows), behind(lm, lambda: baked, rows))]
    assert flops[0] == [sum(pass_flops(lm, 14, 0, 2).values()) + sum(sum(pass_flops(lm, 1, 14 + j, 2).values()) for j in range(n)) for n in (0, 5)]
    assert flops[0][1] - flops[0][0] == flops[1][1] - flops[1][0] and flops[1][0] < flops[0][0]

def busy(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass

def test_time_is_split_at_the_first_token():
    "First token and further ones mixed up, or divided by the wrong number; sleeping counts on a clock, not here"
    def run_with(first, each):
        def run(new, stopping_criteria=()):
            time.sleep(.03); busy(first - each)
            for _ in range(new):
                busy(each)
                for c in stopping_criteria: c(torch.zeros(1, 1), None)
        return run
    device = torch.device('cpu')
    t = token_seconds(run_with(.05, .01), 3, device)
    assert t == pytest.approx([.05, .06, .07], abs=.01)
    got = beside(time_rounds(dict(a=run_with(.06, .01), b=run_with(.02, .005)), device, rounds=4, more=4), 'a')
    assert got['a']['first_ratio'] == got['a']['token_ratio'] == 1
    assert got['b']['first_ratio'] == pytest.approx(1/3, abs=.1) and got['b']['token_ratio'] == pytest.approx(.5, abs=.15)
    assert got['b']['first'] == pytest.approx(.02, abs=.01) and got['b']['token'] == pytest.approx(.005, rel=.15) and got['b']['token_quartiles'][0] <= got['b']['token_ratio'] <= got['b']['token_quartiles'][1]

def test_variants_take_turns():
    "Always the same order gives the first one a cold cache in every round"
    calls = []
    def run_as(name): return lambda new, stopping_criteria: [calls.append(name)] + [c(torch.zeros(1, 1), None) for _ in range(new) for c in stopping_criteria]
    times = time_rounds({n: run_as(n) for n in 'abc'}, torch.device('cpu'), rounds=3, more=2, warmup=1)
    rounds = [calls[i:i+3] for i in range(0, 12, 3)]
    assert all(sorted(r) == [*'abc'] for r in rounds) and {r[0] for r in rounds[1:]} == {*'abc'}
    assert all(len(t['first']) == len(t['token']) == 3 for t in times.values()), 'the warm-up is not a measurement'

@linux
def test_peak_is_that_of_the_run():
    "The highest mark of the process's whole life, or memory that an earlier call has freed"
    def hold(mb): return lambda: torch.ones(mb*250_000).sum()
    hold(300)()
    assert 95e6 < peak_memory(hold(100), 'cpu') < 140e6
    many = [torch.ones(1000) for _ in range(20_000)]; del many # freed, and maybe still with the allocator
    assert peak_memory(lambda: None, 'cpu') < 8e6
    kept = []
    peak = Peak('cpu')
    first = peak(); kept.append(torch.ones(10_000_000)); second = peak(); kept.clear(); assert first < 8e6 < 38e6 < second <= peak()

def test_where_peaks_cannot_be_measured(monkeypatch):
    "On other systems the rest of the table must still come out"
    def refuse(*args): raise OSError
    monkeypatch.setattr(cost.Path, 'write_text', refuse)
    with pytest.raises(StateError, match='clear_refs'): Peak('cpu')
    rows = measure_cost(models['llama'], 20, makers=(), prompt=0, new=(3,), rounds=2, more=2)
    assert all(r['peak_bytes'] is None and r['peak_ratio'] is None and r['kv_ratio'] for r in rows)
    assert 'peak -' in cost_line(rows[0])

@pytest.mark.parametrize('f', ['llama', 'gpt2'])
def test_texts_have_exactly_the_tokens(f):
    for lm in (models[f], load_lm('pocket', 'cpu')):
        texts = random_texts(lm, 5, 33)
        assert [len(lm.encode(t)) for t in texts] == [33]*5 and len(set(texts)) == 5 and random_texts(lm, 5, 33, seed=1) != texts
    for bad in ((0, 5), (5, 0)):
        with pytest.raises(InputError, match='at least one'): random_texts(models[f], *bad)

@pytest.mark.parametrize('size', ['12', 'x', '0x64', '2x', '2x64x2', '-1x64', ''])
def test_sizes_that_are_none(size):
    with pytest.raises(InputError, match='12x768'): random_llama(size)

def test_the_table():
    "What is known of each variant without measuring"
    lm = load_lm('pocket', 'cpu')
    kinds = {1: ('500x','icae','truncated','full'), 2: ('500x',)}
    rows = {b: {r['variant']: r for r in measure_cost(lm, 48, b, makers=m, k=4, prompt=10, new=(5, 30), rounds=2, more=4, memory=False)} for b,m in kinds.items()}
    names = ['full context','no context','500x, made now','500x, from disk','icae, made now','icae, from disk','truncated, made now','truncated, from disk','full, from disk',
             'soft prompt, unbaked','soft prompt, baked']
    for b,r in rows.items():
        assert [*r] == [n for n in names if n in r] and len(r) == {1: 11, 2: 6}[b]
        q, start = r['full context']['question'], len(lm.start_ids)
        slots = dict(zip(names, [start + 48 + q, start + q, *[4 + q]*4, *[start + 4 + q]*2, start + 48 + q, *[10 + start + 48 + q]*2]))
        assert {n: x['slots'] for n,x in r.items()} == {n: slots[n] for n in r}
        for n,x in r.items():
            assert x['kv_bytes'] == [b*(slots[n] + m - 1)*lm.n_layers*2*lm.kv_heads*lm.head_dim*4 for m in (5, 30)]
            assert x['kv_ratio'] == [k/f for k,f in zip(x['kv_bytes'], r['full context']['kv_bytes'])]
            assert x['token_bytes'] == x['weights'] + x['kv_bytes'][0] - 2*b*lm.n_layers*2*lm.kv_heads*lm.head_dim*4, 'half way from the first token to the fifth'
            assert x['task'] == 'cost' and {'command','commit','seed','device','versions','time'} <= x.keys() and x['note'] is None
    r = rows[1]
    assert r['full, from disk']['flops_token'] == r['full context']['flops_token'] > r['500x, from disk']['flops_token']
    assert r['500x, made now']['stored'] == r['full context']['stored'] < r['full, from disk']['stored'] and r['no context']['stored'] == 0
    assert r['icae, made now']['flops_first'] > r['500x, made now']['flops_first'] > r['500x, from disk']['flops_first'], 'ICAE reads its embeddings once more'
    assert r['500x, from disk']['k'] == 4 and r['soft prompt, baked']['k'] == 10 and r['full, from disk']['k'] is None
    for n in rows[2]: assert [x*2 for x in rows[1][n]['flops']] == rows[2][n]['flops'] and [x*2 for x in rows[1][n]['attention']] == rows[2][n]['attention']

def test_any_maker_has_its_rows(tmp_path):
    "A new maker is one row in MAKERS, and that alone puts it here"
    class Twice(Maker):
        name = 'twice'
        def make(self, lm, texts): return read(lm, [2*lm.encode(t) for t in texts], self.name)
    lm = models['opt']
    texts, ask = random_texts(lm, 2, 12), lm.encode('Why?')
    v = context_variants(lm, texts, ask, tmp_path, default_makers(lm, [Twice(), '500x'], 3))
    assert [*v] == ['full context','no context','twice, made now','twice, from disk','500x, made now','500x, from disk']
    assert v['twice, made now'].run(4) == v['twice, from disk'].run(4) != v['no context'].run(4)
    assert count_generation(lm, v['twice, from disk'].run, [1])['slots'] == 24 + len(ask)

def test_low_rank_corrections_are_counted():
    "They are products beside the product"
    lm = compress_weights(tiny_lm('llama'), Recipe(bits=4, group=32), torch.randint(3, 259, (4, 32)))
    low, ids = adapt(lm, layer_ranks(lm, 2)), torch.full((1, 9), 5)
    more = count_flops(lambda: low.model(ids)) - count_flops(lambda: lm.model(ids))
    assert more == 2*9*sum(2*(m.in_features + m.out_features) for m in lm.body.modules() if isinstance(m, torch.nn.Linear))
    assert measure_cost(lm, 20, makers=(), prompt=0, new=(3,), rounds=2, more=2, memory=False)[0]['note'] == PACKED_NOTE

def test_bad_settings_are_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(cost, 'count_generation', lambda *a: pytest.fail('measured'))
    lm = models['llama']
    for kw, match in (dict(new=()), 'numbers of tokens'), (dict(new=(5, 0)), 'at least 1'), (dict(new=(400,)), 'window of 256'), (dict(prompt=220, new=(3,)), 'window of 256'), \
                     (dict(batch=0, new=(3,), prompt=0), 'at least one text'), (dict(rounds=1, new=(3,), prompt=0), 'at least 2 rounds'), (dict(makers=('zip',), new=(3,), prompt=0), "no maker 'zip'"):
        with pytest.raises(InputError, match=match): measure_cost(lm, 20, **kw)

def test_rows_come_setting_by_setting():
    got = cost_rows(models['llama'], (10, 20), (1, 2), makers=(), prompt=0, new=(3,), rounds=2, more=2, memory=False)
    assert [(r[0]['batch'], r[0]['length']) for r in got] == [(1, 10), (1, 20), (2, 10), (2, 20)]
    assert series([5, 7, 10], 4) == 14 and series([5, 7, 10], 1) == 5
