"A training run in a process of its own, for test_training.py: on several processes, killed, resumed"
import os, signal, sys
from pathlib import Path
import torch
from transformers import TrainerCallback
from promptcompress.kv.compressor import Compressor, CompressorConfig, TextExamples
from promptcompress.lm import tiny_lm
from promptcompress.train import LearnerTrainer, fit, training_args

words = 'the frozen model reads four slots of keys and values and says the text again word for word'.split()
# Two short texts, two long ones, and so on: two processes with two texts each never have the same number of labels
texts = [' '.join(words[(i + j) % len(words)] for j in range(2 if i % 4 < 2 else 14)) for i in range(24)]

def learner(carrier, **config): return Compressor(tiny_lm('llama'), CompressorConfig(carrier=carrier, k=4, r=4, **config))
def examples(c): return TextExamples(texts, c.lm, c.config, length=(6, 80))

def die(): os.kill(os.getpid(), signal.SIGKILL) # no exception, no `finally`, no chance to tidy up

class Kill(TrainerCallback):
    "End the process after seven steps"
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7: die()

class HalfSaved(LearnerTrainer):
    "End the process while it writes its second checkpoint"
    def _save_rng_state(self, output_dir): die() if self.state.global_step == 10 else super()._save_rng_state(output_dir)

def run(out, carrier, batch=4, resume=False, callbacks=(), dropout=0., **options):
    "Twelve steps of stage 1, with a checkpoint at 5, 10 and 12: the learner and its loss curve"
    torch.set_num_threads(1)
    c = learner(carrier, dropout=dropout)
    args = training_args(out, 12, lr=5e-3, batch=batch, warmup=2, use_cpu=True, report_to='none', seed=1, logging_steps=1, save_steps=5, **options)
    return c, fit(c, examples(c), args, resume=resume, callbacks=callbacks)

if __name__ == '__main__':
    job, out = sys.argv[1], Path(sys.argv[2])
    if job == 'half a batch': # per process
        run(out/'kv', 'kv', batch=2, train_sampling_strategy='sequential')
        run(out/'embeds', 'embeds', batch=2)
    elif job == 'killed': run(out, 'kv', dropout=.1, callbacks=[Kill()])
    elif job == 'killed while saving':
        import promptcompress.train
        promptcompress.train.LearnerTrainer = HalfSaved
        run(out, 'kv', dropout=.1)
