// RMSprop (Tieleman & Hinton 2012, lecture 6.5) as torch.optim.RMSprop, eps outside of the root.
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
square_avg = fma(one_minus_alpha * g, g, alpha * square_avg);
u = g / (sqrt(square_avg) + eps);
