// RMSprop whose steps have momentum, as torch.optim.RMSprop.
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
square_avg = fma(one_minus_alpha * g, g, alpha * square_avg);
momentum_buffer = fma(momentum, momentum_buffer, g / (sqrt(square_avg) + eps));
u = momentum_buffer;
