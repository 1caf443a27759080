"""Laws about handling adapters: each finds a PEFT that is put back to a fault of its kind."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("hypothesis")

import torch
from stack import since

from pytest_lora.contract.dialects import Case, Peft
from pytest_lora.contract.experiment import Experiment
from pytest_lora.contract.laws import LAWS
from pytest_lora.contract.methods import Method, discover
from pytest_lora.contract.trial import ContractBroken
from pytest_lora.errors import NotApplicable
from pytest_lora.loading import quiet

LORA = Peft(Method("LORA", "LoraConfig", {"r": "{r}", "lora_alpha": "{alpha}"}, plain=True))
OPTIONS = {"lora_dropout": "0.0"}
pytestmark = since("has faults that these laws find", peft=(0, 21))


def hold(law: str, dialect: Peft = LORA, **case: Any) -> None:
    """The law, tried once."""
    drawn = Case(**{"options": OPTIONS if dialect is LORA else {}, **case})
    with quiet():
        LAWS[law].hold(Experiment(law, dialect, drawn))


def method(name: str) -> Peft:
    """One of the installed PEFT's."""
    return Peft(next(item for item in discover() if item.name == name))


def sound_then_broken(
    law: str,
    spoil: Callable[[], None],
    says: str,
    dialect: Peft = LORA,
    *,
    stops: bool = True,
    **case: Any,
) -> None:
    """It holds before ``spoil``, and after it does not, with a script that stops or shows why."""
    hold(law, dialect, **case)
    spoil()
    with pytest.raises(ContractBroken, match=says) as caught:
        hold(law, dialect, **case)
    names: dict[str, Any] = {"__name__": "shown"}
    with quiet(), pytest.raises(Exception) if stops else contextlib.nullcontext():
        exec(compile(caught.value.script, law, "exec"), names)
    folders = names.get("folders", [])
    for folder in folders.values() if isinstance(folders, dict) else folders:
        folder.cleanup()


# ------------------------------------------------------------------------------ hot swaps


@pytest.mark.parametrize("network", ["linear", "conv1d", "convolution", "grouped"])
def test_a_swap_that_keeps_the_scaling_is_caught(
    network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.utils import hotswap

    sound_then_broken(
        "hot_swap",
        lambda: monkeypatch.setattr(hotswap, "_update_scaling", lambda *given, **named: None),
        "the second adapter swapped in",
        network=network,
    )


def test_a_rank_that_is_filled_up_in_the_wrong_place_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.utils import hotswap

    def at_the_end(destination: Any, source: Any, groups: int) -> None:
        destination[: source.shape[0]].copy_(source)

    sound_then_broken(
        "hot_swap",
        lambda: monkeypatch.setattr(hotswap, "_copy_grouped_conv2d_lora_a_weights", at_the_end),
        "prepared to swap|swapped in",
        network="grouped",
    )


# ------------------------------------------------------------------------------ side by side


def test_state_that_all_adapters_share_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.pvera import layer

    original = layer.PveraLayer.update_layer

    def first_ones(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        original(self, adapter_name, *args, **kwargs)
        kept = next(iter(self.sample_at_inference.values()))
        self.sample_at_inference[adapter_name] = kept

    pvera = method("PVERA")
    setting = ("sample_at_inference", "True")
    monkeypatch.setattr(Method, "switches", lambda self: [setting])
    seed = next(s for s in range(40) if _draws_the_setting(s))
    sound_then_broken(
        "own_settings",
        lambda: monkeypatch.setattr(layer.PveraLayer, "update_layer", first_ones),
        "beside an adapter without sample_at_inference=True",
        pvera,
        seed=seed,
    )


def _draws_the_setting(seed: int) -> bool:
    """Whether the second adapter has the same modules and another setting under this seed."""
    import random

    draw = random.Random(seed)
    return draw.choice([0, 1, 2]) == 0 and bool(draw.randrange(4))


def test_settings_are_read_from_the_configuration_class() -> None:
    found = dict(method("ROAD").method.switches())
    assert found["variant"] in ("'road_2'", "'road_4'")
    assert ("use_rslora", "True") in LORA.method.switches()
    assert not [key for key, _ in LORA.method.switches() if key.startswith("init_")]


def test_an_encoder_seen_where_there_is_none_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import model

    sound_then_broken(
        "mixed_generation",
        lambda: monkeypatch.setattr(model, "_get_encoder", lambda net: net),
        "Length of `adapter_names`",
        network="llama",
        options={"task_type": "'CAUSAL_LM'"},
    )


def test_rows_given_another_adapter_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import layer

    original = layer.Linear._mixed_batch_forward

    def other_way_round(self: Any, x: Any, *args: Any, adapter_names: list[str], **kw: Any) -> Any:
        return original(self, x, *args, adapter_names=adapter_names[::-1], **kw)

    sound_then_broken(
        "mixed_generation",
        lambda: monkeypatch.setattr(layer.Linear, "_mixed_batch_forward", other_way_round),
        "row 0 with one, 2 beam.s.: other tokens than it generates alone",
        network="llama",
        options={"task_type": "'CAUSAL_LM'"},
    )


# ------------------------------------------------------------------------------ combined


def test_pruning_that_does_not_make_up_for_what_it_drops_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.utils import merge_utils

    original = merge_utils.random_pruning
    sound_then_broken(
        "random_combinations",
        lambda: monkeypatch.setattr(
            merge_utils, "random_pruning", lambda tensor, density, rescale: original(
                tensor, density, False)
        ),
        r"the sum of A is always below that of the plain one, 0\.[45]\d* times it",
    )  # fmt: skip


# ------------------------------------------------------------------------------ what is kept


def test_a_merge_that_makes_parameters_anew_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import layer

    original = layer.Embedding.get_delta_weight

    def anew(self: Any, adapter: str) -> Any:
        self.lora_embedding_A[adapter] = self.lora_embedding_A[adapter].detach().clone()
        return original(self, adapter)

    sound_then_broken(
        "parameters_kept",
        lambda: monkeypatch.setattr(layer.Embedding, "get_delta_weight", anew),
        "after merge: .*lora_embedding_A.one is another object",
        network="embedding",
    )


@pytest.mark.parametrize(
    ("operation", "says"), [("merge", "of the adapter"), ("enable_adapters", "is frozen")]
)
def test_an_operation_that_touches_the_factors_or_their_flags_is_caught(
    operation: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import layer

    original = getattr(layer.Linear, operation)

    def touching(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if operation == "merge":
            self.lora_B["one"].weight.data.mul_(2)
        else:
            self.lora_B.requires_grad_(False)

    sound_then_broken(
        "parameters_kept",
        lambda: monkeypatch.setattr(layer.Linear, operation, touching),
        says,
    )


def test_an_embedding_trained_at_the_usual_rate_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.optimizers import loraplus

    class Nothing:
        """What no module is."""

    sound_then_broken(
        "learning_rates",
        lambda: monkeypatch.setattr(loraplus, "Embedding", Nothing),
        "lora_embedding_A.one is in the optimizer with the rates .*; declared is 0.5",
        network="embedding",
    )
    hold("learning_rates")


def test_what_is_kept_of_a_deleted_adapter_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import layer

    some = tuple(name for name in layer.LoraLayer.other_param_names if name != "use_rslora")
    sound_then_broken(
        "name_forgotten",
        lambda: monkeypatch.setattr(layer.LoraLayer, "other_param_names", some),
        "deleted, and still a key of base_model.model.down.use_rslora and 1 more",
    )


def test_what_is_left_behind_by_unload_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import LoraModel

    original = LoraModel.unload

    def leaving(self: Any) -> Any:
        net = original(self)
        net.peft_config = {}
        return net

    sound_then_broken(
        "unloaded",
        lambda: monkeypatch.setattr(LoraModel, "unload", leaving),
        "'peft_config' is left in the model after unload",
    )


def test_an_unload_that_gives_another_model_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import LoraModel

    sound_then_broken(
        "unloaded",
        lambda: monkeypatch.setattr(LoraModel, "unload", LoraModel.merge_and_unload),
        "what was unloaded is not the base",
        network="saved",
    )


# ------------------------------------------------------------------------------ what is refused


def test_an_adapter_put_in_the_place_of_its_namesake_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft import PeftModel

    original = PeftModel.add_adapter

    def whatever_the_name(self: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
        self.base_model.peft_config.pop(adapter_name, None)
        original(self, adapter_name, config, **kwargs)

    sound_then_broken(
        "taken_names",
        lambda: monkeypatch.setattr(PeftModel, "add_adapter", whatever_the_name),
        "an adapter of the same name was added",
    )


def test_an_adapter_of_no_module_that_nobody_is_told_of_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft import PeftModel

    original = PeftModel.add_adapter

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, *args, **kwargs)
        except ValueError:
            return

    sound_then_broken(
        "targets_that_match_nothing",
        lambda: monkeypatch.setattr(PeftModel, "add_adapter", silent),
        "a second adapter: no module is called 'no_such_module', and nobody is told",
    )


def test_what_is_refused_at_once_and_mixed_in_turn_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer as Layer

    original = Layer._check_overlapping_tokens

    def only_these(self: Any, adapter_names: list[str]) -> None:
        merged, self.merged_adapters = self.merged_adapters, []
        try:
            original(self, adapter_names)
        finally:
            self.merged_adapters = merged

    tokens = method("TRAINABLE_TOKENS")
    with pytest.raises(NotApplicable, match="undefined merging"):
        hold("order_of_merges", tokens, network="embedding", seed=1)
    monkeypatch.setattr(Layer, "_check_overlapping_tokens", only_these)
    with pytest.raises(ContractBroken, match="mixed without a word"):
        hold("order_of_merges", tokens, network="embedding", seed=1)


def test_a_second_merge_that_takes_the_place_of_the_first_is_none_of_these() -> None:
    with pytest.raises(NotApplicable, match="does not allow inference with more than one"):
        hold("order_of_merges", method("LN_TUNING"))


# ------------------------------------------------------------------------------ names, ties, layers


def test_names_replaced_anywhere_in_a_key_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    original = peft.get_peft_model_state_dict

    def anywhere(model: Any, adapter_name: str = "default", **kwargs: Any) -> Any:
        state = original(model, adapter_name=adapter_name, **kwargs)
        return {key.replace(f".{adapter_name}", ""): value for key, value in state.items()}

    sound_then_broken(
        "state_round_trip",
        lambda: monkeypatch.setattr(peft, "get_peft_model_state_dict", anywhere),
        "belong nowhere|read into another model",
        network="odd names",
    )
    hold("state_round_trip")  # nothing there is called like an adapter


@pytest.mark.parametrize("seed", [0, 1])
def test_ties_made_where_there_are_none_are_caught(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners import tuners_utils
    from peft.utils import other

    def anyway(model: Any) -> list[str]:
        return ["lm_head"]

    def spoil() -> None:
        for module in (other, tuners_utils):
            monkeypatch.setattr(module, "_get_module_names_tied_with_embedding", anyway)

    sound_then_broken(
        "tied_weights", spoil, "not tied", network="untied llama", seed=seed,
        options={"task_type": "'CAUSAL_LM'"},
    )  # fmt: skip


def test_the_first_layer_given_as_a_number_is_caught_if_it_counts_as_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import peft

    def spoil() -> None:
        original = peft.LoraConfig.__post_init__

        def falsy(self: Any) -> None:
            if self.layers_pattern and not self.layers_to_transform:
                raise ValueError("`layers_to_transform` must also be specified.")
            original(self)

        monkeypatch.setattr(peft.LoraConfig, "__post_init__", falsy)

    sound_then_broken("chosen_layers", spoil, "must also be specified", network="layers", seed=1)


@pytest.mark.parametrize("name", ["LORA", "LORA+dora", "TRAINABLE_TOKENS"])
def test_an_embeddings_own_factor_left_out_is_caught(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    sound_then_broken(
        "merge_equivalence",
        lambda: monkeypatch.setattr(BaseTunerLayer, "_get_embed_scale", lambda self: None),
        "table",
        method(name),
        stops=False,  # it prints how far off the output is
        network="scaled embedding",
    )


def test_a_scaling_that_comes_back_as_another_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import layer

    def plain(self: Any, scale: float | None = None) -> None:
        for name in self.active_adapters:
            first = self.lora_alpha[name] / self.r[name]
            self.scaling[name] = first if scale is None else self.scaling[name] / scale

    sound_then_broken(
        "linear_in_scaling",
        lambda: monkeypatch.setattr(layer.LoraLayer, "unscale_layer", plain),
        r"after unscale_layer\(\)",
        method("LORA+rslora"),
    )


def test_a_saved_module_that_is_called_by_keyword_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.utils.other import AuxiliaryTrainingWrapper

    original = AuxiliaryTrainingWrapper.forward
    sound_then_broken(
        "base_output_when_disabled",
        lambda: monkeypatch.setattr(
            AuxiliaryTrainingWrapper, "forward",
            lambda self, x, *args, **kwargs: original(self, x, *args, **kwargs),
        ),
        "missing 1 required positional argument",
        network="saved, by keyword",
    )  # fmt: skip


def test_numbers_of_a_hot_swap_are_exact() -> None:
    """In any order of the terms a sum of them has the same bits."""
    x = (16 * torch.randn(400, dtype=torch.float64)).round().clamp(-64, 64) / 16
    y = (16 * torch.randn(400, dtype=torch.float64)).round().clamp(-64, 64) / 16
    product = (x * y * 3 / 4) * x
    assert float(product.sum()) == float(product.flip(0).sum()) == float(product.sort()[0].sum())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_parameters_of_one_module_are_judged_in_the_format_they_are_merged_in(
    dtype: str,
) -> None:
    """In float64 nothing has to be widened: what is written into while judging is still a copy."""
    law = LAWS["merge_equivalence"]
    it = Experiment(law.id, LORA, Case(network="fused experts", dtype=dtype, sizes=(5, 4, 6)))
    law.hold(it)


# ------------------------------------------------------------------------------ loaded


@pytest.mark.parametrize(("name", "says"), [("LORA", "lora_only"), ("BOFT", "boft_only")])
def test_a_bias_that_is_not_saved_is_caught(
    name: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.utils import save_and_load

    original = save_and_load.get_peft_model_state_dict

    def without_biases(model: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(model, *args, **kwargs)
        config = model.peft_config[kwargs.get("adapter_name", "one")]
        only = config.bias.endswith("_only")
        return {key: tensor for key, tensor in found.items() if not (only and "bias" in key)}

    sound_then_broken(
        "trained_biases",
        lambda: monkeypatch.setattr("peft.get_peft_model_state_dict", without_biases),
        f"bias='{says}', read into another model",
        LORA if name == "LORA" else method(name),
        seed=3,
    )


def test_all_words_that_a_bias_may_be_are_tried() -> None:
    assert method("LORA").method.biases() == ["all", "lora_only"]
    assert method("BOFT").method.biases() == ["all", "boft_only"]
    assert not method("LOHA").method.biases()


@pytest.mark.parametrize("name", ["LORA", "IA3", "LOHA", "LORA+rslora"])
def test_transformers_that_leaves_a_factor_out_is_caught(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    original = PreTrainedModel.load_adapter

    def but_one(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        last = [p for n, p in self.named_parameters() if "one" in n.split(".")][-1]
        last.data = last.data + 1

    sound_then_broken(
        "loaded_by_transformers",
        lambda: monkeypatch.setattr(PreTrainedModel, "load_adapter", but_one),
        "loaded by transformers: ",
        LORA if name == "LORA" else method(name),
        network="llama",
    )


def test_transformers_that_leaves_the_adapter_in_training_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import PreTrainedModel

    original = PreTrainedModel.load_adapter

    def trains(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.train()

    sound_then_broken(
        "loaded_by_transformers",
        lambda: monkeypatch.setattr(PreTrainedModel, "load_adapter", trains),
        "in training mode",
        network="llama",
    )


# ------------------------------------------------------------------------------ converted


def drawing(what: int) -> int:
    """A seed for which the law about converted adapters draws that."""
    return next(seed for seed in range(99) if random.Random(seed).randrange(4) == what)


PLAIN, PATTERNS, SAVED, NAMESAKE = range(4)


@pytest.mark.parametrize("drawn", [PLAIN, PATTERNS])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_is_not_taken_off_is_caught(
    start: str, drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora.model import LoraModel

    original = LoraModel.subtract_mutated_init

    def added(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        for key, value in found.items():
            if "lora_B" in key:
                value[:, value.shape[1] // 2 :] *= -1
        return found

    sound_then_broken(
        "converted",
        lambda: monkeypatch.setattr(LoraModel, "subtract_mutated_init", added),
        "loaded on the untouched base",
        method(f"LORA+{start}"),
        seed=drawing(drawn),
    )


def test_a_conversion_that_changes_the_adapter_in_training_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners.lora.model import LoraModel

    original = LoraModel.subtract_mutated_init

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.peft_config["one"].r *= 2
        return original(self, *args, **kwargs)

    sound_then_broken(
        "converted",
        lambda: monkeypatch.setattr(LoraModel, "subtract_mutated_init", doubled),
        "changed the configuration of the adapter in training: r",
        method("LORA+pissa"),
        seed=drawing(PLAIN),
    )


@pytest.mark.parametrize(("drawn", "says"), [
    (SAVED, "which trained, is not in the file of the converted adapter"),
    (NAMESAKE, "saving it took the adapter away"),
])  # fmt: skip
def test_what_a_conversion_loses_is_told(drawn: int, says: str) -> None:
    """The installed PEFT does lose it: docs/upstream.md."""
    with pytest.raises(ContractBroken, match=says):
        hold("converted", method("LORA+pissa"), seed=drawing(drawn))


def test_only_what_starts_from_the_base_is_converted() -> None:
    excludes = LAWS["converted"].excludes
    assert excludes(LORA)
    assert excludes(method("LORA+loftq"))
    assert not excludes(method("LORA+pissa"))


# ------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("order", ["inputs first", "outputs first"])
def test_factors_that_read_outputs_are_caught(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed where they are made and where they are used, they give a sound product."""
    from peft.tuners.lora import layer

    original = layer.ParamWrapper.update_layer

    def turned(self: Any, *args: Any, **kwargs: Any) -> None:
        experts = self.get_base_layer()
        if "declared" not in vars(experts):
            experts.declared = getattr(experts, "is_transposed", False)
        experts.is_transposed = not experts.declared
        original(self, *args, **kwargs)

    network = f"experts, {order}"
    sound_then_broken(
        "reads_inputs",
        lambda: monkeypatch.setattr(layer.ParamWrapper, "update_layer", turned),
        "A of experts has 24 columns, the layer 16 inputs",
        network=network,
    )
    hold("merge_equivalence", network="experts")


def test_a_factor_that_reads_another_input_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import layer

    original = layer.Linear.forward
    sound_then_broken(
        "reads_inputs",
        lambda: monkeypatch.setattr(
            layer.Linear, "forward", lambda self, x, *rest: original(self, x.flip(-1), *rest)
        ),
        "no A reads input",
    )


def test_a_second_adapter_in_another_format_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    original = PeftModel.add_adapter
    sound_then_broken(
        "dtypes_kept",
        lambda: monkeypatch.setattr(
            PeftModel, "add_adapter",
            lambda self, name, config: original(self, name, config, autocast_adapter_dtype=False),
        ),
        r"added: .* of the first adapter is torch\.float32|added: .* is torch\.bfloat16",
        dtype="bfloat16",
    )  # fmt: skip


# ------------------------------------------------------------------------------ memory


def test_a_buffer_that_grows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it was there before anything was counted."""
    from peft.tuners.lora import layer

    original = layer.Linear.forward

    def logs(self: Any, x: Any, *rest: Any) -> Any:
        for buffer in self.base_layer.buffers():
            buffer.data = torch.cat([buffer.data, x.detach().sum()[None]])
        return original(self, x, *rest)

    initialise = layer.Linear.__init__

    def with_log(self: Any, base: Any, *args: Any, **kwargs: Any) -> None:
        base.register_buffer("log", torch.zeros(1))
        initialise(self, base, *args, **kwargs)

    def spoil() -> None:
        monkeypatch.setattr(layer.Linear, "__init__", with_log)
        monkeypatch.setattr(layer.Linear, "forward", logs)

    sound_then_broken("memory_given_back", spoil, "training, and again: .* bytes more are held")


def test_what_a_deleted_adapter_leaves_in_a_list_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    original = BaseTunerLayer.delete_adapter
    kept: list[Any] = []

    def hoards(self: Any, adapter_name: str) -> None:
        kept.append(self.lora_A[adapter_name])
        original(self, adapter_name)

    sound_then_broken(
        "memory_given_back",
        lambda: monkeypatch.setattr(BaseTunerLayer, "delete_adapter", hoards),
        "an adapter, and again: .* bytes more are held each time",
        network="saved",
    )


def test_what_an_unloaded_model_keeps_for_good_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraModel

    original = LoraModel.unload
    kept: list[Any] = []

    def hoards(self: Any) -> Any:
        kept.append([p for name, p in self.named_parameters() if "lora_" in name])
        return original(self)

    sound_then_broken(
        "memory_given_back",
        lambda: monkeypatch.setattr(LoraModel, "unload", hoards),
        "attaching, and again",
    )


@pytest.mark.parametrize("keeps", ["all", "the last"])
def test_a_merge_that_keeps_each_weight_is_caught(
    keeps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one that keeps the last one only."""
    from peft.tuners.lora import layer

    original = layer.Linear.merge
    kept: dict[Any, Any] = {}

    def keeping(self: Any, *args: Any, **kwargs: Any) -> None:
        key = len(kept) if keeps == "all" else id(self)
        kept[key] = self.get_base_layer().weight.detach().clone()
        original(self, *args, **kwargs)

    if keeps == "all":
        sound_then_broken(
            "memory_given_back",
            lambda: monkeypatch.setattr(layer.Linear, "merge", keeping),
            "merging, and again",
        )
        return
    monkeypatch.setattr(layer.Linear, "merge", keeping)
    hold("memory_given_back")
    assert len(kept) == 2


# ------------------------------------------------------------------------------ what is told


@pytest.mark.parametrize("seed", [0, 7])
def test_a_tensor_that_is_told_of_under_its_name_in_the_model_is_told_of(seed: int) -> None:
    """DoRA's magnitudes have another name in a file; the second seed takes one of them out."""
    with pytest.raises(ContractBroken) as caught:
        hold("incomplete_files_told", method("LORA+dora"), seed=seed)
    assert not caught.value.also
    assert "the file has, and none needs" in caught.value.found


def test_a_tensor_that_is_missing_without_a_word_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One too many is a known deviation; it is told apart, and from names that are always there."""
    from peft import PeftModel, peft_model

    def found() -> list[str]:
        with pytest.raises(ContractBroken) as caught:
            hold("incomplete_files_told")
        return [caught.value.found, *caught.value.also]

    [too_much] = found()
    assert too_much.startswith("from_pretrained: the file has, and none needs, base_model.model.no")
    monkeypatch.setattr(peft_model.warnings, "warn", lambda *args, **kwargs: None)
    assert [text.partition(" base_model")[0] for text in found()] == [
        "from_pretrained: the file lacks", "from_pretrained: the file has, and none needs,",
    ]  # fmt: skip
    original = PeftModel.load_adapter

    def lists_everything(self: Any, *args: Any, **kwargs: Any) -> Any:
        told = original(self, *args, **kwargs)
        told.missing_keys[:] = [name for name, _ in self.named_parameters()]
        return told

    monkeypatch.setattr(PeftModel, "load_adapter", lists_everything)
    assert any(text.startswith("load_adapter: the file lacks") for text in found())


def test_a_tensor_that_is_there_and_said_to_be_missing_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft import PeftModel

    original = PeftModel.load_adapter

    def misses_the_base(self: Any, *args: Any, **kwargs: Any) -> Any:
        told = original(self, *args, **kwargs)
        told.missing_keys.append("base_model.model.up.base_layer.weight")
        return told

    sound_then_broken(
        "whole_files_accepted",
        lambda: monkeypatch.setattr(PeftModel, "load_adapter", misses_the_base),
        "from_pretrained: the file fits, and base_model.model.up.base_layer.weight",
    )
    monkeypatch.undo()
    with pytest.raises(ContractBroken, match=r"load_adapter as 'b'.*lora_A\.one\.weight"):
        hold("whole_files_accepted", seed=1)


# ------------------------------------------------------------------------------ put away


@pytest.mark.parametrize("how", ["moved", "made anew"])
def test_an_adapter_that_was_put_away_and_is_brought_back_is_caught(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    original = BaseTunerLayer._move_adapter_to_device_of_base_layer

    def moves_all(self: Any, *given: Any, **more: Any) -> None:
        self.to("cpu")

    def makes_anew(self: Any, *given: Any, **more: Any) -> None:
        original(self, *given, **more)
        for factor in self.lora_A.values():
            if factor.weight.is_meta:
                factor.weight = torch.nn.Parameter(torch.zeros(factor.weight.shape))

    spoiled = moves_all if how == "moved" else makes_anew
    says = "it copies what was put away" if how == "moved" else "not where they were put"
    sound_then_broken(
        "stays_where_it_is",
        lambda: monkeypatch.setattr(
            BaseTunerLayer, "_move_adapter_to_device_of_base_layer", spoiled
        ),
        f"add of another adapter: .*{says}",
    )
