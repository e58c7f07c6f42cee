"What users saw go wrong in training: the last model instead of the best, options that crash, weights that are no numbers, a log that repeats itself"
import json, warnings
import pytest, torch
from torch import nn
from promptcompress.core import InputError, StateError, append_result
from promptcompress.kv.compressor import Compressor, CompressorConfig, TextExamples
from promptcompress.lm import tiny_lm
from promptcompress.train import Learner, fit, last_checkpoint, training_args

quiet = dict(disable_tqdm=True, report_to=[], use_cpu=True)

class Falls(Learner):
    "Falls by steps of a quarter in training; its validation loss is least at 0; becomes NaN at step `breaks`"
    def __init__(self, breaks=None): super().__init__(); self.w, self.n, self.breaks = nn.Parameter(torch.ones(1)), 0, breaks
    def forward(self, x, labels=None, num_items_in_batch=None):
        self.n += self.training
        return dict(loss=self.w.sum()*(float('nan') if self.training and self.breaks and self.n >= self.breaks else 1) if self.training else (self.w**2).sum())
    def collate(self, rows): return dict(x=torch.tensor(rows), labels=torch.tensor(rows))

def args(out, steps=8, **kw): return training_args(out, steps, lr=.25, batch=2, warmup=0, lr_scheduler_type='constant', **{**dict(optim='sgd'), **kw}, **quiet)

def test_the_best_model_is_the_one_that_is_loaded(tmp_path):
    learner, each = Falls(), dict(eval_strategy='steps', eval_steps=1, save_steps=1, logging_steps=1)
    curve = fit(learner, [0]*32, args(tmp_path, load_best_model_at_end=True, **each), eval_dataset=[0, 0])
    assert learner.w.item()**2 == pytest.approx(min(r['eval_loss'] for r in curve if 'eval_loss' in r), abs=1e-6)

@pytest.mark.parametrize('option', [dict(label_smoothing_factor=.1), dict(neftune_noise_alpha=5.)], ids=lambda o: next(iter(o)))
def test_options_that_a_learner_has_no_place_for_are_refused_by_name(tmp_path, option):
    lm, c = tiny_lm(), CompressorConfig(k=2, r=2)
    with pytest.raises(InputError, match=next(iter(option))): fit(Compressor(lm, c), TextExamples(['Ada wrote the first program.'], lm, c), args(tmp_path, 1, **option))

@pytest.mark.parametrize('logging, saves', [(1, 100), (100, 100), (100, 2)], ids=['logged','never logged','saved before'])
def test_a_training_that_became_nan_leaves_the_last_finite_weights(tmp_path, logging, saves):
    learner = Falls(breaks=4)
    with pytest.raises(StateError): fit(learner, [0]*32, args(tmp_path, logging_steps=logging, save_steps=saves, max_grad_norm=0.))
    assert torch.isfinite(learner.w).all()
    if saves == 2: assert learner.w.item() == pytest.approx(1 - 2*.25) and last_checkpoint(tmp_path).name == 'checkpoint-2'
    else: assert learner.w.item() == 1 and last_checkpoint(tmp_path) is None

@pytest.mark.parametrize('dtype', [None, torch.float16])
def test_numbers_that_are_none_are_not_saved(tmp_path, dtype):
    c = Compressor(tiny_lm(), CompressorConfig(k=2, r=2))
    next(iter(c.trained().values())).data.fill_(float('nan') if dtype is None else 1e6) # too large for 16 bits
    with pytest.raises(StateError, match='not saved'): c.save_pretrained(tmp_path/'c', dtype=dtype)
    assert not (tmp_path/'c'/'trained.safetensors').exists()

def test_the_log_has_one_row_a_step_after_a_resume(tmp_path):
    fit(Falls(), [0]*64, args(tmp_path, 4, logging_steps=1, save_steps=2))
    for step in (5, 6): append_result(tmp_path/'log.jsonl', dict(step=step, loss=9.)) # done after the last checkpoint, then killed,
    with open(tmp_path/'log.jsonl', 'a') as f: f.write('{"step": 7, "lo') # in the middle of a line
    fit(Falls(), [0]*64, args(tmp_path, 8, logging_steps=1, save_steps=2), resume=True)
    rows = [json.loads(l) for l in (tmp_path/'log.jsonl').read_text().splitlines()]
    assert [r['step'] for r in rows] == [*range(1, 9)] and 9. not in [r['loss'] for r in rows]

@pytest.mark.parametrize('share', [0., .3, .99])
def test_a_damaged_checkpoint_is_passed_over_with_a_line_that_says_so(tmp_path, share):
    fit(Falls(), [0]*64, args(tmp_path, 4, save_steps=2))
    for f in sorted((tmp_path/'checkpoint-4').iterdir()):
        if f.name in ('training_args.bin',): continue
        whole = f.read_bytes(); f.write_bytes(whole[:int(len(whole)*share)])
        with pytest.warns(UserWarning, match='is damaged'): assert last_checkpoint(tmp_path).name == 'checkpoint-2', f.name
        f.write_bytes(whole)
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert last_checkpoint(tmp_path).name == 'checkpoint-4'

def test_a_folder_beside_the_checkpoints_is_none_of_them_and_a_foreign_row_is_no_row(tmp_path):
    fit(Falls(), [0]*64, args(tmp_path, 4, logging_steps=1, save_steps=2))
    (tmp_path/'checkpoint-9-old').mkdir(); append_result(tmp_path/'log.jsonl', dict(step='five', loss=1.))
    assert last_checkpoint(tmp_path).name == 'checkpoint-4'
    fit(Falls(), [0]*64, args(tmp_path, 6, logging_steps=1, save_steps=2), resume=True)
    assert [json.loads(l)['step'] for l in (tmp_path/'log.jsonl').read_text().splitlines()] == [*range(1, 7)]

def test_a_file_of_numbers_that_are_none_is_not_loaded(tmp_path):
    from promptcompress.core import save_tensors
    save_tensors(tmp_path/'trained.safetensors', dict(w=torch.tensor([float('nan')])), dict(kind='learner', learner='Falls'))
    with pytest.raises(InputError, match='not finite'): Falls().load_trained(tmp_path)
