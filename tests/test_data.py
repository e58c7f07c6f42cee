"Every loader on real files (where they are at hand), and on random bytes"
import gzip, json, lzma
from pathlib import Path
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from promptcompress.core import InputError
from promptcompress.data import QA, Text, check_leakage, cut, file_lines, leakage, length_batches, load_texts_from_hub, read_qa, read_texts

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

@pytest.mark.parametrize('name', ['hotpotqa_half', 'race_half'])
def test_other_qa_layouts_are_refused_by_field(name):
    with pytest.raises(InputError, match="line 1: no field 'context'; its fields are"): list(read_qa(real(f'qa/{name}.jsonl.xz')))

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

def test_reading_streams(tmp_path):
    "Taking two of a million reads two: the broken third line is never seen"
    f = tmp_path/'a.jsonl'; f.write_text('{"text": "one"}\n{"text": "two"}\nbroken\n')
    assert [t.text for t in read_texts(f, limit=2)] == ['one','two']
    with pytest.raises(InputError, match='line 3'): list(read_texts(f))

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
FIELDS = 'id text abstract data paragraphs qas context question answer answers date versions header title'.split()
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
    for read in (read_texts, read_qa):
        try: assert list(read(rows))
        except InputError: pass

@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 600), max_size=60), size=st.integers(1, 900), seed=st.integers(0, 9), by_tokens=st.booleans())
def test_length_batches_cover_and_fit(lengths, size, seed, by_tokens):
    batches = length_batches(lengths, **{'tokens_per_batch' if by_tokens else 'batch_size': size}, seed=seed)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for b in batches: assert len(b) == 1 or (len(b)*max(lengths[i] for i in b) if by_tokens else len(b)) <= size
