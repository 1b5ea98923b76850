"""Checkpoints of other libraries, widths and block grids, read into and written from our state."""
