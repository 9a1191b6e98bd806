"""Direct preference optimization (DPO) and its loss variants: the implicit rewards are log-ratios of policy to
reference.

Rafailov et al. 2023 (arXiv:2305.18290). Each loss takes the difference of the two rewards, or both of them.
Log-probabilities are summed over the tokens of a completion; `ipo` and `sigmoid_norm` take means over tokens. TRL's
`DPOTrainer` computes the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from llmworks.align.losses.pair_logprobs import PairLogprobs, PairLoss

MAX_EXPONENT = 80.0  # largest exponent: exp of more overflows fp32


def f_divergence_scores(ratios: Tensor, divergence: str, alpha: float = 0.5) -> Tensor:
    """Return f'(ratio) of an f-divergence for log-ratios (f-DPO, Wang et al. 2023, arXiv:2309.16240)."""
    if divergence == "forward_kl":
        return 1 - torch.exp((-ratios).clamp(max=MAX_EXPONENT))
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(ratios)
    if divergence == "alpha_divergence" and abs(alpha - 1) > 1e-6:
        return torch.expm1(((alpha - 1) * ratios).clamp(max=MAX_EXPONENT)) / (alpha - 1)
    return ratios


def sigmoid(difference: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return -log sigmoid with label smoothing (conservative DPO, Mitchell 2023)."""
    return -(1 - smoothing) * F.logsigmoid(difference) - smoothing * F.logsigmoid(-difference)


def robust(difference: Tensor, smoothing: float) -> Tensor:
    """Return the loss that is unbiased under label noise of rate `smoothing` (Chowdhury et al. 2024,
    arXiv:2403.00409).
    """
    return (-(1 - smoothing) * F.logsigmoid(difference) + smoothing * F.logsigmoid(-difference)) / (1 - 2 * smoothing)


def exo(difference: Tensor, smoothing: float) -> Tensor:
    """Return the reverse KL from the policy's choice to the smoothed label (Ji et al. 2024, arXiv:2402.00856, equation
    16).
    """
    for_chosen, for_rejected = F.logsigmoid(difference), F.logsigmoid(-difference)
    return for_chosen.exp() * (for_chosen - math.log1p(-smoothing)) + for_rejected.exp() * (
        for_rejected - math.log(smoothing)
    )


def discopop(difference: Tensor, tau: float = 0.05) -> Tensor:
    """Return a blend of logistic and exponential loss (DiscoPOP, Lu et al. 2024, arXiv:2406.08414, equation 5)."""
    share = torch.sigmoid(difference / tau)
    return -F.logsigmoid(difference) * (1 - share) + torch.exp((-difference).clamp(max=MAX_EXPONENT)) * share


def nca(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the noise contrastive alignment loss (Chen et al. 2024, arXiv:2402.05369).

    Takes each reward separately, so that the chosen completion does not become less probable as well.
    """
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the binary classifier loss (Jung et al. 2024, arXiv:2404.04656), without the reward shift."""
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def apo_zero(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return APO-zero: raises chosen completions and lowers rejected ones (D'Oosterlinck et al. 2024,
    arXiv:2408.06266).

    Equation 7; for chosen completions that are better than the model's own.
    """
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return APO-down: lowers both completions, the rejected one more (equation 8).

    For a model whose own completions are better than both.
    """
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


DIFFERENCE_LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": lambda d, _: -F.logsigmoid(d),
    "hinge": lambda d, _: torch.relu(1 - d),
    "robust": robust,
    "exo_pair": exo,
    "discopop": lambda d, _: discopop(d),
}
REWARD_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nca_pair": nca,
    "bco_pair": bco,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
}


def dpo(
    pairs: PairLogprobs,
    loss_type: str = "sigmoid",
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
) -> PairLoss:
    """Return the loss of each pair.

    `label_smoothing`: for sigmoid, robust, exo and aot. `divergence`: for all but nca, bco, apo and sppo, which take
    log-ratios unchanged.
    """
    ratios = pairs.log_ratios
    chosen, rejected = (f_divergence_scores(ratio, divergence, alpha) for ratio in ratios)
    rewards = beta * ratios[0].detach(), beta * ratios[1].detach()
    if loss_type in ("ipo", "sigmoid_norm"):
        chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
    if (
        loss_type == "ipo"
    ):  # Azar et al. 2023, arXiv:2310.12036, equation 17; over mean log-probabilities, as its authors advise
        loss = (chosen - rejected - 1 / (2 * beta)) ** 2
    elif loss_type == "sppo_hard":  # Wu et al. 2024, arXiv:2405.00675, equation 4.7 with probabilities 1 and 0
        loss = (ratios[0] - 0.5 / beta) ** 2 + (ratios[1] + 0.5 / beta) ** 2
    elif loss_type in (
        "aot",
        "aot_unpaired",
    ):  # Melnyk et al. 2024, arXiv:2406.05882: stochastic dominance of the sorted rewards
        loss = sigmoid(beta * _quantile_differences(pairs, paired=loss_type == "aot"), label_smoothing)
    elif loss_type in REWARD_LOSSES:
        loss = REWARD_LOSSES[loss_type](beta * ratios[0], beta * ratios[1])
    else:
        loss = DIFFERENCE_LOSSES[loss_type](beta * (chosen - rejected), label_smoothing)
    return PairLoss(loss, *rewards)


def _quantile_differences(pairs: PairLogprobs, *, paired: bool) -> Tensor:
    """Return differences of sorted values.

    Paired: margins of the policy and of the reference; unpaired: log-ratios of chosen and of rejected completions.
    """
    if not paired:
        chosen, rejected = pairs.log_ratios
        return chosen.sort().values - rejected.sort().values
    assert pairs.ref_chosen is not None
    assert pairs.ref_rejected is not None
    return (pairs.chosen - pairs.rejected).sort().values - (pairs.ref_chosen - pairs.ref_rejected).sort().values
