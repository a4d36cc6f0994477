"Sphinx settings of the site; `build.py` calls Sphinx"
from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from nbdev.config import get_config

cfg = get_config()
project, author, copyright, release = cfg.title, cfg.author, cfg.copyright, cfg.version
extensions = ['myst_nb', 'sphinx_copybutton']
html_theme, html_title = 'furo', cfg.title
html_static_path, html_css_files = ['static'], ['site.css']
html_copy_source, html_show_sourcelink, html_use_index = False, False, False
html_math_renderer = 'mathml'
nb_execution_mode, nb_merge_streams = 'off', True
myst_enable_extensions = ['dollarmath', 'amsmath', 'attrs_inline', 'deflist']
myst_heading_anchors = 4
suppress_warnings = ['myst.header']   # an API entry is always a third-level heading
copybutton_selector = 'div.cell_input pre, div.highlight-bash pre'
pygments_style, pygments_dark_style = 'default', 'github-dark'

def _math(display):
    "Math as MathML, which browsers draw without JavaScript, fonts or a network"
    def visit(self, node):
        self.body.append(f'<span class="math-{display}">{convert(node.astext(), display=display)}</span>')
        raise SkipNode
    return visit, None

def _relative(app, pagename, templatename, context, doctree):
    "nbdev links to the published site: from page to page these links are relative"
    if 'body' in context: context['body'] = context['body'].replace(f'{cfg.doc_host}{cfg.doc_baseurl}/', '../'*pagename.count('/'))

def setup(app):
    app.add_html_math_renderer('mathml', _math('inline'), _math('block'))
    app.connect('html-page-context', _relative)
