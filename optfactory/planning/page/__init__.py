"""A plan as one page of HTML that needs nothing else: `optfactory plan --html`.

document  the page, with its style and its script inside
bars      memory as stacked bars, a row for each name
sections  the groups, what stays wide, the ranks, the config
markup    elements of HTML
page.css, page.js   read by `document`
"""
