// Adan (Xie et al. 2022, arXiv:2208.06677, Alg. 1), its betas as the shares that are kept: momenta of
// the gradient and of its change, which looks one step ahead. `first` is 1 at the first step, whose
// gradient has changed by nothing. The bias corrections c1, c2 and c3 (a root) are folded into
// step_size = lr * c3 / c1, ahead = beta2 * c1 / c2 and eps_hat = eps * c3.
change = where(first > 0, 0, g - previous_grad);
looked = fma(beta2, change, g);
exp_avg = fma(one_minus_beta1, g, beta1 * exp_avg);
exp_avg_diff = fma(one_minus_beta2, change, beta2 * exp_avg_diff);
exp_avg_sq = fma(one_minus_beta3 * looked, looked, beta3 * exp_avg_sq);
previous_grad = g;
u = fma(ahead, exp_avg_diff, exp_avg) / (sqrt(exp_avg_sq) + eps_hat);
