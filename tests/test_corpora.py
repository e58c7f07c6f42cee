"Multiple choice as lm-evaluation-harness scores it, corpora by name, and the split by date, on real files and on random ones"
import csv, gzip, json, lzma
from datetime import date
from pathlib import Path
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from promptcompress import corpora
from promptcompress.core import InputError
from promptcompress.corpora import CORPORA, Choice, hub_dataset, length_groups, load_corpus, mmlu_description, read_choice, split_by_date
from promptcompress.data import QA, Text, file_lines, read_qa, read_texts

DATA = Path(__file__).resolve().parents[2]/'shared'/'data'
HISTORY = 'mmlu_high_school_european_history'
FILES = dict(hellaswag='hellaswag_half.jsonl.xz', piqa='piqa_valid_half.jsonl.xz', openbookqa='openbookqa_test_half.jsonl.xz',
             **{HISTORY: f'{HISTORY}_half.csv'})

def real(name):
    "A real file, or skip"
    if not (DATA/name).exists(): pytest.skip(f'{name} is not at hand')
    return DATA/name

def hub_rows(name):
    "The real items in the Hub's columns"
    path = real(f'choice/{FILES[name]}')
    if name == HISTORY:
        with open(path, newline='') as f:
            return [dict(question=r['question'], subject=name[5:], choices=[r[f'choice{i}'] for i in range(4)], answer=int(r['answer']))
                    for r in csv.DictReader(f)]
    rows = [json.loads(l) for _,l in file_lines(path)]
    if name == 'openbookqa':
        rows = [dict(question_stem=r['question'].rstrip(), answerKey=r['answer'][0],
                     choices=dict(text=[o[3:] for o in r['options'].split('\n')], label=list('ABCD'))) for r in rows]
    return rows

def parts(items): return [(c.prompt, c.choices, c.label) for c in items]

# --- multiple choice ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name,n,labels', [('hellaswag', 497, [141,122,126,108]), ('piqa', 882, [442,440]), ('openbookqa', 261, [67,69,77,48]),
                                           (HISTORY, 83, [21,19,23,20])])
def test_real_counts(name, n, labels):
    items = list(read_choice(real(f'choice/{FILES[name]}')))
    assert len(items) == n == len({c.id for c in items}) and [sum(c.label==i for c in items) for i in range(len(labels))] == labels
    assert all(len(c.choices) == len(labels) and c.prompt == c.prompt.rstrip() for c in items)

def test_real_items():
    first = {k: next(read_choice(real(f'choice/{f}'))) for k,f in FILES.items()}
    assert first['piqa'] == Choice('piqa_valid_half.jsonl.xz:0', 'Question: To fight Ivan Drago in Rocky for sega master system.\nAnswer:',
        ("Drago isn't in this game because it was released before Rocky IV.", 'You have to defeat Apollo Creed and Clubber Lang first.'), 1)
    assert first['openbookqa'].prompt.endswith('extend past the sidewalk, which means')
    assert first['openbookqa'].choices[2] == 'parts may break the concrete'
    assert first['hellaswag'].prompt.startswith('Playing violin: A woman in a dress') and first['hellaswag'].prompt.endswith('look on. The woman')
    assert first['hellaswag'].id == 'activitynet~v_UFfi0gxL6_Y:2533' and first['hellaswag'].label == 2
    assert first[HISTORY].choices == ('A','B','C','D')
    assert first[HISTORY].prompt.endswith('\nC. merely a property of a certain kind of matter\nD. a supernatural phenomenon\nAnswer:')

@pytest.mark.parametrize('name', FILES)
def test_same_strings_as_the_harness(name, tmp_path):
    "What is scored equals, to the character, what lm-evaluation-harness's own task file makes of the same items"
    pytest.importorskip('lm_eval')
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml
    rows = hub_rows(name)[:120]
    (tmp_path/'test.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    folder = Path(lm_eval.__file__).parent/'tasks'
    config = load_yaml(folder/('mmlu/default' if name==HISTORY else name)/f'{name}.yaml')
    for k in list(config):
        if k.endswith('_split') or k in ('dataset_name','fewshot_config'): del config[k]
    local = dict(data_files=dict(test=str(tmp_path/'test.jsonl')), cache_dir=str(tmp_path))
    config |= dict(dataset_path='json', dataset_kwargs=local, test_split='test')
    task = ConfigurableTask(config=config)
    task.build_all_requests(rank=0, world_size=1)
    theirs = {}
    for i in task.instances: theirs.setdefault(i.doc_id, []).append(i.arguments)
    ours = list(load_corpus(name, tmp_path/'test.jsonl'))
    assert len(ours) == len(theirs) == min(len(rows), 120)
    for i,c in enumerate(ours): assert [(c.prompt, f' {o}') for o in c.choices] == theirs[i]
    gold = [task.doc_to_target(d) for d in task.test_docs()]
    assert [c.label for c in ours] == [int(g) for g in gold]

@pytest.mark.parametrize('name', FILES)
def test_hub_columns_and_files_agree(name, tmp_path):
    "A `datasets` object with the Hub's columns gives what the file on disk gives"
    from datasets import Dataset
    rows, ours = hub_rows(name), parts(read_choice(real(f'choice/{FILES[name]}')))
    for ds in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()): assert parts(read_choice(ds)) == ours

def test_layouts_of_the_authors(tmp_path):
    "OpenBookQA is nested, PIQA keeps its labels in another file, MMLU's table has no header"
    rows = hub_rows('openbookqa')
    nested = [dict(id=str(i), answerKey=r['answerKey'], question=dict(stem=r['question_stem'], choices=[
        dict(text=t, label=l) for t,l in zip(*r['choices'].values())])) for i,r in enumerate(rows)]
    assert parts(read_choice(nested)) == parts(read_choice(real(f"choice/{FILES['openbookqa']}")))
    rows = hub_rows('piqa')
    (tmp_path/'valid.jsonl').write_text('\n'.join(json.dumps({k: r[k] for k in ('goal','sol1','sol2')}) for r in rows))
    (tmp_path/'valid-labels.lst').write_text('\n'.join(str(r['label']) for r in rows))
    assert parts(load_corpus('piqa', tmp_path/'valid.jsonl')) == parts(read_choice(real(f"choice/{FILES['piqa']}")))
    (tmp_path/'valid-labels.lst').write_text('0\n1\n')
    with pytest.raises(InputError, match='has 2 labels, but .* has 882 items'): list(load_corpus('piqa', tmp_path/'valid.jsonl'))
    rows = hub_rows(HISTORY)
    with open(tmp_path/'test.csv', 'w', newline='') as f: csv.writer(f).writerows([r['question'], *r['choices'], 'ABCD'[r['answer']]] for r in rows)
    assert parts(read_choice(tmp_path/'test.csv')) == parts(read_choice(real(f'choice/{FILES[HISTORY]}')))
    assert next(load_corpus(HISTORY, tmp_path/'test.csv')).prompt.startswith(mmlu_description('high_school_european_history'))

BAD = {
    'label 4 is out of range': dict(prompt='p', choices=['a','b'], label=4),
    'label -1 is out of range': dict(prompt='p', choices=['a','b'], label=-1),
    "label 'C' is out of range": dict(prompt='p', choices=['a','b'], label='C'),
    'two different choices': dict(prompt='p', choices=['a','a'], label=0),
    'strings that are not blank': dict(prompt='p', choices=['a',' '], label=0), 'prompt must be': dict(prompt=' ', choices=['a','b'], label=0),
    'not public': dict(ctx_a='a', ctx_b='b', activity_label='c', endings=['d','e'], label=''),
    "label 'E'": dict(question_stem='q', choices=dict(text=['a','b'], label=['A','B']), answerKey='E'),
    "the fields \\['goal', 'sol1', 'sol2'\\]": dict(goal='g', sol1='a', sol2='b')}

@pytest.mark.parametrize('said', BAD)
def test_bad_items_are_named(said, tmp_path):
    "An item that can't be scored right would count as the model's mistake"
    f = tmp_path/'a.jsonl'; f.write_text(json.dumps(dict(prompt='Ice is', choices=['cold','hot'], label=0)) + '\n' + json.dumps(BAD[said]))
    with pytest.raises(InputError, match=said) as e: list(read_choice(f))
    assert f'{f}, line 2' in str(e.value)

def test_ids_must_differ_and_files_hold_something(tmp_path):
    row = dict(id='x', prompt='Ice is', choices=['cold','hot'], label=0)
    f, g, empty = tmp_path/'a.jsonl', tmp_path/'b.jsonl', tmp_path/'c.csv'
    f.write_text(json.dumps(row)); g.write_text(json.dumps(dict(row, prompt='Fire is', label=1)))
    empty.write_text('question,choice0,choice1,choice2,choice3,answer\n')
    with pytest.raises(InputError, match=f"b.jsonl, line 1: the id 'x' is already that of {f}, line 1"): list(read_choice([f, g]))
    for source in (empty, [], [f, empty]):
        with pytest.raises(InputError, match='holds no multiple-choice item'): list(read_choice(source))
    empty.write_text(empty.read_text() + 'a,b\n')
    with pytest.raises(InputError, match='line 2: 2 columns, expected 6'): list(read_choice(empty))

def test_same_file_name_in_two_folders(tmp_path):
    "Items without an id are numbered: two folders with a test.jsonl each must not clash"
    for k in 'ab':
        (tmp_path/k).mkdir()
        (tmp_path/k/'test.jsonl').write_text(json.dumps(dict(prompt=f'{k} is', choices=['x','y'], label=0)))
        (tmp_path/k/'qa.jsonl').write_text(json.dumps(dict(context='Ice is cold.', question=f'{k}?', answer='Ice')))
    for read,name in ((read_choice, 'test.jsonl'), (read_qa, 'qa.jsonl')):
        assert len({c.id for c in read([tmp_path/'a'/name, tmp_path/'b'/name])}) == 2

# --- corpora by name ------------------------------------------------------------------------------------------------

OFFLINE = dict(arxiv='text/arxiv_2025.jsonl.xz', c4='text/c4_slice.jsonl.xz', wikitext2='text/wikitext2_valid.jsonl.xz',
               squad='qa/squad_v1.1_dev_half.json',
               hotpotqa='qa/hotpotqa_half.jsonl.xz', relation_extraction='qa/RelationExtraction.dev.half.jsonl.gz', race='qa/race_half.jsonl.xz',
               **{k: f'choice/{v}' for k,v in FILES.items()})

@pytest.mark.parametrize('name', CORPORA)
def test_every_corpus_reads_its_real_file(name):
    if name == 'ptb': pytest.skip("PTB's licence forbids having it here")
    items = list(load_corpus(name, real(OFFLINE[name]), limit=50))
    assert 0 < len(items) <= 50 and {type(o) for o in items} == {dict(text=Text, qa=QA, choice=Choice)[CORPORA[name].kind]}

def fake_hub(monkeypatch, rows):
    "Instead of asking the Hub, give `rows`; what was asked for is noted"
    import datasets
    asked = []
    def load_dataset(name, config=None, split=None, streaming=None, **kw):
        asked.append((name, config, split, streaming, kw))
        ds = datasets.Dataset.from_list(rows)
        return ds.to_iterable_dataset() if streaming else ds
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    return asked

HUB = dict(
    arxiv=([dict(id='0704.0001', abstract='We\nprune.', title='T', update_date='2008-11-26',
                 versions=[dict(version='v1', created='Mon, 2 Apr 2007 19:18:42 GMT')])],
           [Text('0704.0001', 'We prune.', '2007-04-02', 'T')]),
    c4=([dict(text='Ice is cold.', timestamp='2019-04-25', url='u')], [Text('0', 'Ice is cold.')]),
    wikitext2=([dict(text=''), dict(text=' = Ice = \n'), dict(text='')], [Text('item', ''), Text('item', ' = Ice = \n'), Text('item', '')]),
    ptb=([dict(sentence='no it was n\'t black monday')], [Text('0', "no it was n't black monday")]),
    squad=([dict(id='a', title='t', context='The sky is blue.', question='What is blue?', answers=dict(text=['The sky'], answer_start=[0]))],
           [QA('a', 'The sky is blue.', 'What is blue?', ('The sky',))]),
    hotpotqa=([dict(id='h', question='Q?', answer='yes', type='t', level='l', supporting_facts=dict(title=['B'], sent_id=[0]),
                    context=dict(title=['A','B'], sentences=[['One.'], ['Two.',' Three.']]))],
              [QA('h', 'B\nTwo. Three.', 'Q?', ('yes',), extractive=False)]),
    relation_extraction=([dict(subset=s, context=f'{s} is here.', qid=s, question='What is here?', answers=[s],
                               context_tokens=dict(tokens=['x'], offsets=[0])) for s in ('RACE','RelationExtraction')],
                         [QA('RelationExtraction', 'RelationExtraction is here.', 'What is here?', ('RelationExtraction',))]),
    race=([dict(example_id='high1.txt', article='Ice is cold.', answer='B', question='What is  _  ?', options=['Fire','Ice'])],
          [QA('high1.txt:0', 'Ice is cold.', 'What is  _  ?', ('Ice',), extractive=False)]),
    openbookqa=([dict(id='7-980', question_stem='Ice is', choices=dict(text=['cold','hot'], label=['A','B']), answerKey='A')],
                [Choice('7-980', 'Ice is', ('cold','hot'), 0)]),
    hellaswag=([dict(ind=3, activity_label='Baking', ctx_a='It is hot.', ctx_b='the cook', ctx='c', endings=['waits.','leaves.'], source_id='w~1',
                     split='val', split_type='indomain', label='1')],
               [Choice('w~1:3', 'Baking: It is hot. The cook', ('waits.','leaves.'), 1)]),
    piqa=([dict(goal='To cool tea,', sol1='add ice.', sol2='add fire.', label=0)],
          [Choice('0', 'Question: To cool tea,\nAnswer:', ('add ice.','add fire.'), 0)]),
    mmlu_high_school_european_history=([dict(question='Which?', subject='s', choices=list('wxyz'), answer=3)],
        [Choice('0', mmlu_description('high school european history') + 'Which?\nA. w\nB. x\nC. y\nD. z\nAnswer:', tuple('ABCD'), 3)]))

@pytest.mark.parametrize('name', CORPORA)
def test_rows_as_the_hub_has_them(name, monkeypatch):
    "Each corpus's columns on the Hub become the right record, streamed or not, and the right split is asked for"
    rows, want = HUB[name]
    asked = fake_hub(monkeypatch, rows)
    for streaming in (True, False):
        got = list(load_corpus(name, streaming=streaming))
        if name in ('c4','wikitext2','ptb'): got, want = ([(t.text, t.date, t.title) for t in l] for l in (got, HUB[name][1]))
        assert got == want
    c = CORPORA[name]
    assert [a[:4] for a in asked] == [(c.hub, c.config, c.split, s) for s in (True, False)]
    list(load_corpus(name, split='train')); assert asked[-1][2] == 'train'

def test_hub_through_real_datasets(tmp_path):
    "The package itself, on local files"
    (tmp_path/'a.jsonl').write_text('\n'.join(json.dumps(dict(id=i, prompt=f'{i} is', choices=['odd','even'], label=1 - i%2)) for i in range(5)))
    for streaming in (True, False):
        ds = hub_dataset('json', data_files=str(tmp_path/'a.jsonl'), streaming=streaming, **({} if streaming else dict(cache_dir=str(tmp_path))))
        assert [c.label for c in read_choice(ds)] == [1,0,1,0,1]

def test_no_network_says_what_to_do(monkeypatch):
    import datasets
    def fail(*a, **kw): raise ConnectionError("Couldn't reach the Hub\nand more")
    monkeypatch.setattr(datasets, 'load_dataset', fail)
    with pytest.raises(InputError, match=r"rajpurkar/squad.*Couldn't reach the Hub. Check .* give its `path`: dev-v1.1.json"): load_corpus('SQuAD')
    with pytest.raises(InputError, match="no corpus 'squid': choose one of arxiv"): load_corpus('squid')

def test_race_folder_of_the_authors(tmp_path):
    "RACE/test/high/*.txt: one JSON object per article"
    raw, articles = [json.loads(l) for _,l in file_lines(real('qa/race_half.jsonl.xz'))][:30], {}
    for r in raw: articles.setdefault(r['example_id'], []).append(r)
    for name,rs in articles.items():
        level = 'middle' if name.startswith('middle') else 'high'
        (tmp_path/level).mkdir(exist_ok=True)
        (tmp_path/level/name).write_text(json.dumps(dict(id=name, article=rs[0]['article'], questions=[r['question'] for r in rs],
                                                         options=[r['options'] for r in rs], answers=[r['answer'] for r in rs])))
    def by_question(qas): return sorted((q.context, q.question, q.answers) for q in qas)
    got = list(load_corpus('race', tmp_path))
    assert by_question(got) == by_question(read_qa(raw)) and len({q.id for q in got}) == 30

def test_mrqa_layout_of_each_qa_corpus(tmp_path):
    "What stands in MRQA's format reads under the same names"
    for name in ('squad','hotpotqa','relation_extraction','race'):
        rows = [dict(header=dict(dataset=name)), dict(context='Ice is cold.', qas=[dict(qid='q', question='What is cold?', answers=['Ice'])])]
        with gzip.open(tmp_path/f'{name}.jsonl.gz', 'wt') as f: f.write('\n'.join(map(json.dumps, rows)))
        assert list(load_corpus(name, tmp_path/f'{name}.jsonl.gz')) == [QA('q', 'Ice is cold.', 'What is cold?', ('Ice',))]

def test_blank_rows_of_wikitext_count():
    "WikiText-2's published preprocessing joins all rows, the blank ones too"
    from promptcompress.evaluation.perplexity import running_text
    path = real('text/wikitext2_valid.jsonl.xz')
    assert running_text(load_corpus('wikitext2', path), 'wikitext2') == running_text(path, 'wikitext2')

def test_streaming_reads_only_what_is_taken(tmp_path):
    f = tmp_path/'a.jsonl'; f.write_text(json.dumps(dict(prompt='Ice is', choices=['cold','hot'], label=0)) + '\nbroken\n')
    assert len(list(read_choice(f, limit=1))) == 1
    with pytest.raises(InputError, match='line 2'): list(read_choice(f))

# --- dates and lengths ----------------------------------------------------------------------------------------------

def test_split_of_the_real_abstracts():
    old, new = (list(read_texts(real(f'text/{n}.jsonl.xz'), limit=400)) for n in ('arxiv_2017_2019','arxiv_2025'))
    mixed = [t for pair in zip(old, new) for t in pair]
    r = split_by_date(mixed, '2018', '2025-03', '2025')
    assert len(r['test']) == 400 and r['train'] and max(t.date for t in r['train']) < '2018' and len(r['train']) + r['between'] == 400
    with pytest.raises(InputError, match='no text is left to test on'): split_by_date(mixed) # the paper's months are not among these

@settings(max_examples=60, deadline=None)
@given(days=st.lists(st.tuples(st.dates(date(2022,1,1), date(2025,12,31)), st.sampled_from([4,7,10])), max_size=30))
def test_split_never_overlaps(days):
    "Whatever the precision of a date, the last day a training text may be of is before the first day a test text may be of"
    dates = [d.isoformat()[:precision] for d,precision in days] + ['2023', '2022', '2024-02', '2024', '2023-06', '2024-01']
    r = split_by_date([Text(str(i), 'x', d) for i,d in enumerate(dates)])
    assert len(r['train']) + len(r['test']) + r['between'] == len(dates)
    def days_of(side, fill): return [t.date + fill[len(t.date)-4:] for t in r[side]]
    assert max(days_of('train', '-12-31')) < '2023-07-01' and min(days_of('test', '-01-01')) >= '2024-01-01'
    assert max(days_of('test', '-12-31')) <= '2024-04-31' and {'2022','2023-06'} <= {t.date for t in r['train']}

def test_length_groups_of_real_text():
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(real('models/stories260K'))
    texts = list(read_texts(real('text/tinystories_slice.jsonl.xz'), limit=60))
    groups = length_groups(texts, tok, n=20)
    assert list(groups) == [96,192,288,384,480] and all(len(g) <= 20 for g in groups.values()) and len(groups[96]) == 20
    whole = {t.id: t.text for t in texts}
    for l,g in groups.items():
        for t in g: assert len(tok(t.text, add_special_tokens=False)['input_ids']) == l and whole[t.id].startswith(t.text)
    with pytest.raises(InputError, match='texts has 100000 tokens'): length_groups(texts, tok, (96,100000))

# --- anything at all ------------------------------------------------------------------------------------------------

FIELDS = ('id ind prompt choices label goal sol1 sol2 question_stem answerKey question stem text options answer ctx_a ctx_b activity_label endings '
          'choice0 choice1 choice2 choice3').split()
json_like = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(['A','B','0','1']),
    lambda s: st.lists(s, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), s, max_size=7), max_leaves=12)
layouts = st.one_of(*(st.fixed_dictionaries({f: json_like for f in sorted(fields)}) for sets,_ in corpora.KINDS.values() for fields in sets))
payload = (st.binary(max_size=200) | st.lists(layouts | json_like, max_size=4).map(lambda l: '\n'.join(map(json.dumps, l)).encode()) |
           st.lists(st.lists(st.text(max_size=4) | st.sampled_from('A1'), min_size=5, max_size=6), max_size=4)
             .map(lambda t: '\n'.join(','.join(r) for r in t).encode('utf-8', 'replace')))

@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=payload, wrap=st.sampled_from([bytes, gzip.compress, lzma.compress, lambda b: gzip.compress(b)[:-3]]),
       name=st.sampled_from(['a.jsonl','a.csv','a','a.csv.xz']))
def test_fuzz_files(tmp_path, data, wrap, name):
    "Whatever a file holds, it is read or refused in words"
    path = tmp_path/name; path.write_bytes(wrap(data))
    try: out = list(read_choice(path))
    except InputError as e: assert str(path) in str(e)
    else:
        assert out and all(isinstance(c, Choice) and 0 <= c.label < len(c.choices) for c in out)
        for c in out: (c.id + c.prompt + ''.join(c.choices)).encode()

@settings(max_examples=120, deadline=None)
@given(rows=st.lists(layouts | json_like, max_size=3), kind=st.sampled_from([None, *corpora.KINDS]))
def test_fuzz_objects(rows, kind):
    try: assert list(read_choice(rows, kind))
    except InputError: pass
