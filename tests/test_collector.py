"conftest.py itself, on small notebooks in a project of their own: what is a test, what is run, what is shown, what is left out"
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]

module = '''
from dataclasses import dataclass
from fastcore.basics import patch

built = True # only the module has this line: a cell that sees it was given the module's names
@dataclass
class Box:
    size: int = 1
limit: int = 3
first, (second, *rest) = 1, (2, 3, 4)
try: import no_such_module
except ImportError: fallback = 'none'
squares = [i*i for i in range(3)]
i = 'not the notebook\\'s'
def save(box): return 'the function'
@patch
def save(self: Box): return 'the method'
from math import *
'''

works = ['#| default_exp demo',
         '#| export\nfrom dataclasses import dataclass\nfrom fastcore.basics import patch',
         '#| export\nbuilt = False',
         '#| export\n@dataclass\nclass Box:\n    size: int = 1',
         '#| export\nlimit: int = 3\nfirst, (second, *rest) = 1, (2, 3, 4)',
         "#| export\ntry: import no_such_module\nexcept ImportError: fallback = 'none'",
         '#| export\nsquares = [i*i for i in range(3)]',
         'def save(box): return "the notebook\'s own"',
         '#| export\n@patch\ndef save(self: Box): return "the method"',
         '#| export\nfrom math import *',
         'assert built, "the export cell was executed, not taken from the module"',
         'assert (Box(2).size, Box().save(), save(None)) == (2, "the method", "the notebook\'s own")',
         'assert (limit, first, second, rest, fallback, squares) == (3, 1, 2, [3, 4], "none", [0, 1, 4])',
         'assert "i" not in globals() and floor(1.5) == 1',
         'import os, torch\nassert os.path.samefile(".", "nbs") if os.path.isdir("nbs") else os.path.isfile("00_demo.ipynb")',
         '#| eval: false\nassert False',
         'x = 1']
fails = ['y = 1', 'assert y == 1', "print('so far', y)\nassert y == 2, 'y is not two'", 'assert y', 'z = 3']
flagged = ['a = 1', 'assert a == 1', "#| slow\na = 2\nassert a == 2", '#| cuda\nassert False, "no GPU here"', 'assert a == 1']
offline = ['import socket, os', 'assert os.environ["HF_HUB_OFFLINE"] == "1" and os.environ["IN_TEST"] == "1"',
           'try: socket.create_connection(("192.0.2.1", 80), timeout=1)\n'
           'except ConnectionError as e: assert "tests run without a network" in str(e)\nelse: assert False',
           'os.environ["LEFT_BEHIND"] = "1"']
after = ['import os, torch', 'assert "LEFT_BEHIND" not in os.environ', 'r = torch.rand(1)\ntorch.manual_seed(0)\nassert r == torch.rand(1)']

def notebook(path, cells):
    cells = [dict(cell_type='code', id=f'{path.stem[:2]}-{i}', metadata={}, source=s, outputs=[], execution_count=None) for i,s in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))

@pytest.fixture(scope='module')
def project(tmp_path_factory):
    top = tmp_path_factory.mktemp('project')
    for name in ('conftest.py', 'pyproject.toml'): shutil.copy(root/name, top)
    for name in ('promptcompress', 'nbs', 'tests'): (top/name).mkdir()
    (top/'promptcompress'/'__init__.py').touch()
    (top/'promptcompress'/'demo.py').write_text(module)
    for name, cells in zip(('00_demo', '01_fails', '02_flagged', '03_offline', '04_after'), (works, fails, flagged, offline, after)):
        notebook(top/'nbs'/f'{name}.ipynb', cells)
    (top/'tests'/'test_marked.py').write_text('import pytest\n@pytest.mark.slow\ndef test_slow(): pass\ndef test_quick(): pass\n')
    return top

def run_pytest(project, *args):
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *args]
    p = subprocess.run(command, cwd=project, capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    return p.returncode, p.stdout + p.stderr

def test_collected_run_and_shown(project):
    code, out = run_pytest(project)
    # demo 5 + its end; fails 1; flagged 2; offline 2 + its end; after 2; test_quick
    assert '1 failed, 15 passed, 2 skipped, 3 deselected' in out.splitlines()[-1], out
    assert code == 1
    for shown in ('01_fails.ipynb, cell id 01-2:', "print('so far', y)", 'so far 1', 'AssertionError: y is not two',
                  'an earlier cell of 01_fails.ipynb failed'):
        assert shown in out, f'{shown!r} is not in\n{out}'

def test_flags(project):
    code, out = run_pytest(project, 'nbs/02_flagged.ipynb', 'tests', '--nb-flags', 'slow')
    # the slow cell now sets a to 2, so the last cell fails
    assert '1 failed, 4 passed, 1 deselected' in out.splitlines()[-1], out

def test_one_cell_by_its_id(project):
    "Asked for alone, a test still gets the cells before it"
    code, out = run_pytest(project, 'nbs/04_after.ipynb::002:r = torch.rand(1)')
    assert code == 0 and '1 passed' in out.splitlines()[-1], out
