"""Other local derivatives for the backward pass; the forward pass is unchanged to the last bit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mechunlearn.models import Model, NotSupported, mlp, mlp_neurons, stream_norms

Rule = Literal["norms", "activations"]
"""A local derivative that is replaced; without any, gradients are plain."""
RULES: tuple[Rule, ...] = ("norms", "activations")


@contextmanager
def relevance_rules(model: Model, rules: Sequence[Rule] = RULES) -> Iterator[None]:
    """Inside, gradients follow the rules of layer-wise relevance propagation.

    norms: every LayerNorm and RMSNorm, known by "Norm" in its class's name, divides by a scale that counts as a
    constant. activations: the nonlinearity of an MLP counts as multiplication by its own ratio act(x) / x (0 at x = 0),
    and where the MLP is gated, each factor of gate * up receives half of the gradient.

    Raises:
        NotSupported: a norm at the residual stream by another name, one that computes something else, found when it
            runs, or an MLP without a nonlinearity that we know; never does one stay silently as it was.

    Source: Jafari et al. 2025 (RelP), arXiv:2508.21258; Ali et al. 2022, arXiv:2202.07304.
    """
    with ExitStack() as stack:
        if "norms" in rules:
            for module in _norms(model):
                stack.callback(module.register_forward_hook(_norm_rule(module)).remove)
        if "activations" in rules:
            for layer in range(model.n_layers):
                stack.callback(_nonlinearity(model, layer).register_forward_hook(_ratio_rule).remove)
                if len(model.architecture.mlp_in) == 2:
                    stack.callback(mlp_neurons(model, layer).register_forward_pre_hook(_half_rule).remove)
        yield


def _norms(model: Model) -> list[nn.Module]:
    """Every norm, wherever it stands (Qwen3 norms queries and keys, too); those at the stream must be among them."""
    found = [module for module in model.hf.modules() if "Norm" in type(module).__name__]
    for path, module in stream_norms(model).items():
        if module not in found:
            raise NotSupported(
                f"relevance rules: {path} is a {type(module).__name__}, by its name no LayerNorm or RMSNorm; use the "
                "gradient rule for this model"
            )
    return found


def _with_slope(output: Tensor, moving: Tensor) -> Tensor:
    """The output's value with the derivative of `moving`."""
    return output.detach() + (moving - moving.detach())


def _ratio_rule(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x = inputs[0]
    ratio = torch.where(x == 0, 0, output / torch.where(x == 0, 1, x)).detach()
    return _with_slope(output, x * ratio)


def _half_rule(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    product = inputs[0]
    return (_with_slope(product, product / 2), *inputs[1:])


def _norm_rule(module: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Which linear map a norm is once its scale is held.

    RMSNorm classes weight by w or by 1 + w; what they make of ones tells which, whatever the class.
    """
    centred = isinstance(module, nn.LayerNorm)
    epsilon: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if epsilon is None or weight is None:
        raise NotSupported(
            f"relevance rules: {type(module).__name__} has no epsilon or weight; use the gradient rule for this model"
        )
    if centred:
        gain, bias = weight.detach(), module.bias
    else:
        with torch.no_grad():
            ones = torch.ones_like(weight)
            gain, bias = module.forward(ones) * (1 + epsilon) ** 0.5, None

    matched = False

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal matched
        x = inputs[0].float() if inputs[0].dtype in (torch.bfloat16, torch.float16) else inputs[0]
        x = x - x.mean(dim=-1, keepdim=True) if centred else x
        scale = (x.pow(2).mean(dim=-1, keepdim=True) + epsilon).rsqrt().detach()
        linear = x * scale * gain
        shown = linear.detach() if bias is None else linear.detach() + bias.detach()
        tolerance = 1e-4 if output.dtype in (torch.float32, torch.float64) else 0.05
        matched = matched or torch.allclose(shown.to(output.dtype), output.detach(), rtol=tolerance, atol=tolerance)
        if not matched:
            raise NotSupported(
                f"relevance rules: {type(module).__name__} is neither a LayerNorm nor an RMSNorm; use the gradient rule"
            )
        return _with_slope(output, linear.to(output.dtype))

    return hook


def _nonlinearity(model: Model, layer: int) -> nn.Module:
    parts = dict(mlp(model, layer).named_children())
    for name in ("act", "act_fn"):
        if name in parts:
            return parts[name]
    raise NotSupported(
        f"relevance rules: the MLP {type(mlp(model, layer)).__name__} has parts {', '.join(parts)}, none of them "
        "act or act_fn; use the gradient rule for this model"
    )
