// SGD with momentum as torch.optim.SGD (Sutskever et al. 2013, Eq. 1, the learning rate outside of
// the buffer). The first gradient is the buffer: `kept` is then 0 and `added` 1, and afterwards
// these are the momentum and 1 - dampening.
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
momentum_buffer = fma(added, g, kept * momentum_buffer);
u = momentum_buffer;
