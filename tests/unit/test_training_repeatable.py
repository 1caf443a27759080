"""Resuming, seeds and reference policies."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
import training_loops
from peft import PeftModel
from tiny import fill, llama, wrap
from training_loops import (
    adamw,
    adapted,
    built_from_hash,
    built_from_seed,
    config,
    loss_of,
    seeded_too_late,
    texts,
    train_step,
)

from pytest_lora import (
    CannotRun,
    CheckFailed,
    UsageError,
    assert_reference_policy,
    assert_resume_equivalent,
    assert_seeded_initialisation,
)
from pytest_lora.loading import quiet


def failure(call: Any, *args: Any, **options: Any) -> CheckFailed:
    with pytest.raises(CheckFailed) as caught:
        call(*args, **options)
    return caught.value


# --------------------------------------------------------------------------- resuming


class Run(SimpleNamespace):
    """A training run: model, optimizer, scheduler, how many steps it has done."""


def begin(model: Any = None) -> Run:
    model = adapted(lora_dropout=0.2) if model is None else model
    torch.manual_seed(1)
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return Run(model=model, optimizer=optimizer, scheduler=scheduler, done=0)


def step(run: Run) -> torch.Tensor:
    run.model.train()
    loss = loss_of(run.model, texts(seed=run.done))
    loss.backward()
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    run.done += 1
    return loss


def save(run: Run, folder: Path) -> None:
    with quiet():
        run.model.save_pretrained(folder)
    state = {
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "random": torch.get_rng_state(),
        "done": run.done,
    }
    torch.save(state, folder / "state.pt")


def resume(folder: Path, *, without: str = "") -> Run:
    with quiet():
        model = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    if without == "adapter":
        model = wrap(model.unload(), config(lora_dropout=0.2))
    state = torch.load(folder / "state.pt", weights_only=True)
    run = begin(model)
    torch.seed()
    if without != "optimizer":
        run.optimizer.load_state_dict(state["optimizer"])
    if without != "scheduler":
        run.scheduler.load_state_dict(state["scheduler"])
    if without != "random":
        torch.set_rng_state(state["random"])
    if without != "done":
        run.done = state["done"]
    return run


def test_a_run_that_is_resumed_in_full_ends_in_the_same_bits() -> None:
    found = assert_resume_equivalent(begin, step, save, resume)
    assert found.count == 8
    assert found.details["losses"] == found.details["resumed_losses"]


@pytest.mark.parametrize(("without", "cause"), [
    ("adapter", "wrapped with a fresh one"),
    ("optimizer", "the state of the optimizer or of the scheduler"),
    ("scheduler", "the state of the optimizer or of the scheduler"),
    ("random", "the data order or the random state"),
    ("done", "the data order or the random state"),
])  # fmt: skip
def test_what_is_not_restored_is_named(without: str, cause: str) -> None:
    def incomplete(folder: Path) -> Run:
        return resume(folder, without=without)

    assert cause in str(failure(assert_resume_equivalent, begin, step, save, incomplete))


def test_training_that_does_not_repeat_gives_no_verdict() -> None:
    def begin_anywhere() -> Run:
        run = begin()
        torch.seed()
        return run

    with pytest.raises(CannotRun, match="two uninterrupted runs differ"):
        assert_resume_equivalent(begin_anywhere, step, save, resume)


@pytest.mark.parametrize(("arguments", "words"), [
    ((begin, step), "belong together"),
    ((lambda folder: begin(),), "has to return a Trainer"),
    ((lambda: 3, step, save, resume), "has none to be found"),
])  # fmt: skip
def test_requests_that_cannot_be_meant(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        assert_resume_equivalent(*arguments)


def test_a_run_may_be_a_tuple_a_mapping_or_the_model() -> None:
    from pytest_lora.checks.repeatable import _model_of

    model = torch.nn.Linear(1, 1)
    for run in (model, (1, model), {"model": model}, SimpleNamespace(model=model)):
        assert _model_of(run) is model


# --------------------------------------------------------------------------- seeds


def test_one_seed_gives_one_adapter_here() -> None:
    found = assert_seeded_initialisation(built_from_seed, hash_seeds=())
    assert found.count == 8


def test_a_seed_set_too_late() -> None:
    error = failure(assert_seeded_initialisation, seeded_too_late, hash_seeds=())
    assert "set it before get_peft_model" in str(error)
    assert error.result.measurement is not None
    assert all("lora_A" in problem.where for problem in error.result.measurement.problems)


def test_values_that_follow_from_a_hash_differ_in_a_fresh_process() -> None:
    assert_seeded_initialisation(built_from_hash, hash_seeds=())
    error = failure(assert_seeded_initialisation, built_from_hash, hash_seeds=[1])
    assert "under PYTHONHASHSEED=1" in str(error)
    assert "hashlib" in str(error)


def test_a_fresh_process_finds_the_same_adapter() -> None:
    found = assert_seeded_initialisation(built_from_seed, hash_seeds=[3])
    assert found.details["hash_seeds"] == [3]


def test_a_seed_that_nothing_reads() -> None:
    net = llama()

    def fixed(seed: int) -> Any:
        torch.manual_seed(7)
        return wrap(copy.deepcopy(net), config())

    error = failure(assert_seeded_initialisation, fixed, hash_seeds=())
    assert "the same bits from the seeds 0 and 1" in str(error)
    assert "drawn, and not from the seed that was given" in str(error)
    assert error.result.measurement is not None
    assert all("lora_A" in problem.where for problem in error.result.measurement.problems)


def test_what_is_not_drawn_needs_no_seed() -> None:
    net = llama()

    def computed(seed: int) -> Any:
        torch.manual_seed(seed)
        return wrap(copy.deepcopy(net), config(init_lora_weights="olora"))

    def with_a_generator_of_its_own(seed: int) -> Any:
        model = wrap(copy.deepcopy(net), config())
        generator = torch.Generator().manual_seed(3)
        for name, tensor in model.named_parameters():
            if "lora_A" in name:
                tensor.data.normal_(generator=generator)
        return model

    for build in (computed, with_a_generator_of_its_own):
        assert_seeded_initialisation(build, hash_seeds=())


def test_what_is_drawn_in_a_fork_is_meant_to_repeat() -> None:
    """As by a decomposition that is computed at random, from a seed of its own."""
    net = llama()

    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        model = wrap(copy.deepcopy(net), config())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            for name, tensor in model.named_parameters():
                if "lora_A" in name:
                    torch.nn.init.normal_(tensor)
        return model

    assert_seeded_initialisation(build, hash_seeds=())


@pytest.mark.parametrize("seed", [2**32 - 1, 0])
def test_a_build_that_knows_its_own_seed_alone(seed: int) -> None:
    net = llama()

    def build(given: int) -> Any:
        assert given == seed, "no such run"
        torch.manual_seed(given)
        return wrap(copy.deepcopy(net), config())

    found = assert_seeded_initialisation(build, seed=seed, hash_seeds=())
    assert "another seed was not tried: AssertionError: no such run" in found.notes[0]


def test_an_adapter_computed_from_a_base_that_is_drawn_is_not_accused() -> None:
    def build(seed: int) -> Any:
        torch.manual_seed(0)
        net = llama()
        torch.manual_seed(seed)
        return wrap(net, config(init_lora_weights="olora"))

    assert_seeded_initialisation(build, hash_seeds=())


def test_setting_a_seed_works_again_afterwards() -> None:
    from pytest_lora.checks.repeatable import _nobody_seeding

    with _nobody_seeding():
        assert torch.manual_seed(1) is torch.default_generator
        first = torch.rand(1)
        torch.manual_seed(1)
        assert not torch.equal(torch.rand(1), first)
    torch.manual_seed(1)
    first = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), first)


def test_what_another_process_cannot_import_is_said() -> None:
    def inside(seed: int) -> Any:
        return built_from_seed(seed)

    found = assert_seeded_initialisation(inside)
    assert "other hash seeds were not tried" in found.notes[0]
    with pytest.raises(UsageError, match="make it a function of a module"):
        assert_seeded_initialisation(inside, hash_seeds=[1])


def test_a_fresh_process_that_fails_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    monkeypatch.setattr("sys.executable", str(python))
    for script, words in {
        "echo no such name >&2; exit 1": "could not build the model: no such name",
        "exit 0": "it said nothing",
        "exec sleep 5": r"over 0\.5 s",
    }.items():
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        with pytest.raises(CannotRun, match=words):
            assert_seeded_initialisation(built_from_seed, hash_seeds=[1], timeout=0.5)


def test_a_module_is_found_by_its_file_where_its_name_leads_nowhere() -> None:
    from pytest_lora.checks.repeatable import _imported

    file = str(Path(training_loops.__file__).resolve())
    assert _imported("nowhere_to_be_found", file).config().r == 4


# --------------------------------------------------------------------------- reference policies


def trained() -> Any:
    """A policy that starts from an adapter that is not fresh."""
    model = adapted(lora_dropout=0.1)
    fill(model)
    return model


def outputs(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=texts()["input_ids"]).logits
    return logits


def disabled(model: Any) -> torch.Tensor:
    with model.disable_adapter():
        return outputs(model)


def with_copy(model: Any) -> Any:
    """The policy and a frozen copy of its adapter, named ref."""
    with quiet():
        model.add_adapter("ref", config(lora_dropout=0.1))
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in state.items():
            if ".ref." in name:
                tensor.copy_(state[name.replace(".ref.", ".default.")])
    model.set_adapter("default")
    return model


def ref(model: Any) -> torch.Tensor:
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.set_adapter("ref")
    found = outputs(model)
    model.set_adapter("default")
    for parameter, flag in flags.items():
        parameter.requires_grad = flag
    return found


def test_a_frozen_copy_of_the_adapter_is_the_reference() -> None:
    model = with_copy(trained())
    found = assert_reference_policy(ref, outputs, train_step(adamw(model)), model)
    assert found.value == 0.0
    assert found.details["policy moved"] > 0  # type: ignore[operator]
    assert model.active_adapter == "default"


@pytest.mark.parametrize("declared", ["start", "base"])
def test_the_base_is_the_reference_of_a_fresh_adapter(declared: str) -> None:
    model = adapted()
    step = train_step(adamw(model))
    assert_reference_policy(disabled, outputs, step, model, declared=declared)


def test_the_disabled_adapter_is_no_reference_for_a_trained_one() -> None:
    model = trained()
    step = train_step(adamw(model))
    error = failure(assert_reference_policy, disabled, outputs, step, model)
    assert "load a frozen copy of the adapter" in str(error)
    assert_reference_policy(disabled, outputs, step, model, declared="base")


def test_a_reference_that_is_trained_along() -> None:
    model = trained()
    error = failure(assert_reference_policy, outputs, outputs, train_step(adamw(model)), model)
    assert "it shares tensors with what is trained" in str(error)


def test_a_reference_that_is_not_the_base() -> None:
    model = trained()
    other = copy.deepcopy(model)
    step = train_step(adamw(model))
    error = failure(
        assert_reference_policy, lambda _: outputs(other.eval()), outputs, step, model,
        declared="base",
    )  # fmt: skip
    assert "it is not the base" in str(error)


def test_nothing_that_moves_proves_nothing_and_bounds_are_the_users() -> None:
    model = adapted()
    with pytest.raises(CannotRun, match="did not move the policy"):
        assert_reference_policy(disabled, outputs, lambda model: 0.0, model)
    with pytest.raises(UsageError, match="declared='other'"):
        assert_reference_policy(disabled, outputs, lambda model: 0.0, model, declared="other")
    step = train_step(adamw(model))
    nearly = lambda model: disabled(model) + 1e-6  # noqa: E731
    failure(assert_reference_policy, nearly, outputs, step, model, declared="base")
    assert_reference_policy(nearly, outputs, step, model, declared="base", bound=1e-5)
