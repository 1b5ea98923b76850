#!/usr/bin/env bash
# heavyball 3.2.1, torch 2.13.0 (CPU, Python 3.11), seen on 2026-11-30.
#
# NAdam's weight decay makes weights grow: weight_decay * p is added to the gradient, as torch.optim's
# NAdam does, and taken off the step again, where no moments divide it. Where gradients are zero the
# former wins; with noise of size 1 nothing decays, and with noise of size 10 weights of 1 are 2.5 after
# 1000 steps, 0.9 in torch. With decoupled_weight_decay=True all is well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 heavyball==3.2.1
cat > "$folder/probe.py" <<'PROBE'
import warnings

warnings.simplefilter("ignore")
import heavyball
import torch


def mean(make, size, **asked):
    """The mean of parameters that begin with 1, after 1000 steps on noise."""
    torch.manual_seed(0)
    p = torch.ones(1000, requires_grad=True)
    optimizer = make([p], lr=0.01, weight_decay=0.1, **asked)
    for _ in range(1000):
        p.grad = torch.randn(1000) * size
        optimizer.step()
    return f"{float(p.mean()):.1f}"


heavy = {"compile_step": False}
for size in (1.0, 10.0):
    print(
        f"gradients of {size:g}: torch {mean(torch.optim.NAdam, size)},",
        f"heavyball {mean(heavyball.NAdam, size, **heavy)},",
        f"decoupled {mean(heavyball.NAdam, size, decoupled_weight_decay=True, **heavy)}",
    )
PROBE
cat > "$folder/expected" <<'SEEN'
gradients of 1: torch 0.4, heavyball 1.0, decoupled 0.4
gradients of 10: torch 0.9, heavyball 2.5, decoupled 0.4
SEEN
"$folder/venv/bin/python" "$folder/probe.py" | tee "$folder/output"
diff "$folder/expected" "$folder/output"
