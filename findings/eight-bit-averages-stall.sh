#!/usr/bin/env bash
# bitsandbytes 0.50.2, torch 2.13.0 (CPU, Python 3.11), seen on 2026-11-30.
#
# 8-bit averages are rounded to the nearest code, and stand still as soon as a step changes them by
# less than half the distance of two codes. After 2000 gradients of -1, AdEMAMix's slow average is a
# thirteenth of what it should be, and steps are half as long; of 1, it is exact, as the map has a 1
# and no -1. Where a coordinate's gradients begin at step 1001, beside others that had them from the
# first step, Adagrad's sum is 2 % of what it should be, and its steps 6.5 times too long; RMSprop's
# second moment is 9 %, if these gradients are a tenth of the others, and its steps 3 times too long.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
cat > "$folder/probe.py" <<'PROBE'
import warnings

warnings.simplefilter("ignore")
import bitsandbytes.optim as bnb
import torch

torch.set_num_threads(1)


def average(optimizer, p):
    """The second element of the last average in `state1`, whose tensor is one block."""
    state = optimizer.state[p]
    values = state["state1"]
    if "absmax1" in state:
        values = state["qmap1"][values.long()] * state["absmax1"].reshape(-1, 1)
    return float(values.reshape(-1, p.numel())[-1, 1])


def show(name, make, gradient, late):
    found = []
    for bits in (8, 32):
        p = torch.zeros(256, requires_grad=True)
        optimizer = make([p], lr=1e-3, optim_bits=bits, min_8bit_size=1)
        for step in range(2000):
            p.grad = torch.full_like(p, gradient)
            if late:
                p.grad[::2] = 1.0
                p.grad[1::2] *= step >= 1000
            before = p.detach().clone()
            optimizer.step()
        moved = float((before - p.detach())[1])
        found.append(f"{average(optimizer, p):.4g} (last step {moved:.2g})")
    print(f"{name}: 8 bits {found[0]}, 32 bits {found[1]}")


show("AdEMAMix, gradients of -1, slow average", bnb.AdEMAMix, -1.0, False)
show("AdEMAMix, gradients of 1, slow average", bnb.AdEMAMix, 1.0, False)
show("Adagrad, late gradients of 1, sum", bnb.Adagrad, 1.0, True)
show("RMSprop, late gradients of 0.1, second moment", bnb.RMSprop, 0.1, True)
PROBE
cat > "$folder/expected" <<'SEEN'
AdEMAMix, gradients of -1, slow average: 8 bits -0.01393 (last step -0.00099), 32 bits -0.1813 (last step -0.0019)
AdEMAMix, gradients of 1, slow average: 8 bits 0.1813 (last step 0.0019), 32 bits 0.1813 (last step 0.0019)
Adagrad, late gradients of 1, sum: 8 bits 22.81 (last step 0.0002), 32 bits 1000 (last step 3.2e-05)
RMSprop, late gradients of 0.1, second moment: 8 bits 0.0009437 (last step 0.0031), 32 bits 0.01 (last step 0.001)
SEEN
"$folder/venv/bin/python" "$folder/probe.py" | tee "$folder/output"
diff "$folder/expected" "$folder/output"
