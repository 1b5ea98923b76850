"""Tensors in pieces on several processes: DTensors in; local tensors, boxes and reductions out."""
