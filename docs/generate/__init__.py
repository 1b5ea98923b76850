"""Pages of the documentation that follow from the code: `python -m docs.generate --write`.

mathematics      a rule text as LaTeX
selections       which rule texts and states the settings of a family select
fields           the fields of a schema: types, ranges, defaults
facts            what a name takes, where it runs, and what it was compared with
optimizer_page   the page of one family and its names
names_page       the table of all names
pages            all of them, written or compared
"""
