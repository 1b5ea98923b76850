// LARS with Nesterov's momentum: the step looks one momentum ahead.
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
g = ratio * g;
momentum_buffer = fma(added, g, kept * momentum_buffer);
u = fma(momentum, momentum_buffer, g);
