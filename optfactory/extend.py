"""What one needs to add an optimizer from outside: `examples/custom_optimizer.py` uses all of it.

A family is a schema (`OptimizerConfig`; `MomentsConfig` for those with Adam's two moments,
`MatrixConfig` for those whose directions are made orthogonal as whole matrices) whose `rule` names
the states and holds the rule text, and whose `scalars` computes the numbers that the text reads.
`register` makes all its names.
"""

from optfactory.config.fields import Beta, Betas, Number
from optfactory.config.schema import OptimizerConfig
from optfactory.families import register
from optfactory.optimizers.matrices import MatrixConfig
from optfactory.optimizers.moments import MomentsConfig, bias_corrections
from optfactory.rules.language import StateSpec, UpdateRule

__all__ = [
    "Beta",
    "Betas",
    "MatrixConfig",
    "MomentsConfig",
    "Number",
    "OptimizerConfig",
    "StateSpec",
    "UpdateRule",
    "bias_corrections",
    "register",
]
