"""One module per optimizer family: its schema, its update rule, its per-step scalars.

`optfactory.registry` finds every module in this package by itself.
"""
