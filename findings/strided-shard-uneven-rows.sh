#!/usr/bin/env bash
# torch 2.13.0 (CPU, Python 3.11), seen on 2026-11-29.
#
# A Linear of 9 rows on a mesh of 4 x 2, tensor parallel over the second dimension (ColwiseParallel)
# and fully_shard over the first: the last row is on rank 7, and rank 6 has an empty part. What torch
# computes for these placements (_StridedShard, Shard), and hands to Distributed Checkpoint as sizes
# and offsets, says the opposite: one row on rank 6 and none on rank 7. With other numbers of rows
# both agree, so that it shows up only at uneven sizes. Processes are faked: nothing is sent.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/probe.py" <<'PROBE'
import sys
import warnings

warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

rank, rows = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
layer = nn.Linear(3, rows, bias=False)
layer.weight.data = torch.arange(rows).float()[:, None].expand(rows, 3).clone()
parallelize_module(layer, mesh["tp"], ColwiseParallel(), src_data_rank=None)
fully_shard(layer, mesh=mesh["dp"])
p = layer.weight
(size, _), (offset, _) = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
held = [int(x) for x in p.to_local()[:, 0]]
print(f"{rows} rows, rank {rank}: holds {held}, said to hold {list(range(offset, offset + size))}")
PROBE
cat > "$folder/expected" <<'SEEN'
9 rows, rank 6: holds [], said to hold [8]
9 rows, rank 7: holds [8], said to hold []
16 rows, rank 6: holds [6, 7], said to hold [6, 7]
16 rows, rank 7: holds [14, 15], said to hold [14, 15]
SEEN
for rows in 9 16; do
  for rank in 6 7; do "$folder/venv/bin/python" "$folder/probe.py" "$rank" "$rows" 2>/dev/null; done
done | tee "$folder/output"
diff "$folder/expected" "$folder/output"
