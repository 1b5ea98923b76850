"""The optimizers as classes, with the arguments and the order of bitsandbytes' older API.

>>> import torch
>>> from optfactory import optim
>>> optim.Adam8bit([torch.zeros(64, 64, requires_grad=True)], lr=3e-4).config.name
'adam8bit'

Each class is `Optimizer2State` with a name's config: `Adam8bit(params, lr)` is
`build_optimizer("adam8bit", params, lr=lr)`. An argument has the effect that it names, or is
refused with a ValueError; that differs from bitsandbytes, where

* `weight_decay` of the Adam classes is decoupled, while torch.optim.Adam adds it to the gradient
  (L2): the Adam classes here take none until `adam_w_mode` says which (True: decoupled);
* `optim_bits` and `is_paged` do nothing where the class's name says otherwise;
* `amsgrad`, `bias_correction`, `adam_w_mode` and more are accepted and ignored;
* the LAMB and LARS classes only clip the update's norm. These do so too (`trust_ratio="clip"`), at
  8 bits as well, and take the papers' ratios with `trust_ratio="lamb"` and `"lars"`;
* SGD and LARS have no `dampening` and no `nesterov`, RMSprop no `momentum`: they are ignored there.
"""

from optfactory.optim import missing
from optfactory.optim.adagrad import Adagrad, Adagrad8bit, Adagrad32bit
from optfactory.optim.adam import (
    Adam,
    Adam8bit,
    Adam32bit,
    AdamW,
    AdamW8bit,
    AdamW32bit,
    PagedAdam,
    PagedAdam8bit,
    PagedAdam32bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedAdamW32bit,
)
from optfactory.optim.ademamix import (
    AdEMAMix,
    AdEMAMix8bit,
    AdEMAMix32bit,
    PagedAdEMAMix,
    PagedAdEMAMix8bit,
    PagedAdEMAMix32bit,
)
from optfactory.optim.lamb import LAMB, LAMB8bit, LAMB32bit
from optfactory.optim.lars import LARS, LARS8bit, LARS32bit, PytorchLARS
from optfactory.optim.lion import (
    Lion,
    Lion8bit,
    Lion32bit,
    PagedLion,
    PagedLion8bit,
    PagedLion32bit,
)
from optfactory.optim.rmsprop import RMSprop, RMSprop8bit, RMSprop32bit
from optfactory.optim.sgd import SGD, SGD8bit, SGD32bit

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "Adagrad",
    "Adagrad8bit",
    "Adagrad32bit",
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "LAMB8bit",
    "LAMB32bit",
    "LARS8bit",
    "LARS32bit",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "PytorchLARS",
    "RMSprop",
    "RMSprop8bit",
    "RMSprop32bit",
    "SGD8bit",
    "SGD32bit",
]


def __getattr__(name: str) -> object:
    # Who looks for what Python keeps in modules wants no advice, and quickly.
    private = name.startswith("_")
    text = f"module '{__name__}' has no attribute '{name}'" if private else ""
    # Of a named object Python would print the name that looks most alike: for NAdam8bit, Adam8bit.
    raise AttributeError(text or missing.message(name, __all__), name=name, obj=None)
