"""How Sphinx builds the documentation: ``sphinx-build -W -n docs docs/_build/html``."""

import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.domains.python import PyXRefRole

import scldm_cd4

HERE = Path(__file__).resolve().parent
for old in HERE.glob("tutorials/*.ipynb"):
    old.unlink()
for notebook in HERE.parent.glob("tutorials/*.ipynb"):  # at the top level, where people look for them; links fit there
    page = HERE / "tutorials" / notebook.name
    page.write_text(notebook.read_text(encoding="utf-8").replace("](../docs/", "](../"), encoding="utf-8")

project = "scldm_cd4"
author = "The scldm_cd4 developers"
copyright = f"2026, {author}"
version = release = scldm_cd4.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]
nitpicky = True

# Links into other projects need their inventories from the network, so only Read the Docs makes them. Names of this
# package are checked everywhere.
nitpick_ignore = [  # in signatures, but of no use to a caller
    ("py:class", f"scldm_cd4.{name}")
    for name in (
        "data.cells.CellData",
        "engines.In",
        "engines.Out",
        "metrics.cells.samples.Sample",
        "metrics.baselines.training.Training",
        "ranking.population.PairSums",
    )
]
nitpick_ignore_regex = [(r"py:.*", r"(?!scldm_cd4\.).*")]
if os.environ.get("READTHEDOCS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "anndata": ("https://anndata.readthedocs.io/en/stable", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "pandas": ("https://pandas.pydata.org/docs", None),
        "python": ("https://docs.python.org/3", None),
        "scanpy": ("https://scanpy.readthedocs.io/en/stable", None),
    }

MADE_BY_FUNCTIONS = ("scldm_cd4.data.store.CellStore",)
autosummary_generate = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
autodoc_typehints = "signature"
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Returns", "Yields"]  # prose, not a list of types: the types are in the signature
default_role = "own"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tutorials hold their outputs
nb_merge_streams = True

html_math_renderer = "mathml"  # browsers draw it themselves: no script, no network
html_theme = "sphinx_book_theme"
html_title = "scldm_cd4"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_theme_options = {
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "use_download_button": True,
    "use_fullscreen_button": False,
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def own(name: str, rawtext: str, text: str, *rest: Any, **options: Any) -> tuple[list[Any], list[Any]]:
    """Make text in single backticks a link where it is a full name of this package, else code."""
    if re.fullmatch(r"scldm_cd4(\.\w+)+", text):
        link: tuple[list[Any], list[Any]] = PyXRefRole()("py:obj", rawtext, text, *rest, **options)
        return link
    return [nodes.literal(rawtext, text)], []


def mathml(writer: Any, node: nodes.Element) -> None:
    """Write a formula as MathML."""
    writer.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def hide_constructor(app: Sphinx, what: str, name: str, *rest: Any) -> tuple[str, str | None] | None:
    """Leave out the arguments of classes that users do not construct."""
    return ("", None) if name in MADE_BY_FUNCTIONS else None


def setup(app: Sphinx) -> None:
    """Add the role that docstrings use, and the two changes above."""
    app.add_role("own", own)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("autodoc-process-signature", hide_constructor)
