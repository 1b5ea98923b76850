// Muon (Jordan et al. 2024, as torch.optim.Muon): u is made orthogonal before the step.
momentum_buffer = fma(one_minus_momentum, g, momentum * momentum_buffer);
u = fma(one_minus_momentum, g, momentum * momentum_buffer);
