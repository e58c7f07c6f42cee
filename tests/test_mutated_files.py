"""Files and objects from strangers: each reader takes what it can read, or says in one `InputError` what is wrong; nothing else comes out, and nothing hangs.

Seeded mutations of small files that are right: of bytes, and of the values in their JSON. `MUTATIONS=2000 pytest tests/test_mutated_files.py` tries more of them (60 each).
"""
import csv, gzip, io, json, lzma, math, os, random, signal, time, warnings
from collections import Counter, UserDict
from datetime import date, datetime
from pathlib import Path
import numpy as np, pytest
from promptcompress.core import InputError, PromptCompressError
from promptcompress.corpora import Choice, choice_record, length_groups, load_corpus, read_choice, split_by_date
from promptcompress.data import QA, Text, calibration_batches, check_qa, file_texts, read_qa, read_texts
from promptcompress.evaluation import tables
from promptcompress.evaluation.results import read_results, read_rows
from promptcompress.leakage import leakage
from promptcompress.lm import byte_tokenizer
from promptcompress.qa_chat import chat_questions, pairs_in, qa_report, write_qa
from promptcompress.qa_writer import cloze_qa

N, SECONDS = int(os.environ.get('MUTATIONS', 60)), 3
STORY = 'The mill of Port Callow stood at the bend of the river Venn, and in 1995 its wheel had not turned for eleven years. Oda Brandt sold 3.4% of it.'

# --- what is right ---

def lines(*recs):
    text = ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in recs)
    try: return text.encode()
    except UnicodeEncodeError: return ''.join(json.dumps(r) + '\n' for r in recs).encode() # half a pair goes as an escape
def in_csv(recs, **kw):
    w = csv.DictWriter(out := io.StringIO(), list(recs[0]), **kw); w.writeheader(); w.writerows(recs)
    return out.getvalue().encode()
def in_parquet(recs):
    from datasets import Dataset
    Dataset.from_list(recs).to_parquet(out := io.BytesIO())
    return out.getvalue()

TEXTS = [dict(id=f'a{i}', date=f'202{i}-03-01', title='A mill', text=f'{i}. {STORY}') for i in range(3)]
ARXIV = [dict(id='0704.0001', title='On\n mills', abstract=' We mill.\n', update_date='2008-11-26', versions=[dict(version='v1', created='Mon, 2 Apr 2007 19:18:42 GMT')])]
ASKED = [dict(id=f'q{i}', context=STORY, question=f'What stood there, number {i}?', answers=dict(text=['mill', 'The mill'], answer_start=[4, 0]), date='2024-01-01') for i in range(2)]
SQUAD = dict(version='v2', data=[dict(title='M', paragraphs=[dict(context=STORY, qas=[dict(id='q0', question='What stood there?', is_impossible=False, answers=[dict(text='mill', answer_start=4)]),
                                                                                   dict(id='q1', question='Who?', is_impossible=True, answers=[])])])])
MRQA = [dict(header=dict(dataset='M')), dict(context=STORY, qas=[dict(qid='q0', question='What stood there?', answers=['mill'], detected_answers=[dict(text='mill')])])]
HOTPOT = [dict(_id='h1', question='Where did she live?', answer='Callow', supporting_facts=[['Mill', 0]], context=[['Mill', ['A mill.', ' In Callow.']], ['Anvil', ['Heavy.']]])]
RACE = [dict(id='high7', article=STORY, questions=['What stood there?', 'It _ .'], options=[['mill', 'inn'], ['ran', 'sat']], answers=['A', 'B'])]
CHOICES = [dict(ind=4, source_id='w~9', activity_label='Baking', ctx_a='[header] How.', ctx_b='the cook', endings=['waits. [step] Hot.', 'leaves.'], label='0'),
           dict(goal='To cool tea,', sol1='add ice.', sol2='add fire.', label=0), dict(question_stem='Ice is ', choices=dict(text=['cold', 'hot'], label=['A', 'B']), answerKey='A'),
           dict(question=dict(stem='Ice is', choices=[dict(text='cold', label='A'), dict(text='hot', label='B')]), answerKey='A'), dict(question='Ice?', options='A. cold\nB. hot', answer='A. cold'),
           dict(question='Which is cold?', choices=['Ice', 'Fire', 'Sun', 'Tea'], answer=0), dict(id='p', prompt='Ice is', choices=['cold', 'hot'], label=1)]
HOW = dict(command='x', commit='abc', seed=0, device='cpu', python='3.11', versions=dict(torch='2'), time='2026-01-01T00:00:00', fingerprint='f00', model='pocket', data=[dict(file='a.jsonl', sha256='12ab')])
def qa_row(maker, k, f1): return dict(task='qa', key=f'{maker}{k}', dataset='squad', maker=maker, k=k, length=96, f1=f1, em=f1/2, n=20, slots=16., tokens=96., stored=100, loss=1.2,
                                      ci=dict(f1=[f1 - .1, f1 + .1], em=[0, 1]), prefix=None, compressor=dict(name='pocket-kv'), **HOW)
ROWS = [qa_row('full', None, .9), qa_row('500x', 16, .5), qa_row('500x', 4, .4), dict(qa_row('500x', 16, .5), task='regenerate', key='r1', rouge_l=.5, bleu=.4, ci=dict(rouge_l=[.4, .6])),
        dict(task='perplexity', key='p', ppl=9.1, ci=[8, 10], window=64, dataset='c4', prefix=dict(maker='soft', slots=4, bytes=10), slots=4, bytes=5, tokens=99, n=3, **HOW),
        dict(task='choice', key='c', acc=.5, acc_norm=.4, acc_bytes=.4, n=9, dataset='piqa', ci=dict(acc=[.4, .6]), prefix=None, chance=.5, **HOW),
        dict(task='cost', variant='500x', length=96, batch=1, first=.1, token=.2, first_ratio=.5, token_ratio=.5, first_quartiles=[.4, .6], after=[8, 16.5], slots=16, **HOW),
        dict(prompt='soft', lm='pocket', dataset='c4', metric='ppl', value=9.5, key='t', **HOW)]
HELD = [f'Sure:\n```json\n{{"pairs": [{{"question": "What stood at the bend of the river?", "answer": "The mill"}}, {{"question": "In which year did it not turn?", "answer": 1995,}}]}}\n``` Done.',
        '<think>[{"question": "x"}]</think>' + json.dumps([dict(question='Who sold a part of the mill then?', answer='Oda Brandt'), dict(Question='How much of it?', Answers=[r'$\tau$'])])]

# --- how it is damaged ---

STRANGE = [None, True, False, 0, -1, 10**400, 1e308, -0., 3.5, '', ' ', 'x', '\ud800', '\x00', 'NaN', [], {}, [[]], [None], {'text': None}, {'': {}}, ['a', 3], 'x'*3000, '<|im_end|>', '2024-02-31', '9'*30]

def damaged_bytes(raw, rng):
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        i, j = sorted(rng.randrange(len(raw) + 1) for _ in range(2)) if raw else (0, 0)
        do = rng.randrange(8)
        if do == 0 and raw: raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        elif do == 1: del raw[i:]
        elif do == 2: del raw[i:min(j, i + rng.randrange(1, 40))]
        elif do == 3: raw[i:i] = raw[i:min(j, i + 60)]
        elif do == 4: raw[i:i] = rng.choice([b'"', b'{', b'}', b'[', b']', b',', b'\n', b'\r\n', b'\\', b'\x00', b'\xff', b'\xef\xbb\xbf', b'NaN', b'-Infinity', b'1e999', b'"\\ud800"', b'['*5000, b'9'*5000, b'"', b';'])
        elif do == 5: raw[:0] = rng.choice([b'\x1f\x8b', b'\xfd7zXZ\x00', b'PAR1', b'\xef\xbb\xbf', b'\xff\xfe', b'\n\n', b'[', b'{'])
        elif do == 6 and raw: raw[i:j] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 20)))
        else: raw += raw[:j]
    return bytes(raw)

def damaged_value(o, rng, strange=STRANGE, depth=0):
    "A copy of `o` in which one value, key or item is another"
    if isinstance(o, (dict, list)) and o and (rng.random() < .8 or not depth):
        at = rng.choice(list(o) if isinstance(o, dict) else range(len(o)))
        o = dict(o) if isinstance(o, dict) else list(o)
        do = rng.random()
        if do < .12: o.pop(at)
        elif do < .2 and isinstance(o, dict): o[rng.choice(['text', 'id', 'x', '', 'data', 'qas', 'header', 'question', 'answers', 'scores', 'task'])] = o.pop(at)
        elif do < .25 and isinstance(o, list): o.append(o[at])
        else: o[at] = damaged_value(o[at], rng, strange, depth + 1)
        return o
    return rng.choice(strange)

# --- the readers ---

def whole(f): # every item is read
    return lambda path: list(f(path))
def asked(path): check_qa(path); return list(read_qa(path))
TABLES = [getattr(tables, f'{n}_table') for n in ('qa', 'retention', 'regeneration', 'perplexity', 'choice', 'cost')]
def results(path):
    rows = read_rows(path)
    for table in TABLES:
        try: t = table(rows); t.markdown(); t.latex()
        except InputError: pass # no rows of this task are left, or they can't share a table
def written(path):
    qa_report(path)
    write_qa(TEXTS, path, tokens=(64, 120), tokenizer=byte_tokenizer()); list(read_qa(path))
def resumed(path): write_qa(TEXTS, path, tokens=(64, 120), tokenizer=byte_tokenizer())
def predictions(path): return read_results(path, repair=True), read_results(path)

def written_file():
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        write_qa(TEXTS, Path(d)/'a.jsonl', tokens=(64, 120), tokenizer=byte_tokenizer())
        return [json.loads(l) for l in (Path(d)/'a.jsonl').read_text().splitlines()]

READERS = { # name -> (file name, records, how they are written, reader)
    'texts': ('a.jsonl', TEXTS, lines, whole(read_texts)), 'texts in one document': ('a.json', TEXTS, lambda *r: json.dumps(r, indent=1).encode(), whole(read_texts)),
    'arxiv': ('a.json', ARXIV, lines, whole(read_texts)), 'plain text': ('a.txt', [STORY], lambda *r: '\n\n'.join(map(str, r)).encode(), whole(read_texts)),
    'lines': ('a.txt', [STORY]*3, lambda *r: '\n'.join(map(str, r)).encode(), lambda p: list(file_texts(p, lines=True))),
    'gzip': ('a.jsonl.gz', TEXTS, lambda *r: gzip.compress(lines(*r)), whole(read_texts)), 'xz': ('a.jsonl.xz', TEXTS, lambda *r: lzma.compress(lines(*r)), whole(read_texts)),
    'no name': ('a', TEXTS, lines, whole(read_texts)), 'csv': ('a.csv', TEXTS, lambda *r: in_csv(r), whole(read_texts)), 'tsv': ('a.tsv', TEXTS, lambda *r: in_csv(r, delimiter='\t'), whole(read_texts)),
    'parquet': ('a.parquet', TEXTS, lambda *r: in_parquet(r), whole(read_texts)), 'questions in parquet': ('q.parquet', ASKED, lambda *r: in_parquet(r), asked),
    'plain questions': ('q.jsonl', ASKED, lines, asked), 'squad': ('q.json', [SQUAD], lines, asked), 'squad as text': ('q.json', [SQUAD], lines, whole(read_texts)), 'mrqa': ('q.jsonl', MRQA, lines, asked),
    'hotpotqa': ('q.json', HOTPOT, lines, asked), 'race': ('q.jsonl', RACE, lines, asked), 'choices': ('c.jsonl', CHOICES, lines, whole(read_choice)),
    'choices in csv': ('c.csv', [dict(question='Which?', **{f'choice{i}': c for i,c in enumerate('abcd')}, answer='A')]*2, lambda *r: in_csv(r), whole(read_choice)),
    'corpora': ('c.jsonl', RACE, lines, lambda p: list(load_corpus('race', p))), 'mmlu': ('m.csv', [['Which?', 'a', 'b', 'c', 'd', 'A']]*3, lambda *r: '\n'.join(','.join(map(str, o)) if isinstance(o, list) else str(o) for o in r).encode(),
                                                                                 lambda p: list(load_corpus('mmlu_high_school_european_history', p))),
    'leakage': ('a.jsonl', TEXTS, lines, lambda p: leakage(p, TEXTS)), 'split': ('a.jsonl', TEXTS, lines, lambda p: split_by_date(p, '2021', '2022', None)),
    'cloze': ('a.jsonl', TEXTS, lines, lambda p: list(cloze_qa(read_texts(p)))), 'groups': ('a.jsonl', TEXTS, lines, lambda p: length_groups(p, byte_tokenizer(), (8, 32))),
    'calibration': ('a.jsonl', TEXTS, lines, lambda p: calibration_batches(p, byte_tokenizer(), 2, 16)),
    'results': ('r.jsonl', ROWS, lines, results), 'one result': ('r.json', ROWS[:1], lambda *r: json.dumps(r[0] if r else {}, indent=1).encode(), results), 'predictions': ('p.jsonl', ROWS, lines, predictions),
    'written questions': ('w.jsonl', written_file, lines, written), 'written questions, resumed': ('w.jsonl', written_file, lines, resumed)}

class TooSlow(BaseException): pass
def limited(f, *args, seconds=SECONDS):
    "Whether `f` returns or refuses; another exception, or none for `seconds`, is a fault"
    def late(*_): raise TooSlow(f'{seconds} s have passed')
    was = signal.signal(signal.SIGALRM, late); signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); f(*args)
        return 'read'
    except PromptCompressError as e:
        assert str(e).strip() and len(str(e)) < 5000, f'a message of {len(str(e))} letters'
        return 'refused'
    finally: signal.setitimer(signal.ITIMER_REAL, 0); signal.signal(signal.SIGALRM, was)

def faults(tries):
    "How often each came, and what came besides"
    came, bad = Counter(), {}
    for name, f, *args in tries:
        try: came[limited(f, *args)] += 1
        except (Exception, TooSlow) as e:
            import traceback
            at = traceback.extract_tb(e.__traceback__)[-1]
            bad.setdefault(f'{type(e).__name__}: {str(e)[:80]} at {Path(at.filename).name}:{at.lineno}', name)
    return came, bad

@pytest.mark.parametrize('name', READERS)
def test_a_damaged_file_is_read_or_refused(name, tmp_path):
    file, recs, write, reader = READERS[name]
    recs = recs() if callable(recs) else recs
    path, rng = tmp_path/file, random.Random(name)
    right = write(*recs)
    path.write_bytes(right); assert limited(reader, path, seconds=60) == 'read', 'the file that is right must be read'
    def tries():
        for i in range(N):
            for kind in ('bytes', 'values'):
                try: raw = damaged_bytes(right, rng) if kind == 'bytes' else write(*damaged_value(list(recs), rng))
                except (TypeError, ValueError, AttributeError, KeyError, IndexError, OverflowError) as e: continue # can't be written either
                except Exception as e:
                    if type(e).__module__.startswith(('pyarrow', 'datasets')): continue
                    raise
                path.write_bytes(raw)
                yield f'{kind} {i}', reader, path
    came, bad = faults(tries())
    assert not bad, f'{len(bad)} kinds of foreign errors: {bad}'
    assert came['read'] and (came['refused'] or file.endswith('.txt')), came

@pytest.mark.parametrize('reply', range(len(HELD)))
def test_a_damaged_reply_is_read(reply):
    rng = random.Random(f'reply {reply}')
    def tries():
        for i in range(2*N): yield i, lambda r: (pairs_in(r), chat_questions(STORY, lambda m: r, retries=1)), damaged_bytes(HELD[reply].encode(), rng).decode(errors='replace')
    came, bad = faults(tries())
    assert not bad and not came['refused'], bad

LONG = ['['*60_000, '{"a":'*20_000, '"'*50_000, '\\'*50_000, '[{"question": "'*5000, '{"pairs": [' + '{"question": "Who?", "answer": "x"},'*3000, '<think>'*8000, '{'*300 + '"a'*9000, ',}'*25_000, '[1,'*20_000,
        '{"question": "' + '\\"'*20_000, '[' + '"\\u'*9000, ' '*60_000 + '{', '[[{"a": [' + '{"b": ['*900]
@pytest.mark.parametrize('i', range(len(LONG)))
def test_a_long_reply_takes_no_long_time(i):
    start = time.process_time()
    limited(lambda: (pairs_in(LONG[i]), chat_questions(STORY, lambda m: LONG[i], retries=0)), seconds=20)
    assert time.process_time() - start < 2

# --- objects of Python ---

class Awkward: # as a library may hand in: nothing about it works
    def __str__(self): raise RuntimeError('not to be shown')
    __repr__ = __iter__ = __len__ = __hash__ = __bool__ = __eq__ = __str__
class Mine(str): pass
OBJECTS = [*STRANGE, b'bytes', bytearray(b'x'), {1, 2}, {3: 'x'}, {('a',): 1}, np.arange(3), np.array(['mill', 'inn']), np.int64(1), np.float32('nan'), math.nan, math.inf, 1 + 2j, Path('none.jsonl'), Path('a\0b'),
           'none.jsonl', 'a\0.txt', 'x'*5000 + '.txt', datetime(2024, 1, 1), date(1, 1, 1), range(3), (x for x in 'ab'), iter([]), lambda: 1, Awkward(), Text, Text('a', 'b'), Text(1, None), Text('a', 'b', 3), QA('a', 'b', 'c', ('d',)),
           QA(1, None, 'c', ('d',)), QA('a', 'b', 'c', (3,)), QA('a', 'b', 'c', ()), UserDict(text='a mill'), Mine('a mill'), 10**5000, '\udcff', ['a']*3, object(), NotImplemented, ..., True]
SOURCES = dict(texts=(TEXTS, lambda s: list(read_texts(s, limit=50))), arxiv=(ARXIV, lambda s: list(read_texts(s, limit=50))), questions=(ASKED, lambda s: (check_qa(s), list(read_qa(s, limit=50)))), squad=([SQUAD], lambda s: list(read_qa(s, limit=50))),
               mrqa=(MRQA, lambda s: list(read_qa(s, limit=50))), hotpotqa=(HOTPOT, lambda s: list(read_qa(s, limit=50))), race=(RACE, lambda s: list(read_qa(s, limit=50))), choices=(CHOICES, lambda s: list(read_choice(s, limit=50))),
               leakage=(TEXTS, lambda s: leakage(s, s)), split=(TEXTS, lambda s: split_by_date(s, '2021', '2022', None)), cloze=(TEXTS, lambda s: list(cloze_qa(s))), groups=(TEXTS, lambda s: length_groups(s, byte_tokenizer(), (8, 32))),
               calibration=(TEXTS, lambda s: calibration_batches(s, byte_tokenizer(), 2, 16)), written=(TEXTS, None))

@pytest.mark.parametrize('name', SOURCES)
def test_a_damaged_object_is_read_or_refused(name, tmp_path):
    recs, reader = SOURCES[name]
    out = tmp_path/'w.jsonl'
    if reader is None:
        def reader(s): out.unlink(missing_ok=True); write_qa(s, out, tokens=(64, 120), tokenizer=byte_tokenizer(), limit=50)
    rng = random.Random(f'object {name}')
    assert limited(reader, recs, seconds=60) == 'read'
    def tries():
        for o in OBJECTS: # as the source itself, and as one of its items
            yield f'{type(o).__name__} itself', reader, o
            yield f'{type(o).__name__} in a list', reader, [*recs, o]
        for i in range(2*N): yield f'values {i}', reader, damaged_value(list(recs), rng, OBJECTS)
    came, bad = faults(tries())
    assert not bad, f'{len(bad)} kinds of foreign errors: {bad}'
    assert came['read'] and came['refused'], came

def forever(x):
    while True: yield x
@pytest.mark.parametrize('blank', ['', ' \n', Text('a', ''), dict(text=' ')])
@pytest.mark.parametrize('read', [lambda s: next(read_texts(s)), lambda s: list(read_texts(s)), lambda s: list(read_texts(s, limit=3))])
def test_a_source_that_never_ends_is_refused(read, blank):
    "A stream of blank texts hung: it may be asked for as long as one likes"
    with pytest.raises(InputError, match='blank texts in a row'): read(forever(blank))
    assert [t.text for t in read_texts(forever('x'), limit=3)] == ['x']*3 # one that gives something is read as far as is asked

def test_what_a_source_raises_names_it():
    def broken(): yield from TEXTS; raise ConnectionError('the server is gone')
    for read in (read_texts, read_qa, read_choice):
        with pytest.raises(InputError, match="can't be read .ConnectionError: the server is gone.|fields|layout|no field|item"): list(read(broken()))
    with pytest.raises(InputError, match="ConnectionError"): list(read_texts(broken()))

def test_a_table_of_pandas_is_its_rows():
    "Not the names of its columns"
    pd = pytest.importorskip('pandas')
    assert [t.text for t in read_texts(pd.DataFrame(TEXTS))] == [t['text'] for t in TEXTS]
    assert [q.answers for q in read_qa(pd.DataFrame(ASKED))] == [('mill', 'The mill')]*2

SLOW = {'no spaces': 'x'*60_000, 'Chinese': '水车停了' * 15_000, 'digits': '1'*60_000, 'dots': 'A. '*20_000, 'brackets': '['*60_000, 'commands': '\\a{'*15_000, 'dollars': '$'*60_000, 'capitals': 'Aa '*20_000, 'hyphens': 'ab-'*20_000,
        'blank lines': '\n'*60_000 + 'x', 'spaces': '.' + ' '*60_000 + 'x', 'underscores': 'a_'*30_000, 'quotes': "'"*60_000, 'one word': ('mill ' * 12_000)}
@pytest.mark.parametrize('name', SLOW)
def test_a_long_text_takes_no_long_time(name):
    "Searches that begin anew at each letter hang on texts of some ten thousand"
    text = SLOW[name]
    start = time.process_time()
    limited(lambda: (list(cloze_qa([text, f'{STORY} {text}'])), list(read_choice([dict(CHOICES[0], ctx_a=text)])), leakage([text], [text]), split_by_date([dict(text='x', date=text), *TEXTS], '2021', '2022', None)), seconds=60)
    limited(lambda: chat_questions(text, lambda m: json.dumps([dict(question='What is it that stands there?', answer=text[5:9]), dict(question='And what is it that stands here?', answer=text[:9])])), seconds=60)
    assert time.process_time() - start < 4
