"""Builds the kernels that wheels carry; nothing here is used at run time."""
