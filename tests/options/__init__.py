"""Options around the update rule: each against an oracle, and that it changes nothing else.

Oracles are `tests/reference`, written from what the options mean; `tests/numerics/harness.Twin`
runs an optimizer beside them. Every option is also shown to be off by default, to survive a
checkpoint bit for bit, and to be refused where it could do nothing.
"""
