// The step of directions that were made of whole matrices, which come in place of gradients.
u = g;
