"""What the flight recorder measures on its probe: formulas of OLMoE (2409.02060), section 5, and what they leave open.

T tokens, E experts, V different token ids among them, n domains. A map is [T, E] bool: which experts serve each token.
Everything here is a plain function of tensors; docs/metrics.md has ranges and what is alarming.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelab.moe.routing import Routing

LEAST_ACTIVATIONS = 10  # of an expert: of fewer a share says nothing


def saturation(now: Tensor, then: Tensor) -> Tensor:
    """OLMoE eq. 5: the mean over tokens of |S_now and S_then| / |S_now|; scalar float64.

    now: the map of the later look, the paper's final checkpoint. Where tokens have different numbers of experts, k is
    that of the later one, and tokens without any are left out: a departure, the paper's k is fixed.
    """
    size = now.sum(-1)
    share = (now & then).sum(-1).double() / size.clamp_min(1)
    return share.sum() / (size > 0).sum()


def churn(now: Tensor, then: Tensor) -> Tensor:
    """1 - mean over tokens of |S_now and S_then| / |S_now or S_then| (Jaccard); scalar float64."""
    union = (now | then).sum(-1)
    share = (now & then).sum(-1).double() / union.clamp_min(1)
    return 1 - share.sum() / (union > 0).sum()


def co_activation_counts(now: Tensor) -> Tensor:
    """[E, E] float64: how many tokens each pair serves; the diagonal is how many each expert serves.

    OLMoE eq. 6 counts any two; its released script (scripts/run_moe_analysis.py) only experts next to each other in the
    order of their scores. Here all pairs.
    """
    dense = now.double()
    return dense.T @ dense


def co_activation(counts: Tensor) -> Tensor:
    """The largest N_ij / N_i of two different experts (OLMoE eq. 6); scalar, NaN where none was active often enough."""
    alone = counts.diagonal()
    share = (counts / alone.clamp_min(1).unsqueeze(-1)).fill_diagonal_(0)
    often = share[alone >= LEAST_ACTIVATIONS]
    return often.max() if often.numel() else torch.full((), torch.nan, dtype=torch.float64)


def count_by(now: Tensor, group: Tensor, groups: int) -> Tensor:
    """now [T, E], group [T] int64 -> [groups, E] float64: how many tokens of each group each expert serves."""
    empty = torch.zeros(groups, now.shape[-1], dtype=torch.float64, device=now.device)
    return empty.index_add_(0, group, now.double())


def token_specialisation(token_expert: Tensor, occurrences: Tensor) -> Tensor:
    """The share of tokens that go to the expert which serves their id most often; scalar float64.

    OLMoE eq. 8 is N_{x,i} / N_x, and its figures average the largest of each id x over ids; here ids count by how often
    they occur, since a rare id is always with few experts. token_expert [V, E], occurrences [V].
    """
    return token_expert.max(-1).values.sum() / occurrences.sum()


def domain_specialisation(domain_expert: Tensor, expected: Tensor | None = None) -> Tensor:
    """How far the experts of a domain's tokens are from `expected`, in 0 .. 1, the mean over domains; scalar float64.

    Half the sum over experts of the absolute difference (total variation) of OLMoE's eq. 7, N_{i,D} / N_D, as shares of
    the domain's assignments; the paper shows bars and gives no single number. domain_expert [n, E]; expected [n, E],
    None: the shares of all domains together.
    """
    kept = domain_expert.sum(-1) > 0
    shares = _shares(domain_expert[kept])
    other = _shares(domain_expert.sum(0, keepdim=True)) if expected is None else _shares(expected[kept])
    return (shares - other).abs().sum(-1).mean() / 2


def expected_by_tokens(token_expert: Tensor, token_domain: Tensor) -> Tensor:
    """[n, E]: what each expert would get of a domain if a token's id alone decided, with the shares of all domains.

    token_expert [V, E], token_domain [V, n] float64: occurrences. An id that one domain alone has explains itself.
    """
    return token_domain.T @ (token_expert / token_domain.sum(-1, keepdim=True).clamp_min(1))


def expert_similarity(gate_up: Tensor, down: Tensor) -> Tensor:
    """[E, E] fp32: the cosine of all weights of two experts. gate_up [E, 2F, D], down [E, F, D].

    Of the weights as they lie: a copy whose neurons were shuffled is not similar by this.
    """
    parts = [part.detach().flatten(1).float() for part in (gate_up, down)]
    products = torch.stack([part @ part.T for part in parts]).sum(0)
    size = products.diagonal().clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    return products / size / size.unsqueeze(-1)


def mean_off_diagonal(matrix: Tensor) -> Tensor:
    """[E, E] -> scalar; NaN for a single expert."""
    experts = len(matrix)
    return (
        (matrix.sum() - matrix.diagonal().sum()) / (experts * (experts - 1))
        if experts > 1
        else matrix.sum() * torch.nan
    )


def top_k_margin(routing: Routing, now: Tensor) -> Tensor | None:
    """The mean over tokens of the smallest normalised score of a chosen expert minus the largest of another; scalar.

    The k-th minus the (k+1)-th score where the K best are chosen; below 0 where a bias, groups or a capacity chose
    others.
    None without scores or logits, and where every expert serves every token.
    """
    scores = routing.scores.float() if routing.scores is not None else None
    if scores is None:
        if routing.logits is None:
            return None
        scores = routing.logits.float().softmax(-1)
    scores = (scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny))[:, : now.shape[-1]]
    counted = now.any(-1) & ~now.all(-1)
    if not bool(counted.any()):
        return None
    least = scores.masked_fill(~now, torch.inf).min(-1).values
    most = scores.masked_fill(now, -torch.inf).max(-1).values
    return (least - most)[counted].double().mean()


def _shares(counts: Tensor) -> Tensor:
    return counts / counts.sum(-1, keepdim=True).clamp_min(1e-30)
