#!/usr/bin/env bash
# torchao 0.18.0, torch 2.13.0 (CPU, Python 3.11), seen on 2026-11-30.
#
# How far 100 steps of one constant gradient lead with torchao's low-bit AdamW, relative to
# torch.optim.AdamW, depends on the gradient's sign and size. The signed map of 4 bits ends at -0.8875
# and 1 while scales are by magnitudes, so that a first moment below all others of its block shrinks at
# every step: half the way. The scales of second moments are at least 1e-12, below which the squares
# of gradients of 1e-7 and less lie: 8 bits and fp8 lose them and step too far, and 4 bits, whose
# second moments have no zero, hardly step.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchao==0.18.0
cat > "$folder/probe.py" <<'PROBE'
import warnings

warnings.simplefilter("ignore")
import torch
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8

torch.set_num_threads(1)


def way(make, gradient):
    p = torch.zeros(64, 256, requires_grad=True)
    optimizer = make([p], lr=1e-3, weight_decay=0.0)
    for _ in range(100):
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
    return float(p.detach().abs().mean()) / 1e-3


for gradient in (1.0, -1.0, 1e-7, 1e-8):
    exact = way(torch.optim.AdamW, gradient)
    ways = [f"{way(make, gradient) / exact:.2f}" for make in (AdamW8bit, AdamWFp8, AdamW4bit)]
    print(f"gradients of {gradient:g}: 8 bits {ways[0]}, fp8 {ways[1]}, 4 bits {ways[2]}")
PROBE
cat > "$folder/expected" <<'SEEN'
gradients of 1: 8 bits 1.00, fp8 1.00, 4 bits 1.00
gradients of -1: 8 bits 0.95, fp8 1.00, 4 bits 0.55
gradients of 1e-07: 8 bits 1.87, fp8 1.28, 4 bits 0.10
gradients of 1e-08: 8 bits 1.70, fp8 1.70, 4 bits 0.03
SEEN
TORCHDYNAMO_DISABLE=1 "$folder/venv/bin/python" "$folder/probe.py" 2> "$folder/log" |
    tee "$folder/output"
diff "$folder/expected" "$folder/output"
