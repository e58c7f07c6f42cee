"""Every causal family of transformers, as a random model of some 100,000 parameters: what this library can do with it.

    python tests/families.py                 # try them all, write results/families.json (some five minutes)
    python tests/families.py gemma3 mamba    # try some and renew their rows
"""
import inspect, json, re, sys, tempfile, warnings
from pathlib import Path
import torch, transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from promptcompress.core import InputError, read_json, write_json
from promptcompress.kv.compressor import Compressor, CompressorConfig, example
from promptcompress.kv.generate import generate, nll
from promptcompress.kv.prefix import load_prefix, read
from promptcompress.lm import LM, byte_tokenizer, load_lm
from promptcompress.soft.prompt import SoftPrompt
from promptcompress.weights.recipe import Recipe
from promptcompress.weights.shrink import shrink
from promptcompress.weights.walk import compress_weights

TABLE = Path(__file__).parent.parent/'results'/'families.json'
_NAMES = { # size -> what configurations call it
    64: 'hidden_size n_embd d_model dim model_dim embed_dim embedding_size word_embed_proj_dim decoder_hidden_size',
    96: 'intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim moe_intermediate_size shared_expert_intermediate_size ffn_hidden_size dim_ff shared_intermediate_size dff intermediate_size_mlp',
    2: 'num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers num_key_value_heads num_kv_heads n_kv_heads attn_num_key_value_heads num_attention_groups num_experts_per_tok moe_topk num_experts_per_token top_k moe_top_k',
    4: 'num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads num_linear_heads num_local_experts num_experts n_routed_experts moe_num_experts',
    16: 'head_dim kv_channels attention_head_dim swa_head_dim v_head_dim qk_head_dim global_head_dim q_lora_rank kv_lora_rank qk_nope_head_dim d_kv linear_key_head_dim linear_value_head_dim mamba_d_head mamba_headdim mamba_head_dim ssm_head_dim',
    8: 'rotary_dim qk_rope_head_dim state_size mamba_d_state ssm_state_size d_state index_head_dim mamba_n_heads',
    256: 'max_position_embeddings n_positions max_seq_len seq_length n_ctx max_sequence_length max_target_positions max_source_positions original_max_position_embeddings',
    260: 'vocab_size vocab_size_per_layer_input', 32: 'hidden_size_per_layer_input', 0: 'bos_token_id', 1: 'eos_token_id'}
SMALL = {name: size for size,names in _NAMES.items() for name in names.split()} | dict(pad_token_id=2, use_mamba_kernels=False, initializer_range=.1, init_std=.1)
OWN = dict(gpt_neo=dict(attention_types=[[['global', 'local'], 1]]), gemma3n_text=dict(num_kv_shared_layers=0), gemma4_text=dict(num_kv_shared_layers=0, global_head_dim=16, num_global_key_value_heads=2), lfm2_moe=dict(layer_types=['conv', 'full_attention'], num_dense_layers=1),
           falcon_h1=dict(mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1), zamba2=dict(layer_types=['mamba', 'hybrid']), zamba=dict(layer_types=['mamba', 'hybrid']), reformer=dict(axial_pos_embds_dim=[32, 32], axial_pos_shape=[16, 16]),
           zaya=dict(num_experts_per_tok=1),
           mamba2=dict(num_heads=8, head_dim=16), falcon=dict(multi_query=True, new_decoder_architecture=False, alibi=False), jamba=dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1))

def settings(cls)->dict:
    "Small values for the sizes that a configuration has, those of its parts among them"
    c = cls()
    names = {*inspect.signature(cls.__init__).parameters, *c.to_dict(), *getattr(cls, 'attribute_map', {})}
    def has(k): # some sizes differ from layer to layer and can't be asked for
        try: return getattr(c, k, None)
        except Exception: return None
    out = {k: v for k,v in SMALL.items() if k in names and not isinstance(has(k), (list, dict))}
    if 'qk_rope_head_dim' in names: out.pop('head_dim', None); out |= dict(num_key_value_heads=4) # latent attention: a key for every head
    for k in getattr(cls, 'sub_configs', None) or {}:
        if hasattr(type(getattr(c, k, None)), 'model_type'):
            try: out[k] = settings(type(getattr(c, k)))
            except Exception: pass
    return out | OWN.get(cls.model_type, {})

def tiny(family):
    "A random model of the family; anything may be raised by those that have no small sizes"
    warnings.filterwarnings('ignore'); transformers.logging.set_verbosity_error()
    config = CONFIG_MAPPING[family](**settings(CONFIG_MAPPING[family]))
    config.is_decoder = True
    with torch.device('meta'): n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if n > 2e7: raise ValueError(f'{n/1e6:.0f} M parameters')
    torch.manual_seed(0)
    return LM(AutoModelForCausalLM.from_config(config).float(), byte_tokenizer(), f'tiny {family}')

def close(a, b, tol, what):
    if not abs(a - b) <= tol: raise AssertionError(f'{what}: {a:.5f} for {b:.5f}')

# --- what is tried: each returns None, or a word to add, or raises ---------------------------------------------------

def rows(n=14): return torch.randint(3, 250, (2, n), generator=torch.Generator().manual_seed(1))
UNSHIFTED = {'bart','bigbird_pegasus','blenderbot','blenderbot-small','marian','mbart','mvp','pegasus','plbart','trocr','whisper'} # decoders of encoder-decoders: their own loss compares each token with itself

def losses(lm):
    "The loss of transformers, and that of the same tokens behind a prefix"
    x = rows(); labels = x.clone(); labels[:,0] = -100
    with torch.no_grad():
        try: own = lm.model(input_ids=x, labels=x)
        except ValueError: own = lm.model(input_ids=x) # a model of pictures, whose own loss needs one
    logits = own.logits.float()
    def by_hand(shift): return torch.nn.functional.cross_entropy(logits[:,:-1 if shift else None].flatten(0, 1), x[:,1 if shift else 0:].flatten()).item()
    if getattr(own, 'loss', None) is not None and own.loss.isfinite(): close(own.loss.item(), by_hand(lm.family not in UNSHIFTED), 1e-4, "transformers' own loss")
    close(nll(lm, None, x, labels).mean.item(), by_hand(True), 1e-4, 'loss')
    q, labels = x[:,9:], x[:,9:].clone(); labels[:,0] = -100
    wanted = torch.nn.functional.cross_entropy(logits[:,9:-1].flatten(0, 1), q[:,1:].flatten()).item()
    close(nll(lm, read(lm, x[:,:9].tolist()), q, labels).mean.item(), wanted, 1e-4, 'loss behind a prefix')

def writes(lm):
    "Greedy text behind prefixes of several lengths is what transformers writes behind the whole text"
    a, b = rows(); docs, asked = [a[:9].tolist(), b[:5].tolist()], [a[9:].tolist(), b[5:8].tolist()]
    def alone(d, q): return generate(lm, None, d + q, 6, ids=True, eos_token_id=None).tolist()
    truth = [alone(d, q) for d,q in zip(docs, asked)]
    x = torch.tensor([docs[0] + asked[0]])
    config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=2)
    lm.model.generation_config = transformers.GenerationConfig()
    assert lm.model.generate(input_ids=x, attention_mask=torch.ones_like(x), generation_config=config)[0, x.shape[1]:].tolist() == truth[0], 'not what transformers writes'
    assert [generate(lm, read(lm, [d])[0], q, 6, ids=True, eos_token_id=None).tolist() for d,q in zip(docs, asked)] == truth, 'not the text behind the whole'
    if not lm.pads: return 'rows of one length'
    assert [t.tolist() for t in generate(lm, read(lm, docs), asked, 6, ids=True, eos_token_id=None)] == truth, 'another text in a batch'

def stored(lm):
    p, = read(lm, [rows()[0,:9].tolist()])
    with tempfile.TemporaryDirectory() as d: assert load_prefix(p.save(Path(d)/'p.safetensors'), lm) == p, 'another prefix in the file'
    return None if lm.inv_freq is not None else 'stays where it was made'

def compressed(lm):
    "A step of training, and a prefix that the model reads on behind"
    c = Compressor(lm, CompressorConfig(k=2, r=2, max_tokens=32))
    c.train(); c(**c.collate([example(r[:8].tolist(), [0], r[:8].tolist() + [1], 2) for r in rows()]))['loss'].backward(); c.eval()
    grads = [p.grad for p in c.trained().values() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads), 'no gradients'
    p = c.compress('Ada wrote.'); generate(lm, p, 'Who?', 2)
    assert len(p) == 2

def shrunk(lm):
    "Half of the weights pruned and the rest in 4 bits, in memory and from a folder"
    recipe = Recipe(sparsity=.5, bits=4, group=16)
    small, x = compress_weights(lm, recipe, torch.randint(3, 250, (8, 32), generator=torch.Generator().manual_seed(0))), rows()
    with torch.no_grad(): assert small.model(input_ids=x).logits.isfinite().all(), 'logits that are not finite'
    with tempfile.TemporaryDirectory() as d:
        lm.model.save_pretrained(f'{d}/lm'); lm.tokenizer.save_pretrained(f'{d}/lm')
        shrink(f'{d}/lm', Recipe(bits=4, group=16, method='rtn'), None, f'{d}/small')
        with torch.no_grad(): assert load_lm(f'{d}/small').model(input_ids=x).logits.isfinite().all(), 'logits from the folder that are not finite'

def healed(lm):
    "The loss behind a learnt prompt is the model's own behind those vectors"
    x, prompt = rows(), SoftPrompt(lm, 2)
    labels = x.clone(); labels[:,0] = -100
    loss = prompt(x, torch.ones_like(x, dtype=torch.bool), labels)['loss']; loss.backward()
    with torch.no_grad(): logits = lm.model(**prompt.prepend(x)[0]).logits.float()[:,2:-1]
    close(loss.item(), torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:,1:].flatten()).item(), 1e-4, 'loss behind a prompt')

COLUMNS = dict(loss=losses, write=writes, prefix=stored, compress=compressed, shrink=shrunk, heal=healed)

def short(e): return re.sub(rf'{tempfile.gettempdir()}/\w+/', '', ' '.join(str(e).replace('tiny ', '', 1).split())) # without where it lay

def tried(family, columns=COLUMNS)->dict: # column -> 'yes', 'yes: ...', 'no: ...' (refused in one line) or 'FAULT: ...'; None if there is no small model
    "One row of the table"
    try: lm = tiny(family)
    except Exception as e: return None
    row = dict(family=family)
    try: lm.sizes
    except InputError as e: return row | dict(refused=short(e))
    for name in columns:
        try: lm = tiny(family); said = COLUMNS[name](lm); row[name] = 'yes' if said is None else f'yes: {said}'
        except InputError as e: row[name] = f'no: {short(e)}'
        except Exception as e: row[name] = f'FAULT: {type(e).__name__}: {short(e)[:160]}'
    return row

def main(names):
    "Try the families (all, if none is named) and renew their rows in the table"
    rows, skipped = {}, []
    if names: known = read_json(TABLE); rows, skipped = {r['family']: r for r in known['rows']}, [f for f in known['skipped'] if f not in names]
    for f in names or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        row = tried(f)
        if row is None: skipped.append(f); rows.pop(f, None)
        else: rows[f] = row
        if names or 'FAULT' in str(row): print(json.dumps(row or f'{f}: no small model'), flush=True)
    write_json(TABLE, dict(transformers=transformers.__version__, rows=[rows[f] for f in sorted(rows)], skipped=sorted(skipped)))

if __name__ == '__main__': main(sys.argv[1:])
