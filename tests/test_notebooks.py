"What holds for all notebooks together: the package is what they export, they read well, and imports run downwards"
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
lib = 'promptcompress'
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not any(part.startswith(('.', '_')) for part in p.relative_to(root).parts))
each = pytest.mark.parametrize('path', notebooks, ids=lambda p: str(p.relative_to(root/'nbs')))

def cells(path, kind='code'): return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]
def source(cell): return ''.join(cell['source'])

def exported():
    "module name -> notebook that exports it"
    found = ((re.match(r'#\|\s*default_exp\s+(\S+)', source(c)), p) for p in notebooks for c in cells(p))
    return {m[1]: p for m,p in found if m}

modules = exported()

def test_package_is_what_the_notebooks_export(tmp_path):
    "Export into a copy from which every exported file was removed: it must give the same files, byte for byte"
    skip = shutil.ignore_patterns('.*', '__pycache__', 'pocket')
    shutil.copy(root/'pyproject.toml', tmp_path)
    for d in ('nbs', lib): shutil.copytree(root/d, tmp_path/d, ignore=skip)
    for p in (tmp_path/lib).rglob('*.py'):
        if p.name != '__init__.py': p.unlink()
    env = {k: v for k,v in os.environ.items() if k != 'IN_TEST'} # under which nbdev does not export
    subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=tmp_path, env=env, check=True)
    def files(top): return {str(p.relative_to(top)): p.read_text(encoding='utf-8') for p in (top/lib).rglob('*.py')}
    built, here = files(tmp_path), files(root)
    assert not set(here) - set(built), f'no notebook exports {sorted(set(here) - set(built))}'
    stale = sorted(n for n in built if built[n] != here.get(n))
    assert not stale, f'run nbdev-export and commit: {stale}'

@each
def test_cells_fit_on_a_screen(path):
    long = [source(c).splitlines()[0] for c in cells(path) if len(source(c).splitlines()) > 40]
    assert not long, f'cells of over 40 lines, beginning with {long}'

@each
def test_no_widget_state(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert 'widgets' not in nb['metadata'], 'GitHub cannot show a notebook with widget state: delete metadata.widgets'
    views = [source(c) for c in cells(path) for o in c['outputs'] if 'application/vnd.jupyter.widget-view+json' in o.get('data', {})]
    assert not views, f'outputs that are widgets: {views}'

@each
def test_no_errors_in_outputs(path):
    bad = [source(c) for c in cells(path) for o in c['outputs'] if o['output_type'] == 'error']
    assert not bad, f'cells whose saved output is an error: {bad}'

@each
def test_opens_with_title_and_summary(path):
    first = source(cells(path, 'markdown')[0])
    assert re.match(r'# \S.*\n+> \S', first), f'begin with `# Title` and `> what it is for`, not {first[:60]!r}'

@each
def test_imports_have_a_cell_of_their_own(path):
    "Building the docs runs every cell with an import, exported or not: code beside it would run too, without what comes before it"
    for i,c in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
        if c['cell_type'] != 'code' or 'nbdev_export()' in source(c): continue # nbdev leaves that cell alone
        plain = re.sub(r'^[ \t]*[%!].*', '', source(c), flags=re.M) # shell commands and magics
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(plain).body}
        assert len(kinds) < 2, f"{path.relative_to(root)}, cell {i} (id {c['id']}) has imports and other code: give the imports a cell of their own, in front\n{source(c)[:200]}"

shelves = dict(recipes=59.1, results=59.2) # notebooks without a number: behind the library (to 59), before the shell commands (from 60)
def number(module):
    m = re.match(r'\d\d', modules[module].name)
    return int(m[0]) if m else shelves[modules[module].parent.name]

def imported(module):
    "The modules of this package that `module` imports, anywhere in it"
    path = root/lib/f"{module.replace('.', '/')}.py"
    package = [lib, *module.split('.')[:-1]] # what one leading dot means
    for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(n, ast.Import): names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = '.'.join([*package[:len(package) - n.level + 1], *filter(None, [n.module])]) if n.level else n.module
            names = [f'{base}.{a.name}' if f'{base}.{a.name}'.removeprefix(f'{lib}.') in modules else base for a in n.names]
        else: continue
        yield from (m.removeprefix(f'{lib}.') for m in names if m.split('.')[0] == lib)

@pytest.mark.parametrize('module', sorted(modules, key=number))
def test_imports_run_downwards(module):
    "A module imports only from modules whose notebook has a lower number, and never from the package itself"
    for other in imported(module):
        assert other != lib, f'{module} imports from {lib} itself, which imports everything: name the module'
        assert other in modules, f'{module} imports {other}, which no notebook exports'
        assert number(other) < number(module), f'{module} ({modules[module].name}) imports {other} ({modules[other].name}), which comes later'

def test_numbers_are_unique():
    numbered = {m: p for m,p in modules.items() if p.parent == root/'nbs'}
    numbers = [p.name[:2] for p in numbered.values()]
    assert len(set(numbers)) == len(numbers), f'two notebooks share a number: {sorted(numbers)}'
    assert all(p.name == f'{p.name[:2]}_{m}.ipynb' for m,p in numbered.items()), 'a notebook is named NN_module.ipynb'

def test_readme_is_current():
    p = subprocess.run([sys.executable, root/'tests'/'readme.py', '--check'], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr

def test_readme_lists_every_notebook():
    "Nobody should have to look for where something lives"
    readme = (root/'README.md').read_text(encoding='utf-8')
    links = {(root/l).resolve() for l in re.findall(r'\]\((?!https?:|#)([^)\s]+)\)', readme)}
    assert not {l for l in links if not l.exists()}, f'README links to what is not there: {sorted(str(l) for l in links if not l.exists())}'
    lost = [p.name for p in notebooks if not {p, *p.parents} & (links - {root, root/'nbs'})]
    assert not lost, f'not in the table of nbs/index.ipynb: {lost}'

def test_ci_runs_the_readme_command():
    "Both set-up commands are one line each, where .ci/run and a reader find them"
    readme = (root/'README.md').read_text(encoding='utf-8')
    for name, ends in dict(demo='promptcompress demo', tests='pytest -q -n 2').items():
        command, = re.findall(rf'^<!-- {name} -->\n```sh\n(.+)\n```$', readme, flags=re.M)
        assert '-c constraints.txt' in command and command.endswith(ends)
