"""The documentation: pages, what generates some of them, and the site (`mkdocs.yml`)."""
