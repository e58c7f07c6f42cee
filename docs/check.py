"""Looks at the built site in a real browser, without a network: `python docs/check.py _site`

Links and anchors are followed in the files; then every page is opened, wide and at the width of a phone: pictures load, formulas are set,
nothing asks for another machine, the console stays empty, the page is no wider than the screen. `--shots docs/screenshots` takes pictures too.
The browser is a chromium or chrome of this machine: `CHROMIUM=PATH` names one that is not on PATH.
"""
import argparse, functools, http.server, os, shutil, sys, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

PHONE, DESK = dict(width=390, height=844), dict(width=1280, height=800)
SHOTS = [('front', 'index.html', 'light', DESK), ('front-phone', 'index.html', 'light', PHONE), ('api', 'kv.prefix.html', 'light', DESK),
         ('result', 'results/regeneration_curves.html', 'light', DESK), ('result-dark', 'results/regeneration_curves.html', 'dark', DESK),
         ('search', 'search.html?q=KVPrefix', 'light', DESK), ('tutorial', 'tutorials/quickstart.html', 'light', DESK),
         ('playground', 'playground.html#the-controls', 'light', DESK)]

class Page(HTMLParser):
    "The names that a page can be entered at, what it links to and what it shows"
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.files = set(), [], []
        self.feed(path.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        if tag == 'a' and attrs.get('href'): self.links.append(attrs['href'])
        if tag in ('img', 'script') and attrs.get('src'): self.files.append(attrs['src'])
        if tag == 'link' and attrs.get('href') and attrs.get('rel') != 'canonical': self.files.append(attrs['href'])

def broken_links(site):
    "(problems, number of links that were followed) in the files of `site`"
    pages = {p: Page(p) for p in site.rglob('*.html')}
    problems, n = [], 0
    for path,page in pages.items():
        for href in page.links + page.files:
            if urlsplit(href).scheme or href.startswith('//'): continue # another site
            n += 1
            file, anchor = urldefrag(href)
            to = (path.parent/unquote(urlsplit(file).path)).resolve() if file else path
            if to.is_dir(): to = to/'index.html'
            if not to.exists(): problems.append(f'{path.relative_to(site)}: no file for {href}')
            elif anchor and to in pages and unquote(anchor) not in pages[to].ids: problems.append(f'{path.relative_to(site)}: no place for {href}')
    return problems, n

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

def serve(site):
    "The address at which `site` is served from now on"
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{server.server_port}/'

def find_browser():
    names = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
    found = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, names)), None)
    if not found: sys.exit(f"no browser: install one of {', '.join(names)}, or name it with CHROMIUM=PATH")
    return found

STATE = """() => ({
    pictures: [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src),
    formulas: document.querySelectorAll('.math').length, unset: [...document.querySelectorAll('.math')].filter(m => !m.querySelector('mjx-container')).length,
    wrong: document.querySelectorAll('mjx-merror, [data-mjx-error]').length,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    widest: [...document.querySelectorAll('main *, article *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).slice(0, 2)
        .map(e => `${e.tagName}.${e.className}`)})"""

class Visit:
    "One browser window, and what went wrong in it"
    def __init__(self, browser, address, screen, scheme='light'):
        self.address, self.problems = address, []
        self.context = browser.new_context(viewport=screen, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.on('console', lambda m: m.type in ('error', 'warning') and self.note(f'console: {m.text}'))
        self.page.on('pageerror', lambda e: self.note(f'error: {e}'))
        self.page.on('requestfailed', lambda r: self.note(f'failed: {r.url}'))
        self.context.route('**', self.only_here)
    def note(self, what): self.problems.append(f'{self.page.url.removeprefix(self.address)}: {what}')
    def only_here(self, route):
        if route.request.url.startswith((self.address, 'data:', 'blob:')): return route.continue_()
        self.note(f'asks for {route.request.url}'); route.abort()
    def open(self, name):
        self.page.goto(self.address + name, wait_until='load')
        self.page.evaluate("async () => { for (const i of document.images) i.loading = 'eager';"
                           " if (window.MathJax && MathJax.startup) await MathJax.startup.promise }")
        self.page.wait_for_load_state('networkidle')
        return self.page
    def look(self, name):
        "Open the page `name`, note what is wrong with it; returns the number of (pictures, formulas)"
        state = self.open(name).evaluate(STATE)
        for src in state['pictures']: self.note(f'picture does not load: {src}')
        if state['unset'] or state['wrong']: self.note(f"{state['unset']} formulas not set, {state['wrong']} wrong")
        if state['wide'] > 0: self.note(f"{state['wide']} px wider than the screen: {state['widest']}")
        return self.page.evaluate('document.images.length'), state['formulas']

def look_at(browser, site, address):
    "(problems, counts) of every page at both widths, and of a search"
    problems, counts = [], {}
    names = sorted(str(p.relative_to(site)) for p in site.rglob('*.html'))
    for screen in (DESK, PHONE):
        visit = Visit(browser, address, screen)
        seen = [visit.look(n) for n in names]
        counts = dict(pages=len(names), pictures=sum(p for p,_ in seen), formulas=sum(f for _,f in seen))
        problems += [f"at {screen['width']} px, {p}" for p in visit.problems]
        visit.context.close()
    visit = Visit(browser, address, DESK)
    counts['hits'] = len(hits := results(visit.open('search.html?q=KVPrefix')))
    if not any('kv.prefix.html' in h for h in hits): problems.append(f'a search for KVPrefix does not lead to its page, but to {hits[:5]}')
    return problems + visit.problems, counts

def results(page):
    "Where the hits of a search page lead"
    page.wait_for_function("document.querySelector('#search-results ul.search li a') !== null", timeout=15000)
    page.wait_for_timeout(1500) # hits come in one after the other
    return page.eval_on_selector_all('#search-results li a', 'all => all.map(a => a.href)')

def take_shots(browser, address, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name,page,scheme,screen in SHOTS:
        visit = Visit(browser, address, screen, scheme)
        opened = visit.open(page)
        if page.startswith('search'): results(opened)
        opened.screenshot(path=folder/f'{name}.png')
        visit.context.close()

def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('site', type=Path, help='folder that docs/build.py made')
    parser.add_argument('--shots', type=Path, help='folder for screenshots')
    parser.add_argument('--links-only', action='store_true', help='follow links and anchors, open no browser')
    a = parser.parse_args(args)
    site = a.site.resolve()
    if not (site/'index.html').exists(): sys.exit(f'{a.site} holds no site: python docs/build.py --out {a.site}')
    problems, n = broken_links(site)
    said = f'{n} links'
    if not a.links_only:
        from playwright.sync_api import sync_playwright
        address = serve(site)
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=find_browser(), args=['--no-sandbox'])
            found, counts = look_at(browser, site, address)
            if a.shots: take_shots(browser, address, a.shots)
            browser.close()
        problems += found
        said += ', ' + ', '.join(f'{v} {k}' for k,v in counts.items()) + ' of a search for KVPrefix'
    print(f'{said}: {len(problems)} problems', *problems, sep='\n  ')
    return bool(problems)

if __name__ == '__main__': sys.exit(main())
