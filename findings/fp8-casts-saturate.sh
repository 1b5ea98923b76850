#!/usr/bin/env bash
# torch 2.13.0 (CPU, Python 3.11), seen on 2026-11-30.
#
# Casts to the two 8-bit floats differ: e4m3fn saturates, infinity included, so that a state which
# overflowed looks finite; e5m2 makes infinities of what is too large. Casts from float64 go by way of
# float32: what lies just above the middle of two numbers is rounded to it first, and then to the even
# one, which is the farther.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/probe.py" <<'PROBE'
import torch

numbers = torch.tensor([float("inf"), float("-inf"), 1e30, 449.0, float("nan")])
for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
    print(dtype, numbers.to(dtype).float().tolist())
# Between 1 and the next number: to float32 first it lies in the middle, which then goes to the even.
x = torch.tensor(1.0625 + 2.0**-40, dtype=torch.float64)
print("1.0625 + 2^-40 in e4m3, whose next numbers are 1 and 1.125:", x.to(torch.float8_e4m3fn).item())
PROBE
cat > "$folder/expected" <<'SEEN'
torch.float8_e4m3fn [448.0, -448.0, 448.0, 448.0, nan]
torch.float8_e5m2 [inf, -inf, inf, 448.0, nan]
1.0625 + 2^-40 in e4m3, whose next numbers are 1 and 1.125: 1.0
SEEN
"$folder/venv/bin/python" "$folder/probe.py" | tee "$folder/output"
diff "$folder/expected" "$folder/output"
