"""pytest runs the notebooks: every test cell is one test.

A cell that exports is not executed; the names it binds are taken from the built module instead. So the tests exercise
(and coverage counts) the code that ships, while the cells around it run as a reader would run them.
Cells flagged `#| slow` or `#| cuda` (and tests marked so) are left out unless asked for: pytest --nb-flags "slow cuda".
"""
import os, sys, tempfile
from pathlib import Path

# Set before torch and the Hugging Face libraries are imported, and inherited by every process a test starts
scratch = tempfile.TemporaryDirectory(prefix='promptcompress-tests-')
os.environ |= dict(IN_TEST='1', HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', HF_HOME=scratch.name, TOKENIZERS_PARALLELISM='false')
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ['OMP_NUM_THREADS'] = '1' # the workers are the parallelism
os.environ.setdefault('OMP_NUM_THREADS', '2') # sums, and times, on a big machine as in CI
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('PROMPTCOMPRESS_DTYPE', 'float32') # results do not depend on the processor

import ast, importlib, random, socket, traceback
import numpy as np, pytest, torch
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from IPython.core.inputtransformer2 import TransformerManager
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.test import _skip_cell

root = Path(__file__).parent
cfg = get_config(root)
flags = str(cfg.tst_flags).split()
cell_timeout = int(cfg.cell_timeout) # seconds

# --- one process, the same for every notebook -----------------------------------------------------------------------

def no_network(event, args):
    "Audit hook: a connection or a name lookup that leaves this machine is an error"
    if event not in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname'): return
    host = args[1] if event == 'socket.connect' else args[0]
    if isinstance(host, tuple): host = host[0]
    if isinstance(host, bytes): host = host.decode(errors='replace')
    if host in (None, '', 'localhost', '0.0.0.0', '::', '::1', socket.gethostname()) or str(host).startswith(('127.', '/')): return
    raise ConnectionError(f"tests run without a network, but something tried to reach {host}")

def fresh_state():
    "Put what notebooks share (they run in one process) back to its start: threads, determinism, seeds, defaults"
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_dtype(torch.float32)
    random.seed(0); np.random.seed(0); torch.manual_seed(0)

@pytest.fixture(autouse=True)
def _fresh_state(): fresh_state() # for the tests in tests/; a notebook is seeded once, at its top

# --- reading a cell -------------------------------------------------------------------------------------------------

def parse(source): return ast.parse(TransformerManager().transform_cell(source)) # `!ls` and `%magic` are not Python yet

def is_test(source):
    "Does the cell assert something: an `assert`, or a call of `test_*`, `assert_*`, `is_close`?"
    try: tree = parse(source)
    except SyntaxError: return False
    def called(n): return getattr(n.func, 'id', None) or getattr(n.func, 'attr', '')
    calls = [called(n) for n in ast.walk(tree) if isinstance(n, ast.Call)]
    return any(isinstance(n, ast.Assert) for n in ast.walk(tree)) or any(c.startswith(('test_', 'assert_', 'is_close')) for c in calls)

def is_patch(node):
    "Is this `def` decorated with fastcore's `@patch`, `@patch_to(...)`...? It then binds a method, and no name of its own"
    decorators = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    return any((getattr(d, 'id', None) or getattr(d, 'attr', '')).startswith('patch') for d in decorators)

scopes = ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp # names bound in these stay in these

def names(node):
    "The top-level names that the code below `node` binds"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        if not is_patch(node): yield node.name
    elif isinstance(node, ast.ClassDef): yield node.name # a dataclass's fields are its own
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        for a in node.names:
            if a.name == '*': yield from public(node)
            else: yield a.asname or a.name.split('.')[0]
    elif isinstance(node, ast.Name): # `a = 1`, `a: int = 1`, `a, b = 1, 2`, `for a in ...`, `with ... as a`, `(a := 1)`
        if isinstance(node.ctx, ast.Store): yield node.id
    elif isinstance(node, ast.ExceptHandler):
        for n in node.body: yield from names(n)
    elif not isinstance(node, scopes):
        for n in ast.iter_child_nodes(node): yield from names(n)

def public(node):
    "The names that `from module import *` brings"
    mod = importlib.import_module(node.module)
    return getattr(mod, '__all__', None) or [k for k in vars(mod) if not k.startswith('_')]

def title(cell, i):
    "A test's name: the cell's place in the notebook, and its first line that is no comment or import"
    lines = [o.strip() for o in cell.source.splitlines() if o.strip() and not o.startswith(('#', 'import ', 'from '))]
    return f'{i:03d}:{lines[0][:50] if lines else ""}'

# --- a notebook is a file of tests ----------------------------------------------------------------------------------

class Notebook(pytest.File):
    "Cells run in order, in one shell and in the notebook's folder, as far as the next test needs"
    def collect(self):
        asked = self.config.getoption('--nb-flags').split()
        nb = NBProcessor(self.path, rm_directives=False, process=True).nb
        self.exp = next((c.directives_['default_exp'] for c in nb.cells if 'default_exp' in (c.directives_ or {})), None)
        skip, skip_all = (_skip_cell(nb, flags, f) for f in (asked, flags))
        left_out = [c for c in nb.cells if skip(c) and not skip_all(c) and is_test(c.source)]
        items = [Cell.from_parent(self, name=title(c, c.idx_), cell=c) for c in left_out]
        if items: self.config.hook.pytest_deselected(items=items) # so that the closing line counts them
        self.cells, self.done, self.shell, self.failed = [c for c in nb.cells if not skip(c)], 0, None, False
        for c in self.cells:
            if is_test(c.source): yield Cell.from_parent(self, name=title(c, c.idx_), cell=c)
        if self.cells and not is_test(c.source): yield Cell.from_parent(self, name=f'{c.idx_:03d}:runs to the end', cell=c)

    def setup(self):
        self.env, self.path0 = dict(os.environ), list(sys.path)
        sys.path.insert(0, str(root))
        fresh_state()
        self.shell = CaptureShell(self.path)

    def teardown(self):
        if self.shell: self.shell.user_ns.clear(); self.shell.close()
        if 'matplotlib.pyplot' in sys.modules: sys.modules['matplotlib.pyplot'].close('all')
        os.environ.clear(); os.environ.update(self.env); sys.path[:] = self.path0

    def take(self, cell):
        "Bind an export cell's names from the module it was built into, as if it had run; False if `cell` is no export cell"
        to = next((cell.directives_[k] or self.exp for k in ('export', 'exporti', 'exports') if k in (cell.directives_ or {})), None)
        if to is None: return False
        mod = importlib.import_module(f'{cfg.lib_path.name}.{to}')
        self.shell.user_ns.update({k: getattr(mod, k) for k in names(parse(cell.source)) if hasattr(mod, k)})
        return True

    def run_to(self, last):
        "Run the cells up to and with `last` that have not run yet"
        while self.done < len(self.cells) and self.cells[self.done].idx_ <= last.idx_:
            self.current = self.cells[self.done]; self.done += 1
            with working_directory(self.path.parent):
                if self.take(self.current): continue
                self.shell.cell(self.current, timeout=cell_timeout)
            if self.shell.exc: raise self.shell.exc

class Cell(pytest.Item):
    def __init__(self, *, cell, **kw):
        super().__init__(**kw)
        self.cell = cell

    def runtest(self):
        nb = self.parent
        if nb.failed: pytest.skip(f'an earlier cell of {nb.path.name} failed')
        try: nb.run_to(self.cell)
        except Exception: nb.failed = True; raise

    def repr_failure(self, excinfo, style=None):
        "The cell's id, its source, what it had printed, and the way from the cell to the error"
        cell = getattr(self.parent, 'current', None)
        if cell is None: return super().repr_failure(excinfo)
        printed = ''.join(''.join(o.get('text', '')) for o in cell.outputs if o['output_type'] == 'stream')
        frames = traceback.extract_tb(excinfo.value.__traceback__)
        start = next((i for i,f in enumerate(frames) if f.name.startswith('<') and 'ipython-input' in f.filename or '/ipykernel_' in f.filename), 0)
        way = ''.join(traceback.format_list(frames[start:]))
        said = f'\n--- printed\n{printed}' if printed else ''
        return f'{self.path.name}, cell id {cell.id}:\n{cell.source}\n{said}\n--- error\n{way}{excinfo.typename}: {excinfo.value}'

    def reportinfo(self): return self.path, None, f'{self.path.name}::{self.name}'

# --- pytest's hooks -------------------------------------------------------------------------------------------------

def pytest_addoption(parser):
    parser.addoption('--nb-flags', default='', help='flags of cells, and marks of tests, to run all the same: "slow cuda"')

def pytest_configure(config):
    for f in flags: config.addinivalue_line('markers', f'{f}: runs only with --nb-flags {f}')
    fresh_state()
    sys.addaudithook(no_network)

def pytest_unconfigure(config): scratch.cleanup()

def pytest_collect_file(parent, file_path):
    if file_path.suffix == '.ipynb' and not file_path.name.startswith('_'): return Notebook.from_parent(parent, path=file_path)

def pytest_collection_modifyitems(config, items):
    left_out = set(flags) - set(config.getoption('--nb-flags').split())
    drop = [i for i in items if any(i.get_closest_marker(f) for f in left_out)]
    if drop:
        config.hook.pytest_deselected(items=drop)
        items[:] = [i for i in items if i not in drop]

@pytest.hookimpl(optionalhook=True) # only there with pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    "pytest -n 2: a notebook's cells stay together in one worker"
    from xdist.scheduler import LoadFileScheduling
    return LoadFileScheduling(config, log)
