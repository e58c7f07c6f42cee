"What users saw go wrong with shrunken models, each on its smallest input: formats, heads, shards, modes, zeros, blocks that return tuples"
import json, os
from pathlib import Path
import pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from promptcompress.core import InputError
from promptcompress.lm import LM, byte_tokenizer, load_lm, tiny_lm
from promptcompress.weights.hessian import fast_products
from promptcompress.weights.recipe import Recipe
from promptcompress.weights.shrink import shrink
from promptcompress.weights.store import save_gptq
from promptcompress.weights.walk import compress_weights

w4 = Recipe(bits=4, group=32, method='rtn')
def ids(n=16, rows=8): return torch.randint(3, 259, (rows, n), generator=torch.Generator().manual_seed(0))

def saved(lm, folder, dtype=torch.float32):
    lm.model.to(dtype).save_pretrained(folder); lm.tokenizer.save_pretrained(folder)
    return Path(folder)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize('recipe', [w4, Recipe(.5, method='magnitude'), Recipe('2:4', 4, group=32)], ids=str)
def test_what_is_not_packed_stays_in_the_sources_format_and_sizes_are_those_of_the_file(tmp_path, dtype, recipe):
    folder = saved(tiny_lm(), tmp_path/'source', dtype)
    report, _ = shrink(folder, recipe, ids() if recipe.method == 'obs' else None, tmp_path/'small')
    file = tmp_path/'small'/'model.safetensors'
    with safe_open(file, 'pt') as f: kinds = {f.get_tensor(k).dtype for k in f.keys()}
    assert kinds - {torch.int32, torch.float16} <= {dtype} and dtype in kinds
    assert json.loads((tmp_path/'small'/'config.json').read_text())['dtype'] == str(dtype)[6:]
    assert report.sizes['total']['stored'] == file.stat().st_size and json.loads((tmp_path/'small'/'compression.json').read_text())['total']['stored'] == file.stat().st_size
    assert all(p.stat().st_mode & 0o777 == 0o666 & ~_umask() for p in (tmp_path/'small').iterdir()) # open as the user's umask says

def _umask(): mask = os.umask(0); os.umask(mask); return mask

@pytest.mark.parametrize('how', ['shrink','gptq','load'])
@pytest.mark.parametrize('family', ['llama','qwen3','phi3'])
def test_a_head_of_its_own_is_kept_though_the_config_says_tied(tmp_path, how, family):
    lm = tiny_lm(family, tie_word_embeddings=True)
    folder = tmp_path/'tied'
    if how == 'gptq': save_gptq(compress_weights(lm, w4, None), folder)
    else: saved(lm, folder)
    t = load_file(folder/'model.safetensors'); t['lm_head.weight'] = torch.full_like(t['model.embed_tokens.weight'], .5)
    save_file(t, folder/'model.safetensors', metadata={'format': 'pt'})
    if how == 'shrink': shrink(folder, w4, None, tmp_path/'small'); folder = tmp_path/'small'
    got = load_lm(folder, 'cpu')
    assert torch.equal(got.head.weight, t['lm_head.weight']) and not torch.equal(got.embed.weight, got.head.weight)

def test_a_head_that_equals_the_embeddings_stays_tied(tmp_path):
    folder = saved(tiny_lm(tie_word_embeddings=True), tmp_path/'tied')
    t = load_file(folder/'model.safetensors'); t['lm_head.weight'] = t['model.embed_tokens.weight'].clone()
    save_file(t, folder/'model.safetensors', metadata={'format': 'pt'})
    shrink(folder, w4, None, tmp_path/'small')
    assert json.loads((tmp_path/'small'/'config.json').read_text())['tie_word_embeddings'] and 'lm_head.weight' not in load_file(tmp_path/'small'/'model.safetensors')

@pytest.mark.parametrize('read', ['gptq','shrink'])
def test_of_a_tensor_in_two_shards_the_index_decides(tmp_path, read):
    folder = tmp_path/'two'
    if read == 'gptq': save_gptq(compress_weights(tiny_lm(), w4, None), folder)
    else: saved(tiny_lm(), folder)
    t, name = load_file(folder/'model.safetensors'), 'model.embed_tokens.weight'
    (folder/'model.safetensors').unlink()
    files = dict(a='model-00001-of-00002.safetensors', b='model-00002-of-00002.safetensors')
    late = {k: v for k,v in t.items() if '.layers.2.' in k}
    save_file({k: v for k,v in t.items() if k not in late}, folder/files['a']); save_file(late | {name: torch.zeros_like(t[name])}, folder/files['b'])
    (folder/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map={k: files['b' if k in late else 'a'] for k in t})))
    if read == 'shrink': shrink(folder, w4, None, tmp_path/'small'); folder = tmp_path/'small'
    assert torch.equal(load_lm(folder, 'cpu').embed.weight, t[name])
    for bad in ('{}', '{"weight_map": {"x": "../y"}}', '[]'):
        (tmp_path/'two'/'model.safetensors.index.json').write_text(bad)
        with pytest.raises(InputError): shrink(tmp_path/'two', w4, None, tmp_path/'again') if read == 'shrink' else load_lm(folder, 'cpu')

def test_a_stray_file_beside_the_model_is_no_matter(tmp_path):
    folder = tmp_path/'stray'; save_gptq(compress_weights(tiny_lm(), w4, None), folder)
    save_file(dict(x=torch.zeros(1)), folder/'notes.safetensors')
    load_lm(folder, 'cpu'); saved(tiny_lm(), tmp_path/'plain'); save_file(dict(x=torch.zeros(1)), tmp_path/'plain'/'doc.safetensors')
    shrink(tmp_path/'plain', w4, None, tmp_path/'small')

@pytest.mark.parametrize('first', [.5, '2:4'])
@pytest.mark.parametrize('second', [Recipe(bits=4, group=32), Recipe(bits=3, group=32), w4, Recipe(.6, 4, group=32)], ids=str)
def test_zeros_of_an_earlier_run_are_held_and_the_pattern_is_reported(first, second):
    a = compress_weights(tiny_lm(), Recipe(first), ids())
    b = compress_weights(a, second, ids() if second.method == 'obs' else None)
    for n,m in a.model.named_modules():
        if isinstance(m, torch.nn.Linear) and m is not a.head: assert (b.model.get_submodule(n).dense()[m.weight == 0] == 0).all(), n
    assert {r['pattern'] for r in a.report.rows} == {'2:4' if first == '2:4' else None}
    if first == '2:4': assert {r['pattern'] for r in b.report.rows} == {'2:4'}

@pytest.mark.parametrize('family,config', [('gptj', dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=256)), ('codegen', dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=256)),
                                           ('bloom', dict(hidden_size=64, n_layer=2, n_head=4)), ('gptj', dict(n_embd=64, n_layer=1, n_head=4, rotary_dim=8, n_positions=256))])
def test_blocks_that_return_tuples_are_compressed(family, config):
    torch.manual_seed(0)
    lm = LM(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=260, **config)), byte_tokenizer(), family)
    x = ids(64, 8); before = lm.model(x).logits.detach()
    small = compress_weights(lm, Recipe(bits=8, group=32), x)
    after = small.model(x).logits.detach()
    assert (after - before).norm() < .05*before.norm() and not small.report.fallbacks()

@pytest.mark.parametrize('end', ['finished', 'failed'])
def test_the_precision_of_products_after_calibration_is_the_one_before(end):
    backend = getattr(torch.backends.mkldnn, 'matmul', None)
    if not getattr(backend, 'fp32_precision', None): pytest.skip('this torch has no such switch')
    before = backend.fp32_precision
    try:
        with fast_products('cpu'):
            assert backend.fp32_precision == 'bf16'
            if end == 'failed': raise RuntimeError('in the middle')
    except RuntimeError: pass
    after, backend.fp32_precision = backend.fp32_precision, before
    assert after == before

@pytest.mark.parametrize('recipe', [w4, Recipe(.5, method='magnitude')], ids=str)
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path, recipe, bad):
    lm = tiny_lm()
    w = next(m for n,m in lm.model.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith('down_proj')).weight
    w.data[0,0] = bad
    folder = saved(lm, tmp_path/'source')
    with pytest.raises(InputError, match='not finite'): shrink(folder, recipe, None, tmp_path/'small')
    assert not (tmp_path/'small').exists()

def test_a_packed_model_computes_with_what_is_fastest_where_there_is_memory(tmp_path, monkeypatch):
    from promptcompress.weights import packed
    save_gptq(compress_weights(tiny_lm(), w4, None), tmp_path/'w4')
    def runtimes(**kw): return {m.runtime for m in packed.packed_layers(load_lm(tmp_path/'w4', 'cpu', **kw)).values()}
    assert runtimes() == {'cached'} and runtimes(runtime='reference') == {'reference'}
    a, b = (load_lm(tmp_path/'w4', 'cpu', runtime=r).model(ids(8, 1)).logits for r in ('auto','reference'))
    assert torch.equal(a, b) # exact
    monkeypatch.setattr(packed, 'free_memory', lambda device: 1000)
    assert runtimes() == {'reference'} # no room for dense weights
    with pytest.raises(InputError, match='no runtime'): runtimes(runtime='warp')
