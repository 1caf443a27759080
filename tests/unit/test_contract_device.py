"""The contract on a device: what its scripts place where, and how products are rounded there.

torch's ``meta`` device stands in for an accelerator: it has no numbers, and like any other it
refuses what is elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("hypothesis")

import torch
from stack import since

from pytest_lora import fresh
from pytest_lora.contract import cells, experiment
from pytest_lora.contract.cells import Cell, Result, assert_contract, contract_cells, try_cell
from pytest_lora.contract.derivatives import _BACKWARD, _STEP, _STEP_OF_X
from pytest_lora.contract.dialects import FIRST, Case, Dialect, OwnClass, Peft
from pytest_lora.contract.methods import Method, discover
from pytest_lora.contract.networks import NETWORKS
from pytest_lora.contract.trial import Trial
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.fresh import Script
from pytest_lora.loading import quiet
from pytest_lora.numerics.precision import switches

METHODS = {method.name: method for method in discover()}
LORA = METHODS["LORA"]
NEED_NUMBERS = {
    "experts", "experts, inputs first", "experts, outputs first", "fused experts", "experts llama",
}  # fmt: skip
"""Networks that torch cannot run without: parametrised parameters, and routing."""


NEW = since("its language models cannot be moved to the meta device", transformers=(5, 0))


class MyLora:
    """The least there is: factors, and a hook that adds their product."""

    def attach(self, model, targets, r, alpha):
        model.requires_grad_(False)
        for name in targets:
            layer = getattr(model, name)
            like = {"dtype": layer.weight.dtype, "device": layer.weight.device}
            layer.A = torch.nn.Parameter(torch.randn(r, layer.in_features, **like))
            layer.B = torch.nn.Parameter(torch.zeros(layer.out_features, r, **like))
            layer.register_forward_hook(
                lambda m, args, y: y + alpha / r * (args[0] @ m.A.T) @ m.B.T
            )
        return model

    def factors(self, model):
        layers = {name: m for name, m in model.named_modules() if hasattr(m, "A")}
        return {name: (m.A, m.B) for name, m in layers.items()}


OWN = OwnClass(f"{__name__}:MyLora", MyLora)


def on(device: str, dialect: Dialect) -> Dialect:
    dialect.device = device
    return dialect


@pytest.fixture(autouse=True)
def _own_class_back_on_the_cpu() -> Iterator[None]:
    yield
    OWN.device = "cpu"


def begun(dialect: Dialect, case: Case) -> Trial:
    """An experiment's script up to a filled adapter, without the reference, which needs numbers."""
    trial = Trial("x", dialect.name)
    with quiet():
        dialect.begin(trial, case)
        trial.run("base = run()")
        dialect.attach(trial, case)
        dialect.fill(trial, FIRST, 3)
        trial.run("y = run()")
    return trial


def everything(trial: Trial) -> set[str]:
    model = trial.names["model"]
    tensors = [*model.parameters(), *model.buffers(), trial.names["x"], trial.names["y"]]
    return {tensor.device.type for tensor in tensors}


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(name, marks=NEW if NETWORKS[name].reads_tokens else ())
        for name in sorted({*NETWORKS} - NEED_NUMBERS)
    ],
)
def test_network_inputs_adapter_and_output_are_on_the_device(network: str) -> None:
    net = NETWORKS[network]
    options = {"task_type": "'CAUSAL_LM'"} if net.reads_tokens else {}
    trial = begun(on("meta", Peft(LORA)), Case(network=network, options=options))
    assert everything(trial) == {"meta"}
    assert trial.script.count(".to('meta')") == 2


def test_so_are_those_of_a_class_of_ones_own() -> None:
    assert everything(begun(on("meta", OWN), Case())) == {"meta"}


@pytest.mark.parametrize("dialect", [Peft(LORA), OWN], ids=["peft", "own"])
def test_steps_and_gradients_are_too(dialect: Dialect) -> None:
    trial = begun(on("meta", dialect), Case())
    live = dialect.live(FIRST)
    trial.run(_BACKWARD.format(seed=1, seeded=dialect.seeded(1), live=live))
    trial.run(_STEP_OF_X)
    trial.run(_STEP.format(key="('up', 'A')"))
    assert {trial.names[name].device.type for name in ("g", "step", "change")} == {"meta"}
    assert {grad.device.type for grad in trial.names["found"].values()} == {"meta"}


def test_on_the_cpu_a_script_says_nothing_of_devices_and_elsewhere_every_generator_is_seeded() -> (
    None
):
    trial = begun(Peft(LORA), Case())
    assert ".to('" not in trial.script
    assert "cpu" not in trial.script
    assert Peft(LORA).seeded(3) == "torch.default_generator.manual_seed(3)"
    assert on("cuda", Peft(LORA)).seeded(3) == "torch.manual_seed(3)"


# ------------------------------------------------------------------------------ what is handed on


def test_every_cell_gets_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "discover", lambda: [LORA])
    assert {cell.dialect.device for cell in contract_cells()} == {"cpu"}
    assert {cell.dialect.device for cell in contract_cells(device="meta")} == {"meta"}


def test_a_device_that_is_none_or_not_there_is_one_line() -> None:
    with pytest.raises(UsageError, match="'nonsense' is not one torch knows"):
        contract_cells(MyLora, device="nonsense")
    count = torch.cuda.device_count()
    with pytest.raises(CannotRun, match=f"but torch sees {count} CUDA devices"):
        assert_contract(MyLora, device=f"cuda:{count}")


def test_fresh_processes_get_it_and_do_not_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Script] = []

    def answer(script: Script, hash_seeds: Sequence[int]) -> list[fresh.FreshResult]:
        asked.append(script)
        return [fresh.FreshResult({}, {}, 1, seed, 0.0) for seed in hash_seeds]

    monkeypatch.setattr(experiment, "run_side_by_side", answer)
    for device in ("cpu", "cuda:0"):
        dialect = on("cpu", Peft(LORA))
        it = experiment.Experiment("seeded_initialisation", dialect, Case())
        dialect.device = device
        it.in_fresh_processes("pass", "{}", hash_seeds=(0,))
    assert [script.device for script in asked] == ["cpu", "cuda:0"]

    def own(directory: Path, *_: object) -> str:
        raise CannotRun("an interpreter of its own")

    monkeypatch.setattr(fresh, "_on_its_own", own)
    with pytest.raises(CannotRun, match="of its own"):
        fresh.run_fresh(Script("", "{}", device="cuda:0"))


@since("has faults that the contract finds", peft=(0, 21))
def test_what_was_saved_is_loaded_where_the_network_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on a GPU that happens to be there, whose rounding is another one."""
    from pytest_lora.contract.laws import saving

    asked: list[object] = []
    load = saving.load_base

    def noted(*given: object, device: object = "auto", **more: object) -> object:
        asked.append(device)
        return load(*given, device=device, **more)

    monkeypatch.setattr(saving, "load_base", noted)
    for law in ("save_reload", "merged_reload"):
        assert try_cell(Cell(Peft(LORA), law), examples=1).result is Result.PASS
    assert set(asked) == {"cpu"}


@pytest.mark.parametrize(("device", "rounded"), [("cpu", "medium"), ("cuda", "highest")])
def test_products_are_accurate_where_that_has_to_be_asked_for(
    device: str, rounded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    dialect = Peft(Method("seen", "LoraConfig", {}))
    tried = Cell(on(device, dialect), "forward")
    torch.set_float32_matmul_precision("medium")
    try:
        tried._once(lambda: seen.append(torch.get_float32_matmul_precision()))
        assert switches()["float32_matmul_precision"] == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [rounded]
