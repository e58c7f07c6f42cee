"Tutorials open in Colab as they are: the badge leads to the file it stands in, the package is installed first, and the time is measured."
import json, re
from pathlib import Path
import pytest

root = Path(__file__).parents[1]
tutorials = sorted((root/'nbs'/'tutorials').glob('*.ipynb'))
repository = re.search(r'Repository = "https://github.com/([^"]+)"', (root/'pyproject.toml').read_text(encoding='utf-8'))[1]
each = pytest.mark.parametrize('path', tutorials, ids=lambda p: p.name)

def cells(path, kind): return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]
def source(c): return ''.join(c['source'])

def test_numbers_have_no_gaps():
    numbers = [int(p.name.split('_')[0]) for p in tutorials]
    assert numbers == list(range(1, len(numbers) + 1))

@each
def test_badge_leads_here(path):
    badge, = re.findall(r'\[!\[Open in Colab\]\(https://colab.research.google.com/assets/colab-badge.svg\)\]\((\S+)\)', source(cells(path, 'markdown')[0]))
    assert badge == f'https://colab.research.google.com/github/{repository}/blob/main/{path.relative_to(root)}'

@each
def test_installs_first_and_looks_at_the_device(path):
    install, imports, first = map(source, cells(path, 'code')[:3])
    assert install.startswith('#| eval: false\n%pip install') and 'promptcompress' in install, 'the first code cell installs the package, on Colab only'
    assert 'import pick_device' in imports and 'import *' in imports and 'pick_device()' in first and 'time.perf_counter()' in first

@each
def test_time_was_measured(path):
    "On a CPU a tutorial takes less than three minutes, and its last run says so"
    said = ''.join(''.join(o.get('text', '')) for c in cells(path, 'code') for o in c['outputs'])
    seconds = re.findall(r'^(\d+) s on \w+$', said, flags=re.M)
    assert seconds and int(seconds[-1]) < 180

@each
def test_links_lead_somewhere(path):
    "Links to other notebooks are relative, and the notebooks exist"
    for text in map(source, cells(path, 'markdown')):
        for link in re.findall(r'\]\((?!https?:|#)([^)\s]+)\)', text): assert (path.parent/link).exists(), link

@pytest.mark.slow
@pytest.mark.parametrize('path', [p for p in tutorials if p.name[0] in '12'], ids=lambda p: p.name)
def test_change_this_one_cell(path, monkeypatch):
    "The model's name is all that has to be changed: with SmolLM2 in place of pocket every cell runs, and every assertion holds"
    from execnb.shell import CaptureShell
    monkeypatch.chdir(path.parent)
    shell = CaptureShell()
    for text in map(source, cells(path, 'code')):
        if 'eval: false' in text or 'nbdev_export' in text: continue
        shell.run(re.sub(r"^(MODEL[^=]*= )'pocket'", r"\1'smollm2'", text, flags=re.M))
        assert not shell.exc, f'{text}\n{shell.exc!r}'
