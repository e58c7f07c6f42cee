"Prefixes, reading and compressing on every family of models: logits against plain forward passes, gradients, and the traps"
import json, pytest, torch, transformers
import families as every
from transformers import StaticCache, TextStreamer
from promptcompress.core import InputError, StateError
from promptcompress.kv import generate as reading
from promptcompress.kv.compressor import Compressor, CompressorConfig, TextExamples, example
from promptcompress.kv.generate import generate, join_masks, nll, positions_behind
from promptcompress.kv.prefix import collate, pad_rows, read, read_behind
from promptcompress.lm import FAMILIES, LM, tiny_lm

docs, questions = ['Ada wrote the first program.', 'Rain.', 'The sun is a star, and the moon is not.'], ['Who?', ' What falls?', ' And the moon?']
def rope(kind, **kw): return dict(rope_parameters=dict(rope_type=kind, rope_theta=10000., factor=4., original_max_position_embeddings=64, **kw))
stretched = {'llama3': rope('llama3', low_freq_factor=1., high_freq_factor=4.), 'yarn': rope('yarn')}
models = {f: tiny_lm(f) for f in FAMILIES} | {name: tiny_lm('llama', **kw) for name,kw in stretched.items()}
movable = [f for f,m in models.items() if m.inv_freq is not None]
family = pytest.mark.parametrize('f', FAMILIES)
carriers = pytest.mark.parametrize('carrier', ['kv','embeds'])

def close(a, b): torch.testing.assert_close(a, b, atol=1e-4, rtol=0)

@torch.no_grad()
def plain(lm, text): return lm.model(input_ids=torch.tensor([lm.encode(text)])).logits[0]

@torch.no_grad()
def behind(lm, prefixes, rows):
    "Logits of each row's tokens behind its prefix, all rows in one batch, padded on the left"
    ids, mask = pad_rows(rows, lm.pad_id, side='left')
    batch = collate(prefixes, lm)
    out = lm.model(input_ids=ids, attention_mask=reading.join_masks(batch, mask), position_ids=reading.positions_behind(batch, mask),
                   past_key_values=batch.cache())
    return [o[-len(r):] for o,r in zip(out.logits, rows)]

# --- a prefix is the text --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('f', models)
def test_logits_behind_a_prefix(f):
    "Prefix and question == the plain forward pass on both: one by one, and in a batch of different lengths"
    lm = models[f]
    want = [plain(lm, d + q)[-len(lm.encode(q)):] for d,q in zip(docs, questions)]
    prefixes, rows = read(lm, [lm.encode(d) for d in docs]), [lm.encode(q) for q in questions]
    for got, w in zip(behind(lm, prefixes, rows), want): close(got, w)
    for p,r,w in zip(prefixes, rows, want): close(behind(lm, [p], [r])[0], w)

@torch.no_grad()
def read_at(lm, text, start):
    "Keys and values of `text`, read alone at positions from `start` on"
    ids = torch.tensor([lm.encode(text)])
    return [(K, V) for K,V,*_ in lm.body(input_ids=ids, position_ids=start + torch.arange(ids.shape[1])[None], use_cache=True).past_key_values]

@pytest.mark.parametrize('f', movable)
def test_sum_of_prefixes(f):
    "a + b + c == the cache put together by hand, each part read alone where it stands"
    lm = models[f]
    starts = [0, len(docs[0]), len(docs[0]) + len(docs[1])]
    parts = [read_at(lm, d, s) for d,s in zip(docs, starts)]
    whole = sum_of(read(lm, [lm.encode(d) for d in docs]))
    for i,(K,V) in enumerate(whole.layers):
        close(K, torch.cat([p[i][0] for p in parts], 2)[0]); close(V, torch.cat([p[i][1] for p in parts], 2)[0])
    assert whole.positions.tolist() == list(range(len(whole))) and whole.next_position == len(whole) == sum(map(len, docs))

def sum_of(prefixes):
    a, *rest = prefixes
    for b in rest: a = a + b
    return a

@pytest.mark.parametrize('f', sorted(set(FAMILIES) - set(movable)))
def test_what_cannot_be_moved_says_so(f):
    lm = models[f]
    a, b = read(lm, [lm.encode(d) for d in docs[:2]])
    for moving in (lambda: a + b, lambda: a.move(3), lambda: Compressor(lm, CompressorConfig(k=2, r=2, max_tokens=8)).compress(docs[0])):
        with pytest.raises(InputError, match=f'prefix of {f} can.t be moved'): moving()

@family
def test_streaming(f):
    lm, got = models[f], []
    class Collect(TextStreamer):
        def on_finalized_text(self, text, stream_end=False): got.append(text)
    p, = read(lm, [lm.encode(docs[0])])
    assert ''.join(got) != generate(lm, p, 'Who?', 8, streamer=Collect(lm.tokenizer, skip_prompt=True), eos_token_id=None) == ''.join(got)

# --- the traps of caches that others have filled ---------------------------------------------------------------------

def right(lm):
    "Are generation, scores and logits behind a batch of prefixes those of the plain model?"
    prefixes, rows = read(lm, [lm.encode(d) for d in docs]), [lm.encode(q) for q in questions]
    want = [plain(lm, d + q)[-len(r):] for d,q,r in zip(docs, questions, rows)]
    first = [generate(lm, None, d + q, 1, eos_token_id=None) for d,q in zip(docs, questions)]
    ids, mask = pad_rows(rows, lm.pad_id, side='left')
    labels = ids.masked_fill(~mask, -100); labels[torch.arange(3), mask.long().argmax(1)] = -100
    scores = torch.stack([-w[:-1].log_softmax(-1)[range(len(r)-1), r[1:]].sum() for w,r in zip(want, rows)])
    return (all(torch.allclose(g, w, atol=1e-4) for g,w in zip(behind(lm, prefixes, rows), want)),
            generate(lm, prefixes, questions, 1, eos_token_id=None) == first,
            torch.allclose(nll(lm, prefixes, ids, labels, mask).nll, scores, atol=1e-3))

traps = { # what goes wrong silently when it is done so
    'the mask covers the new tokens only': dict(join_masks=lambda batch, mask: torch.cat([torch.zeros_like(batch.mask), mask], 1).long()),
    'the mask covers all slots, padded ones too': dict(join_masks=lambda batch, mask: torch.cat([torch.ones_like(batch.mask), mask], 1).long()),
    'the mask covers pads of the question': dict(join_masks=lambda batch, mask: torch.cat([batch.mask, torch.ones_like(mask)], 1).long()),
    'positions start at zero': dict(positions_behind=lambda batch, mask: (mask.long().cumsum(1) - 1).clamp(min=0)),
    'positions count the padded slots': dict(positions_behind=lambda batch, mask: batch.slots + (mask.long().cumsum(1) - 1).clamp(min=0)),
    'positions count the pads of the question': dict(positions_behind=lambda batch, mask: batch.next_position[:,None] + torch.arange(mask.shape[1])),
    'positions are one off': dict(positions_behind=lambda batch, mask: positions_behind(batch, mask) + 1)}

@pytest.mark.parametrize('f', ['llama','opt'])
def test_without_a_trap(f): assert right(models[f]) == (True, True, True)

@pytest.mark.parametrize('trap', traps)
@pytest.mark.parametrize('f', ['llama','opt'])
def test_each_trap_would_be_seen(f, trap, monkeypatch):
    "The checks above notice each wrong way of lining up masks and positions"
    for name,wrong in traps[trap].items(): monkeypatch.setattr(reading, name, wrong)
    logits, text, scores = right(models[f])
    assert not logits and not scores

@pytest.mark.parametrize('call', ['no mask', 'mask of the new tokens', 'embeddings'])
def test_what_transformers_does_silently(call):
    "Three calls of transformers' own `generate` that give other text behind the same cache, while ours gives the right one (if this fails, see if upstream has changed)"
    lm = models['llama']
    p, = read(lm, [lm.encode(docs[2])]); ids = torch.tensor([lm.encode(' And the moon? ')])
    kw = {'no mask': dict(input_ids=ids), 'mask of the new tokens': dict(input_ids=ids, attention_mask=torch.ones_like(ids)),
          'embeddings': dict(inputs_embeds=lm.embed(ids), attention_mask=torch.ones(1, len(p) + ids.shape[1], dtype=torch.long))}[call]
    try: out = lm.model.generate(past_key_values=collate([p], lm).cache(), max_new_tokens=8, do_sample=False, eos_token_id=None, **kw)
    except (RuntimeError, ValueError, IndexError): return # loud is fine
    theirs = lm.decode(out[0, ids.shape[1]:] if 'input_ids' in kw else out[0])
    truth = generate(lm, None, docs[2] + ' And the moon? ', 8, eos_token_id=None)
    assert generate(lm, p, ' And the moon? ', 8, eos_token_id=None) == truth != theirs

@family
def test_a_static_cache_reads_the_same(f):
    "Our keys and values in another kind of cache"
    lm = models[f]
    p, = read(lm, [lm.encode(docs[0])]); row = lm.encode(questions[0])
    cache = StaticCache(config=lm.config, max_cache_len=64)
    for i,(K,V) in enumerate(collate([p], lm).layers): cache.update(K, V, i)
    at = p.next_position + torch.arange(len(row))[None]
    with torch.no_grad(): out = lm.model(input_ids=torch.tensor([row]), position_ids=at, past_key_values=cache)
    close(out.logits[0], behind(lm, [p], [row])[0])

@family
def test_a_batch_is_not_used_up(f):
    "generate() writes into the cache it is given; ours is a fresh one each time, beams included"
    lm = models[f]
    batch = collate(read(lm, [lm.encode(d) for d in docs]), lm)
    before = [(K.clone(), V.clone()) for K,V in batch.layers]
    once, twice = (generate(lm, batch, questions, 5, eos_token_id=None, num_beams=n) for n in (1, 1))
    generate(lm, batch, questions, 5, eos_token_id=None, num_beams=2)
    assert once == twice == generate(lm, batch, questions, 5, eos_token_id=None)
    assert all(torch.equal(K, k) and torch.equal(V, v) for (K,V),(k,v) in zip(batch.layers, before))

sliding = dict(mistral=dict(sliding_window=24), phi3=dict(sliding_window=24),
               qwen3=dict(use_sliding_window=True, sliding_window=24, max_window_layers=1))

@pytest.mark.parametrize('f', sliding)
def test_sliding_windows_are_right_or_refused(f):
    "Inside the window: the plain model. Beyond it: refused wherever a sequence is put together, by name and width"
    lm = tiny_lm(f, **sliding[f])
    short, question = '0123456789', ' 01234'
    p, = read(lm, [lm.encode(short)])
    close(behind(lm, [p], [lm.encode(question)])[0], plain(lm, short + question)[10:])
    c = Compressor(lm, CompressorConfig(k=4, r=2))
    assert len(c.compress('x'*60)) == 4*3 # in chunks of 24 - 4 tokens at most
    long = c.compress('x'*60)
    ids, mask = pad_rows([[5]*30], lm.pad_id)
    for over in (lambda: read(lm, [[5]*25]), lambda: generate(lm, p, question, 20), lambda: generate(lm, long, question, 1),
                 lambda: nll(lm, p, torch.full((1, 20), 5), torch.tensor([[-100] + [5]*19])),
                 lambda: c.encode(ids, mask, torch.tensor([4])), lambda: Compressor(lm, CompressorConfig(k=32, r=2))):
        with pytest.raises(InputError, match='window of 24'): over()

# --- the compressor --------------------------------------------------------------------------------------------------

def compressor(f, carrier='kv', **kw): return Compressor(tiny_lm(f), CompressorConfig(**dict(carrier=carrier, k=4, r=4) | kw))

def batch_of(c): # different lengths, and different k
    enc = c.lm.encode
    return c.collate([example(enc(docs[0]), [0], enc(docs[0]) + [1], 4), example(enc(docs[1]), [0], enc(docs[1]) + [1], 1),
                      example(enc(docs[2]), enc(' What?'), enc(' No'), 2)])

@carriers
@family
def test_gradients_reach_everything_trained_and_nothing_else(f, carrier):
    c = compressor(f, carrier); c.train()
    with torch.no_grad(): # LoRA starts with B = 0, where A has no gradient
        for n,p in c.trained().items(): p.add_(.05*torch.randn_like(p)) if 'lora_B' in n else None
    batch = batch_of(c)
    loss = c(**batch)['loss']; loss.backward()
    grads = {n: p.grad.clone() for n,p in c.trained().items()}
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads.values()), [n for n,g in grads.items() if not g.abs().sum() > 0]
    assert not [n for n,p in [*c.encoder.named_parameters(), *c.lm.model.named_parameters()] if p.grad is not None and 'lora_' not in n]
    c.zero_grad(); c.checkpointing = True # recomputed: the same loss and gradients
    again = c(**batch)['loss']; again.backward()
    assert again.item() == pytest.approx(loss.item(), abs=1e-6)
    for n,p in c.trained().items(): torch.testing.assert_close(p.grad, grads[n], atol=1e-5, rtol=1e-4)
    c.checkpointing = False
    with torch.no_grad(): # along their own direction the loss changes as the gradients say
        norm = sum((g**2).sum() for g in grads.values()).sqrt().item()
        def moved(step):
            for n,p in c.trained().items(): p.add_(grads[n]*step/norm)
            return c(**batch)['loss'].item()
        up = moved(1e-4); down = moved(-2e-4)
    assert (up - down)/2e-4 == pytest.approx(norm, rel=.05)

@carriers
@family
def test_batched_examples_are_single_ones(f, carrier):
    "The summed loss of a batch with different lengths and numbers of memory tokens is that of its rows"
    c = compressor(f, carrier)
    enc = c.lm.encode
    rows = [example(enc(d), [0], enc(d) + [1], k) for d,k in zip(docs, (4, 1, 2))]
    with torch.no_grad(): one = lambda rows: c(**c.collate(rows), num_items_in_batch=1)['loss'].item()
    assert one(rows) == pytest.approx(sum(one([r]) for r in rows), abs=2e-3)

@carriers
@family
def test_compress_is_encode(f, carrier):
    "Batched, one by one and in training: the same keys, values and positions; also cut into chunks"
    c = compressor(f, carrier)
    many = c.compress(docs, k=2, batch_size=2)
    for d,p in zip(docs, many):
        one = c.compress(d, k=2)
        close(one.keys, p.keys); close(one.values, p.values); assert one.next_position == p.next_position and torch.equal(one.positions, p.positions)
        ids, mask = pad_rows([c.lm.start_ids + c.lm.encode(d)], c.lm.pad_id)
        with torch.no_grad(): b = c.encode(ids, mask, torch.tensor([2]))
        for (K,V),(k,v) in zip(b.layers, p.layers): close(K[0], k); close(V[0], v)
    if c.lm.inv_freq is None: return
    small = Compressor(c.lm, CompressorConfig(carrier=carrier, k=4, r=4, max_tokens=14))
    text = docs[0] # 28 tokens, two chunks of 14
    whole, parts = small.compress(text), sum_of([small.compress(text[:14]), small.compress(text[14:])])
    close(whole.keys, parts.keys); close(whole.values, parts.values); assert whole.next_position == parts.next_position and len(whole) == 8

@pytest.mark.parametrize('f', ['gpt2','opt','llama'])
def test_training_switches_on_no_dropout_but_loras(f):
    "Some models bring dropout of their own; the frozen layers compute as for inference"
    c = compressor(f); batch = batch_of(c)
    with torch.no_grad():
        calm = c.eval()(**batch)['loss'].item()
        assert c.train()(**batch)['loss'].item() == calm
        noisy = compressor(f, dropout=.5)
        for n,p in noisy.trained().items(): p.add_(.1) if 'lora_B' in n else None
        assert noisy.train()(**batch)['loss'].item() != noisy.eval()(**batch)['loss'].item()

@pytest.mark.parametrize('when', ['before','after'])
def test_gradient_checkpointing_of_transformers(when):
    "It drops the cache without an error: it never runs in the encoder, and is refused in the reader"
    lm = tiny_lm('llama')
    want = Compressor(tiny_lm('llama'), CompressorConfig(k=4, r=4))
    if when == 'before': lm.model.gradient_checkpointing_enable()
    c = Compressor(lm, CompressorConfig(k=4, r=4))
    if when == 'after': lm.model.gradient_checkpointing_enable(); c.encoder.gradient_checkpointing_enable()
    batch = batch_of(c)
    assert c.train()(**batch)['loss'].item() == want.train()(**batch)['loss'].item()
    lm.model.train()
    with pytest.raises(StateError, match='gradient checkpointing'): c(**batch)

# --- every family of transformers ------------------------------------------------------------------------------------

FEW = 'granite cohere gemma2 gemma3 gemma4_text gptj bloom falcon llama4_text mllama ctrl pegasus bert mamba jamba deepseek_v3 minimax'.split() # one of each kind; the others with --nb-flags slow
KNOWN = json.loads(every.TABLE.read_text(encoding='utf-8'))
TRIED = [r['family'] for r in KNOWN['rows']]

@pytest.mark.parametrize('f', [f if f in FEW else pytest.param(f, marks=pytest.mark.slow) for f in TRIED])
def test_every_family_works_or_is_refused_in_one_line(f):
    "Loss to 1e-4, text behind prefixes, files, compressors and soft prompts: as the table in the docs says, and never another error than ours"
    row = every.tried(f, [c for c in every.COLUMNS if c != 'shrink'])
    known = next(r for r in KNOWN['rows'] if r['family'] == f)
    assert row is not None and not [v for v in row.values() if v.startswith('FAULT')], row
    if KNOWN['transformers'] == transformers.__version__: assert row == {k: v for k,v in known.items() if k != 'shrink'}
    if 'refused' in row: assert 'no KV prefix for it' in row['refused'] and len(row['refused'].splitlines()) == 1

@pytest.mark.slow
def test_the_table_has_every_family_that_has_a_small_model():
    assert {*TRIED, *KNOWN['skipped']} >= {*every.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} or KNOWN['transformers'] != transformers.__version__

@pytest.mark.parametrize('words', ['compress t.txt --model m -o p.safetensors', 'evaluate perplexity --model m --data t.txt --window 64'])
@pytest.mark.parametrize('f', ['mamba', 'jamba'])
def test_a_model_that_keeps_no_keys_is_one_line_in_the_shell(f, words, tmp_path, monkeypatch, capsys):
    from promptcompress.cli import main
    monkeypatch.chdir(tmp_path)
    lm = every.tiny(f); lm.model.save_pretrained('m'); lm.tokenizer.save_pretrained('m')
    (tmp_path/'t.txt').write_text('Ada wrote the first program. '*20)
    capsys.readouterr(); code = main(words.split()); said = capsys.readouterr().err
    assert code == 2 and 'no KV prefix for it' in said.splitlines()[-1] and 'Traceback' not in said

def test_the_fingerprint_of_a_model_is_not_computed_for_every_row(monkeypatch):
    "It reads a part of every weight: once for a call of many rows, and not at all where nothing records it"
    lm, seen = tiny_lm(), []
    plain = lm.model.state_dict
    monkeypatch.setattr(lm.model, 'state_dict', lambda *args, **kw: seen.append(1) or plain(*args, **kw))
    def times(f): seen.clear(); f(); return len(seen)
    c, rows = Compressor(lm, CompressorConfig(k=2, r=2)), [[5, 6, 7]]*16
    front, = read(lm, rows[:1])
    assert times(lambda: read(lm, rows)) <= 1 and times(lambda: read_behind(lm, rows, front)) <= 1 and times(lambda: c.compress(['Ada wrote.']*16, batch_size=16)) <= 1
    assert times(lambda: generate(lm, None, 'Hi', 2)) == times(lambda: generate(lm, [None, front], ['Hi', 'Ho'], 2)) == 0
