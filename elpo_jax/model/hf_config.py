"""Hugging Face config.json files: which networks they describe, in our numbers, and ours in theirs.

A file that describes anything that `ModelConfig` cannot is refused by name: a network that ignores a feature of its
checkpoint would run, and be wrong. Both forms are read, that of published checkpoints (rope_theta, rope_scaling,
torch_dtype) and that of transformers 5 (rope_parameters, dtype); the older one is written, which both versions read.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from elpo_jax.model.config import ModelConfig, RopeScaling, config_from_json

MODEL_FILE = "model.json"  # a `ModelConfig`, in folders that we write
FAMILIES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}
_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32", None: "float32"}
# Our number -> theirs, where one is the other.
_NUMBERS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "d_ff": "intermediate_size",
}
_ROPE_NUMBERS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}
# Key -> the values that mean the feature is off (absent always does).
_OFF: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "vision_config": (None,),
    "text_config": (None,),
    "audio_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "use_sliding_window": (None, False),
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "is_encoder_decoder": (None, False),
    "hidden_act": ("silu",),
}


def read_hf_config(folder: str | os.PathLike) -> ModelConfig:
    """The network of a checkpoint folder, with `source` set to the folder.

    A folder that `python -m elpo_jax.model.weights import` made has a model.json, which is read instead.

    Args:
      folder: Has a config.json.

    Returns:
      The config; dtype and param_dtype are the checkpoint's (float32 for float16 and where it names none), which suits
      inference. Training needs `dataclasses.replace(config, param_dtype="float32")`.

    Raises:
      ValueError: If there is no such file, it is damaged, or it describes what is not supported; the message names it.
    """
    folder = pathlib.Path(folder)
    if (folder / MODEL_FILE).is_file():
        return _naming(folder / MODEL_FILE, config_from_json, _read(folder / MODEL_FILE), folder)
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{folder} holds an adapter alone: merge it into its base model, and save that")
        raise ValueError(f"{folder} has no config.json: give the folder of a checkpoint, with all of its files")
    return _naming(folder / "config.json", from_hf, _read(folder / "config.json"), folder)


def read_eos_ids(folder: str | os.PathLike) -> tuple[int, ...]:
    """Ids that end a turn, by generation_config.json, or else by config.json; none where neither names any.

    Raises:
      ValueError: If a file is damaged, or its eos_token_id is neither an id nor a list of ids.
    """
    for path in (pathlib.Path(folder) / name for name in ("generation_config.json", "config.json")):
        value = _read(path).get("eos_token_id") if path.is_file() else None
        ids = value if isinstance(value, list) else [value]
        if value is not None:
            if not all(type(i) is int and i >= 0 for i in ids):
                raise ValueError(f"eos_token_id in {path} is neither an id nor a list of ids: {value!r}")
            return tuple(ids)
    return ()


def from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """The network that the content of a config.json describes.

    Raises:
      ValueError: If that is not supported, or a number is missing.
    """
    family = values.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not supported: there are {', '.join(FAMILIES)} (dense, text only)")
    architecture = f"{FAMILIES[family]}ForCausalLM"
    if values.get("architectures") not in (None, [], [architecture]):
        raise ValueError(f"architectures {values['architectures']} is not supported: only {architecture} is")
    for key, off in _OFF.items():
        if key in values and values[key] not in off:
            raise ValueError(f"{key}={_short(values[key])} is not supported: only {_short(off[-1])} is")
    if family != "qwen2" and values.get("attention_bias"):  # which Qwen2 has no switch for
        raise ValueError("attention_bias=true is not supported in this family: only Qwen2's biases are")
    if family == "mistral" and values.get("sliding_window", 4096) is not None:
        window = values.get("sliding_window", "absent (which means 4096)")
        raise ValueError(f"sliding_window is {window}, and sliding windows are not supported: only null is")
    others = set(values.get("layer_types") or ()) - {"full_attention"}
    if others:
        raise ValueError(f"layer_types has {', '.join(sorted(map(str, others)))}: only full_attention is supported")
    dtype = values.get("dtype", values.get("torch_dtype"))
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported: there are float32, bfloat16 and float16")
    missing = [key for key in (*_NUMBERS.values(), "rms_norm_eps") if values.get(key) is None]
    if values.get("num_key_value_heads") is None and family != "llama":
        missing.append("num_key_value_heads")
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing: copy the file from the checkpoint again")
    tied = values.get("tie_word_embeddings") or False
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings={_short(tied)} is damaged: it is true or false")
    if type(values["rms_norm_eps"]) not in (int, float):
        raise ValueError(f"rms_norm_eps={_short(values['rms_norm_eps'])} is damaged: it is a number")
    theta, scaling = _rope(values)
    numbers = {ours: values[key] for ours, key in _NUMBERS.items()}
    head_dim = values.get("head_dim")
    if head_dim is None:
        head_dim = 128 if family == "qwen3" else numbers["d_model"] // numbers["heads"]
    return ModelConfig(
        **numbers,
        kv_heads=values.get("num_key_value_heads") or numbers["heads"],
        head_dim=head_dim,
        rope_theta=theta,
        norm_eps=values["rms_norm_eps"],
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        tied=tied,
        dtype=_DTYPES[dtype],
        param_dtype=_DTYPES[dtype],
        rope_scaling=scaling,
    )


def to_hf(config: ModelConfig, max_positions: int | None = None) -> dict[str, Any]:
    """The content of a config.json that describes the network, for transformers 4 and 5.

    Args:
      config: The network.
      max_positions: What it gives as max_position_embeddings; by default the original context times the factor of the
        rope scaling, or 32768 where there is none.

    Raises:
      ValueError: If no family of theirs has all of the network's features.
    """
    if config.qk_norm and config.qkv_bias:
        raise ValueError("no published family has both model.qk_norm and model.qkv_bias: such a network cannot leave")
    family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    if family == "llama" and config.d_model % config.heads:
        raise ValueError(
            f"model.d_model={config.d_model} is not a multiple of model.heads={config.heads}: transformers has no "
            "network of this family like that"
        )
    scaling = config.rope_scaling
    stretched = int(scaling.original_context * scaling.factor)
    values = {
        "architectures": [f"{FAMILIES[family]}ForCausalLM"],
        "model_type": family,
        **{key: getattr(config, ours) for ours, key in _NUMBERS.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions or stretched or 32768,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tied,
        "torch_dtype": config.param_dtype,
    }
    if family != "qwen2":
        values["attention_bias"] = False
    if family != "llama":
        values["use_sliding_window"] = False
    if scaling.kind != "none":
        numbers = {key: getattr(scaling, ours) for ours, key in _ROPE_NUMBERS[scaling.kind].items()}
        if not scaling.attention_factor:
            numbers.pop("attention_factor", None)
        values["rope_scaling"] = {"rope_type": scaling.kind, **numbers}
    return values


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling]:
    """The base of the rotary frequencies and their scaling, from either form of the file."""
    forms = [values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key)]
    if len(forms) == 2 and forms[0] != forms[1]:
        raise ValueError("rope_parameters and rope_scaling disagree: keep one, with rope_theta in it or beside it")
    if forms and not isinstance(forms[0], dict):
        raise ValueError(f"the rope scaling {_short(forms[0])} is damaged: copy the file from the checkpoint again")
    numbers = {key: value for key, value in (forms[0] if forms else {}).items() if value is not None}
    # `type` is the older name; files that several versions have written have both.
    old = numbers.pop("type", "default")
    kind = numbers.pop("rope_type", old)
    theta = numbers.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    if type(theta) not in (int, float):
        raise ValueError(f"rope_theta={_short(theta)} is damaged: it is a number")
    if numbers.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not supported: only 1.0 is")
    if kind not in ("default", *_ROPE_NUMBERS):
        raise ValueError(f"rope type {kind!r} is not supported: there are default, {', '.join(_ROPE_NUMBERS)}")
    known = _ROPE_NUMBERS.get(kind, {})
    unknown = sorted(set(numbers) - set(known.values()))
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} of rope type {kind!r} is not supported: take it out if it means nothing"
        )
    if "original_context" in known:
        context = values.get("original_max_position_embeddings") or values.get("max_position_embeddings") or 0
        numbers.setdefault("original_max_position_embeddings", context)
    needed = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",) if known else ()
    missing = [key for key in needed if key not in numbers]
    if missing:
        raise ValueError(f"rope type {kind!r} needs {', '.join(missing)}: copy the file from the checkpoint again")
    for key, value in numbers.items():
        if not (isinstance(value, bool) if key == "truncate" else type(value) in (int, float)):
            raise ValueError(f"{key}={_short(value)} of rope type {kind!r} is damaged: copy the file again")
    if not known:
        return float(theta), RopeScaling()
    return float(theta), RopeScaling(kind, **{ours: numbers[key] for ours, key in known.items() if key in numbers})


def _naming(path, parse, values, folder) -> ModelConfig:
    """The parsed config; what is wrong with it is said with the file's name."""
    try:
        return dataclasses.replace(parse(values), source=str(folder))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it from the checkpoint again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged (it holds no object): copy it from the checkpoint again")
    return values


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
