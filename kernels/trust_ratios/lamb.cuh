// LAMB's trust ratio (You et al. 2020, Alg. 2, phi the identity). A tensor whose norm or whose
// update's norm is zero takes 1, so that zero-initialised tensors learn; so does one whose norm is
// NaN, so that its finite elements go on.
ratio = where(p_norm > 0, where(u_norm > 0, p_norm / u_norm, 1), 1);
