// bitsandbytes' LARS: the norm that is clipped is of the momentum without this step's decay, which
// the momentum itself takes.
undecayed = fma(added, g, kept * momentum_buffer);
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
momentum_buffer = fma(added, g, kept * momentum_buffer);
u = momentum_buffer;
