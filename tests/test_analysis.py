"Which slots are used, against attentions of transformers' own and against slots that are really deleted, on every family"
import json
import numpy as np, pytest, torch
from transformers.utils import logging
from promptcompress.core import InputError
from promptcompress.kv.analysis import attention_mass, effective_slots, leave_one_out, leave_out, open_attention, over_documents, plot_usage, slot_preference, slot_shares, usage_rows, usage_table
from promptcompress.kv.prefix import collate, read
from promptcompress.lm import FAMILIES, tiny_lm

logging.disable_progress_bar()
each = pytest.mark.parametrize('family', FAMILIES)
PROMPTS, TARGETS = ['Who wrote?', 'When?', 'In which old town?'], [' An answer', ' Yes', ' In the year 1900']

def documents(lm, k=5):
    "Three prefixes of `k` slots, cut out of longer texts so that positions have gaps in front"
    return [p[-k:] for p in read(lm, [lm.encode(t) for t in ('It was a dark night.', 'Rain falls on the roof', 'Snow fell')])]

def rows(lm): return [(lm.encode(p), lm.encode(t) + [lm.eos_id]) for p,t in zip(PROMPTS, TARGETS)]

def openly(lm, family, **config):
    "The same random weights in a model that was made with eager attention"
    return tiny_lm(family, attn_implementation='eager', **config)

def run(model, lm, prefix, prompt, target, **options):
    "One document by itself, the plain model, no mask"
    b = collate([prefix], lm)
    ids = torch.tensor([prompt + target])
    with torch.no_grad(): return model(input_ids=ids, position_ids=b.next_position[:,None] + torch.arange(ids.shape[1]), past_key_values=b.cache(), **options)

def loss(logits, prompt, target):
    logp = logits[0, len(prompt)-1:-1].log_softmax(-1)
    return -logp.gather(1, torch.tensor(target)[:,None]).mean().item()

@each
def test_mass_is_that_of_transformers_own_attentions(family):
    "Wrong layer order, pads counted as keys or queries, the wrong queries (one too late), heads averaged too early"
    lm = tiny_lm(family); ps = documents(lm)
    mass, other = attention_mass(lm, ps, TARGETS, PROMPTS, batch_size=2), openly(lm, family).model
    for d,(prompt,target) in enumerate(rows(lm)):
        w = torch.stack(run(other, lm, ps[d], prompt, target, output_attentions=True).attentions)[:,0,:,len(prompt)-1:-1].mean(2) # [layers, heads, keys]
        n = 5 + len(prompt)
        for have, want in ((mass.slots[d], w[...,:5]), (mass.prompt[d], w[...,5:n].sum(-1)), (mass.target[d], w[...,n:].sum(-1))): assert torch.allclose(have, want, atol=1e-5)
    assert torch.allclose(mass.prefix + mass.prompt + mass.target, torch.ones(()), atol=1e-5)

class Deleted:
    "Deletes one slot from one layer's cache just before that layer attends, and its column from the mask"
    def __init__(self, lm, layer, slot):
        self.layer, self.slot = layer, slot
        module = [m for m in lm.body.modules() if getattr(m, 'layer_idx', None) == layer and 'Attention' in type(m).__name__]
        self.handle = module[0].register_forward_pre_hook(self.hook, with_kwargs=True)
    def hook(self, module, args, kwargs):
        cache = kwargs.get('past_key_values', kwargs.get('layer_past')).layers[self.layer]
        keep = [j for j in range(cache.keys.shape[2]) if j != self.slot]
        cache.keys, cache.values = cache.keys[:,:,keep], cache.values[:,:,keep]
        m = kwargs['attention_mask']
        return args, kwargs | dict(attention_mask=torch.cat([m[..., :self.slot], m[..., self.slot+1:]], -1))

@each
def test_a_slot_hidden_in_one_layer_is_as_if_deleted_there(family):
    "Hidden in the wrong layer or for the wrong row, still visible to some head, or its weight not given to the others"
    lm = tiny_lm(family); ps = documents(lm, 3)
    got, other = leave_one_out(lm, ps, TARGETS, PROMPTS, by_layer=True, batch_size=7), openly(lm, family)
    assert got.without.shape == (3, 3, 3)
    for d,(prompt,target) in enumerate(rows(lm)):
        assert abs(got.full[d] - loss(run(lm.model, lm, ps[d], prompt, target).logits, prompt, target)) < 1e-4
        for layer in range(3):
            for slot in range(3):
                gone = Deleted(other, layer, slot)
                want = loss(run(other.model, lm, ps[d], prompt, target).logits, prompt, target)
                gone.handle.remove()
                assert abs(got.without[d,layer,slot] - want) < 1e-4
    assert got.rise.abs().amax((0, 2)).min() > 1e-3 # the test sees something in every layer

@each
def test_a_slot_left_out_is_as_if_never_there(family):
    "Slots counted from the wrong end, or positions that close the gap"
    lm = tiny_lm(family); ps = documents(lm, 4)
    got = leave_one_out(lm, ps, TARGETS, PROMPTS, batch_size=4)
    for d,(prompt,target) in enumerate(rows(lm)):
        for slot in range(4):
            a, b = ps[d][:slot], ps[d][slot+1:]
            for x in ('keys','values'): setattr(a, x, torch.cat([getattr(a, x), getattr(b, x)], 2))
            a.positions = torch.cat([a.positions, b.positions])
            assert abs(got.without[d,slot] - loss(run(lm.model, lm, a, prompt, target).logits, prompt, target)) < 1e-4

def test_several_slots_left_out_are_all_gone():
    "Only the first or last of them hidden, or hidden in one layer only"
    lm = tiny_lm('qwen3'); ps = documents(lm, 5)
    assert torch.allclose(leave_out(lm, ps, TARGETS, [0, 1, 2], PROMPTS), leave_one_out(lm, [p[3:] for p in ps], TARGETS, PROMPTS).full, atol=1e-5)
    assert torch.allclose(leave_out(lm, ps, TARGETS, range(5), PROMPTS), leave_one_out(lm, documents(lm, 1), TARGETS, PROMPTS).without[:,0], atol=1e-5)
    for bad in ([5], [-1]):
        with pytest.raises(InputError, match='slots 0 to 4'): leave_out(lm, ps, TARGETS, bad)

def test_the_only_slot_can_be_left_out():
    "k=1: a mask without any slot"
    lm = tiny_lm(); ps = documents(lm, 1)
    out = leave_one_out(lm, ps, TARGETS, PROMPTS)
    for d,(prompt,target) in enumerate(rows(lm)): assert abs(out.without[d,0] - loss(run(lm.model, lm, ps[d][:0], prompt, target).logits, prompt, target)) < 1e-4
    lines = usage_rows(lm, ps, TARGETS, PROMPTS)
    assert lines[0]['agreement'] is None and lines[1]['share'] == 1 and lines[0]['uneven']['attention']['effective'] == 1

def test_the_users_model_is_left_as_it_was():
    "Hooks or the eager setting that stay on the frozen model make all later generation slow, or wrong"
    lm = tiny_lm(); ps = documents(lm)
    before, hooks = lm.config._attn_implementation, lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())
    weights, had = [p.data_ptr() for p in lm.model.parameters()], hooks()
    attention_mass(lm, ps, TARGETS); leave_one_out(lm, ps, TARGETS, by_layer=True)
    reader, _ = open_attention(lm)
    assert lm.config._attn_implementation == before != 'eager' and hooks() == had
    assert [p.data_ptr() for p in reader.model.parameters()] == weights == [p.data_ptr() for p in lm.model.parameters()]
    assert torch.equal(leave_one_out(lm, ps, TARGETS).full, leave_one_out(lm, ps, TARGETS).full)

def test_order_and_batches_do_not_matter():
    "Documents are sorted by length for batching: each result must find its way back"
    lm = tiny_lm(); ps = documents(lm)
    for f in (lambda *a, **k: attention_mass(*a, **k).slots, lambda *a, **k: leave_one_out(*a, **k).without):
        whole = f(lm, ps, TARGETS, PROMPTS, batch_size=64)
        for i in range(3): assert torch.allclose(f(lm, ps[i:i+1], TARGETS[i:i+1], PROMPTS[i:i+1], batch_size=1)[0], whole[i], atol=1e-5)
        assert torch.allclose(f(lm, ps[::-1], TARGETS[::-1], PROMPTS[::-1], batch_size=2).flip(0), whole, atol=1e-5)

def test_equal_slots_are_used_equally():
    "An effective number that isn't k for k copies of one slot, or isn't 1 for a slot that gets everything"
    lm = tiny_lm(); p = documents(lm, 4)[0]
    p.keys, p.values = p.keys[:,:,:1].expand_as(p.keys).contiguous(), p.values[:,:,:1].expand_as(p.values).contiguous()
    mass = attention_mass(lm, [p], TARGETS[:1])
    assert abs(effective_slots(mass.slots).min() - 4) < 1e-6 and np.ptp(leave_one_out(lm, [p], TARGETS[:1]).without[0].numpy()) < 1e-5
    assert effective_slots([0, 0, 7]).item() == 1 and effective_slots([-1, 2, 2]).item() == pytest.approx(2)
    assert slot_shares([[0., 0.], [-1., -2.]]).isnan().all() # nothing is used: there is no share, and no division warning turned into 0

def test_preference_is_told_from_chance():
    "Profiles that are uneven, each in its own way, must not count as a habit of the compressor; a slight habit in many documents must"
    rng = np.random.default_rng(0)
    ps = [slot_preference(rng.gamma(1., size=(30, 8)), n=200, seed=i)['p'] for i in range(20)]
    assert sum(p < .05 for p in ps) <= 4
    habit = slot_preference(rng.gamma(9., size=(60, 8))*np.linspace(1, 1.6, 8), n=200)
    assert habit['p'] < .01 and habit['effective'] < habit['chance'] and habit['low'] <= habit['effective'] <= habit['high'] + .05
    assert slot_preference(np.full((4, 3), -1.)) == dict(effective=None, low=None, high=None, chance=None, p=None)
    some = np.array([[1., 1.], [-1., -1.]]) # a document in which nothing is used is left out
    assert slot_preference(some)['effective'] == pytest.approx(2)

def test_intervals_draw_whole_documents():
    "Slots resampled by themselves would give an interval where all documents agree"
    v = np.tile([1., 2., 4.], (10, 1))
    value, low, high = over_documents(v)
    assert (value == low).all() and (value == high).all() and value.tolist() == [1, 2, 4]
    value, low, high = over_documents(np.arange(20.))
    assert low < value < high and high - low == pytest.approx(2*1.96*np.arange(20.).std()/20**.5, rel=.15)

@pytest.mark.parametrize('change, message', [
    (dict(targets=TARGETS[:2]), '3 prefixes, 3 prompts and 2 targets'),
    (dict(prompts=PROMPTS[:1]), '1 prompts'),
    (dict(targets=['a', [], 'b']), 'Prompt or target 1 is empty'),
    (dict(prompts=['a', 'b', '']), 'Prompt or target 2 is empty'),
    (dict(prefixes=[]), '0 prefixes')])
def test_bad_input_is_named(change, message):
    lm = tiny_lm()
    a = dict(prefixes=documents(lm), targets=TARGETS, prompts=PROMPTS) | change
    for f in (attention_mass, leave_one_out, usage_rows):
        with pytest.raises(InputError, match=message): f(lm, **a)

def test_prefixes_of_different_lengths_are_refused():
    "Slot 3 of one document would be averaged with slot 7 of another"
    lm = tiny_lm(); ps = documents(lm)
    with pytest.raises(InputError, match=r'\[4, 5\] slots'): attention_mass(lm, [ps[0], ps[1][1:], ps[2]], TARGETS)
    with pytest.raises(InputError, match=r'\[0\] slots'): leave_one_out(lm, [p[:0] for p in ps], TARGETS)

def test_attention_that_cannot_be_watched_is_refused():
    "A model whose modules don't say which layer they are would give a map with layers mixed up"
    lm = tiny_lm('gpt2')
    for m in lm.body.modules():
        if 'Attention' in type(m).__name__: m.layer_idx = 0
    with pytest.raises(InputError, match='found 1'): open_attention(lm)

def test_rows_survive_json_and_make_a_picture(tmp_path):
    "numpy numbers or nan in rows; a picture that takes the wrong rows, or whose CSV lacks what it shows"
    lm = tiny_lm(); lines = []
    for k in (2, 4): lines += usage_rows(lm, documents(lm, k), TARGETS, by_layer=k == 4, compressor='x')
    lines += usage_rows(lm, documents(lm, 3), TARGETS, PROMPTS, of='answer')
    again = [json.loads(json.dumps(r, allow_nan=False)) for r in lines]
    assert again == lines and {r['task'] for r in lines} == {'usage'} and [r['slot'] for r in lines if r['k'] == 2] == [None, 0, 1]
    whole, *slots = [r for r in lines if r['k'] == 4]
    loo = leave_one_out(lm, documents(lm, 4), TARGETS, by_layer=True).rise.mean(0)
    assert np.allclose([r['rise_layers'] for r in slots], loo.T.numpy(), atol=1e-4)
    assert sum(r['share'] for r in slots) == pytest.approx(1, abs=1e-4) and np.mean(whole['prefix_layers']) == pytest.approx(whole['prefix'], rel=1e-4)
    table = usage_table([dict(task='qa', f1=1), *lines])
    heads = table[(table.k == 4) & (table.slot == 1) & table['head'].notna()]
    assert len(heads) == 12 and heads.value.mean() == pytest.approx(slots[1]['attention'], rel=1e-4)
    for of,k in (('regenerate', 2), ('answer', 3)):
        plot_usage([dict(task='qa'), *lines], tmp_path/f'{k}.png', k=k, of=of)
        assert (tmp_path/f'{k}.png').stat().st_size > 10_000
        csv = (tmp_path/f'{k}.csv').read_text().splitlines()
        assert csv[0] == 'of,k,slot,measure,layer,head,value,low,high' and {l.split(',')[1] for l in csv[1:]} == {str(k)}
    with pytest.raises(InputError, match='k=9'): plot_usage(lines, k=9)
    with pytest.raises(InputError, match='no rows'): plot_usage([])
    with pytest.raises(InputError, match='of one run, 5 of them, and these are 10'): plot_usage([r for r in lines if r['k'] == 4]*2)
    with pytest.raises(InputError, match='these are 4'): plot_usage([r for r in lines if r['k'] == 4][:-1])
