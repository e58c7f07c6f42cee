"Packed layers and GPTQ files: bits, gradients, every family there and back, the two versions, files of others, and files that are broken"
import copy, errno, importlib.util, json, shutil, warnings
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig
from promptcompress.core import InputError, StateError
from promptcompress.kv.compressor import Compressor, CompressorConfig
from promptcompress.kv.generate import generate
from promptcompress.lm import FAMILIES, LM, byte_tokenizer, load_lm, tiny_lm
from promptcompress.weights import store
from promptcompress.weights.packed import PackedLinear, dense_layer, gptq_config, layer_bytes, model_sizes, pack_bits, packed_layers, put_layers, to_dense, unpack_bits, use_kernel
from promptcompress.weights.store import opens_with, read_gptq, save_compressed_tensors, save_gptq

ids = torch.arange(3, 43)[None]
family = pytest.mark.parametrize('f', FAMILIES)

def layer(out=48, n=96, bits=4, group=32, sym=True, bias=False, zero=None, **kw):
    "A layer of random codes"
    groups = -(-n//(n if group == -1 else group))
    zeros = torch.full((out, groups), 2**(bits-1)) if sym else torch.randint(0 if zero is None else zero, 2**bits, (out, groups))
    return PackedLinear.from_codes(torch.randint(0, 2**bits, (out, n)), (torch.rand(out, groups)*.05 + .01).half().float(), zeros, bits, group, sym,
                                   torch.randn(out) if bias else None, **kw)

def packed(f='llama', bits=4, group=32, sym=True, zero=1, skip=(), **config):
    "A tiny model of random packed layers"
    torch.manual_seed(0)
    lm = tiny_lm(f, **config)
    def one(m):
        conv = type(m).__name__ == 'Conv1D'
        n, out = m.weight.shape if conv else m.weight.shape[::-1]
        new = layer(out, n, bits, group, sym, zero=zero, conv1d=conv, dtype=torch.float32)
        if m.bias is not None: new.bias = nn.Parameter(torch.randn(out)*.1, requires_grad=False)
        return new
    put_layers(lm.model, {n: one(m) for n,m in lm.model.named_modules() if type(m).__name__ in ('Linear','Conv1D') and m is not lm.head and n.rpartition('.')[2] not in skip})
    return lm

@torch.no_grad()
def logits(lm): return lm.model(input_ids=ids.to(lm.device)).logits

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A folder written by us; copy it before changing it"
    d = tmp_path_factory.mktemp('saved')/'model'
    lm = packed(); save_gptq(lm, d)
    return d, logits(lm)

@pytest.fixture
def folder(saved, tmp_path): return shutil.copytree(saved[0], tmp_path/'copy')

def edit(folder, change, name='model.safetensors'):
    "Rewrite a folder's tensors through `change(dict)`"
    t = load_file(folder/name); change(t); save_file(t, folder/name, metadata={'format': 'pt'})

def configure(folder, **kw):
    c = json.loads((folder/'config.json').read_text()); c['quantization_config'] |= kw; (folder/'config.json').write_text(json.dumps(c))

# --- bits ------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([2,3,4,8]), st.integers(1, 140), st.integers(1, 3))
def test_words_are_the_stream_of_bits(data, bits, n, rows):
    "Against Python's integers, which have as many bits as it takes"
    codes = [[data.draw(st.integers(0, 2**bits-1)) for _ in range(n)] for _ in range(rows)]
    words = pack_bits(torch.tensor(codes), bits)
    for row, got in zip(codes, words.tolist()):
        stream = sum(c << bits*i for i,c in enumerate(row))
        assert [w & 0xffffffff for w in got] == [stream >> 32*i & 0xffffffff for i in range(-(-n*bits//32))]
    assert unpack_bits(words, bits, n).tolist() == codes

def test_bits_that_do_not_fit():
    for codes, bits, says in ((torch.tensor([8]), 3, '0..7'), (torch.tensor([-1]), 4, '0..15'), (torch.tensor([0]), 5, 'use 2, 3, 4 or 8')):
        with pytest.raises(InputError, match=says): pack_bits(codes, bits)
    with pytest.raises(InputError, match='in 2 words, not in 1'): unpack_bits(torch.zeros(1, dtype=torch.int32), 4, 9)

# --- a layer ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('bits', [2,3,4,8])
@pytest.mark.parametrize('n,out,group', [(96,48,32), (96,64,-1), (100,7,64), (704,33,128), (64,64,128)])
def test_dense_is_the_formula(bits, n, out, group):
    "Bit for bit, also where the last group is shorter or the last word not full"
    m = layer(out, n, bits, group, sym=False)
    g = torch.arange(n)//(n if group == -1 else group)
    want = m.scales.T.float()[:, g]*(m.codes().float() - m.zeros().float()[:, g])
    assert torch.equal(m.dense(torch.float32), want) and torch.equal(m.dense(torch.bfloat16), want.bfloat16()) and m.dense().is_contiguous()
    assert m.qweight.shape == (-(-n*bits//32), out) and m.qzeros.shape[1] == -(-out*bits//32) and m.weight.shape == (out, n)

@pytest.mark.parametrize('kw,says', [(dict(zeros=torch.full((4,2), 7)), 'zero point 8 everywhere'), (dict(scales=torch.full((4,2), 1.0001)), 'fp16 can hold'),
    (dict(scales=torch.full((4,2), 7e4)), 'fp16 can hold'), (dict(scales=torch.full((4,2), float('nan'))), 'finite'), (dict(zeros=torch.full((4,3), 8)), r'expected \[out, groups\]'),
    (dict(group=0), 'group must be'), (dict(bits=6), 'use 2, 3, 4 or 8'), (dict(codes=torch.full((4,64), 16)), '0..15')])
def test_layers_that_can_not_be(kw, says):
    good = dict(codes=torch.zeros(4, 64, dtype=torch.uint8), scales=torch.ones(4, 2), zeros=torch.full((4,2), 8), bits=4, group=32)
    PackedLinear.from_codes(**good)
    with pytest.raises(InputError, match=says): PackedLinear.from_codes(**good | kw)

@pytest.mark.parametrize('bits,group,bias', [(2,32,False), (3,-1,True), (4,32,True), (8,64,False)])
def test_gradients(bits, group, bias):
    m = layer(6, 96, bits, group, sym=False, bias=bias).double()
    assert torch.autograd.gradcheck(m, torch.randn(2, 3, 96, dtype=torch.float64, requires_grad=True))
    if bias: m.bias.requires_grad_(True); assert torch.autograd.gradcheck(lambda b: torch.func.functional_call(m, dict(bias=b), torch.ones(2, 3, 96).double()), m.bias)

def kept_bytes(model, x):
    "Bytes that autograd keeps for the backward pass, parameters left out"
    own, kept = {p.data_ptr() for p in model.parameters()}, []
    def note(t): kept.append(0 if t.data_ptr() in own else t.numel()*t.element_size()); return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): loss = model(inputs_embeds=x).logits.square().mean()
    loss.backward()
    return sum(kept)

def test_soft_prompts_train_through_packed_layers():
    "The gradient at the embeddings is that of dense layers, and no weight waits for it"
    lm = packed(); dense = to_dense(lm)
    x = lm.embed(ids).requires_grad_(); x2 = x.detach().clone().requires_grad_()
    a, b = kept_bytes(lm.model, x), kept_bytes(dense.model, x2)
    assert a <= b
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-4, atol=1e-7)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = x.detach().clone().requires_grad_(); lm.model(inputs_embeds=y).logits.float().square().mean().backward()
    assert y.grad.dtype == torch.float32 and ((y.grad - x.grad).norm()/x.grad.norm()) < .1

def test_scales_survive_casts():
    m = layer(bias=True); want = m.dense(torch.float32)
    for kind in (torch.bfloat16, torch.float16, torch.float64):
        m.to(kind)
        assert m.dtype == m.bias.dtype == m.weight.dtype == kind and m.scales.dtype == torch.float16 and torch.equal(m.dense(torch.float32), want)
        assert m(torch.randn(2, 96, dtype=kind)).dtype == kind
    assert not any(t.is_floating_point() and t.dtype != torch.float16 for n,t in m.state_dict().items() if n != 'bias')

def test_runtimes():
    m = layer(64, 256, 4, 64, sym=False, bias=True).bfloat16(); x = torch.randn(3, 5, 256).bfloat16().requires_grad_()
    want = m(x); grad = torch.autograd.grad(want.float().sum(), x)[0]
    for how, tol in (('cached', 0), ('int4', 6e-3), ('reference', 0)):
        assert use_kernel(m, how) == {} and m.runtime == how
        got = m(x)
        assert ((got - want).float().norm() <= tol*want.float().norm()) and torch.equal(torch.autograd.grad(got.float().sum(), x)[0], grad)
        assert (m._ready is not None) == (how != 'reference') and copy.deepcopy(m)._ready is None
        m.to('cpu'); assert m._ready is None
    assert [len(use_kernel(layer(**kw).bfloat16(), 'int4')) for kw in (dict(), dict(bits=8), dict(group=-1), dict(out=33), dict(group=64))] == [0,1,1,1,1]
    assert 'float32' in use_kernel(layer(), 'int4')['']
    with pytest.raises(InputError, match='no runtime'): use_kernel(m, 'marlin')

@pytest.mark.cuda
def test_int4_on_a_gpu():
    m = layer(64, 256, 4, 64, sym=False, bias=True).bfloat16().cuda(); x = torch.randn(5, 256, device='cuda').bfloat16().requires_grad_(); want = m(x)
    assert use_kernel(m, 'int4') == {} and ((m(x) - want).norm() < 6e-3*want.norm()) and torch.isfinite(torch.autograd.grad(m(x).float().sum(), x)[0]).all()

def test_pays_off_only_in_few_tokens():
    "Above 128 rows the int4 runtime takes the reference path, bit for bit"
    m = layer(64, 256, 4, 64).bfloat16(); x = torch.randn(150, 256).bfloat16(); want = m(x); use_kernel(m, 'int4')
    assert torch.equal(m(x), want) and not torch.equal(m(x[:100]), want[:100])

# --- models ----------------------------------------------------------------------------------------------------------

@family
@pytest.mark.parametrize('bits,group,sym', [(4,32,True), (3,64,False)])
def test_there_and_back(f, bits, group, sym, tmp_path):
    lm = packed(f, bits, group, sym, zero=0)
    opens = save_gptq(lm, tmp_path/'m')
    again = load_lm(tmp_path/'m', 'cpu')
    assert torch.equal(logits(again), logits(lm)) and again.fingerprint == lm.fingerprint and not any(p.requires_grad for p in again.model.parameters())
    assert torch.equal(logits(to_dense(again)), logits(lm)) and type(to_dense(again).model) is type(lm.model)
    assert opens['promptcompress'] == '' and bool(opens['vLLM']) == (bits == 3 or any(i%group or o%32 for i,o in {(m.in_features, m.out_features) for m in packed_layers(lm).values()}))
    assert again.dtype == torch.float32 and generate(again, None, 'Ada wrote', 4) == generate(lm, None, 'Ada wrote', 4)
    want = {n for n,m in tiny_lm(f).model.named_modules() if type(m).__name__ in ('Linear','Conv1D')} - {'lm_head','embed_out'}
    assert set(packed_layers(again)) == want

@pytest.mark.parametrize('kw', [dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)])
def test_tied_weights_are_written_once(kw, tmp_path):
    lm = packed(**kw); save_gptq(lm, tmp_path/'m')
    assert ('lm_head.weight' in load_file(tmp_path/'m'/'model.safetensors')) != kw['tie_word_embeddings']
    again = load_lm(tmp_path/'m', 'cpu')
    assert torch.equal(logits(again), logits(lm)) and (again.head.weight is again.embed.weight) == kw['tie_word_embeddings']

def test_shards_and_dtypes(tmp_path):
    lm = packed(); save_gptq(lm, tmp_path/'m', max_shard_size='60KB', dtype='bfloat16')
    assert len(list((tmp_path/'m').glob('*.safetensors'))) > 1
    a, b = load_lm(tmp_path/'m', 'cpu', 'bfloat16'), load_lm(tmp_path/'m', 'cpu')
    assert a.dtype == torch.bfloat16 and b.dtype == torch.float32 and torch.equal(a.embed.weight.float(), b.embed.weight) and torch.equal(b.embed.weight, lm.embed.weight.bfloat16().float())
    assert all(torch.equal(m.scales, n.scales) and m.dtype == torch.bfloat16 for m,n in zip(packed_layers(a).values(), packed_layers(lm).values()))
    next((tmp_path/'m').glob('model-00002*')).unlink()
    with pytest.raises(InputError, match='is missing, though'): load_lm(tmp_path/'m', 'cpu')
    (tmp_path/'m'/'model.safetensors.index.json').unlink(); (tmp_path/'m'/'b.safetensors').write_bytes(b'')
    with pytest.raises(InputError, match='several .safetensors files'): load_lm(tmp_path/'m', 'cpu')

@family
def test_written_by_transformers_too(f, tmp_path):
    "What lies in memory is a true gptq_v2 model, so `save_pretrained` writes one; GPT-NeoX's head has another name there"
    lm = packed(f, sym=False, zero=0); lm.model.save_pretrained(tmp_path); lm.tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(load_lm(tmp_path, 'cpu')), logits(lm))
    assert getattr(to_dense(lm).config, 'quantization_config', None) is None

def test_lora_finds_packed_layers():
    "A compressor's encoder on a packed model: adapters on every layer, the codes shared, none of them trained"
    lm = packed(); comp = Compressor(lm, CompressorConfig(k=2, r=4, alpha=8))
    assert sum('lora_A' in n for n,_ in comp.named_parameters()) > 10 and not any('qweight' in n for n,p in comp.named_parameters())
    doc = comp.compress('Ada wrote the first program.', k=2)
    dense = Compressor(to_dense(lm), CompressorConfig(k=2, r=4, alpha=8)).compress('Ada wrote the first program.', k=2)
    for (K,V),(K2,V2) in zip(doc.layers, dense.layers): torch.testing.assert_close(K, K2); torch.testing.assert_close(V, V2)

def test_compressed_tensors(tmp_path):
    lm = packed()
    if importlib.util.find_spec('compressed_tensors') is None:
        with pytest.raises(StateError, match='compressed_tensors'): save_compressed_tensors(lm, tmp_path/'m')
        assert not any(tmp_path.iterdir())
        return
    save_compressed_tensors(lm, tmp_path/'m'); torch.testing.assert_close(logits(load_lm(tmp_path/'m', 'cpu')), logits(lm))

@pytest.mark.parametrize('f,group', [('gpt2',32), ('llama',64)])
def test_what_compressed_tensors_can_not_hold(f, group, tmp_path):
    with pytest.raises(InputError, match="compressed-tensors can't hold"): save_compressed_tensors(packed(f, group=group), tmp_path/'m')

def test_layers_left_out_are_named(tmp_path):
    lm = packed(skip=('o_proj',)); opens = save_gptq(lm, tmp_path/'m')
    c = json.loads((tmp_path/'m'/'quantize_config.json').read_text())
    assert r'-:^model\.layers\.1\.self_attn\.o_proj$' in c['dynamic'] and ['mlp.down_proj'] in c['modules_in_block_to_quantize'] and opens['transformers'] == ''
    assert torch.equal(logits(load_lm(tmp_path/'m', 'cpu')), logits(lm))
    one = packed(); put_layers(one.model, {}); one.model.model.layers[1].mlp.up_proj = dense_layer(one.model.model.layers[1].mlp.up_proj)
    assert 'not quantised' in save_gptq(one, tmp_path/'one')['transformers'] and 'modules_in_block_to_quantize' not in json.loads((tmp_path/'one'/'config.json').read_text())['quantization_config']
    assert torch.equal(logits(load_lm(tmp_path/'one', 'cpu')), logits(one))

def test_one_kind_per_file():
    lm = packed(); lm.model.model.layers[1].mlp.up_proj = layer(96, 64, 8)
    with pytest.raises(InputError, match=r'one \(bits, group, sym\)'): gptq_config(packed_layers(lm))

def test_sizes():
    lm = packed(); s = model_sizes(lm); d = model_sizes(to_dense(lm))
    assert s['total']['dense'] == d['total']['dense'] == 2*sum(p.numel() for p in tiny_lm().model.parameters()) and s['rest'] == d['rest']
    assert s['total']['stored'] < s['total']['dense'] == d['total']['stored'] and s['ratio']['stored'] > 1
    b = layer_bytes(nn.Linear(64, 4).requires_grad_(False)); assert b['sparsity'] == 0 and b['ideal'] == b['stored'] == 512 and b['nm'] is None
    z = nn.Linear(64, 4); z.weight.data.zero_(); b = layer_bytes(z); assert b['sparsity'] == 1 and b['bitmask'] == 32 and b['ideal'] >= 0
    m = nn.Linear(64, 4); m.weight.data = m.weight.data.view(4,16,4).index_fill(2, torch.tensor([1,3]), 0).view(4,64)
    b = layer_bytes(m); assert b['pattern'] == '2:4' and b['nm'] == 256//2*18//8 and b['sparsity'] == .5
    m.weight.data = torch.cat([torch.zeros(4,8,4), torch.ones(4,8,4)], -1).view(4,64)
    assert layer_bytes(m)['pattern'] == '4:8'

# --- the two versions ------------------------------------------------------------------------------------------------

def fields(folder, name='model.layers.0.mlp.down_proj.qzeros'): return load_file(folder/'model.safetensors')[name]

def test_what_is_stored(tmp_path):
    "Version 1 says one less, and is the default for symmetric grids alone"
    for bits, v1, v2 in ((2, 0x55555555, 0xaaaaaaaa), (4, 0x77777777, 0x88888888), (8, 0x7f7f7f7f, 0x80808080)):
        lm = packed(bits=bits)
        for name, want in ((None, v1), ('gptq', v1), ('gptq_v2', v2)):
            save_gptq(lm, tmp_path/f'{bits}-{name}', name)
            assert {v & 0xffffffff for v in fields(tmp_path/f'{bits}-{name}').flatten().tolist()} == {want}
            assert torch.equal(logits(load_lm(tmp_path/f'{bits}-{name}', 'cpu')), logits(lm))
    asym = packed(bits=3, sym=False, zero=1)
    assert save_gptq(asym, tmp_path/'v2')['GPTQModel'] == '' and json.loads((tmp_path/'v2'/'config.json').read_text())['quantization_config']['checkpoint_format'] == 'gptq_v2'
    assert 'refuses asymmetric' in save_gptq(asym, tmp_path/'v1', 'gptq')['GPTQModel']
    assert torch.equal(logits(load_lm(tmp_path/'v1', 'cpu')), logits(asym))

def test_version_1_has_no_zero(tmp_path):
    with pytest.raises(InputError, match="zero points of 0.*use checkpoint_format='gptq_v2'"): save_gptq(packed(sym=False, zero=0, bits=2), tmp_path/'m', 'gptq')
    with pytest.raises(InputError, match="'gptq'.*or 'gptq_v2', not 'marlin'"): save_gptq(packed(), tmp_path/'m', 'marlin')
    assert not any(tmp_path.iterdir())

@pytest.mark.parametrize('bits', [2,3,4,8])
@pytest.mark.parametrize('written', ['gptq','gptq_v2'])
def test_wrong_labels_are_seen(bits, written, tmp_path):
    lm = packed(bits=bits); save_gptq(lm, tmp_path/'m', written)
    with warnings.catch_warnings(): warnings.simplefilter('error', UserWarning); load_lm(tmp_path/'m', 'cpu')
    configure(tmp_path/'m', checkpoint_format={'gptq': 'gptq_v2', 'gptq_v2': 'gptq'}[written])
    with pytest.warns(UserWarning, match=f"read as '{written}'") as said: got = logits(load_lm(tmp_path/'m', 'cpu'))
    assert torch.equal(got, logits(lm)) and sum('read as' in str(w.message) for w in said) == 1
    c = json.loads((tmp_path/'m'/'config.json').read_text()); del c['quantization_config']['checkpoint_format']; (tmp_path/'m'/'config.json').write_text(json.dumps(c))
    with warnings.catch_warnings(record=True) as said: warnings.simplefilter('always'); assert torch.equal(logits(load_lm(tmp_path/'m', 'cpu')), logits(lm)) # no label means version 1
    assert any('read as' in str(w.message) for w in said) == (written == 'gptq_v2')

def test_zeros_that_borrow(tmp_path):
    "GPTQModel subtracts one from every field of a word at once, so a zero point of 0 borrows from its neighbour: undone the same way"
    lm = packed(sym=False, zero=0); save_gptq(lm, tmp_path/'m')
    def as_gptqmodel(t):
        for k in t:
            if k.endswith('qzeros'): t[k] = t[k] - 0x11111111
    edit(tmp_path/'m', as_gptqmodel); configure(tmp_path/'m', checkpoint_format='gptq', meta=dict(quantizer=['gptqmodel:7.7.0']))
    assert torch.equal(logits(load_lm(tmp_path/'m', 'cpu')), logits(lm))

# --- files of others -------------------------------------------------------------------------------------------------

def test_scattered_groups(folder):
    "act-order without static groups: a column's group is what g_idx says"
    torch.manual_seed(1); name = 'model.layers.1.mlp.down_proj'; where = torch.randperm(96)
    edit(folder, lambda t: t.update({f'{name}.g_idx': (where//32).int()})); configure(folder, desc_act=True)
    lm = load_lm(folder, 'cpu'); m = packed_layers(lm)[name]
    want = torch.stack([m.scales[where[j]//32].float()*(m.codes()[:, j].float() - 8) for j in range(96)], 1)
    assert m.permuted and torch.equal(m.dense(), want) and 'order' in use_kernel(load_lm(folder, 'cpu', 'bfloat16'), 'int4')[name]
    save_gptq(lm, folder.parent/'again')
    assert json.loads((folder.parent/'again'/'config.json').read_text())['quantization_config']['desc_act'] and torch.equal(logits(load_lm(folder.parent/'again', 'cpu')), logits(lm))

def test_what_others_leave_out_or_add(folder, saved):
    "No g_idx, half-precision scales of another kind, biases of zeros, the tables of old versions, names without the prefix"
    def change(t):
        for k in [k for k in t if k.endswith('g_idx')]: del t[k]
        t['model.layers.0.self_attn.q_proj.bias'] = torch.zeros(64, dtype=torch.float16)
        t['model.layers.0.self_attn.rotary_emb.inv_freq'] = torch.ones(8)
    edit(folder, change)
    lm = load_lm(folder, 'cpu'); assert torch.equal(logits(lm), saved[1]) and packed_layers(lm)['model.layers.0.self_attn.q_proj'].bias.dtype == torch.float32
    edit(folder, lambda t: [t.update({k.removeprefix('model.'): t.pop(k)}) for k in list(t)])
    assert torch.equal(logits(load_lm(folder, 'cpu')), saved[1])
    edit(folder, lambda t: t.update({k: v.float()*1.0001 for k,v in t.items() if k.endswith('scales')}))
    assert packed_layers(load_lm(folder, 'cpu', 'bfloat16'))['model.layers.0.self_attn.q_proj'].scales.dtype == torch.float32

def test_config_beside(folder, saved):
    "Old AutoGPTQ folders say what they are in quantize_config.json alone"
    c = json.loads((folder/'config.json').read_text()); del c['quantization_config']; (folder/'config.json').write_text(json.dumps(c))
    assert torch.equal(LM(read_gptq(folder, 'cpu'), byte_tokenizer()).model(input_ids=ids).logits, saved[1])

def test_packed_head(tmp_path):
    lm = packed(tie_word_embeddings=False); lm.model.lm_head = layer(260, 64, 4, 32); put_layers(lm.model, {})
    save_gptq(lm, tmp_path/'m'); again = load_lm(tmp_path/'m', 'cpu')
    assert torch.equal(logits(again), logits(lm)) and isinstance(again.head, PackedLinear) and json.loads((tmp_path/'m'/'config.json').read_text())['quantization_config']['lm_head']

# --- broken files ----------------------------------------------------------------------------------------------------

q = 'model.layers.1.self_attn.q_proj'
def put(k, f): return lambda t: t.update({k: f(t[k])})
BROKEN = dict(
    no_qweight=(lambda t: t.pop(f'{q}.qweight'), f'lacks the tensor {q}.qweight'), no_qzeros=(lambda t: t.pop(f'{q}.qzeros'), f'lacks the tensor {q}.qzeros'),
    no_scales=(lambda t: t.pop(f'{q}.scales'), f'lacks the tensor {q}.scales'), no_norm=(lambda t: t.pop('model.norm.weight'), 'lacks the tensor model.norm.weight'),
    no_layer=(lambda t: [t.pop(f'{q}.{k}') for k in ('qweight','qzeros','scales','g_idx')], f'lacks the tensor {q}.weight'),
    no_embeddings=(lambda t: t.pop('model.embed_tokens.weight'), 'lacks the tensor'), extra=(lambda t: t.update(foo=torch.ones(2)), 'does not have: foo'),
    other_layer=(lambda t: t.update({'model.layers.7.mlp.up_proj.qweight': torch.zeros(8, 96, dtype=torch.int32)}), "packs 'model.layers.7.mlp.up_proj'"),
    not_linear=(lambda t: t.update({'model.norm.qweight': torch.zeros(8, 96, dtype=torch.int32)}), 'has a LlamaRMSNorm'),
    short=(put(f'{q}.qweight', lambda t: t[:-1].clone()), rf'{q}.qweight is torch.int32 \[7, 64\], expected torch.int32 \[8, 64\]'),
    kind=(put(f'{q}.qweight', lambda t: t.float()), 'qweight is torch.float32'), groups=(put(f'{q}.scales', lambda t: t[:1].clone()), 'scales is'),
    nan=(put(f'{q}.scales', lambda t: t.index_fill(0, torch.tensor(0), float('nan'))), f'{q}.scales holds NaN'), norm=(put('model.norm.weight', lambda t: t[:5].clone()), r'model.norm.weight is \[5\], expected \[64\]'),
    g_idx=(put(f'{q}.g_idx', lambda t: t + 1), r'g_idx names groups 1\.\.2, but there are 2'), unquantised=(lambda t: [t.pop(k) for k in list(t) if 'layers' in k], 'holds no qweight'))
CONFIGS = dict(bits=(dict(bits=5), 'bits=5'), fewer=(dict(bits=2), 'for 2 bits'), group=(dict(group_size=64), 'groups of 64'), text=(dict(group_size='128'), "group_size='128'"),
    zero=(dict(group_size=0), 'group must be'), form=(dict(checkpoint_format='marlin'), "format 'marlin'"))

@pytest.mark.parametrize('name', BROKEN)
def test_broken_tensors(name, folder):
    change, says = BROKEN[name]
    edit(folder, change)
    with pytest.raises(InputError, match=says): load_lm(folder, 'cpu')

@pytest.mark.parametrize('name', CONFIGS)
def test_broken_configs(name, folder):
    change, says = CONFIGS[name]
    configure(folder, **change)
    with pytest.raises(InputError, match=says): load_lm(folder, 'cpu')

@settings(max_examples=25, deadline=None)
@given(st.floats(0, .999))
def test_cut_off(saved, tmp_path_factory, part):
    d = shutil.copytree(saved[0], tmp_path_factory.mktemp('cut')/'m'); data = (d/'model.safetensors').read_bytes()
    (d/'model.safetensors').write_bytes(data[:int(part*len(data))])
    with pytest.raises(InputError, match='not a whole safetensors file'): load_lm(d, 'cpu')
    shutil.rmtree(d)

def test_nothing_to_read(folder):
    (folder/'model.safetensors').unlink()
    with pytest.raises(InputError, match='holds no .safetensors file'): load_lm(folder, 'cpu')

# --- all or nothing --------------------------------------------------------------------------------------------------

def test_places_that_are_taken(tmp_path):
    lm = packed(); (tmp_path/'full').mkdir(); (tmp_path/'full'/'notes.txt').write_text('mine'); (tmp_path/'file').write_text('mine'); (tmp_path/'empty').mkdir()
    for n in ('full','file'):
        with pytest.raises(InputError, match='not empty'): save_gptq(lm, tmp_path/n)
    save_gptq(lm, tmp_path/'empty'); save_gptq(lm, tmp_path/'new'/'deep')
    assert torch.equal(logits(load_lm(tmp_path/'empty', 'cpu')), logits(lm)) and (tmp_path/'full'/'notes.txt').read_text() == 'mine' and (tmp_path/'file').read_text() == 'mine'
    with pytest.raises(InputError, match='no packed layers'): save_gptq(tiny_lm(), tmp_path/'dense')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['empty','file','full','new']

def test_full_disk(tmp_path, monkeypatch):
    lm = packed()
    def full(tensors, where, **kw):
        (where/'model.safetensors').write_bytes(b'half'); raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(store, 'save_torch_state_dict', full)
        with pytest.raises(StateError, match='No space left.*nothing was left'): save_gptq(lm, tmp_path/'m')
    with monkeypatch.context() as m:
        m.setattr(store.shutil, 'disk_usage', lambda p: type('U', (), dict(free=1000)))
        with pytest.raises(StateError, match='0 MB are free'): save_gptq(lm, tmp_path/'m')
    with monkeypatch.context() as m:
        m.setattr(store, 'save_torch_state_dict', lambda *a, **kw: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt): save_gptq(lm, tmp_path/'m')
    assert not any(tmp_path.iterdir())
    save_gptq(lm, tmp_path/'m')

def test_other_models_are_still_transformers_business(tmp_path):
    lm = tiny_lm(); lm.model.save_pretrained(tmp_path); lm.tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(load_lm(tmp_path, 'cpu')), logits(lm))
    c = json.loads((tmp_path/'config.json').read_text()); (tmp_path/'config.json').write_text(json.dumps(c | dict(quantization_config=dict(quant_method='awq', bits=4))))
    with pytest.raises((InputError, ImportError)): load_lm(tmp_path, 'cpu')
    assert opens_with(dict(bits=4, group_size=128, sym=True)) == dict.fromkeys(['promptcompress','GPTQModel','transformers','vLLM'], '')
    uneven = opens_with(dict(bits=4, group_size=64, sym=True), {'down': PackedLinear(96, 64, 4, 64)})
    assert "backend='torch': down has 96 columns" in uneven['GPTQModel'] and 'do not divide' in uneven['vLLM'] and 'not multiples of 32' in opens_with(dict(bits=4, group_size=32, sym=True), {'a': PackedLinear(48, 64, 4, 32)})['GPTQModel']
    assert AutoConfig.from_pretrained(tmp_path).model_type == 'llama'
