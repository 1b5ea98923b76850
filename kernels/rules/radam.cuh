// RAdam (Liu et al. 2020, arXiv:1908.03265, Alg. 2) as torch.optim.RAdam: while the variance of the
// second moment is not tractable (`adapts` is 0) steps are by the momentum alone. The rectification
// and both bias corrections are in step_size; eps is added to the root before its correction.
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
exp_avg = fma(one_minus_beta1, g, beta1 * exp_avg);
exp_avg_sq = fma(one_minus_beta2 * g, g, beta2 * exp_avg_sq);
u = where(adapts > 0, exp_avg / (sqrt(exp_avg_sq) + eps), exp_avg);
