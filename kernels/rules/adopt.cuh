// ADOPT (Taniguchi et al. 2024, arXiv:2411.02853, Alg. 2, with the clipping of its final version):
// a gradient is divided by the second moment before it enters there. The first one only begins the
// second moment: `clip` is then 0, `kept` 0 and `added` 1; afterwards they are (t - 1)^(1/4), beta2
// and 1 - beta2.
g = where(coupled_decay > 0, fma(coupled_decay, p, g), g);
scaled = g / max(sqrt(exp_avg_sq), eps);
exp_avg = fma(one_minus_beta1, min(max(scaled, -clip), clip), beta1 * exp_avg);
exp_avg_sq = fma(added * g, g, kept * exp_avg_sq);
u = exp_avg;
