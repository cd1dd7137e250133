"""Tiny reference models of the families that we read, made with transformers; it and torch must be installed."""

import copy
import json
import pathlib

import torch
import transformers

_SHAPE = {
    "vocab_size": 257,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _default(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


# Name -> family and what differs from `_SHAPE`.
KINDS: dict[str, tuple[str, dict]] = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": False, "rope_parameters": _default(1e6)}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": _default(1e4)}),
    "qwen2_yarn": ("Qwen2", {"tie_word_embeddings": False, "rope_parameters": _YARN}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 32, "rope_parameters": _default(5e6)}),
    "qwen3_yarn": (
        "Qwen3",
        {
            "tie_word_embeddings": False,
            "head_dim": 32,
            "rope_parameters": {**_YARN, "beta_fast": 8, "beta_slow": 2, "attention_factor": 1.25, "truncate": False},
        },
    ),
    "llama": ("Llama", {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_parameters": _default(1e4)}),
    "llama3": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_parameters": _LLAMA3}),
    "llama_linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16, "rope_parameters": _default(1e6)}),
}


def build(kind: str, sharpness: float = 1.0, **changes):
    """A model with random weights, norms and biases, float32, with eager attention.

    Args:
      kind: A key of `KINDS`.
      sharpness: Scales what the head reads, so that logits are far apart.
      **changes: Of the configuration.
    """
    family, differing = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**{**_SHAPE, **differing, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(sorted(KINDS).index(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                scale = sharpness if name == "model.norm.weight" else 1.0
                parameter.copy_(scale * (1 + 0.2 * noise))
            else:
                parameter.copy_(noise * (0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5))
    return model


def save(model, folder: pathlib.Path, dtype: str = "float32", shard: str = "50GB") -> pathlib.Path:
    """Saves the model in a dtype, as transformers does, and returns the folder."""
    copy.deepcopy(model).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return folder


def read(folder: pathlib.Path, dtype: str = "auto"):
    """The model of a folder as transformers loads it, computing in the dtype; every tensor found its place."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=dtype, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def to_old_form(folder: pathlib.Path) -> None:
    """Rewrites config.json with the keys of transformers 4, which published checkpoints have."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    values["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    values["torch_dtype"] = values.pop("dtype")
    values.pop("layer_types", None)
    path.write_text(json.dumps(values))


def reference_logits(model, ids, positions=None):
    """float32 [B, T, V] of ids [B, T], padded on the right with -1; the values at padding mean nothing."""
    ids = torch.tensor(ids)
    positions = None if positions is None else torch.tensor(positions)
    with torch.no_grad():
        mask = (ids >= 0).long()
        return model(ids.clamp(min=0), attention_mask=mask, position_ids=positions).logits.float().numpy()
