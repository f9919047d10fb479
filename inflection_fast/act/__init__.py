"""Acting: adapters and other interventions on the planned blocks. The only part that imports peft."""

from .debias import debias_source
from .entropy_loss import attention_entropy_loss
from .find import find_inflection_target_modules
from .head_dropout import head_dropout
from .inherit import drop, grow, inherit, inherited_blocks
from .inject import dead_adapters, inject, restore_adapter
from .learning_rates import learning_rates, parameter_groups
from .lisa import lisa
from .reinitialise import reinitialise_heads, reset_feed_forward
from .sigma import sigma_reparametrisation
from .temperature import attention_temperature
from .unfreeze import unfreeze

__all__ = [
    "attention_entropy_loss", "attention_temperature", "dead_adapters", "debias_source", "drop",
    "find_inflection_target_modules", "grow", "head_dropout", "inherit", "inherited_blocks", "inject", "learning_rates",
    "lisa", "parameter_groups", "reinitialise_heads", "reset_feed_forward", "restore_adapter",
    "sigma_reparametrisation", "unfreeze",
]  # fmt: skip
