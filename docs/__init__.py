"""The documentation: the site's configuration, its hooks and, under `pages`, what is written."""
