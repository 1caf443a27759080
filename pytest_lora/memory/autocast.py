"""``torch.autocast`` on tensors that have no device: the casts that the CPU or CUDA would make.

Autocast is a layer of the dispatcher above autograd.  Each device has lists of operators: those
that run in half precision, those that run in float32, those that take the widest of their arguments
(``aten/src/ATen/autocast_mode.h`` and ``.cpp``).  Meta tensors belong to no device and pass all of
them by.  So for a trace the same layer is built again at a dispatch key that no device here uses:
which operators are listed is asked of this torch, what a list does with them is repeated here.

A cast to half precision is kept until the outermost region ends, and used again, if what was cast
is a float32 leaf that requires a gradient.  So the weights of an adapter, or of a model that is
trained, have copies in half precision all through the forward pass, and a frozen base has not: its
weights are cast for every product anew, and for as long as autograd saves them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch.library import Library, fallthrough_kernel
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from pytest_lora.memory.patching import replaced
from pytest_lora.memory.records import NotPredictable

__all__ = ["HALF", "Autocast", "region"]

HALF = (torch.bfloat16, torch.float16)
_NAME = "AutocastPrivateUse1"
_KEY: Any = getattr(torch._C.DispatchKey, _NAME)
_KEYS = torch._C.DispatchKeySet(_KEY)
_LAYERS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}

_Args = Sequence[Any]
_Kwargs = Mapping[str, Any]

_LOWER = """
    _convolution.deprecated addbmm addmm baddbmm bmm conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input linalg_vecdot linear matmul mm prelu
    scaled_dot_product_attention
"""
_FLOAT32 = """
    binary_cross_entropy_with_logits cdist cosine_embedding_loss hinge_embedding_loss huber_loss
    kl_div l1_loss margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss nll_loss
    nll_loss2d poisson_nll_loss smooth_l1_loss soft_margin_loss triplet_margin_loss
"""
_LISTS: Mapping[str, Mapping[str, str]] = {
    "cpu": {
        "lower": _LOWER + "conv1d.padding conv2d.padding conv3d.padding _addmm_activation",
        "float32": _FLOAT32
        + """
            avg_pool3d binary_cross_entropy cross_entropy_loss ctc_loss.IntList ctc_loss.Tensor
            grid_sampler inverse linalg_cond linalg_inv linalg_qr linalg_solve linalg_svd polar prod
            prod.dim_int qr quantile quantile.scalar reflection_pad1d reflection_pad2d
            replication_pad1d replication_pad2d stft stft.center svd trace view_as_complex
        """,
        "widest": "cat index_copy stack",
    },
    "cuda": {
        "lower": _LOWER
        + """
            _convolution _scaled_dot_product_flash_attention addmv addr chain_matmul convolution
            einsum linalg_multi_dot mv
        """,
        "float32": _FLOAT32
        + """
            acos asin cosh cosine_similarity dist erfinv exp expm1 frobenius_norm.dim group_norm
            layer_norm log log10 log1p log2 logsumexp native_layer_norm nuclear_norm
            nuclear_norm.dim pdist pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor reciprocal renorm
            rms_norm rsqrt sinh softplus tan
        """,
        "widest": """
            addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put scatter_add tensordot
            vdot
        """,
        "result": """
            cumprod cumsum linalg_matrix_norm linalg_matrix_norm.str_ord linalg_vector_norm
            log_softmax.int prod prod.dim_int softmax.int sum sum.dim_IntList
        """,
        "norm": "norm.Scalar norm.ScalarOpt_dim",
    },
}
"""What happens to an operator, by device; those that are listed by torch and not here are refused.

``lower``: floating arguments are cast to half precision; ``float32``: to float32; ``widest``: to
float32 if one of them has it, else to half precision; ``result``: asked for a float32 result, where
no format was asked for; ``norm``: the same through the overload that takes a format.
"""
_NORMS = {"norm.Scalar": "ScalarOpt_dtype", "norm.ScalarOpt_dim": "ScalarOpt_dim_dtype"}


def region(
    batch: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> AbstractContextManager[Any]:
    """``torch.autocast`` in ``dtype`` on the device of a batch; None: nothing."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(next(iter(batch.values())).device.type, dtype=dtype)


class Autocast:
    """While entered, ``torch.autocast`` casts meta tensors as it would cast those of ``device``.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._policies = {
            name: policy for policy, names in _LISTS[device].items() for name in names.split()
        }
        self._kept = WeakIdKeyDictionary()
        self._usual = torch.float16
        self._depth = 0
        self._registered = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        enter = self._stack.enter_context
        self._usual = torch.get_autocast_dtype(self.device)
        for device in {"cpu", self.device}:
            enter(_switched_off(device))
        cls: Any = torch.amp.autocast_mode.autocast
        for name, method in self._methods(cls).items():
            enter(replaced(cls, name, method))
        for name in ("scaled_dot_product_attention", "rms_norm"):
            enter(replaced(F, name, self._as_listed(name, getattr(F, name))))
        enter(_regions_on_meta())
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    # ------------------------------------------------------------------------ regions

    def _methods(self, cls: Any) -> dict[str, Callable[..., Any]]:
        """Methods of ``torch.autocast``: it keeps the state of the CPU, and ours follows."""
        make, enter, leave = cls.__init__, cls.__enter__, cls.__exit__

        def made(
            this: Any,
            device_type: str,
            dtype: torch.dtype | None = None,
            enabled: bool = True,
            cache_enabled: bool | None = None,
        ) -> None:
            # torch.utils.checkpoint keeps the CPU's state for backward, and none of meta tensors.
            kept = sys._getframe(1).f_globals.get("__name__") == "torch.utils.checkpoint"
            dtype, enabled = self._meant("meta" if kept else device_type, dtype, enabled)
            make(this, "cpu", dtype, enabled, cache_enabled)

        def entered(this: Any) -> Any:
            self._depth += 1
            enter(this)
            self._follow()
            return this

        def left(this: Any, *exception: Any) -> bool:
            self._depth -= 1
            if not self._depth:
                self._kept.clear()
            leave(this, *exception)
            self._follow()
            return False

        return {"__init__": made, "__enter__": entered, "__exit__": left}

    def _meant(
        self, device: str, dtype: torch.dtype | None, enabled: bool
    ) -> tuple[torch.dtype, bool]:
        if device not in ("meta", self.device):
            if enabled:
                raise NotPredictable(
                    f"the step runs under torch.autocast({device!r}), and is predicted for "
                    f"{self.device}"
                )
            return torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
        found = dtype or torch.get_autocast_dtype(self.device)
        if enabled and found not in HALF:
            raise NotPredictable(f"the step runs under torch.autocast in {found}, no half format")
        return found, enabled

    def _follow(self) -> None:
        """Have the dispatcher come by our kernels where a region is enabled, and only there."""
        on = torch.is_autocast_enabled("cpu")
        if on:
            self._register()
        torch._C._dispatch_tls_set_dispatch_key_included(_KEY, on)
        torch._C._dispatch_tls_set_dispatch_key_excluded(_KEY, not on)
        if self.device != "cpu":  # for libraries that ask whether there is a region
            torch.set_autocast_enabled(self.device, on)
            dtype = torch.get_autocast_dtype("cpu") if on else self._usual
            torch.set_autocast_dtype(self.device, dtype)

    # ------------------------------------------------------------------------ kernels

    def _register(self) -> None:
        if self._registered:
            return
        if not hasattr(Library, "fallback") or torch._C._dispatch_has_backend_fallback(_KEY):
            raise NotPredictable(
                "the step runs under torch.autocast, which is followed where torch.library takes "
                f"fallbacks for {_NAME} and nobody else has registered one; torch "
                f"{torch.__version__} here does not"
            )
        self._registered = True
        self._library("_").fallback(fallthrough_kernel, _NAME)
        libraries: dict[str, Library] = {}
        for listed in torch._C._dispatch_get_registrations_for_dispatch_key(_LAYERS[self.device]):
            space, _, name = listed.partition("::")
            if space not in libraries:
                libraries[space] = self._library(space)
            libraries[space].impl(name, self._kernel(space, name), _NAME)

    def _library(self, space: str) -> Library:
        library = Library(space, "IMPL")
        self._stack.callback(library._destroy)
        return library

    def _kernel(self, space: str, name: str) -> Callable[..., Any]:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(getattr(torch.ops, space), packet), overload or "default")
        policy = self._policies.get(name) if space == "aten" else None

        def kernel(*args: Any, **kwargs: Any) -> Any:
            if policy is None:
                raise NotPredictable(f"{op} under torch.autocast is not followed")
            with torch._C._ExcludeDispatchKeyGuard(_KEYS):
                if policy == "norm":
                    return self._norm(op, name, args)
                if policy == "result":
                    return op(*args, **self._with_format(op, args, kwargs))
                args, kwargs = self._cast(policy, args, kwargs)
                return op(*args, **kwargs)

        return kernel

    def _as_listed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that stands for a listed operator, and treats its arguments likewise."""
        policy = self._policies.get(name)
        if policy is None:
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_autocast_enabled("cpu"):
                return function(*args, **kwargs)
            with torch._C._ExcludeDispatchKeyGuard(_KEYS):
                args, kwargs = self._cast(policy, args, kwargs)
                return function(*args, **kwargs)

        return call

    # ------------------------------------------------------------------------ casts

    def _cast(self, policy: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        half = torch.get_autocast_dtype("cpu")
        wide = policy == "float32" or (
            policy == "widest" and torch.float32 in map(_format, tree_iter((args, kwargs)))
        )
        dtype = torch.float32 if wide else half

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return self._cast_one(tensor, dtype, half)

        found: tuple[Any, Any] = tree_map_only(torch.Tensor, cast, (args, kwargs))
        return found

    def _cast_one(
        self, tensor: torch.Tensor, dtype: torch.dtype, half: torch.dtype
    ) -> torch.Tensor:
        """``cached_cast`` of ``autocast_mode.cpp``."""
        if not _eligible(tensor) or tensor.dtype == dtype:
            return tensor
        weight = tensor.requires_grad and tensor.is_leaf and not tensor._is_view()
        single = dtype == half and tensor.dtype == torch.float32
        if not (weight and single and torch.is_autocast_cache_enabled()):
            return tensor.to(dtype)
        if tensor not in self._kept:
            self._kept[tensor] = tensor.to(dtype)
        kept: torch.Tensor = self._kept[tensor]
        return kept

    @staticmethod
    def _with_format(op: Any, args: _Args, kwargs: _Kwargs) -> dict[str, Any]:
        """Keyword arguments that ask for a float32 result, where nothing else was asked for."""
        names = [argument.name for argument in op._schema.arguments]
        place = names.index("dtype")
        given = kwargs.get("dtype") is not None or (len(args) > place and args[place] is not None)
        if given or not _eligible(args[0]):
            return dict(kwargs)
        return {**kwargs, "dtype": torch.float32}

    @staticmethod
    def _norm(op: Any, name: str, args: _Args) -> Any:
        if not _eligible(args[0]):
            return op(*args)
        filled = [*args, *(item.default_value for item in op._schema.arguments[len(args) :])]
        return getattr(torch.ops.aten.norm, _NORMS[name])(*filled, dtype=torch.float32)


def _eligible(item: Any) -> bool:
    """Whether autocast has a say on ``item``: floating point, and not double precision."""
    here = isinstance(item, torch.Tensor) and item.device.type == "meta"
    return here and item.is_floating_point() and item.dtype != torch.float64


def _format(item: Any) -> torch.dtype | None:
    return item.dtype if _eligible(item) else None


@contextmanager
def _switched_off(device: str) -> Iterator[None]:
    """The state of ``device``, whatever the trace leaves of it, as it was."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


@contextmanager
def _regions_on_meta() -> Iterator[None]:
    """Newer transformers open no region for meta tensors, not even one that switches autocast off.

    The function's code is exchanged, because the models have imported the function itself.
    """
    from transformers.utils import generic

    function: Any = getattr(generic, "maybe_autocast", None)
    if function is None:
        yield
        return
    original = function.__code__
    function.__code__ = _open_region.__code__
    try:
        yield
    finally:
        function.__code__ = original


def _open_region(
    device_type: str,
    dtype: torch.dtype | None = None,
    enabled: bool = True,
    cache_enabled: bool | None = None,
) -> Any:
    import torch  # where this code runs in the end, the name is not bound

    return torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)
