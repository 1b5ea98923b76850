"""Directions made of whole matrices: orthogonalization by matrix products, in bounded memory."""
