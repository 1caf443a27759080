"""One adapter on one base model: loaded once, attached when needed, always put back.

The base model is shared by all adapters of a process, so the rule of this module is: whatever
happens inside an attachment, afterwards the base model consists of the very objects it consisted of
before (:class:`~pytest_lora.structure.Structure`), and :meth:`BaseModel.verify` proves that nothing
was written into them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora import loading
from pytest_lora.adapter import BASE_PREFIX
from pytest_lora.attach import attach, saved_copy, strip
from pytest_lora.baseline import digest_of
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.numerics.fingerprint import fingerprint_state, locate_difference
from pytest_lora.offload import require_readable
from pytest_lora.probe import output_of, probe_inputs
from pytest_lora.records import Problem
from pytest_lora.structure import Structure

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    from pytest_lora.adapter import Adapter
    from pytest_lora.numerics.fingerprint import Difference, Fingerprint

__all__ = ["BaseModel", "BasePool", "Subject", "load_base", "lora_layers", "resized_rows"]


class BaseModel:
    """One loaded base model, shared by all adapters of that base in this process.

    Made by :func:`load_base`, :meth:`BasePool.get` or :meth:`from_module`.

    Attributes:
        module: the bare model in eval mode; its structure is as loaded whenever no adapter is
            attached.
        structure: references to everything ``module`` was made of when loaded.
        fingerprints: those of every parameter and buffer when loaded, by name.
        untrained: parameters the checkpoint had no weights for (a fresh classification head).
        spec: what decided what was loaded; None when the caller supplied the module.
        loads: how often the weights were read, reloads included.
    """

    module: torch.nn.Module
    structure: Structure
    fingerprints: Mapping[str, Fingerprint]
    untrained: tuple[str, ...]

    def __init__(
        self,
        loaded: loading.Loaded,
        *,
        spec: loading.BaseSpec | None = None,
        adapter: Adapter | None = None,
        tokenizer: Any = None,
        lent: bool = False,
    ) -> None:
        self.spec, self._adapter = spec, adapter
        self._tokenizer, self._tokenizer_known = tokenizer, tokenizer is not None or spec is None
        self._checkpoint: loading.Checkpoint | None = None
        self._attachment: _Attachment | None = None
        self._lent = lent
        self._as_lent: Structure | None = None
        self.loads = 1 if spec else 0
        self._adopt(loaded)

    def _adopt(self, loaded: loading.Loaded) -> None:
        self.module, self.untrained = loaded
        require_readable(self.module)
        loading.as_stored(self.module)
        self.structure = Structure(self.module)
        self.fingerprints = fingerprint_state(self.structure.tensors())
        self._digest: str | None = None
        self.embedding = _input_embedding(self.module)

    @classmethod
    def from_module(cls, module: torch.nn.Module, *, tokenizer: Any = None) -> BaseModel:
        """A base model the caller built or loaded.  It is put in eval mode with gradients off."""
        return cls(loading.Loaded(module.requires_grad_(False).eval(), ()), tokenizer=tokenizer)

    @classmethod
    def load(cls, spec: loading.BaseSpec, adapter: Adapter) -> BaseModel:
        """The base model of ``spec``; ``adapter`` tells which missing weights it brings itself."""
        return cls(loading.load_weights(spec, adapter), spec=spec, adapter=adapter)

    @property
    def source(self) -> Path | None:
        """Directory it was loaded from; None when the caller supplied the module."""
        return self.spec.path if self.spec else None

    @property
    def tokenizer(self) -> Any | None:
        """The base model's tokenizer, read on first use; None if there is none."""
        if not self._tokenizer_known and self.spec is not None:
            self._tokenizer, self._tokenizer_known = loading.load_tokenizer(self.spec.path), True
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        """Device of the first weight."""
        return next((tensor.device for _, tensor in self.structure.tensors()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first floating-point weight."""
        floating = (t.dtype for _, t in self.structure.tensors() if t.is_floating_point())
        return next(floating, torch.float32)

    @property
    def digest(self) -> str:
        """Of the weights as loaded and of the configuration they are used with, in hexadecimal.

        What a number depends on is compared by it, once for every result: it is made on first use.
        """
        if self._digest is None:
            with self.bare() as module:
                self._digest = _digest_of(module, self.fingerprints)
        return self._digest

    # -------------------------------------------------------------------------- proof

    def verify(self) -> tuple[Problem, ...]:
        """What differs from the weights and buffers as loaded; empty when intact.

        Should an adapter be attached, it is what :meth:`release` would leave that counts.  A
        difference is located against the file on disk where that has what the tensor was; no copy
        is kept.
        """
        with self.bare():
            return self.changes(self.fingerprints)[0]

    def state(self) -> dict[str, Fingerprint]:
        """Fingerprints of every parameter and buffer as it is now, by its name when loaded."""
        return fingerprint_state(self.tensors())

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter and buffer of the base's own modules, by its name when loaded.

        Tensors with a row per token are shown with the rows they were loaded with, should the
        vocabulary have grown for the attached adapter.
        """
        grown = self._attachment.owner.resized_rows if self._attachment else None
        for name, tensor in self.structure.tensors():
            yield name, self._as_loaded(name, tensor) if grown else tensor

    def _as_loaded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        shape = self.fingerprints[name].shape
        if not shape or tensor.shape[1:] != shape[1:] or tensor.shape[0] < shape[0]:
            return tensor
        return tensor[: shape[0]]

    def changes(
        self, before: Mapping[str, Fingerprint]
    ) -> tuple[tuple[Problem, ...], dict[str, Fingerprint]]:
        """Differences from ``before`` and the state now; tensors in shared memory count once.

        The base's own modules are looked at, underneath whatever wraps them at the moment.
        """
        tensors = dict(self.tensors())
        now = fingerprint_state(tensors)
        changed: dict[tuple[int, str], Problem] = {}
        for name, then in before.items():
            if name not in now:
                changed[id(then), name] = Problem(name, "the tensor is gone")
            elif now[name] != then:
                key = (tensors[name].data_ptr(), now[name].digest)
                if key not in changed:
                    changed[key] = self._change(name, tensors[name], then, now[name])
        return tuple(changed.values()), now

    def _change(
        self, name: str, tensor: torch.Tensor, then: Fingerprint, now: Fingerprint
    ) -> Problem:
        if (then.dtype, then.shape) != (now.dtype, now.shape):
            was = f"{then.dtype} {list(then.shape)}"
            return Problem(name, f"became {now.dtype} {list(now.shape)}", was)
        expected = "the bits it had before"
        found = self._locate(name, tensor, then)
        if found is None:
            return Problem(name, f"some of its {tensor.numel()} elements changed", expected)
        return Problem(name, describe(found, tensor.numel()), expected)

    def _locate(self, name: str, tensor: torch.Tensor, then: Fingerprint) -> Difference | None:
        """Where ``tensor`` differs from the file on disk, if that holds what ``then`` describes."""
        original = self.on_disk(name, tensor)
        if original is None or fingerprint_state({name: original})[name] != then:
            return None
        return locate_difference(tensor, original)

    def on_disk(self, name: str, like: torch.Tensor) -> torch.Tensor | None:
        """The tensor ``name`` as its file has it, cast to ``like``'s dtype, on the CPU.

        None where there is no file, no such tensor in it, or one of another shape.
        """
        if self.spec is None:
            return None
        if self._checkpoint is None:
            self._checkpoint = loading.Checkpoint(self.spec.path)
        stored = self._checkpoint.read(name, self.module)
        if stored is None or stored.shape != like.shape or not stored.is_floating_point():
            return None
        return stored.to(like.dtype)

    # -------------------------------------------------------------------------- attachments

    def attach(self, subject: Subject, *, is_trainable: bool, scoped: bool) -> _Attachment:
        """Attach a subject's adapter in place of what is attached."""
        self.release()
        if self._lent:
            self._as_lent = Structure(self.module)
            self.structure.restore()
        try:
            self._spare_overwritten(subject.adapter)
            self._attachment = _Attachment(subject, is_trainable=is_trainable, scoped=scoped)
        except BaseException:
            self.structure.restore()
            self.release()
            raise
        return self._attachment

    def overwritten_by(self, adapter: Adapter) -> frozenset[str]:
        """The base's own tensors that ``adapter``'s file holds values for.

        Biases trained with ``bias="all"`` and saved embeddings are loaded into the base, in place;
        saved modules (``modules_to_save``) are not, they have a place of their own.
        """
        saved = {key.replace(".base_layer.", ".") for key in adapter.tensors}
        apart = tuple(f".{name}" for name in adapter.modules_to_save)
        names = [name for name, _ in self.structure.tensors() if BASE_PREFIX + name in saved]
        return frozenset(
            name for name in names if not f".{name.rpartition('.')[0]}".endswith(apart)
        )

    def _spare_overwritten(self, adapter: Adapter) -> None:
        """On a base that adapters share, values may only be loaded over copies."""
        overwritten = self.overwritten_by(adapter)
        for name, tensor in self.structure.tensors():
            if name in overwritten:
                tensor.data = tensor.data.clone()

    def release(self) -> None:
        """Detach whatever adapter is attached; a lent model is given back as it was lent."""
        if self._attachment is not None:
            self._attachment = None
            self.structure.restore()
        if self._as_lent is not None:
            self._as_lent.restore()
            self._as_lent = None

    @contextlib.contextmanager
    def bare(self, current: Structure | None = None) -> Iterator[torch.nn.Module]:
        """The module without any adapter; what is attached is attached again afterwards.

        ``current`` is the structure to go back to, if the caller has taken it and nothing has
        changed since: taking it costs ten times what putting it back does.
        """
        if self._attachment is None and not self._lent:
            yield self.module
            return
        current = Structure(self.module) if current is None else current
        self.structure.restore()
        try:
            yield self.module
        finally:
            current.restore()

    def reload(self, dtype: torch.dtype | None = None) -> None:
        """Drop the weights and read them again from :attr:`source`; :attr:`module` is a new object.

        The old object is left without numbers, whoever still holds it, so that its memory is free
        before the new weights come.

        ``dtype``: read them in this one; another call without it gives back the first.

        Raises:
            CannotRun: the module was supplied by the caller.
        """
        if self.spec is None:
            raise CannotRun("the base model was passed in, not loaded; it cannot be loaded again")
        self.release()
        spec = self.spec if dtype is None else dataclasses.replace(self.spec, dtype=dtype)
        _empty(self.module)
        del self.module, self.structure
        self._adopt(loading.load_weights(spec, self._adapter))
        self.loads += 1


def _empty(module: torch.nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.new_empty(0)


def describe(found: Difference, numel: int) -> str:
    """A located difference in words."""
    place = list(found.place or ())
    return f"{found.changed} of {numel} elements changed, by at most {found.largest:.3g} at {place}"


class _Attachment:
    """An adapter attached to a base model."""

    def __init__(self, owner: Subject, *, is_trainable: bool, scoped: bool) -> None:
        self.owner, self.scoped = owner, scoped
        self.model, self.warnings = attach(
            owner.adapter,
            owner.base.module,
            device=owner.base.device,
            is_trainable=is_trainable,
            rows=owner.resized_rows,
        )


class BasePool:
    """The base models of one process: each is read once, however many adapters use it."""

    def __init__(self) -> None:
        self._models: dict[loading.BaseSpec, BaseModel] = {}

    @property
    def loads(self) -> int:
        """How often weights were read."""
        return sum(model.loads for model in self._models.values())

    def get(
        self,
        path: Path,
        adapter: Adapter,
        **how: Any,
    ) -> BaseModel:
        """The base model in ``path`` as ``adapter``'s task needs it, loaded now or earlier.

        ``how``: as for :func:`~pytest_lora.loading.spec_for`.
        """
        spec = loading.spec_for(path, adapter, **how)
        if spec not in self._models:
            self._models[spec] = BaseModel.load(spec, adapter)
        return self._models[spec]

    def drop(self, base: BaseModel) -> None:
        """Forget a base model, so that its memory can be freed."""
        self._models = {spec: model for spec, model in self._models.items() if model is not base}


def load_base(
    path: Path | str,
    *,
    adapter: Adapter,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: str | None = None,
    max_memory: Sequence[str] = (),
) -> BaseModel:
    """Load the base model in ``path`` with the class and head ``adapter`` calls for.

    Args:
        path: its folder.
        adapter: tells which class and head, and which missing weights it brings itself.
        device: where to; ``auto`` is a GPU if there is one.
        dtype: dtype to load in; ``auto`` is the checkpoint's own.
        device_map: spread it over devices instead, as accelerate does (``auto``, ``balanced``,
            ``balanced_low_0``, ``sequential``).
        max_memory: what of each device that may use: ``["0=20GiB", "cpu=60GiB"]``.

    Raises:
        CannotRun: the model is damaged, not safetensors, or of a kind transformers cannot load.
        UsageError: device or dtype is none.
    """
    spec = loading.spec_for(
        Path(path),
        adapter,
        device=device,
        dtype=dtype,
        device_map=device_map,
        max_memory=max_memory,
    )
    return BaseModel.load(spec, adapter)


class Subject:
    """One adapter on one base model.

    Attributes:
        adapter: the adapter's files.
        base: the base model, shared with other subjects.
        has_own_inputs: whether inputs were given, in place of the probe inputs.
    """

    def __init__(
        self,
        adapter: Adapter,
        base: BaseModel,
        inputs: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.adapter, self.base = adapter, base
        self._inputs = None if inputs is None else {k: v.to(base.device) for k, v in inputs.items()}
        self.has_own_inputs = inputs is not None
        self._base_output: torch.Tensor | None = None

    @classmethod
    def from_model(
        cls, model: PeftModel, inputs: Mapping[str, torch.Tensor] | None = None
    ) -> Subject:
        """The active adapter of a live ``PeftModel``, saved to a temporary directory, on its base.

        The model is lent: until :meth:`release` is called, its layers may be taken off its base.
        :meth:`release` puts every one of them back.

        Raises:
            UsageError: not a PeftModel, or not exactly one adapter is active, or it is merged.
        """
        adapter = saved_copy(model)
        root = model.get_base_model()
        as_lent = Structure(root)
        try:
            strip(root)
            vars(root).pop("peft_config", None)  # else PEFT adds to the adapters named there
            root.requires_grad_(False).eval()
            base = BaseModel(loading.Loaded(root, ()), lent=True)
        finally:
            as_lent.restore()
        return cls(adapter, base, inputs)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Deterministic probe inputs on the base model's device (see :mod:`pytest_lora.probe`)."""
        if self._inputs is None:
            with self.base.bare() as module:
                self._inputs = probe_inputs(module, self.adapter, self.base.device)
        return self._inputs

    @property
    def inputs_fact(self) -> str:
        """What a number that rests on :attr:`inputs` has to agree in with another (``baseline``).

        A digest of inputs that were given.  Probe inputs are just that: which tokens they hold may
        follow from the adapter, and no fact is the adapter's.
        """
        if not self.has_own_inputs:
            return "probe"
        found = fingerprint_state(sorted(self.inputs.items()))
        return digest_of([[name, item.dtype, item.digest] for name, item in found.items()])

    def base_output(self) -> torch.Tensor:
        """Output of the untouched base model on :attr:`inputs`; computed once."""
        if self._base_output is None:
            inputs = self.inputs
            with self.base.bare() as module:
                self._base_output = output_of(module, inputs)
        return self._base_output

    def output(self, model: torch.nn.Module | None = None) -> torch.Tensor:
        """Primary output of ``model`` (default: :attr:`model`) on :attr:`inputs`.

        Logits, start and end logits concatenated, or the last hidden state; eval and inference
        mode.  What the base model's output does not have is left off: the columns of a vocabulary
        the adapter made larger, the positions of its virtual tokens.
        """
        produced = output_of(self.model if model is None else model, self.inputs)
        plain = self.base_output()
        if produced.dim() == plain.dim() > 2 and produced.shape[1] > plain.shape[1]:
            produced = produced[:, -plain.shape[1] :]
        return produced[..., : plain.shape[-1]] if self.resized_rows else produced

    @property
    def model(self) -> PeftModel:
        """The adapter attached to the base model: frozen, eval mode.

        Attached on first use and kept until :meth:`release` or until another subject takes the
        base model.  Inside :meth:`attached` it is that attachment.
        """
        return self._attachment().model

    @contextlib.contextmanager
    def attached(self, *, is_trainable: bool = False) -> Iterator[PeftModel]:
        """A fresh attachment; afterwards the base model is structurally what it was as loaded.

        Raises:
            UsageError: inside another ``attached`` block on the same base model.
            CannotRun: PEFT cannot load the adapter.
        """
        if self._occupied():
            raise UsageError("attached() cannot be nested: an outer block uses the base model")
        attachment = self.base.attach(self, is_trainable=is_trainable, scoped=True)
        try:
            yield attachment.model
        finally:
            self.base.release()

    def release(self) -> None:
        """Detach the adapter, if it is attached."""
        current = self.base._attachment
        if current is None or current.owner is self:
            self.base.release()

    @property
    def load_warnings(self) -> tuple[str, ...]:
        """What PEFT warned of when it loaded the current attachment (missing keys and the like)."""
        return self._attachment().warnings

    @property
    def resized_rows(self) -> int | None:
        """Rows of the embedding the adapter brings, where the base model has another number."""
        return _resized(self.adapter, self.base.embedding)

    def _occupied(self) -> bool:
        return self.base._attachment is not None and self.base._attachment.scoped

    def _attachment(self) -> _Attachment:
        current = self.base._attachment
        if current is not None and current.owner is self:
            return current
        if self._occupied():
            raise UsageError("the base model is in use by another subject's attached() block")
        return self.base.attach(self, is_trainable=False, scoped=False)


def lora_layers(model: torch.nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Every PEFT tuner layer of ``model`` with its qualified name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def resized_rows(adapter: Adapter, module: torch.nn.Module) -> int | None:
    """Rows of the embedding ``adapter`` brings, where the base ``module`` has another number."""
    return _resized(adapter, _input_embedding(module))


def _resized(adapter: Adapter, embedding: tuple[str, int] | None) -> int | None:
    if embedding is None:
        return None
    name, rows = embedding
    for key in (f"{name}.weight", f"{name}.base_layer.weight"):
        info = adapter.tensors.get(BASE_PREFIX + key)
        if info is not None and len(info.shape) == 2 and info.shape[0] != rows:
            return info.shape[0]
    return None


def _digest_of(module: torch.nn.Module, fingerprints: Mapping[str, Fingerprint]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, found in sorted(fingerprints.items()):
        digest.update(f"{name} {found.dtype} {found.shape} {found.digest}\n".encode())
    config: Any = getattr(module, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        settings.pop(key, None)
    attention = getattr(config, "_attn_implementation", None)
    text = json.dumps([type(module).__name__, attention, settings], sort_keys=True, default=str)
    digest.update(text.encode())
    return digest.hexdigest()


def _input_embedding(module: torch.nn.Module) -> tuple[str, int] | None:
    """Name and number of rows of the input embedding, if the model has one."""
    try:
        embedding = module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    names = [name for name, item in module.named_modules() if item is embedding]
    rows = getattr(embedding, "num_embeddings", None)
    return (names[0], rows) if names and isinstance(rows, int) else None
