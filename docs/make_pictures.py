"""Makes the pictures of README.md and of docs/memory.md.

python docs/make_pictures.py

Terminal pictures are drawn from the README's text, which docs/make_readme.py takes from a run.  The
report's are screenshots of one made here, which takes minutes and needs Chromium.  Memory over a
training step is drawn from a prediction.  ``--terminal`` and ``--memory`` draw those alone.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from chrome import browser  # noqa: E402  (needs the path above)

PICTURES = ROOT / "docs" / "pictures"
MEMORY = ROOT / "docs" / "memory-step.svg"
BLOCK = "gate"
"""The part of the README that the terminal picture shows."""
ADAPTERS = ("attention-lora", "dora", "overtrained")
FAILED = "details:has(> summary > .failed)"
WIDTH, HEIGHT = 1200, 1130
LETTER, LINE, EDGE, BAR = 8.43, 19, 18, 34
LOOKS = {
    "light": {
        "paper": "#ffffff",
        "bar": "#eef1f4",
        "rule": "#d9dee4",
        "ink": "#1a1d21",
        "bad": "#b3261e",
        "good": "#116329",
        "warn": "#7a4d00",
    },
    "dark": {
        "paper": "#171b1f",
        "bar": "#20262c",
        "rule": "#343c45",
        "ink": "#e6eaee",
        "bad": "#ff8a80",
        "good": "#5fcf7f",
        "warn": "#f0b64a",
    },
}
# As the terminal has it: rows by their verdict, the last line by whether something failed.
_COLOURS = (
    (re.compile(r"  \S+ +pass  |=+ .*\d passed.* in [\d.]+s.* =+"), "good"),
    (re.compile(r"  \S+ +(FAIL|ERROR)  |FAILED |=+ .*\d failed.* =+"), "bad"),
    (re.compile(r"  (\S+|\d+ checks) +skip  |SKIPPED "), "warn"),
)


def readme_block(name: str) -> str:
    """The text of a terminal that the README shows under that name."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(rf"<!-- {name} -->\n\n```text\n(.*?)\n```", text, re.DOTALL)
    assert match is not None, name
    return match[1]


def terminal_svg(text: str, look: str) -> str:
    """A window with ``text`` in it, coloured as a terminal has it."""
    colours, lines = LOOKS[look], text.splitlines()
    width = round(max(map(len, lines)) * LETTER + 2 * EDGE)
    height = BAR + EDGE + len(lines) * LINE + EDGE // 2
    dots = (
        f'<circle cx="{22 + 20 * i}" cy="17" r="6" fill="{colours["rule"]}"/>' for i in range(3)
    )
    body = (
        f'<text x="{EDGE}" y="{BAR + EDGE + i * LINE + 4}" fill="{colours[_colour(line)]}"'
        f' xml:space="preserve">{escape(line, quote=False)}</text>'
        for i, line in enumerate(lines)
    )
    frame = f'x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="9"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' font-family="ui-monospace, DejaVu Sans Mono, Menlo, Consolas, monospace"'
        f' font-size="14">',
        f'<rect {frame} fill="{colours["paper"]}" stroke="{colours["rule"]}"/>',
        f'<path d="M1 {BAR}H{width - 1}V10a9 9 0 0 0-9-9H10a9 9 0 0 0-9 9z"'
        f' fill="{colours["bar"]}"/>',
        *dots,
        *body,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _colour(line: str) -> str:
    """Of a failed run the last line is red, though it counts passes too."""
    found = [name for pattern, name in _COLOURS if pattern.match(line)]
    return "bad" if "bad" in found else found[0] if found else "ink"


def report(folder: Path) -> Path:
    """The report of all checks on three adapters, two sound and one that was trained too long."""
    path = folder / "report.html"
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", "lora"]
    words += ["--tb=no", "--lora-profile=fixtures/lora.toml", f"--lora-report={path}"]
    words += [f"--lora-adapter=fixtures/adapters/{name}" for name in ADAPTERS]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=False)
    assert path.exists(), "the run left no report"
    return path


def photograph(page: Path, folder: Path) -> None:
    """The first screen of the report, and the evidence of its worst check, in light and dark."""
    with browser(folder) as chromium:
        for look in LOOKS:
            chromium.open(page, width=WIDTH, height=HEIGHT, dark=look == "dark")
            chromium.picture(PICTURES / f"report-{look}.png")
            chromium.evaluate(f"document.querySelector('{FAILED}').scrollIntoView()")
            chromium.picture(PICTURES / f"evidence-{look}.png")


def draw_terminal() -> None:
    for look in LOOKS:
        svg = terminal_svg(readme_block(BLOCK), look)
        (PICTURES / f"terminal-{look}.svg").write_text(svg, encoding="utf-8")


def draw_memory() -> None:
    """A step of docs/examples/test_will_it_fit.py, one row, plain."""
    from peft import LoraConfig

    from pytest_lora.memory.plot import memory_svg
    from pytest_lora.memory.predict import predict_memory

    sys.path.insert(0, str(ROOT / "docs" / "examples"))
    from test_will_it_fit import EVERY, LLAMA_3_8B

    adapter = LoraConfig(r=16, target_modules=EVERY, task_type="CAUSAL_LM")
    found = predict_memory(LLAMA_3_8B, adapter, batch=1, sequence=1024, timeline=True)
    title = "Llama-3-8B, LoRA of rank 16, 1 x 1024 tokens, bfloat16: predicted"
    MEMORY.write_text(memory_svg(found.peak, title=title), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the pictures of the documentation.")
    parser.add_argument("--terminal", action="store_true", help="only those of the terminal")
    parser.add_argument("--memory", action="store_true", help="only that of a training step")
    given = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    if not given.memory:
        draw_terminal()
    if not given.terminal:
        draw_memory()
    if not (given.terminal or given.memory):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            photograph(report(folder), folder)


if __name__ == "__main__":
    main()
