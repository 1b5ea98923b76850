#!/usr/bin/env bash
# torch 2.13.0, timm 1.0.31, pytorch_optimizer 4.1.0, torch_optimizer 0.3.0, bitsandbytes 0.50.2
# (CPU, Python 3.11), seen on 2026-11-30.
#
# One name, other rules: with the libraries' defaults and one lr, the first steps of LAMB on the same
# numbers differ 31-fold, and those of LARS 200-fold. The paper's LAMB moves by abs(p) = 5 learning
# rates; pytorch_optimizer multiplies that by 1 / (1 - beta1), bitsandbytes and torch_optimizer with
# debias=True by sqrt(1 - beta2) / (1 - beta1), and timm has no ratio without weight decay. The paper's
# LARS moves by 0.001 * 5; timm and torch_optimizer take the gradient as it is unless there is decay,
# and bitsandbytes clips to 0.02 * 5. RAdam stands still for five steps in pytorch_optimizer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 packaging
"$folder/venv/bin/pip" install --quiet --no-deps timm==1.0.31 pytorch_optimizer==4.1.0 \
  torch_optimizer==0.3.0 pytorch_ranger==0.1.1 bitsandbytes==0.50.2
cat > "$folder/probe.py" <<'PROBE'
import importlib.util
import sys
import types
import warnings

warnings.simplefilter("ignore")
import torch

# timm's models, which want torchvision, are left out: its optimizers need one function of theirs.
timm = types.ModuleType("timm")
timm.__path__ = importlib.util.find_spec("timm").submodule_search_locations
models = types.ModuleType("timm.models")
models.group_parameters = None
sys.modules |= {"timm": timm, "timm.models": models}

import bitsandbytes.optim as bnb
import pytorch_optimizer
import timm.optim
import torch_optimizer


def steps(make, count, **asked):
    asked = {"lr": 0.01, **asked}
    p = torch.tensor([[1.0, -2.0, 2.0, 4.0]], requires_grad=True)
    optimizer = make([p], **asked)
    moved = []
    for _ in range(count):
        before = p.detach().clone()
        p.grad = torch.tensor([[0.2, 0.4, -0.4, 0.8]])
        optimizer.step()
        moved.append(f"{float((p.detach() - before).norm()) / asked['lr']:.3g}")
    return " ".join(moved)


print("LAMB, pytorch_optimizer:", steps(pytorch_optimizer.Lamb, 1))
print("LAMB, timm:", steps(timm.optim.Lamb, 1))
print("LAMB, timm without decay:", steps(timm.optim.Lamb, 1, weight_decay=0.0))
print("LAMB, torch_optimizer:", steps(torch_optimizer.Lamb, 1))
print("LAMB, torch_optimizer with debias:", steps(torch_optimizer.Lamb, 1, debias=True))
print("LAMB, bitsandbytes:", steps(bnb.LAMB, 1))
lars = {"lr": 1.0, "momentum": 0.9}
print("LARS, pytorch_optimizer:", steps(pytorch_optimizer.LARS, 1, **lars))
print("LARS, timm:", steps(timm.optim.Lars, 1, **lars))
print("LARS, timm with decay:", steps(timm.optim.Lars, 1, **lars, weight_decay=0.01))
print("LARS, torch_optimizer:", steps(torch_optimizer.LARS, 1, **lars))
print("LARS, torch_optimizer with decay:", steps(torch_optimizer.LARS, 1, **lars, weight_decay=0.01))
print("LARS, bitsandbytes:", steps(bnb.LARS, 1, **lars))
print("RAdam, torch:", steps(torch.optim.RAdam, 6))
print("RAdam, pytorch_optimizer:", steps(pytorch_optimizer.RAdam, 6))
PROBE
cat > "$folder/expected" <<'SEEN'
LAMB, pytorch_optimizer: 50
LAMB, timm: 5
LAMB, timm without decay: 2
LAMB, torch_optimizer: 5
LAMB, torch_optimizer with debias: 1.58
LAMB, bitsandbytes: 1.58
LARS, pytorch_optimizer: 0.005
LARS, timm: 1
LARS, timm with decay: 0.00485
LARS, torch_optimizer: 1
LARS, torch_optimizer with decay: 0.0485
LARS, bitsandbytes: 0.1
RAdam, torch: 1 1 1 1 1 0.0516
RAdam, pytorch_optimizer: 0 0 0 0 0 0.0516
SEEN
"$folder/venv/bin/python" "$folder/probe.py" | tee "$folder/output"
diff "$folder/expected" "$folder/output"
