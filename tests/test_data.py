"Every loader on real files (where they are at hand), and on random bytes"
import csv, gzip, io, json, lzma, sys
from pathlib import Path
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from promptcompress.core import InputError
from promptcompress.data import QA, Text, check_qa, cut, file_lines, file_texts, length_batches, read_qa, read_texts, text_column
from promptcompress.leakage import check_leakage, leakage

DATA = Path(__file__).parents[2]/'shared'/'data'

def real(name):
    "A real file, or skip"
    if not (DATA/name).exists(): pytest.skip(f'{name} is not at hand')
    return DATA/name

@pytest.mark.parametrize('name,dated', [('arxiv_2017_2019',True), ('arxiv_2025',True), ('wikipedia_en',False), ('openstax',False),
                                        ('wikitext2_valid',False), ('c4_slice',False), ('tinystories_slice',False)])
def test_real_text(name, dated):
    texts = list(read_texts(real(f'text/{name}.jsonl.xz'), limit=20))
    assert texts and all(isinstance(t, Text) and isinstance(t.id, str) and t.text.strip() for t in texts)
    assert all((t.date is not None) == dated for t in texts)
    assert not dated or len({t.id for t in texts}) == len(texts)

@pytest.mark.parametrize('name', ['squad_v1.1_train_44_articles.json', 'squad_v1.1_dev_half.json', 'RelationExtraction.dev.half.jsonl.gz'])
def test_real_qa(name):
    path = real(f'qa/{name}')
    qas = list(read_qa(path, limit=200))
    assert len(qas) == 200 == len({q.id for q in qas})
    assert all(isinstance(q, QA) and q.question and q.answers[0] in q.context for q in qas) # these sets are extractive
    assert len({t.text for t in read_texts(path, limit=5)}) == 5 # their contexts, as text, each once

def test_real_counts():
    assert sum(1 for _ in read_qa(real('qa/squad_v1.1_dev_half.json'))) == 4782
    assert sum(1 for _ in read_qa(real('qa/squad_v1.1_train_44_articles.json'))) == 11877

def test_real_relation_extraction():
    qas = list(read_qa(real('qa/RelationExtraction.dev.half.jsonl.gz')))
    assert len(qas) == 1492 == len({q.id for q in qas})
    assert (qas[0].question, qas[0].answers) == ('What year was the end of Extremaduran Popular Bloc?', ('1983',))

def test_real_hotpotqa():
    "Only the paragraphs that are needed, each under its title; yes and no need not be found there"
    path = real('qa/hotpotqa_half.jsonl.xz')
    qas, raw = list(read_qa(path)), [json.loads(l) for _,l in file_lines(path)]
    assert len(qas) == 173 == len({q.id for q in qas}) and qas[0].answers == ('Greenwich Village, New York City',)
    assert [q.id for q in qas if not q.extractive] == [r['id'] for r in raw if r['answer'] in ('yes','no')]
    assert sum(not q.extractive for q in qas) == 12
    for q,r in zip(qas, raw): assert [p.split('\n')[0] for p in q.context.split('\n\n')] == [t for t,_ in r['paragraphs'] if t in r['gold_titles']]
    full = list(read_qa(path, distractors=True))
    assert [q.context.count('\n\n') + 1 for q in full] == [len(r['paragraphs']) for r in raw]

def test_hotpotqa_of_the_authors_and_of_the_hub(tmp_path):
    "Both original layouts of one question give the record that the real file's layout gives"
    r = json.loads(next(l for _,l in file_lines(real('qa/hotpotqa_half.jsonl.xz'))))
    sentences = [[t, [f'{s}.' if i == 0 else f' {s}.' for i,s in enumerate(p.rstrip('.').split('. '))]] for t,p in r['paragraphs']]
    given = {k: r[k] for k in ('question','answer','type','level')}
    authors = dict(given, _id=r['id'], context=sentences, supporting_facts=[[t, 0] for t in r['gold_titles']])
    hub = dict(given, id=r['id'], context=dict(title=[t for t,_ in sentences], sentences=[s for _,s in sentences]),
               supporting_facts=dict(title=r['gold_titles'], sent_id=[0]*len(r['gold_titles'])))
    (tmp_path/'a.json').write_text(json.dumps([authors], indent=1))
    from datasets import Dataset
    assert list(read_qa(tmp_path/'a.json')) == list(read_qa([r])) == list(read_qa(Dataset.from_list([hub])))

def test_real_race():
    "The answer is the text of the right option; few stand in the article, and gaps stay"
    path = real('qa/race_half.jsonl.xz')
    qas, raw = list(read_qa(path)), [json.loads(l) for _,l in file_lines(path)]
    assert len(qas) == 482 == len({q.id for q in qas}) and not any(q.extractive for q in qas)
    assert (qas[0].id, qas[0].question) == ('middle1442.txt:1', 'The writer tries to? _? in this passage.')
    assert qas[0].answers == ('advise people about safe driving in winter',)
    for q,r in zip(qas, raw):
        assert (q.answers, q.context, q.question) == ((r['options'][ord(r['answer']) - 65].strip(),), r['article'], r['question'].strip())
    assert sum('_' in q.question for q in qas) == 133 and sum(q.answers[0] in q.context for q in qas) < 30

def test_race_of_the_authors_and_of_the_hub(tmp_path):
    raw = [json.loads(l) for _,l in file_lines(real('qa/race_half.jsonl.xz'))]
    one = [r for r in raw if r['article'] == raw[0]['article']]
    columns = {to: [r[k] for r in one] for k,to in dict(question='questions', options='options', answer='answers').items()}
    (tmp_path/'1.txt').write_text(json.dumps(dict(id='x.txt', article=raw[0]['article'], **columns)))
    authors, ours = list(read_qa(tmp_path/'1.txt')), list(read_qa(one))
    hub = list(read_qa([{k: r[k] for k in ('example_id','article','answer','question','options')} for r in one + raw[-1:]]))
    assert [(q.context, q.question, q.answers) for q in authors] == [(q.context, q.question, q.answers) for q in ours]
    assert len({q.id for q in authors}) == len(authors)
    assert [q.answers for q in hub[:-1]] == [q.answers for q in ours] and len({q.id for q in hub}) == len(one) + 1

@pytest.mark.parametrize('name,extractive,share', [('squad_v1.1_dev_half.json', 4782, 0), ('RelationExtraction.dev.half.jsonl.gz', 1492, 0),
                                                   ('hotpotqa_half.jsonl.xz', 161, .05), ('race_half.jsonl.xz', 0, 0)])
def test_real_sets_pass_the_check(name, extractive, share):
    r = check_qa(real(f'qa/{name}'))
    assert r['extractive'] == extractive and r['share'] <= share and len(r['absent']) == round(r['share']*extractive)

def test_answers_of_another_file_are_found_out():
    "Contexts and answers that were shifted against each other would only show as low scores"
    qas = list(read_qa(real('qa/squad_v1.1_dev_half.json'), limit=400))
    shifted = [QA(q.id, q.context, q.question, p.answers) for p,q in zip(qas[200:] + qas[:200], qas)]
    with pytest.raises(InputError, match='do not occur in their contexts'): check_qa(shifted)
    assert check_qa(shifted, extractive=False)['share'] > .8
    with pytest.raises(InputError, match=f"two questions have the id '{qas[3].id}'"): check_qa(qas + qas[3:4])

def test_real_leakage():
    train, test = (list(read_texts(real(f'text/{n}.jsonl.xz'), limit=300)) for n in ('arxiv_2017_2019','arxiv_2025'))
    report = check_leakage(train, test)
    assert report['train_latest'][0] < '2020' and report['test_earliest'][0] > '2025' and report['shared_ngrams'] == 0
    with pytest.raises(InputError, match='not older'): check_leakage(test, train)
    planted = [*train, Text('planted', f'As we said before: {test[7].text}', '2019-01-01')]
    found = leakage(planted, test)
    assert found['train_sharing'] == ['planted'] and found['test_sharing'] == [test[7].id]

def test_real_cut():
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(real('models/stories260K'))
    for t in read_texts(real('text/tinystories_slice.jsonl.xz'), limit=50):
        text, ids = cut(t.text, tok, 96)
        assert t.text.startswith(text) and tok(text, add_special_tokens=False)['input_ids'] == ids and 90 <= len(ids) <= 96

def test_datasets_objects(tmp_path):
    from datasets import Dataset, DatasetDict
    rows = [dict(id=str(i), text=f'text {i}', date='2020-01-01') for i in range(5)]
    ds = Dataset.from_list(rows)
    want = [Text(str(i), f'text {i}', '2020-01-01') for i in range(5)]
    assert list(read_texts(ds)) == want == list(read_texts(ds.to_iterable_dataset())) and list(read_texts(ds, limit=2)) == want[:2]
    assert [t.text for t in read_texts(ds, field='id')] == list('01234')
    qa = Dataset.from_list([dict(id='a', title='t', context='The sky is blue.', question='What is blue?',
                                 answers=dict(text=['The sky'], answer_start=[0]))])
    assert list(read_qa(qa)) == [QA('a', 'The sky is blue.', 'What is blue?', ('The sky',))]
    with pytest.raises(InputError, match='choose one split'): read_texts(DatasetDict(train=ds))

@pytest.mark.parametrize('answers', [dict(text=['red', 'red mill'], answer_start=[2, 2]), ['red', 'red mill'], [dict(text='red'), dict(text='red mill')]])
def test_answers_of_every_layout(answers, tmp_path):
    "A list, a list of objects, and the columns of `datasets`, from a file, from objects and in a record made by hand"
    rec = dict(id='0', context='a red mill', question='What colour has the mill?', answers=answers)
    (tmp_path/'a.jsonl').write_text(json.dumps(rec))
    for source in (tmp_path/'a.jsonl', [rec], [QA(**rec)]): assert [q.answers for q in read_qa(source)] == [('red', 'red mill')]

def test_reading_streams(tmp_path):
    "Taking two of a million reads two: the broken third line is never seen"
    f = tmp_path/'a.jsonl'; f.write_text('{"text": "one"}\n{"text": "two"}\nbroken\n')
    assert [t.text for t in read_texts(f, limit=2)] == ['one','two']
    with pytest.raises(InputError, match='line 3'): list(read_texts(f))

RAW = {'plain': b'one\n\ntwo', 'mark': b'\xef\xbb\xbfone', 'windows': b'one\r\ntwo\r\n', 'mark and windows': b'\xef\xbb\xbfone\r\n\r\ntwo', 'spaces': b'  one \r\n\t', 'old': b'one\rtwo',
       'gzip': gzip.compress(b'\xef\xbb\xbfone\r\ntwo'), 'xz': lzma.compress(b'one\r\ntwo\r\n'), 'a mark inside': 'one\ufeff\n\ufefftwo'.encode(), 'other scripts': 'ёлка\r\n木'.encode()}
@pytest.mark.parametrize('name', RAW)
def test_standard_input_is_the_same_text_as_a_file(name, tmp_path, monkeypatch):
    from promptcompress.verbs.arguments import given_text
    (tmp_path/'a.txt').write_bytes(RAW[name])
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(RAW[name])))
    assert given_text('-') == given_text(tmp_path/'a.txt') == next(read_texts(tmp_path/'a.txt')).text
    assert not given_text(tmp_path/'a.txt').startswith('\ufeff') and ('\r\n' not in given_text(tmp_path/'a.txt'))

DOCS = ['NA', 'One, "two";\nthree\tand 木', '1995', 'null', ' = Ice = ', "it's ё"]
def table(path, rows):
    "Rows as a table of the kind that the name says, as other programs write them"
    name, cols = path.name, list(rows[0])
    if '.parquet' in name: from datasets import Dataset; Dataset.from_list(rows).to_parquet(str(path)); return path
    out = io.StringIO(newline='')
    w = csv.DictWriter(out, cols, delimiter='\t' if 'tsv' in name else ';' if 'semicolon' in name else ',', lineterminator='\n' if 'unix' in name else '\r\n')
    w.writeheader(); w.writerows(rows)
    raw = out.getvalue().encode('utf-8-sig' if 'mark' in name else 'utf-8')
    path.write_bytes(gzip.compress(raw) if name.endswith('gz') else lzma.compress(raw) if name.endswith('xz') else raw)
    return path

@pytest.mark.parametrize('name', ['a.csv', 'unix.csv', 'mark.csv', 'semicolon.csv', 'a.tsv', 'A.CSV', 'a.csv.gz', 'a.csv.xz', 'a.parquet', 'odd [1] *.parquet', 'a b.csv'])
def test_a_table_is_its_texts(name, tmp_path):
    "CSV and Parquet are read by the column 'text', by another if one is named, and by the only one there is"
    f = table(tmp_path/name, [dict(id=f'd{i}', year=1990 + i, text=t, body=t*2) for i,t in enumerate(DOCS)])
    assert [t.text for t in read_texts(f)] == DOCS and [t.id for t in read_texts(f)] == [f'd{i}' for i in range(6)]
    for kw in (dict(field='body'), dict(column='body')): assert [t.text for t in read_texts([f], **kw)] == [t*2 for t in DOCS]
    with text_column('body'): assert next(read_texts(f)).text == 'NANA'
    assert next(read_texts(f)).text == 'NA'
    with pytest.raises(InputError, match=r"no column 'bdoy': choose one of \['id', 'year', 'text', 'body'\]"): list(read_texts(f, column='bdoy'))
    g = table(tmp_path/f'g{name}', [dict(title='x', body=t) for t in DOCS])
    with pytest.raises(InputError, match=r"which column holds the text\? Choose one of \['title', 'body'\]"): list(read_texts(g))
    assert [t.text for t in read_texts(g, column='body')] == DOCS
    assert [t.text for t in read_texts(table(tmp_path/f'h{name}', [dict(sentence=t) for t in DOCS]))] == DOCS
    if name.endswith('parquet'):
        with pytest.raises(InputError, match="'year' that holds a string"): list(read_texts(f, column='year'))

def test_questions_in_a_table(tmp_path):
    "The Hub's Parquet files of SQuAD, and a CSV with one answer or a JSON list of them"
    rec = dict(id='q', context='a red mill', question='What colour?')
    answers = {'a.parquet': dict(text=['red', 'red mill'], answer_start=[2, 2]), 'b.parquet': ['red', 'red mill'], 'a.csv': '["red", "red mill"]'}
    for name,a in answers.items():
        f = table(tmp_path/name, [rec | dict(answers=a)])
        assert list(read_qa(f)) == [QA('q', 'a red mill', 'What colour?', ('red', 'red mill'))] and [t.text for t in read_texts(f)] == ['a red mill']
    assert next(read_qa(table(tmp_path/'c.csv', [rec | dict(answer='red')]))).answers == ('red',)
    with pytest.raises(InputError, match="list of answers is not JSON"): list(read_qa(table(tmp_path/'d.csv', [rec | dict(answers="['red', 'red mill']")])))

@pytest.mark.parametrize('raw,why', [(b'text,year\na,1,2\n', 'line 2: 3 columns, expected 2'), (b'text,year\nno comma\n', 'line 2: 1 columns'), (b'text\n"cut', 'not CSV'), (b'', 'is empty'),
                                     (b'text,text\na,b\n', 'two columns'), (b'text\n\xff\n', 'not UTF-8'), (b'text\n', 'holds no text'), (b'PAR1 and no more', 'whole Parquet'), (b'PAR1'*5, 'read as Parquet')])
def test_a_table_that_is_damaged(raw, why, tmp_path):
    (tmp_path/'a.csv').write_bytes(raw)
    for f in (lambda: list(read_texts(tmp_path/'a.csv')), lambda: list(file_texts(tmp_path/'a.csv', column='text')) or list(read_texts(tmp_path/'a.csv'))):
        with pytest.raises(InputError, match=why): f()

def test_any_compression_any_name(tmp_path):
    line = json.dumps(dict(text='Grüße', id=1), ensure_ascii=False).encode()
    for i,data in enumerate((line, gzip.compress(line), lzma.compress(line), b'\xef\xbb\xbf' + line)):
        for name in ('a.jsonl', 'a.jsonl.xz', 'a.gz', 'a'):
            (tmp_path/name).write_bytes(data)
            assert [t.text for t in read_texts(tmp_path/name)] == ['Grüße'], (i, name)

def test_lone_surrogates_become_encodable(tmp_path):
    f = tmp_path/'a.jsonl'; f.write_text('{"text": "a \\ud800 b", "title": "\\udfff"}')
    t, = read_texts(f)
    assert t.text == 'a \ufffd b'; (t.text + t.title).encode()

slow_disk = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
FIELDS = ('id text abstract data paragraphs qas context question answer answers date versions header title '
          'article questions options sentences supporting_facts gold_titles example_id extractive').split()
json_like = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda s: st.lists(s, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), s, max_size=5), max_leaves=12)
payload = (st.binary(max_size=200) | json_like.map(lambda o: json.dumps(o).encode()) |
           st.lists(json_like, max_size=4).map(lambda l: '\n'.join(map(json.dumps, l)).encode()))

@slow_disk
@given(data=payload, wrap=st.sampled_from([bytes, gzip.compress, lzma.compress, lambda b: gzip.compress(b)[:-3], lambda b: lzma.compress(b)[:-3]]),
       name=st.sampled_from(['a.jsonl','a.txt','a','a.json.xz']), lines=st.booleans())
def test_fuzz_files(tmp_path, data, wrap, name, lines):
    "Whatever a file holds, it is read or refused in words"
    path = tmp_path/name; path.write_bytes(wrap(data))
    for read in (lambda: read_texts(path, limit=20, lines=lines), lambda: read_qa(path, limit=20)):
        try: out = list(read())
        except InputError as e: assert str(path) in str(e)
        else:
            assert out and all(isinstance(o, (Text,QA)) for o in out)
            for o in out: (o.id + (o.text if isinstance(o, Text) else o.context + o.question + ''.join(o.answers))).encode()

@slow_disk
@given(rows=st.lists(json_like, max_size=4))
def test_fuzz_objects(rows):
    for read in (read_texts, read_qa, lambda r: check_qa(r, extractive=False)):
        try: assert list(read(rows))
        except InputError: pass

@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 600), max_size=60), size=st.integers(1, 900), seed=st.integers(0, 9), by_tokens=st.booleans())
def test_length_batches_cover_and_fit(lengths, size, seed, by_tokens):
    batches = length_batches(lengths, **{'tokens_per_batch' if by_tokens else 'batch_size': size}, seed=seed)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for b in batches: assert len(b) == 1 or (len(b)*max(lengths[i] for i in b) if by_tokens else len(b)) <= size
