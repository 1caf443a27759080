"""Small training steps whose memory is predicted and really counted: families, PEFT methods, ways.

Each case is a model, an adapter and what differs from the plain step; all are built in code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import transformers as hf

from pytest_lora.memory.workload import Workload

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
_DROPOUTS = ("attention_probs_dropout_prob", "hidden_dropout_prob", "dropout", "attention_dropout",
             "dropout_rate", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop",
             "seq_classif_dropout", "embedding_dropout")  # fmt: skip


def llama(**changes: Any) -> Any:
    shape = {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 344,
             "num_hidden_layers": 3, "num_attention_heads": 8,
             "num_key_value_heads": 2}  # fmt: skip
    return hf.LlamaConfig(**{**shape, **changes})


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "qwen2": lambda: hf.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=16),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=32),
    "gemma2": lambda: hf.Gemma2Config(**GROUPED, head_dim=16, sliding_window=32),
    "gemma3": lambda: hf.Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=32),
    "phi3": lambda: hf.Phi3Config(**GROUPED, pad_token_id=0),
    "olmo2": lambda: hf.Olmo2Config(**GROUPED),
    "gpt2": lambda: hf.GPT2Config(vocab_size=512, n_embd=64, n_layer=4, n_head=4, n_positions=256),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SHAPE),
    "opt": lambda: hf.OPTConfig(
        vocab_size=512, hidden_size=64, ffn_dim=128, num_hidden_layers=4, num_attention_heads=4,
        word_embed_proj_dim=64,
    ),
    "t5": lambda: hf.T5Config(
        vocab_size=512, d_model=64, d_ff=128, num_layers=3, num_heads=4, d_kv=16,
        decoder_start_token_id=0,
    ),
    "bert": lambda: hf.BertConfig(**SHAPE, num_labels=3),
    "roberta": lambda: hf.RobertaConfig(**SHAPE),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=512, dim=64, hidden_dim=128, n_layers=4, n_heads=4
    ),
    "modernbert": lambda: hf.ModernBertConfig(**SHAPE, pad_token_id=0),
}  # fmt: skip
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["q_proj", "v_proj", "down_proj"]


def lora(**changes: Any) -> Any:
    options = {"r": 8, "lora_alpha": 16, "target_modules": EVERY, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**options, **changes})


def everywhere(task: str = "CAUSAL_LM") -> Any:
    return lora(r=4, target_modules="all-linear", task_type=task)


ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "rslora": lambda: lora(use_rslora=True),
    "dropout": lambda: lora(lora_dropout=0.1),
    "r=64": lambda: lora(r=64),
    "bias": lambda: lora(bias="lora_only"),
    "rank pattern": lambda: lora(target_modules=SOME, rank_pattern={"down_proj": 32}),
    "one layer": lambda: lora(target_modules=SOME, layers_to_transform=[1]),
    "embedding and head": lambda: lora(target_modules=[*SOME, "embed_tokens", "lm_head"]),
    "saved head": lambda: lora(target_modules=SOME, modules_to_save=["lm_head"]),
    "pissa": lambda: lora(target_modules=SOME, init_lora_weights="pissa"),
    "olora": lambda: lora(target_modules=SOME, init_lora_weights="olora"),
    "encoder": lambda: lora(target_modules=["query", "value", "q_lin", "v_lin"]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=SOME),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=SOME),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"),
    "full training": lambda: None,
}


@dataclass(frozen=True)
class Case:
    """A training step.

    Attributes:
        model: key of :data:`CONFIGS`.
        adapter: key of :data:`ADAPTERS`, or "all-linear" for whatever linear layers there are.
        task: PEFT's task type.
        options: arguments of the workload that differ from the plain step.
        changes: of the model's configuration.
    """

    model: str = "llama"
    adapter: str = "lora"
    task: str = "CAUSAL_LM"
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [self.model, self.adapter]
        for key, value in {**self.changes, **self.options}.items():
            words.append(f"{key}={str(value).removeprefix('torch.')}")
        return " ".join(words)

    def workload(self) -> Workload:
        config = CONFIGS[self.model]()
        for name in _DROPOUTS:
            if getattr(config, name, None):
                setattr(config, name, 0.0)
        for name, value in self.changes.items():
            setattr(config, name, value)
        if self.adapter == "all-linear":
            adapter = everywhere(self.task)
        else:
            adapter = ADAPTERS[self.adapter]()
        if adapter is not None:
            adapter.task_type = self.task
        options = {"batch": 2, "sequence": 64, **self.options}
        return Workload(config=copy.deepcopy(config), adapter=adapter, task=self.task, **options)


BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64


def _ways(*options: dict[str, Any], adapter: str = "lora") -> list[Case]:
    return [Case(adapter=adapter, options=each) for each in options]


FAMILIES = [
    *(Case(name, "all-linear") for name in (
        "qwen2", "qwen3", "mistral", "gemma3", "phi3", "olmo2", "gpt2", "gpt_neox", "opt"
    )),
    Case("gemma2", "all-linear", options={"attention": "eager"}),
    Case("t5", "all-linear", "SEQ_2_SEQ_LM"),
    *(Case(name, "all-linear", "SEQ_CLS") for name in ("bert", "roberta")),
    Case("distilbert", "encoder", "SEQ_CLS"),
    Case("modernbert", "all-linear", "SEQ_CLS", options={"attention": "eager"}),
    Case("bert", "encoder", "TOKEN_CLS", options={"padding": "full"}),
    Case("bert", "all-linear", "SEQ_CLS", changes={"hidden_dropout_prob": 0.1}),
    Case("gpt2", "all-linear", changes={"attn_pdrop": 0.1, "resid_pdrop": 0.1}),
]  # fmt: skip
METHODS = [Case(adapter=name) for name in ADAPTERS if name not in ("lora", "encoder")]
WAYS = _ways(
    {"padding": "none"},
    {"padding": "full"},
    {"padding": "padded"},
    {"padding": "none", "attention": "eager"},
    {"attention": "eager"},
    {"checkpointing": "reentrant"},
    {"checkpointing": "non-reentrant"},
    {"checkpointing": "non-reentrant", "padding": "none", "dtype": BF16},
    {"accumulation": 3},
    {"clip": 1.0},
    {"dtype": BF16},
    {"dtype": BF16, "adapter_dtype": BF16},
    {"dtype": FP16, "attention": "eager"},
    {"dtype": FP64},
    {"optimizer": "adamw_foreach"},
    {"optimizer": "adamw_foreach", "clip": 1.0, "accumulation": 2},
    {"optimizer": "adamw_loop"},
    {"optimizer": "adamw_fused"},
    {"optimizer": "sgd"},
    {"optimizer": "sgd_momentum"},
    {"optimizer": "adagrad"},
    {"optimizer": "rmsprop"},
    {"batch": 1, "sequence": 200},
) + _ways(
    {"checkpointing": "non-reentrant", "dtype": BF16, "adapter_dtype": BF16},
    {"checkpointing": "reentrant", "padding": "none"},
    adapter="dora",
)
AUTOCAST = [
    *_ways(
        {"autocast": BF16},
        {"autocast": BF16, "dtype": BF16},
        {"autocast": BF16, "attention": "eager", "padding": "none"},
        {"autocast": BF16, "checkpointing": "non-reentrant"},
        {"autocast": BF16, "checkpointing": "reentrant", "accumulation": 2},
        {"autocast": FP16, "accumulation": 3, "clip": 1.0},
    ),
    *(Case(adapter=name, options={"autocast": BF16}) for name in (
        "dora", "dropout", "saved head", "ia3", "vera", "full training"
    )),
    *(Case(name, "all-linear", options={"autocast": BF16}) for name in ("qwen2", "gemma3", "gpt2")),
    Case("gpt2", "all-linear", options={"autocast": BF16, "checkpointing": "non-reentrant"}),
    Case("t5", "all-linear", "SEQ_2_SEQ_LM", options={"autocast": BF16}),
    Case("bert", "all-linear", "SEQ_CLS", options={"autocast": BF16}),
]  # fmt: skip
_PROMPT = {"job": "inference", "new_tokens": 8}
OTHER_JOBS = [
    Case(options={"job": "inference"}),
    Case(options={"job": "inference", "attention": "eager", "dtype": BF16}),
    *(Case(adapter=name, options=_PROMPT) for name in ("lora", "dora", "ia3", "prompt tuning")),
    *(Case(name, "all-linear", options=_PROMPT) for name in ("qwen2", "gemma3", "gpt2", "opt")),
    Case("t5", "all-linear", "SEQ_2_SEQ_LM", options=_PROMPT),
    Case(options={**_PROMPT, "dtype": BF16, "padding": "none"}),
    Case(options={"job": "inference", "autocast": BF16}),
    Case(options={**_PROMPT, "autocast": BF16}),
    *(Case(adapter=name, options={"job": "merge"}) for name in ("lora", "dora", "ia3", "loha")),
    Case("gpt2", "all-linear", options={"job": "merge"}),
    Case(options={"job": "merge", "dtype": BF16}),
    *(Case(adapter=name, options={"job": "load"}) for name in ("lora", "dora", "saved head")),
]
# With bitsandbytes.
QUANTISED = _ways(
    {"quantisation": "nf4"},
    {"quantisation": "nf4-single", "dtype": BF16},
    {"quantisation": "nf4", "dtype": BF16, "checkpointing": "reentrant"},
    {"quantisation": "fp4", "checkpointing": "non-reentrant", "padding": "none"},
    {"quantisation": "nf4", "dtype": BF16, "autocast": BF16, "checkpointing": "non-reentrant"},
)
_NESTED = {"job": "merge", "quantisation": "nf4", "dtype": BF16}
MERGES_IN_4_BITS = [
    Case(options=_NESTED),
    Case(adapter="dora", options=_NESTED),
    Case(options={**_NESTED, "quantisation": "fp4-single", "dtype": FP16}),
    Case("qwen2", "all-linear", options={**_NESTED, "quantisation": "nf4-single"}),
]
EIGHT_BIT = _ways(
    {"optimizer": "adamw_8bit"},
    {"optimizer": "adamw_8bit", "dtype": BF16, "adapter_dtype": BF16, "clip": 1.0},
    {"optimizer": "lion_8bit", "quantisation": "nf4", "dtype": BF16},
    adapter="r=64",
)
CASES = [*FAMILIES, *METHODS, *WAYS, *AUTOCAST]
