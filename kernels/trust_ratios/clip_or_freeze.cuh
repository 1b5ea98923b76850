// As clip, but a tensor whose norm is zero does not move: bitsandbytes to the letter.
bound = max_unorm * p_norm;
bounded = min(max(where(u_norm > bound, bound / u_norm, 1), ratio_low), ratio_high);
ratio = where(max_unorm > 0, where(adapts > 0, bounded, 1), 1);
