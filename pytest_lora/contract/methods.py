"""What there is to hold against the contract in the installed PEFT: read from its own registry.

A method is listed nowhere here.  Every registered method that wraps layers is found, and every
variant of LoRA that its configuration class declares: each ``use_*`` switch, each way to initialise
and each sub-configuration.  What *is* listed is how to fill in settings that have no default that
suits a tiny layer, by the name of the setting, and the calls two-step initialisations need.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["Method", "discover"]


@dataclasses.dataclass(frozen=True)
class Method:
    """One column of the contract's table.

    Attributes:
        name: ``LORA``, ``LORA+rslora``, ``IA3``, ...
        config: the name of its configuration class in ``peft``.
        options: settings as source code; ``{r}`` and ``{alpha}`` stand for what is drawn,
            ``{last}`` for the last of the modules that are adapted.
        network: the network it is tried on unless a law says otherwise.
        before, after: lines to run before and after the adapter is attached.
        plain: whether its layers compute ``W x + s B A x``.
        rewrites: whether it moves part of the base weight into the adapter, by design.
    """

    name: str
    config: str
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    network: str = "linear"
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    plain: bool = False
    rewrites: bool = False

    @property
    def is_lora(self) -> bool:
        """LoRA itself or one of its variants."""
        return self.config == "LoraConfig"

    def accepts(self, field: str) -> bool:
        """Whether its configuration has the setting."""
        import peft

        cls = getattr(peft, self.config)
        return any(item.name == field for item in dataclasses.fields(cls))

    def switches(self) -> list[tuple[str, str]]:
        """Settings that are on or off, or one of a few words, each with another value than usual.

        As source code.  How an adapter starts is left out: what counts here is what it computes.
        """
        import peft

        cls = getattr(peft, self.config)
        hints = typing.get_type_hints(cls)
        found = []
        for item in dataclasses.fields(cls):
            if item.name in self.options or _SKIPPED.search(item.name):
                continue
            if isinstance(item.default, bool):
                found.append((item.name, repr(not item.default)))
                continue
            for word in _words(hints[item.name]):
                if word != item.default:
                    found.append((item.name, repr(word)))
        return found

    def biases(self) -> list[str]:
        """What ``bias`` may be, but none: which biases of the base train along."""
        import peft

        if not self.accepts("bias"):
            return []
        declared = _words(typing.get_type_hints(getattr(peft, self.config))["bias"])
        only = f"{self.config.removesuffix('Config').lower()}_only"
        return [word for word in declared or ("all", only) if word != "none"]


# Settings whose defaults are made for large layers, for layers of 16 inputs and 24 or 32 outputs.
_SMALL: Mapping[str, str] = {
    "total_step": "10",
    "n_frequency": "12",
    "block_size": "8",
    "group_size": "8",
    "vector_length": "8",
    "num_vectors": "8",
    "feedforward_modules": "{last}",  # one of the two kinds of layers in each network
    "token_indices": "[1, 3]",
    "qalora_group_size": "8",
}
_SKIPPED = re.compile(r"^init_|^inference_mode$|^low_cpu|^bias$|^revision$|^task_type$")
"""How it starts, how it is loaded, and the base's biases, which one adapter only may train."""
_LEFT_OUT = {"boft_block_num", "r_pattern"}
# Initialisations in several steps, as PEFT's documentation has them.
_STEPS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "eva": ((), ("rows = x if x.dtype == torch.long else "
                 "torch.randn(64, x.shape[-1], dtype=x.dtype).to(x)",
                 "peft.initialize_lora_eva_weights(model, [rows], forward_fn=lambda m, x: m(x), "
                 "prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, "
                 "adapter_name='one', show_progress_bar=False)",
                 "model.eval()  # layers of another rank have been made anew")),
    "corda": (("from peft.tuners.lora.corda import preprocess_corda",
               "rows = x.split(1) if x.dtype == torch.long else [x]  # one sequence at a time",
               "preprocess_corda(net, config, run_model=lambda: [net(row) for row in rows])"), ()),
    "lora_ga": (("from peft import preprocess_loraga",
                 "def backward():\n    y = net(x)\n"
                 "    getattr(y, 'logits', y).square().sum().backward()",
                 "preprocess_loraga(net, config, backward)",
                 "net.zero_grad()"), ()),
}  # fmt: skip
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa")
_ARGUMENTS: Mapping[str, str] = {
    "use_bdlora": "target_modules_bd_a=['up'], target_modules_bd_b=['down'], nblocks=2, "
    "match_strict=False",
}
_SUBCONFIG_OPTIONS: Mapping[str, str] = {"loftq_config": "{'loftq_bits': 4, 'loftq_iter': 1}"}


def discover() -> list[Method]:
    """Every method and variant of LoRA the installed PEFT has, LoRA first, the rest by name."""
    found = {method.name: method for method in (*_variants(), *_registered())}
    lora = [method for method in found.values() if method.is_lora]
    others = sorted(found.values(), key=lambda method: method.name)
    return [*lora, *(method for method in others if not method.is_lora)]


def _registered() -> Iterator[Method]:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        if config.__name__ == "LoraConfig" or not inspect.isclass(tuner):
            continue
        if issubclass(tuner, BaseTuner):
            yield _method(str(getattr(kind, "value", kind)), config)


def _method(name: str, config: Any) -> Method:
    fields = {item.name for item in dataclasses.fields(config)}
    options = {key: code for key, code in _SMALL.items() if key in fields}
    if "r" in fields and "oft_block_size" not in fields:
        options["r"] = "{r}"
    for key in ("lora_alpha", "alpha"):
        if key in fields:
            options[key] = "{alpha}"
    tokens = "token_indices" in fields
    return Method(name, config.__name__, options, network="embedding" if tokens else "linear")


# ------------------------------------------------------------------------------ variants of LoRA


def _variants() -> Iterator[Method]:
    import peft

    config = peft.LoraConfig
    plain = {"r": "{r}", "lora_alpha": "{alpha}"}
    yield Method("LORA", config.__name__, plain, plain=True)
    for item in dataclasses.fields(config):
        if item.name.startswith("use_") and item.default is False:
            label = item.name.removeprefix("use_")
            small = {"qalora_group_size": "8"} if label == "qalora" else {}
            options = {**plain, **small, item.name: "True"}
            yield Method(f"LORA+{label}", config.__name__, options, plain=label == "rslora")
    if any(item.name == "lora_bias" for item in dataclasses.fields(config)):
        yield Method("LORA+lora_bias", config.__name__, {**plain, "lora_bias": "True"})
    yield from _initialised(config, plain)
    yield from _configured(config, plain)


def _initialised(config: Any, plain: Mapping[str, str]) -> Iterator[Method]:
    """One variant for each way to initialise that the class declares, and those with steps."""
    declared = [name for name in _literals(config) if "[" not in name]
    fields = {item.name for item in dataclasses.fields(config)}
    if "lora_ga_config" in fields and "lora_ga" not in declared:
        declared.append("lora_ga")
    for name in declared:
        before, after = _STEPS.get(name, ((), ()))
        options = {**plain, "init_lora_weights": repr(name)}
        part = f"{name}_config"
        if part in _SUBCONFIG_OPTIONS:
            options[part] = _SUBCONFIG_OPTIONS[part]
        elif part in fields:
            options[part] = f"{_class_of(config, part)}()"
        yield Method(
            f"LORA+{name}",
            config.__name__,
            options,
            before=before,
            after=after,
            plain=True,
            rewrites=name in _REWRITING,
        )


def _configured(config: Any, plain: Mapping[str, str]) -> Iterator[Method]:
    """One variant for each sub-configuration that is not one of an initialisation's."""
    taken = {f"{name}_config" for name in (*_literals(config), "lora_ga")}
    for item in dataclasses.fields(config):
        cls = _class_of(config, item.name)
        if not cls or item.name in taken or item.name == "runtime_config":
            continue
        label = item.name.removesuffix("_config").removeprefix("use_")
        options = {**plain, item.name: f"{cls}({_ARGUMENTS.get(item.name, '')})"}
        rewrites = label in _REWRITING
        yield Method(f"LORA+{label}", config.__name__, options, rewrites=rewrites)
    if any(item.name == "alora_invocation_tokens" for item in dataclasses.fields(config)):
        options = {**plain, "alora_invocation_tokens": "[5]", "task_type": "'CAUSAL_LM'"}
        yield Method("LORA+alora", config.__name__, options, network="llama")


def _literals(config: Any) -> list[str]:
    """The words ``init_lora_weights`` may be, from its annotation."""
    return _words(typing.get_type_hints(config)["init_lora_weights"])


def _words(annotation: Any) -> list[str]:
    """The words that are allowed by an annotation."""
    parts = [annotation, *typing.get_args(annotation)]
    words = [word for part in parts for word in typing.get_args(part)]
    return [word for word in words if isinstance(word, str)]


def _class_of(config: Any, field: str) -> str:
    """Where the configuration class is that a setting takes, if it takes one."""
    annotation = typing.get_type_hints(config).get(field)
    for part in (annotation, *typing.get_args(annotation)):
        if dataclasses.is_dataclass(part) and isinstance(part, type):
            return f"{part.__module__}.{part.__name__}"
    return ""
