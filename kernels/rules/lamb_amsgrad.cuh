// LAMB with the second moment's running maximum of AMSGrad in the denominator.
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
exp_avg = fma(one_minus_beta1, g, beta1 * exp_avg);
exp_avg_sq = fma(one_minus_beta2 * g, g, beta2 * exp_avg_sq);
max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq);
r = bias_ratio * exp_avg / (sqrt(max_exp_avg_sq) + eps_hat);
u = where(direction_decay > 0, fma(direction_decay, p, r), r);
