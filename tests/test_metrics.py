"The metrics against the packages that define them, the published numbers, and bad input"
import os, random, string, subprocess, sys, time, unicodedata, warnings
import numpy as np, pytest
from promptcompress.core import InputError
from promptcompress.evaluation import metrics as M

SENTENCES = """We propose a method that compresses up to 500 tokens into one; it isn't lossless, but it's 3.5x faster than Li's (2024).
Dr. Smith and J. R. Jones didn't use "GPT-4", i.e. the model of U.S. labs: they used 1,024 tokens (at $0.03 each)... Why?
The KV cache of Llama-3-8B takes 131,072 bytes per token -- 16 times an embedding's 8,192 bytes! Results on SQuAD [1] and RACE {2} agree.
On SQuAD, HotpotQA & RACE F1 falls by 5.2%, 10.1% and 14.1%, resp.; AT&T's data <skipped> can't be shared. 'Twas so, they'll say: “we cannot”.
Naïve Bayes reaches 72.89 % – the encoder’s state-of-the-art F1 – within ±0.5, cf. eq. (3), Fig. 2 and https://arxiv.org/abs/2408.03094.
The cat sat on the mat. The cat sat on the mat. The dog sat on a mat, and the end of the mat was the end.
He said: ''gimme the 'best' model*'' -- gonna cost 10-20% more, we've been told; d'ye wanna go? More'n that: lemme see!
x_i = W^T h + b, ||x||_2 <= 1; O(n log n); a/b/c #1 @home ~ `code` ``quoted'' "end".""".splitlines()
CHARS = string.ascii_letters + string.digits + string.punctuation + '  \t"\'’‘“”«»–—…éßΩ中.,.,'

def perturb(text, rng):
    "Drop, repeat, swap and change words, cut the end, damage characters"
    words = text.split(' ')
    for _ in range(rng.choice([0, 1, 2, 4, 8, 16])):
        i = rng.randrange(len(words))
        do = rng.randrange(6)
        if do == 0 and len(words) > 1: del words[i]
        elif do == 1: words.insert(i, words[i])
        elif do == 2: j = rng.randrange(len(words)); words[i], words[j] = words[j], words[i]
        elif do == 3: words[i] = rng.choice(rng.choice(SENTENCES).split())
        elif do == 4: words[i] = words[i].swapcase()
        else: k = rng.randrange(len(words[i])+1); words[i] = words[i][:k] + rng.choice(CHARS) + words[i][k:]
    if rng.random() < .3: words = words[:rng.randrange(1, len(words)+1)]
    return ' '.join(words)

def pairs(n, seed=0, empty=True):
    "Texts of one to three sentences, some of them noise, each beside a perturbed copy"
    rng = random.Random(seed)
    res = [('', ''), ('', 'a'), ('a', ''), ('a', 'a'), ('.', '.'), ('a b', 'a b c d'), ('a', 'b')] if empty else []
    while len(res) < n:
        ref = ' '.join(rng.sample(SENTENCES, rng.choice([1, 1, 2, 3]))) if rng.random() < .85 else ''.join(rng.choices(CHARS, k=rng.randrange(1, 60)))
        res.append((perturb(ref, rng), ref))
    return res

# Rouge-L

def test_rouge_l_is_rouge_score():
    rouge_scorer = pytest.importorskip('rouge_score.rouge_scorer')
    scorer = rouge_scorer.RougeScorer(['rougeL'])
    for p,r in pairs(400): assert M.rouge_l(p, r) == pytest.approx(scorer.score(r, p)['rougeL'].fmeasure, abs=1e-9), (p, r)

def test_rouge_l_paper_is_rouge_package():
    rouge = pytest.importorskip('rouge').Rouge(metrics=['rouge-l'])
    n = 0
    for p,r in pairs(400, seed=1):
        p, r = p.strip(), r.strip()
        try: want = rouge.get_scores(p, r)[0]['rouge-l']['f']
        except ValueError: want = 0. # the package refuses texts without a sentence; an empty prediction scores 0 here
        n += want > 0
        assert M.rouge_l(p, r, 'paper') == pytest.approx(want, abs=1e-9), (p, r)
    assert n > 300

@pytest.mark.parametrize('p,r,want', [
    ('the cat sat on the mat', 'the dog sat on a mat', 0.7272727223140496), ('the the the cat', 'the cat', 0.999999995),
    ('The cat. sat on. the mat.', 'the cat sat on the mat. It slept.', 0.7692307642603551), ('a b c. b a d', 'b a. c d e', 0.8888888839506174),
    (SENTENCES[5].replace('mat', 'rug'), SENTENCES[5], 0.8461538411538462), (SENTENCES[0], SENTENCES[4], 0.),
    ('a e a d', 'e a a', 0.39999999520000007)]) # the last: of two longest subsequences, the one with fewer different words
def test_rouge_l_paper_known(p, r, want):
    "Numbers of `rouge` 1.0.1, for where it is not installed"
    assert M.rouge_l(p, r, 'paper') == pytest.approx(want, abs=1e-9)

def test_lcs_is_the_textbook_table():
    rng = random.Random(2)
    for _ in range(200):
        x, y = [rng.choices('abcd', k=rng.randrange(12)) for _ in range(2)]
        t = [[0]*(len(y)+1) for _ in range(len(x)+1)]
        for i,a in enumerate(x):
            for j,b in enumerate(y): t[i+1][j+1] = t[i][j]+1 if a == b else max(t[i][j+1], t[i+1][j])
        assert M.lcs_length(x, y) == t[-1][-1] == M.lcs_length(y, x)
        assert M._lcs_words(x, y) <= set(x) & set(y) and bool(M._lcs_words(x, y)) == bool(t[-1][-1])

def test_rouge_l_is_fast():
    rng = random.Random(3)
    p, r = [' '.join(rng.choices(' '.join(SENTENCES).split(), k=200)) for _ in range(2)]
    best = min(_timed(M.rouge_l, p, r) for _ in range(20))
    assert best < 2e-3, f'{1e3*best:.2f} ms for 200 words; the table filled cell by cell takes some 10 ms'

def _timed(f, *args):
    t = time.perf_counter(); f(*args)
    return time.perf_counter() - t

# BLEU

def test_bleu_is_sacrebleu():
    sacrebleu = pytest.importorskip('sacrebleu')
    for p,r in pairs(400, seed=4) + [('a-\nb &quot;c&amp;lt;', 'ab "c< d'), ('x\ny', 'x y  '), ('a b c-\n', 'a b c-')]:
        want = sacrebleu.sentence_bleu(p, [r]).score/100
        assert M.bleu(p, r) == M.bleu(p, r, 'sacrebleu') == pytest.approx(want, abs=1e-9), (p, r)

def test_no_ngrams_in_a_short_text():
    assert M._ngram_matches(['a'], ['a']) == [(1, 1), (0, 0), (0, 0), (0, 0)] and M._ngram_matches([], ['a'])[3] == (0, 0)

def test_bleu_paper_is_nltk():
    nltk = pytest.importorskip('nltk.translate.bleu_score')
    smooth = nltk.SmoothingFunction().method1
    for p,r in pairs(400, seed=5):
        want = nltk.sentence_bleu([M.tokens_nltk(r)], M.tokens_nltk(p), smoothing_function=smooth)
        assert M.bleu(p, r, 'paper') == pytest.approx(want, abs=1e-9), (p, r)

def test_tokens_are_nltks():
    "Sentence by sentence; where sentences end is the one thing that differs from `word_tokenize`"
    word = pytest.importorskip('nltk.tokenize').NLTKWordTokenizer()
    texts = SENTENCES + [t for pair in pairs(600, seed=6) for t in pair]
    for t in texts: assert M._treebank(t) == word.tokenize(t.rstrip()), t
    rng = random.Random(7)
    marks = '\'"`.,:;!?()[]<>{}*-–“”‘’«»$%&@# \t ab s t re 1'
    for _ in range(3000):
        t = ''.join(rng.choices(marks, k=rng.randrange(1, 14)))
        assert M._treebank(t) == word.tokenize(t.rstrip()), repr(t)
    for w in "cannot gimme gonna gotta lemme wanna d'ye more'n 'tis 'twas can't CANNOT they'll THEY'LL N'T I'd".split():
        assert M._treebank(f'so {w} go') == word.tokenize(f'so {w} go'), w

def test_sentences_end_where_they_should():
    cut = lambda t: [s.strip() for s in M._sentences(t)]
    assert cut('It works. Why? "Yes!" he said. (Done.) End') == ['It works.', 'Why?', '"Yes!"', 'he said.', '(Done.)', 'End']
    assert cut('Dr. J. Smith of the U.S. and Acme Inc. paid 3.5 on Jan. 5... and left Waymo 2. Then') == [
        'Dr. J. Smith of the U.S. and Acme Inc. paid 3.5 on Jan. 5... and left Waymo 2.', 'Then']
    assert ''.join(M._sentences('  a. b.\n\nc ')) == '  a. b.\n\nc '
    assert M.tokens_nltk('') == M.tokens_nltk(' \n') == []

# answers

@pytest.mark.parametrize('p,refs,f1,em', [
    ('The Eiffel Tower!', ['eiffel tower'], 1, 1),
    ('in the Eiffel Tower', ['Eiffel Tower', 'Paris'], .8, 0),
    ('Paris, in France', ['Eiffel Tower', 'in Paris'], .8, 0),
    ('a b b', ['b b b'], .8, 0),               # the article goes; two of two, two of three
    ('state-of-the-art', ['stateoftheart'], 1, 1), # punctuation leaves no space behind
    ('U.S.', 'us', 1, 1),
    ('an apple a day', ['the apple day'], 1, 1),
    ('theory', ['ory'], 0, 0),                 # articles go only as whole words
    ('', ['x'], 0, 0), ('the', ['x'], 0, 0), ('...', ['x'], 0, 0),
    ('', [], 1, 1), ('the', [], 1, 1), ('x', [], 0, 0), ('', [''], 1, 1), ('x', [''], 0, 0),
    ('', ['', 'x'], 0, 0),                     # an empty reference does not count beside a real one
])
def test_squad_rules(p, refs, f1, em):
    assert M.squad_f1(p, refs) == pytest.approx(f1) and M.squad_em(p, refs) == em

def test_squad_is_the_official_script():
    """1,000 perturbed predictions, against torchmetrics' port of evaluate-v1.1.py; tests/interop/check_squad.py does the same with the script itself.
    (An answer of nothing but articles is judged as SQuAD 2.0 does: see test_squad_rules.)"""
    from torchmetrics.functional.text import squad
    rng = random.Random(4)
    answers = ['the Eiffel Tower', 'in 1889, at $7.5 million', 'a state-of-the-art encoder', "Li's (2024)", 'Dr. Smith and J. R. Jones', 'U.S. labs', 'the theory of the whole']
    for i in range(1000):
        refs = rng.sample(answers, rng.choice([1, 2, 3]))
        p = perturb(rng.choice(refs if rng.random() < .7 else answers), rng)
        want = squad(dict(prediction_text=p, id='q'), dict(answers=dict(text=refs, answer_start=[0]*len(refs)), id='q'))
        assert M.squad_em(p, refs) == want['exact_match'].item()/100, (p, refs)
        assert M.squad_f1(p, refs) == pytest.approx(want['f1'].item()/100, abs=1e-6), (p, refs)

@pytest.mark.parametrize('p,refs,f1,em', [
    ('Eiffel Tower', ['Eiffel Tower'], 1, 1), (' Eiffel Tower\n', 'Eiffel Tower', 1, 1),
    ('eiffel tower', ['Eiffel Tower'], 0, 0), ('Eiffel Tower.', ['Eiffel Tower'], .8, 0),
    ("isn't", ['is'], 2/3, 0),                 # is|n't
    ('a b c d', ['a x', 'a b y z'], .5, 0),     # judged by the reference of higher Rouge-L ...
    ('a b a', ['a b', 'a b a'], .8, 0),         # ... and by the first of a tie: its Rouge-L counts different words
    ('', ['x'], 0, 0), ('', [], 0, 0), ('x', [''], 0, 0), ('', [''], 0, 0),
])
def test_paper_rules(p, refs, f1, em):
    assert M.paper_f1(p, refs) == pytest.approx(f1) and M.paper_em(p, refs) == em

# all together

def test_scores_are_between_0_and_1_and_right_at_the_ends():
    for p,r in pairs(150, seed=8):
        for f in ('standard', 'paper'):
            for metric in (M.rouge_l, M.bleu):
                assert 0 <= metric(p, r, f) <= 1 + 1e-12
                assert metric('', r, f) == metric(' \n', r, f) == 0
        for metric in (M.squad_f1, M.squad_em, M.paper_f1, M.paper_em): assert 0 <= metric(p, [r]) <= 1 + 1e-12
    for t in SENTENCES:
        assert M.rouge_l(t, t) == 1 and M.bleu(t, t) == pytest.approx(1) == M.bleu(t, t, 'paper') and M.squad_em(t, t) == M.paper_em(t, t) == 1

def test_means_keep_empty_predictions():
    a = M.score_texts(['a b c d', ''], ['a b c d', 'x'], paper=True)
    assert a['n'] == 2 and a['rouge_l'] == .5 and a['bleu'] == pytest.approx(.5) and a['rouge_l_paper'] == pytest.approx(.5)
    assert a['bleu_paper'] == pytest.approx(.5)
    b = M.score_answers(['Paris', '', 'paris.'], [['Paris', 'x'], ['Rome'], 'Paris'])
    assert b == dict(f1=pytest.approx(2/3), em=pytest.approx(2/3), f1_paper=pytest.approx(1/3), em_paper=pytest.approx(1/3), n=3)
    assert set(M.score_texts(['a'], ['a'])) == {'rouge_l', 'bleu', 'n'}

@pytest.mark.parametrize('f,args,word', [
    (M.score_texts, (['a'], ['a', 'b']), '1 predictions but 2'), (M.score_answers, (['a', 'b'], [['a']]), '2 predictions but 1'),
    (M.score_texts, ([], []), 'no predictions'), (M.score_texts, ('abc', 'abc'), 'single string'), (M.score_answers, ([None], [['a']]), 'NoneType'),
    (M.score_texts, (['a'], [['a']]), 'Reference 0 is a list'), (M.rouge_l, ('a', 'a', 'x'), 'flavour'), (M.bleu, ('a', 'a', 'x'), 'flavour'),
    (M.retention, ({'a': 1}, {'b': 1}), 'same datasets'), (M.retention, ({}, {}), 'at least one'),
    (M.retention, ({'a': 1}, {'a': 0}), 'not positive'),
    (M.bootstrap_ci, ([],), 'at least one'), (M.bootstrap_ci, ([1], 0), 'n >= 1'), (M.bootstrap_ci, ([1], 9, 0, 95), 'level'),
    (M.load_metric, ('x',), 'regeneration'),
])
def test_bad_input(f, args, word):
    with pytest.raises(InputError, match=word): f(*args)

SCRIPTS = dict( # a sentence, the same with another end, an answer in it as it stands and as a careless writer has it
    russian=('Мельница стояла у реки, и колесо давно не крутилось в старом доме.', 'Мельница стояла у реки, и колесо давно не крутилось в новом доме.', 'Старая Мельница', '«старая мельница»!'),
    greek=('Ο μύλος στεκόταν δίπλα στο ποτάμι και η ρόδα δεν γύριζε πια.', 'Ο μύλος στεκόταν δίπλα στο ποτάμι και η ρόδα δεν γύριζε ποτέ.', 'Ο Παλιός Μύλος', 'ο παλιός μύλος·'),
    arabic=('كانت الطاحونة عند منعطف النهر ولم تدر عجلتها منذ أعوام طويلة.', 'كانت الطاحونة عند منعطف النهر ولم تدر عجلتها منذ أيام طويلة.', 'منعطف النهر', 'منعطف النهر؟'),
    hindi=('चक्की नदी के मोड़ पर खड़ी थी और उसका पहिया सालों से नहीं घूमा था।', 'चक्की नदी के मोड़ पर खड़ी थी और उसका पहिया दिनों से नहीं घूमा था।', 'नदी के मोड़', 'नदी के मोड़।'),
    hebrew=('הטחנה עמדה ליד הנהר והגלגל שלה לא הסתובב שנים רבות.', 'הטחנה עמדה ליד הנהר והגלגל שלה לא הסתובב ימים רבים.', 'ליד הנהר', 'ליד הנהר!'),
    korean=('방앗간은 강가에 서 있었고 바퀴는 오랫동안 돌지 않았다.', '방앗간은 강가에 서 있었고 바퀴는 며칠동안 돌지 않았다.', '강가의 방앗간', '‘강가의 방앗간’'),
    chinese=('我们明天早上坐火车去北京看望老朋友。', '我们明天早上坐火车去上海看望老朋友。', '北京大学', '“北京大学”。'),
    japanese=('川のほとりのパン屋は毎朝五時に店を開ける。', '川のほとりのパン屋は毎朝六時に店を開ける。', '川のほとり', '「川のほとり」'),
    thai=('โรงสีตั้งอยู่ที่โค้งแม่น้ำและกังหันไม่หมุนมานานแล้ว', 'โรงสีตั้งอยู่ที่โค้งแม่น้ำและกังหันไม่หมุนมาสองวันแล้ว', 'โค้งแม่น้ำ', '“โค้งแม่น้ำ”'))

@pytest.mark.parametrize('name', SCRIPTS)
def test_identical_text_in_any_script_scores_one(name):
    "A copy scores 1, a near copy nearly, another text much less, whether the script chooses the tokeniser or the caller"
    text, near, answer, careless = SCRIPTS[name]
    other = SCRIPTS['greek' if name == 'russian' else 'russian'][0]
    for flavour in (None, 'unicode'):
        for metric in (M.rouge_l, M.bleu):
            assert metric(text, text, flavour) == pytest.approx(1) and .3 < metric(near, text, flavour) < 1 and metric(other, text, flavour) < .1
        assert M.squad_em(careless, answer, flavour) == M.squad_f1(careless, [answer], flavour) == 1
        assert M.squad_em(answer, careless, flavour) == 1 and M.squad_em(other, answer, flavour) == 0 and M.squad_f1(text, answer, flavour) < 1
        s = M.score_texts([text, near], [text, text], flavour=flavour)
        assert s['rouge_l'] > .65 and s['bleu'] > .65 and M.score_answers([careless], [[answer]], flavour)['em'] == 1
    nfd = unicodedata.normalize('NFD', text)
    assert M.rouge_l(nfd, text) == M.rouge_l(text, nfd) == 1 and M.bleu(nfd, text, 'unicode') == pytest.approx(1)

def test_foreign_letters_in_english_change_nothing():
    "Numbers of the published packages stay the default for what they were made for"
    for text in SENTENCES + ['Let α be β-catenin’s share', '2016', 'naïve', 'Größe über alles', 'x']:
        for p in (text, text[5:], SENTENCES[0]):
            assert M.rouge_l(p, text) == M.rouge_l(p, text, 'standard') and M.bleu(p, text) == M.bleu(p, text, 'standard')
            assert M.squad_f1(p, text) == M.squad_f1(p, text, 'standard') and M.squad_em(p, text) == M.squad_em(p, text, 'standard')

@pytest.mark.parametrize('f,args', [(M.rouge_l, ('x', '?!')), (M.rouge_l, ('x', '☃')), (M.rouge_l, ('мир', 'мир', 'standard')), (M.bleu, ('x', ' ')),
                                    (M.squad_f1, ('x', '?!')), (M.squad_em, ('x', ['the'])), (M.score_texts, (['x'], ['...'])), (M.score_answers, (['x'], [['.']]))])
def test_a_reference_without_a_token_warns(f, args):
    with pytest.warns(UserWarning, match='holds no token'): f(*args)

def test_what_is_fine_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for text, near, answer, careless in SCRIPTS.values(): M.score_texts([near], [text], paper=True); M.score_answers([careless, 'x'], [[answer], []])

SQUAD = dict(text=['the red mill', 'mill'], answer_start=[4, 12]) # as `datasets` gives it
@pytest.mark.parametrize('refs', [SQUAD, {k: np.array(v, object) for k,v in SQUAD.items()}, tuple(SQUAD['text']), np.array(SQUAD['text'], object),
                                  [dict(text=t, answer_start=0) for t in SQUAD['text']]])
def test_squad_references_score_nothing(refs):
    "The layouts of an answer count as the answers they hold, in every function that takes references"
    assert M.score_answers(['a red mill', 'Mill!'], [refs]*2) == dict(f1=1, em=1, f1_paper=pytest.approx(1/3), em_paper=0, n=2)
    assert M.squad_f1('mill', refs) == M.squad_em('mill', refs) == M.paper_f1('mill', refs) == M.paper_em('mill', refs) == 1
    assert M.squad_em('text', refs) == M.squad_f1('answer_start', refs) == 0 # names of fields are no answers
    assert M.squad_em('', dict(text=[], answer_start=[])) == 1 # SQuAD 2's: no answer

@pytest.mark.parametrize('refs', [dict(answer=['mill']), [dict(answer_start=4)], [3], 3, None, dict(text=3), dict(text=[['mill']])])
def test_references_that_cannot_be_read(refs):
    for f in (M.squad_f1, M.squad_em, M.paper_f1, M.paper_em, lambda p, r: M.score_answers([p], [r])):
        with pytest.raises(InputError, match='text|string'): f('mill', refs)
    with pytest.raises(InputError, match='single mapping'): M.score_answers(['a', 'b'], SQUAD)

PUBLISHED = { # F1 of 500xCompressor's and ICAE's results table: ArxivQA, SQuAD, RE, HotpotQA, RACE; RACE 35.42 read as 25.42
    '500x-16': ((40.77, 50.01, 68.73, 41.68, 25.42), 72.89),
    '500x-4': ((38.30, 49.66, 63.72, 36.86, 21.49), 67.12), '500x-1': ((29.73, 42.86, 63.09, 37.47, 21.75), 62.26),
    'ICAE-16': ((38.70, 51.94, 65.94, 42.11, 23.69), 71.16),
    'ICAE-4': ((33.31, 47.48, 67.28, 40.39, 20.06), 66.01), 'ICAE-1': ((20.50, 27.20, 44.46, 22.44, 13.71), 40.90)}
@pytest.mark.parametrize('name', PUBLISHED)
def test_retention_is_the_published_one(name):
    f1, want = PUBLISHED[name]
    assert round(100*M.retention(dict(enumerate(f1)), dict(enumerate((55.90, 70.65, 71.36, 69.37, 39.52)))), 2) == want

def test_bootstrap():
    v = np.random.default_rng(0).normal(size=400)
    mean, lo, hi = M.bootstrap_ci(v, n=2000)
    assert mean == pytest.approx(v.mean()) and (hi - lo)/2 == pytest.approx(1.96*v.std()/20, rel=.1) and hi - mean == pytest.approx(mean - lo, rel=.1)
    assert M.bootstrap_ci(v, seed=1) == M.bootstrap_ci(v, seed=1) != M.bootstrap_ci(v, seed=2)
    wide = M.bootstrap_ci(v, level=.99); assert wide[1] < lo and wide[2] > hi
    assert M.bootstrap_ci([.5]) == (.5, .5, .5)

# as `evaluate` modules

def test_metrics_as_evaluate_modules(tmp_path):
    evaluate = pytest.importorskip('evaluate')
    p, r = zip(*pairs(40, seed=9, empty=False))
    m = M.load_metric('regeneration')
    assert m.keep_in_memory and isinstance(m, evaluate.Metric) and isinstance(m, M.RegenerationMetric)
    assert type(M.load_metric('regeneration')) is type(m) is M.RegenerationMetric # made once
    want = M.score_texts(p, r, paper=True); n = want.pop('n'); assert n == 40
    assert m.compute(predictions=p, references=r) == {k: want[k] for k in ('rouge_l', 'bleu')}
    for i in range(0, 40, 16): m.add_batch(predictions=p[i:i+16], references=r[i:i+16])
    assert m.compute(paper=True) == want
    qa = M.load_metric('qa', keep_in_memory=False, cache_dir=str(tmp_path))
    assert isinstance(qa, M.QAMetric)
    refs = [['Paris', 'x'], [], ['Rome']]
    for a,b in zip(['paris', '', ''], refs): qa.add(prediction=a, reference=b)
    assert qa.compute() == {k:v for k,v in M.score_answers(['paris', '', ''], refs).items() if k != 'n'}
    assert qa.compute(predictions=['Paris'], references=['Paris'])['em'] == 1 # one reference each, not in a list
    assert qa.compute(predictions=['a red mill'], references=[SQUAD])['em'] == 1
    with pytest.raises(ValueError): m.compute(predictions=['a'], references=['a', 'b'])
    with pytest.raises(AttributeError): M.NoMetric

def test_import_is_light_and_offline():
    "Importing the scores must not import `evaluate`, `datasets` or a reference package"
    code = ("import sys; from promptcompress.evaluation.metrics import *; s = score_texts(['a'], ['a'], paper=True), score_answers(['a'], ['a'])\n"
            "print([m for m in ('evaluate','datasets','nltk','sacrebleu','rouge_score','transformers') if m in sys.modules])\n"
            "m = load_metric('qa'); m.add_batch(predictions=['a'], references=[['a']]); print(m.compute()['f1'])")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | dict(HF_HUB_OFFLINE='1'))
    assert out.stdout.split('\n')[:2] == ['[]', '1.0'], out.stderr
