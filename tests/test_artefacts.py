"Files from strangers: damaged, cut off, forged or foreign prefixes and compressors are an InputError; a failed save leaves the old file"
import json, random, shutil, struct
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from safetensors.torch import save_file
from promptcompress import core
from promptcompress.core import InputError, load_tensors, save_tensors
from promptcompress.kv.compressor import Compressor, CompressorConfig
from promptcompress.kv.generate import generate, nll
from promptcompress.kv.prefix import KVPrefix, collate, read
from promptcompress.lm import FAMILIES, tiny_lm

lm = tiny_lm('llama')
compressor = Compressor(lm, CompressorConfig(k=2, r=1, targets='qv'))
quick = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])

def prefix(): return read(lm, [lm.encode('It rains.')])[0]

@pytest.fixture(scope='module', params=[None, 8, 4], ids=['fp32','8 bits','4 bits'])
def saved(request, tmp_path_factory): return prefix().save(tmp_path_factory.mktemp('prefix')/'p.safetensors', bits=request.param)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('compressor')/'c'
    compressor.save_pretrained(d)
    return d

def refused(load, *args):
    "The message of the InputError that `load` must raise: one line"
    with pytest.raises(InputError) as e: load(*args)
    assert '\n' not in str(e.value), 'the command line prints one line'
    return str(e.value)

def flip(raw, i, bit): return raw[:i] + bytes([raw[i] ^ 1 << bit]) + raw[i+1:]

# --- bytes -----------------------------------------------------------------------------------------------------------

def test_every_byte_of_the_header_counts(saved, tmp_path):
    "One flipped bit in each byte of the header, which holds positions, architecture and checksum"
    raw, rng = saved.read_bytes(), random.Random(0)
    bad = tmp_path/'bad'
    for i in range(8 + struct.unpack('<Q', raw[:8])[0]):
        bad.write_bytes(flip(raw, i, rng.randrange(8)))
        refused(KVPrefix.load, bad)

def test_every_byte_of_the_settings_counts(folder, tmp_path):
    "The last bit of each byte of config.json flipped, which makes one digit or letter of another: trained.safetensors knows better"
    raw, bad = (folder/'config.json').read_bytes(), tmp_path/'bad'
    shutil.copytree(folder, bad)
    for i in range(len(raw)):
        if raw[i:i+1].isspace(): continue
        (bad/'config.json').write_bytes(flip(raw, i, 0))
        refused(Compressor.from_pretrained, bad, lm)

place = st.floats(0, 1, exclude_max=True)
def some(n): return st.binary(min_size=1, max_size=n)
damage = st.one_of(st.tuples(st.just('flip'), place, st.integers(0, 7)), st.tuples(st.just('cut'), place),
                   st.tuples(st.just('add'), some(40)), st.tuples(st.just('front'), some(12)), st.tuples(st.just('swap'), some(200)))

def damaged(raw, how, what, bit=0):
    if how == 'flip': return flip(raw, int(what*len(raw)), bit)
    if how == 'cut': return raw[:int(what*len(raw))]
    return {'add': raw + what if isinstance(what, bytes) else b'', 'front': what + raw if isinstance(what, bytes) else b'', 'swap': what}[how]

@quick
@given(how=damage)
def test_damaged_prefix(saved, tmp_path, how):
    bad = tmp_path/'bad'
    bad.write_bytes(damaged(saved.read_bytes(), *how))
    refused(KVPrefix.load, bad)

@settings(quick, max_examples=60)
@given(how=damage, name=st.sampled_from(['config.json','trained.safetensors']))
def test_damaged_compressor(folder, tmp_path, how, name):
    "A damaged config.json is no longer JSON, or does not agree with what trained.safetensors says"
    bad = tmp_path/'bad'
    shutil.copytree(folder, bad, dirs_exist_ok=True)
    raw = (folder/name).read_bytes()
    worse = damaged(raw, *how)
    (bad/name).write_bytes(worse)
    try: same = name == 'config.json' and json.loads(worse) == json.loads(raw) # white space only
    except ValueError: same = False
    if not same: refused(Compressor.from_pretrained, bad, lm)

@pytest.mark.parametrize('size', [2**20, 2**40, 2**63, 2**64 - 1])
def test_announced_sizes_are_not_believed(saved, tmp_path, size):
    "A header length beyond the file must not be allocated"
    (tmp_path/'bad').write_bytes(struct.pack('<Q', size) + saved.read_bytes()[8:])
    refused(KVPrefix.load, tmp_path/'bad')

@pytest.mark.parametrize('name', ['config.json','trained.safetensors'])
def test_missing_part(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path/'c'); (tmp_path/'c'/name).unlink()
    assert name in refused(Compressor.from_pretrained, tmp_path/'c', lm)

# --- a header that is whole and wrong --------------------------------------------------------------------------------

junk = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
                    lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=5), s, max_size=3), max_leaves=5)
fields = 'schema','architecture','start','next_position','bits','dtype','info','kind'

@quick
@given(name=st.sampled_from(fields), value=junk)
def test_forged_header(saved, tmp_path, name, value):
    "Any value in any field of the header, correctly signed: refused, or a prefix that can be read (an `info` may say anything)"
    t, h = load_tensors(saved)
    save_tensors(tmp_path/'bad', t, {**h, name: value})
    try:
        p = KVPrefix.load(tmp_path/'bad', lm)
        assert name in ('start','next_position','info') or value == h[name]
        generate(lm, p + p, 'Why?', 1)
    except InputError as e: assert '\n' not in str(e)

@quick
@given(name=st.sampled_from(['keys','values','positions','inv_freq']), shape=st.lists(st.integers(0, 4), max_size=5),
       dtype=st.sampled_from([torch.float32, torch.int64, torch.bool, torch.float64, torch.complex64]))
def test_forged_tensors(tmp_path, name, shape, dtype):
    "A tensor of another shape or type in place of one of the prefix's"
    assume(not (name == 'inv_freq' and len(shape) == 1 and dtype == torch.float32)) # other angles are still angles
    t, h = load_tensors(prefix().save(tmp_path/'good'))
    save_tensors(tmp_path/'bad', {**t, name: torch.zeros(shape, dtype=dtype)}, h)
    refused(KVPrefix.load, tmp_path/'bad', lm)

headers = '', '{', '[]', 'null', '3', '"kv_prefix"', '['*20_000, '{"kind": "kv_prefix"}', '\x00'

@pytest.mark.parametrize('text', headers, ids=range(len(headers)))
def test_header_that_is_no_header(saved, tmp_path, text, monkeypatch):
    "Garbage where our JSON should be, correctly signed"
    t, _ = load_tensors(saved)
    monkeypatch.setattr(core.json, 'dumps', lambda *a, **k: text)
    save_tensors(tmp_path/'bad', t, {})
    monkeypatch.undo()
    refused(KVPrefix.load, tmp_path/'bad')

@settings(quick, max_examples=60)
@given(name=st.sampled_from(['config','architecture','fingerprint','info','kind','model']), value=junk,
       inner=st.sampled_from([None, *CompressorConfig().__dict__]))
def test_forged_compressor(folder, tmp_path, name, value, inner):
    "Any value in any field of config.json or of its settings; trained.safetensors knows of no settings to compare them with"
    bad = tmp_path/'bad'
    shutil.copytree(folder, bad, dirs_exist_ok=True)
    t, h = load_tensors(folder/'trained.safetensors')
    head = json.loads((folder/'config.json').read_text())
    forged = {**head, name: {**head['config'], inner: value} if name == 'config' and inner else value}
    (bad/'config.json').write_text(json.dumps(forged))
    save_tensors(bad/'trained.safetensors', t, {k: v for k,v in h.items() if k in ('kind','learner')})
    try:
        c = Compressor.from_pretrained(bad, lm)
        assert name in ('info','model','fingerprint') or forged == head or inner in ('alpha','dropout','max_tokens','start','any_k')
        assert len(c.compress('It rains.', k=2)) % 2 == 0 # more than two where max_tokens asks for chunks
    except InputError as e: assert '\n' not in str(e)

# --- foreign files ---------------------------------------------------------------------------------------------------

def test_other_kinds_of_file(saved, folder, tmp_path):
    save_file(dict(x=torch.ones(2)), tmp_path/'weights')
    torch.save(dict(x=torch.ones(2)), tmp_path/'pickle')
    (tmp_path/'text').write_text('It rains.'); (tmp_path/'empty').write_bytes(b'')
    assert 'not one of promptcompress' in refused(KVPrefix.load, tmp_path/'weights')
    for name in ('pickle','text','empty'): assert 'not a whole safetensors file' in refused(KVPrefix.load, tmp_path/name)
    assert 'expected a kv_prefix' in refused(KVPrefix.load, folder/'trained.safetensors')
    assert 'does not exist' in refused(KVPrefix.load, tmp_path/'nowhere')
    assert 'folder' in refused(KVPrefix.load, folder)
    (tmp_path/'model').mkdir(); (tmp_path/'model/config.json').write_text('{"model_type": "llama"}')
    assert 'does not hold a compressor' in refused(Compressor.from_pretrained, tmp_path/'model', lm)

@pytest.mark.parametrize('family', FAMILIES)
def test_another_architecture_is_refused_by_name(folder, tmp_path, family):
    "Everywhere a prefix or a compressor meets a model"
    other = tiny_lm(family, **(dict(num_hidden_layers=2) if family == 'llama' else {}))
    p = prefix(); path = p.save(tmp_path/'p')
    foreign, = read(other, [[5,6]])
    for load in (lambda: KVPrefix.load(path, other), lambda: collate([p], other), lambda: generate(other, p, 'Why?', 2), lambda: p + foreign,
                 lambda: nll(other, p, torch.tensor([[0,5]]), torch.tensor([[-100,5]])), lambda: Compressor.from_pretrained(folder, other)):
        message = refused(load)
        assert "'llama'" in message and f"'{family}'" in message and "'layers': 3" in message

# --- a save that fails -----------------------------------------------------------------------------------------------

def saves(d): # what to save, and how to read it back
    other = read(lm, [lm.encode('The sun shines.')])[0]
    changed = Compressor(lm, CompressorConfig(k=2, r=1, targets='qv'), seed=1)
    return dict(prefix=(lambda p: p.save(d/'p'), prefix(), other, lambda: KVPrefix.load(d/'p').keys),
                compressor=(lambda c: c.save_pretrained(d/'c'), compressor, changed, lambda: Compressor.from_pretrained(d/'c', lm).memory_embeddings))

class Killed(BaseException): "What no `except Exception` catches"

@pytest.mark.parametrize('where', ['save_file','replace'])
@pytest.mark.parametrize('what', ['prefix','compressor'])
def test_a_save_that_is_broken_off_leaves_the_old_file(tmp_path, monkeypatch, what, where):
    save, old, new, back = saves(tmp_path)[what]
    save(old); before = back()
    def half(tensors, path, metadata=None): Path(path).write_bytes(b'half a file'); raise Killed
    def no(*args): raise Killed
    with monkeypatch.context() as m:
        if where == 'save_file': m.setattr(core, 'save_file', half)
        else: m.setattr(core.os, 'replace', no)
        with pytest.raises(Killed): save(new)
    assert torch.equal(back(), before)
    assert not [f for f in tmp_path.rglob('*') if '.tmp' in f.name]
    save(new)
    assert not torch.equal(back(), before)
