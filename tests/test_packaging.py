"What a user installs: the sdist and the wheel built from it, their metadata, and what importing the package costs"
import ast, importlib, os, re, shlex, shutil, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

root = Path(__file__).resolve().parents[1]
package = root/'promptcompress'

def run(*args, cwd=root, **kw):
    "Run a process; its output is the message if it fails"
    p = subprocess.run(args, cwd=cwd, capture_output=True, text=True, **kw)
    assert p.returncode == 0, f'{shlex.join(map(str, args))}\n{p.stdout}{p.stderr}'
    return p.stdout

@pytest.fixture(scope='module')
def settings():
    cp = ConfigParser(delimiters=['='])
    cp.read(root/'settings.ini', encoding='utf-8')
    return cp['DEFAULT']

@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    "A copy of the sources to build in, with data files where the pocket model's are"
    top = tmp_path_factory.mktemp('build')/'src'
    skip = shutil.ignore_patterns('.*', '__pycache__', 'build', 'dist', '*.egg-info', 'runs')
    shutil.copytree(root, top, ignore=skip)
    for name in ('config.json', 'model.safetensors', 'MODEL_CARD.md', 'kv/config.json', 'kv/model.safetensors'):
        path = top/'promptcompress'/'pocket'/name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists(): path.write_text('{}')
    return top

@pytest.fixture(scope='module')
def sdist(tree):
    "The unpacked sdist"
    out = tree.parent/'sdist'
    run(sys.executable, '-c', f'import setuptools.build_meta as b; b.build_sdist({str(out)!r})', cwd=tree)
    archive, = out.glob('*.tar.gz')
    with tarfile.open(archive) as t: t.extractall(out, filter='data')
    return out/archive.name.removesuffix('.tar.gz')

@pytest.fixture(scope='module')
def wheel(sdist):
    "The wheel, built from the sdist as an installer without this repository would"
    out = sdist.parents[1]/'wheel'
    run(sys.executable, '-c', f'import setuptools.build_meta as b; b.build_wheel({str(out)!r})', cwd=sdist)
    path, = out.glob('*.whl')
    return path

@pytest.fixture(scope='module')
def files(wheel):
    "The names of the files in the wheel"
    with zipfile.ZipFile(wheel) as z: return set(z.namelist())

def member(wheel, ending):
    "The text of the one file of the wheel whose name ends so"
    with zipfile.ZipFile(wheel) as z:
        name, = (n for n in z.namelist() if n.endswith(ending))
        return z.read(name).decode()

@pytest.fixture(scope='module')
def metadata(wheel): return Parser().parsestr(member(wheel, '.dist-info/METADATA'))

def test_sdist_can_be_built_and_tested(sdist):
    for name in ('settings.ini', 'setup.py', 'README.md', 'LICENSE', 'constraints.txt', 'conftest.py', 'tests/test_packaging.py', 'nbs/index.ipynb'):
        assert (sdist/name).is_file(), f'{name} is not in the sdist: see MANIFEST.in'

def test_wheel_has_the_package_and_nothing_else(files):
    assert {n.split('/')[0] for n in files if '.dist-info/' not in n} == {'promptcompress'}
    modules = {str(p.relative_to(root)) for p in package.rglob('*.py')}
    assert modules <= files, f'not in the wheel: {sorted(modules - files)}'
    assert any(n.endswith('licenses/LICENSE') for n in files)

def test_wheel_has_the_package_data(files, tree, wheel):
    pocket = tree/'promptcompress'/'pocket'
    want = {str(p.relative_to(tree)) for p in pocket.rglob('*') if p.is_file()}
    assert want == {n for n in files if n.startswith('promptcompress/pocket/')}
    assert wheel.stat().st_size < 40e6, 'the design allows about 35 MB'

def test_package_data_names_no_folder_of_the_machine_it_was_made_on(files, wheel):
    with zipfile.ZipFile(wheel) as z:
        told = [n for n in files if n.startswith('promptcompress/pocket/') and n.endswith(('.json','.md')) and 'tokenizer' not in n and re.search(r'"(/|~|[A-Z]:\\\\)', z.read(n).decode())]
    assert not told

def test_versions_agree(metadata, settings):
    import promptcompress
    cited = next(l.split()[1] for l in (root/'CITATION.cff').read_text(encoding='utf-8').splitlines() if l.startswith('version:'))
    assert metadata['Version'] == settings['version'] == promptcompress.__version__ == cited

def test_metadata(metadata, settings):
    assert (metadata['Name'], metadata['License-Expression']) == ('promptcompress', 'Apache-2.0')
    assert metadata['Requires-Python'] == '>=3.10'
    assert metadata.get_payload().strip() == (root/'README.md').read_text(encoding='utf-8').strip()
    extras = {k.removesuffix('_requirements') for k in settings if k.endswith('_requirements')}
    assert set(metadata.get_all('Provides-Extra')) == extras >= {'dev', 'docs', 'gptq', 'eval'}

def test_requirements(metadata, settings):
    got = {str(Requirement(r)) for r in metadata.get_all('Requires-Dist') if 'extra ==' not in r}
    assert got == {str(Requirement(r)) for r in shlex.split(settings['requirements'])}
    assert not {canonicalize_name(Requirement(r).name) for r in got} & {'nbdev', 'pytest'}

def test_entry_points(wheel):
    points = ConfigParser(delimiters=['='])
    points.read_string(member(wheel, 'entry_points.txt'))
    assert dict(points['console_scripts']) == {'promptcompress': 'promptcompress.cli:main'}
    assert dict(points['nbdev']) == {'promptcompress': 'promptcompress._modidx:d'}
    for target in [t for section in points.sections() for t in points[section].values()]:
        module, name = target.split(':')
        assert hasattr(importlib.import_module(module), name), f'{target} does not exist'

def imports(path):
    "(imported top-level module, is it imported when the file is?) for each import of another project in a file"
    tree = ast.parse(path.read_text(encoding='utf-8'))
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)}
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): tops = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom) and not n.level: tops = [n.module]
        else: continue
        for t in tops:
            top = t.split('.')[0]
            if top not in sys.stdlib_module_names and top != 'promptcompress': yield top, id(n) not in inner

def test_everything_imported_is_required(settings):
    def names(key): return {canonicalize_name(Requirement(r).name) for r in shlex.split(settings[key])}
    runtime = names('requirements')
    extras = set().union(*(names(k) for k in settings if k.endswith('_requirements') and k != 'dev_requirements'))
    dists = packages_distributions()
    for path in package.rglob('*.py'):
        for top, at_import in imports(path):
            owners = {canonicalize_name(d) for d in dists.get(top, [top])}
            assert owners & (runtime if at_import else runtime | extras), f'{path.name} imports {top}, which settings.ini does not require'

def test_constraints_fix_every_requirement(settings):
    fixed = {canonicalize_name(r.name): r for l in (root/'constraints.txt').read_text().splitlines() if l and l[0] != '#' for r in [Requirement(l)]}
    assert all(re.fullmatch(r'==[\w.]+', str(r.specifier)) for r in fixed.values())
    for r in map(Requirement, shlex.split(settings['requirements']) + shlex.split(settings['dev_requirements'])):
        version = str(fixed[canonicalize_name(r.name)].specifier).removeprefix('==')
        assert r.specifier.contains(version), f'constraints.txt has {r.name} {version}, settings.ini wants {r}'

heavy = 'datasets', 'evaluate', 'matplotlib', 'seaborn' # seconds each, and few commands need them

@pytest.mark.parametrize('path', sorted(package.rglob('*.py')), ids=lambda p: str(p.relative_to(package)))
def test_heavy_packages_are_imported_where_they_are_used(path):
    early = {top for top, at_import in imports(path) if at_import} & set(heavy)
    assert not early, f'import {sorted(early)} in the function that needs it'

probe = """
import importlib, pkgutil, sys
def hook(event, args):
    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname'): raise RuntimeError(f'network at import: {event} {args}')
sys.addaudithook(hook)
import promptcompress
early = [m for m in HEAVY if m in sys.modules]
assert not early, f'importing promptcompress also imports {early}'
for m in pkgutil.walk_packages(promptcompress.__path__, 'promptcompress.'): importlib.import_module(m.name)
early = [m for m in ('nbdev', 'IPython', 'pytest') if m in sys.modules]
assert not early, f'a module of promptcompress imports the development requirements {early}'
import torch
assert not torch.cuda.is_initialized(), 'importing promptcompress starts CUDA'
"""

def test_import_is_light_and_stays_at_home(tmp_path):
    "In a process of its own: no network, no GPU, nothing heavy, nothing that only developers have"
    env = {k: v for k,v in os.environ.items() if k not in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'IN_TEST')} | {'PYTHONPATH': str(root)}
    run(sys.executable, '-c', probe.replace('HEAVY', repr(heavy)), cwd=tmp_path, env=env)

def test_all_runs_are_timed_with_the_same_watch():
    "The peers' environments can't import this package, so their runners hold a copy of `Stopwatch`"
    def stopwatch(path):
        text = path.read_text(encoding='utf-8')
        found, = (n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == 'Stopwatch')
        return ast.get_source_segment(text, found)
    ours, theirs = stopwatch(package/'benchmarks'/'weights_peers.py'), stopwatch(root/'tests'/'interop'/'peers'/'protocol.py')
    assert ours == theirs, 'change both, or a comparison of seconds and megabytes means nothing'
