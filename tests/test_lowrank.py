"Low-rank corrections on every family of models, pruned and packed: the optimum, the round trip through PEFT, training"
import pytest, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from promptcompress.core import InputError, StateError
from promptcompress.kv.generate import generate, nll
from promptcompress.kv.prefix import read
from promptcompress.lm import FAMILIES, shared_copy, tiny_lm
from promptcompress.train import fit, training_args
from promptcompress.weights import lowrank
from promptcompress.weights.lowrank import LowRank, adapt, eora, eora_factors, find_layers, layer_ranks, load_lora, lowrank_bytes, lowrank_layers, rank_for, save_lora
from promptcompress.weights.packed import packed_layers, to_dense
from promptcompress.weights.recipe import Recipe
from promptcompress.weights.walk import blocks, compress_weights

ids = torch.randint(3, 250, (8, 64), generator=torch.Generator().manual_seed(1))
recipes = dict(pruned=Recipe(.625), packed=Recipe(bits=3, group=32), both=Recipe(.5, 3, group=32))
family = pytest.mark.parametrize('f', FAMILIES)
made = {}

def pair(f, kind):
    "A tiny model, and what compression made of it"
    if (f, kind) not in made: full = tiny_lm(f); made[f, kind] = full, compress_weights(full, recipes[kind], ids)
    return made[f, kind]

def state(lm): return {n: t.clone() for n,t in lm.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)

@torch.no_grad()
def first_block(lm, name):
    "What comes out of the first block, whose inputs are those of the full model"
    seen = []
    handle = lm.model.get_submodule(name)[0].register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    lm.model(ids); handle.remove()
    return seen[0]

# --- the closed form -------------------------------------------------------------------------------------------------

def problem(out, k, tokens=400, seed=0):
    gen = torch.Generator().manual_seed(seed)
    X = torch.randn(k, k, generator=gen)*torch.logspace(1, -1, k)@torch.randn(k, tokens, generator=gen)
    return torch.randn(out, k, generator=gen), X

@pytest.mark.parametrize('out,k', [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize('tokens', [400, 10]) # with 10, C is singular
@pytest.mark.parametrize('rank', [1, 5])
def test_nothing_of_that_rank_is_better(out, k, tokens, rank):
    "As good as Eckart and Young say of D X itself; no step away from it, in any direction, is better"
    D, X = (t.double() for t in problem(out, k, tokens))
    B, A = (t.double() for t in eora_factors(D, X@X.T, rank))
    error = lambda M: ((D - M)@X).norm().item()
    best = torch.linalg.svdvals(D@X)[rank:].norm().item()
    assert error(B@A) == pytest.approx(best, rel=1e-5)
    gen = torch.Generator().manual_seed(2)
    for size in (1e-3, 1e-2, .1, 1.):
        for _ in range(20): assert error((B + size*B.std()*torch.randn(B.shape, generator=gen))@(A + size*A.std()*torch.randn(A.shape, generator=gen))) > best*(1 - 1e-6)

@pytest.mark.parametrize('out,k', [(24, 40), (40, 24)])
def test_factors_are_nested_and_balanced(out, k):
    "The first columns of a larger rank are the smaller rank's; B and A are of one size"
    D, X = problem(out, k); C = X@X.T
    (B, A), (B2, A2) = eora_factors(D, C, 6), eora_factors(D, C, 2)
    torch.testing.assert_close(B[:, :2]@A[:2], B2@A2, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))
    B, A = eora_factors(torch.zeros(out, k), C, 3) # nothing was lost
    assert (B@A).abs().max() == 0 and torch.isfinite(B).all() and torch.isfinite(A).all()

# --- on models -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('f,kind', [*((f, k) for f in FAMILIES for k in ('pruned','packed')), ('llama','both')])
def test_eora_on_every_family(f, kind):
    full, small = pair(f, kind); before = state(small)
    assert bool(packed_layers(small)) == (kind != 'pruned')
    healed, whole = eora(full, small, ids, 8), eora(full, small, ids, 'full')
    name = blocks(full)[0]; want = first_block(full, name)
    lost, left = ((first_block(m, name) - want).norm() for m in (small, healed))
    assert left < .95*lost
    assert len(healed.report) == len(lowrank_layers(healed)) == len(find_layers(small)) and all(r['after'] < r['before'] for r in healed.report)
    with torch.no_grad(): a, b = (m.model(ids).logits for m in (full, whole))
    torch.testing.assert_close(a, b, atol=2e-3*a.abs().max().item(), rtol=0)
    assert same(state(small), before) # bit for bit, and no layer added
    assert len(packed_layers(healed)) == len(packed_layers(small)) and healed.config.to_dict() == small.config.to_dict()

@pytest.mark.parametrize('f,kind', [*((f, 'packed') for f in FAMILIES), ('gpt2','pruned'), ('llama','both')])
def test_peft_round_trip(f, kind, tmp_path):
    "Stock PEFT loads what was saved and generates the same tokens; so do we"
    full, small = pair(f, kind)
    healed = eora(full, small, ids, {n.split('.')[-1]: 2 + i%2 for i,n in enumerate(find_layers(small))})
    save_lora(healed, tmp_path)
    theirs, ours = PeftModel.from_pretrained(shared_copy(small.model), tmp_path), load_lora(small, tmp_path)
    prompt = torch.tensor([small.encode('The sun is')])
    new = [m.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=2) for m in (theirs, healed.model, ours.model, small.model)]
    assert torch.equal(new[0], new[1]) and torch.equal(new[1], new[2])
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, healed.model(ids).logits) and torch.equal(ours.model(ids).logits, healed.model(ids).logits)
        assert not torch.allclose(healed.model(ids).logits, small.model(ids).logits, atol=1e-2)
    assert ours.fingerprint == healed.fingerprint != small.fingerprint

def test_half_of_the_bytes(tmp_path):
    full, small = pair('llama', 'both'); healed = eora(full, small, ids, 4)
    with torch.no_grad():
        a, b = (load_lora(small, save_lora(healed, tmp_path/str(t), t)).model(ids).logits for t in (None, torch.float16))
        assert (a - b).abs().max() < .02*a.abs().max()
    sizes = [sum(t.nbytes for t in load_file(tmp_path/str(t)/'adapter_model.safetensors').values()) for t in (None, torch.float16)]
    assert sizes == [lowrank_bytes(healed, torch.float32), lowrank_bytes(healed)] == [2*lowrank_bytes(healed), lowrank_bytes(healed)]

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_corrected_models_are_models(dtype):
    "Prefixes, batches, gradients to the prefix, and packed layers made dense, in either dtype"
    full = tiny_lm('llama'); full.model.to(dtype)
    small = compress_weights(full, recipes['both'], ids); healed = eora(full, small, ids, 8)
    assert lowrank_layers(healed) and all(p.dtype == torch.float32 for n,p in healed.model.named_parameters() if 'lora_' in n)
    docs = read(healed, [healed.encode('Ada wrote the first program.')]*2)
    assert len(generate(healed, docs, ['Who?', 'What did she write?'], 4)) == 2
    labels = ids.clone(); labels[:,0] = -100
    a, b, c = (nll(m, None, ids, labels).mean.item() for m in (healed, to_dense(healed), small))
    assert a == pytest.approx(b, abs=1e-5 if dtype == torch.float32 else .02) and a != pytest.approx(c, abs=1e-3)

def test_calibration_text_stands_behind_the_start_tokens(monkeypatch):
    full, small = pair('llama', 'pruned'); seen = []
    plain = lowrank.record_calls
    monkeypatch.setattr(lowrank, 'record_calls', lambda lm, batches: (seen.extend(batches := list(batches)), plain(lm, batches))[1])
    small.start_ids, other = [0], small
    try: eora(full, small, ['The sun is a star, and the moon is not. '*40], 2, n=4, length=32)
    finally: del small.start_ids
    got = torch.cat(seen)
    assert got.shape == (4, 32) and (got[:,0] == 0).all()

def test_statistics_come_from_the_corrected_model(monkeypatch):
    "At full rank the last block sees what it sees in the full model"
    full, small = pair('llama', 'both'); hessians = []
    plain = lowrank.collect
    monkeypatch.setattr(lowrank, 'collect', lambda *a: (hessians.append(h := plain(*a)), h)[1])
    eora(full, small, ids, 'full', fast=False); eora(full, to_dense(full), ids, 1, fast=False)
    last, wanted = hessians[2][0].matrix, hessians[5][0].matrix
    torch.testing.assert_close(last, wanted, atol=1e-3*wanted.abs().max().item(), rtol=0)

# --- what can't work -------------------------------------------------------------------------------------------------

def test_bad_input(tmp_path):
    full, small = pair('llama', 'pruned')
    def refused(words, f, *args, error=InputError, **kw):
        with pytest.raises(error, match=words): f(*args, **kw)
    refused('give the model that was compressed', eora, tiny_lm('opt'), small, ids)
    refused('give the model that was compressed', eora, full, compress_weights(tiny_lm('llama', intermediate_size=80), Recipe(.5), ids), ids)
    refused('needs calibration text', eora, full, small, None)
    refused('already', eora, full, eora(full, small, ids, 1), ids)
    for r in (0, -1, 33, 1.5, None, True): refused('not possible', eora, full, small, ids, r)
    refused('is called', eora, full, small, ids, {'gate': 2})
    refused('No layer was chosen', eora, full, small, ids, 1, [])
    refused('more text', eora, full, small, ['Too short.'])
    refused('carries no low-rank', save_lora, small, tmp_path); refused('carries no low-rank', LowRank.from_eora, small)
    refused('holds no PEFT adapter', load_lora, small, tmp_path)
    refused('too few', rank_for, full, 0); refused('count', rank_for, full, 10**6, 'floats')
    broken = tiny_lm('llama'); broken.model.model.layers[1].mlp.up_proj.weight[0,0] = float('nan')
    refused('layers.1.mlp.up_proj are not finite', eora, broken, small, ids, 1, error=StateError)

def test_adapters_that_do_not_fit(tmp_path):
    "PEFT itself would go on with a warning when keys are missing"
    full, small = pair('llama', 'pruned'); save_lora(eora(full, small, ids, 2), tmp_path)
    for other in (tiny_lm('llama', hidden_size=32), tiny_lm('gpt2'), tiny_lm('llama', num_hidden_layers=2)):
        with pytest.raises(InputError, match='does not fit'): load_lora(other, tmp_path)
    file = tmp_path/'adapter_model.safetensors'
    save_file({n: t for n,t in load_file(file).items() if 'layers.1' not in n}, file)
    with pytest.raises(InputError, match='does not fit'): load_lora(small, tmp_path)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match='does not fit'): load_lora(small, tmp_path)

@family
@pytest.mark.parametrize('per', ['parameters', 'bytes'])
def test_rank_for_spends_the_budget(f, per):
    "It fits, nothing more does, and enough for rank r everywhere is rank r everywhere"
    lm, unit = tiny_lm(f), 2 if per == 'bytes' else 1
    layers = find_layers(lm); every = unit*sum(sum(m.weight.shape) for m in layers.values())
    for budget in (every//3, every, 2*every, int(2.5*every), 10**9):
        dealt = layer_ranks(lm, rank_for(lm, budget, per))
        left = budget - lowrank_bytes(adapt(lm, dealt))//(2//unit)
        assert left >= 0
        for kind in {n.split('.')[-1] if f != 'gpt2' else n.split('.', 3)[-1] for n in layers}: # 'c_proj' is in two places
            some = [n for n in layers if n.endswith(f'.{kind}')]
            assert dealt.get(some[0], 0) == min(layers[some[0]].weight.shape) or unit*sum(sum(layers[n].weight.shape) for n in some) > left
        if budget % every == 0 and budget < 10**9: assert list(dealt.values()) == [budget//every]*len(layers) and left == 0

# --- training --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('f,kind', [('llama','both'), ('gpt2','packed'), ('gpt2','pruned')])
@pytest.mark.parametrize('start', ['zero', 'eora'])
def test_training(f, kind, start, tmp_path):
    full, small = pair(f, kind); before = state(small)
    source = eora(full, small, ids, 2) if start == 'eora' else small
    untouched = state(source)
    learner = LowRank(small, r=2) if start == 'zero' else LowRank.from_eora(source)
    text = [[0] + small.encode(s) for s in ('The sun is a star.', 'The moon is not.', 'Rain falls on the sea.')]
    rows = [dict(input_ids=t, labels=[-100] + t[1:]) for t in text]*4
    batch = learner.collate(rows[:3])
    first = learner(**batch)['loss'].item()
    assert first == pytest.approx(nll(source, None, batch['input_ids'], batch['labels'], batch['mask']).mean.item(), abs=1e-5)
    fit(learner, rows, training_args(tmp_path/'run', 10, lr=1e-2, batch=6, save_strategy='no'))
    assert learner(**batch)['loss'].item() < first - .5
    assert same(state(small), before) and same(state(source), untouched)
    assert {n for n in learner.trained()} == {n for n,_ in learner.named_parameters() if 'lora_' in n}
    save_lora(learner.lm, tmp_path/'lora')
    with torch.no_grad(): assert torch.equal(load_lora(small, tmp_path/'lora').model(ids).logits, learner.lm.model(ids).logits)

def test_no_dropout_while_training():
    lm = tiny_lm('gpt2'); assert lm.config.resid_pdrop > 0
    learner = LowRank(lm, 2); batch = learner.collate([dict(input_ids=ids[0].tolist(), labels=[-100] + ids[0, 1:].tolist())])
    learner.train(); a, b = (learner(**batch)['loss'].item() for _ in range(2))
    assert a == b and learner.training

def test_resume(tmp_path):
    "A checkpoint holds the corrections alone, and training goes on from it"
    full, small = pair('llama', 'both')
    rows = [dict(input_ids=r.tolist(), labels=[-100] + r[1:].tolist()) for r in ids[:, :24]]
    args = lambda steps: training_args(tmp_path, steps, lr=1e-3, batch=4, save_steps=2, lr_scheduler_type='constant')
    fit(LowRank(small, 2), rows, args(2))
    assert {p.name for p in (tmp_path/'checkpoint-2').glob('*.safetensors')} == {'trained.safetensors'}
    log = fit(LowRank(small, 2, seed=5), rows, args(4), resume=True)
    assert (tmp_path/'checkpoint-4').is_dir()
