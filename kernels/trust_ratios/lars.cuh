// LARS's local rate (You et al. 2017, Eq. 6), within bounds. A tensor whose norm or whose gradient's
// norm is zero takes 1, so that zero-initialised tensors learn; so does one whose norm is NaN.
// `adapts` = 0 switches the rate off.
rate = trust_coefficient * p_norm / (fma(coupled_decay, p_norm, g_norm) + eps);
bounded = min(max(rate, ratio_low), ratio_high);
ratio = where(p_norm > 0, where(g_norm > 0, where(adapts > 0, bounded, 1), 1), 1);
