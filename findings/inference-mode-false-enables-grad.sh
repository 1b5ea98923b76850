#!/usr/bin/env bash
# torch 2.13.0 (CPU, Python 3.11), seen on 2026-11-29.
#
# torch.inference_mode(False) does not give back what was there outside of inference mode: it turns
# gradients on, also within torch.no_grad(). A library that leaves inference mode to make ordinary
# tensors must enter no_grad again inside.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/probe.py" <<'PROBE'
import torch

with torch.no_grad():
    print("no_grad:", torch.is_grad_enabled())
    with torch.inference_mode(False):
        print("inference_mode(False) within no_grad:", torch.is_grad_enabled())
    with torch.inference_mode(), torch.inference_mode(False):
        print("inference_mode(False) within inference_mode:", torch.is_grad_enabled())
PROBE
cat > "$folder/expected" <<'SEEN'
no_grad: False
inference_mode(False) within no_grad: True
inference_mode(False) within inference_mode: True
SEEN
"$folder/venv/bin/python" "$folder/probe.py" | tee "$folder/output"
diff "$folder/expected" "$folder/output"
