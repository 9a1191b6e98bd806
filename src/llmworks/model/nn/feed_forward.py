"""Feed-forward layers (MLP): two matrices with an activation between, a gated variant, or a mixture of experts (MoE).

Each token is computed independently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llmworks.model.nn import kernels
from llmworks.model.nn.residual_linear import ResidualLinear
from llmworks.model.shape import Shape

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class _SiluGate(torch.autograd.Function):
    """silu(gate) * up with the activation recomputed in the backward pass: saves a seventh of a block's activations.

    Same result as the separate operations.
    """

    @staticmethod
    def forward(context: Any, gate: Tensor, up: Tensor) -> Tensor:
        context.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = context.saved_tensors
        return torch.ops.aten.silu_backward(gradients[0] * up, gate), gradients[0] * F.silu(gate)


class _SiluGateDown(torch.autograd.Function):
    """(silu(gate) * up) W' fused; the input of W is recomputed in the backward pass. Same result."""

    @staticmethod
    def forward(context: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        """Compute from gate, up: [..., intermediate_size]; weight: [hidden_size, intermediate_size]."""
        context.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, weight = context.saved_tensors
        activated = F.silu(gate)
        flat = gradients[0].reshape(-1, len(weight))
        grad_weight = flat.T @ (activated * up).view(-1, weight.shape[1]) if context.needs_input_grad[2] else None
        grad_hidden = (flat @ weight).view_as(gate)
        grad_up = activated.mul_(grad_hidden)
        return torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate), grad_up, grad_weight


class FeedForward(nn.Module):
    """act(x up) down, or gated: (act(x gate) * x up) down (GLU variants, Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        bias = shape.bias == "all"
        self.activation = ACTIVATION_FUNCTIONS[shape.hidden_act]
        self.gate = nn.Linear(shape.hidden_size, shape.inner_size, bias=bias) if shape.gated_mlp else None
        self.up = nn.Linear(shape.hidden_size, shape.inner_size, bias=bias)
        self.down = ResidualLinear(shape.inner_size, shape.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., hidden_size] -> [..., hidden_size]."""
        if self.gate is not None and self.activation is F.silu and torch.is_grad_enabled():
            gate, up = self.gate(x), self.up(x)
            fused = kernels.silu_gate(gate, up)
            if fused is None and self._is_plain(gate):
                whole: Tensor = _SiluGateDown.apply(gate, up, self.down.weight)  # type: ignore[no-untyped-call]
                return whole
            hidden = _SiluGate.apply(gate, up) if fused is None else fused  # type: ignore[no-untyped-call]
        else:
            hidden = self.compute_hidden(x)
        output: Tensor = self.down(hidden)
        return output

    def compute_hidden(self, x: Tensor) -> Tensor:
        """Compute the input of the down projection: [..., hidden_size] -> [..., intermediate_size]."""
        return self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)

    def _is_plain(self, gate: Tensor) -> bool:
        """Return whether the down projection is unmodified: no adapter, bias, hooks, sharding or autocast."""
        down: Any = self.down
        hooked = (
            type(down) is not ResidualLinear or down._forward_hooks or down._forward_pre_hooks or down.bias is not None
        )
        return (
            not hooked
            and type(down.weight) is nn.Parameter
            and type(gate) is Tensor
            and gate.dtype == down.weight.dtype
            and not torch.is_autocast_enabled(gate.device.type)
        )


class MixtureOfExperts(nn.Module):
    """Mixture of experts: each token gets the weighted sum of its top-k experts (`num_experts_per_tok`).

    Weights are the router's softmax over the chosen experts (Mixtral).

    `load_balancing_loss` after a forward pass is that of the Switch Transformer (section 2.2, eq. 4): num_experts * sum
    over experts of (fraction of tokens) * (mean router probability); 1 when balanced.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        assert shape.experts is not None
        self.top_k = shape.experts.num_experts_per_tok
        self.router = nn.Linear(shape.hidden_size, shape.experts.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(shape) for _ in range(shape.experts.num_experts))
        self.load_balancing_loss: Tensor = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """Compute [batch, length, hidden_size] -> the same shape."""
        tokens = x.reshape(-1, x.shape[-1])
        router_probabilities = self.router(tokens).float().softmax(-1)  # [tokens, experts]
        weights, expert_ids = router_probabilities.topk(self.top_k, dim=-1)  # [tokens, chosen]
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, slot = (expert_ids == number).nonzero(as_tuple=True)
            if len(rows):
                out.index_add_(0, rows, expert(tokens[rows]) * weights[rows, slot, None])
        share = F.one_hot(expert_ids, len(self.experts)).float().sum(1).mean(0) / self.top_k
        self.load_balancing_loss = len(self.experts) * (share * router_probabilities.mean(0)).sum()
        return out.view_as(x)
