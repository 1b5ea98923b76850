"""A config as the optimizer understands it: `optfactory explain` and `optfactory.explain`.

sources      where the value of each key comes from
groups       each param group: which rules made it, what each of them set, and its state
schedules    a scheduler from its name, and what may be made from a file
simulation   the learning rates that it gives each group, step by step
traps        what a config, its rules and its scheduler do that was perhaps not meant
figures      all of it
explanation  `explain`
text, plot   it as tables and as a picture; cells: values and tables as text
"""
