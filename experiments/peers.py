"""Other people's GRPO trainers with the same network and the same work, for `bench_rl.py`; nothing else needs them.

Install them with `pip install -r experiments/requirements-peers.txt`. Each runs its own public training loop, in a
thread that is let go one step at a time, so that its steps and ours can take turns in one process. Weights are random,
prompts are random ids, the reward is a function of the text that costs nothing, and no turn may end early.
"""

import dataclasses
import math
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
import optax

from elpo_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Work:
    """One RL step: `prompts` x `group` attempts of `new` tokens after prompts of `prompt` tokens, and one update."""

    prompts: int = 8
    group: int = 8
    prompt: int = 32
    new: int = 128


class Stepper:
    """Lets a training loop that runs in a thread of its own go one step at a time.

    The loop calls `wait` where a step begins; what runs from there until its next call is the step.
    """

    def __init__(self, loop: Callable[["Stepper"], None]):
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(loop,), daemon=True)
        self._thread.start()
        self._await()

    def step(self) -> None:
        """Runs one step; raises what the loop raised."""
        self._go.release()
        self._await()

    def wait(self) -> None:
        self._done.release()
        self._go.acquire()
        if self._closed:
            raise SystemExit  # ends the thread

    def close(self) -> None:
        self._closed = True
        self._go.release()
        self._thread.join()

    def _await(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def _run(self, loop) -> None:
        try:
            loop(self)
            raise RuntimeError("the training loop ended by itself")
        except SystemExit:
            pass
        except BaseException as error:
            self._error = error
            self._done.release()


def reward(prompts, completions, **_) -> list[float]:
    """A coin for each completion, so that every group has both outcomes."""
    return [float(zlib.crc32(str(text).encode()) % 2) for text in completions]


def trl_stepper(config: ModelConfig, work: Work, seed: int) -> Stepper:
    """TRL's GRPOTrainer in float32 on the CPU, with its own defaults where `work` says nothing."""
    import torch
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import GRPOConfig, GRPOTrainer

    words = {f"t{i}": i for i in range(config.vocab_size - 1)} | {"<pad>": config.vocab_size - 1}
    raw = Tokenizer(models.WordLevel(words, unk_token="t0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<pad>")
    torch.manual_seed(seed)
    model = transformers.Qwen3ForCausalLM(qwen3_config(config))
    texts = _prompts(config, work, seed)
    steps = 10_000  # more than any bench asks for

    def loop(stepper: Stepper) -> None:
        class Gate(transformers.TrainerCallback):
            def on_step_begin(self, *_, **__):
                stepper.wait()

        with tempfile.TemporaryDirectory() as folder:
            arguments = GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=work.prompts * work.group,
                num_generations=work.group,
                max_completion_length=work.new,
                generation_kwargs={"min_new_tokens": work.new},
                temperature=1.0,
                beta=0.0,
                max_steps=steps,
                learning_rate=1e-6,
                lr_scheduler_type="constant",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
                seed=seed,
            )
            GRPOTrainer(
                model=model,
                reward_funcs=reward,
                args=arguments,
                train_dataset=Dataset.from_dict({"prompt": texts}),
                processing_class=tokenizer,
                callbacks=[Gate()],
            ).train()

    return Stepper(loop)


def tunix_stepper(config: ModelConfig, work: Work, seed: int) -> Stepper:
    """google-tunix's GRPOLearner in float32, with its own defaults where `work` says nothing."""
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl import rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout.base_rollout import RolloutConfig

    shape = qwen3.ModelConfig(
        num_layers=config.layers,
        vocab_size=config.vocab_size,
        embed_dim=config.d_model,
        hidden_dim=config.d_ff,
        num_heads=config.heads,
        head_dim=config.head_dim,
        num_kv_heads=config.kv_heads,
        rope_theta=int(config.rope_theta),
        norm_eps=config.norm_eps,
    )
    count = math.gcd(jax.device_count(), config.kv_heads)  # it splits the heads
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((count, 1), ("fsdp", "tp"), axis_types=kinds, devices=jax.devices()[:count])
    texts = _prompts(config, work, seed)

    class Words:
        """The tokenizer that it asks for, over words t0, t1, ..."""

        def encode(self, text: str, **_) -> list[int]:
            return [int(word[1:]) for word in text.split()]

        def decode(self, ids, **_) -> str:
            return " ".join(f"t{int(i)}" for i in ids)

        def bos_id(self) -> int:
            return 0

        def eos_id(self) -> int:
            return config.vocab_size  # an id that is never sampled

        def pad_id(self) -> int:
            return 0

    def loop(stepper: Stepper) -> None:
        def batches() -> Iterator[dict]:
            while True:
                stepper.wait()
                yield {"prompts": np.array(texts[: work.prompts])}

        with mesh:
            model = qwen3.Qwen3(shape, rngs=nnx.Rngs(seed))
            cluster = rl_cluster.RLCluster(
                actor=model,
                tokenizer=Words(),
                cluster_config=rl_cluster.ClusterConfig(
                    role_to_mesh={role: mesh for role in rl_cluster.Role},
                    rollout_engine="vanilla",
                    training_config=rl_cluster.RLTrainingConfig(
                        actor_optimizer=optax.adamw(1e-6), eval_every_n_steps=10_000, max_steps=10_000
                    ),
                    rollout_config=RolloutConfig(
                        max_tokens_to_generate=work.new,
                        max_prompt_length=work.prompt,
                        kv_cache_size=work.prompt + work.new,
                        temperature=1.0,
                        top_p=1.0,
                        top_k=None,
                    ),
                ),
            )
            algorithm = GRPOConfig(num_generations=work.group, num_iterations=1, beta=0.0)
            GRPOLearner(rl_cluster=cluster, algo_config=algorithm, reward_fns=reward).train(batches())

    return Stepper(loop)


def qwen3_config(config: ModelConfig, **changes):
    """The same network as a `transformers.Qwen3Config`, with what else is to be set or other than here."""
    import transformers

    numbers = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied,
        max_position_embeddings=4096,
        pad_token_id=config.vocab_size - 1,
        eos_token_id=config.vocab_size - 1,
        bos_token_id=None,
    )
    return transformers.Qwen3Config(**numbers | changes)


def _prompts(config: ModelConfig, work: Work, seed: int) -> list[str]:
    ids = np.random.default_rng(seed).integers(0, config.vocab_size - 2, (work.prompts, work.prompt))
    return [" ".join(f"t{i}" for i in row) for row in ids]
