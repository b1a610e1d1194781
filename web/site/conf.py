"""How Sphinx makes the site; `tools/make_site.py` calls it."""

project = "Lecture 26"
author = "the lecture26 authors"
copyright = "the lecture26 authors; text and figures CC BY 4.0, code MIT"
language = "en"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "website.extension",
]

# chapters: their stored outputs are shown, and nothing is executed
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline", "deflist"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "ref.python"]

# mathematics: MathJax from this site, formulas set when they come near the screen (the others: site.js)
mathjax_path = "mathjax/tex-svg-full.js"
mathjax_options = {"async": "async"}  # nothing waits for it
mathjax3_config = {
    "loader": {"load": ["ui/lazy"]},
    "options": {"enableMenu": False, "lazyMargin": "1500px"},
    "svg": {"fontCache": "global"},
    "tex": {"inlineMath": [["\\(", "\\)"]], "displayMath": [["\\[", "\\]"]]},
}

# API
toc_object_entries_show_parents = "hide"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
viewcode_follow_imported_members = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]

html_theme = "furo"
html_title = "Lecture 26"
html_static_path = ["static"]
templates_path = ["templates"]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_favicon = "static/icon.svg"
html_show_sourcelink = False
html_copy_source = False
html_show_sphinx = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#005a94",
        "color-brand-content": "#005a94",
        "color-brand-visited": "#7a3f8f",
        "color-api-name": "#005a94",
        "color-api-pre-name": "#525d6b",
    },
    "dark_css_variables": {
        "color-brand-primary": "#63b8ec",
        "color-brand-content": "#63b8ec",
        "color-brand-visited": "#c9a2e8",
        "color-api-name": "#63b8ec",
        "color-api-pre-name": "#a7b3c1",
    },
    "top_of_page_buttons": [],
}
