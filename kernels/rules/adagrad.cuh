// Adagrad (Duchi, Hazan & Singer 2011, diagonal, Fig. 1) as torch.optim.Adagrad, which decays the
// learning rate; that is in step_size.
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
sum = fma(g, g, sum);
u = g / (sqrt(sum) + eps);
