// LARS without momentum: nothing is kept.
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
u = ratio * g;
