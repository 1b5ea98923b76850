#!/usr/bin/env bash
# torch 2.13.0 (CPU, Python 3.11), seen on 2026-11-29.
#
# torch.distributed.checkpoint.load reads a tensor of one dtype into one of another without a word:
# uint8 codes of quantized state (200) become the float32 number 200.0, float32 numbers become
# uint8 by truncation, and the shape alone is checked. A run that is resumed with another width of
# optimizer state under the same key trains on garbage. Keys must say what a tensor is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/probe.py" <<'PROBE'
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp

warnings.simplefilter("ignore")
folder = sys.argv[1]
codes = torch.tensor([0, 127, 200], dtype=torch.uint8)
dcp.save({"a": codes}, checkpoint_id=f"{folder}/codes", no_dist=True)
read = {"a": torch.zeros(3)}
dcp.load(read, checkpoint_id=f"{folder}/codes", no_dist=True)
print("uint8 into float32:", read["a"].tolist())

dcp.save({"a": torch.tensor([0.25, 1.5, 200.7])}, checkpoint_id=f"{folder}/numbers", no_dist=True)
read = {"a": torch.zeros(3, dtype=torch.uint8)}
dcp.load(read, checkpoint_id=f"{folder}/numbers", no_dist=True)
print("float32 into uint8:", read["a"].tolist())

try:
    dcp.load({"a": torch.zeros(4)}, checkpoint_id=f"{folder}/codes", no_dist=True)
except BaseException as error:
    print("another shape:", "Size mismatch" in str(error))
PROBE
cat > "$folder/expected" <<'SEEN'
uint8 into float32: [0.0, 127.0, 200.0]
float32 into uint8: [0, 1, 200]
another shape: True
SEEN
"$folder/venv/bin/python" "$folder/probe.py" "$folder" | tee "$folder/output"
diff "$folder/expected" "$folder/output"
