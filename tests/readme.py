"""README.md is nbs/index.ipynb as Markdown: `python tests/readme.py` writes it, `python tests/readme.py --check` compares.

Markdown cells go over as they are, code cells as fenced blocks with their text output indented below; `#| hide` cells stay out.
"""
import json, posixpath, re, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
index, readme = root/'nbs'/'index.ipynb', root/'README.md'

def from_root(text):
    "`text` with links that start in nbs/ made to start at the top, where the README is"
    def move(m): return f"]({posixpath.normpath(posixpath.join('nbs', m[1]))})"
    return re.sub(r'\]\((?!https?:|mailto:|[#/])([^)\s]+)\)', move, text)

def directives(source): return [l.removeprefix('#|').strip() for l in source.splitlines() if l.startswith('#|')]

def text_of(output):
    "The plain text of one output of a code cell"
    if output.get('name') == 'stderr': return '' # progress bars
    return ''.join(output.get('text') or output.get('data', {}).get('text/plain', ''))

def blocks(cell):
    "The Markdown blocks that `cell` becomes"
    source = ''.join(cell['source'])
    if {'hide', 'include: false'} & set(directives(source)): return
    if cell['cell_type'] == 'markdown': yield from_root(source).strip()
    if cell['cell_type'] != 'code': return
    code = '\n'.join(l for l in source.splitlines() if not l.startswith('#|')).strip()
    if code: yield f'```python\n{code}\n```'
    shown = ''.join(map(text_of, cell['outputs'])).rstrip()
    if shown: yield '\n'.join(f'    {l}'.rstrip() for l in shown.splitlines())

def render():
    cells = json.loads(index.read_text(encoding='utf-8'))['cells']
    return '<!-- written by tests/readme.py from nbs/index.ipynb: edit that -->\n\n' + '\n\n'.join(b for c in cells for b in blocks(c)) + '\n'

def main(args):
    if args not in ([], ['--check']): sys.exit(__doc__)
    text = render()
    if not args: readme.write_text(text, encoding='utf-8')
    elif not readme.exists() or readme.read_text(encoding='utf-8') != text:
        sys.exit('README.md is not what nbs/index.ipynb makes: run `python tests/readme.py` and commit')

if __name__ == '__main__': main(sys.argv[1:])
