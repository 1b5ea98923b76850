// LARS (You et al. 2017, arXiv:1708.03888, Alg. 1, the learning rate outside of the buffer): SGD with
// momentum, whose gradient and decay are scaled by the tensor's rate `ratio`.
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
g = ratio * g;
momentum_buffer = fma(added, g, kept * momentum_buffer);
u = momentum_buffer;
