"Pruning and quantising, beyond what a notebook shows: any recipe on any matrix, a process that is killed, a disk that is full"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from promptcompress.core import InputError
from promptcompress.lm import load_lm, tiny_lm
from promptcompress.weights import walk
from promptcompress.weights.hessian import Hessian
from promptcompress.weights.packed import packed_layers, to_dense
from promptcompress.weights.recipe import Recipe, find_grid
from promptcompress.weights.solve import descend, energy, smallest, solve
from promptcompress.weights.walk import compress_weights

def layer(rows, columns, tokens=300, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=gen)@torch.randn(8, columns, generator=gen) + torch.randn(tokens, columns, generator=gen)
    h = Hessian(columns); h.add(x); h.finish()
    return torch.randn(rows, columns, generator=gen), h.matrix

@settings(max_examples=60, deadline=None)
@given(sparsity=st.sampled_from([0., .1, .5, .625, .9, '2:4', '4:8', '1:4']), bits=st.sampled_from([None, 2, 3, 4, 8]), group=st.sampled_from([16, 24, 64, -1]),
       sym=st.sampled_from([None, True, False]), act=st.sampled_from([None, True, False]), search=st.sampled_from([0, 3]), sweeps=st.integers(0, 2),
       budget=st.sampled_from(['matrix','block']), parts=st.sampled_from([[7], [3, 4], [1, 1, 5]]), columns=st.sampled_from([16, 40, 136]))
def test_any_recipe_keeps_its_promises(sparsity, bits, group, sym, act, search, sweeps, budget, parts, columns):
    "Exact sparsity in every layer of a stack, every weight on its grid, no error above that of doing it without compensation by far"
    if not sparsity and not bits: return
    recipe = Recipe(sparsity, bits, group, sym, act_order=act, search=search, sweeps=sweeps, budget=budget)
    W, H = layer(sum(parts), columns)
    for s, w in zip(solve(W, H, recipe, parts), W.split(parts)):
        zeros, wanted = int((s.weight == 0).sum()), round(recipe.fraction*w.numel())
        if not recipe.pattern[1]: assert zeros == wanted if bits is None else zeros >= wanted
        else: assert ((s.weight == 0).view(len(w), -1, recipe.pattern[1]).sum(2) >= recipe.pattern[1] - recipe.pattern[0]).all()
        if bits:
            g = torch.arange(columns)//s.grid.group
            assert torch.equal(s.weight, ((s.codes.T.float() - s.grid.zeros[g])*s.grid.scales[g]).T)
            assert torch.equal(s.grid.scales, s.grid.scales.half().float()) and int(s.codes.max()) < 2**bits
        d = w - s.weight
        assert s.error == pytest.approx((((d@H)*d).sum()/((w@H)*w).sum()).item(), rel=1e-3, abs=1e-6)

def test_descent_never_raises_the_error():
    W, H = layer(24, 96)
    errors = [sum(s.error for s in solve(W, H, Recipe(.5, 3, 32, sweeps=n, damp=1e-6))) for n in range(4)]
    assert errors == sorted(errors, reverse=True) and errors[1] < errors[0]

def test_descent_ends_where_no_kept_weight_can_gain():
    "Under strong damping: every round lowers the damped error, until its gradient is zero at all weights that are not pruned"
    W, H = layer(6, 48)
    W, lam = W.T.contiguous(), 3*H.diagonal().mean()
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) < .5
    Q, errors = W.masked_fill(mask, 0.), []
    for _ in range(20):
        errors.append(((W - Q)*(H@(W - Q) + lam*(W - Q))).sum().item())
        descend(Q, W, H, lam, mask, block=20)
    gradient = H@(W - Q) + lam*(W - Q)
    assert all(b < a for a, b in zip(errors[:4], errors[1:4])) and (Q[mask] == 0).all()
    assert gradient[~mask].abs().max() < 1e-3*gradient[mask].abs().max()

def test_smallest_is_exact_with_ties_and_infinities():
    s = torch.tensor([1., 1., 1., float('inf'), 0., 1.])
    assert [int(smallest(s, n).sum()) for n in range(7)] == list(range(7))
    assert not smallest(s, 5)[3]

def test_stacked_layers_do_not_share_a_budget():
    W, H = layer(8, 64)
    one, two = solve(torch.cat([W, 1000*W]), H, Recipe(.5), [8, 8])
    assert one.sparsity == two.sparsity == .5

def test_wide_matrices_are_searched_in_pieces_with_the_same_result():
    W, H = layer(1500, 32)
    whole = find_grid(W.T.contiguous(), Recipe(bits=3, group=16), H.diagonal())
    part = find_grid(W[1100:].T.contiguous(), Recipe(bits=3, group=16), H.diagonal())
    assert torch.equal(whole.scales[:, 1100:], part.scales) and torch.equal(whole.zeros[:, 1100:], part.zeros)

def test_half_of_the_energy_formula_is_enough():
    W, H = layer(5, 1200)
    strips = H.clone()
    for i in range(512, 1200, 512): strips[i:i+512, :i] = float('nan') # left of the diagonal strips nothing is read
    assert torch.allclose(energy(strips, W.T.contiguous()), ((W@H)*W).sum(1), rtol=1e-4)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    ids = torch.randint(3, 250, (8, 64), generator=torch.Generator().manual_seed(0))
    lm = tiny_lm('llama').to('cpu'); lm.model.to(dtype)
    small = compress_weights(lm, Recipe(.5, 4, group=32), ids)
    assert small.dtype == dtype and to_dense(small).model(ids[:1]).logits.equal(small.model(ids[:1]).logits)

def test_calibration_text_begins_as_the_model_reads_it():
    "With the tokenizer's BOS: without it, the first token of every text is read with weights that never saw it"
    lm = load_lm('pocket', 'cpu')
    texts, seen = ['We measure the light of a star with a small telescope. '*40], []
    handle = lm.embed.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    compress_weights(lm, Recipe(bits=4, group=64), texts, n=4, length=32)
    handle.remove()
    ids = torch.cat(seen)
    assert ids.shape == (4, 32) and (ids[:,0] == lm.bos_id).all() and (ids[:,1:] != lm.bos_id).all()

def start(folder, *more):
    code = "import sys; from promptcompress.cli import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, '-c', code, 'shrink', '--sparsity', '0.5', '--bits', '4', '--group', '64', '--calibration', 'text.txt', '-n', '24', '--length', '128',
                             '--out', 'small', '--json', *more], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def test_killed_and_resumed(tmp_path):
    "kill -9 in the middle: nothing but finished blocks is left, and --resume gives what an undisturbed run gives"
    (tmp_path/'text.txt').write_text(' '.join(f'The {a} {n} of year {i} is seen at night by {n}s that are {a}.' for i in range(40) for a in ('blue','red','old') for n in ('star','moon')))
    p, blocks = start(tmp_path), tmp_path/'.small.blocks'
    for _ in range(600):
        if blocks.exists() and len(list(blocks.glob('block-*'))) >= 2: break
        assert p.poll() is None, p.stderr.read()
        time.sleep(.05)
    p.send_signal(signal.SIGKILL); p.communicate()
    assert not (tmp_path/'small').exists()
    q = start(tmp_path); assert q.wait() == 2 and '--resume' in q.stderr.read()
    r = start(tmp_path, '--resume'); out, err = r.communicate()
    assert r.returncode == 0, err
    assert not blocks.exists() and json.loads(out)['opens_with']['vLLM'] == ''
    whole = compress_weights(load_lm('pocket', 'cpu'), Recipe(.5, 4, 64), tmp_path/'text.txt', n=24, length=128)
    ids = torch.arange(5, 60)[None]
    assert torch.allclose(load_lm(tmp_path/'small', 'cpu').model(ids).logits, whole.model(ids).logits, atol=1e-3)

def test_blocks_of_another_model_are_refused(tmp_path):
    "The same architecture, recipe and text, but other weights: in memory, and from a folder whose blocks are not read yet"
    from promptcompress.weights.shrink import shrink
    ids, recipe = torch.randint(3, 250, (4, 32), generator=torch.Generator().manual_seed(0)), Recipe(bits=4, group=32)
    compress_weights(tiny_lm('llama'), recipe, ids, work=tmp_path/'.out.blocks')
    with pytest.raises(InputError, match='another model'): compress_weights(tiny_lm('llama', seed=1), recipe, ids, work=tmp_path/'.out.blocks', resume=True)
    for seed in (0, 1):
        lm = tiny_lm('llama', seed=seed); lm.model.save_pretrained(tmp_path/str(seed)); lm.tokenizer.save_pretrained(tmp_path/str(seed))
    with pytest.raises(InputError, match='another model'): shrink(tmp_path/'1', recipe, ids, tmp_path/'out', resume=True)
    shrink(tmp_path/'0', recipe, ids, tmp_path/'out', resume=True) # the model they are of, read from its files

@pytest.mark.parametrize('resume, computed', [(True, [2]), (False, [0, 1, 2])])
def test_resume_computes_what_is_missing(tmp_path, monkeypatch, resume, computed):
    ids, seen, compress = torch.randint(3, 250, (4, 32), generator=torch.Generator().manual_seed(0)), [], walk.compress_block
    compress_weights(tiny_lm('llama'), Recipe(bits=4, group=32), ids, work=tmp_path)
    for i in range(3):
        if not resume or i == 2: (tmp_path/f'block-{i:04}.safetensors').unlink()
    monkeypatch.setattr(walk, 'compress_block', lambda *a, **k: (seen.append(int(a[4][-1])), compress(*a, **k))[1])
    compress_weights(tiny_lm('llama'), Recipe(bits=4, group=32), ids, work=tmp_path, resume=resume)
    assert seen == computed

@pytest.mark.parametrize('device, sizes', [('cpu', [8]*4), ('cuda', [32])])
def test_batches_suit_the_device_that_computes(device, sizes):
    "A model on the CPU whose blocks are computed on a GPU is read in the GPU's batches"
    ids, seen, lm = torch.randint(3, 250, (32, 64), generator=torch.Generator().manual_seed(0)), [], tiny_lm('gpt2')
    lm.embed.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    try: compress_weights(lm, Recipe(bits=4, group=32), ids, device=device)
    except (AssertionError, RuntimeError):
        if device == 'cpu' or torch.cuda.is_available(): raise # without a GPU it ends behind the embeddings
    assert seen == sizes

def test_full_disk_leaves_the_finished_blocks(tmp_path, monkeypatch):
    import promptcompress.weights.store as store
    from promptcompress.weights.shrink import shrink
    ids = torch.randint(3, 250, (8, 64), generator=torch.Generator().manual_seed(0))
    lm = tiny_lm('llama'); lm.model.save_pretrained(tmp_path/'m'); lm.tokenizer.save_pretrained(tmp_path/'m')
    with monkeypatch.context() as m:
        def full(*a, **k): raise OSError(28, 'No space left on device')
        m.setattr(store, 'save_torch_state_dict', full)
        with pytest.raises(Exception, match='No space left'): shrink(tmp_path/'m', Recipe(bits=4, group=32), ids, tmp_path/'out')
    assert not (tmp_path/'out').exists() and len(list((tmp_path/'.out.blocks').iterdir())) == 3
    shrink(tmp_path/'m', Recipe(bits=4, group=32), ids, tmp_path/'out', resume=True)
    assert len(packed_layers(load_lm(tmp_path/'out', 'cpu'))) == 21

def test_models_that_can_not_be_walked(tmp_path):
    ids = torch.randint(3, 250, (4, 32))
    small = compress_weights(tiny_lm('gpt2'), Recipe(bits=4, group=32), ids)
    with pytest.raises(InputError, match='quantised already'): compress_weights(small, Recipe(.5), ids)
    with pytest.raises(InputError, match='no multiple of 64'): compress_weights(tiny_lm('llama'), Recipe('32:64', block=128), ids)
