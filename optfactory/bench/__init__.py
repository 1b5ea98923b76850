"""`optfactory bench`: how fast the optimizers are on this machine.

command     what the words of the command line start: measure, print, write files
arguments   the words themselves; loads no torch
cases       which tensors are stepped
candidates  by which optimizers: optfactory's names, torch, other libraries
traffic     the bytes that a step must move; the only place for such formulas
measure     candidates and torch fused, alternated step by step
device      clock, bandwidth and memory of the CPU or the GPU
machine     names and versions
isolated    peak memory and the first step, each in a process of its own
results     what was measured, and its JSON
grids       the figures as lines of text; markdown, screen and plot show them
"""
