"""Laws about what is declared: sound releases keep them, releases with the fault do not.

Each fault is put back into the installed PEFT, most as an older release had it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("hypothesis")

import torch
from stack import since

from pytest_lora.contract.cells import Cell, Result, try_cell
from pytest_lora.contract.dialects import Case, Peft
from pytest_lora.contract.experiment import Experiment
from pytest_lora.contract.known import known_deviations
from pytest_lora.contract.laws import LAWS
from pytest_lora.contract.methods import discover
from pytest_lora.contract.trial import ContractBroken
from pytest_lora.errors import NotApplicable
from pytest_lora.loading import quiet

pytestmark = since("has faults that the contract finds", peft=(0, 21))


def hold(law: str, method: str = "LORA", **case: Any) -> None:
    [found] = [item for item in discover() if item.name == method]
    if case.get("network") == "llama":
        case["options"] = {"task_type": "'CAUSAL_LM'"}
    with quiet():
        LAWS[law].hold(Experiment(law, Peft(found), Case(**case)))


def break_it(law: str, method: str = "LORA", **case: Any) -> str:
    """What the law says; its script has to fail by itself, without this package."""
    with pytest.raises(ContractBroken) as caught:
        hold(law, method, **case)
    assert "pytest_lora" not in caught.value.script
    with quiet(), pytest.raises(Exception):  # noqa: B017 - an assertion, or what PEFT raises
        exec(compile(caught.value.script, "shown", "exec"), {"__name__": "shown"})
    return caught.value.found


def excused(law: str, found: str, method: str = "LORA") -> bool:
    return any(
        item.concerns(law, method, "0.21.2") and item.explains(found) for item in known_deviations()
    )


# ------------------------------------------------------------------------------ numbers


def test_a_scaling_that_is_not_applied_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lokr import layer

    hold("alpha_applies", "LOKR")
    original = layer.make_kron
    monkeypatch.setattr(layer, "make_kron", lambda one, two, scale=1.0: original(one, two))
    assert "alpha 6 computes what alpha 3 does" in break_it("alpha_applies", "LOKR")


def test_of_an_adapter_that_does_nothing_to_these_inputs_nothing_is_said() -> None:
    with pytest.raises(NotApplicable, match="does not change the output"):
        hold("alpha_applies", "LORA+alora", network="llama")


class Never(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Always(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.5, training=True)


@pytest.mark.parametrize(
    ("made", "says"), [(Never, "drops nothing"), (Always, "in eval mode, run again")]
)
def test_a_dropout_that_drops_nothing_or_in_eval_mode_is_caught(
    made: type[torch.nn.Module], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import layer

    hold("dropout_applies")
    monkeypatch.setattr(layer.nn, "Dropout", lambda p: made())
    assert says in break_it("dropout_applies")


# ------------------------------------------------------------------------------ products


@pytest.mark.parametrize(("times", "says"), [(0, "not at all"), (2, "twice")])
def test_a_product_that_is_left_out_or_applied_twice_is_caught(
    times: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import layer

    hold("applied_once", network="llama")
    original = layer.Linear.forward

    def wrong(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        once: torch.Tensor = original(self, x, *args, **kwargs)
        if self.out_features != 16:  # up_proj
            return once
        base: torch.Tensor = self.base_layer(x)
        return base + times * (once - base)

    monkeypatch.setattr(layer.Linear, "forward", wrong)
    found = break_it("applied_once", network="llama")
    assert f"applied {says} in model.layers.0.self_attn.q_proj.weight" in found
    assert not excused("applied_once", found)


def test_attention_that_adds_each_product_once_keeps_the_law(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners.lora import layer

    assert excused("applied_once", break_it("applied_once", network="attention"))
    merge, unmerge = layer.MultiheadAttention.merge, layer.MultiheadAttention.unmerge

    def alone(self: Any, act: Callable[..., None], **given: Any) -> None:
        """Without what the output projection does by itself."""
        projection = self.get_base_layer().out_proj
        projection.merge = projection.unmerge = lambda **_: None
        act(self, **given)
        del projection.merge, projection.unmerge

    monkeypatch.setattr(layer.MultiheadAttention, "merge", lambda s, **g: alone(s, merge, **g))
    monkeypatch.setattr(layer.MultiheadAttention, "unmerge", lambda s: alone(s, unmerge))
    hold("applied_once", network="attention")


# ------------------------------------------------------------------------------ patterns


@pytest.mark.parametrize("method", ["LORA", "LOHA"])
def test_a_pattern_that_hides_the_other_is_caught(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.loha import model as loha
    from peft.tuners.lora import model as lora

    hold("patterns_apply", method, network="layers")
    original = lora.get_pattern_key

    def the_first_of_all(keys: Any, module: str) -> str:
        found: str = original([*keys, "experts.1.up"], module)
        return found if "experts.1.up" not in found else "experts.1.up"

    monkeypatch.setattr(lora, "get_pattern_key", the_first_of_all)
    monkeypatch.setattr(loha, "get_pattern_key", the_first_of_all)
    found = break_it("patterns_apply", method, network="layers")
    assert "layers.1.experts.1.up" in found
    assert not excused("patterns_apply", found, method)


def test_a_setting_that_is_not_looked_at_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    assert excused("names_that_match_nothing", break_it("names_that_match_nothing"))
    original = peft.LoraConfig.__post_init__

    def careless(self: Any) -> None:
        self.layers_pattern = None
        original(self)

    monkeypatch.setattr(peft.LoraConfig, "__post_init__", careless)
    found = break_it("names_that_match_nothing")
    assert found.endswith("nobody is told by layers_pattern, modules_to_save")
    assert not excused("names_that_match_nothing", found)


def test_where_everybody_is_told_the_law_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    original = peft.LoraConfig.__post_init__

    def careful(self: Any) -> None:
        original(self)
        if self.modules_to_save:
            raise ValueError(f"there is no {self.modules_to_save[0]}")

    monkeypatch.setattr(peft.LoraConfig, "__post_init__", careful)
    hold("names_that_match_nothing")


# ------------------------------------------------------------------------------ names


@contextmanager
def no_hooks(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def test_a_mixed_batch_that_passes_over_a_name_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import LoraModel

    assert excused("unknown_names", break_it("unknown_names"))
    monkeypatch.setattr(LoraModel, "_enable_peft_forward_hooks", no_hooks)
    found = break_it("unknown_names")
    assert "nobody is told by: model(x, adapter_names=" in found
    assert not excused("unknown_names", found)


def test_a_mixed_batch_of_a_variant_that_takes_no_notice_of_names_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners.lora import LoraModel

    hold("mixed_batch", "LORA+lora_bias")
    monkeypatch.setattr(LoraModel, "_enable_peft_forward_hooks", no_hooks)
    found = break_it("mixed_batch", "LORA+lora_bias")
    assert "row 0 asks for __base__ and is nearest to what one2 gives" in found
    assert not excused("mixed_batch", found, "LORA+lora_bias")


def test_a_mixed_batch_that_cannot_be_searched_with_beams_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners.lora import LoraModel

    hold("mixed_batch", network="llama")
    original = LoraModel._enable_peft_forward_hooks

    def without_beams(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **{**kwargs, "num_beams": None})

    monkeypatch.setattr(LoraModel, "_enable_peft_forward_hooks", without_beams)
    found = break_it("mixed_batch", network="llama")
    assert "num_beams=2" in found
    assert not excused("mixed_batch", found)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_name_that_is_cut_out_of_more_than_its_own_place_is_caught(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    hold("any_name", seed=seed)
    original = peft.get_peft_model_state_dict

    def cut(model: Any, adapter_name: str = "default") -> dict[str, Any]:
        saved = original(model, adapter_name=adapter_name)
        return {key.replace(f".{adapter_name}", ""): value for key, value in saved.items()}

    monkeypatch.setattr(peft, "get_peft_model_state_dict", cut)
    monkeypatch.setattr(peft, "set_peft_model_state_dict", lambda *args, **kwargs: None)
    name = ("lora", "weight", "up", "model")[seed]
    assert f"saved of an adapter called '{name}', the file lacks" in break_it("any_name", seed=seed)


def test_a_name_that_somebody_is_warned_of_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    original = peft.PeftModel.add_adapter

    def warned(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if adapter_name == "lora":
            raise ValueError("Adapter name lora should not be contained in the prefix lora_.")
        original(self, adapter_name, *args, **kwargs)

    monkeypatch.setattr(peft.PeftModel, "add_adapter", warned)
    hold("any_name")


def test_an_adapter_that_loads_otherwise_under_another_name_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import peft

    original = peft.set_peft_model_state_dict

    def only_usual(model: Any, saved: Any, adapter_name: str) -> Any:
        return original(model, saved, adapter_name) if adapter_name == "one2" else None

    monkeypatch.setattr(peft, "set_peft_model_state_dict", only_usual)
    assert "called 'weight' instead of 'one2'" in break_it("any_name", seed=1)


# ------------------------------------------------------------------------------ ways to choose


def last_parts_only(config: Any, model: Any) -> Any:
    if config.target_modules == "all-linear":
        linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        config.target_modules = {name.rpartition(".")[2] for name in linear}
    return config


def test_all_linear_that_reaches_what_is_not_linear_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners import tuners_utils

    hold("ways_to_choose", network="kinds")
    monkeypatch.setattr(tuners_utils, "_maybe_include_all_linear_layers", last_parts_only)
    found = break_it("ways_to_choose", network="kinds")
    assert found.startswith("target_modules='all-linear': too many are sound.up; none are missing")


def test_an_embedding_that_is_saved_only_where_a_list_names_it_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.utils import save_and_load

    hold("ways_to_choose", network="llama")
    monkeypatch.setattr(save_and_load, "match_target_against_key", lambda pattern, key: None)
    found = break_it("ways_to_choose", network="llama")
    assert re.search(r"saved with .*embed_tokens.base_layer.weight are missing", found)


def test_an_adapter_that_cannot_be_chosen_a_second_time_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners.lora import LoraModel

    hold("ways_to_choose", network="kinds")
    original = LoraModel.inject_adapter

    def once(self: Any, model: Any, adapter_name: str, **kwargs: Any) -> Any:
        if adapter_name != "one" and isinstance(self.peft_config["one"].target_modules, str):
            raise ValueError("Target module Identity() is not supported.")
        return original(self, model, adapter_name, **kwargs)

    monkeypatch.setattr(LoraModel, "inject_adapter", once)
    assert "ValueError: Target module Identity() is not supported" in break_it(
        "ways_to_choose", network="kinds"
    )


@pytest.mark.parametrize(
    ("method", "network", "lost", "says"),
    [
        ("IA3", "look-alikes", {"target_modules": {"up", "down"}}, "configuration is refused"),
        ("LORA", "layers", {"layers_to_transform": None}, "does not adapt the same modules"),
    ],
)
def test_a_configuration_that_is_another_once_saved_is_caught(
    method: str, network: str, lost: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    hold("chosen_layers", method, network=network)
    original = peft.PeftConfig.save_pretrained

    def shortened(self: Any, *args: Any, **kwargs: Any) -> None:
        vars(self).update(lost)
        original(self, *args, **kwargs)

    monkeypatch.setattr(peft.PeftConfig, "save_pretrained", shortened)
    assert says in break_it("chosen_layers", method, network=network)


# ------------------------------------------------------------------------------ coming and going


def test_modules_that_stay_when_their_adapter_is_deleted_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners import tuners_utils

    hold("deleted", network="two heads")
    monkeypatch.setattr(tuners_utils, "_delete_auxiliary_adapter", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        tuners_utils.BaseTuner, "_delete_auxiliary_adapter", lambda *args, **kwargs: None,
        raising=False,
    )  # fmt: skip
    found = break_it("deleted", network="two heads")
    assert "head.modules_to_save.one2.bias is still there" in found


def after_deletion(also: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> str:
    import peft

    original = peft.PeftModel.delete_adapter

    def delete(self: Any, adapter_name: str) -> None:
        original(self, adapter_name)
        also(self)

    monkeypatch.setattr(peft.PeftModel, "delete_adapter", delete)
    return break_it("deleted")


def test_a_deletion_that_reaches_the_first_adapter_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def add(model: Any) -> None:
        for parameter in model.parameters():
            parameter.data += 1

    assert "is another" in after_deletion(add, monkeypatch)


def test_a_deletion_that_leaves_the_configuration_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def remember(model: Any) -> None:
        model.peft_config["one2"] = model.peft_config["one"]

    assert "its configuration is still there" in after_deletion(remember, monkeypatch)


def test_modules_of_another_adapter_are_caught_in_what_is_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners import tuners_utils

    hold("own_modules_saved", network="two heads")
    original = tuners_utils.set_additional_trainable_modules
    seen: set[str] = set()

    def everybodys(model: Any, peft_config: Any, **given: Any) -> Any:
        seen.update(peft_config.modules_to_save or ())
        peft_config.modules_to_save = sorted(seen)
        return original(model=model, peft_config=peft_config, **given)

    monkeypatch.setattr(tuners_utils, "set_additional_trainable_modules", everybodys)
    found = break_it("own_modules_saved", network="two heads")
    assert found == ("of adapter 'one2' head, tail is saved whole, its configuration names tail")


# ------------------------------------------------------------------------------ widened laws


def test_a_rank_of_its_own_that_a_combination_keeps_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners.lora import model

    hold("combination", seed=4)
    original = model.replace
    monkeypatch.setattr(model, "replace", lambda config, **changes: original(
        config, **{key: value for key, value in changes.items() if key != "rank_pattern"}
    ))  # fmt: skip
    assert "combin" in break_it("combination", seed=4)


def test_a_method_that_does_not_run_in_half_precision_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    hold("dtypes_kept", "LOHA", dtype="bfloat16")
    monkeypatch.setattr(BaseTunerLayer, "_cast_input_dtype", lambda self, x, dtype: x)
    found = break_it("dtypes_kept", "LOHA", dtype="bfloat16")
    assert "to have the same dtype" in found


@pytest.mark.parametrize("law", ["alpha_applies", "any_name", "deleted", "dtypes_kept"])
def test_the_cells_of_another_method_keep_the_laws(law: str) -> None:
    [loha] = [item for item in discover() if item.name == "LOHA"]
    verdict = try_cell(Cell(Peft(loha), law), examples=3, shrink=False)
    assert verdict.result is Result.PASS
