// Lion (Chen et al. 2023, arXiv:2302.06675, Alg. 2)
u = sign(fma(one_minus_beta1, g, beta1 * exp_avg));
exp_avg = fma(one_minus_beta2, g, beta2 * exp_avg);
