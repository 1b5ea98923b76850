#!/usr/bin/env bash
# torchao 0.18.0, torch 2.13.0 (CPU, Python 3.11), seen on 2026-11-30.
#
# The state of its low-bit optimizers has no copy: clone, copy.deepcopy and torch.zeros_like raise, so
# that copy.deepcopy(optimizer.state_dict()), as to keep the best checkpoint in memory, does. And
# .to("cpu", copy=True) of state on a CPU copies nothing: it has the same memory, which later steps
# write to. What copies it is torch.save and torch.load.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchao==0.18.0
cat > "$folder/probe.py" <<'PROBE'
import copy
import io
import logging

import torch

logging.disable()  # extensions that were built for GPUs
import torchao.optim

p = torch.ones(4096).requires_grad_()
p.grad = torch.ones(4096)
optimizer = torchao.optim.AdamW8bit([p])
with torch.compiler.set_stance("force_eager"):
    optimizer.step()
saved = optimizer.state_dict()
state = saved["state"][0]["exp_avg"]


def through_file():
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


for name, copied in {
    "deepcopy of the state dict": lambda: copy.deepcopy(saved)["state"][0]["exp_avg"],
    "clone": state.clone,
    "zeros_like": lambda: torch.zeros_like(state),
    "a file": through_file,
    "to": lambda: state.to("cpu", copy=True),
}.items():
    try:
        found = copied()
        same = torch.equal(found.dequantize(), state.dequantize())
        apart = found.codes.data_ptr() != state.codes.data_ptr()
        print(f"{name}: same values {same}, other memory {apart}")
    except NotImplementedError as error:
        print(f"{name}: {type(error).__name__}")
PROBE
cat > "$folder/expected" <<'SEEN'
deepcopy of the state dict: NotImplementedError
clone: NotImplementedError
zeros_like: NotImplementedError
a file: same values True, other memory True
to: same values True, other memory False
SEEN
"$folder/venv/bin/python" "$folder/probe.py" | tee "$folder/output"
diff "$folder/expected" "$folder/output"
