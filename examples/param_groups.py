"""Param groups from a config: which parameters get which hyperparameters, and why.

    python examples/param_groups.py
    python examples/param_groups.py optimizer=lamb8bit optimizer.param_groups.positions.lr_scale=5

The rules are in `conf/param_groups.yaml`. A parameter gets what all rules that match it say; where
two say different things, the later one wins. A rule that matches nothing is an error.
"""

from __future__ import annotations

import hydra
from lm.model import CharTransformer
from omegaconf import DictConfig
from torch.optim.lr_scheduler import CosineAnnealingLR

from optfactory import build_optimizer


@hydra.main(version_base="1.3", config_path="conf", config_name="param_groups")
def main(cfg: DictConfig) -> None:
    model = CharTransformer(vocab_size=97, context=96, width=192, depth=3, heads=6)
    optimizer = build_optimizer(cfg.optimizer, model)
    # The scales are in the learning rates, so that every scheduler keeps the ratios.
    schedule = CosineAnnealingLR(optimizer, T_max=100)
    for _ in range(50):
        optimizer.step()
        schedule.step()
    for group in optimizer.param_groups:
        print(
            f"{group['name']:30} lr {group['lr']:.2e}  weight_decay {group['weight_decay']}  "
            f"{group['optim_bits']:2} bits  {len(group['params']):2} tensors, the first is "
            f"{group['param_names'][0]}"
        )


if __name__ == "__main__":
    main()
