"""Perplexity drift against lm-eval run twice: time, peak memory, tokens, and the same values.

    python benchmarks/drift.py --documents 400

One Llama built in code (over 50M parameters, vocabulary 32,000) with a LoRA adapter on all linear
layers and the head, one text, float32 on CPU with one thread.  Every row runs in a process of its
own, so that peak memory is its own; the model is there before measuring starts.  Time is the
processor's, which on a quiet machine is wall time and on a shared one is not the neighbours'.

* lm-eval: ``loglikelihood_rolling`` of the adapted model, and again with the adapter disabled, at
  the batch sizes given; ratios are to the fastest.
* ours, full: every document; the cache empty, then with the base's likelihoods in it.
* ours, sequential: until the verdict is known, on a bound the adapter clearly fails, on one it
  clearly meets, and on one close to its drift.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import tokenizers
import torch
import transformers

from pytest_lora.adapter import read_adapter
from pytest_lora.checks.forgetting import measure_perplexity_drift
from pytest_lora.loading import quiet
from pytest_lora.nll_cache import NllCache
from pytest_lora.subject import BaseModel, Subject

VOCABULARY = 32_000
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SEQUENTIAL = ("fail", "pass", "close")


def base_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokenizer() -> Any:
    """One id per word."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{str(i): i for i in range(3, VOCABULARY)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def documents(count: int) -> list[str]:
    """Words at random, 20 to 400 a document, 85 in the middle."""
    draw = random.Random(0)
    lengths = [min(400, max(20, int(draw.lognormvariate(4.2, 0.7)))) for _ in range(count)]
    return [" ".join(str(draw.randrange(3, VOCABULARY)) for _ in range(n)) for n in lengths]


def write_adapter(folder: Path) -> None:
    """Rank 16, factors drawn so that the head's logits get a noise of about 2."""
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR)
    model = peft.get_peft_model(base_model(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.4 if "lm_head" in name else 0.02)
    model.save_pretrained(str(folder), save_embedding_layers=False)


# ------------------------------------------------------------------------------ one row


def peak() -> int:
    """The largest resident set since :func:`forget_peak`, in bytes."""
    line = next(row for row in STATUS.read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forget_peak() -> int:
    """Start measuring the peak anew; returns the resident set now."""
    CLEAR.write_text("5")
    return peak()


def warm_up(model: Any) -> None:
    """Libraries are read from disk, and make their plans, on the first forward."""
    with torch.inference_mode():
        model(input_ids=torch.arange(3, 35)[None])


def lm_eval_twice(folder: Path, texts: list[str], size: int) -> Callable[[], dict[str, Any]]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = peft.PeftModel.from_pretrained(base_model(), str(folder)).eval()
    known = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=size, device="cpu",
                 max_length=2048)  # fmt: skip
    warm_up(model)
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    tokens = sum(len(text.split()) for text in texts)

    def run() -> dict[str, Any]:
        adapted = known.loglikelihood_rolling(requests, disable_tqdm=True)
        with model.disable_adapter():
            base = known.loglikelihood_rolling(requests, disable_tqdm=True)
        drift = (sum(base) - sum(adapted)) / tokens
        return {"drift": drift, "tokens": 2 * tokens, "documents": len(texts)}

    return run


def ours(
    folder: Path, texts: list[str], cache: Path, bound: float | None
) -> Callable[[], dict[str, Any]]:
    base = BaseModel.from_module(base_model(), tokenizer=tokenizer())
    subject = Subject(read_adapter(folder), base)
    warm_up(subject.model)

    def run() -> dict[str, Any]:
        found = measure_perplexity_drift(
            subject, texts, max_drift=bound, cache=NllCache(cache), divergence=0, window=2048
        )
        [domain] = json.loads(json.dumps(found.details["domains"])).values()
        fresh = sum(domain["documents"]["all"] - n for n in (domain["from_cache"]["base"],))
        tokens = domain["tokens"]["seen"] + (domain["tokens"]["all"] if fresh else 0)
        return {"drift": found.value, "tokens": tokens, "documents": found.count}

    return run


def row(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder, texts = Path(options.folder) / "adapter", documents(options.documents)
    kind, _, argument = options.row.partition(" ")
    if kind == "lm-eval":
        run = lm_eval_twice(folder, texts, int(argument))
    else:
        bound = float(argument) if argument else None
        run = ours(folder, texts, Path(options.folder) / "cache", bound)
    start = forget_peak()
    work = time.process_time()
    found = run()
    return {**found, "seconds": time.process_time() - work, "extra": peak() - start}


# ------------------------------------------------------------------------------ the table


def measured(name: str, folder: Path, count: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--documents", str(count)]
    command += ["--folder", str(folder), "--row", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def forget(folder: Path, *, base: bool) -> None:
    """Empty the cache; without ``base``, of what is the adapter's."""
    for path in (folder / "cache").glob("*.nll"):
        first = path.open("rb").readline()
        if base or b'"of": "adapted"' in first:
            path.unlink()


def table(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        write_adapter(folder / "adapter")
        rows: dict[str, dict[str, Any]] = {}

        def run(title: str, name: str) -> dict[str, Any]:
            rows[title] = measured(name, folder, options.documents)
            print(f"{title}: {rows[title]}", file=sys.stderr, flush=True)
            return rows[title]

        sizes = [f"lm-eval {size}" for size in options.batch_sizes]
        peers = [run(f"lm-eval, batch size {name.split()[1]}", name) for name in sizes]
        drift = run("full, cold cache", "ours")["drift"]
        forget(folder, base=False)
        run("full, warm cache", "ours")
        bounds = {"fail": drift / 10, "pass": 4 * drift, "close": 0.98 * drift}
        for case in SEQUENTIAL:
            forget(folder, base=False)
            run(f"sequential, warm cache, {case}", f"ours {bounds[case]!r}")
        forget(folder, base=True)
        run("sequential, cold cache, fail", f"ours {bounds['fail']!r}")
        best = min(peers, key=lambda peer: float(peer["seconds"]))
        report(rows, best)
        apart = max(abs(peer["drift"] - drift) for peer in peers)
        print(f"\ndrift {drift:.7f} nats per token; lm-eval's differs by {apart:.1e}")


def report(rows: dict[str, dict[str, Any]], best: dict[str, Any]) -> None:
    print("| | documents | tokens evaluated | time | ratio | peak memory above the model | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for title, found in rows.items():
        extra, seconds = found["extra"] / 2**20, found["seconds"]
        print(
            f"| {title} | {found['documents']} | {found['tokens']:,} | {seconds:.1f} s"
            f" | {seconds / best['seconds']:.3f} | {extra:.0f} MiB"
            f" | {found['extra'] / best['extra']:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            found = row(options)
        print(json.dumps(found))
        return
    table(options)


if __name__ == "__main__":
    main()
