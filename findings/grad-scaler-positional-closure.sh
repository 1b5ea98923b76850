#!/usr/bin/env bash
# torch 2.13.0 (CPU, Python 3.11), seen on 2026-11-29.
#
# GradScaler.step(optimizer, closure=f) raises "Closure use is not currently supported", and
# GradScaler.step(optimizer, f) does not: the closure runs behind the unscaling, so that the step
# applies gradients that are still multiplied by the scale. SGD with a learning rate of 1 and a
# gradient of 1 moves by 1024 instead of 1, without a warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/probe.py" <<'PROBE'
import torch

p = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([p], lr=1.0)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


def closure():
    optimizer.zero_grad()
    loss = scaler.scale(p.sum())
    loss.backward()
    return loss


closure()
try:
    scaler.step(optimizer, closure=closure)
except RuntimeError as error:
    print("by keyword:", error)
scaler.step(optimizer, closure)
print("by position: moved to", p.item())
PROBE
cat > "$folder/expected" <<'SEEN'
by keyword: Closure use is not currently supported if GradScaler is enabled.
by position: moved to -1024.0
SEEN
"$folder/venv/bin/python" "$folder/probe.py" | tee "$folder/output"
diff "$folder/expected" "$folder/output"
