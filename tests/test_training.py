"Training as it is really run: on two processes, killed, resumed"
import json, os, signal, socket, subprocess, sys
from pathlib import Path
import pytest, torch
from promptcompress.core import load_tensors
from promptcompress.train import training_args
import training_run as tr # from this folder

here = Path(__file__).parent

def start(*args):
    "Run `args` with this interpreter and the checkout on its path"
    env = os.environ | dict(PYTHONPATH=str(here.parent), OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=env, timeout=500)

def curve(folder): return [json.loads(l) for l in (folder/'log.jsonl').read_text().splitlines()]
def weights(c): return {n: p.detach() for n,p in c.trained().items()}

# --- two processes ---------------------------------------------------------------------------------------------------
# accelerate shards batches, not examples: of the batches that one process would see, with half the batch size, process p
# takes number 2i+p at step i. Together these are the examples that one process with the whole batch size takes at step i,
# in sequential order and in random order alike (the order comes from the seed, which all processes share), as long as
# the number of examples is a multiple of the whole batch.
#
# `accelerate launch --cpu --num_processes 2` starts one process only, without saying so, unless it finds MPI (accelerate
# 1.15). With --multi_gpu it starts two, and `use_cpu` in the training arguments makes them talk through gloo.

@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp('two')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    p = start('-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', 2, '--num_machines', 1, '--mixed_precision', 'no',
              '--dynamo_backend', 'no', '--main_process_port', port, here/'training_run.py', 'half a batch', out)
    assert p.returncode == 0, p.stdout + p.stderr
    return out

@pytest.mark.parametrize('carrier,order', [('kv','sequential'), ('embeds','random')])
def test_two_processes_are_one_with_twice_the_batch(two_processes, tmp_path, carrier, order):
    "Loss curve, gradient norms and trained weights; and nothing relies on DDP's search for unused parameters"
    assert training_args(tmp_path, 1).ddp_find_unused_parameters is False
    c, one = tr.run(tmp_path/'one', carrier, train_sampling_strategy=order)
    two = curve(two_processes/carrier)
    assert (two_processes/carrier/'checkpoint-12/rng_state_1.pth').exists(), 'there was no second process'
    assert len(one) == len(two) == 12
    for a,b in zip(one, two):
        assert a['loss'] == pytest.approx(b['loss'], abs=1e-4) and a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-2)
    saved, _ = load_tensors(two_processes/carrier/'checkpoint-12/trained.safetensors')
    for n,p in weights(c).items(): torch.testing.assert_close(saved[n], p, atol=2e-3, rtol=0)
    assert one[-1]['loss'] < one[0]['loss'] - .2

def test_a_mean_of_means_would_be_seen(two_processes):
    "At the first two steps (the first has a learning rate of 0): the logged loss is that of all labels, and not the mean of the two processes' losses"
    c = tr.learner('kv'); ds = tr.examples(c)
    def loss(*at):
        with torch.no_grad(): return c(**c.collate([ds[i] for i in at]))['loss'].item()
    logged = [r['loss'] for r in curve(two_processes/'kv')[:2]]
    assert logged == pytest.approx([loss(0, 1, 2, 3), loss(4, 5, 6, 7)], abs=1e-4)
    assert max(abs(a - b) for a,b in zip(logged, [(loss(0, 1) + loss(2, 3))/2, (loss(4, 5) + loss(6, 7))/2])) > .02

# --- kill -9 ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory): return tr.run(tmp_path_factory.mktemp('whole')/'run', 'kv', dropout=.1)

@pytest.mark.parametrize('job,left', [('killed', ['checkpoint-5']), ('killed while saving', ['checkpoint-10', 'checkpoint-5'])])
def test_killed_and_resumed(uninterrupted, tmp_path, job, left):
    "The same weights, to the bit, as without the kill; dropout shows that the random state is resumed too"
    whole, whole_curve = uninterrupted
    p = start(here/'training_run.py', job, tmp_path)
    assert p.returncode == -signal.SIGKILL, p.stdout + p.stderr
    assert sorted(d.name for d in tmp_path.glob('checkpoint-*')) == left
    again, again_curve = tr.run(tmp_path, 'kv', dropout=.1, resume=True)
    for n,p in weights(whole).items(): assert torch.equal(weights(again)[n], p), n
    assert [r['loss'] for r in again_curve] == [r['loss'] for r in whole_curve]

# --- checkpoints -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('carrier', ['kv','embeds'])
def test_checkpoints_hold_what_was_trained(tmp_path, carrier):
    c, _ = tr.run(tmp_path, carrier)
    folder = tmp_path/'checkpoint-12'
    saved, _ = load_tensors(folder/'trained.safetensors', kind='learner')
    assert saved.keys() == c.trained().keys()
    frozen = {p.data_ptr() for p in c.lm.model.parameters()}
    assert not frozen & {p.data_ptr() for p in c.trained().values()}
    n = sum(p.nbytes for p in c.trained().values())
    assert (folder/'trained.safetensors').stat().st_size < n + 20_000 # names and shapes
    assert sum(f.stat().st_size for f in folder.iterdir()) < 3*n + 120_000 # and AdamW's two moments, and the log

# --- a notebook ------------------------------------------------------------------------------------------------------

cell = """
import contextlib, sys
import training_run as tr
from promptcompress import train
from_the_start = train.LiveCurve.__init__
train.LiveCurve.__init__ = lambda self, every=0, ask=None: from_the_start(self, every, ask) # draw at each log
with contextlib.redirect_stdout(sys.stderr): tr.run('command', 'kv')
drawn = 'seaborn' in sys.modules
print(len(tr.run('cell', 'kv', disable_tqdm=False)[1]), drawn)
"""

def test_a_kernel_shows_one_picture_that_changes(tmp_path):
    "A real kernel: one output, replaced at each log, and none of the lines or the table that Trainer would print; a command's training, sent to stderr, draws nothing"
    manager = pytest.importorskip('jupyter_client.manager'); pytest.importorskip('ipykernel')
    env = os.environ | dict(PYTHONPATH=f'{here.parent}:{here}', OMP_NUM_THREADS='1'); env.pop('MPLBACKEND', None)
    kernel = manager.KernelManager(); kernel.start_kernel(env=env, cwd=tmp_path)
    client = kernel.client(); client.start_channels(); client.wait_for_ready(timeout=300)
    got = []
    try: reply = client.execute_interactive(cell, output_hook=got.append, timeout=500)
    finally: client.stop_channels(); kernel.shutdown_kernel(now=True)
    assert reply['content']['status'] == 'ok', reply['content']
    pictures = [m for m in got if m['msg_type'] in ('display_data', 'update_display_data')]
    assert [m['msg_type'] for m in pictures] == ['display_data'] + ['update_display_data']*11
    assert len({m['content']['transient']['display_id'] for m in pictures}) == 1 and all('image/png' in m['content']['data'] for m in pictures)
    assert ''.join(m['content']['text'] for m in got if m['msg_type'] == 'stream' and m['content']['name'] == 'stdout') == '12 False\n'
