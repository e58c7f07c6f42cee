"The docs site: what docs/build.py makes of a notebook, and what docs/check.py finds"
import base64, importlib, re, shutil, sys, warnings
from pathlib import Path
import pytest

for package in ('sphinx', 'myst_nb', 'nbdev'): pytest.importorskip(package, reason="needs the docs extra: pip install -e '.[docs]'")
from fastcore.nbio import dict2nb

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'docs'))
build, check = importlib.import_module('build'), importlib.import_module('check')
assert Path(build.__file__).parent == root/'docs', 'another module is called build'

REPO, SITE = 'https://example.org/repo', 'https://example.org/site/'
PNG = base64.b64encode(b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR' + (400).to_bytes(4, 'big') + (200).to_bytes(4, 'big')).decode()

@pytest.fixture
def links():
    l = build.Links({'00_core.ipynb': 'core', '10_kv.prefix.ipynb': 'kv.prefix', 'results/curves.ipynb': 'results/curves', 'results/index.ipynb': 'results/index'}, REPO, SITE)
    l.symbols = {'kv.prefix.kvprefix.save'}
    return l

def md(s, **kw): return dict(cell_type='markdown', metadata={}, source=s, **kw)
def code(s, *outputs): return dict(cell_type='code', metadata={}, source=s, outputs=list(outputs), execution_count=None)
def result(**data): return dict(output_type='execute_result', metadata={}, execution_count=None, data={k.replace('_', '/'): v for k,v in data.items()})

def page(links, *cells, notebook='00_core.ipynb', module=None):
    nb = dict2nb(dict(cells=[dict(cell_type='raw', metadata={}, source='---\ntitle: Core\ndescription: errors\n---'), *cells], metadata={}, nbformat=4, nbformat_minor=5))
    nb.module_ = module
    return build.convert(nb, notebook, links)

@pytest.mark.parametrize('notebook,name', [('00_core.ipynb', 'core'), ('10_kv.prefix.ipynb', 'kv.prefix'), ('index.ipynb', 'overview'),
                                           ('results/index.ipynb', 'results/index'), ('tutorials/01_quickstart.ipynb', 'tutorials/quickstart')])
def test_page_names(notebook, name): assert build.page_name(Path(notebook)) == name

def test_drafts_are_no_pages(tmp_path):
    for name in ('00_core.ipynb', '_draft.ipynb', '.ipynb_checkpoints/00_core-checkpoint.ipynb', 'results/a.ipynb'):
        (tmp_path/name).parent.mkdir(exist_ok=True); (tmp_path/name).touch()
    assert build.find_notebooks(tmp_path) == {'00_core.ipynb': 'core', 'results/a.ipynb': 'results/a'}

@pytest.mark.parametrize('notebook,written,leads', [
    ('00_core.ipynb', '10_kv.prefix.ipynb', 'kv.prefix.ipynb'),
    ('00_core.ipynb', '10_kv.prefix.ipynb#saving', 'kv.prefix.ipynb#saving'),
    ('results/curves.ipynb', '../00_core.ipynb', '../core.ipynb'),
    ('00_core.ipynb', 'results', 'results/index.ipynb'),
    ('results/curves.ipynb', 'index.ipynb', 'index.ipynb'),
    ('00_core.ipynb', 'recipes', 'api.md'),
    ('00_core.ipynb', '../LICENSE', f'{REPO}/blob/main/LICENSE'),
    ('results/curves.ipynb', '../../promptcompress', f'{REPO}/tree/main/promptcompress'),
    ('results/curves.ipynb', SITE + 'kv.prefix.html#kvprefix.save', '#kv.prefix.kvprefix.save'),
    ('results/curves.ipynb', SITE + 'kv.prefix.html#hidden', '../kv.prefix.ipynb'),
    ('00_core.ipynb', '#here', '#here'), ('00_core.ipynb', 'https://arxiv.org', 'https://arxiv.org')])
def test_links(links, notebook, written, leads):
    assert links.target(written, notebook) == leads
    assert not links.broken

@pytest.mark.parametrize('written', ['11_gone.ipynb', '../GONE.md', '../../elsewhere'])
def test_a_broken_link_is_named(links, written):
    links.target(written, '00_core.ipynb')
    assert len(links.broken) == 1 and '00_core.ipynb' in links.broken[0] and written in links.broken[0]

def test_code_and_formulas_keep_their_brackets(links):
    text = 'a `d[k](x)` $a[i](j)$\n```python\nf[0](y)\n```\n[b](10_kv.prefix.ipynb)'
    assert links(text, '00_core.ipynb') == text.replace('(10_kv.prefix.ipynb)', '(<kv.prefix.ipynb>)')
    assert not links.broken

def test_symbol():
    shown = '---\n\n[source](https://x/core.py#L3){target="_blank"}\n\n### tiny_lm\n\n```python\ndef tiny_lm()->promptcompress.lm.LM:\n```\n\n*Random*'
    text = build.symbol_doc(shown, 'tiny_lm', 'lm.tiny_lm')
    assert re.fullmatch(r'<span id="tiny_lm"></span>\s+\(lm\.tiny_lm\)=\s+### `tiny_lm`\s+\{\.source\}\s\[source\]\(https://x/core\.py#L3\)\s+```python\s'
                        r'def tiny_lm\(\)->LM:\s```\s+\*Random\*', text)
    assert 'span' not in build.symbol_doc(shown.replace('tiny_lm', 'LM'), 'LM', 'lm.lm') # its heading has that anchor already
    with pytest.raises(build.DocsError, match='nbdev'): build.symbol_doc('something else', 'f', 'm.f')

def test_names_that_differ_in_capitals_only(links):
    doc = '---\n\n### {}\n\n```python\ndef {}():\n```\n'
    first, second = (c['source'] for c in page(links, md(doc.format('Perplexity', 'Perplexity'), shows_='Perplexity'), md(doc.format('perplexity', 'perplexity'), shows_='perplexity'))[1:])
    assert first.startswith('(core.perplexity)=') and second.startswith('### `perplexity`')

def test_cells(links):
    head, fold, hidden, quiet = page(links, md('<!-- WARNING: made by nbdev -->'), code('#| code-fold: show\nx = 1'), code('#| echo: false\nx', result(text_plain='1')),
                                     code('#| include: false\ny'), code('#| output: false\nz', result(text_plain='2')), module='lib.core')
    assert head['source'].startswith('# Core') and 'errors' in head['source'] and '`lib.core`' in head['source'] and f'({REPO}/blob/main/nbs/00_core.ipynb)' in head['source']
    assert fold['metadata']['tags'] == ['hide-input'] and fold['source'] == 'x = 1'
    assert hidden['metadata']['tags'] == ['remove-input'] and len(hidden['outputs']) == 1
    assert quiet['source'] == 'z' and not quiet['outputs']

@pytest.mark.parametrize('notebook,leads', [('tutorials/1_quickstart.ipynb', True), ('explanations/positions.ipynb', True),
                                            ('results/curves.ipynb', False), ('00_core.ipynb', False)])
def test_open_in_colab(links, notebook, leads):
    "A link in words under the title, since a badge would be a picture from elsewhere; where nothing runs there is none"
    links.notebooks[notebook] = build.page_name(Path(notebook))
    head, *_ = page(links, code('1 + 1'), notebook=notebook)
    link = f'{{.colab}}\n[Open in Colab](https://colab.research.google.com/github/repo/blob/main/nbs/{notebook})'
    assert head['source'].endswith(link) if leads else 'colab' not in head['source']
    assert 'colab' not in page(links, md('Words.'), notebook=notebook)[0]['source']

def test_the_colab_link_is_styled_and_leads_to_what_installs_itself():
    assert '.yue p.colab a {' in (root/'docs'/'static'/'site.css').read_text(encoding='utf-8')
    linked = []
    for path in (p for s in build.COLAB for p in sorted((root/'nbs'/s).glob('*.ipynb'))):
        codes = [c.source for c in build.read_nb(path).cells if c.cell_type == 'code']
        if codes: linked.append(path)
        assert not codes or re.match(r'#\| eval: false\n%pip install .*promptcompress', codes[0]), f'{path.name}: on Colab the package must be installed first'
    assert len(linked) > 9

def test_outputs(links):
    stream = lambda name, text: dict(output_type='stream', name=name, text=text)
    widget = result(**{'application_vnd.jupyter.widget-view+json': '{}', 'text_plain': ' 50%|###  | 1/2'})
    *_, cell = page(links, md('## Sizes'), code('plot()', stream('stderr', 'Warning'), stream('stdout', '100%|####| 2/2'), stream('stdout', 'kept'), widget,
                                                 result(text_markdown=['[p](10_kv.prefix.ipynb)']), result(image_png=PNG)))
    kept, table, picture = cell['outputs']
    assert kept['text'] == 'kept' and table['data'] == {'text/markdown': '[p](<kv.prefix.ipynb>)'} and 'image/png' in picture['data']
    assert cell['metadata']['mystnb']['image'] == dict(width='200px', alt='Figure: Sizes')

def test_front():
    cells = [dict(cell_type='raw', metadata={}, source='---\ntitle: t\ndescription: says what\n---'), md('Lead.\n\nMore.'), md('## From Python'), code('x = 1'),
             code('x', result(text_plain='1')), md('## Else'), code('y')]
    nb = dict2nb(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))
    made = build.front('{{description}}|{{lead}}|{{picture of a/b}}|{{code under From Python}}|{{sections}}', nb, lambda p: f'<{p}>', 'S')
    assert made == 'says what|Lead.|<a/b>|```python\nx = 1\nx\n#> 1\n```|S'
    with pytest.raises(build.DocsError, match='No Such'): build.front('{{code under No Such}}', nb, None, '')
    with pytest.raises(build.DocsError, match='unknown'): build.front('{{unknown}}', nb, None, '')

def test_other_files_are_not_replaced(tmp_path):
    build.check_out(tmp_path/'new'); build.check_out(tmp_path)
    (tmp_path/'thesis.tex').touch()
    with pytest.raises(build.DocsError, match='another folder'): build.check_out(tmp_path)
    (tmp_path/'.buildinfo').touch(); build.check_out(tmp_path)

def test_one_notebook_through_nbdev():
    "The signature, its comments, the link to the source and the link of a name in backticks; and nothing was run"
    nb = build.processed(root/'nbs'/'01_lm.ipynb')
    shows = {c.shows_: c.source for c in nb.cells if 'shows_' in c}
    assert nb.module_ == 'promptcompress.lm' and 'LM' in shows and 'family:str=' in shows['tiny_lm'] and '# One of `FAMILIES`' in shows['tiny_lm']
    assert all('[source](' in s for s in shows.values()) and any('](' in c.source and 'lm.html#' in c.source for c in nb.cells if c.cell_type == 'markdown')

@pytest.mark.parametrize('name', ['04_leakage.ipynb', '12_kv.makers.ipynb', 'tutorials/1_quickstart.ipynb'])
def test_nbdev_docs_processes_a_notebook(name, tmp_path, monkeypatch):
    "What `nbdev-docs` does before Quarto: exported cells and imports run, and nothing else does"
    from nbdev.processors import FilterDefaults
    from nbdev.serve_drv import exec_nb
    monkeypatch.chdir(root); monkeypatch.setenv('IN_TEST', '1')
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='Found cells containing imports')
        exec_nb(root/'nbs'/name, tmp_path/'made.ipynb', FilterDefaults)
    made = build.read_nb(tmp_path/'made.ipynb').cells
    assert made[0].cell_type == 'raw' and 'title:' in made[0].source
    shows = [c for c in made if c.cell_type == 'code' and 'show_doc(' in c.source]
    assert all(c.outputs for c in shows) and bool(shows) != name.startswith('tutorials')

def test_every_link_of_the_notebooks():
    cfg = build.get_config(path=root)
    links = build.Links(build.find_notebooks(root/'nbs'), cfg.git_url, f'{cfg.doc_host}{cfg.doc_baseurl}')
    for n in links.notebooks:
        for c in build.read_nb(root/'nbs'/n).cells:
            if c.cell_type == 'markdown': links(c.source, n)
    assert not links.broken

def test_the_check_finds_broken_links(tmp_path):
    (tmp_path/'index.html').write_text('<a href="b.html#there">1</a><a href="b.html#gone">2</a><a href="c.html">3</a><img src="no.png"><a href="https://x.org">4</a>')
    (tmp_path/'b.html').write_text('<p id="there"><a href="#there">5</a><a href=".">6</a>')
    problems, n = check.broken_links(tmp_path)
    assert n == 6 and len(problems) == 3 and all(any(w in p for p in problems) for w in ('#gone', 'c.html', 'no.png'))
