// bitsandbytes' rule: the update's norm is limited to max_unorm * |p| and never enlarged.
// max_unorm = 0 switches it off; a tensor whose norm is zero takes 1.
bound = max_unorm * p_norm;
bounded = min(max(where(u_norm > bound, bound / u_norm, 1), ratio_low), ratio_high);
ratio = where(bound > 0, where(u_norm > 0, where(adapts > 0, bounded, 1), 1), 1);
