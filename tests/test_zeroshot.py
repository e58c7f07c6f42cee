"Requests behind a prefix: against the harness's own Hugging Face model, plain forward passes, and item by item against the offline scorer"
import json, random, subprocess, sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from promptcompress.core import InputError, StateError
from promptcompress.corpora import Choice, read_choice
from promptcompress.evaluation import harness as our_harness
from promptcompress.evaluation.harness import main, run_harness, run_tasks, sample_rows, task_for
from promptcompress.evaluation.zeroshot import (choice_result, choice_row, evaluate_choice, find_prefix, request_ids, score_continuations,
    text_room)
from promptcompress.kv.prefix import empty_prefix, read
from promptcompress.lm import LM, load_lm, pocket_folder, tiny_lm
from promptcompress.soft.prompt import SoftPrompt
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
shared = Path(__file__).resolve().parents[2]/'shared'/'data'/'choice'
pocket = load_lm('pocket')
rng = random.Random(0)
words = 'we show that the light of a galaxy is 12 times Brighter, and naïve β-models (see [3]) fail'.split()
def text(n): return ' '.join(rng.choices(words, k=n))
def asked(*args): return SimpleNamespace(args=args)
def written(i):
    choices = tuple(f'{text(rng.randint(1, 7))} {j}' for j in range(rng.randint(2, 5)))
    return Choice(f'i{i}', f'Question: {text(rng.randint(3, 40))}?\nAnswer:', choices, rng.randint(0, 1))
items = [written(i) for i in range(7)]
items += [Choice('letters', f'{text(60)}\nA. {text(5)}\nB. {text(5)}\nAnswer:', ('A', 'B', 'C', 'D'), 3)]

@pytest.fixture(scope='module')
def harness(): return pytest.importorskip('lm_eval')

def models(): # a tokenizer that starts with a BOS, two that don't, learned and rotary positions
    short = AutoModelForCausalLM.from_pretrained(pocket_folder(), dtype=torch.float32, max_position_embeddings=160) # less work at its edge
    yield 'pocket', LM(short, pocket.tokenizer, 'short')
    yield 'gpt2', tiny_lm('gpt2', n_positions=128)
    yield 'llama', tiny_lm('llama', max_position_embeddings=128)
readers = dict(models())

def their_own(lm):
    from lm_eval.models.huggingface import HFLM
    return HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=3, device='cpu')

def ours(lm, prefix=None, **kw): return our_harness.PrefixLM(lm, prefix, **kw)

@torch.no_grad()
def by_hand(lm, ids, n):
    "Log-likelihood of the last `n` of `ids`, which the plain model reads in one row"
    logp = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)[len(ids)-n-1:-1]
    return logp[range(n), ids[-n:]].sum().item(), logp.argmax(-1).tolist() == ids[-n:]

def close(a, b, tol=1e-4):
    assert [x[1] for x in a] == [x[1] for x in b]
    assert np.allclose([x[0] for x in a], [x[0] for x in b], rtol=1e-6, atol=tol), np.subtract([x[0] for x in a], [x[0] for x in b])

requests = [('The sky is', ' blue'), ('The sky is ', 'blue'), ('The sky is \n', 'blue\n'), ('', 'The sky'), ('', ' blue'),
            ('<|bos|>We show', ' that'), ('<s>We', ' show'), ('', '<|bos|>We'), ('', '<s>We'), ('We', 'akly'), ('naïve', ' β'), ('\n\nA', '\tB'),
            *[(text(rng.randint(1, 12)), ' ' + text(rng.randint(1, 5))) for _ in range(20)]]

# --- the same rules as the harness ----------------------------------------------------------------------------------

@pytest.mark.parametrize('name', readers)
def test_a_request_is_cut_where_the_harness_cuts_it(harness, name, monkeypatch):
    "Spaces that stay with the context, a second BOS, or none in front of an empty context change every score a little"
    lm, seen = readers[name], []
    hf = their_own(lm)
    monkeypatch.setattr(hf, '_loglikelihood_tokens', lambda reqs, **kw: seen.extend((a, b) for _,a,b in reqs))
    hf.loglikelihood([asked(*r) for r in requests], disable_tqdm=True)
    assert [request_ids(lm, *r, control=True) for r in requests] == seen

@pytest.mark.parametrize('name', readers)
def test_without_a_prefix_it_is_the_harness_own_model(harness, name):
    "Log-likelihoods and greedy flags, of requests in no order, some longer than the window and cut on the left, exactly at its edge and beyond"
    lm = readers[name]
    batch, (a, b), w = [asked(*r) for r in requests], (ours(lm, batch_size=4), their_own(lm)), lm.window
    close(a.loglikelihood(batch), b.loglikelihood(batch, disable_tqdm=True))
    edge = [(None, rng.choices(range(5, 250), k=n), rng.choices(range(5, 250), k=m)) for n,m in
            ((w - 2, 1), (w - 1, 1), (w, 1), (w + 1, 1), (w - 4, 5), (w, 7), (3, w - 5), (1, w), (9, w))]
    close(a._loglikelihood_tokens(edge), b._loglikelihood_tokens(edge, disable_tqdm=True), 1e-3) # a sum over up to 160 tokens

@pytest.mark.parametrize('name', readers)
def test_rolling_windows_are_the_harness_windows(harness, name):
    "A token that two windows score, or none, shows in the sum"
    lm = readers[name]
    texts = [asked(t) for t in ('', 'x', text(8), text(70), text(200))]
    a, b = ours(lm).loglikelihood_rolling(texts), their_own(lm).loglikelihood_rolling(texts, disable_tqdm=True)
    assert np.allclose(a, b, rtol=1e-6, atol=1e-4), np.subtract(a, b)

@pytest.mark.parametrize('name', readers)
def test_written_text_is_the_harness_text(harness, name):
    "Stop strings, limits under all their names, contexts that are cut to make room: the same text as the harness's own model"
    lm = readers[name]
    first = their_own(lm).generate_until([asked('We show', dict(max_gen_toks=16))], disable_tqdm=True)[0]
    kinds = [dict(max_gen_toks=16), dict(until=[first[5:8]], max_new_tokens=20), dict(until=[], max_gen_toks=5),
             dict(until=first[3:5], max_tokens=12, do_sample=False, temperature=1.)]
    batch = [asked(c, k) for k in kinds for c in ('We show', '', 'We', text(30), text(300))]
    if not lm.start_ids: batch = [r for r in batch if r.args[0]] # the harness has nothing to put there
    assert ours(lm, batch_size=3).generate_until(batch) == their_own(lm).generate_until(batch, disable_tqdm=True)

def test_a_finished_row_does_not_wait_and_an_unfinished_one_is_not_stopped(harness):
    "Each row has a stop of its own: one row that says the word must not end the others"
    lm = tiny_lm(seed=3)
    contexts = ['abc', 'xy', 'the quick', 'zzzzzz']
    free = ours(lm).generate_until([asked(c, dict(max_gen_toks=12)) for c in contexts])
    stop = free[0][2:4]
    assert ours(lm).generate_until([asked(c, dict(max_gen_toks=12, until=[stop])) for c in contexts]) == [t.split(stop)[0] for t in free]

# --- behind a prefix ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', readers)
def test_behind_a_prefix_is_as_if_its_text_stood_in_the_row(harness, name):
    "A prefix that is left out, counted twice, or put at the wrong position; a window that does not shrink"
    lm = readers[name]
    before = lm.encode(text(8))[:40]
    prefix, = read(lm, [before])
    room, pairs = text_room(lm, prefix), [request_ids(lm, *r, control=True) for r in requests[:12]]
    token = lm.encode(' w')[0]
    pairs += [([token]*n, [token]*m) for n,m in ((room - 1, 1), (room, 1), (2*room, 3))]
    expected = [by_hand(lm, before + (a + b)[-(room + 1):], len(b)) if len(before) + len(a + b) <= lm.window else None for a,b in pairs]
    for n in 1, 4, None:
        got = score_continuations(lm, pairs, prefix, n)
        close([g for g,e in zip(got, expected) if e], [e for e in expected if e])
    uncut, = score_continuations(lm, [([token]*(room - 2), [token]*3)], prefix)
    assert room == lm.window - len(before) and got[-1][0] == pytest.approx(uncut[0], abs=1e-3)
    model = ours(lm, prefix)
    assert model.max_length == room
    t = text(6)
    ids = [lm.bos_id, *(lm.start_ids + lm.encode(t))]
    assert model.loglikelihood_rolling([asked(t)])[0] == pytest.approx(by_hand(lm, before + ids, len(ids) - 1)[0], abs=1e-3)
    row = before + lm.start_ids + lm.encode('We show')
    written = lm.model.generate(torch.tensor([row]), max_new_tokens=9, do_sample=False, pad_token_id=lm.pad_id)
    assert model.generate_until([asked('We show', dict(max_gen_toks=9))])[0] == lm.decode(written[0][len(row):])

def test_a_soft_prompt_is_baked_and_stands_in_front():
    "Scores behind a learnt prompt are those of its embeddings in front of the text"
    prompt = SoftPrompt(pocket, 12, seed=1)
    r = evaluate_choice(pocket, items[:3], prompt)
    for item,row in zip(items, r['rows']):
        for choice,l in zip(item.choices, row['loglikelihoods']):
            a, b = request_ids(pocket, item.prompt, ' ' + choice)
            x = torch.cat([prompt.embeddings, pocket.embed(torch.tensor(a + b))])[None].detach()
            logp = pocket.model(inputs_embeds=x).logits[0].log_softmax(-1)[-len(b)-1:-1]
            assert l == pytest.approx(logp[range(len(b)), b].sum().item(), abs=1e-3)

def test_a_named_prefix_is_found_and_an_empty_one_changes_nothing(tmp_path, harness):
    "`--model_args prefix=...` is text: the file of a prefix or the folder of a prompt"
    prompt = SoftPrompt(pocket, 5)
    prompt.save_pretrained(tmp_path/'healed'); prompt.bake().save(tmp_path/'p.safetensors')
    batch = [asked(*r) for r in requests[:5]]
    args = f'model=pocket,device=cpu,add_bos_token=True,prefix={tmp_path}/'
    def made(name): return our_harness.PrefixLM.create_from_arg_string(args + name, dict(batch_size='auto', device=None))
    by_name = [made(x).loglikelihood(batch) for x in ('healed', 'p.safetensors')]
    close(by_name[0], by_name[1], 1e-6); close(by_name[0], ours(pocket, prompt).loglikelihood(batch), 1e-6)
    close(ours(pocket, empty_prefix(pocket)).loglikelihood(batch), ours(pocket).loglikelihood(batch), 1e-6)
    assert abs(by_name[0][0][0] - ours(pocket).loglikelihood(batch)[0][0]) > .1
    if not torch.cuda.is_available(): assert ours(pocket, device='cuda:0').device.type == 'cpu' # the harness's default

def test_the_batch_has_no_say_and_results_come_in_order():
    "Rows that share what is read, in shuffled order, in batches of any size"
    pairs = [request_ids(pocket, *r) for r in requests] + [request_ids(pocket, 'We show', ' ' + w) for w in words]
    alone = [score_continuations(pocket, [p])[0] for p in pairs]
    for n in 2, 7, '3', None, 'auto': close(score_continuations(pocket, pairs, batch_size=n), alone)

# --- multiple choice: offline and harness ---------------------------------------------------------------------------

def same_items(a, b):
    def facts(rows): return [[r[k] for k in ('id','label','acc','acc_norm','acc_bytes')] for r in rows]
    assert facts(a) == facts(b) and len(a)
    for x,y in zip(a, b): assert np.allclose(x['loglikelihoods'], y['loglikelihoods'], atol=1e-3)

@pytest.mark.parametrize('n', [4, pytest.param(20, marks=pytest.mark.slow)])
def test_offline_and_harness_agree_to_the_item(harness, n, tmp_path):
    "With and without a prefix, on the real halves where they are: every prediction, label and log-likelihood, and the totals"
    files = sorted(shared.glob('*half*')) if shared.exists() else []
    sets = dict(written=items) | {f.name.split('_')[0]: list(read_choice(f, limit=n)) for f in files}
    prompt = SoftPrompt(pocket, 16, seed=0).bake()
    for name,some in sets.items(): task_for(some, name, tmp_path)
    for prefix in None, prompt:
        r = run_tasks(pocket, list(sets), prefix, tmp_path)
        for name,some in sets.items():
            mine = evaluate_choice(pocket, some, prefix)
            same_items(mine['rows'], sample_rows(r, name))
            for k in 'acc', 'acc_norm', 'acc_bytes': assert mine['scores'][k] == pytest.approx(r['results'][name][f'{k},none'])

def test_without_a_prefix_the_harness_own_model_agrees_to_the_item(harness, tmp_path):
    "Not only our class in the harness: the harness's own model gets the same items right"
    from lm_eval.tasks import TaskManager
    task_for(items, 'written', tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    r = harness.simple_evaluate(model=their_own(pocket), tasks=['written'], task_manager=manager, bootstrap_iters=0)
    same_items(evaluate_choice(pocket, items)['rows'], sample_rows(r, 'written'))

def test_chat_templates_agree_to_the_item(harness, tmp_path):
    "In a chat the choice follows the template without a space, and the template's own BOS is not doubled"
    from copy import deepcopy
    tok = deepcopy(pocket.tokenizer)
    turns = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    tok.chat_template = "{{ bos_token }}" + turns + "{% if add_generation_prompt %}[assistant] {% endif %}"
    chat, some = LM(pocket.model, tok, 'chat'), items[-4:]
    task_for(some, 'written', tmp_path)
    mine = evaluate_choice(chat, some, form='chat')['rows']
    same_items(mine, sample_rows(run_tasks(chat, 'written', None, tmp_path, apply_chat_template=True), 'written'))
    assert mine != evaluate_choice(chat, some)['rows']
    with pytest.raises(InputError, match='no chat template'): run_tasks(pocket, 'written', None, tmp_path, apply_chat_template=True)

def test_the_three_scores_divide_by_what_they_say():
    "By nothing, by characters, by bytes: a choice in Greek tells the last two apart"
    greek = Choice('g', 'Question: which?', ('αβγδ', 'abcdef', 'x'*40), 0)
    row = choice_result(greek, [(-10., False), (-12., False), (-100., False)])
    assert row['predictions'] == dict(acc=0, acc_norm=1, acc_bytes=0) and (row['acc'], row['acc_norm'], row['acc_bytes']) == (1, 0, 1)
    row = choice_result(greek, [(-10., False), (-11., False), (-52., False)])
    assert row['predictions'] == dict(acc=0, acc_norm=2, acc_bytes=0)

def test_cut_questions_are_counted():
    "A long question loses its beginning behind a prefix, and the result says so"
    some = [Choice('long', 'w '*600 + 'Answer:', ('yes', 'no'), 0), items[0]]
    prefix, = read(pocket, [[5]*500])
    assert evaluate_choice(pocket, some)['truncated'] == 0 and evaluate_choice(pocket, some, prefix)['truncated'] == 1

def test_a_row_says_what_it_was_measured_on(tmp_path):
    "JSON, without this machine's paths, and two prompts of one name differ"
    f, items = tmp_path/'qs.jsonl', globals()['items'][:3]
    f.write_text(''.join(json.dumps(dict(id=o.id, prompt=o.prompt, choices=o.choices, label=o.label)) + '\n' for o in items))
    pocket.model.save_pretrained(tmp_path/'copy'); pocket.tokenizer.save_pretrained(tmp_path/'copy')
    lm = load_lm(tmp_path/'copy')
    prompts = [SoftPrompt(lm, 4, seed=s) for s in (0, 1)]
    rows = [choice_row(evaluate_choice(lm, f, p), lm, p, f, seed=0, note='x') for p in prompts]
    a, b = rows
    assert str(tmp_path) not in json.dumps(a) and (a['model'], a['dataset'], a['note'], a['n']) == ('copy', 'qs', 'x', len(items))
    assert a['prefix']['content'] != b['prefix']['content'] and a['prefix']['slots'] == 4
    assert choice_row(evaluate_choice(lm, f), lm, None, [f], 'mine')['prefix'] is None

def test_the_key_changes_with_what_was_measured_and_with_nothing_else():
    "A report that takes the last row of a key must not drop another measurement, nor keep two of the same"
    some, prompt = items[:2], SoftPrompt(pocket, 4, seed=0)
    def key(lm=pocket, some=some, prefix=prompt, **kw):
        r = evaluate_choice(lm, some, prefix, **kw)
        row = choice_row(r, lm, prefix, __file__, 'any')
        assert row['key'] == r['key'] and len(r['key']) == 16
        return r['key']
    other = Choice(some[1].id, some[1].prompt, some[1].choices, 1 - some[1].label)
    assert key() == key(prefix=prompt.bake(), batch_size=1) == key(lm=LM(pocket.model, pocket.tokenizer, 'another name'))
    keys = [key(), key(prefix=None), key(prefix=SoftPrompt(pocket, 4, seed=1)), key(some=some[:1]), key(some=[some[0], other]), key(bos=False),
            key(lm=tiny_lm(), prefix=None)]
    assert len(set(keys)) == len(keys), keys

# --- bad input ------------------------------------------------------------------------------------------------------

def item(**other): return dict(id='1', prompt='x', choices=['a', 'b'], label=0) | other

@pytest.mark.parametrize('source, says', [
    ([], 'no multiple-choice item'), ([item(label=2)], 'label 2 is out of range'), ([item(choices=['a'])], 'at least two'),
    ([item()]*2, "the id '1' is already"), ([dict(question='x')], 'not those of')])
def test_items_that_cannot_be_scored_are_refused(source, says):
    "Not scored as wrong, nor an IndexError from inside"
    with pytest.raises(InputError, match=says): evaluate_choice(pocket, source)

def test_settings_that_cannot_be_meant_are_refused(tmp_path, harness):
    "Each names what to do"
    full, = read(pocket, [[5]*1023])
    for call,says in (
        (lambda: evaluate_choice(pocket, items, full), 'use a shorter prefix'),
        (lambda: evaluate_choice(pocket, items, batch_size=0), 'at least 1'),
        (lambda: evaluate_choice(pocket, items, batch_size='many'), 'at least 1'),
        (lambda: evaluate_choice(pocket, items, bos='text'), 'True, False'),
        (lambda: evaluate_choice(pocket, items, form='letter'), "use 'plain' or 'chat'"),
        (lambda: evaluate_choice(pocket, items, tmp_path/'none'), 'none'),
        (lambda: evaluate_choice(pocket, read_choice([item()], 'glue')), 'choose one of'),
        (lambda: find_prefix([1], pocket), 'is no prefix'), (lambda: ours(tiny_lm(), full), 'This prefix is for'),
        (lambda: task_for(items, 'a/b', tmp_path), 'letters, digits'), (lambda: task_for([], 'a', tmp_path), 'no multiple-choice item'),
        (lambda: ours(pocket).generate_until([asked('x', dict(max_gen_toks=1024))]), 'set max_gen_toks lower'),
        (lambda: ours(pocket).loglikelihood([asked('x', '')]), 'no token of its own')):
        with pytest.raises(InputError, match=says): call()

# --- an optional package, and its command line ----------------------------------------------------------------------

IN_A_NEW_PROCESS = """
import importlib.util, sys
from promptcompress.evaluation import harness
print([m for m in ('lm_eval', 'datasets', 'evaluate', 'pandas') if m in sys.modules])
if importlib.util.find_spec('lm_eval'): # the harness fills its table of models only while it is empty
    harness.PrefixLM
    from lm_eval.api.registry import get_model
    print(get_model('dummy').__name__, get_model('promptcompress').__name__)
"""

def test_the_harness_is_optional_imported_late_and_keeps_its_own_models(monkeypatch):
    "Importing ours must not take seconds for a package that may not be there, nor hide `hf`; using it without says how to get it"
    said = subprocess.run([sys.executable, '-c', IN_A_NEW_PROCESS], capture_output=True, text=True, check=True, timeout=100).stdout.splitlines()
    assert said[0] == '[]' and said[1:] in ([], ['DummyLM PrefixLM'])
    monkeypatch.delitem(our_harness.__dict__, 'PrefixLM', raising=False)
    for m in [m for m in sys.modules if m.split('.')[0] == 'lm_eval']: monkeypatch.delitem(sys.modules, m)
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    with pytest.raises(StateError, match=r'promptcompress\[eval\]'): our_harness.PrefixLM
    with pytest.raises(AttributeError): our_harness.NoSuchThing

def test_the_harness_command_line_knows_the_model(harness, tmp_path, capsys, monkeypatch):
    "`--model promptcompress` with a prompt named in `--model_args`, over a local task"
    import lm_eval.tasks as tasks
    monkeypatch.setattr(tasks, 'TaskManager', partial(tasks.TaskManager, include_defaults=False)) # reading thousands of others takes seconds
    task_for(items, 'written', tmp_path); prompt = SoftPrompt(pocket, 4); prompt.save_pretrained(tmp_path/'healed')
    args = ['run', '--model', 'promptcompress', '--model_args', f'model=pocket,prefix={tmp_path}/healed', '--batch_size', 'auto',
            '--tasks', str(tmp_path/'written.yaml'), '--output_path', str(tmp_path/'out')]
    before = list(sys.argv)
    run_harness(args)
    assert 'acc_norm' in capsys.readouterr().out and sys.argv == before
    r, = (json.loads(f.read_text()) for f in (tmp_path/'out').rglob('results*.json'))
    assert r['results']['written']['acc,none'] == pytest.approx(evaluate_choice(pocket, items, prompt)['scores']['acc'])
    assert r['config']['fingerprint'] == pocket.fingerprint and r['config']['prefix']['slots'] == 4
    assert main([a.replace('healed', 'nowhere') for a in args]) == 2 and sys.argv == before
    assert (said := capsys.readouterr().err.splitlines()[-1]).startswith('error: ') and 'nowhere' in said

def test_the_module_is_a_command(harness):
    "`python -m` that defines everything and does nothing ends with status 0 and no word"
    p = subprocess.run([sys.executable, '-m', 'promptcompress.evaluation.harness', 'run', '--modle', 'x'], capture_output=True, text=True, timeout=100)
    assert p.returncode == 2 and p.stderr.startswith('usage: lm') and '--modle' in p.stderr, p.stderr[-500:]
