"""Fills in what README.md shows of real runs: the terminals' texts and the list of checks.

python docs/make_readme.py

The picture of a terminal is drawn anew from its text.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from mutants import MUTANTS, make  # noqa: E402  (needs the path above)

from pytest_lora.catalog import CHECKS  # noqa: E402

COMMAND = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", "lora"]
ADAPTER = "fixtures/adapters/attention-lora"


def terminal(*arguments: str, shown: str) -> str:
    """What a run prints in a terminal of 100 columns, below the command as a person types it."""
    done = subprocess.run(
        [sys.executable, *COMMAND, *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if not _is_local(line)]
    return "\n".join([f"$ {shown}", *lines])


def _is_local(line: str) -> bool:
    """Lines that say more about the machine than about the run."""
    return line.startswith(("rootdir:", "plugins:", "platform "))


def sound() -> str:
    command = f"python -m pytest -m lora --lora-adapter={ADAPTER}"
    return terminal(f"--lora-adapter={ADAPTER}", shown=command)


def broken() -> str:
    """The summary alone, for an adapter whose lora_B is zero."""
    [mutant] = [mutant for mutant in MUTANTS if mutant.name == "zeroed_b"]
    folder = ROOT / "zeroed-adapter"
    with tempfile.TemporaryDirectory() as parent:
        made = make(mutant, ROOT / "fixtures" / "adapters", Path(parent) / folder.name)
        command = "python -m pytest -m lora --lora-adapter=zeroed-adapter"
        text = terminal(
            "--tb=no",
            f"--lora-adapter={made}",
            f"--lora-base-model={ROOT / 'fixtures' / 'base'}",
            shown=command,
        )
        text = text.replace(str(Path(parent)) + os.sep, "")
        text = text.replace(Path(parent).name + "/", "").replace(f"{ROOT}/", "")
    head, _, rest = text.partition("\n")
    return f"{head}\n{rest[rest.index('=', rest.index('LoRA adapters') - 60) :]}"


def gate() -> str:
    """The summary alone, for a sound adapter and the one that forgets, held to the profile."""
    words = ["--lora-profile=fixtures/lora.toml", "--lora-checks=perplexity_drift,task_accuracy"]
    words += [f"--lora-adapter=fixtures/adapters/{name}" for name in ("dora", "overtrained")]
    shown = " \\\n    ".join(["python -m pytest -m lora", *words])
    text = terminal("--tb=no", "--lora-no-cache", *words, shown=shown)
    head, _, rest = text.partition("overtrained\n")
    return f"{head}overtrained\n{rest[rest.index('=', rest.index('LoRA adapters') - 60) :]}"


def checks() -> str:
    rows = ["| check | asks | needs |", "| --- | --- | --- |"]
    rows += [
        f"| [`{spec.id}`](docs/checks/{spec.id}.md) | {spec.question} | {spec.need.label} |"
        for spec in CHECKS
    ]
    return "\n".join(rows)


def fill(text: str, name: str, content: str) -> str:
    pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    text = fill(text, "picture", f"\n```text\n{sound()}\n```\n")
    text = fill(text, "broken", f"\n```text\n{broken()}\n```\n")
    text = fill(text, "gate", f"\n```text\n{gate()}\n```\n")
    text = fill(text, "checks", f"\n{checks()}\n")
    path.write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, ROOT / "docs" / "make_pictures.py", "--terminal"], check=True)


if __name__ == "__main__":
    main()
