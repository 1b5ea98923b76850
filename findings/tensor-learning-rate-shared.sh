#!/usr/bin/env bash
# torch 2.13.0 (CPU, Python 3.11), seen on 2026-11-29.
#
# A learning rate given as a tensor is one object in all param groups and in state dicts. LambdaLR
# with a lambda for each group writes to it in place, so that the last lambda wins in all groups, and
# a state dict that was taken before a schedule goes on changes with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/probe.py" <<'PROBE'
import warnings

import torch

warnings.simplefilter("ignore")  # no optimizer step before the schedule
groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
optimizer = torch.optim.AdamW(groups, lr=torch.tensor(1.0))
print("one object:", optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"])
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda e: 0.5**e, lambda e: 0.25**e])
schedule.step()
print("factors 0.5 and 0.25:", [group["lr"].item() for group in optimizer.param_groups])
saved = optimizer.state_dict()["param_groups"][0]["lr"]
schedule.step()
print("saved at 0.25, now:", saved.item())
PROBE
cat > "$folder/expected" <<'SEEN'
one object: True
factors 0.5 and 0.25: [0.25, 0.25]
saved at 0.25, now: 0.0625
SEEN
"$folder/venv/bin/python" "$folder/probe.py" | tee "$folder/output"
diff "$folder/expected" "$folder/output"
