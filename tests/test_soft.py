"Soft prompts on every family and kind of compression: baking, gradients, what stands behind them, training that is chosen, killed, shared and refused"
import copy, json, math, os, random, re, shutil, signal, socket, subprocess, sys
from functools import cache
from pathlib import Path
import numpy as np, pytest, torch
from torch.nn import functional as F
from promptcompress.core import InputError, StateError, load_tensors, read_json, save_tensors, write_json
from promptcompress.evaluation.perplexity import perplexity, published_deflation
from promptcompress.kv.compressor import Compressor, CompressorConfig, CompressorMaker
from promptcompress.kv.generate import generate, join_masks, label_logits, nll, positions_behind
from promptcompress.kv.makers import make_maker
from promptcompress.kv.prefix import collate, pad_rows, read, read_behind
from promptcompress.lm import FAMILIES, LM, shared_copy, tiny_lm
from promptcompress.soft import tune as tuning
from promptcompress.soft.prompt import KVPrompt, Prompt, PromptMaker, SoftPrompt, load_prompt, prompt_to_peft, random_rows, recomputed, to_prompt_embeds
from promptcompress.soft.tune import KeepBest, TextWindows, settings, tune, tune_soft_prompt
from promptcompress.weights.packed import packed_layers, to_dense
from promptcompress.weights.recipe import Recipe
from promptcompress.weights.walk import compress_weights

here = Path(__file__).parent
rain = ['Rain falls on the roof. It falls and falls. '*20, 'The sun is out today, and the roof is dry. '*20]
night = ['zzz qqq xxx 000 111 '*60]
texts = ['Rain falls on the roof.', 'No.', 'Who wrote it, and when?']
quick = dict(steps=4, batch=2, length=24, use_cpu=True, report_to='none', disable_tqdm=True)

recipes = dict(full=None, pruned=Recipe(.5), packed=Recipe(bits=4, group=32), both=Recipe(.5, 4, 32))
@cache
def model(f, how='full', dtype=None):
    "A tiny model of family `f`, compressed; shared by all tests, which leave it as it is"
    if dtype: m = model(f, how); return LM(copy.deepcopy(m.model).to(dtype), m.tokenizer, m.name)
    if how == 'fake': return to_dense(model(f, 'both'))
    if how == 'full': return tiny_lm(f)
    return compress_weights(tiny_lm(f), recipes[how], torch.randint(3, 250, (2, 32), generator=torch.Generator().manual_seed(0)))
kinds_of_model = ['full','pruned','packed','both','fake']
movable = [f for f in FAMILIES if f not in ('opt','gpt2')]
family, kind = pytest.mark.parametrize('f', FAMILIES), pytest.mark.parametrize('kind', ['soft','kv'])
def prompt_of(kind, lm, k=5, **kw): return (SoftPrompt if kind == 'soft' else KVPrompt)(lm, k, **kw)

def close(a, b, tol=1e-4): torch.testing.assert_close(a, b, atol=tol*max(b.abs().max().item(), 1.), rtol=0)
def rows_of(lm, side='right'):
    "Three texts of different lengths: ids, mask, labels without each row's first token"
    ids, mask = pad_rows([[lm.bos_id] + lm.encode(t) for t in texts], lm.pad_id, side=side)
    labels = ids.masked_fill(~mask, -100); labels[torch.arange(3), mask.long().argmax(1)] = -100
    return ids, mask, labels

@torch.no_grad()
def by_hand(lm, E, ids):
    "Logits of one row of ids behind the embeddings `E`: one after the other, without a mask, positions or a cache"
    return lm.model(inputs_embeds=torch.cat([E.to(lm.dtype), lm.embed(ids)])[None]).logits[0, len(E):]

# --- baked is prepended ----------------------------------------------------------------------------------------------

def check_baked(lm, side, tol):
    prompt = SoftPrompt(lm, 5)
    ids, mask, labels = rows_of(lm, side)
    want = [by_hand(lm, prompt.embeddings.detach(), i[m]).float() for i,m in zip(ids, mask)]
    baked, (args, text) = prompt.bake(), prompt.prepend(ids, mask)
    assert baked.keys.dtype == lm.dtype and (len(baked), baked.next_position, baked.positions.tolist()) == (5, 5, [*range(5)])
    step = args['attention_mask'].diff(dim=1) # pads, prompt, text; or prompt, text, pads: nothing is masked in between
    assert (step >= 0).all() if side == 'left' else (step <= 0).all()
    with torch.no_grad():
        prepended, batch = lm.model(**args).logits, collate([baked]*3, lm)
        behind = lm.model(input_ids=ids, attention_mask=join_masks(batch, mask), position_ids=positions_behind(batch, mask), past_key_values=batch.cache()).logits
        learnt, at = label_logits(lm, prompt.batch(), ids, labels, mask)
    for i,w in enumerate(want):
        close(behind[i][mask[i]].float(), w, tol); close(prepended[i][text[i]].float(), w, tol)
        close(learnt[at[0] == i], w[:-1], tol)
    return prompt

@family
@pytest.mark.parametrize('how', kinds_of_model)
@pytest.mark.parametrize('side', ['right','left'])
def test_baked_is_prepended(f, how, side):
    "In a padded batch, baked and prepended: the logits of each row by itself behind the embeddings"
    assert bool(packed_layers(model(f, how))) == (how in ('packed','both'))
    check_baked(model(f, how), side, 1e-4)

@family
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_baked_is_prepended_in_half_precision(f, dtype):
    lm = model(f, 'both', dtype)
    try: lm.model(torch.tensor([[3, 4]]))
    except RuntimeError as e:
        if 'not implemented' in str(e): pytest.skip(f'no {dtype} on this CPU: {e}')
        raise
    assert lm.dtype == dtype and check_baked(lm, 'left', .05 if dtype == torch.bfloat16 else .01).embeddings.dtype == torch.float32

@family
@pytest.mark.parametrize('how', ['full','both'])
def test_greedy_text_behind_a_baked_prompt(f, how):
    "A left-padded batch writes what a loop without cache or padding writes behind the embeddings"
    lm, n = model(f, how), 5
    prompt = SoftPrompt(lm, 5)
    def loop(ids):
        for _ in range(n): ids = [*ids, by_hand(lm, prompt.embeddings.detach(), torch.tensor(ids))[-1].argmax().item()]
        return lm.decode(ids[-n:])
    assert generate(lm, prompt.bake(), texts, n, eos_token_id=None) == [loop(lm.encode(t)) for t in texts]

# --- gradients -------------------------------------------------------------------------------------------------------

@kind
@pytest.mark.parametrize('f,how', [('llama','both'), ('gpt2','packed'), ('gpt_neox','fake'), ('opt','pruned')])
def test_gradients_through_compressed_weights(f, how, kind):
    "Finite differences in double precision, along the gradient and along chance; no frozen weight gets one"
    lm = model(f, how, torch.float64)
    prompt = prompt_of(kind, lm)
    batch = dict(zip(('input_ids','mask','labels'), rows_of(lm)))
    prompt(**batch)['loss'].backward()
    grads = {n: p.grad.clone() for n,p in prompt.trained().items()}
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    start, gen = {n: p.detach().clone() for n,p in prompt.trained().items()}, torch.Generator().manual_seed(0)
    size = sum((g**2).sum() for g in grads.values()).sqrt().item()
    @torch.no_grad()
    def moved(direction, step):
        for n,p in prompt.trained().items(): p.copy_(start[n] + step*direction[n])
        return prompt(**batch)['loss'].item()
    for direction in (grads, *({n: torch.randn(g.shape, generator=gen)*g.abs().mean() for n,g in grads.items()} for _ in range(2))):
        length = sum((d**2).sum() for d in direction.values()).sqrt().item()
        slope = sum((d*grads[n]).sum() for n,d in direction.items()).item()/length
        h = 2e-3/length
        assert (moved(direction, h) - moved(direction, -h))/4e-3 == pytest.approx(slope, abs=.01*size)

@kind
@pytest.mark.parametrize('f', ['llama','gpt2'])
def test_training_changes_the_prompt_and_nothing_else(f, kind):
    lm = model(f, 'both')
    before = {n: t.clone() for n,t in lm.model.state_dict().items()}
    prompt = prompt_of(kind, lm); start = {n: p.detach().clone() for n,p in prompt.trained().items()}
    tune(prompt, rain, **quick)
    after = lm.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n,t in before.items())
    assert all(p.grad is None for p in lm.model.parameters())
    assert all(p.dtype == torch.float32 and not torch.equal(p, start[n]) for n,p in prompt.trained().items())

@kind
def test_a_prompt_for_bf16_learns_in_fp32(kind):
    "Updates that bf16 could not add arrive; the model, and what is baked, stay bf16"
    lm = model('llama', 'both', torch.bfloat16)
    prompt = prompt_of(kind, lm); start = {n: p.detach().clone() for n,p in prompt.trained().items()}
    tune(prompt, rain, lr=1e-6, **quick)
    for n,p in prompt.trained().items():
        assert p.dtype == torch.float32 and not torch.equal(p, start[n])
        assert (p.bfloat16() == start[n].bfloat16()).float().mean() > .9, 'steps this small are lost in bf16'
    assert prompt.bake().keys.dtype == lm.dtype == torch.bfloat16 and prompt.home['dtype'] == 'bfloat16'

def blocks(lm): return next(m for m in lm.body.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == lm.n_layers)

@family
@pytest.mark.parametrize('side', ['right','left'])
def test_recomputing_changes_nothing_but_memory(f, side):
    "The same loss and gradients, from blocks that run twice and are themselves again afterwards"
    lm, runs = model(f, 'both'), []
    batch = dict(zip(('input_ids','mask','labels'), rows_of(lm, side)))
    layer = next(m for n,m in blocks(lm)[1].named_modules() if isinstance(m, torch.nn.Linear))
    handle = layer.register_forward_hook(lambda m, args, out: runs.append(out.shape[0]))
    found = {}
    for on in (False, True):
        prompt = SoftPrompt(lm, 5, checkpointing=on); runs.clear()
        loss = prompt(**batch)['loss']; loss.backward()
        found[on] = loss.item(), prompt.embeddings.grad, len(runs)
        assert not any('forward' in vars(b) for b in blocks(lm))
    handle.remove()
    assert found[True][0] == pytest.approx(found[False][0], abs=1e-5)
    close(found[True][1], found[False][1], 2e-5)
    assert found[False][2] == 2 and found[True][2] == 2 and runs == [3, 3], 'prompt and text, or both together, twice'
    with torch.no_grad(): assert prompt(**batch)['loss'].item() == pytest.approx(found[False][0], abs=1e-5)

def test_blocks_are_themselves_again():
    "After an error inside, and where somebody else has put a forward of their own (as hooks for offloading do)"
    lm = tiny_lm('llama'); stack = blocks(lm)
    def bad(*args, **kw): raise MemoryError
    with pytest.raises(MemoryError):
        with recomputed(lm): assert all('forward' in vars(b) for b in stack); raise MemoryError
    assert not any('forward' in vars(b) for b in stack)
    stack[0].forward = bad
    prompt = SoftPrompt(lm, 3, checkpointing=True)
    ids, mask, labels = rows_of(lm)
    with pytest.raises(MemoryError): prompt(ids, mask, labels)
    assert stack[0].forward is bad and not any('forward' in vars(b) for b in stack[1:])

# --- what stands behind a prompt -------------------------------------------------------------------------------------

def random_compressor(lm, carrier):
    c = Compressor(lm, CompressorConfig(carrier=carrier, k=4, r=2))
    with torch.no_grad():
        for n,p in c.trained().items():
            if 'lora_B' in n: p.copy_(.05*torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    return c

@pytest.mark.parametrize('f', movable)
@pytest.mark.parametrize('what', ['full','500x','icae'])
def test_a_document_moved_behind_a_prompt(f, what):
    "Slots, positions, keys and values; and the same through a maker"
    lm = model(f, 'both')
    prompt = SoftPrompt(lm, 5); baked = prompt.bake()
    if what == 'full': doc, = read(lm, [lm.encode(texts[0])])
    else: c = random_compressor(lm, 'kv' if what == '500x' else 'embeds'); doc = c.compress(texts[0])
    both = baked + doc
    assert (len(both), both.next_position) == (5 + len(doc), 5 + doc.next_position)
    assert both.positions.tolist() == [*range(5), *(doc.positions + 5).tolist()]
    assert torch.equal(both[:5].keys, baked.keys) and torch.equal(both[5:].keys, doc.move(5).keys) and torch.equal(both[5:].values, doc.values)
    assert both.info['maker'] == f'soft+{what}' and [p['maker'] for p in both.info['parts']] == ['soft', what]
    if what == 'full': return
    made, = make_maker('soft', checkpoint=prompt, then=CompressorMaker(what, c, 4))(lm, [texts[0]])
    close(made.keys, both.keys); close(made.values, both.values); assert made.next_position == both.next_position
    assert generate(lm, made, ' Who?', 4) == generate(lm, both, ' Who?', 4)

def test_keys_and_values_learnt_from_a_compressed_text(tmp_path):
    "Its slots stay where they were, nearer than the text behind them: learnt, kept and baked; and going on loses nothing, in bf16 neither"
    lm = model('llama', 'both', torch.bfloat16)
    doc = random_compressor(lm, 'kv').compress(texts[0])
    assert doc.next_position > len(doc) == 4
    prompt = tune_soft_prompt(lm, rain, kind='kv', init=doc, **quick)
    prompt.save_pretrained(tmp_path)
    for p in (prompt, load_prompt(tmp_path, lm), KVPrompt(lm, prompt)):
        assert (p.bake().positions.tolist(), p.bake().next_position, p.room) == (doc.positions.tolist(), doc.next_position, doc.next_position)
        for n,t in prompt.trained().items(): assert torch.equal(t, p.trained()[n]) and not torch.equal(t, t.bfloat16().float())
    ids, mask, labels = rows_of(lm)
    assert torch.equal(label_logits(lm, prompt.batch(), ids, labels, mask)[0], label_logits(lm, prompt.bake(), ids, labels, mask)[0])

def prepended_cache(lm, E, ids):
    "Keys and values `[layers, heads, slots, dim]` of embeddings and ids, read at once"
    with torch.no_grad(): cache = lm.body(inputs_embeds=torch.cat([E, lm.embed(torch.tensor(ids))])[None], use_cache=True).past_key_values
    return (torch.stack([layer[i][0] for layer in cache]) for i in (0,1))

@family
@pytest.mark.parametrize('how', ['full','both'])
def test_a_document_read_behind_a_prompt(f, how):
    "In one batch, an empty one among them: as if prompt and document were read at once; and through a maker"
    lm = model(f, how)
    prompt = SoftPrompt(lm, 5)
    rows = [lm.encode(t) for t in texts] + [[]]
    for r,p in zip(rows, read_behind(lm, rows, prompt.bake())):
        K, V = prepended_cache(lm, prompt.embeddings.detach(), r or [3]) # what comes later changes nothing before it
        close(p.keys, K[:,:,:5 + len(r)]); close(p.values, V[:,:,:5 + len(r)])
        assert (len(p), p.next_position, p.positions.tolist()) == (5 + len(r), 5 + len(r), [*range(5 + len(r))])
    one, = make_maker('soft', checkpoint=prompt)(lm, [texts[0]])
    close(one.keys, read_behind(lm, [lm.start_ids + rows[0]], prompt.bake())[0].keys)

@pytest.mark.parametrize('f', ['llama','gpt2'])
def test_reading_behind_what_was_read(f):
    "a, then b behind it == both at once; also where a stands elsewhere than its slots say"
    lm = model(f)
    a, b = lm.encode(texts[0]), lm.encode(texts[2])
    whole, = read(lm, [a + b]); front, = read(lm, [a])
    got, = read_behind(lm, [b], front); close(got.keys, whole.keys); close(got.values, whole.values)
    got, = read_behind(lm, [b], front[-3:]) # three slots that end at position len(a)
    assert (len(got), got.next_position) == (3 + len(b), len(a) + len(b)) and got.positions.tolist() == [*range(len(a) - 3, len(a) + len(b))]
    ids = torch.tensor([[*b, 7]]); labels = torch.tensor([[-100]*len(b) + [7]])
    again = nll(lm, got, ids[:,-2:], torch.tensor([[-100, 7]])).nll # the last token of b once more
    assert torch.isfinite(again) and nll(lm, front[-3:], ids, labels).nll.item() == pytest.approx(nll(lm, read_behind(lm, [b[:-1]], front[-3:])[0], ids[:,-2:], torch.tensor([[-100, 7]])).nll.item(), abs=1e-4)

@pytest.mark.parametrize('f', ['opt','gpt2'])
def test_learned_positions_refuse_to_add(f):
    lm = model(f, 'both')
    baked, doc = SoftPrompt(lm, 5).bake(), read(lm, [lm.encode(texts[0])])[0]
    with pytest.raises(InputError, match=f'prefix of {f} can.t be moved'): baked + doc
    with pytest.raises(InputError, match='can.t be moved'): make_maker('soft', checkpoint=SoftPrompt(lm, 5), then=CompressorMaker('500x', random_compressor(lm, 'kv'), 4))(lm, texts)

# --- perplexity ------------------------------------------------------------------------------------------------------

def test_perplexity_is_counted_over_real_tokens():
    "The prompt adds no token to the count; the published evaluator divides by its positions too, and reports less"
    assert published_deflation(9., 100, 1024) == pytest.approx(7.40, abs=.005)
    lm, k, n = model('llama', 'both'), 20, 60
    prompt = SoftPrompt(lm, k)
    ids = lm.encode(rain[0])[:4*n]
    none, behind = (perplexity(lm, [lm.decode(ids)], p, window=n, bos='none') for p in (None, prompt.bake()))
    assert none.tokens == behind.tokens == 4*(n - 1) and (none.words, none.bytes) == (behind.words, behind.bytes)
    nats = sum(F.cross_entropy(by_hand(lm, prompt.embeddings.detach(), torch.tensor(w))[:-1], torch.tensor(w[1:]), reduction='sum').item() for w in (ids[i:i+n] for i in range(0, 4*n, n)))
    assert behind.nll == pytest.approx(nats, abs=1e-2) and behind.ppl == pytest.approx(math.exp(nats/(4*(n - 1))), rel=1e-4)
    published = math.exp(nats/(4*(k + n - 1)))
    assert published == pytest.approx(published_deflation(behind.ppl, k, n), rel=1e-4) and published < .7*behind.ppl

# --- the text --------------------------------------------------------------------------------------------------------

def test_windows_depend_on_their_seed_alone():
    lm = tiny_lm(); vars(lm)['start_ids'] = [lm.bos_id]
    w = TextWindows(rain, lm, length=24, n=50, seed=3); first = [w[i] for i in range(50)]
    for seed in (random.seed, np.random.seed, torch.manual_seed): seed(7)
    assert [w[i] for i in reversed(range(50))][::-1] == first == list(TextWindows(rain, lm, length=24, n=60, seed=3))[:50]
    assert list(TextWindows(rain, lm, length=24, n=50, seed=4)) != first
    stream = [i for t in rain for i in [*lm.encode(t), lm.eos_id]]
    for r in first:
        assert len(r['input_ids']) == 24 and r['input_ids'][0] == lm.bos_id and r['labels'] == [-100, *r['input_ids'][1:]]
        assert any(stream[i:i+23] == r['input_ids'][1:] for i in range(len(stream))), 'running text'
    state = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    w[0], random_rows(lm, 9), SoftPrompt(lm, 9)
    assert state == [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]

def test_ordinary_tokens_are_drawn():
    lm = tiny_lm()
    drawn = {(lm.embed.weight == e).all(1).nonzero().item() for e in random_rows(lm, 4000)}
    assert drawn == set(range(len(lm.tokenizer))) - set(lm.tokenizer.all_special_ids) and len(drawn) == 256
    assert torch.equal(random_rows(lm, 9), random_rows(lm, 9)) and not torch.equal(random_rows(lm, 9), random_rows(lm, 9, seed=1))

@pytest.mark.parametrize('preset', ['default','paper'])
def test_presets_fit_small_windows(preset):
    "A prompt takes its room from the window, not from the user's patience"
    lm = model('llama')
    prompt = tune_soft_prompt(lm, rain, k=8, preset=preset, **{n: v for n,v in quick.items() if n != 'length'} | dict(steps=1, batch=1))
    assert prompt.info['length'] == lm.window - 8 and prompt.info['tokens'] == lm.window - 8
    kv = tune_soft_prompt(lm, rain, kind='kv', init=SoftPrompt(lm, 8), preset=preset, **{n: v for n,v in quick.items() if n != 'length'} | dict(steps=1, batch=1))
    assert kv.info['length'] == lm.window - 8

# --- the best step ---------------------------------------------------------------------------------------------------

def test_keep_best_keeps_the_lowest(tmp_path):
    from types import SimpleNamespace as NS
    prompt = SoftPrompt(tiny_lm(), 2)
    keep = KeepBest(prompt, tmp_path)
    assert keep.restore() == {}
    for step, loss in enumerate([3., 1.5, float('nan'), 1.5, 2.]):
        with torch.no_grad(): prompt.embeddings.fill_(step)
        keep.on_evaluate(None, NS(is_world_process_zero=True, global_step=step), None, dict(eval_loss=loss))
    keep.on_evaluate(None, NS(is_world_process_zero=False, global_step=9), None, dict(eval_loss=0.))
    assert keep.restore() == dict(validation_loss=1.5, validation_step=1) and (prompt.embeddings == 1).all()

overfit = dict(kind='kv', k=4, steps=10, batch=2, length=24, lr=.3, warmup=0, save_steps=2, logging_steps=1, per_device_eval_batch_size=64, use_cpu=True, report_to='none', disable_tqdm=True)
@cache
def fitted_to_the_night(): return tune_soft_prompt(model('llama'), night, kind='kv', k=4, steps=6, batch=2, length=24, lr=.3, warmup=0, use_cpu=True, report_to='none', disable_tqdm=True)
def log(out): return [json.loads(l) for l in (Path(out)/'log.jsonl').read_text().splitlines()]

def checked_by_hand(prompt, validation):
    "The validation loss of a prompt, from its windows of the validation text alone"
    lm = prompt.lm
    rows = list(TextWindows(validation, lm, 24, n=64))
    with torch.no_grad(): return nll(lm, prompt.bake(), torch.tensor([r['input_ids'] for r in rows]), torch.tensor([r['labels'] for r in rows])).mean.item()

def test_the_best_step_is_chosen_on_validation_text(tmp_path):
    "What fits one text is trained on another and validated on the first: the last step is the worse one; other validation text, other choice"
    lm, start = model('llama'), fitted_to_the_night()
    prompt = tune_soft_prompt(lm, rain, init=start, validation=night, out=tmp_path/'a', **overfit)
    evals = {r['step']: r['eval_loss'] for r in log(tmp_path/'a') if 'eval_loss' in r}
    best = min(evals, key=evals.get)
    assert sorted(evals) == [*range(1, 11)] and best < 10 and evals[10] > evals[best] + .1
    assert (prompt.info['validation_step'], prompt.info['validation_loss']) == (best, pytest.approx(evals[best]))
    assert checked_by_hand(prompt, night) == pytest.approx(evals[best], abs=1e-4)
    other = tune_soft_prompt(lm, rain, init=start, validation=rain, out=tmp_path/'b', **overfit)
    assert other.info['validation_step'] > best and [r['loss'] for r in log(tmp_path/'a') if 'loss' in r] == [r['loss'] for r in log(tmp_path/'b') if 'loss' in r]
    last = tune_soft_prompt(lm, rain, init=start, out=tmp_path/'c', **overfit)
    saved, _ = load_tensors(tmp_path/'c'/'checkpoint-10'/'trained.safetensors')
    assert all(torch.equal(p, saved[n]) for n,p in last.trained().items()) and 'validation_loss' not in last.info
    assert not all(torch.equal(p, saved[n]) for n,p in prompt.trained().items())

def test_a_resumed_run_remembers_the_best(tmp_path, monkeypatch):
    lm, start = model('llama'), fitted_to_the_night()
    args = dict(init=start, validation=night, **overfit)
    whole = tune_soft_prompt(lm, rain, out=tmp_path/'a', **args)
    class Interrupted(KeepBest):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 9: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(tuning, 'KeepBest', Interrupted)
        with pytest.raises(KeyboardInterrupt): tune_soft_prompt(lm, rain, out=tmp_path/'b', **args)
    assert whole.info['validation_step'] < 8, 'the best came before what is done again'
    again = tune_soft_prompt(lm, rain, out=tmp_path/'b', resume=True, **args)
    assert again.info == whole.info
    for n,p in whole.trained().items(): assert torch.equal(p, again.trained()[n]), n

def test_the_best_of_another_run_is_not_taken(tmp_path):
    "What a run that died before its first checkpoint has left: its best belongs to it"
    prompt = KVPrompt(model('llama'), 4)
    prompt.save_trained(tmp_path/'best'); write_json(tmp_path/'best'/'loss.json', dict(loss=.001, step=1))
    tuned = tune_soft_prompt(model('llama'), rain, validation=night, out=tmp_path, **overfit)
    assert tuned.info['validation_loss'] > 1 and not all(torch.equal(p, prompt.trained()[n]) for n,p in tuned.trained().items())

# --- bad input -------------------------------------------------------------------------------------------------------

def other_words(lm):
    tok = copy.deepcopy(lm.tokenizer); tok.add_tokens(['rain'])
    return LM(lm.model, tok, 'other-words')
def nan_prefix(lm):
    p = SoftPrompt(lm, 3).bake(); p.values[1, 0, 2, 0] = float('nan')
    return p

def heal(lm, data=rain, **options): return tune_soft_prompt(lm, data, **quick | options)

refused = { # what is asked for: (how, what the error says)
    'k too large': (lambda lm: heal(lm, k=lm.window - 7), 'k=249 rows leave no room'),
    'k of nothing': (lambda lm: heal(lm, k=0), 'k=0'),
    'k no whole number': (lambda lm: heal(lm, k=2.), 'k=2.0'),
    'rows beyond the window': (lambda lm: SoftPrompt(lm, 255), 'window of 256'),
    'negative rows': (lambda lm: SoftPrompt(lm, -1), 'start from'),
    'no rows': (lambda lm: SoftPrompt(lm, 0), 'start from'),
    'an empty text': (lambda lm: heal(lm, k=4, init=''), 'empty'),
    'numbers that are none': (lambda lm: SoftPrompt(lm, torch.full((2, 64), float('nan'))), 'finite numbers'),
    'infinite numbers': (lambda lm: SoftPrompt(lm, torch.full((2, 64), float('inf'))), 'finite numbers'),
    'a tensor of another width': (lambda lm: SoftPrompt(lm, torch.zeros(2, 32)), r'expected finite numbers \[k, 64\]'),
    'a vector': (lambda lm: SoftPrompt(lm, torch.zeros(64)), r'expected finite numbers \[k, 64\]'),
    'keys and values as embeddings': (lambda lm: SoftPrompt(lm, KVPrompt(lm, 2)), 'start from'),
    'a prefix as embeddings': (lambda lm: SoftPrompt(lm, SoftPrompt(lm, 2).bake()), 'start from'),
    'nothing to start from': (lambda lm: SoftPrompt(lm, None), 'start from'),
    'a prefix that is no number': (lambda lm: KVPrompt(lm, nan_prefix(lm)), 'finite'),
    'an empty prefix': (lambda lm: KVPrompt(lm, SoftPrompt(lm, 2).bake()[:0]), 'empty prefix'),
    'a prefix of another model': (lambda lm: KVPrompt(lm, SoftPrompt(model('qwen3'), 2).bake()), "'qwen3'"),
    'recomputing keys and values': (lambda lm: KVPrompt(lm, 2, checkpointing=True), 'needs a soft prompt'),
    'a prompt of another width': (lambda lm: heal(lm, init=SoftPrompt(tiny_lm(hidden_size=32), 2)), 'width 32'),
    'a prompt of another architecture': (lambda lm: heal(lm, init=SoftPrompt(model('qwen3'), 2)), "'qwen3'"),
    'a prompt of another tokenizer': (lambda lm: heal(lm, init=SoftPrompt(other_words(lm), 2)), 'another tokenizer'),
    'keys of another tokenizer': (lambda lm: heal(lm, kind='kv', init=SoftPrompt(other_words(lm), 2)), 'another tokenizer'),
    'learnt keys of another tokenizer': (lambda lm: heal(lm, kind='kv', init=KVPrompt(other_words(lm), 2)), 'another tokenizer'),
    'baked for another tokenizer': (lambda lm: SoftPrompt(lm, 2).bake(other_words(lm)), 'another tokenizer'),
    'keys for another tokenizer': (lambda lm: KVPrompt(lm, 2).bake(other_words(lm)), 'another tokenizer'),
    'embeddings for another tokenizer': (lambda lm: to_prompt_embeds(SoftPrompt(lm, 2), 'a', lm=other_words(lm)), 'another tokenizer'),
    'an adapter for another tokenizer': (lambda lm: prompt_to_peft(SoftPrompt(lm, 2), 'never-written', other_words(lm)), 'another tokenizer'),
    'keys as prompt embeddings': (lambda lm: to_prompt_embeds(KVPrompt(lm, 2), 'a'), 'only a soft prompt'),
    'a kind that is none': (lambda lm: heal(lm, kind='hard'), 'choose soft or kv'),
    'a preset that is none': (lambda lm: heal(lm, k=2, preset='papre'), 'default, paper'),
    'two learning rates': (lambda lm: settings('default', lr=.1, rate=.1), 'lr'),
    'a learning rate of nothing': (lambda lm: settings('default', lr=0.), 'positive'),
    'a learning rate that is no number': (lambda lm: settings('default', rate=math.nan), 'positive'),
    'half a step': (lambda lm: settings('default', steps=.5), 'steps=0.5'),
    'text shorter than a window': (lambda lm: heal(lm, ['Too short.'], k=2), '11 tokens, but a window needs'),
    'validation text shorter than a window': (lambda lm: heal(lm, k=2, validation=['Too short.']), '11 tokens, but a window needs'),
    'a window of one token': (lambda lm: heal(lm, k=2, length=1), 'at least 2'),
    'to resume nothing': (lambda lm: heal(lm, k=2, resume=True), 'nothing to resume'),
    'to distil from nobody': (lambda lm: heal(lm, k=2, distil=.5), 'give a teacher'),
    'to distil too much': (lambda lm: heal(lm, k=2, teacher=lm, distil=1.5), 'from 0 to 1'),
    'a teacher of other words': (lambda lm: heal(lm, k=2, teacher=other_words(lm)), 'tokenizers differ'),
    'a teacher of more words': (lambda lm: heal(lm, k=2, teacher=tiny_lm(vocab_size=264)), "can't teach"),
    'a maker of nothing': (lambda lm: make_maker('kv')(lm, ['Rain.']), 'needs checkpoint='),
    'a folder of nothing': (lambda lm: load_prompt('./nothing', lm), 'no prompt at')}

@pytest.mark.parametrize('what', refused)
def test_refused(what, tmp_path, monkeypatch):
    monkeypatch.setenv('TMPDIR', str(tmp_path)); monkeypatch.setattr('tempfile.tempdir', None)
    ask, says = refused[what]
    with pytest.raises(InputError, match=says): ask(model('llama'))
    assert not list(tmp_path.iterdir()), 'nothing is left behind'

def edit(folder, change, both=False):
    "Change a card, in config.json and (`both`) in the header of the tensors too"
    card = read_json(folder/'config.json'); card = change(card) or card
    write_json(folder/'config.json', card)
    if both:
        t, h = load_tensors(folder/'trained.safetensors')
        save_tensors(folder/'trained.safetensors', t, h | dict(card=card))
def cut(path): path.write_bytes(path.read_bytes()[:-9])
def put(folder, **t): save_tensors(folder/'trained.safetensors', t, load_tensors(folder/'trained.safetensors')[1])
def flip(path): b = bytearray(path.read_bytes()); b[-3] ^= 1; path.write_bytes(b)

broken = { # what has happened to a saved prompt: (to which kinds, how, what the error says)
    'config.json is gone': ('soft kv', lambda d: (d/'config.json').unlink(), 'does not exist'),
    'config.json is cut': ('soft kv', lambda d: cut(d/'config.json'), 'not JSON'),
    'config.json is a list': ('soft kv', lambda d: (d/'config.json').write_text('[1]'), 'of another kind'),
    'config.json is a number': ('soft kv', lambda d: (d/'config.json').write_text('5'), 'of another kind'),
    'config.json is empty': ('soft kv', lambda d: (d/'config.json').write_text('{}'), 'of another kind'),
    'of another kind': ('soft kv', lambda d: edit(d, lambda c: c.update(kind='compressor'), True), 'of another kind'),
    'of the other kind': ('soft', lambda d: edit(d, lambda c: c.update(kind='kv-prompt'), True), 'not a usable kv-prompt'),
    'of the other kind ': ('kv', lambda d: edit(d, lambda c: c.update(kind='prompt'), True), 'not a usable prompt'),
    'of a later version': ('soft kv', lambda d: edit(d, lambda c: c.update(schema=2), True), 'update promptcompress'),
    'k is no number': ('soft kv', lambda d: edit(d, lambda c: c.update(k='5'), True), 'lacks k'),
    'k is another': ('soft kv', lambda d: edit(d, lambda c: c.update(k=4), True), 'not a usable'),
    'home is gone': ('soft kv', lambda d: edit(d, lambda c: c.pop('home') and None, True), 'lacks home'),
    'home lacks a tokenizer': ('soft kv', lambda d: edit(d, lambda c: c['home'].pop('tokenizer') and None, True), 'does not say on which tokenizer'),
    'home has another tokenizer': ('soft kv', lambda d: edit(d, lambda c: c['home'].update(tokenizer='0'*12), True), 'another tokenizer'),
    'home has another width': ('soft kv', lambda d: edit(d, lambda c: c['home'].update(width=32), True), 'width 32'),
    'home has another architecture': ('soft kv', lambda d: edit(d, lambda c: c['home']['architecture'].update(layers=2), True), "'layers': 2"),
    'config.json of another file': ('soft kv', lambda d: edit(d, lambda c: c['info'].update(steps=99)), 'not the one that was saved'),
    'tensors are cut': ('soft kv', lambda d: cut(d/'trained.safetensors'), 'not a whole safetensors file'),
    'tensors are changed': ('soft kv', lambda d: flip(d/'trained.safetensors'), 'damaged'),
    'tensors are gone': ('soft kv', lambda d: (d/'trained.safetensors').unlink(), 'does not exist'),
    'tensors of another width': ('soft', lambda d: put(d, embeddings=torch.zeros(5, 32)), r'not \[5, 64\]'),
    'tensors of another name': ('soft', lambda d: put(d, rows=torch.zeros(5, 64)), r'not \[5, 64\]'),
    'tensors that are no numbers': ('soft', lambda d: put(d, embeddings=torch.full((5, 64), math.nan)), 'finite'),
    'keys that are no numbers': ('kv', lambda d: put(d, **load_tensors(d/'trained.safetensors')[0] | {'keys.1': torch.full((2, 5, 16), math.inf)}), 'finite'),
    'a layer is missing': ('kv', lambda d: put(d, **{n: t for n,t in load_tensors(d/'trained.safetensors')[0].items() if n != 'keys.2'}), 'keys and values are not'),
    'positions are gone': ('kv', lambda d: edit(d, lambda c: c.pop('positions') and None, True), 'positions'),
    'positions are too few': ('kv', lambda d: edit(d, lambda c: c.update(positions=[0, 1]), True), 'positions'),
    'positions are no integers': ('kv', lambda d: edit(d, lambda c: c.update(positions=[0., 1., 2., 3., 4.]), True), 'positions'),
    'the next position is none': ('kv', lambda d: edit(d, lambda c: c.update(next_position=None), True), 'positions'),
    'the next position is beyond the window': ('kv', lambda d: edit(d, lambda c: c.update(next_position=10**9), True), 'window of 256')}

@pytest.mark.parametrize('kind,what', [(k, w) for w,(kinds,_,_) in broken.items() for k in kinds.split()])
def test_a_broken_folder_is_refused(tmp_path, kind, what):
    lm = model('llama')
    prompt = prompt_of(kind, lm); prompt.info = dict(steps=1); prompt.save_pretrained(tmp_path)
    assert torch.equal(load_prompt(tmp_path, lm).bake().keys, prompt.bake().keys)
    _, do, says = broken[what]
    do(tmp_path)
    with pytest.raises(InputError, match=says): load_prompt(tmp_path, lm)

@kind
def test_kept_and_transferred(tmp_path, kind):
    "What was learnt comes back to the bit, with its record; on other weights it says where it is from, at half the size nearly the same"
    lm, full = model('llama', 'both'), model('llama')
    prompt = tune_soft_prompt(lm, rain, k=4, kind=kind, **quick)
    prompt.save_pretrained(tmp_path/'a'); prompt.save_pretrained(tmp_path/'b', dtype=torch.bfloat16)
    back = load_prompt(tmp_path/'a', lm)
    assert type(back) is type(prompt) and back.info == prompt.info and back.home == prompt.home == read_json(tmp_path/'a'/'config.json')['home']
    assert back.home['bits'] == [4] and back.home['sparsity'] >= .5 and back.info['steps'] == 4 and math.isfinite(back.info['loss'])
    for n,p in prompt.trained().items(): assert torch.equal(p, back.trained()[n])
    for n,p in load_prompt(tmp_path/'b', lm).trained().items(): assert p.dtype == torch.float32 and torch.equal(p, prompt.trained()[n].bfloat16().float())
    moved = load_prompt(tmp_path/'a', full)
    assert moved.info['transferred_from'] == lm.fingerprint and moved.bake().info['learnt_on'] == lm.fingerprint and moved.bake().info['fingerprint'] == full.fingerprint
    assert torch.equal(moved.bake().keys, prompt.bake(full).keys)

# --- losses that are none --------------------------------------------------------------------------------------------

class Scripted(KVPrompt):
    "Its loss is what a script makes of the true one at each step"
    def __init__(self, lm, script): super().__init__(lm, 4); self.script, self.calls = script, 0
    def forward(self, **batch):
        self.calls += 1
        return dict(loss=self.script(super().forward(**batch)['loss'], self.calls))

def stopped(learner, monkeypatch, tmp_path, out=None, **options):
    "The message of the error, and the checkpoint that it names"
    monkeypatch.setenv('TMPDIR', str(tmp_path)); monkeypatch.setattr('tempfile.tempdir', None)
    with pytest.raises(StateError) as e: tune(learner, rain, out=out, **quick | options)
    return str(e.value), Path(re.search(r'Checkpoint kept: (\S+)\. Try', str(e.value))[1])

@pytest.mark.parametrize('where', [None, 'run'])
def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(monkeypatch, tmp_path, where):
    "At step 9, while checkpoints are written at 8 and 10 and losses logged at 6 and 12"
    learner = Scripted(model('llama'), lambda loss, i: loss*math.nan if i >= 9 else loss)
    message, kept = stopped(learner, monkeypatch, tmp_path, where and tmp_path/where, steps=16, save_steps=2, logging_steps=6)
    assert ('became nan' in message or 'not finite' in message) and kept.is_dir() and kept.name == 'checkpoint-8' and (where is None or kept.parent == tmp_path/where)
    fresh = KVPrompt(model('llama'), 4); fresh.load_trained(kept)
    assert all(p.isfinite().all() for p in fresh.parameters())

@pytest.mark.parametrize('logging,seen', [(2, 18), (3, 15)], ids=['logged when saved', 'logged at other steps'])
def test_a_loss_that_diverges_keeps_the_last_good_checkpoint(monkeypatch, tmp_path, logging, seen):
    "It rises for a moment at step 3, and for good at step 9; it takes five logs to be sure, and none of the checkpoints in between takes the place of a good one"
    learner = Scripted(model('llama'), lambda loss, i: loss + (3. if i >= 9 or i in (3, 4) else 0.))
    message, kept = stopped(learner, monkeypatch, tmp_path, steps=30, save_steps=2, logging_steps=logging, lr=1e-3)
    assert 'training diverges' in message and f'by step {seen} ' in message and kept.name == 'checkpoint-8' and kept.is_dir()
    KVPrompt(model('llama'), 4).load_trained(kept)

def test_numbers_that_are_none_are_not_kept(monkeypatch, tmp_path):
    "The last update spoils them, with the loss before it as it should be"
    learner = KVPrompt(model('llama'), 4)
    class Spoiled(KeepBest):
        def on_step_end(self, args, state, control, **kwargs): learner.keys[1].data[0, 0, 0] *= math.nan if state.global_step == 10 else 1.
    monkeypatch.setattr(tuning, 'KeepBest', Spoiled)
    message, kept = stopped(learner, monkeypatch, tmp_path, steps=16, save_steps=2, logging_steps=6)
    assert 'keys.1 is not finite at step 10' in message and kept.name == 'checkpoint-8' and kept.is_dir()

def test_a_learning_rate_that_is_absurd(monkeypatch, tmp_path):
    "Without a folder, too: the numbers that are kept are numbers"
    message, kept = stopped(KVPrompt(model('llama'), 4), monkeypatch, tmp_path, steps=60, lr=1e37, warmup=20, save_steps=1, logging_steps=1)
    fresh = KVPrompt(model('llama'), 4); fresh.load_trained(kept)
    assert ('became' in message or 'not finite' in message) and all(p.isfinite().all() for p in fresh.parameters())

def test_nothing_is_left_of_a_run_without_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv('TMPDIR', str(tmp_path)); monkeypatch.setattr('tempfile.tempdir', None)
    tune_soft_prompt(model('llama'), rain, k=4, validation=night, per_device_eval_batch_size=64, **quick)
    assert not list(tmp_path.iterdir())

# --- a teacher -------------------------------------------------------------------------------------------------------

@kind
def test_distilling_nothing_is_no_teacher(kind):
    lm, teacher = model('llama', 'both'), model('llama')
    alone = tune_soft_prompt(lm, rain, k=4, kind=kind, **quick)
    taught = tune_soft_prompt(lm, rain, k=4, kind=kind, teacher=teacher, distil=0, **quick)
    for n,p in alone.trained().items(): assert torch.equal(p, taught.trained()[n])
    assert taught.info['loss'] == alone.info['loss'] and taught.info['distil'] == 0 and taught.teacher is None

@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('side', ['right','left'])
def test_the_teacher_reads_the_text_alone(side, recompute):
    "Loss and gradient of a mixture, against its formula row by row; the teacher learns nothing, not even if it could"
    lm, teacher = model('gpt2', 'both'), tiny_lm('gpt2')
    prompt = SoftPrompt(lm, 5, checkpointing=recompute); prompt.teacher, prompt.distil = teacher, .3
    teacher.model.requires_grad_(True)
    ids, mask, labels = rows_of(lm, side)
    loss = prompt(ids, mask, labels)['loss']; loss.backward()
    E = prompt.embeddings.detach().clone().requires_grad_(True)
    total, n = 0., 0
    for i,m in zip(ids, mask):
        row = i[m]
        p = teacher.model(row[None]).logits[0,:-1].log_softmax(-1).detach()
        q = lm.model(inputs_embeds=torch.cat([E, lm.embed(row)])[None]).logits[0,5:-1].log_softmax(-1)
        total = total + (.7*-q[range(len(row)-1), row[1:]] + .3*(p.exp()*(p - q)).sum(-1)).sum(); n += len(row) - 1
    (total/n).backward()
    assert loss.item() == pytest.approx((total/n).item(), abs=1e-5)
    close(prompt.embeddings.grad, E.grad, 2e-5)
    assert all(p.grad is None for p in teacher.model.parameters())

# --- elsewhere -------------------------------------------------------------------------------------------------------

@kind
@pytest.mark.parametrize('f,how', [('llama','packed'), ('llama','both'), ('gpt2','both'), ('opt','packed'), ('qwen3','pruned')])
def test_peft_loads_and_generates_the_same(tmp_path, f, how, kind):
    from peft import PeftModel
    lm = model(f, how)
    prompt = tune_soft_prompt(lm, rain, k=4, kind=kind, **quick)
    assert prompt_to_peft(prompt, tmp_path) == tmp_path
    theirs = PeftModel.from_pretrained(shared_copy(lm.model), tmp_path).eval()
    ids = torch.tensor([lm.encode(texts[0])])
    out = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=lm.pad_id)
    assert lm.decode(out[0][-8:]) == generate(lm, prompt.bake(), texts[0], 8, eos_token_id=None)
    with torch.no_grad(): close(theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0,-1], label_logits(lm, prompt.bake(), torch.cat([ids, ids[:,:1]], 1), torch.tensor([[-100]*ids.shape[1] + [5]]))[0][0])

@family
@pytest.mark.parametrize('start', [True, False])
def test_prompt_embeddings_are_the_prompt(f, start):
    "What a server would be sent, given to transformers: the text behind the baked prompt"
    lm = LM(model(f, 'both').model, model(f).tokenizer, 'starts'); vars(lm)['start_ids'] = [lm.bos_id]
    prompt = SoftPrompt(lm, 5)
    x = to_prompt_embeds(prompt, texts[0], start)
    ids = [lm.bos_id]*start + lm.encode(texts[0])
    assert x.shape == (5 + len(ids), 64) and x.dtype == lm.dtype and not x.requires_grad
    out = lm.model.generate(inputs_embeds=x[None], attention_mask=torch.ones(1, len(x), dtype=torch.long), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=lm.pad_id)
    assert lm.decode(out[0]) == generate(lm, prompt.bake(), ids, 6, eos_token_id=None)

# --- processes of their own ------------------------------------------------------------------------------------------
# This file is also the program that they run. The two kinds of prompt share one start of Python each time: importing
# takes longer than training.

def run(out, kind, batch=4, **options):
    "Twelve steps with validation, a checkpoint every third: the prompt"
    torch.set_num_threads(1)
    return tune_soft_prompt(tiny_lm('gpt2'), rain, k=4, kind=kind, out=out, batch=batch, steps=12, length=24, lr=.05, validation=night, eval_steps=2, per_device_eval_batch_size=64, save_steps=3, logging_steps=1,
                            use_cpu=True, report_to='none', disable_tqdm=True, **options)

class Killed(KeepBest):
    "End the process after eight steps: no exception, no `finally`"
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8: os.kill(os.getpid(), signal.SIGKILL)

def start(*args):
    "Run `args` with this interpreter and the checkout on its path"
    env = os.environ | dict(PYTHONPATH=str(here.parent), OMP_NUM_THREADS='1')
    p = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=env, timeout=300)
    assert p.returncode == 0, p.stdout + p.stderr

@cache
def one_process(folder, kind): return run(folder, kind)
@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory): top = tmp_path_factory.mktemp('one'); return lambda kind: (one_process(top/kind, kind), top/kind)

@pytest.fixture(scope='module')
def killed(tmp_path_factory): out = tmp_path_factory.mktemp('killed'); start(__file__, 'killed', out); return out

@kind
def test_killed_and_resumed(killed, uninterrupted, kind):
    "The same numbers, to the bit, and the same choice, as without the kill"
    whole, folder = uninterrupted(kind)
    assert sorted(d.name for d in (killed/kind).glob('checkpoint-*')) == ['checkpoint-3', 'checkpoint-6']
    again = run(killed/kind, kind, resume=True)
    for n,p in whole.trained().items(): assert torch.equal(p, again.trained()[n]), n
    assert again.info == whole.info and again.info['validation_step'] % 2 == 0
    a, b = (load_tensors(f/'checkpoint-12'/'trained.safetensors')[0] for f in (folder, killed/kind))
    assert all(torch.equal(t, b[n]) for n,t in a.items())

@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp('two')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    start('-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', 2, '--num_machines', 1, '--mixed_precision', 'no',
          '--dynamo_backend', 'no', '--main_process_port', port, __file__, 'half a batch', out) # why so: test_training.py
    return out

@kind
def test_two_processes_are_one_with_twice_the_batch(two_processes, uninterrupted, kind):
    "Every window once, the same losses; afterwards both have the best prompt and the same record"
    whole, folder = uninterrupted(kind)
    one, two = log(folder), log(two_processes/kind)
    assert (two_processes/kind/'checkpoint-12'/'rng_state_1.pth').exists(), 'there was no second process'
    assert [r['step'] for r in one] == [r['step'] for r in two] and len([r for r in one if 'loss' in r]) == 12
    for a,b in zip(one, two):
        for x in ('loss','eval_loss'): assert a.get(x) == pytest.approx(b.get(x), abs=2e-3)
    records = [read_json(two_processes/f'{kind}-{rank}.json') for rank in (0, 1)]
    assert records[0] == records[1] and (records[0]['batch'], records[0]['tokens']) == (whole.info['batch'], whole.info['tokens']) == (4, 12*4*24)
    assert records[0]['validation_step'] == whole.info['validation_step']
    for rank in (0, 1):
        t, _ = load_tensors(two_processes/f'{kind}-{rank}'/'trained.safetensors')
        for n,p in whole.trained().items(): torch.testing.assert_close(t[n], p.detach(), atol=5e-3, rtol=0)

if __name__ == '__main__':
    job, out = sys.argv[1], Path(sys.argv[2])
    if job == 'killed':
        tuning.KeepBest = Killed
        for kind in ('soft','kv'):
            if not (pid := os.fork()): run(out/kind, kind); os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    elif job == 'half a batch': # per process
        for kind in ('soft','kv'):
            prompt = run(out/kind, kind, batch=2)
            prompt.save_trained(out/f'{kind}-{os.environ["RANK"]}'); write_json(out/f'{kind}-{os.environ["RANK"]}.json', prompt.info)
