// SGD without momentum (Robbins & Monro 1951, Eq. 6) as torch.optim.SGD: nothing is kept.
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
u = g;
