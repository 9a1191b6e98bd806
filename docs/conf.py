"""Sphinx configuration of the site: the pages of this folder and the executed labs, without any external request."""

from __future__ import annotations

from importlib.metadata import version as read_version
from typing import Any

from docutils import nodes

project = "llmworks"
author = copyright = "The llmworks contributors"
release = version = read_version("llmworks")

extensions = ["myst_nb", "sphinx_copybutton"]
html_theme = "furo"
html_title = "llmworks"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
exclude_patterns = ["build", "labs/learner", "labs/executed", "_static"]

KATEX = "vendor/katex-0.19.1"  # typesets formulas in the browser; Sphinx' own choices load from the network
html_css_files += [f"{KATEX}/katex.min.css"]
html_js_files = [(f"{KATEX}/katex.min.js", {"defer": ""}), "math.js"]
html_math_renderer = "vendored_katex"

nb_execution_mode = "off"  # the labs are executed by `make labs`
nb_merge_streams = True
nb_render_text_lexer = "none"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]


def _visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(f'<span class="math">\\({translator.encode(node.astext())}\\)</span>')
    raise nodes.SkipNode


def _visit_block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">\\[{translator.encode(node.astext())}\\]</div>')
    raise nodes.SkipNode


# Pages outside of this folder, as the repository links them, and their names on the site
OUTSIDE = {"../benchmarks/README.md": "benchmarks.md", "../README.md": "index.md"}


def _link_pages(app: Any, name: str, source: list[str]) -> None:
    for path, page in OUTSIDE.items():
        source[0] = source[0].replace(f"]({path}", f"]({page}")


def setup(app: Any) -> None:
    """Register the renderer of formulas and the links to pages outside of this folder."""
    app.connect("source-read", _link_pages)
    app.add_html_math_renderer("vendored_katex", (_visit_inline, None), (_visit_block, None))
