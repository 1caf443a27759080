"""What a fresh process does for its parent: load, attach, merge, save, run -- and write it down.

A job is a directory.  ``job.json`` and ``inputs.safetensors`` say what to do; ``result.json`` and
``outputs.safetensors`` say what came of it.  Models and adapters are loaded by the very functions
the parent uses, so that class, dtype, device and an untrained head agree.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pytest_lora import loading
from pytest_lora.adapter import read_adapter
from pytest_lora.errors import CannotRun, NotApplicable
from pytest_lora.locate import AdapterLocation
from pytest_lora.numerics.precision import set_switches, switches
from pytest_lora.probe import output_of
from pytest_lora.subject import BaseModel, Subject

__all__ = [
    "INPUTS",
    "JOB",
    "OUTPUTS",
    "RESULT",
    "Job",
    "Script",
    "apply_numeric_state",
    "describe_job",
    "numeric_state",
    "perform",
    "read_job",
]

JOB, INPUTS, RESULT, OUTPUTS = (
    "job.json",
    "inputs.safetensors",
    "result.json",
    "outputs.safetensors",
)
_ALIGNMENT = 64
_CANNOT_MERGE = (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One thing for a fresh process to do.

    Attributes:
        spec: the base model, and as what to load it.
        adapter: the adapter to attach; None runs the model as it is.
        upcast: dtype everything is converted to before it runs; None for no conversion.
        merge_to: directory to save the merged model in; None for no merge.
        tensors: whether to give back the adapter's tensors as loaded, under their saved names.
        numeric: torch settings that decide how sums are rounded, see :func:`numeric_state`.
    """

    spec: loading.BaseSpec
    adapter: AdapterLocation | None = None
    upcast: torch.dtype | None = None
    merge_to: Path | None = None
    tensors: bool = False
    numeric: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Script:
    """A program of our own to run.

    Attributes:
        code: what it does.
        gives: an expression for the tensors to give back, by name.
        paths: directories to import from, after all others.
        device: where it computes.
        numeric: as for a :class:`Job`.
    """

    code: str
    gives: str
    paths: tuple[str, ...] = ()
    device: str = "cpu"
    numeric: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# ------------------------------------------------------------------------------ the wire format


def describe_job(job: Job | Script) -> dict[str, Any]:
    """The job as a JSON object; :func:`read_job` is the inverse."""
    if isinstance(job, Script):
        return {**dataclasses.asdict(job), "paths": list(job.paths)}
    spec, where = job.spec, job.adapter
    return {
        "spec": {
            "path": str(Path(spec.path).absolute()),
            "model_class": spec.model_class,
            "num_labels": spec.num_labels,
            "dtype": _dtype_name(spec.dtype),
            "device": str(spec.device),
            "device_map": spec.device_map,
            "max_memory": list(spec.max_memory),
        },
        "adapter": where and {
            "path": str(where.path.absolute()),
            "weights": where.weights and str(where.weights.absolute()),
            "name": where.name,
        },
        "upcast": _dtype_name(job.upcast),
        "merge_to": job.merge_to and str(job.merge_to.absolute()),
        "tensors": job.tensors,
        "numeric": dict(job.numeric),
    }  # fmt: skip


def read_job(data: Mapping[str, Any]) -> Job | Script:
    """The job that :func:`describe_job` described."""
    if "code" in data:
        return Script(**{**data, "paths": tuple(data["paths"])})
    spec, where = data["spec"], data["adapter"]
    return Job(
        spec=loading.BaseSpec(
            path=Path(spec["path"]),
            model_class=spec["model_class"],
            num_labels=spec["num_labels"],
            dtype=_dtype(spec["dtype"]),
            device=torch.device(spec["device"]),
            device_map=spec["device_map"],
            max_memory=tuple(spec["max_memory"]),
        ),
        adapter=where
        and AdapterLocation(Path(where["path"]), _path(where["weights"]), where["name"]),
        upcast=_dtype(data["upcast"]),
        merge_to=_path(data["merge_to"]),
        tensors=data["tensors"],
        numeric=data["numeric"],
    )


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


# ------------------------------------------------------------------------------ numeric state


def numeric_state() -> dict[str, Any]:
    """The settings of this process that decide in which order and precision torch sums.

    Two processes that agree on these, on the libraries and on the machine give the same bits.
    """
    return {
        "threads": torch.get_num_threads(),
        "precision": switches(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "default_dtype": _dtype_name(torch.get_default_dtype()),
        "mkldnn": torch.backends.mkldnn.enabled,
        "sdp": {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in _SDP},
        "cudnn": {name: getattr(torch.backends.cudnn, name) for name in _CUDNN},
    }


_SDP = ("flash", "mem_efficient", "math", "cudnn")
_CUDNN = ("benchmark", "deterministic")


def apply_numeric_state(state: Mapping[str, Any]) -> None:
    """Make this process sum as the one that :func:`numeric_state` was called in."""
    if not state:
        return
    torch.set_num_threads(state["threads"])
    set_switches(state["precision"])
    torch.use_deterministic_algorithms(state["deterministic"], warn_only=state["warn_only"])
    torch.set_default_dtype(getattr(torch, state["default_dtype"]))
    torch.backends.mkldnn.enabled = state["mkldnn"]
    for name, value in state["sdp"].items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(value)
    for name, value in state["cudnn"].items():
        setattr(torch.backends.cudnn, name, value)


# ------------------------------------------------------------------------------ doing it


def perform(directory: Path) -> None:
    """Carry out the job in ``directory`` and leave its result there, whatever happens."""
    from safetensors.torch import load_file, save_file

    try:
        job = read_job(json.loads((directory / JOB).read_text(encoding="utf-8")))
        apply_numeric_state(job.numeric)
        if isinstance(job, Script):
            outputs = _execute(job)
        else:
            outputs = _do(job, load_file(directory / INPUTS))
        save_file({name: _plain(tensor) for name, tensor in outputs.items()}, directory / OUTPUTS)
        result: dict[str, Any] = {"ok": True}
    except (CannotRun, NotApplicable) as reason:
        result = {"ok": False, "kind": type(reason).__name__, "message": str(reason),
                  "missing": getattr(reason, "missing", False)}  # fmt: skip
    except Exception as error:  # the parent must hear of it, whatever it is
        traceback.print_exc(file=sys.stderr)
        result = {"ok": False, "kind": "unexpected", "message": loading.one_line(error)}
    result |= {"pid": os.getpid(), "hash_seed": os.environ.get("PYTHONHASHSEED", "")}
    (directory / RESULT).write_text(json.dumps(result), encoding="utf-8")


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _execute(script: Script) -> dict[str, torch.Tensor]:
    """The tensors it gives; what it raises is the answer, and no fault of this process."""
    sys.path += [path for path in script.paths if path not in sys.path]
    names: dict[str, Any] = {"__name__": "fresh"}
    try:
        with loading.quiet():
            exec(compile(script.code, "<fresh>", "exec"), names)
            return dict(eval(script.gives, names))
    except Exception as error:
        raise CannotRun(loading.one_line(error)) from error


def _do(job: Job, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    inputs = {name: _placed(tensor, job) for name, tensor in inputs.items()}
    if job.adapter is None:
        return {"output": _run(loading.load_weights(job.spec).module, inputs)}
    adapter = read_adapter(job.adapter)
    subject = Subject(adapter, BaseModel.load(job.spec, adapter), inputs)
    model: Any = subject.model
    if job.upcast is not None:
        _widen(model, job.upcast)
    outputs = {"output": subject.output()}
    if job.tensors:
        outputs |= {f"tensor:{key}": value for key, value in _saved_tensors(model).items()}
    if job.merge_to is not None:
        columns = outputs["output"].shape[-1]
        outputs["merged"] = _merge(model, job.merge_to, inputs)[..., :columns]
    return outputs


def _widen(model: Any, dtype: torch.dtype) -> None:
    """Everything in ``dtype``; plain code for fused expert kernels, which know no float64."""
    model.to(dtype)
    plain = getattr(model.get_base_model(), "set_experts_implementation", None)
    if plain is not None:
        plain("eager")


def _placed(tensor: torch.Tensor, job: Job) -> torch.Tensor:
    dtype = job.upcast if job.upcast is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.to(job.spec.device, dtype)


def _saved_tensors(model: Any) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    with loading.quiet():
        return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def _merge(model: Any, target: Path, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    name = type(model.base_model).__name__
    try:
        with loading.quiet():
            merged = model.merge_and_unload()
    except _CANNOT_MERGE as error:
        if _is_of_the_device(error):
            raise
        raise NotApplicable(f"PEFT cannot merge it ({name}): {loading.one_line(error)}") from None
    if not hasattr(merged, "save_pretrained"):
        raise NotApplicable(f"{type(merged).__name__} is no transformers model and cannot be saved")
    output = _run(merged, inputs)
    with loading.quiet():
        merged.save_pretrained(target)
    return output


def _is_of_the_device(error: Exception) -> bool:
    """Whether a device failed or had no room left, which says nothing of what can be merged."""
    kinds = (torch.cuda.OutOfMemoryError, getattr(torch, "AcceleratorError", ()))
    return isinstance(error, kinds) or "CUDA error" in str(error)


def _run(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Output with every weight on a 64-byte boundary.

    BLAS may sum in another order where a weight is mapped from a file at an odd address (seen with
    MKL for a single row), and a merged model in memory lies elsewhere than the same model loaded.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
    return output_of(model, inputs)
