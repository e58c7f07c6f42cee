"Perplexity against loops over the plain model on every family, against transformers' documented method, and on the published preprocessing"
import math, random
from pathlib import Path
import pytest, torch
from promptcompress import perplexity
from promptcompress.core import InputError
from promptcompress.data import read_texts
from promptcompress.evaluation.perplexity import PREPROCESSING, RunningText, encode_counted, running_text, windows
from promptcompress.kv.prefix import collate, empty_prefix, read
from promptcompress.lm import FAMILIES, load_lm, tiny_lm

shared = Path(__file__).parents[1]/'..'/'shared'/'data'
needs_data = pytest.mark.skipif(not shared.exists(), reason='no ../shared/data')
models = {f: tiny_lm(f) for f in FAMILIES} | {'sliding': tiny_lm('mistral', sliding_window=96)}
rng = random.Random(0)
texts = [' '.join(''.join(rng.choices('abcdefghé', k=rng.randint(1, 8))) for _ in range(rng.randint(1, 30))) for _ in range(9)]
story = ' '.join(texts)
READ = 'What was read before.'

@torch.no_grad()
def by_hand(lm, rows):
    "Nats and number of scored tokens; a row is (context ids, scored ids), given to the plain model by itself"
    nats = n = 0
    for context, scored in rows:
        logp = lm.model(torch.tensor([context + scored])).logits[0].double().log_softmax(-1)
        for t,i in enumerate(scored, len(context)): nats -= logp[t-1, i].item()
        n += len(scored)
    return nats, n

def rows_of(lm, text, bos, width, stride, before=()):
    "Windows of one text as a reader would lay them out, written independently of `windows`"
    ids, done, start = ([lm.bos_id] if bos == 'text' else []) + lm.encode(text), 1 if bos == 'text' else 0, 0
    room = width - (bos == 'window')
    while True:
        end = min(start + room, len(ids))
        cut = max(done, start + (bos != 'window'))
        if cut < end: yield [*before, *([lm.bos_id] if bos == 'window' else []), *ids[start:cut]], ids[cut:end]
        if end == len(ids): return
        done, start = end, start + stride

@pytest.mark.parametrize('f', models)
@pytest.mark.parametrize('bos', ['text', 'window', 'none'])
@pytest.mark.parametrize('behind', [False, True], ids=['plain', 'prefix'])
def test_against_a_hand_loop(f, bos, behind):
    "Documents of different lengths in padded batches, some longer than a window, alone and behind a prefix"
    lm = models[f]
    before = lm.encode(READ) if behind else []
    prefix = read(lm, [before])[0] if behind else None
    for width, stride in (40, None), (40, 13), (64, 32):
        nats, n = by_hand(lm, [r for t in texts for r in rows_of(lm, t, bos, width, stride or width - (bos == 'window'), before)])
        p = perplexity(lm, texts, prefix, width, stride, bos=bos, tokens_per_batch=300)
        assert p.tokens == n
        assert p.nats == pytest.approx(nats/n, abs=1e-4) and p.ppl == pytest.approx(math.exp(nats/n), rel=1e-4)
    assert p.unit == 'document' and len(p.sums) == len(texts)

@pytest.mark.parametrize('f', models)
def test_a_prefix_of_any_kind(f):
    lm = models[f]
    prefix, = read(lm, [lm.encode(READ)])
    want = perplexity(lm, texts, prefix, window=50)
    for same in ([prefix], collate([prefix], lm)): assert perplexity(lm, texts, same, window=50).nll == want.nll
    none = perplexity(lm, texts, window=50)
    assert perplexity(lm, texts, empty_prefix(lm), window=50).nll == none.nll != want.nll
    assert (none.tokens, none.words, none.bytes) == (want.tokens, want.words, want.bytes), 'the prefix is not counted'
    with pytest.raises(InputError, match='2 prefixes were given'): perplexity(lm, texts, [prefix, prefix])
    other = tiny_lm('llama', num_hidden_layers=2)
    with pytest.raises(InputError, match='This prefix is for'): perplexity(other, texts, prefix)

@pytest.mark.parametrize('f', models)
def test_the_whole_window_is_used_and_no_more(f):
    "By default prefix and window fill what the model can read: positions, or its sliding window"
    lm = models[f]
    prefix, = read(lm, [lm.encode(READ)])
    p = perplexity(lm, [story], prefix)
    assert p.settings['window'] == lm.window - len(READ) and p.settings['slots'] == len(READ)
    for bad in (1, lm.window - len(READ) + 1):
        with pytest.raises(InputError, match=f'give 2 <= window <= {lm.window - len(READ)}'): perplexity(lm, [story], prefix, window=bad)
    long, = read(lm, [lm.encode('x'*(lm.window - 1))])
    with pytest.raises(InputError, match='no room for a text'): perplexity(lm, [story], long)

@torch.no_grad()
def documented(lm, ids, max_length, stride, exact=False):
    "Perplexity as transformers' documentation computes it, its count of tokens included: one too few where windows overlap, unless `exact`"
    nats = n = before = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        inputs = torch.tensor([ids[begin:end]])
        labels = inputs.clone()
        labels[:, :before - end] = -100
        k = (labels[:,1:] != -100).sum().item() if exact else (labels != -100).sum().item() - 1
        nats, n, before = nats + lm.model(inputs, labels=labels).loss.double().item()*k, n + k, end
        if end == len(ids): break
    return math.exp(nats/n)

@pytest.mark.parametrize('stride', [512, 256])
def test_against_transformers_documentation(stride):
    "The pocket model on real prose; its windows may overlap (then the documentation weights each by one token too few, which moves the mean a little)"
    lm = load_lm('pocket', 'cpu')
    text = ' '.join((Path(__file__).parents[1]/'LICENSE').read_text(encoding='utf-8').split())[:12_000]
    ids = lm.tokenizer(text)['input_ids']
    p = perplexity(lm, [text], preprocessing='c4', window=512, stride=stride, tail=True)
    assert p.ppl == pytest.approx(documented(lm, ids, 512, stride, exact=True), rel=1e-5)
    if stride == 512: assert documented(lm, ids, 512, stride) == documented(lm, ids, 512, stride, exact=True)
    assert p.tokens == len(ids) - (len(range(0, len(ids), 512)) if stride == 512 else 1)

@needs_data
def test_against_transformers_documentation_on_stories():
    "A published model with a sentencepiece-like tokenizer and text of its own kind: to 1e-4, both ways"
    lm = load_lm(shared/'models'/'stories260K', 'cpu')
    text = '\n\n'.join(t.text for t in read_texts(shared/'text'/'tinystories_slice.jsonl.xz', limit=60))
    ids = lm.tokenizer(text)['input_ids']
    for stride in 512, 256:
        p = perplexity(lm, [text], preprocessing=RunningText('\n\n'), stride=stride, tail=True)
        assert p.ppl == pytest.approx(documented(lm, ids, 512, stride), rel=1e-4)
        assert p.ppl < 5, 'these are stories, and it was trained on them'

@needs_data
def test_published_files():
    "The three test sets in the shapes they lie on disk, with the pocket model"
    lm = load_lm('pocket', 'cpu')
    for file, how, low, high in ('wikitext2_valid', 'wikitext2', 20, 80), ('c4_slice', 'c4', 40, 160), ('arxiv_2025', None, 15, 60):
        p = perplexity(lm, shared/'text'/f'{file}.jsonl.xz', limit=4096, preprocessing=how)
        assert low < p.ppl < high and p.ci[0] < p.ppl < p.ci[1] and .8 < p.bits_per_byte < 3
        assert p.tokens == (4096 if how is None else 4*1023)

def test_batches_do_not_matter():
    for f,lm in models.items():
        one, *more = (perplexity(lm, texts, window=40, stride=9, tokens_per_batch=n) for n in (1, 90, 10_000, None))
        for p in more: torch.testing.assert_close(torch.tensor(p.sums), torch.tensor(one.sums), atol=1e-3, rtol=0)

def test_every_word_and_byte_once():
    "However the text is cut, and with a tokenizer that splits characters"
    for lm in (models['llama'], load_lm('pocket', 'cpu')):
        text = story + ' 北京 ไทย naïve 🙂  \n two\u2003spaces'
        for w,s in (40, 39), (40, 7), (200, 100): # overlapping windows and a BOS: every token is scored
            p = perplexity(lm, [text], window=w, stride=s)
            assert (p.tokens, p.words, p.bytes) == (len(lm.encode(text)), len(text.split()), len(text.encode()))
            assert p.level == 'token' and perplexity(lm, [text], window=w, stride=s, level='word').ppl == pytest.approx(math.exp(p.nll/p.words))
        q = perplexity(lm, [text], limit=50)
        assert q.tokens == 50 and q.bytes == len(lm.tokenizer.decode(lm.encode(text)[:50]).encode())

def test_a_slow_tokenizer_counts_evenly(monkeypatch):
    lm = tiny_lm()
    monkeypatch.setattr(type(lm.tokenizer), 'is_fast', False)
    ids, counts = encode_counted(lm, texts[0])
    assert counts.sum(0).tolist() == [len(ids), len(texts[0].split()), len(texts[0].encode())]

def test_preprocessing_keeps_blank_rows(tmp_path):
    "The Hub's rows and the raw file give the same text: rows joined by two line ends, blank ones included"
    from datasets import Dataset
    lines = [' \n', ' = Title = \n', ' \n', ' Some text . \n', ' More . \n', ' \n', ' \n', ' = = Part = = \n', ' End . \n']
    rows = [l if l.strip() else '' for l in lines]
    raw = tmp_path/'wiki.valid.raw'; raw.write_text(''.join(lines))
    want = '\n\n'.join(rows)
    assert running_text(rows, 'wikitext2') == running_text(Dataset.from_dict(dict(text=rows)), 'wikitext2') == want
    assert running_text([''.join(lines)], 'wikitext2') == want and running_text(raw, 'wikitext2').rstrip() == want.rstrip()
    ptb = [' no it was n\'t black monday \n', ' but while the \n']
    assert running_text(Dataset.from_dict(dict(sentence=ptb)), 'ptb', field='sentence') == running_text([''.join(ptb)], 'ptb') == "no it was n't black monday but while the"
    assert PREPROCESSING['c4'].documents == 1100 and PREPROCESSING['c4'].windows == 256

def test_published_windows():
    "Disjoint, no BOS of ours, the tail left out, at most so many windows"
    lm = models['llama']
    ids = lm.encode(story)
    n = len(ids)//50
    p = perplexity(lm, [story], window=50, preprocessing='c4')
    nats, k = by_hand(lm, [(ids[50*i:50*i+1], ids[50*i+1:50*i+50]) for i in range(n)])
    assert (p.tokens, len(p.sums), p.unit) == (k, n, 'window') and p.nats == pytest.approx(nats/k, abs=1e-4)
    assert len(perplexity(lm, [story], window=50, preprocessing=RunningText(' ', windows=3)).sums) == 3
    assert perplexity(lm, [story], window=50, preprocessing='c4', tail=True).tokens == len(ids) - n - 1
    assert perplexity(lm, ['short'], window=50, preprocessing='c4').tokens == 4, 'the only window is not a tail'

def test_documents_without_a_scored_token():
    "A document of one token, without a BOS, is no unit: it would only widen or narrow the interval"
    lm = models['llama']
    p, q = (perplexity(lm, docs, bos='none') for docs in (['x', *texts[:3], 'y', *texts[3:], 'z'], texts))
    assert len(p.sums) == len(texts) and p.ci == pytest.approx(q.ci, rel=1e-4)

def test_several_special_tokens_in_front():
    "A tokenizer may put more than one before a text; none of them is scored"
    lm = tiny_lm()
    lm.start_ids = [0, 7, 9]
    p = perplexity(lm, texts, window=40, stride=20, bos='tokenizer')
    assert p.tokens == sum(len(lm.encode(t)) for t in texts) and p.bytes == sum(len(t.encode()) for t in texts)
    nats, n = by_hand(lm, [([0, 7, 9], lm.encode('short'))])
    assert perplexity(lm, ['short'], bos='tokenizer').nll == pytest.approx(nats, abs=1e-3)

@pytest.mark.parametrize('kw,says', [
    (dict(window=300), 'give 2 <= window <= 256'), (dict(window=20, stride=21), 'give 1 <= stride <= 20'), (dict(window=20, stride=20, bos='window'), 'give 1 <= stride <= 19'),
    (dict(stride=0), 'would skip'), (dict(limit=0), 'limit=0'), (dict(limit=-3), 'limit=-3'), (dict(level='byte'), "use 'token' or 'word'"), (dict(bos='yes'), "no bos 'yes'"),
    (dict(preprocessing='wikitext'), 'choose one of wikitext2, ptb, c4'), (dict(field='body'), "no field 'body'"), (dict(tokens_per_batch=-1), 'a batch of -1')])
def test_bad_choices(kw, says):
    with pytest.raises(InputError, match=says): perplexity(models['llama'], [dict(text=t) for t in texts], **kw)

@pytest.mark.parametrize('source,kw,says', [
    ([], {}, 'holds no text'), ([' \n'], {}, 'holds no text'), ([' '], dict(preprocessing='wikitext2'), 'holds no text'), (['x'], dict(bos='none'), 'give at least two'),
    (['x'], dict(preprocessing='ptb'), 'give at least two'), ('no/such.jsonl', {}, 'does not exist'), ('no/such.jsonl', dict(preprocessing='c4'), 'does not exist')])
def test_bad_texts(source, kw, says):
    with pytest.raises(InputError, match=says): perplexity(models['llama'], source, **kw)
    assert perplexity(models['llama'], ['x']).tokens == 1, 'behind a BOS one token is enough'

def test_windows_score_each_token_once():
    for n in range(1, 30):
        for w in range(2, 9):
            for s in range(1, w + 1):
                for lead in 0, 1:
                    found = windows(n, w, s, lead)
                    scored = [t for _,f,e in found for t in range(f, e)]
                    assert scored == sorted(set(scored)) and all(st <= f < e <= st + w and f + lead > st for st,f,e in found)
                    assert set(range(n)) - set(scored) == (set() if lead else {0} if s < w else {t for t in range(n) if t % w == 0})
