// AdaBelief (Zhuang et al. 2020, arXiv:2010.07468, Alg. 2): steps are long where gradients are as the
// momentum expects. As in Adam, the bias corrections are folded into step_size = lr * c2 / c1 and
// eps_hat = eps * c2; eps is also added to what is kept.
exp_avg = fma(one_minus_beta1, g, beta1 * exp_avg);
surprise = g - exp_avg;
exp_avg_var = fma(one_minus_beta2 * surprise, surprise, beta2 * exp_avg_var) + eps;
u = exp_avg / (sqrt(exp_avg_var) + eps_hat);
