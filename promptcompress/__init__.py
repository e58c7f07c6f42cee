"Cheaper large language models: compress the prompt, compress the model, heal it with a soft prompt"
import importlib

__version__ = "0.1.0"
_WHERE = dict( # public name -> module; imported on first use, so that `import promptcompress` takes milliseconds
    load_lm='lm', LM='lm', tiny_lm='lm', KVPrefix='kv.prefix', load_prefix='kv.prefix', generate='kv.generate', regenerate='kv.generate', nll='kv.generate', ask='kv.ask', Conversation='conversation',
    MAKERS='kv.makers', Maker='kv.makers', make_maker='kv.makers', Compressor='kv.compressor', CompressorConfig='kv.compressor',
    TextExamples='kv.compressor', QAExamples='kv.compressor', fit='train', training_args='train', read_texts='data', read_qa='data', read_choice='corpora', load_corpus='corpora', write_qa='qa_chat',
    text_set='evaluation.items', qa_set='evaluation.items', evaluate_regeneration='evaluation.qa', evaluate_qa='evaluation.qa', sweep='evaluation.qa', evaluate_choice='evaluation.zeroshot',
    measure_cost='evaluation.cost', report='evaluation.report', perplexity='evaluation.perplexity', Recipe='weights.recipe', compress_weights='weights.walk', to_dense='weights.packed',
    save_gptq='weights.store', shrink='weights.shrink', SoftPrompt='soft.prompt', KVPrompt='soft.prompt', load_prompt='soft.prompt', hard_prompt='soft.prompt',
    tune_soft_prompt='soft.tune', transfer_matrix='soft.transfer', heat_map='soft.transfer', ablate='soft.ablation', eora='weights.lowrank', Playground='playground', PromptCompressError='core', InputError='core', StateError='core')
__all__ = [*_WHERE]

def __getattr__(name):
    if name not in _WHERE: raise AttributeError(f"module 'promptcompress' has no attribute '{name}'")
    if name in ('MAKERS', 'make_maker'):
        for m in ('kv.compressor', 'soft.prompt', 'instruct'): importlib.import_module(f'promptcompress.{m}') # whose makers have rows in the table
    globals()[name] = value = getattr(importlib.import_module(f'promptcompress.{_WHERE[name]}'), name)
    return value

def __dir__(): return sorted({*globals(), *_WHERE})
