// LAMB (You et al. 2020, arXiv:1904.00962, Alg. 2): Adam's direction r, with the decay inside the
// direction whose norm the trust ratio measures (`direction_decay`), or outside of it.
// r = (m / c1) / (sqrt(v) / c2 + eps), with bias_ratio = c2 / c1 and eps_hat = eps * c2.
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
exp_avg = fma(one_minus_beta1, g, beta1 * exp_avg);
exp_avg_sq = fma(one_minus_beta2 * g, g, beta2 * exp_avg_sq);
r = bias_ratio * exp_avg / (sqrt(exp_avg_sq) + eps_hat);
u = where(direction_decay > 0, fma(direction_decay, p, r), r);
