// LAMB's trust ratio (You et al. 2020, Alg. 2, phi the identity), within bounds. A tensor whose norm
// or whose update's norm is zero takes 1, so that zero-initialised tensors learn; so does one whose
// norm is NaN, so that its finite elements go on. `adapts` = 0 switches the ratio off.
bounded = min(max(p_norm / u_norm, ratio_low), ratio_high);
ratio = where(p_norm > 0, where(u_norm > 0, where(adapts > 0, bounded, 1), 1), 1);
