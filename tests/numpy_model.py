"""An independent transformer: float64 NumPy, one sequence and one head at a time, written from the equations."""

import numpy as np

from elpo_jax.model.config import ModelConfig


def float64(params):
    """A parameter tree as float64 NumPy arrays."""
    if isinstance(params, dict):
        return {name: float64(value) for name, value in params.items()}
    return np.asarray(params, np.float64)


def norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * scale


def rope(x, positions, theta):
    """[T, N]: the pair (i, i + N/2) as a complex number, turned by position * theta^(-2i/N)."""
    half = x.shape[-1] // 2
    pairs = x[:, :half] + 1j * x[:, half:]
    turned = pairs * np.exp(1j * np.outer(positions, theta ** (-2.0 * np.arange(half) / x.shape[-1])))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attention(config: ModelConfig, p, x, positions):
    length, n = len(x), config.head_dim
    q, k, v = (x @ p[name] + p.get(f"{name}_bias", 0.0) for name in "qkv")
    out = np.zeros((length, config.heads * n))
    for head in range(config.heads):
        shared = head // (config.heads // config.kv_heads)
        mine, theirs = slice(head * n, (head + 1) * n), slice(shared * n, (shared + 1) * n)
        qh, kh, vh = q[:, mine], k[:, theirs], v[:, theirs]
        if config.qk_norm:
            qh, kh = norm(qh, p["q_norm"], config.norm_eps), norm(kh, p["k_norm"], config.norm_eps)
        qh, kh = rope(qh, positions, config.rope_theta), rope(kh, positions, config.rope_theta)
        for t in range(length):
            out[t, mine] = softmax(kh[: t + 1] @ qh[t] / np.sqrt(n)) @ vh[: t + 1]
    return out @ p["o"]


def forward(config: ModelConfig, params, tokens):
    """(hidden [T, D], logits [T, V]) of one sequence of token ids."""
    p = float64(params)
    positions = np.arange(len(tokens))
    x = p["embed"][np.asarray(tokens)]
    for i in range(config.layers):
        layer = p[f"layers_{i}"]
        x = x + attention(config, layer["attn"], norm(x, layer["attn_norm"], config.norm_eps), positions)
        y, mlp = norm(x, layer["mlp_norm"], config.norm_eps), layer["mlp"]
        gate = y @ mlp["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ mlp["up"])) @ mlp["down"]
    hidden = norm(x, p["final_norm"], config.norm_eps)
    return hidden, hidden @ (p["embed"].T if config.tied else p["head"])


def logprobs(config: ModelConfig, params, tokens, temperature):
    """(logp [T] at a temperature, entropy [T] at temperature 1), aligned to the token itself; 0 for the first."""
    _, logits = forward(config, params, tokens)
    logp, entropy = np.zeros(len(tokens)), np.zeros(len(tokens))
    for t in range(1, len(tokens)):
        logp[t] = np.log(softmax(logits[t - 1] / temperature)[tokens[t]])
        p = softmax(logits[t - 1])
        entropy[t] = -(p * np.log(p)).sum()
    return logp, entropy


def tree_attention(q, k, v, ends, slope):
    """Attention of one row and one head, query by query, and its gradient.

    Args:
      q, k, v: float64 [T, N].
      ends: int [T]; query i sees key j iff j <= i < ends[j].
      slope: float64 [T, N], gradient by the output.

    Returns:
      The output, and the gradients by q, k and v, float64 [T, N] each. A query that sees no key gives 0.
    """
    out, by_q, by_k, by_v = (np.zeros(q.shape) for _ in range(4))
    scale = q.shape[1] ** -0.5
    for i in range(len(q)):
        seen = [j for j in range(i + 1) if i < ends[j]]
        if not seen:
            continue
        weights = softmax(k[seen] @ q[i] * scale)
        out[i] = weights @ v[seen]
        by_weights = v[seen] @ slope[i]
        by_scores = weights * (by_weights - weights @ by_weights) * scale
        by_q[i] = by_scores @ k[seen]
        by_k[seen] += np.outer(by_scores, q[i])
        by_v[seen] += np.outer(weights, slope[i])
    return out, by_q, by_k, by_v
