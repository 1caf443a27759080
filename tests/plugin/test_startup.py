"""A run that does not use us must not feel us."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from adapter_maker import write_adapter

HEAVY = ("torch", "numpy", "transformers", "peft", "safetensors", "hypothesis", "huggingface_hub")
MOST_MODULES = 15

COUNT = """
import sys
import pytest
arguments = ["-q", "-p", "no:cacheprovider", *sys.argv[1:], "test_nothing.py"]
assert pytest.main(arguments) == 0
print("MODULES", *sorted(sys.modules))
"""


def modules_of(folder: Path, *arguments: str) -> set[str]:
    (folder / "test_nothing.py").write_text("def test_nothing(): pass\n")
    (folder / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [sys.executable, "-c", COUNT, *arguments],
        cwd=folder,
        env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split("MODULES", 1)[1].split())


def test_an_idle_plugin_adds_few_modules_and_none_that_is_heavy(tmp_path: Path) -> None:
    without = modules_of(tmp_path)
    added = modules_of(tmp_path, "-p", "pytest_lora.plugin") - without
    assert "pytest_lora.plugin" in added
    assert not [name for name in added if name.split(".")[0] in HEAVY]
    assert len(added) <= MOST_MODULES, sorted(added)


def test_an_idle_plugin_prints_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-W",
            "error",
            "--strict-config",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if not line.startswith("plugins:")]
    assert "lora" not in "\n".join(lines).lower().replace(str(tmp_path).lower(), "")


def test_importing_the_package_imports_none_of_its_parts() -> None:
    code = (
        "import sys, pytest_lora; print(*[n for n in sys.modules if n.startswith('pytest_lora')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pytest_lora"]


def test_the_file_checks_import_nothing_heavy(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter")
    loaded = modules_of(
        tmp_path, "-p", "pytest_lora.plugin", "--lora-adapter=adapter", "--lora-checks=files"
    )
    assert "pytest_lora.checks.files" in loaded
    assert not [name for name in loaded if name.split(".")[0] in set(HEAVY) - {"safetensors"}]
