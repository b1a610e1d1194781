"""The web site: what Sphinx is given (sources, pages), and what it is taught (extension)."""
