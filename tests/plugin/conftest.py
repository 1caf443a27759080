from __future__ import annotations

import contextlib

# A pytest run inside a test forgets the modules it imported when it ends.  Torch does not survive
# being imported a second time, so it has to be there before the first.
with contextlib.suppress(ImportError):
    import peft
    import torch
    import transformers

    del peft, torch, transformers
