"Faults that were put into data and evaluation one at a time, and that the other tests let through"
import math
from statistics import NormalDist
import numpy as np, pytest, torch
from promptcompress.conversation import conversation
from promptcompress.core import InputError
from promptcompress.corpora import Choice, length_groups, split_by_date
from promptcompress.data import QA, Text, cut
from promptcompress.evaluation.items import check_sets, drop_leaking, select_qa, text_set
from promptcompress.evaluation.perplexity import Perplexity, perplexity
from promptcompress.evaluation.zeroshot import choice_result
from promptcompress.kv.makers import make_maker
from promptcompress.kv.prefix import read
from promptcompress.leakage import check_leakage, leakage
from promptcompress.lm import tiny_lm

lm = tiny_lm('llama')
story = 'The mill stood at the bend of the river, and its wheel had not turned for eleven years.'
other = 'Zq9#x! vv7 kk -- 0x1f; qqq.'

# --- the interval of a perplexity ---

@pytest.mark.parametrize('level', ['token', 'word'])
@pytest.mark.parametrize('window', [None, 16])
def test_the_interval_of_a_perplexity_is_over_documents(level, window):
    "Documents that are all alike say nothing about how documents differ, however much their tokens and windows do"
    p = perplexity(lm, [story]*6, window=window, level=level)
    assert len(p.sums) == 6 and p.unit == 'document'
    assert p.ci[1] - p.ci[0] < 1e-4*p.ppl
    docs = [story, other, story[:40], other*2, story*2]
    p, alone = perplexity(lm, docs, window=window, level=level), [perplexity(lm, [d], window=window, level=level) for d in docs]
    assert p.sums[:,0] == pytest.approx([a.nll for a in alone], rel=1e-4) and (p.sums[:,1:] == [[a.tokens, a.words, a.bytes] for a in alone]).all()
    l, n = p.sums[:,0], p.sums[:,1 + (level == 'word')]
    e = l - n*l.sum()/n.sum()
    se = NormalDist().inv_cdf(.975)*e.std(ddof=1)/math.sqrt(5)/n.mean()
    assert p.ci == pytest.approx([p.ppl*math.exp(-se), p.ppl*math.exp(se)]) and p.ci[1] > 1.01*p.ci[0]

def test_an_interval_widens_as_documents_get_fewer():
    "Each of 40 documents cut in four is 160 documents: with the same tokens the interval must not stay as it was"
    rng = np.random.default_rng(0)
    nats = rng.normal(3, 1, 40)[:,None]*np.ones(4)*25 # a document's parts are alike
    parts = np.stack([nats.ravel(), np.full(160, 25.), np.full(160, 20.), np.full(160, 100.)], 1)
    whole = parts.reshape(40, 4, 4).sum(1)
    a, b = Perplexity(parts), Perplexity(whole)
    assert a.ppl == pytest.approx(b.ppl) and 1.9 < math.log(b.ci[1]/b.ppl)/math.log(a.ci[1]/a.ppl) < 2.1

# --- what is cut off is the end ---

@pytest.mark.parametrize('k', [1, 5, 16, 500])
def test_truncated_keeps_the_beginning(k):
    ids = lm.encode(story)
    p, = make_maker('truncated', k)(lm, [story])
    want, = read(lm, [lm.start_ids + ids[:k]])
    assert len(p) == len(want) == len(lm.start_ids) + min(k, len(ids)) and torch.equal(p.keys, want.keys) and torch.equal(p.values, want.values)
    same, = make_maker('truncated', k)(lm, [story[:k] + 'something else'*9]) # one token is one byte here
    assert k == 500 or torch.equal(p.keys, same.keys)
    assert lm.encode(story, limit=k) == ids[:k] and cut(story, lm.tokenizer, k) == (story[:k], ids[:k])

def test_truncated_keeps_the_beginning_in_a_conversation():
    chat = tiny_lm('llama')
    chat.tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    talk = conversation(chat)
    a, b, c = (make_maker('truncated', 20)(chat, [t], talk)[0] for t in (story, story[:20] + 'x'*50, 'x'*50 + story[-20:]))
    assert torch.equal(a.keys, b.keys) and not torch.equal(a.keys, c.keys)

def test_the_same_bytes_are_the_first_bytes():
    room = 4*lm.n_layers*lm.kv_heads*lm.head_dim
    long = story*(room//len(story) + 2)
    assert make_maker('bytes', 1).row(lm, long) == lm.start_ids + lm.encode(long[:room])

def test_length_groups_and_contexts_keep_the_beginning():
    assert [t.text for t in length_groups([Text('a', story)], lm.tokenizer, (10, 20))[20]] == [story[:20]]
    asked = [QA('first', story, 'What stood there?', ('mill',)), QA('last', story, 'How long?', ('eleven years',))]
    found, lost = select_qa(asked, lm, 30)
    assert [(q.id, q.context) for q in found] == [('first', story[:30])] and lost['answer_cut_off'] == 1

# --- what a score is divided by ---

def test_zero_shot_scores_count_characters_and_bytes_and_not_words():
    "Four choices, of which nothing, characters, bytes and words each prefer another"
    choices, nats = ('a b c d e f', 'abcdefghijklmnopqrst', 'δ'*14, 'no'), (-12., -18., -15.4, -4.)
    best = {f.__name__: int(np.argmax([l/f(c) for l,c in zip(nats, choices)])) for f in (len, lambda c: len(c.split()))}
    assert best == {'len': 1, '<lambda>': 0}, 'the example tells words and characters apart'
    row = choice_result(Choice('q', 'Which?', choices, 2), [(l, False) for l in nats])
    assert row['predictions'] == dict(acc=3, acc_norm=1, acc_bytes=2) and (row['acc'], row['acc_norm'], row['acc_bytes']) == (0, 0, 1)
    assert row['loglikelihoods'] == list(nats)
    for label in range(4): # whatever is right, each score says so for its own choice alone
        row = choice_result(Choice('q', 'Which?', choices, label), [(l, False) for l in nats])
        assert [row[k] for k in ('acc','acc_norm','acc_bytes')] == [float(label == i) for i in (3, 1, 2)]

# --- what is not later ---

def dated(*days): return [Text(f'{i}-{d}', f'Text {i} of {d} speaks of nothing else.', d) for i,d in enumerate(days)]
SAME = [('2024-06-30', '2024-06-30'), ('2024-06-30T08:00:00', '2024-06-30T23:59:00'), ('2024-06', '2024-06-30'), ('2024', '2024-12-31'), ('2024', '2024'), ('2024-06-01', '2024-06'),
        ('Sun, 30 Jun 2024 08:00:00 GMT', '2024-06-30'), ('2024-07-01', '2024-06-30'), ('2024-06-30', '2024')]
LATER = [('2024-06-30', '2024-07-01'), ('2024-06', '2024-07'), ('2023', '2024-01-01'), ('2023', '2024'), ('2024-06-30T23:59:00', '2024-07-01T00:00:00')]

@pytest.mark.parametrize('old,new', SAME)
def test_a_text_of_the_same_day_leaks(old, new):
    "Not later means: the earliest day that a test text may be of is the last one of a training text, or before it"
    train, test = dated('2001-01-01', old), [Text('t', 'Quite another thing.', new)]
    for some in (test, [*dated('2030'), *test], [*test, *dated('2030')]): assert leakage(train, some)['train_not_older'] == [train[1].id] # the earliest counts
    with pytest.raises(InputError, match='not older than the earliest test text'): check_leakage(train, test)
    left, report = drop_leaking(train, [*test, *dated('2030')])
    assert [t.date for t in left] == ['2030'] and report['dropped_not_later'] == 1
    with pytest.raises(InputError, match='1 items leak|1 more are not later'): drop_leaking(train, test)
    sets = check_sets(train, [text_set([Text('t', story, new), Text('u', story[1:], '2030')], lm, 20, name='x')])
    assert [t.id for t in sets[0].items] == ['u']

@pytest.mark.parametrize('old,new', LATER)
def test_a_text_of_the_day_after_does_not_leak(old, new):
    train, test = dated('2001-01-01', old), [Text('t', 'Quite another thing.', new)]
    assert check_leakage(train, test)['train_not_older'] == [] and len(drop_leaking(train, test)[0]) == 1

def test_a_split_by_date_keeps_days_apart():
    days = ['2023-06-30', '2023-07-01', '2023-07', '2023', '2023-12-31', '2024-01-01', '2024-04-30', '2024-05-01', '2024', '2024-04']
    parts = split_by_date(dated(*days))
    assert [t.date for t in parts['train']] == ['2023-06-30'] and [t.date for t in parts['test']] == ['2024-01-01', '2024-04-30', '2024-04'] and parts['between'] == 6

@pytest.mark.parametrize('shared,leaks', [(12, False), (13, True), (20, True)])
def test_thirteen_words_in_a_row_are_shared(shared, leaks):
    words = [f'word{i}' for i in range(40)]
    train = [Text('a', 'before ' + ' '.join(words[:shared]) + ' behind', '2020')]
    test = [Text('b', 'Another start: ' + ', '.join(words[:shared]).upper() + ' and another end, which is long enough to be of thirteen words', '2021')]
    assert bool(leakage(train, test)['shared_ngrams']) == leaks
