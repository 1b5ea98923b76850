// Adam (Kingma & Ba 2015, arXiv:1412.6980, Alg. 1 in the efficient order at the end of section 2)
// and AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, Alg. 2). The bias corrections are folded
// into step_size = lr * c2 / c1 and eps_hat = eps * c2, with c1 = 1 - beta1^t, c2 = sqrt(1 - beta2^t).
// Coupled (L2) decay enters through `coupled_decay`, decoupled decay through the skeleton's `decay`.
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
exp_avg = fma(one_minus_beta1, g, beta1 * exp_avg);
exp_avg_sq = fma(one_minus_beta2 * g, g, beta2 * exp_avg_sq);
u = exp_avg / (sqrt(exp_avg_sq) + eps_hat);
