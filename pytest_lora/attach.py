"""Putting an adapter on a base model with PEFT, and taking layers off one.

Weights reach PEFT as safetensors only, from a directory that cannot offer it anything else.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.adapter import read_adapter
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.loading import one_line, quiet
from pytest_lora.locate import CONFIG_NAME, WEIGHTS_NAME, AdapterLocation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peft import PeftModel

    from pytest_lora.adapter import Adapter

__all__ = ["ADAPTER_NAME", "attach", "loadable_directory", "own_randomness", "saved_copy", "strip"]

ADAPTER_NAME = "default"


def attach(
    adapter: Adapter,
    module: torch.nn.Module,
    *,
    device: torch.device,
    is_trainable: bool = False,
    rows: int | None = None,
) -> tuple[PeftModel, tuple[str, ...]]:
    """``PeftModel.from_pretrained`` on ``module``, which it changes, and what it warned of.

    Args:
        adapter: must have safetensors weights.
        module: the bare base model.
        device: where the adapter's weights go.
        is_trainable: as PEFT has it; the model is in training mode if so, else in eval mode.
        rows: resize the vocabulary to this many rows first, as PEFT's documentation asks for
            adapters that come with a resized embedding.

    Raises:
        CannotRun: PEFT cannot attach it; one line says why.
    """
    if not adapter.weights_files:
        raise CannotRun(
            f"{adapter.path}: no whole safetensors weights to load; other formats are never opened"
        )
    try:
        with loadable_directory(adapter) as directory, own_randomness(), quiet():
            return _from_pretrained(directory, module, device, is_trainable, rows)
    except Exception as error:  # whatever PEFT raises on files it cannot take
        raise CannotRun(f"{adapter.path}: PEFT cannot attach it: {one_line(error)}") from None


def _from_pretrained(
    directory: Path,
    module: torch.nn.Module,
    device: torch.device,
    is_trainable: bool,
    rows: int | None,
) -> tuple[PeftModel, tuple[str, ...]]:
    from peft import PeftModel

    if rows is not None:
        module.resize_token_embeddings(rows, mean_resizing=False)  # type: ignore[operator]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(
            module,
            str(directory),
            adapter_name=ADAPTER_NAME,
            is_trainable=is_trainable,
            torch_device=str(device),
        )
    texts = [str(item.message) for item in caught if item.category is UserWarning]
    return model.train(is_trainable), tuple(texts)


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """PEFT draws initial values before it loads: the same ones every time, unnoticed by others."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        # Not torch.manual_seed: without a device it keeps the caller's stack as text, every time.
        torch.default_generator.manual_seed(0)
        if devices:
            torch.cuda.manual_seed_all(0)
        yield


@contextlib.contextmanager
def loadable_directory(adapter: Adapter) -> Iterator[Path]:
    """A directory PEFT can load: the adapter's own, or a temporary one where the names differ."""
    files = adapter.weights_files
    if len(files) == 1 and files[0].absolute() == (adapter.path / WEIGHTS_NAME).absolute():
        yield adapter.path
        return
    with tempfile.TemporaryDirectory(prefix="pytest-lora-") as name:
        staged = Path(name)
        shutil.copyfile(adapter.path / CONFIG_NAME, staged / CONFIG_NAME)
        _stage(files, staged / WEIGHTS_NAME)
        yield staged


def _stage(files: Sequence[Path], target: Path) -> None:
    if len(files) > 1:  # PEFT does not read shards
        from safetensors.torch import load_file, save_file

        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        save_file(tensors, target)
        return
    try:
        target.symlink_to(files[0].absolute())
    except OSError:  # no right to make links
        shutil.copyfile(files[0], target)


# ------------------------------------------------------------------------------ live models


def saved_copy(model: Any) -> Adapter:
    """The active adapter of a live ``PeftModel``, saved to a temporary directory and read back.

    The directory goes when ``model`` goes.

    Raises:
        UsageError: ``model`` is no PeftModel, its adapter is merged, or several are active.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise UsageError(f"expected a Subject or a peft.PeftModel, got {type(model).__name__}")
    active = model.active_adapters
    if len(active) != 1:
        raise UsageError(f"one adapter has to be active, {active} are")
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise UsageError("the adapter is merged; call unmerge_adapter() first")
    home = tempfile.mkdtemp(prefix="pytest-lora-")
    weakref.finalize(model, shutil.rmtree, home, ignore_errors=True)
    with quiet(), _without_model_card(model):
        # The embedding, resized or not, is already the one of the base it is checked on.
        model.save_pretrained(home, selected_adapters=active, save_embedding_layers=False)
    path = Path(home) if active[0] == "default" else Path(home) / active[0]
    return read_adapter(AdapterLocation(path=path, weights=None, name=active[0]))


@contextlib.contextmanager
def _without_model_card(model: PeftModel) -> Iterator[None]:
    """Saving renders a README as well, which takes longer than all the rest of a small adapter."""
    vars(model)["create_or_update_model_card"] = lambda *_: None
    try:
        yield
    finally:
        del vars(model)["create_or_update_model_card"]


def strip(root: torch.nn.Module) -> None:
    """Replace every PEFT layer below ``root`` by the module it wraps.

    Raises:
        UsageError: there is a layer that wraps nothing.
    """
    for name, child in list(root._modules.items()):
        while _is_of_peft(child):
            inner = getattr(child, "base_layer", None)
            inner = getattr(child, "original_module", None) if inner is None else inner
            if not isinstance(inner, torch.nn.Module):
                raise UsageError(f"{type(child).__name__} {name!r} wraps no module to go back to")
            child = inner
        root._modules[name] = child
        if child is not None:
            strip(child)  # what a layer of PEFT holds beside the wrapped module is gone by now


def _is_of_peft(module: object) -> bool:
    return type(module).__module__.startswith("peft.")
