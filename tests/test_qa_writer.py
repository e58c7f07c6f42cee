"Question-answer pairs: what the judge lets pass, what is read out of any reply, servers that misbehave, runs that are killed"
import json, os, random, re, signal, threading, time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from transformers import AutoTokenizer
from promptcompress.chat import EndpointChat, LocalChat
from promptcompress.core import InputError, StateError
from promptcompress.data import QA, Text, cut, read_qa, read_texts
from promptcompress.lm import pocket_folder, tiny_lm
from promptcompress.qa_chat import _judge, chat_questions, pairs_in, qa_report, question_messages, write_qa
from promptcompress.qa_writer import REASONS, answer_place, cloze_qa, validate

shared = Path(__file__).resolve().parents[2]/'shared'/'data'
tok = AutoTokenizer.from_pretrained(pocket_folder())
WORDS = 'basalt glacier tundra meadow estuary lagoon volcano prairie savanna plateau canyon delta'.split()

def a_text(i, n=60):
    "A text of its own words and numbers, long enough for 96 tokens"
    rng = random.Random(i)
    return Text(f't{i}', ' '.join(f'{rng.choice(WORDS)}{rng.choice("abcdefgh")} {rng.randrange(100, 10**6)}' for _ in range(n)) + '.',
                f'2025-01-{i+1:02}')

def numbers_of(text): return re.findall(r'\d+', text)

def good_pairs(messages):
    "What a good model says: depends on nothing but the text it is asked about"
    return json.dumps(dict(pairs=[dict(question=f'Which number is number {"abcde"[i]} in this text?', answer=a)
                                  for i,a in enumerate(dict.fromkeys(numbers_of(messages[1]['content'].split('Text:\n')[1])[:5]))]))

# the judge

unit = st.one_of(st.text('abcde', min_size=2, max_size=6), st.integers(10, 99999).map(str), st.decimals(0, 999, places=2).map(str),
                 st.integers(1000, 10**7).map('{:,}'.format))
@settings(max_examples=300, deadline=None)
@given(st.lists(unit, min_size=1, max_size=8), st.data())
def test_an_answer_is_made_of_whole_words_and_numbers(units, data):
    text = ' '.join(units)
    a, b = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    answer = text[a:b].strip()
    if not answer: return
    edges, at = {0}, 0
    for u in units: edges |= {at, at + len(u)}; at += len(u) + 1
    found = [m.start() for m in re.finditer(f'(?={re.escape(answer)})', text)]
    whole = [s for s in found if {s, s + len(answer)} <= edges]
    where, why = answer_place(text, answer)
    assert where == (whole[0] if whole else None) and (why is None) == bool(whole)
    if not whole: # the reason is true of an occurrence
        cut_units = {u for s in found for e in (s, s + len(answer)) if e not in edges for u in [max((x for x in edges if x < e))]}
        kinds = {'inside_number' if text[u].isdigit() else 'inside_word' for u in cut_units}
        assert why in kinds
    assert validate(QA('0', text, 'What is it that stands here?', (answer,))) in {why} if why else True

@pytest.mark.parametrize('context,answer,why', [
    ('over 2,048 tokens', '048', 'inside_number'), ('a loss of -3.2', '3.2', 'inside_number'), ('from 1990-1995 on', '1995', None),
    ('(12.5)', '12.5', None),
    ('of 3.5e-4 m', '3.5', 'inside_number'), ('in 47.81s per item', '47.81', 'inside_word'), ('with Qwen2.5-7B', 'Qwen2', 'inside_number'),
    ('$x=-3$', '3', 'inside_number'),
    ('over COVID-19 now', '19', 'inside_word'), ('a 40-fold rise', '40', None), ("Maxwell's laws", 'Maxwell', None),
    ('state-of-the-art', 'art', None),
    ('snake_case', 'snake', 'inside_word'), ('cafe\u0301s open', 'cafe', 'inside_word'), ('हिन्दी में', 'हिन', 'inside_word'),
    ('有十六个词', '十六', None), ('ends in 2016', '16', 'inside_number'),
    ('2016 and 16', '16', None), ('12:30 h', '30', None), ('is 5.', '5', None), ('is 5.7.', '5.7', None), ('is 5.7.', '5', 'inside_number'),
    ('16', '16', None), ('', '16', 'not_in_context')])
def test_edges_of_answers(context, answer, why): assert answer_place(context, answer)[1] == why

@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=12), st.lists(st.tuples(st.text(max_size=20), st.text(max_size=8)), max_size=3))
def test_the_judge_names_a_reason_or_is_right(context, question, answer, others):
    others = [QA('', context, q, (a,)) for q,a in others]
    why = validate(QA('0', context, question, (answer,)), others=others)
    assert why is None or why in REASONS
    if why is None:
        assert answer.strip() in context and answer.strip().lower() not in question.lower()
        assert 5 <= len(question.split()) <= 40 and len(answer.strip()) > 1
        assert all(o.question != question and o.answers[0] != answer for o in others)

def test_cloze_answers_are_whole(): # '47' of '47.81s' was an answer once
    texts = [Text('a', 'Decoding was fast, taking 47.81s per item, and Qwen2.5 Coder '
                       'was tested beside Gemini-1.5-Pro on InterHand2.6M in this large study.')]
    rejected = Counter()
    qas = list(cloze_qa(texts, 20, rejected=rejected))
    assert not {'47', 'Qwen2', 'Gemini-1', 'InterHand2'} & {q.answers[0] for q in qas} and rejected['inside_number'] >= 3

# replies

def pair_lists(field): return st.lists(st.fixed_dictionaries(dict(question=field, answer=field)), min_size=1, max_size=4)
plain = st.text(st.characters(exclude_categories=['Cc','Cs'], exclude_characters='\\'),
                max_size=30) # in what needs repair, escapes are read as LaTeX: below

@settings(max_examples=150, deadline=None)
@given(pair_lists(plain), st.sampled_from(['[%s]', '{"pairs": [%s]}', '{"pairs": [%s],}', '```json\n[%s,]\n```',
                                           'Here they are:\n{"qa": [%s , ] }\nGood luck!',
                                           '<think>Is [{"question": "x", "answer": "y"}] right?</think>[%s]', '%s']),
       st.booleans(), st.booleans())
def test_pairs_come_back_from_any_wrapping(pairs, wrap, ascii, commas):
    one = [json.dumps(p, ensure_ascii=ascii) for p in pairs]
    if commas: one = [o[:-1] + ',}' for o in one]
    assert pairs_in(wrap.replace('%s', ', '.join(one))) == pairs

@settings(max_examples=150, deadline=None)
@given(pair_lists(st.text(max_size=30)), st.booleans())
def test_good_json_is_read_as_it_is(pairs, ascii): assert pairs_in(f'So:\n{json.dumps(pairs, ensure_ascii=ascii)} and so on') == pairs

@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from('[]{}",:\\ abfnrtu0\n`<think>/'), max_size=80))
def test_no_reply_breaks_the_reader(reply):
    text, out, rejected = a_text(0).text, [], Counter()
    assert all(isinstance(o, dict) for o in pairs_in(reply))
    assert isinstance(_judge(reply, text, 5, out, rejected), list) and set(rejected) <= set(REASONS)

def test_hostile_replies_take_no_time():
    t = time.perf_counter()
    for r in ('['*200_000, '{"a":'*50_000, '[{'*50_000, '"'*200_000, '{"question": "' + '\\'*100_000, '<think>'*50_000,
              ',]'*50_000): assert pairs_in(r) == []
    assert time.perf_counter() - t < 20

def test_numbers_stay_as_they_are_written():
    out = []; _judge('[{"question": "How large was the effect found?", "answer": 3.40}, '
                     '{"question": "How many were in the sample?", "answer": 1000000000000000000001}]',
                     'An effect of 3.40 in 1000000000000000000001 cases.', 5, out, Counter())
    assert [q.answers[0] for q in out] == ['3.40', '1000000000000000000001']

def test_latex_in_json():
    said = r'{"pairs": [{"question": "Which \emph{symbol} is the decay?", "answer": "$\tau_\beta$"}]}'
    text = r'We measure the decay $\tau_\beta$ at 3 K.'
    out = []; _judge(said, text, 5, out, Counter())
    assert [q.answers[0] for q in out] == [r'$\tau_\beta$']
    legal = '{"pairs": [{"question": "Which symbol stands for the decay?", "answer": "$\\tau_\\beta$"}]}' # every backslash starts a legal escape
    out = []; _judge(legal, text, 5, out, Counter())
    assert [q.answers[0] for q in out] == [r'$\tau_\beta$'], 'a tab and a backspace are not what the text has'

def test_answers_are_spans_of_the_context_to_the_byte():
    text = 'The mass-\nbalance  model of Smith et al. was used.'
    out, faults = [], Counter()
    _judge(json.dumps([dict(question='What was used by the authors?', answer='balance model'),
                       dict(question='Whose approach was used here then?', answer='smith'),
                       dict(question='Who made what was used?', answer='Smith et al.')]), text, 5, out, faults)
    assert [q.answers[0] for q in out] == ['balance  model', 'Smith et al.'] and faults == dict(not_in_context=1)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([dict(question='Which is the very first number?', answer='ALPHA'),
                                 dict(question='Which is the very first number?', answer='BETA'),
                                          dict(question='So which is the second one?', answer='BETA'),
                                          dict(question='And what opens this whole list?', answer='ALPHA'), dict(question='short', answer='GAMMA'),
                                          dict(q=1), dict(question='And is it GAMMA at all?', answer='GAMMA'),
                                          dict(question='What comes as the last one?', answer='nowhere'),
                                          dict(question='What comes as the last one?', answer='GAMMA')]), min_size=1, max_size=12), st.integers(1, 3))
def test_every_pair_is_kept_or_counted(objects, n):
    text, out, rejected = 'ALPHA and BETA and GAMMA are here.', [], Counter()
    _judge(json.dumps(objects), text, n, out, rejected)
    assert len(out) + sum(rejected.values()) == len(objects) and len(out) <= n and all(validate(q) is None for q in out)
    assert len({q.question for q in out}) == len(out) == len({q.answers for q in out})

def test_a_model_hears_what_was_wrong():
    text, heard = a_text(1).text, []
    first = numbers_of(text)[0]
    def chat(messages):
        heard.append(messages)
        return 'I am only a language model.' if len(heard) == 1 else json.dumps([dict(question='Which number comes first of all?', answer=first)])
    rejected = Counter()
    qas, calls = chat_questions(text, chat, 2, retries=3, rejected=rejected)
    assert calls == 4 and [q.answers[0] for q in qas] == [first] and rejected == dict(no_pairs=1, same_question=2)
    assert heard[0] == question_messages(text, 2) and 'no JSON' in heard[1][-1]['content'] and 'Write 2 new' in heard[1][-1]['content']
    last = heard[3][-1]['content']
    assert 'asked this already' in last and 'Write 1 new' in last and first in last and len(heard[3]) == 4

# a server

class Server:
    "Plays an OpenAI-compatible endpoint: what `say(n, body)` returns is (status, text[, headers])"
    def __init__(self, say):
        self.heard = heard = []
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
                heard.append((self.path, dict(self.headers), body))
                status, text, *headers = say(len(heard), body)
                if status is None: self.connection.close(); return
                self.send_response(status)
                for k,v in (headers[0] if headers else {}).items(): self.send_header(k, v)
                self.end_headers(); self.wfile.write(text.encode())
            do_GET = do_POST
            def log_message(self, *args): pass
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.http.server_port}/v1'
    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start(); return self
    def __exit__(self, *args): self.http.shutdown(); self.http.server_close()

def completion(text): return json.dumps(dict(id='x', object='chat.completion',
                                             choices=[dict(index=0, finish_reason='stop', message=dict(role='assistant', content=text))]))

@pytest.fixture(autouse=True)
def no_proxy(monkeypatch): monkeypatch.setenv('NO_PROXY', '127.0.0.1')

def test_a_corpus_through_a_bad_server(tmp_path, monkeypatch):
    "429, 500, a hangup, broken JSON, a fence and a cut-off list on the way: the same pairs as from a good server"
    monkeypatch.setenv('SOME_KEY', ' s3cret\n')
    texts = [a_text(i) for i in range(4)]
    def bad(n, body):
        good = good_pairs(body['messages'])
        if n in (1, 6): return 429, 'slow', {'Retry-After': '0'}
        if n == 2: return 500, 'oops'
        if n == 3: return None, ''
        if n == 4: return 200, '{"choices": [{"mess'
        if n == 5: return 200, completion(f'Sure!\n```json\n{good}\n```\nAnything else?')
        if len(body['messages']) == 2 and n == 7: return 200, completion(good[:len(good)*2//3])
        if len(body['messages']) == 2: return 200, completion(good.replace('}]', '},]'))
        return 200, completion(json.dumps([dict(question=f'Which number is it, {w}?', answer=a) for w,
                                           a in zip(('really then', 'after all now', 'in the end'),
                                                    numbers_of(body['messages'][1]['content'].split('Text:\n')[1])[5:])]))
    with Server(bad) as s:
        chat = EndpointChat(s.url, 'big-model', 'SOME_KEY', wait=.01, temperature=None, seed=3)
        report = write_qa(texts, tmp_path/'qa.jsonl', chat)
    assert report['texts'] == 4 and report['pairs'] == report['asked'] == 20 and report['calls'] == 5 and not report['failed'] and len(s.heard) == 10
    path, headers, body = s.heard[0]
    assert path == '/v1/chat/completions' and headers['Authorization'] == 'Bearer s3cret' and headers['Content-Type'] == 'application/json'
    assert body == dict(model='big-model', max_tokens=1024, seed=3, messages=question_messages(cut(texts[0].text, tok, 96)[0], 5))
    written = (tmp_path/'qa.jsonl').read_text()
    assert 's3cret' not in written and 'big-model' in written and 's3cret' not in repr(chat.settings)
    qas = list(read_qa(tmp_path/'qa.jsonl'))
    assert len(qas) == 20 == len({q.id for q in qas}) and all(validate(q) is None and q.answers[0] in q.context for q in qas)
    assert {q.context: q.date for q in qas} == {cut(t.text, tok, 96)[0]: t.date for t in texts}
    assert [t.text for t in read_texts(tmp_path/'qa.jsonl')] == [cut(t.text, tok, 96)[0] for t in texts]

def test_answers_are_where_the_file_says(tmp_path):
    write_qa([a_text(i) for i in range(3)], tmp_path/'a.jsonl', good_pairs); write_qa([a_text(i) for i in range(3)], tmp_path/'b.jsonl')
    for name in 'ab':
        for line in (tmp_path/f'{name}.jsonl').read_text().splitlines()[1:]:
            rec = json.loads(line); assert rec['qas']
            for q in rec['qas']:
                for a in q['answers']: assert rec['context'][a['answer_start']:a['answer_start']+len(a['text'])] == a['text']

def test_patience_has_an_end():
    with Server(lambda n, body: (503, 'restarting')) as s:
        with pytest.raises(StateError, match=r'no reply to 3 requests, at last HTTP 503.*restarting'): EndpointChat(s.url, 'm', retries=2,
            wait=.01)([])
        assert len(s.heard) == 3
    def slow(n, body): time.sleep(.5 if n == 1 else 0); return 200, completion('late')
    with Server(slow) as s:
        assert EndpointChat(s.url, 'm', timeout=.2, wait=.01)([]) == 'late' and len(s.heard) == 2
        with pytest.raises(StateError, match='timed out|Timeout'): s.heard.clear(); EndpointChat(s.url, 'm', timeout=.2, retries=0)([])

def test_waits_as_long_as_the_server_asks(monkeypatch):
    slept = []; monkeypatch.setattr(time, 'sleep', slept.append)
    replies = [(429, '', {'Retry-After': '7'}), (429, '', {'Retry-After': 'Wed, 21 Oct 2026 07:28:00 GMT'}), (500, ''),
               (429, '', {'Retry-After': '9999'}), (200, completion('done'))]
    with Server(lambda n, body: replies[n-1]) as s: assert EndpointChat(s.url, 'm')([]) == 'done'
    assert slept == [7, 2, 4, 60]

@pytest.mark.parametrize('status,error', [(400, InputError), (413, InputError), (422, InputError), (401, StateError), (403, StateError),
                                          (404, StateError)])
def test_no_second_try_where_none_can_help(status, error):
    with Server(lambda n, body: (status, '{"error": "because"}')) as s:
        with pytest.raises(error, match=f'HTTP {status}.*because'): EndpointChat(s.url, 'm', wait=.01)([])
        assert len(s.heard) == 1

def test_a_redirect_gets_no_key(monkeypatch):
    monkeypatch.setenv('SOME_KEY', 's3cret')
    with Server(lambda n, body: (200, completion('mine now'))) as thief:
        for status in (301, 302, 303, 307, 308):
            with Server(lambda n, body: (status, '', {'Location': thief.url})) as s:
                with pytest.raises(StateError, match=f'HTTP {status}'): EndpointChat(s.url, 'm', 'SOME_KEY')([])
        assert not thief.heard

def test_a_bad_key_is_not_shown(monkeypatch):
    monkeypatch.setenv('SOME_KEY', 's3\ncret')
    with pytest.raises(InputError) as e: EndpointChat('http://127.0.0.1:9', 'm', 'SOME_KEY')
    assert 's3' not in str(e.value) and 'SOME_KEY' in str(e.value)

def test_a_server_that_goes_away_stops_the_run_and_the_file_waits(tmp_path):
    texts, out = [a_text(i) for i in range(5)], tmp_path/'qa.jsonl'
    with Server(lambda n, body: (200, completion(good_pairs(body['messages']))) if n <= 2 else (401, 'key expired')) as s:
        with pytest.raises(StateError, match='key expired'): write_qa(texts, out, EndpointChat(s.url, 'm'))
    assert qa_report(out)['texts'] == 2
    with Server(lambda n, body: (200, completion(good_pairs(body['messages'])))) as s: # elsewhere, the same model
        assert write_qa(texts, out, EndpointChat(s.url, 'm'), workers=3)['pairs'] == 25 and len(s.heard) == 3
    whole = tmp_path/'whole.jsonl'
    with Server(lambda n, body: (200, completion(good_pairs(body['messages'])))) as s: write_qa(texts, whole, EndpointChat(s.url, 'm'))
    assert whole.read_bytes() == out.read_bytes()
    with pytest.raises(InputError, match="chat.model='m' there, 'n' now"): write_qa(texts, out, EndpointChat(s.url, 'n'))

def test_one_filtered_text_is_noted_three_in_a_row_stop(tmp_path):
    texts = [a_text(i) for i in range(8)]
    def server(bad): return Server(lambda n, body: (400, 'content filter') if any(cut(texts[i].text, tok,
        96)[0] in body['messages'][1]['content'] for i in bad) else (200, completion(good_pairs(body['messages']))))
    with server({0, 1, 4}) as s: report = write_qa(texts, tmp_path/'a.jsonl', EndpointChat(s.url, 'm'))
    assert report['failed'] == dict(refused=3) and report['pairs'] == 25 and (tmp_path/'a.jsonl').read_text().count('content filter') == 3
    with server({2, 3, 4}) as s:
        with pytest.raises(StateError, match=r'three texts in a row, the last \(t4\) with: .*content filter'): write_qa(texts, tmp_path/'b.jsonl',
            EndpointChat(s.url, 'm'))
    assert qa_report(tmp_path/'b.jsonl')['texts'] == 4

# files

def killed_run(texts, out, die):
    "Run `write_qa` in a child that gets SIGKILL as `die(call)` says; its exit signal"
    pid = os.fork()
    if pid == 0:
        calls = iter(range(1, 10**6))
        def chat(messages):
            if die(next(calls)): os.kill(os.getpid(), signal.SIGKILL)
            return good_pairs(messages)
        chat.settings = dict(model='m')
        try: write_qa(texts, out, chat)
        finally: os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_five_times_the_file_is_the_same(tmp_path):
    texts, out, whole = [a_text(i) for i in range(9)], tmp_path/'killed.jsonl', tmp_path/'whole.jsonl'
    def chat(messages): return good_pairs(messages)
    chat.settings = dict(model='m')
    write_qa(texts, whole, chat)
    rng, lines = random.Random(0), 0
    for _ in range(5):
        n = rng.randrange(1, 4)
        assert killed_run(texts, out, lambda call: call == n) == signal.SIGKILL
        now = out.read_bytes().count(b'\n') - 1
        assert now == lines + n - 1, 'a killed run lost more than one text'
        lines = now
        with open(out, 'r+b') as f: # and the power went, too
            f.write(whole.read_bytes()[:out.stat().st_size + rng.randrange(1, 90)])
    assert lines < 9 and write_qa(texts, out, chat)['texts'] == 9 and out.read_bytes() == whole.read_bytes()

def test_cut_at_any_byte_the_file_is_the_same(tmp_path):
    texts, out = [Text('a', 'Short é.', '2025'), a_text(1), a_text(2, 40)], tmp_path/'qa.jsonl'
    report = write_qa(texts, out, good_pairs); whole = out.read_bytes()
    ends = [i + 1 for i,c in enumerate(whole) if c == 10]
    for keep in sorted({0, 1, *range(0, len(whole), 97), *ends, *(e - 1 for e in ends), *(e + 1 for e in ends[:-1])}):
        out.write_bytes(whole[:keep]); asked = []
        def counting(messages): asked.append(1); return good_pairs(messages)
        counting.__qualname__ = 'good_pairs'
        assert write_qa(texts, out, counting, tok) == report and out.read_bytes() == whole, f'cut to {keep} bytes'
        assert len(asked) == 2 - sum(e <= keep for e in ends[2:])

@pytest.mark.parametrize('change,named', [(dict(tokens=48), r'tokens=\[96\] there, \[48\] now'), (dict(per_96=3), 'per_96=5 there, 3 now'),
                                          (dict(retries=0), 'retries=2 there, 0 now'),
                                          (dict(chat=None), "kind='chat' there, 'cloze' now"), (dict(tokenizer=tiny_lm().tokenizer), 'vocabulary='),
                                          (dict(chat=lambda m: ''), 'chat.model=')])
def test_no_file_of_two_kinds(tmp_path, change, named):
    out = tmp_path/'qa.jsonl'; write_qa([a_text(0)], out, good_pairs); was = out.read_bytes()
    with pytest.raises(InputError, match=named): write_qa([a_text(0)], out, **{**dict(chat=good_pairs), **change})
    assert out.read_bytes() == was

def test_another_prompt_is_another_file(tmp_path, monkeypatch):
    out = tmp_path/'qa.jsonl'; write_qa([a_text(0)], out, good_pairs)
    monkeypatch.setattr('promptcompress.qa_chat.PROMPT', 'deadbeef')
    with pytest.raises(InputError, match="prompt='.{8}' there, 'deadbeef' now"): write_qa([a_text(0)], out, good_pairs)

@pytest.mark.parametrize('content', ['', '{"data": []}', '{"id": 1}\n', 'notes\n',
                                     '{"header": {"dataset": "SQuAD"}}\n{"context": "a", "qas": []}\n', '[]', '\x00\x01', '{"header": 3}\n',
                                     '['*100_000])
def test_a_file_of_somebody_else_is_left_alone(tmp_path, content):
    out = tmp_path/'mine.jsonl'; out.write_text(content)
    if not content: assert write_qa([a_text(0)], out)['texts'] == 1; return # an empty file is nobody's
    with pytest.raises(InputError, match='was not begun by write_qa'): write_qa([a_text(0)], out)
    assert out.read_text() == content

def test_other_texts_are_refused(tmp_path):
    out, texts = tmp_path/'qa.jsonl', [a_text(i) for i in range(3)]
    write_qa(texts, out, good_pairs, limit=2)
    for wrong, named in ((texts[1:], "has 't0' where they have 't1'"), ([Text('t0', a_text(9).text), *texts[1:]], 'with another text'),
                         (texts[:1], "goes on with 't1'"),
                         ([*texts[:2], texts[0]], "Two texts have the id 't0'")):
        with pytest.raises(InputError, match=named): write_qa(wrong, out, good_pairs)
    assert write_qa(texts, out, good_pairs)['texts'] == 3
    with open(out, 'r+b') as f: f.seek(out.read_bytes().index(b'\n') + 3); f.write(b'\xff\xfe')
    with pytest.raises(InputError, match='qa.jsonl.*line [12]'): write_qa(texts, out, good_pairs)

def test_odd_characters_survive(tmp_path):
    body = ' '.join(f'Grüße aus {w} \u2028 {i}00 {"x"*3}' for i,w in enumerate(WORDS, 1))
    texts = [Text('a\nb', body, '2025'), Text('lone \ud800', '\ud83d ' + body, '2025'), Text('emoji', '🏔️ ' + body)]
    def chat(messages): return json.dumps([dict(question='Which \ud800 number comes \u2028 first here?', answer='100'),
                                           dict(question='Where do the greetings come from?', answer=f'Grüße aus {WORDS[0]}')])
    for name, n in (('a.jsonl', 2), ('b.jsonl', 1)):
        write_qa(texts, tmp_path/name, chat, limit=n); report = write_qa(texts, tmp_path/name, chat)
        assert report['texts'] == 3 and report['pairs'] == 6
    assert len(list(read_qa(tmp_path/'a.jsonl'))) == 6 and (tmp_path/'a.jsonl').read_bytes() == (tmp_path/'b.jsonl').read_bytes()

def test_pairs_grow_with_length(tmp_path):
    "96, 192 ... tokens: five pairs for each 96, and shorter texts are counted, not asked"
    texts = [a_text(i, n) for i,n in enumerate((4, 14, 40, 90))]
    report = write_qa(texts, tmp_path/'qa.jsonl', tokens=(96, 192, 288))
    recs = [json.loads(l) for l in (tmp_path/'qa.jsonl').read_text().splitlines()[1:]]
    def n_tokens(text): return len(tok(text, add_special_tokens=False)['input_ids'])
    groups = [min(n_tokens(t.text)//96, 3) for t in texts]
    assert len(set(groups)) >= 3 and groups[0] == 0 # a fair test
    for r,t,g in zip(recs, texts, groups, strict=True):
        assert r['asked'] == 5*g and t.text.startswith(r['context']) and n_tokens(r['context']) == r['tokens'] == (96*g or n_tokens(t.text))
    assert report['failed'] == dict(short=1) and report['asked'] == 5*sum(groups)

def test_real_abstracts(tmp_path):
    path = shared/'text'/'arxiv_2025.jsonl.xz'
    if not path.exists(): pytest.skip('the abstracts are not at hand')
    report = write_qa(path, tmp_path/'qa.jsonl', tokens=(96, 192, 288, 384, 480), limit=60)
    qas = list(read_qa(tmp_path/'qa.jsonl'))
    assert report['texts'] == 60 and report['pairs'] == len(qas) > .8*report['asked'] > 300 and all(q.date >= '2025' and answer_place(q.context,
        q.answers[0])[1] is None for q in qas)
    assert list(cloze_qa([Text(q.id.split('#')[0], q.context, q.date) for q in qas[:1]], 1))[0].answers == qas[0].answers

# a model of transformers

def chat_lm(**kw):
    lm = tiny_lm(**{'max_position_embeddings': 4096, **kw})
    lm.tokenizer.chat_template = ("{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
                                  "{% if add_generation_prompt %}<s>assistant:{% endif %}")
    return lm

def test_nonsense_of_a_local_model_is_counted(tmp_path):
    lm = chat_lm(); lm.model.save_pretrained(tmp_path/'model'); lm.tokenizer.save_pretrained(tmp_path/'model')
    chat = LocalChat(str(tmp_path/'model'), max_new_tokens=24, device='cpu')
    assert chat([dict(role='user', content='hi')]) == LocalChat(lm, max_new_tokens=24)([dict(role='user', content='hi')])
    report = write_qa([a_text(i) for i in range(2)], tmp_path/'qa.jsonl', chat, retries=1)
    assert report == dict(texts=2, pairs=0, asked=10, calls=4, rejected=dict(no_pairs=4), failed=dict(no_pairs=2))
    assert str(tmp_path) not in (tmp_path/'qa.jsonl').read_text() and '"fingerprint"' in (tmp_path/'qa.jsonl').read_text()
    other = chat_lm(seed=1); other.name = chat.lm.name
    with pytest.raises(InputError, match='chat.fingerprint='): write_qa([a_text(i) for i in range(2)], tmp_path/'qa.jsonl',
        LocalChat(other, max_new_tokens=24), retries=1)

def test_a_text_without_room_is_refused_not_cut():
    chat = LocalChat(chat_lm(), max_new_tokens=8)
    with pytest.raises(InputError, match='window of 4096'): chat([dict(role='user', content='x'*4200)])
    assert isinstance(chat([dict(role='user', content='x'*4050)]), str)

def test_a_reply_ends_where_the_window_does():
    chat, asked = LocalChat(chat_lm(max_position_embeddings=256), max_new_tokens=1000), []
    chat.pipe = lambda messages, generation_config, **kw: asked.append(generation_config.max_new_tokens) or [dict(generated_text='so')]
    assert chat([dict(role='user', content='x'*100)]) == 'so' and asked == [256 - 100 - 19]

def test_greedy_whatever_the_model_came_with():
    "Instruction-tuned models ship sampling settings: they must not make two runs differ"
    from transformers import GenerationConfig
    lm = chat_lm(); m = [dict(role='user', content='hi')]
    plain = LocalChat(lm, 12)(m)
    lm.model.generation_config = GenerationConfig(do_sample=True, temperature=1.5, top_k=50)
    assert {LocalChat(lm, 12)(m) for _ in range(3)} == {plain}
    assert len({LocalChat(lm, 12, do_sample=True, temperature=3.)(m) for _ in range(3)}) > 1

def test_no_chat_without_a_template():
    with pytest.raises(InputError, match='no chat template'): LocalChat(tiny_lm())
    with pytest.raises(InputError, match='There is no model at'): LocalChat('./no-such-folder')
