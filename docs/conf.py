"Sphinx's settings; docs/build.py copies this file beside the pages it makes"
from pathlib import Path
from nbdev.config import get_config

here = Path(__file__).parent
nbdev = get_config(here)
project, author, html_title = nbdev.lib_name, f'{nbdev.lib_name} authors', nbdev.lib_name
project_copyright = author
extensions = ['myst_nb', 'sphinx.ext.mathjax', 'sphinx_copybutton']

nb_execution_mode = 'off'
nb_render_markdown_format = 'myst' # tables and links in outputs
nb_ipywidgets_js = {} # widgets would load scripts from elsewhere
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'deflist', 'attrs_block', 'attrs_inline', 'alert']
myst_heading_anchors = 4
suppress_warnings = ['myst.header'] # a page may go from its title to a name (###) directly
mathjax_path = 'mathjax/tex-chtml.js'
mathjax3_config = dict(options=dict(enableMenu=False))

html_theme = 'shibuya'
templates_path = ['_templates'] # without a font from elsewhere
html_static_path, html_css_files = ['_static'], ['site.css']
html_copy_source = html_show_sourcelink = html_use_index = False
html_sidebars = {'**': ['sidebars/localtoc.html']} # the theme's own list asks GitHub for numbers
SECTIONS = dict(Overview='overview', Tutorials='tutorials/index', Explanations='explanations/index', Results='results/index', API='api')
html_theme_options = dict(accent_color='blue', show_ai_links=False, globaltoc_expand_depth=1, nav_links=[
    *(dict(title=title, url=page) for title,page in SECTIONS.items() if any(here.glob(f'{page}.*'))), # the header
    dict(title='Source', url=nbdev.git_url, external=True)])
