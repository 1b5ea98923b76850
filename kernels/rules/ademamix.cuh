// AdEMAMix (Pagliardini et al. 2024, arXiv:2409.03137, Alg. 1): Adam whose momentum has a slow average
// beside it. alpha and beta3 are those of the step; with c1 = 1 - beta1^t and c2 = sqrt(1 - beta2^t),
// step_size = lr * c2 / c1, slow = alpha * c1 (the slow average is not corrected), eps_hat = eps * c2.
exp_avg = fma(one_minus_beta1, g, beta1 * exp_avg);
exp_avg_slow = fma(one_minus_beta3, g, beta3 * exp_avg_slow);
exp_avg_sq = fma(one_minus_beta2 * g, g, beta2 * exp_avg_sq);
u = fma(slow, exp_avg_slow, exp_avg) / (sqrt(exp_avg_sq) + eps_hat);
