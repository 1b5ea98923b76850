#!/usr/bin/env bash
# torchao 0.18.0, torch 2.13.0 (CPU, Python 3.11), seen on 2026-11-30.
#
# The low-bit Adam and AdamW take amsgrad=True and make state for it, and their first step raises, for
# every parameter with low-bit state: its maximum is taken of `state.float()`, which changes the dtype
# that the state shows and no more, and torch.maximum is not implemented for it. Parameters of fewer
# than 4096 elements, whose state is plain, step.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchao==0.18.0
cat > "$folder/probe.py" <<'PROBE'
import logging

import torch

logging.disable()  # extensions that were built for GPUs
import torchao.optim


def stepped(kind, size, amsgrad):
    p = torch.ones(size).requires_grad_()
    p.grad = torch.ones(size)
    optimizer = getattr(torchao.optim, kind)([p], amsgrad=amsgrad)
    try:
        optimizer.step()
    except Exception as error:
        return f"{type(error).__name__}, aten.maximum {'aten.maximum' in str(error)}"
    return "steps"


for kind in ("Adam8bit", "AdamW4bit", "AdamWFp8"):
    print("compiled,", kind, "4096:", stepped(kind, 4096, True))
with torch.compiler.set_stance("force_eager"):
    for kind in ("Adam8bit", "AdamW4bit", "AdamWFp8"):
        print("eager,", kind, "4096:", stepped(kind, 4096, True))
    print("eager, Adam8bit 4096 without:", stepped("Adam8bit", 4096, False))
    print("eager, Adam8bit 4095:", stepped("Adam8bit", 4095, True))
PROBE
cat > "$folder/expected" <<'SEEN'
compiled, Adam8bit 4096: Unsupported, aten.maximum True
compiled, AdamW4bit 4096: Unsupported, aten.maximum True
compiled, AdamWFp8 4096: Unsupported, aten.maximum True
eager, Adam8bit 4096: NotImplementedError, aten.maximum True
eager, AdamW4bit 4096: NotImplementedError, aten.maximum True
eager, AdamWFp8 4096: NotImplementedError, aten.maximum True
eager, Adam8bit 4096 without: steps
eager, Adam8bit 4095: steps
SEEN
"$folder/venv/bin/python" "$folder/probe.py" | tee "$folder/output"
diff "$folder/expected" "$folder/output"
