"""The docs site, from the notebooks: `python docs/build.py --out _site`

nbdev's processors prepare each notebook, `convert` turns it into what MyST-NB reads, Sphinx makes the site. Everything happens in a
temporary folder; nothing is downloaded, and no notebook is run: what a page shows is what its notebook holds.
"""
import argparse, base64, importlib, importlib.util, json, os, posixpath, re, shutil, struct, sys, tempfile, textwrap
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import urlsplit
import yaml
from fastcore.nbio import read_nb
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, exec_show_docs
from nbdev.showdoc import show_doc

here, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
SECTIONS = dict(tutorials=('Tutorials', 'Things to do, step by step. Each runs on a laptop, and on Colab.'),
                explanations=('Explanations', 'How it works, and why.'),
                results=('Results', 'What was measured, with the commands that measure it again.'))
COLAB = ('tutorials', 'explanations') # the sections whose pages lead to Colab, where there is something to run
GROUPS = {'': 'Foundations', 'kv': 'Compressed prompts', 'weights': 'Smaller models', 'soft': 'Soft prompts', 'evaluation': 'Evaluation',
          'verbs': 'Command line', 'recipes': 'Recipes'} # the first part of a module's name, and what its modules have in common
HOME = dict(train='kv', instruct='soft', cli='verbs') # modules without a package, and where a reader looks for them

class DocsError(Exception): "The site can't be built; the message says what to change"

# -- which notebook is which page

def page_name(notebook):
    "The page of `notebook`, a path in nbs/: named as nbdev names it, so that links that nbdev makes anywhere lead there"
    if str(notebook) == 'index.ipynb': return 'overview' # the site has a front page of its own
    return str(notebook.with_name(re.sub(r'^\d+[a-zA-Z]*_', '', notebook.name)).with_suffix(''))

def find_notebooks(nbs):
    "path in nbs/ -> page, without drafts and checkpoints"
    found = sorted(p.relative_to(nbs) for p in nbs.rglob('*.ipynb'))
    return {str(p): page_name(p) for p in found if not any(part.startswith(('.', '_')) for part in p.parts)}

# -- nbdev's part

class bound_show_docs(Processor):
    "nbdev's `exec_show_docs` runs every cell that imports something; here the names are those of the exported module, and nothing runs"
    def begin(self):
        exported = next((c.directives_['default_exp'] for c in self.nb.cells if 'default_exp' in getattr(c, 'directives_', {})), None)
        self.nb.module_ = exported and f'{get_config().lib_name}.{exported}'
        self.names = vars(importlib.import_module(self.nb.module_)) if exported else {}
    def cell(self, cell):
        if cell.cell_type != 'code' or not (found := re.search(r'^show_doc\(([\w.]+)', cell.source, re.M)): return
        first, *rest = found[1].split('.')
        obj = self.names[first]
        for name in rest: obj = getattr(obj, name)
        cell.cell_type, cell.source, cell.shows_ = 'markdown', show_doc(obj)._repr_markdown_(), found[1]
        cell.pop('outputs', None)

class DocProcessors(FilterDefaults):
    "What nbdev does to a notebook for the docs"
    def base_procs(self): return [bound_show_docs if p is exec_show_docs else p for p in super().base_procs()]

def processed(path):
    "The notebook at `path` after nbdev's processors"
    nb = read_nb(path)
    before, os.environ['IN_TEST'] = os.environ.get('IN_TEST'), '1' # as nbdev does: `nbdev_export()` is not meant
    try: DocProcessors()(nb)
    finally: os.environ.pop('IN_TEST') if before is None else os.environ.update(IN_TEST=before)
    return nb

# -- from nbdev's notebook to MyST's

class Links:
    "Where links lead: to pages of this site, or to files of the repository"
    def __init__(self, notebooks, repository, documentation, tree=root):
        self.notebooks, self.tree, self.symbols, self.broken = notebooks, tree, set(), []
        self.repository, self.documentation = repository.rstrip('/'), documentation.rstrip('/') + '/'

    def file(self, path): return f"{self.repository}/{'tree' if (self.tree/path).is_dir() else 'blob'}/main/{path}"

    def colab(self, notebook): return f"https://colab.research.google.com/github/{urlsplit(self.repository).path.strip('/')}/blob/main/nbs/{notebook}"

    def target(self, target, notebook):
        "What `target`, written in `notebook`, is called on the site"
        page, folder = self.notebooks[notebook], posixpath.dirname(self.notebooks[notebook])
        def to(other): return posixpath.relpath(other, folder or '.')
        if target.startswith(self.documentation): # nbdev: a name in backticks
            other, _, symbol = target.removeprefix(self.documentation).partition('.html#')
            if f'{other}.{symbol}' in self.symbols: return f'#{other}.{symbol}'
            if other in self.notebooks.values(): return to(f'{other}.ipynb')
        if target.startswith('#') or re.match(r'[a-z]+:', target): return target
        path, _, anchor = target.partition('#')
        path = posixpath.normpath(posixpath.join('nbs', posixpath.dirname(notebook), path))
        inside = path.removeprefix('nbs/')
        if inside in self.notebooks: return to(f'{self.notebooks[inside]}.ipynb') + (f'#{anchor}' if anchor else '')
        if inside == 'recipes': return to('api.md')
        if f'{inside}/index.ipynb' in self.notebooks or inside in SECTIONS and path.startswith('nbs/'): return to(f'{inside}/index') + '.ipynb'
        if not path.startswith('..') and (self.tree/path).exists(): return self.file(path)
        self.broken.append(f'{notebook} links to {target}, which is neither a notebook nor a file of the repository')
        return target

    def __call__(self, text, notebook):
        "`text` with its links mended, but for code and formulas"
        parts = re.split(r'(^```.*?^```|`[^`\n]*`|\$[^$\n]+\$)', text, flags=re.S|re.M)
        parts[::2] = [re.sub(r'\]\(([^)\s]+)\)', lambda m: f'](<{self.target(m[1], notebook)}>)', s) for s in parts[::2]]
        return ''.join(parts)

def front_matter(nb):
    "title and description"
    raw = next((c.source for c in nb.cells if c.cell_type == 'raw'), None)
    if raw is None: raise DocsError('a notebook begins with `# Title` and `> what it is for`')
    return next(yaml.safe_load_all(raw))

def directives(source): return {m[1]: m[2].strip() for l in source.splitlines() if (m := re.match(r'#\|\s*([\w-]+):?\s*(.*)$', l))}
def without_directives(source): return '\n'.join(l for l in source.splitlines() if not l.startswith('#|')).strip('\n')

def symbol_doc(text, name, target=None):
    "What show_doc made of `name`, as a section that links can name `target`, with the link to its source under the heading"
    text = re.sub(r'\bpromptcompress(?:\.\w+)*\.(?=[A-Z])', '', text) # in annotations: KVPrefix, not where it is
    found = re.search(r'^(?:---\s*)?(?:\[source\]\(([^)]+)\)\S*[^\n]*\n+)?#+ [^\n]*\n(.*)$', text.lstrip(), re.S)
    if not found: raise DocsError(f'show_doc of {name} looks different than with the nbdev that constraints.txt names')
    source, body = found.groups()
    mark = f'({target})=\n\n' if target else ''
    if target and not name.isalnum(): mark = f'<span id="{name.lower()}"></span>\n\n{mark}' # the anchor that nbdev gives it
    return f'{mark}### `{name}`\n\n' + (f'{{.source}}\n[source]({source})\n\n' if source else '') + body.strip()

NOISE = re.compile(r'\d+%\|') # a progress bar
def shown(outputs, heading, mend):
    "`outputs` without progress bars and widgets, and how wide pictures are (two of their pixels are one of the page's)"
    kept, width = [], None
    for o in outputs:
        if o['output_type'] == 'stream':
            if o.get('name') == 'stderr' or NOISE.search(''.join(o['text'])): continue
        data = {k: ''.join(v) if isinstance(v, list) else v for k,v in o.get('data', {}).items() if 'widget' not in k}
        if o['output_type'] in ('display_data', 'execute_result'):
            if not data or NOISE.search(str(data.get('text/plain', ''))): continue
            if 'text/markdown' in data: data['text/markdown'] = mend(data['text/markdown'])
            if 'image/png' in data: width = struct.unpack('>I', base64.b64decode(data['image/png'])[16:20])[0]//2
            o = {**o, 'data': data, 'metadata': {}}
        kept.append(dict(o))
    return kept, dict(mystnb=dict(image=dict(width=f'{width}px', alt=f'Figure: {heading}'))) if width else {}

def convert(nb, notebook, links):
    "The cells of the page that `nb`, nbdev's version of `notebook`, becomes"
    page, about, cells, targets = links.notebooks[notebook], front_matter(nb), [], set()
    heading, runs = about['title'], any(c.cell_type == 'code' for c in nb.cells)
    def text(s): cells.append(dict(cell_type='markdown', metadata={}, source=s))
    def mend(s): return links(s, notebook)
    def named(c): # targets know no capitals: where names differ in those only, the first is meant
        target = f'{page}.{c.shows_.lower()}'
        known = target in targets; targets.add(target)
        return symbol_doc(c.source, c.shows_, None if known else target)
    for c in nb.cells:
        source = getattr(c, 'source', '')
        if c.cell_type == 'raw':
            module = f'`{nb.module_}` · ' if nb.module_ else ''
            colab = f'\n\n{{.colab}}\n[Open in Colab]({links.colab(notebook)})' if runs and notebook.split('/')[0] in COLAB else ''
            text(f"# {about['title']}\n\n{{.lead}}\n{mend(about.get('description') or '')}\n\n{{.origin}}\n{module}[notebook]({links.file('nbs/' + notebook)}){colab}")
        elif c.cell_type == 'markdown':
            if source.startswith('<!-- WARNING'): continue
            heading = next(iter(re.findall(r'^##+ (.*)', source, re.M)[::-1]), heading)
            text(mend(named(c) if 'shows_' in c else source))
        else:
            d, code = directives(source), without_directives(source)
            if d.get('include') == 'false' or not code: continue
            outputs, metadata = shown(c.get('outputs', []), heading, mend)
            if d.get('output') == 'false': outputs = []
            tags = ['remove-input']*(d.get('echo') == 'false') + ['hide-input']*('code-fold' in d)
            cells.append(dict(cell_type='code', execution_count=None, metadata={**metadata, 'tags': tags}, source=code, outputs=outputs))
    return cells

def write_notebook(path, cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = dict(kernelspec=dict(display_name='Python 3', language='python', name='python3'), language_info=dict(name='python'))
    nb = dict(nbformat=4, nbformat_minor=5, metadata=kernel, cells=[{**c, 'id': f'c{i}'} for i,c in enumerate(cells)])
    path.write_text(json.dumps(nb, indent=1), encoding='utf-8')

# -- the pages that are no notebook

def toctree(pages, caption=''):
    return '\n'.join(['```{toctree}', ':hidden:', *([f':caption: {caption}'] if caption else []), '', *pages, '```'])

def listing(pages, about):
    "A list of pages with what each is for"
    return '\n\n'.join(f"[{about[p]['title']}](<{posixpath.basename(p)}.ipynb>)\n: {about[p].get('description') or ''}" for p in pages)

def api(pages, about, modules):
    "The page that lists the modules, in groups"
    by = {}
    for p in pages:
        first = p.replace('/', '.').split('.')[0]
        by.setdefault(HOME.get(first, first if first in GROUPS else ''), []).append(p)
    def entry(p): return f"[`{modules[p]}`](<{p}.ipynb>)\n: **{about[p]['title']}.** {about[p].get('description') or ''}"
    blocks = ['# API', 'Each page is the notebook that a module is written in: what is in it, why, and what it does when it runs.']
    for g in [g for g in GROUPS if g in by]: blocks += [f'## {GROUPS[g]}', *map(entry, by[g]), toctree(by[g], GROUPS[g])]
    return '\n\n'.join(blocks) + '\n'

def first_picture(nb):
    "The first picture among the outputs of `nb`"
    data = (o['data']['image/png'] for c in nb.cells if c.cell_type == 'code' for o in c.outputs if 'image/png' in o.get('data', {}))
    if (found := next(data, None)) is None: raise DocsError('the notebook that docs/front.md takes its picture from holds none')
    return base64.b64decode(''.join(found))

def ten_lines(nb, heading):
    "The code under `heading`, with what it shows as comments"
    at = next((i for i,c in enumerate(nb.cells) if c.source.strip().startswith(f'## {heading}')), None)
    if at is None: raise DocsError(f'nbs/index.ipynb has no `## {heading}`, from which docs/front.md takes its code')
    lines = []
    for c in nb.cells[at+1:]:
        if c.cell_type == 'markdown': break
        lines += [re.sub(r' {2,}#', '  #', l) for l in without_directives(c.source).splitlines()]
        for o in c.outputs:
            text = ''.join(o.get('data', {}).get('text/plain', ''))
            lines += textwrap.wrap(text, 60, initial_indent='#> ', subsequent_indent='#  ')
    return '```python\n' + '\n'.join(lines) + '\n```'

def front(template, index, picture, sections):
    "docs/front.md with its places filled: `{{picture of NOTEBOOK}}`, `{{code under HEADING}}`, ..."
    paragraph = next(c.source for c in index.cells if c.cell_type == 'markdown' and not c.source.startswith(('#', '<!--'))).split('\n\n')[0]
    fill = dict(description=lambda: front_matter(index)['description'], lead=lambda: paragraph, sections=lambda: sections)
    def place(m):
        if m[1] == 'picture of': return picture(m[2])
        if m[1] == 'code under': return ten_lines(index, m[2])
        if m[1] in fill: return fill[m[1]]()
        raise DocsError(f'docs/front.md has a place {m[0]} that docs/build.py cannot fill')
    return re.sub(r'\{\{(picture of|code under|\w+) ?([^}]*)\}\}', place, template)

# -- all of it

def write_source(src, nbs, links):
    "Sphinx's source folder"
    done = {n: processed(nbs/n) for n in links.notebooks}
    about = {page: front_matter(done[n]) for n,page in links.notebooks.items()}
    modules = {page: done[n].module_ for n,page in links.notebooks.items() if done[n].module_}
    links.symbols |= {f'{links.notebooks[n]}.{c.shows_.lower()}' for n,nb in done.items() for c in nb.cells if 'shows_' in c}
    pages = {n: convert(nb, n, links) for n,nb in done.items()}
    if links.broken: raise DocsError('\n  '.join(['mend these links:', *links.broken]))

    sections, top = [], ['Overview <overview>']
    for s,(title, says) in SECTIONS.items():
        own = [p for p in links.notebooks.values() if p.startswith(f'{s}/') and p != f'{s}/index']
        if not own: continue
        tree = toctree([posixpath.basename(p) for p in own])
        if f'{s}/index.ipynb' in pages: pages[f'{s}/index.ipynb'].append(dict(cell_type='markdown', metadata={}, source=tree))
        else: write_notebook(src/s/'index.ipynb', [dict(cell_type='markdown', metadata={}, source=f'# {title}\n\n{says}\n\n{listing(own, about)}\n\n{tree}')])
        top.append(f'{title} <{s}/index>'); sections.append(f'[{title}](<{s}/index.ipynb>)\n: {says}')
    for n,cells in pages.items(): write_notebook(src/f'{links.notebooks[n]}.ipynb', cells)
    own = [p for p in links.notebooks.values() if p != 'overview' and p.split('/')[0] not in SECTIONS]
    (src/'api.md').write_text(api(own, about, modules), encoding='utf-8')
    sections.append('[API](api.md)\n: Every module, class and function.')

    def picture(page):
        notebook = next((n for n,p in links.notebooks.items() if p == page), None)
        if notebook is None: raise DocsError(f'docs/front.md wants a picture of {page}, which is no page')
        (src/'front.png').write_bytes(first_picture(done[notebook]))
        return f"[![{about[page]['title']}](front.png)](<{page}.ipynb>)"
    template = (here/'front.md').read_text(encoding='utf-8')
    body = front(template, done['index.ipynb'], picture, '\n\n'.join(sections))
    (src/'index.md').write_text(body + '\n' + toctree(top + ['api']) + '\n', encoding='utf-8')

def vendor_mathjax(static):
    "MathJax and its fonts out of the package that carries them, so that formulas need no network"
    spec = importlib.util.find_spec('sphinx-mathjax-offline')
    if spec is None: raise DocsError("the package sphinx-mathjax-offline is missing: pip install -c constraints.txt -e '.[docs]'")
    package = Path(spec.origin).parent/'static'/'mathjax'
    fonts = 'output/chtml/fonts/woff-v2'
    shutil.copytree(package/fonts, static/'mathjax'/fonts)
    shutil.copy(package/'tex-chtml.js', static/'mathjax')

def check_out(out):
    "Refuse to replace a folder that is not an earlier site"
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not (out/'.buildinfo').exists()):
        raise DocsError(f'--out {out} exists and is not a site that this command built: give another folder')

def build(out, nbs=root/'nbs', links=None):
    "Build the site into the folder `out`; returns Sphinx's exit code, which is not 0 if there was a warning"
    from sphinx.cmd.build import build_main
    check_out(out)
    os.chdir(root) # nbdev finds its settings from here
    cfg = get_config()
    if not any(e.name == cfg.lib_name for e in entry_points(group='nbdev')):
        raise DocsError(f"{cfg.lib_name} is not installed, so nbdev can't link its names: pip install -c constraints.txt -e '.[docs]'")
    links = links or Links(find_notebooks(nbs), cfg.git_url, f'{cfg.doc_host}{cfg.doc_baseurl}')
    with tempfile.TemporaryDirectory() as tmp:
        src, site = Path(tmp)/'source', Path(tmp)/'site'
        shutil.copytree(here/'static', src/'_static')
        shutil.copytree(here/'templates', src/'_templates')
        for f in (here/'conf.py', root/'pyproject.toml'): shutil.copy(f, src) # Sphinx reads conf.py there, and nbdev its settings
        vendor_mathjax(src/'_static')
        write_source(src, nbs, links)
        rc = build_main(['-q', '-W', '--keep-going', '-b', 'html', '-d', f'{tmp}/trees', str(src), str(site)])
        if rc: return rc
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(site, out)
    (out/'.nojekyll').touch() # GitHub Pages: folders that begin with _ are served as they are
    print(f"{out}: {len(list(out.rglob('*.html')))} pages, {sum(p.stat().st_size for p in out.rglob('*') if p.is_file())/1e6:.1f} MB")
    return 0

def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=root/'_site', help='folder of the site (default: _site)')
    try: return build(parser.parse_args(args).out.resolve())
    except DocsError as e: print(f'docs: {e}', file=sys.stderr)
    return 2

if __name__ == '__main__': sys.exit(main())
