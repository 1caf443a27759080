from __future__ import annotations

import contextlib

# A pytest run inside a test forgets the modules it imported when it ends.  Torch and datasets do
# not survive being imported a second time, so they have to be there before the first.
with contextlib.suppress(ImportError):
    import peft
    import torch
    import transformers

    import pytest_lora.assertions  # noqa: F401

    del peft, torch, transformers
with contextlib.suppress(ImportError):
    import datasets

    del datasets
