// NAdam (Dozat 2016, "Incorporating Nesterov Momentum into Adam", Alg. 2) as torch.optim.NAdam: the
// step is by this gradient and by the momentum one step ahead, with the shares of the momentum's
// schedule, whose sum is in step_size. The second moment's correction c2 = sqrt(1 - beta2^t) is there
// too, and in eps_hat.
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
exp_avg = fma(one_minus_beta1, g, beta1 * exp_avg);
exp_avg_sq = fma(one_minus_beta2 * g, g, beta2 * exp_avg_sq);
u = fma(share_of_g, g, share_of_avg * exp_avg) / (sqrt(exp_avg_sq) + eps_hat);
