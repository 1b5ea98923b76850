// RMSprop by the gradient's variance (Graves 2013, arXiv:1308.0850, Eq. 38 to 45), as
// torch.optim.RMSprop; roundings cannot make the variance negative here.
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
square_avg = fma(one_minus_alpha * g, g, alpha * square_avg);
grad_avg = fma(one_minus_alpha, g, alpha * grad_avg);
u = g / (sqrt(max(fma(-grad_avg, grad_avg, square_avg), 0)) + eps);
