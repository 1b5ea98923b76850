// AMSGrad (Reddi, Kale & Kumar 2018, arXiv:1904.09237, Alg. 2) as torch.optim defines it: the
// running maximum is taken of the uncorrected second moment, the correction is the current one.
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
exp_avg = fma(one_minus_beta1, g, beta1 * exp_avg);
exp_avg_sq = fma(one_minus_beta2 * g, g, beta2 * exp_avg_sq);
max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq);
u = exp_avg / (sqrt(max_exp_avg_sq) + eps_hat);
