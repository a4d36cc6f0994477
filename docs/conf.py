"Sphinx settings of the site; `build.py` calls Sphinx"
from html import escape
from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from nbdev.config import get_config

cfg = get_config()
project, author, copyright, release = cfg.title, cfg.author, cfg.copyright, cfg.version
extensions = ['myst_nb', 'sphinx_copybutton']
html_theme, html_title = 'furo', cfg.title
html_static_path, html_css_files, html_favicon = ['static'], ['site.css'], 'static/icon.svg'
html_theme_options = dict(source_repository=cfg.git_url, source_branch=cfg.branch, top_of_page_buttons=[],
                          footer_icons=[dict(name='The repository', url=cfg.git_url, html='Source on GitHub', **{'class': ''})])
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

def _finish(app, pagename, templatename, context, doctree):
    "nbdev links to the published site: from page to page these links are relative; what scrolls can be reached by keyboard"
    context['metatags'] = context.get('metatags', '') + f'\n<meta name="description" content="{escape(cfg.description)}">'
    if 'body' not in context: return
    body = context['body'].replace(f'{cfg.doc_host}{cfg.doc_baseurl}/', '../'*pagename.count('/'))
    context['body'] = body.replace('<pre>', '<pre tabindex="0">').replace('<th></th>', '<td></td>')

def setup(app):
    app.add_html_math_renderer('mathml', _math('inline'), _math('block'))
    app.connect('html-page-context', _finish)
