"""What of a model and a process a monitor must leave as it was."""

import torch
import torch.nn.functional as F

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs")


def state_of(model):
    """Everything about a model, and about PyTorch, that an attached observer might have touched."""
    modules = {}
    for name, module in model.named_modules():
        own = sorted(set(vars(module)) - {"recorder"})
        hooks = [list(getattr(module, hook)) for hook in HOOKS]
        modules[name] = (type(module), module.training, own, hooks, id(vars(module).get("forward")))
    parameters = {n: (p.requires_grad, id(p), len(p._backward_hooks or ())) for n, p in model.named_parameters()}
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return modules, parameters, implementation, F.scaled_dot_product_attention, torch._C._len_torch_function_stack()
