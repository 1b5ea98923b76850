#!/usr/bin/env bash
# torch 2.13.0 (CPU, Linux, Python 3.11), seen on 2026-11-29.
#
# A tensor of torch.from_file(shared=True) cannot be sent to another process: its file descriptor was
# closed when the file was mapped, and torch asks for it. Another tensor of the same memory, by way of
# DLPack, is taken for ordinary memory and copied.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/probe.py" <<'PROBE'
import tempfile
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing  # registers how tensors are pickled
from torch.utils.dlpack import from_dlpack

if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(400))
        file.flush()
        mapped = torch.from_file(file.name, shared=True, size=100, dtype=torch.float32)
        for name, tensor in (("mapped", mapped), ("by DLPack", from_dlpack(mapped))):
            try:
                ForkingPickler.dumps(tensor)
                print(f"{name}: sent")
            except OSError as error:
                print(f"{name}: {type(error).__name__}: {error}")
PROBE
cat > "$folder/expected" <<'SEEN'
mapped: OSError: [Errno 9] Bad file descriptor
by DLPack: sent
SEEN
"$folder/venv/bin/python" "$folder/probe.py" | tee "$folder/output"
diff "$folder/expected" "$folder/output"
