"""The tiny networks the laws are tried on, as source code, so that a script can contain them.

Adapted layers stand side by side rather than in a row: an error in one cannot be hidden, enlarged
or rounded away by the next, and each output has a rounding bound of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["NETWORKS", "ONLY_LORA", "Network"]

_LINEAR = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear({k}, {d})
        self.down = torch.nn.Linear({k}, {e}, bias={bias})
        self.norm = torch.nn.BatchNorm1d({d} + {e})

    def forward(self, x):
        return torch.cat([self.up(x), self.down(x)], -1)
"""
_MANY = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.query = torch.nn.Linear({k}, {d})
        self.key = torch.nn.Linear({k}, {e})
        self.value = torch.nn.Linear({k}, {d})
        self.output = torch.nn.Linear({k}, {e})
        self.up = torch.nn.Linear({k}, {d})
        self.down = torch.nn.Linear({k}, {e}, bias={bias})

    def forward(self, x):
        layers = self.query, self.key, self.value, self.output, self.up, self.down
        return torch.cat([layer(x) for layer in layers], -1)
"""
_CONV1D = """
from transformers.pytorch_utils import Conv1D

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = Conv1D({d}, {k})
        self.down = torch.nn.Linear({k}, {e})

    def forward(self, x):
        return torch.cat([self.up(x), self.down(x)], -1)
"""
_EMBEDDING = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding({k}, {d})
        self.head = torch.nn.Linear({d}, {e})

    def forward(self, x):
        return self.head(self.table(x))
"""
_SCALED = """
class Scaled(torch.nn.Embedding):  # as in Gemma 3
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("embed_scale", torch.tensor(sizes[1] ** 0.5), persistent=False)

    def forward(self, x):
        return super().forward(x) * self.embed_scale.to(self.weight.dtype)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = Scaled({k}, {d})
        self.head = torch.nn.Linear({d}, {e})

    def forward(self, x):
        return self.head(self.table(x))
"""
_ODD_NAMES = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear({k}, {d})
        self.parts = torch.nn.ModuleDict(
            {{"weight": torch.nn.Linear({k}, {e}), "default": torch.nn.Linear({k}, {d})}})

    def forward(self, x):
        return torch.cat([part(x) for part in (self.one, *self.parts.values())], -1)
"""
_CONVOLUTION = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Conv2d(4, {d}, 3)
        self.down = torch.nn.Conv2d(4, {e}, (1, 2), bias=False)

    def forward(self, x):
        return torch.cat([self.up(x).flatten(1), self.down(x).flatten(1)], -1)
"""
_GROUPED = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Conv2d(4, {d}, 3, groups=2)
        self.down = torch.nn.Conv2d(4, {e}, (1, 2))

    def forward(self, x):
        return torch.cat([self.up(x).flatten(1), self.down(x).flatten(1)], -1)
"""


def _experts(sizes: str, weight: str, declared: str = "") -> str:
    """Three experts in one parameter, of these sizes each, and what an input is multiplied with."""
    return f"""
class Experts(torch.nn.Module):{declared}
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, {sizes}) / 4)

    def forward(self, x):
        return torch.bmm(x.expand(3, -1, -1), {weight})
"""


_EXPERTS = _experts("{k}, {d}", "self.weight")
# transformers' models of experts say by ``is_transposed`` whether the inputs come first.
_INPUTS_FIRST = _experts("{k}, {d}", "self.weight", "\n    is_transposed = True\n")
_OUTPUTS_FIRST = _experts("{d}, {k}", "self.weight.mT", "\n    is_transposed = False\n")
_FUSED = """
class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(3, {k}, {d}) / 4)
        self.down = torch.nn.Parameter(torch.randn(3, {k}, {e}) / 4)

    def forward(self, x):
        x = x.expand(3, -1, -1)
        return torch.cat([torch.bmm(x, self.up), torch.bmm(x, self.down)], -1)
"""
_ON_EXPERTS = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x).transpose(0, 1).flatten(1)
"""
_ATTENTION = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention({k}, 2, batch_first=True)

    def forward(self, x):
        return self.attention(query=x, key=x, value=x, need_weights=False)[0]
"""
_TIED = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding({k}, {d})
        self.middle = torch.nn.Linear({d}, {d})
        self.head = torch.nn.Linear({d}, {k}, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.middle(self.table(x)))
"""
_SAVED = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear({k}, {d})
        self.down = torch.nn.Linear({k}, {e})
        self.head = torch.nn.Linear({d} + {e}, {k})

    def forward(self, x):
        return self.head({keyword}torch.cat([self.up(x), self.down(x)], -1).tanh())
"""
_TWO_HEADS = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear({k}, {d})
        self.down = torch.nn.Linear({k}, {e})
        self.head = torch.nn.Linear({d} + {e}, {k})
        self.tail = torch.nn.Linear({d} + {e}, {d})

    def forward(self, x):
        x = torch.cat([self.up(x), self.down(x)], -1).tanh()
        return torch.cat([self.head(x), self.tail(x)], -1)
"""
_KINDS = """
from transformers import PretrainedConfig, PreTrainedModel

class Net(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self):
        super().__init__(PretrainedConfig())
        self.sound = torch.nn.ModuleDict({{"up": torch.nn.Conv2d(1, 1, 3, padding=1)}})
        self.text = torch.nn.ModuleDict(
            {{"up": torch.nn.Linear({k}, {d}), "down": torch.nn.Linear({k}, {e})}}
        )

    def forward(self, x):
        x = self.sound["up"](x[:, None, :, None])[:, 0, :, 0]
        return torch.cat([self.text["up"](x), self.text["down"](x)], -1)
"""
_LAYERS = """
class Part(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear({k}, {d})
        self.down = torch.nn.Linear({k}, {e})

    def forward(self, x):
        return torch.cat([self.up(x), self.down(x)], -1)

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList([Part() for _ in range(3)])

class Body(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer() for _ in range(3)])

    def forward(self, x):
        return sum(part(x) for layer in self.layers for part in layer.experts)
"""
_LOOK_ALIKES = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = torch.nn.ModuleList([Part() for _ in range(10)])
        self.other_block = torch.nn.ModuleList([Part() for _ in range(10)])

    def forward(self, x):
        return sum(part(x) for part in (*self.block, *self.other_block))
"""
_INNER = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Body()

    def forward(self, x):
        return self.inner(x)
"""
_LLAMA = """
from transformers import LlamaConfig, LlamaForCausalLM

class Net(LlamaForCausalLM):
    def __init__(self):
        super().__init__(LlamaConfig(
            vocab_size=40, hidden_size={k}, intermediate_size={d}, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
            tie_word_embeddings={tied},
        ))
"""
_MOE = """
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

class Net(Qwen2MoeForCausalLM):
    def __init__(self):
        super().__init__(Qwen2MoeConfig(
            vocab_size=40, hidden_size={k}, intermediate_size={d}, num_hidden_layers=1,
            moe_intermediate_size={d}, shared_expert_intermediate_size={e}, num_experts=2,
            num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            initializer_range=0.2, tie_word_embeddings=False,
        ))
"""


_ON_TOKENS = "model(input_ids=x).logits"


@dataclass(frozen=True, slots=True)
class Network:
    """A network in source code.

    Attributes:
        source: defines the class ``Net``; ``{k}``, ``{d}`` and ``{e}`` are sizes,
            ``{bias}`` says whether its second layer has one.
        inputs: the expression for its inputs.
        call: how it is run on them.
        targets: modules to adapt.
        parameters: parameters to adapt, where layers of several experts share one.
        linear: modules whose outputs are side by side in the network's, in this order, each
            computing ``x W^T + b``.
        saved: modules that are trained whole and saved with the adapter.
        all_linear: whether its targets are all of its linear layers.
    """

    source: str
    inputs: str
    call: str = "model(x)"
    targets: tuple[str, ...] = ("up", "down")
    parameters: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    all_linear: bool = False

    @property
    def reads_tokens(self) -> bool:
        """Whether it is a causal language model of transformers."""
        return self.call == _ON_TOKENS


_SIX = ("query", "key", "value", "output", "up", "down")
"""So many that the order of a set of them is another one in almost every process."""
_TOKENS = "torch.randint(3, 40, (2, 9))"

NETWORKS: Mapping[str, Network] = {
    "linear": Network(_LINEAR, "torch.randn(3, {k}, dtype={dtype})", linear=("up", "down")),
    "many": Network(_MANY, "torch.randn(3, {k}, dtype={dtype})", targets=_SIX, linear=_SIX),
    "conv1d": Network(_CONV1D, "torch.randn(3, {k}, dtype={dtype})", linear=("up", "down")),
    "embedding": Network(_EMBEDDING, "torch.randint({k}, (3, 4))", targets=("table",)),
    "scaled embedding": Network(_SCALED, "torch.randint({k}, (3, 4))", targets=("table",)),
    "odd names": Network(
        _ODD_NAMES, "torch.randn(3, {k}, dtype={dtype})", targets=("one", "weight", "default")
    ),
    "convolution": Network(_CONVOLUTION, "torch.randn(2, 4, 5, 6, dtype={dtype})"),
    "grouped": Network(_GROUPED, "torch.randn(2, 4, 5, 6, dtype={dtype})"),
    "experts": Network(
        _EXPERTS + _ON_EXPERTS,
        "torch.randn(4, {k}, dtype={dtype})",
        targets=(),
        parameters=("experts.weight",),
    ),
    "experts, inputs first": Network(
        _INPUTS_FIRST + _ON_EXPERTS,
        "torch.randn(4, {k}, dtype={dtype})",
        targets=(),
        parameters=("experts.weight",),
    ),
    "experts, outputs first": Network(
        _OUTPUTS_FIRST + _ON_EXPERTS,
        "torch.randn(4, {k}, dtype={dtype})",
        targets=(),
        parameters=("experts.weight",),
    ),
    "fused experts": Network(
        _FUSED + _ON_EXPERTS,
        "torch.randn(4, {k}, dtype={dtype})",
        targets=(),
        parameters=("experts.up", "experts.down"),
    ),
    "attention": Network(
        _ATTENTION, "torch.randn(2, 5, {k}, dtype={dtype})", targets=("attention",)
    ),
    "tied": Network(_TIED, "torch.randint({k}, (3, 4))", targets=("middle",)),
    "tied head": Network(_TIED, "torch.randint({k}, (3, 4))", targets=("head",)),
    "saved": Network(
        _SAVED.replace("{keyword}", ""), "torch.randn(3, {k}, dtype={dtype})", saved=("head",)
    ),
    "saved, by keyword": Network(
        _SAVED.replace("{keyword}", "input="), "torch.randn(3, {k}, dtype={dtype})", saved=("head",)
    ),
    "two heads": Network(_TWO_HEADS, "torch.randn(3, {k}, dtype={dtype})", saved=("head",)),
    "kinds": Network(
        _KINDS, "torch.randn(3, {k}, dtype={dtype})", targets=("text.up", "text.down"),
        all_linear=True,
    ),
    "layers": Network(_LAYERS + _INNER, "torch.randn(3, {k}, dtype={dtype})"),
    "bare layers": Network(_LAYERS + "\nNet = Body\n", "torch.randn(3, {k}, dtype={dtype})"),
    "look-alikes": Network(_LAYERS + _LOOK_ALIKES, "torch.randn(3, {k}, dtype={dtype})"),
    "llama": Network(
        _LLAMA.replace("{tied}", "False"), _TOKENS, call=_ON_TOKENS, targets=("q_proj", "up_proj")
    ),
    "untied llama": Network(
        _LLAMA.replace("{tied}", "False"), _TOKENS, call=_ON_TOKENS, targets=("embed_tokens",)
    ),
    "tied llama": Network(
        _LLAMA.replace("{tied}", "True"), _TOKENS, call=_ON_TOKENS, targets=("q_proj", "up_proj"),
        saved=("lm_head", "embed_tokens"),
    ),
    "experts llama": Network(
        _MOE, _TOKENS, call=_ON_TOKENS, targets=("q_proj", "v_proj"),
        saved=("shared_expert", "shared_expert_gate"),  # one name begins with the other
    ),
}  # fmt: skip
"""The networks by name."""

ONLY_LORA = (
    "grouped", "experts", "experts, inputs first", "experts, outputs first", "fused experts",
    "attention", "saved", "saved, by keyword", "two heads", "look-alikes", "untied llama",
    "tied llama", "experts llama",
)  # fmt: skip
"""Networks that only LoRA itself is tried on: what they ask for is the same code for all methods,
or needs a setting that only LoRA has.
"""
