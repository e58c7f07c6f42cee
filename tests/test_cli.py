"""The command line as a process: exit codes, what is printed where, and what is left behind.

Importing torch and transformers takes seconds and would be most of the time of these tests. So the modules are imported
once, into a server process that forks a child for every command (multiprocessing's `forkserver`); each command still has
a process, streams and an exit code of its own. A few run from a cold start, to see that nothing else is printed there.
"""
import json, multiprocessing, os, random, re, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import ModuleType
from unittest.mock import patch
import pytest, torch
from promptcompress import cli
from promptcompress.core import load_tensors
from promptcompress.kv.compressor import Compressor, CompressorConfig
from promptcompress.kv.generate import generate, regenerate
from promptcompress.kv.prefix import load_prefix, read
from promptcompress.lm import load_lm, question_prompt, tiny_lm
from promptcompress.soft.prompt import SoftPrompt, load_prompt

root = Path(__file__).parent.parent
forks = pytest.mark.skipif('forkserver' not in multiprocessing.get_all_start_methods(), reason='this system has no fork')
TEXT = 'Ada wrote the first program, for a machine that was never built.'

def child(folder, args, streams):
    "In the new process: redirect the three streams, run the command"
    os.chdir(folder)
    for fd,(path,flags) in enumerate(zip(streams, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))): os.dup2(os.open(path, flags), fd)
    sys.stdin, sys.argv = open(0), ['promptcompress', *args]
    sys.exit(cli.main())

class Shell:
    "Runs `promptcompress ...` in a folder"
    def __init__(self, folder, tmp):
        self.folder, self.tmp, self.processes = folder, tmp, multiprocessing.get_context('forkserver')
        os.environ['PYTHONPATH'] = f'{root}{os.pathsep}{Path(__file__).parent}' # where the server finds these:
        self.processes.set_forkserver_preload(['promptcompress.cli', 'promptcompress.evaluation.qa', 'promptcompress.evaluation.perplexity',
                                               'promptcompress.kv.compressor', 'promptcompress.soft.tune', 'promptcompress.train', 'test_cli'])
        self.streams = [tmp/n for n in ('stdin','stdout','stderr')]
    def start(self, line, *more, stdin=b''):
        "A running process"
        for s,data in zip(self.streams, (stdin, b'', b'')): s.write_bytes(data)
        p = self.processes.Process(target=child, args=(self.folder, [*line.split(), *more], self.streams))
        with patch.dict(sys.modules, __main__=ModuleType('__main__')): p.start() # else the child would look for pytest's, or a notebook's
        return p
    def __call__(self, line, *more, stdin=b''):
        p = self.start(line, *more, stdin=stdin)
        p.join(120)
        assert p.exitcode is not None, 'still running'
        return p.exitcode, *(s.read_text() for s in self.streams[1:])

def cold(line, folder, *more, stdin=None):
    "A new interpreter"
    return subprocess.run([sys.executable, '-m', 'promptcompress.cli', *line.split(), *more],
                          cwd=folder, input=stdin, capture_output=True, text=True, timeout=120,
                          env=os.environ | dict(PYTHONPATH=str(root), OMP_NUM_THREADS='1'))

def files(folder): return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob('*')}

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder with models, compressors and files, good and bad; no test but those that say so changes it"
    d = tmp_path_factory.mktemp('work')
    lm = tiny_lm('llama')
    lm.model.save_pretrained(d/'tiny'); lm.tokenizer.save_pretrained(d/'tiny')
    lm.model.save_pretrained(d/'mute') # no tokenizer
    lm.model.save_pretrained(d/'cut'); lm.tokenizer.save_pretrained(d/'cut'); w = d/'cut'/'model.safetensors'; w.write_bytes(w.read_bytes()[:5000])
    for carrier in ('kv','embeds'): Compressor(lm, CompressorConfig(carrier=carrier, k=4, r=4)).save_pretrained(d/carrier)
    gpt = tiny_lm('gpt2'); read(gpt, [gpt.encode(TEXT)])[0].save(d/'gpt2.safetensors')
    read(lm, [lm.encode(TEXT)])[0].save(d/'whole.safetensors')
    flipped = bytearray((d/'whole.safetensors').read_bytes()); flipped[-9] ^= 1; (d/'flipped.safetensors').write_bytes(flipped)
    for name,m in (('prompt',lm), ('narrow',tiny_lm('llama', hidden_size=32, head_dim=16)), ('of-gpt2',gpt)): SoftPrompt(m, 4).save_pretrained(d/name)
    (d/'rain.txt').write_text('The rain in Spain stays mainly in the plain, and the plain stays mainly in Spain. '*40)
    (d/'text.txt').write_text(TEXT); (d/'empty.txt').write_text(' \n'); (d/'latin.txt').write_bytes(b'na\xefve')
    four = [dict(id=str(i), text=f'{TEXT} The Analytical Engine wanted {1000+i} cards.', date='2025-01-01') for i in range(4)]
    (d/'texts.jsonl').write_text('\n'.join(map(json.dumps, four)))
    (d/'qa.jsonl').write_text(json.dumps(dict(context=TEXT, question='Who wrote it?', answers=['Ada'])))
    asked = [dict(id=str(i), context=t['text'], question=f'What about card {i}?', answers=['Ada' if i % 2 else 'cards']) for i,t in enumerate(four*6)]
    (d/'asked.jsonl').write_text('\n'.join(map(json.dumps, asked)))
    (d/'twice.jsonl').write_text('\n'.join(map(json.dumps, [asked[0]]*2)))
    (d/'mixed.jsonl').write_text('\n'.join(json.dumps(q | dict(answers=['Charles'])) for q in asked))
    choices = [dict(goal=f'Write program {i}.', sol1='Ask Ada.', sol2='Ask the engine.', label=i % 2) for i in range(3)]
    (d/'piqa.jsonl').write_text('\n'.join(map(json.dumps, choices))); (d/'label.jsonl').write_text(json.dumps(choices[0] | dict(label=2)))
    (d/'busy').mkdir(); (d/'busy'/'thesis.tex').write_text('years of work'); (d/'busy'/'thesis.jsonl').write_text('years\nof work')
    return d

@pytest.fixture(scope='module')
def shell(folder, tmp_path_factory): return Shell(folder, tmp_path_factory.mktemp('streams'))

# --- bad input -------------------------------------------------------------------------------------------------------

model = '--model tiny --compressor kv -o x.safetensors'
BAD = { # what is wrong: (command line, what the message says)
    'no such file': (f'compress none.txt {model}', 'none.txt does not exist'),
    'a folder': (f'compress busy {model}', 'busy is a folder'),
    'empty': (f'compress empty.txt {model}', 'empty.txt holds no text'),
    'not UTF-8': (f'compress latin.txt {model}', 'line 1: not UTF-8'),
    'several texts': (f'compress texts.jsonl {model}', 'several texts'),
    'k too large': (f'compress text.txt -k 5 {model}', 'choose k from 1 to 4'),
    'k zero': (f'compress text.txt -k 0 {model}', 'at least 1'),
    'no such model': ('compress text.txt --model ./none --compressor kv -o x.safetensors', "no model at './none'"),
    'no tokenizer': ('compress text.txt --model mute --compressor kv -o x.safetensors', 'has no tokenizer'),
    'weights cut off': ('compress text.txt --model cut --compressor kv -o x.safetensors', "weights at 'cut'"),
    'no such compressor': ('compress text.txt --model tiny --compressor none -o x.safetensors', "no compressor at 'none'"),
    'not a compressor': ('compress text.txt --model tiny --compressor busy -o x.safetensors', 'config.json does not exist'),
    'would overwrite': ('compress text.txt --model tiny --compressor kv -o latin.txt', 'latin.txt exists and is not a KV prefix'),
    'no such device': (f'compress text.txt {model} --device abacus', "no device 'abacus'"),
    'another architecture': ('regenerate gpt2.safetensors --model tiny', "'family': 'gpt2'"),
    'another architecture, asked': ('ask gpt2.safetensors Who? --model tiny', "'family': 'gpt2'"),
    'not a prefix': ('regenerate text.txt --model tiny', 'not a whole safetensors file'),
    'damaged prefix': ('ask flipped.safetensors Who? --model tiny', 'damaged'),
    'no room to write': ('regenerate whole.safetensors --model tiny --max-new-tokens none', 'at least 1'),
    'chat without template': ('ask whole.safetensors Who? --form chat --model tiny', 'no chat template'),
    'existing output': ('train --stage pretrain --data texts.jsonl --out busy --model tiny', 'busy exists and is not empty'),
    'nothing to resume': ('train --stage pretrain --data texts.jsonl --out new --resume --model tiny', 'no run to resume'),
    'no training data': ('train --stage pretrain --data none.jsonl --out new --model tiny', 'none.jsonl does not exist'),
    'texts too short': ('train --stage pretrain --data texts.jsonl --out new --model tiny --length 190 199', 'None of the 4 texts has 190 tokens'),
    'no QA file': ('train --stage finetune --data texts.jsonl --out new --model tiny', 'unknown QA layout'),
    'nothing to ask about': ('train --stage finetune --cloze text.txt --out new --model tiny', 'No fill-in question'),
    'settings of a trained compressor': ('train --stage pretrain --data texts.jsonl --out new --model tiny --from kv -k 8', 'kv has k=4'),
    'negative rate': ('train --stage pretrain --data texts.jsonl --out new --lr -1', "above 0"),
    'no test data': ('evaluate qa --data none.json --maker full --model tiny --json new.json', 'none.json does not exist'),
    'none long enough': ('evaluate regenerate --data texts.jsonl --maker full --length 200 --model tiny --json new.json',
                         'none of the 4 texts has 200 tokens'),
    'all leak': ('evaluate regenerate --data texts.jsonl --maker full --length 32 --check-leakage texts.jsonl --model tiny --json new.json',
                 'texts: all 4 items leak'),
    'unknown maker': ('evaluate qa --data qa.jsonl --maker magic --model tiny --json new.json', "There is no maker 'magic'"),
    'option of another task': ('evaluate regenerate --data texts.jsonl --maker full --cloze texts.jsonl --model tiny', 'unrecognized arguments: --cloze'),
    'several in one .json': ('evaluate qa --data qa.jsonl --maker full none --model tiny --json new.json', 'give a name that ends in .jsonl'),
    'whose compressor': ('evaluate qa --data qa.jsonl --maker 500x icae --compressor kv --model tiny --json new.jsonl', 'which of 500x, icae is it for?'),
    'instruct without its adapter': ('evaluate qa --data qa.jsonl --maker instruct --model tiny --json new.jsonl', 'instruct=DIR'),
    'no questions and no texts': ('evaluate qa --maker full --model tiny --json new.json', 'Nothing to evaluate on: give --data, or --cloze'),
    'answers not in contexts': ('evaluate qa --data mixed.jsonl --maker full --model tiny --json new.json', "the answers of 24 of 24 questions do not occur in their contexts"),
    'ids twice': ('evaluate qa --data twice.jsonl --maker full --model tiny --json new.json', "two questions have the id '0'"),
    'result file of other lines': ('evaluate qa --data qa.jsonl --maker full --model tiny --json busy/thesis.jsonl', 'line 1 of 2 is not JSON'),
    'label out of range': ('evaluate choice --data label.jsonl --model tiny --json new.json', 'label'),
    'no choices': ('evaluate choice --data qa.jsonl --model tiny --json new.json', 'qa.jsonl'),
    'no such size': ('evaluate cost --random big --json new.json', "'big' is no size of a random model"),
    'nothing to report': ('report texts.jsonl --out new', 'texts.jsonl'),
    'no task': ('evaluate --data texts.jsonl --maker full --model tiny', 'invalid choice'),
    'compressor for none': ('evaluate qa --data qa.jsonl --maker none --compressor kv --model tiny', 'has no compressor'),
    'k larger than the window': ('heal --data rain.txt -k 300 --model tiny --out new', 'k=300 rows leave no room for text'),
    'window behind k too large': ('heal --data rain.txt -k 8 --length 250 --model tiny --out new', '248 of the 256 tokens'),
    'text shorter than a window': ('heal --data text.txt -k 8 --model tiny --out new', 'a window needs'),
    'validation shorter than a window': ('heal --data rain.txt --validation text.txt -k 8 --steps 2 --model tiny --out new', 'a window needs'),
    'nothing to learn from': ('heal --data none.txt -k 8 --model tiny --out new', 'none.txt does not exist'),
    'learning rate of zero': ('heal --data rain.txt -k 8 --lr 0 --model tiny --out new', 'not usable: give a positive number'),
    'two learning rates': ('heal --data rain.txt --lr 1 --rate 1 --model tiny --out new', 'not allowed with'),
    'distil without teacher': ('heal --data rain.txt --distil .5 --model tiny --out new', 'give --teacher MODEL'),
    'kv can not recompute': ('heal --data rain.txt -k 8 --kind kv --checkpointing --model tiny --out new', "kind='soft'"),
    'existing output of heal': ('heal --data rain.txt -k 8 --model tiny --out busy', 'busy exists and is not empty'),
    'nothing to heal on with': ('heal --data rain.txt -k 8 --model tiny --out new --resume', 'no run to resume'),
    'no text to predict': ('evaluate perplexity --data none.txt --model tiny --json new.json', 'none.txt does not exist'),
    'prefix of another architecture': ('evaluate perplexity --data rain.txt --prefix gpt2.safetensors --model tiny --json new.json',
                                       "'family': 'gpt2'"),
    'prompt of another architecture': ('evaluate perplexity --data rain.txt --prefix of-gpt2 --model tiny --json new.json', "'family': 'gpt2'"),
    'prompt of another width': ('evaluate perplexity --data rain.txt --prefix narrow --model tiny --json new.json', 'vectors of width 32'),
    'folder without a prompt': ('evaluate perplexity --data rain.txt --prefix busy --model tiny --json new.json',
                                'busy is a folder without a learnt prompt'),
    'compressor for a prompt': ('evaluate perplexity --data rain.txt --prefix kv --model tiny --json new.json', 'kv does not hold a'),
    'damaged prefix in front': ('evaluate perplexity --data rain.txt --prefix flipped.safetensors --model tiny --json new.json', 'damaged'),
    'no such prefix': ('evaluate perplexity --data rain.txt --prefix none.safetensors --model tiny --json new.json',
                       'none.safetensors does not exist'),
    'window behind a prefix': ('evaluate perplexity --data rain.txt --prefix prompt --window 256 --model tiny --json new.json',
                               'of which the prefix takes 4'),
    'stride over the text': ('evaluate perplexity --data rain.txt --window 64 --stride 65 --model tiny --json new.json',
                             'would skip some of the text'),
    'k too large for the demo': ('demo --model tiny --kv kv --icae embeds', '-k 16: kv has 4'),
    'question without answer': ('demo --model tiny --kv kv --icae embeds -k 4 --file text.txt --question Who?', 'an --answer for each'),
    'recipe without name': ('recipe prepare --text text.txt --squad qa.jsonl --cloze x --wh x --out new', 'expected NAME=FILE'),
    'recipe without data': ('recipe lm --data busy --out new', 'no mixture.json'),
    'recipe with the other carrier': ('recipe export --model tiny --kv embeds --out new', 'carrier is embeds'),
    'unknown verb': ('squeeze text.txt', "invalid choice: 'squeeze'"),
    'nothing': ('', 'VERB')}

def refused(code, err, message):
    assert code == 2, err
    assert err.count('\n') == 1 and err.startswith('promptcompress: error: ') and message in err, err

@forks
@pytest.mark.parametrize('line,message', BAD.values(), ids=[w.replace(' ', '-') for w in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(shell, folder, line, message):
    before = files(folder)
    code, out, err = shell(line)
    refused(code, err, message)
    assert out == '' and files(folder) == before

@forks
def test_bad_standard_input(shell, folder):
    before = files(folder)
    for data,message in ((b'na\xefve', 'Standard input, line 1: not UTF-8 text'), (b'\n', 'Standard input holds no text')):
        code, _, err = shell('compress - --model tiny --compressor kv -o x.safetensors', stdin=data)
        refused(code, err, message)
    assert files(folder) == before

def test_cold_start_prints_nothing_else(folder):
    "Also what other libraries say when they are imported and load a model"
    before = files(folder)
    p = cold(f'compress text.txt -k 5 {model}', folder)
    refused(p.returncode, p.stderr, 'choose k from 1 to 4')
    assert p.stdout == '' and files(folder) == before

# --- good input ------------------------------------------------------------------------------------------------------

@forks
def test_compress_regenerate_ask(shell, folder, tmp_path):
    doc = tmp_path/'doc.safetensors'
    code, out, err = shell(f'compress text.txt -k 4 --model tiny --compressor kv -o {doc} --bits 32 --json')
    assert code == 0 and err == ''
    row = json.loads(out)
    assert (row['slots'], row['tokens'], row['text_bytes'], row['file_bytes']) == (4, len(TEXT), len(TEXT), doc.stat().st_size)
    lm = load_lm(folder/'tiny', 'cpu')
    p = load_prefix(doc, lm)
    torch.testing.assert_close(p.keys, Compressor.from_pretrained(folder/'kv', lm).compress(TEXT).keys)
    assert shell(f'regenerate {doc} --model tiny --max-new-tokens 9') == (0, regenerate(lm, p, 9).encode(errors='replace').decode() + '\n', '')
    code, out, err = shell(f'ask {doc} --model tiny --max-new-tokens 9 --json', 'Who wrote it?', 'For what?')
    assert code == 0 and err == ''
    said = [a['answer'] for a in json.loads(out)['answers']]
    assert said == [generate(lm, p, question_prompt(lm, q), 9).strip().splitlines()[0].strip() for q in ('Who wrote it?', 'For what?')]

@forks
def test_bits_and_standard_input(shell, tmp_path):
    size = {}
    for bits in (16, 8, 4):
        code, out, _ = shell(f'compress - -k 4 --model tiny --compressor kv -o {tmp_path}/{bits} --bits {bits} --json', stdin=TEXT.encode())
        assert code == 0
        size[bits] = json.loads(out)['prefix_bytes']
    assert size == {16: 1536, 8: 768, 4: 384} # 3 layers, 2 heads, 4 slots, 16 dimensions, keys and values
    assert shell(f'compress - --model tiny --compressor kv -o {tmp_path}/8 --quiet', stdin=b'Another text.')[0] == 0 # a prefix replaces a prefix
    assert sorted(f.name for f in tmp_path.iterdir()) == ['16', '4', '8']

@forks
def test_evaluate_writes_one_object(shell, folder, tmp_path):
    for task,data,more,columns in (('regenerate','texts.jsonl','--maker 500x --compressor kv -k 4 --length 64',('rouge_l','bleu')),
                                   ('qa','qa.jsonl','--maker full',('f1','em'))):
        out, said = tmp_path/f'{task}.json', tmp_path/f'{task}.jsonl'
        code, line, err = shell(f'evaluate {task} --data {data} {more} -n 3 --model tiny --json {out} --predictions {said}')
        assert code == 0 and err == '' and line.count('\n') == 1
        row = json.loads(out.read_text())
        assert all(0 <= row[c] <= 1 for c in columns) and row['n'] == len(said.read_text().splitlines()) == (3 if task == 'regenerate' else 1)
        assert row['data'][0]['file'] == data
        assert {'command','commit','versions','device','maker','length','slots','bytes','ci','fingerprint'} <= set(row)

@forks
def test_a_table_survives_being_killed(shell, folder, tmp_path):
    "Five SIGKILLs at random moments, some of them in the middle of a line: the same predictions and the same tables, byte for byte"
    line = 'evaluate qa --data given=asked.jsonl --maker none full truncated 500x -k 4 1 --compressor kv --batch 2 --model tiny --json {0}/rows.jsonl'
    def tables(d):
        assert shell(f'report {d}/rows.jsonl --out {d}/report')[0] == 0
        return {p.name: p.read_bytes() for p in (d/'report').iterdir() if p.suffix in ('.md','.tex','.csv')}
    whole, cut = tmp_path/'whole', tmp_path/'cut'
    assert shell(line.format(whole))[0] == 0
    size, rng, said = (whole/'rows.predictions.jsonl').stat().st_size, random.Random(0), cut/'rows.predictions.jsonl'
    for at in sorted(rng.randrange(size*9//10) for _ in range(5)):
        p, end = shell.start(line.format(cut)), time.time() + 60
        while p.is_alive() and time.time() < end and not (said.exists() and said.stat().st_size > at): time.sleep(.002)
        assert p.is_alive(), 'it ended before it was killed'
        os.kill(p.pid, signal.SIGKILL); p.join(10); assert p.exitcode == -signal.SIGKILL
        if rng.random() < .6: said.write_bytes(said.read_bytes()[:-rng.randrange(1, 40)]) # as if it had been in the middle of a line
    before = len(said.read_bytes().splitlines())
    assert before < 24*6 and shell(line.format(cut))[0] == 0
    assert said.read_bytes() == (whole/'rows.predictions.jsonl').read_bytes()
    assert tables(cut) == tables(whole) and len(tables(cut)) > 3

@forks
def test_leaking_texts_are_dropped_and_counted(shell, folder, tmp_path):
    known = 'Ada wrote it all in one go, and so it is as good as it can be now.'
    old = (known + ' And then some.', '2024'), ('It rains.', '2023')
    new = (known, '2025'), ('The moon has no light of its own, and what it shows us is borrowed from the sun.', '2024-06'), ('x'*90, '2025-01')
    for name,texts in (('train',old), ('test',new)):
        (tmp_path/f'{name}.jsonl').write_text('\n'.join(json.dumps(dict(text=t, date=d)) for t,d in texts))
    line = f'evaluate regenerate --data {tmp_path}/test.jsonl --maker none --model tiny --json - --check-leakage {tmp_path}/train.jsonl --length '
    def counts(length):
        row = json.loads(shell(line + length)[1])
        return row['n'], row['leakage']['dropped_sharing'], row['leakage']['dropped_not_later']
    assert counts('64') == (1, 1, 1) # the first shares its words, the second may be as old as the training text of 2024
    assert counts('32') == (2, 0, 1) # cut to 32 bytes, the first is another text

@forks
def test_train_and_resume(shell, folder, tmp_path):
    "A run that stopped after its second step and was resumed is the run that never stopped"
    line = 'train --stage pretrain --carrier kv --data texts.jsonl --model tiny -k 2 --rank 4 --length 8 24 --batch 2 ' \
           f'--steps 4 --save-every 2 --device cpu --out {tmp_path}/'
    code, out, err = shell(line + 'a --json')
    assert code == 0 and 'Traceback' not in err
    assert json.loads(out)['steps'] == 4
    shutil.copytree(tmp_path/'a', tmp_path/'b'); shutil.rmtree(tmp_path/'b'/'checkpoint-4')
    for f in ('config.json','trained.safetensors'): (tmp_path/'b'/f).unlink()
    assert shell(line + 'b --resume')[0] == 0
    a, b = (load_tensors(tmp_path/x/'trained.safetensors')[0] for x in 'ab')
    half = load_tensors(tmp_path/'a'/'checkpoint-2'/'trained.safetensors')[0]
    assert all(torch.equal(a[n], b[n]) for n in a) and not all(torch.equal(a[n], half[n]) for n in a)
    code, _, err = shell(line.replace('-k 2', '-k 3') + 'b --resume')
    refused(code, err, 'was started with k=2')

@forks
@pytest.mark.parametrize('more', ['--data qa.jsonl --mix-text texts.jsonl',
                                  '--cloze texts.jsonl --limit 2 --optimizer muon', '--data qa.jsonl --preset paper --checkpointing'])
def test_stage_2(shell, folder, tmp_path, more):
    start = '' if 'paper' in more else '--from kv'
    code, out, err = shell(f'train --stage finetune {start} --model tiny --length 8 120 --batch 2 --steps 2 '
                           f'--out {tmp_path}/qa --device cpu --json {more}')
    assert code == 0, err
    c = Compressor.from_pretrained(tmp_path/'qa', load_lm(folder/'tiny', 'cpu'))
    assert c.info['stage'] == 'finetune' and c.config.k == (16 if 'paper' in more else 4) and c.config.any_k == ('paper' not in more)

HEAL = 'heal --data rain.txt --model tiny -k 8 --steps 40 --batch 4 --length 48 --save-every 4 --device cpu --out '

@pytest.fixture(scope='module')
def healed(shell, tmp_path_factory):
    "The folder of a run that was not disturbed, and what was said at its end"
    out = tmp_path_factory.mktemp('heal')/'whole'
    code, said, err = shell(f'{HEAL}{out}')
    assert code == 0 and 'Traceback' not in err, err
    return out, said

@forks
def test_heal_and_measure(shell, folder, healed, tmp_path):
    "A learnt prompt lowers the perplexity of text like what it was learnt on; as a folder and as a file it is the same"
    out, said = healed
    first, last = map(float, re.search(r'loss (\S+) -> (\S+)', said).groups())
    assert last < first and f'evaluate perplexity --model tiny --prefix {out}/prefix.safetensors --data FILE' in said
    lm = load_lm(folder/'tiny', 'cpu')
    assert torch.equal(load_prefix(out/'prefix.safetensors', lm).keys, load_prompt(out, lm).bake().keys)
    (tmp_path/'test.txt').write_text('The plain in Spain stays mainly in the rain, and the rain stays mainly in Spain. '*10)
    rows = []
    for prefix in ('', f'--prefix {out}', f'--prefix {out}/prefix.safetensors'):
        code, line, err = shell(f'evaluate perplexity --data {tmp_path}/test.txt --window 100 --model tiny {prefix} --json {tmp_path}/p.json')
        assert code == 0 and err == '' and line.count('\n') == 1 and ('real tokens only' in line) == bool(prefix)
        rows.append(json.loads((tmp_path/'p.json').read_text()))
        assert f"{rows[-1]['ppl']:.3f} [{rows[-1]['ci'][0]:.3f}, {rows[-1]['ci'][1]:.3f}]" in line
    alone, by_folder, by_file = rows
    assert by_folder['ppl'] == by_file['ppl'] < alone['ppl']/2
    assert by_file['tokens'] == alone['tokens'] and (by_file['prefix']['slots'], alone['prefix']) == (8, None)
    assert by_file['prefix']['info']['files'][0]['file'] == 'rain.txt' and by_file['data'][0]['file'] == 'test.txt'
    assert {'command','commit','versions','device','model','fingerprint','architecture','window','stride','bos','nats_per_token'} <= set(alone)
    assert 'was learnt on rain.txt' in shell(f'evaluate perplexity --data rain.txt --limit 200 --prefix {out} --model tiny')[2]

@forks
def test_heal_killed_and_resumed(shell, folder, healed, tmp_path):
    "kill -9 in the middle, and --resume gives what the undisturbed run gave, to the bit; other options, text or model are refused"
    out, deadline = tmp_path/'killed', time.monotonic() + 3000
    p = shell.start(f'{HEAL}{out}')
    while not (out/'checkpoint-8'/'trainer_state.json').exists() and p.is_alive() and time.monotonic() < deadline: time.sleep(.002)
    os.kill(p.pid, signal.SIGKILL); p.join()
    assert p.exitcode == -signal.SIGKILL and not (out/'checkpoint-40').exists() and not (out/'config.json').exists()
    assert '--resume' in shell(f'evaluate perplexity --data rain.txt --prefix {out} --model tiny')[2] # it is no prompt yet
    (tmp_path/'rain.txt').write_text('Other rain. '*99)
    other = tiny_lm('llama', seed=1); other.model.save_pretrained(tmp_path/'tiny'); other.tokenizer.save_pretrained(tmp_path/'tiny')
    before = files(tmp_path)
    for change,message in ((('-k 8', '-k 9'), 'was started with k=8'), (('--steps 40', '--steps 40 --lr .1'), 'was started with rate=0.25'),
                           (('--data rain.txt', f'--data {tmp_path}/rain.txt'), "was started with data=[{'file': 'rain.txt'"),
                           (('--model tiny', f'--model {tmp_path}/tiny'), f'was started with model={load_lm(folder/"tiny", "cpu").fingerprint}')):
        refused(*shell(f'{HEAL.replace(*change)}{out} --resume')[::2], message)
    refused(*shell(f'{HEAL}{out}')[::2], 'exists and is not empty')
    assert files(tmp_path) == before
    assert shell(f'{HEAL}{out} --resume')[0] == 0
    for f in ('trained.safetensors', 'prefix.safetensors'):
        (a, about_a), (b, about_b) = (load_tensors(x/f) for x in (out, healed[0]))
        assert about_a == about_b and a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a), f
    end, almost = (load_tensors(out/x/'trained.safetensors')[0]['embeddings'] for x in ('', 'checkpoint-36'))
    assert not torch.equal(end, almost)

@forks
def test_heal_with_every_option(shell, folder, tmp_path):
    code, out, err = shell('heal --data rain.txt text.txt --validation rain.txt --model tiny --teacher tiny --distil .5 --init Spain -k 4 --steps 4 '
                           f'--batch 2 --length 32 --rate .1 --seed 3 --checkpointing --json --out {tmp_path}/soft')
    assert code == 0, err
    row = json.loads(out)
    assert (row['k'], row['started_from'], row['distil'], row['seed'], row['steps'], row['batch'], row['length']) == (4, 'Spain', .5, 3, 4, 2, 32)
    assert [f['file'] for f in row['files']] == ['rain.txt', 'text.txt'] and row['validation_loss'] > 0
    code, out, err = shell(f'heal --data rain.txt --model tiny --kind kv -k 4 --preset paper --steps 3 --quiet --out {tmp_path}/kv')
    assert code == 0 and 'loss' not in err and 'kv prompt of 4 rows, 3 steps' in out # --quiet
    assert load_prompt(tmp_path/'kv', load_lm(folder/'tiny', 'cpu')).info['length'] == 252 # the paper's 1,024 do not fit

@forks
def test_heal_with_an_absurd_rate(shell, folder, tmp_path):
    "It stops as soon as the loss is no number, and names a checkpoint that is there"
    code, out, err = shell(f"{HEAL.replace('--save-every 4', '--save-every 1')}{tmp_path}/wild --kind kv --lr 3e37")
    last = err.splitlines()[-1]
    assert code == 2 and out == '' and 'Traceback' not in err and re.match(r'promptcompress: error: The loss became nan at step \d+\. ', last)
    kept = Path(re.search(r'Checkpoint kept: (\S+)\. ', last)[1])
    assert kept.name.startswith('checkpoint-') and all(t.isfinite().all() for t in load_tensors(kept/'trained.safetensors')[0].values())
    assert not (tmp_path/'wild'/'config.json').exists() and not (tmp_path/'wild'/'prefix.safetensors').exists()

@forks
def test_demo_on_a_text_of_ones_own(shell, folder):
    code, out, err = shell('demo --model tiny --kv kv --icae embeds -k 4 1 --file text.txt --answer Ada --json', '--question', 'Who wrote it?')
    assert code == 0 and err == ''
    r = json.loads(out)
    assert [row['maker'] for row in r['rows']] == ['full context', 'KV k=4', 'KV k=1', 'ICAE k=4', 'ICAE k=1', 'no context']
    assert [row['slots'] for row in r['rows']] == [64, 4, 1, 4, 1, 0] and r['text'] == TEXT
    assert set(r['first_token_ms']) == {'full context', 'KV k=4', 'KV k=1'} and all(row['answers'] for row in r['rows'])

@forks
def test_shell_example_of_the_readme(tmp_path_factory, tmp_path):
    "Word for word, with the model that ships; tests/from_wheel.sh does it with the wheel, in a new environment"
    block = re.search(r'<!-- shell -->\n```sh\n(.*?)```', (root/'README.md').read_text(encoding='utf-8'), re.S)[1]
    name, text = re.search(r"cat > (\S+) <<'END'\n(.*?)END\n", block, re.S).groups()
    (tmp_path/name).write_text(text)
    shell, said = Shell(tmp_path, tmp_path_factory.mktemp('streams')), []
    for line in block.splitlines():
        if not line.startswith('promptcompress '): continue
        code, out, err = shell('', *shlex.split(line)[1:])
        assert code == 0 and err == '' and out.strip(), line
        said.append(out)
    assert len(said) == 3 and len(said[2].splitlines()) == 2

# --- help, interruption, bugs ----------------------------------------------------------------------------------------

def test_help_is_quick_and_complete(folder):
    start = time.perf_counter()
    p = cold('--help', folder)
    assert p.returncode == 0 and time.perf_counter() - start < 5 # it is 0.1 s on an idle machine; importing torch takes several
    heavy = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'promptcompress.cli', '--help'],
                           capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(root)))
    assert not re.search(r'\| +(torch|numpy|transformers)$', heavy.stderr, re.M)
    for name in cli.VERBS: assert re.search(rf'^    {name.split()[0]}\b', p.stdout, re.M)

def test_ctrl_c_is_130(monkeypatch, capsys):
    def stop(args): raise KeyboardInterrupt
    for verb,line in (('demo','demo'), ('train','train --stage pretrain --data x --out y')):
        monkeypatch.setitem(cli.VERBS[verb], 'run', stop)
        assert cli.main(line.split()) == 130
    assert capsys.readouterr().err.splitlines()[0] == 'promptcompress: interrupted'

def test_a_bug_keeps_its_traceback(monkeypatch):
    def bug(args): raise IndexError('list index out of range')
    monkeypatch.setitem(cli.VERBS['demo'], 'run', bug)
    with pytest.raises(IndexError): cli.main(['demo'])
