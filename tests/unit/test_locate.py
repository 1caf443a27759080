from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pytest_lora.errors import UsageError
from pytest_lora.locate import (
    CONFIG_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    AdapterLocation,
    locate_adapters,
    locate_all,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def adapter(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in files or (CONFIG_NAME, WEIGHTS_NAME):
        (folder / name).write_text("{}")
    return folder


def names(spec: str, start: Path) -> list[str]:
    return [location.name for location in locate_adapters(spec, start=start)]


def test_a_directory_is_an_adapter_under_its_relative_name(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapters" / "math-v3")
    for spec in (
        "adapters/math-v3",
        "./adapters/math-v3/",
        str(folder),
        "adapters/../adapters/math-v3",
    ):
        [found] = locate_adapters(spec, start=tmp_path)
        assert found == AdapterLocation(folder, None, "adapters/math-v3")


def test_outside_the_start_two_components_name_it(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a" / "b" / "c")
    (tmp_path / "here").mkdir()
    assert names(str(folder), tmp_path / "here") == ["b/c"]
    assert names("../a/b/c", tmp_path / "here") == ["b/c"]


def test_the_start_itself_may_be_the_adapter(tmp_path: Path) -> None:
    assert names(".", adapter(tmp_path / "mine")) == ["mine"]


def test_the_configuration_or_weights_may_be_named(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "x", CONFIG_NAME, WEIGHTS_NAME, "other.safetensors", PICKLE_NAME)
    plain = AdapterLocation(folder, None, "x")
    assert locate_adapters(f"x/{CONFIG_NAME}", start=tmp_path) == [plain]
    assert locate_adapters(f"x/{WEIGHTS_NAME}", start=tmp_path) == [plain]
    assert locate_adapters(f"x/{PICKLE_NAME}", start=tmp_path) == [plain]
    [other] = locate_adapters("x/other.safetensors", start=tmp_path)
    assert other == AdapterLocation(folder, folder / "other.safetensors", "x/other.safetensors")


def test_a_training_folder_gives_itself_and_its_checkpoints_in_order(tmp_path: Path) -> None:
    adapter(tmp_path / "out")
    for step in (1000, 20, 3):
        adapter(tmp_path / "out" / f"checkpoint-{step}")
    adapter(tmp_path / "out" / "checkpoint-5", "trainer_state.json")
    adapter(tmp_path / "out" / "final")
    steps = ["out/checkpoint-3", "out/checkpoint-20", "out/checkpoint-1000"]
    assert names("out", tmp_path) == ["out", *steps]
    (tmp_path / "out" / CONFIG_NAME).unlink()
    assert names("out", tmp_path) == steps


def test_an_adapter_that_lost_its_configuration_is_still_one(tmp_path: Path) -> None:
    for name in (WEIGHTS_NAME, PICKLE_NAME, "pytorch_lora_weights.safetensors"):
        adapter(tmp_path / name.replace(".", "-"), name)
        assert names(name.replace(".", "-"), tmp_path) == [name.replace(".", "-")]


def test_globs_take_what_is_an_adapter_in_natural_order(tmp_path: Path) -> None:
    for name in ("v10", "v9", "v1"):
        adapter(tmp_path / "all" / name)
    (tmp_path / "all" / "notes").mkdir()
    (tmp_path / "all" / "readme.md").write_text("")
    assert names("all/*", tmp_path) == ["all/v1", "all/v9", "all/v10"]
    assert names("**/v9", tmp_path) == ["all/v9"]
    assert names(f"all/*/{CONFIG_NAME}", tmp_path) == ["all/v1", "all/v9", "all/v10"]
    assert names("all/v[19]", tmp_path) == ["all/v1", "all/v9"]


def test_a_path_with_glob_characters_wins_over_the_glob(tmp_path: Path) -> None:
    adapter(tmp_path / "run[1]")
    adapter(tmp_path / "run1")
    assert names("run[1]", tmp_path) == ["run[1]"]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(tmp_path / "home" / "x")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert names("~/x", tmp_path / "home") == ["x"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "an empty adapter path"),
        ("nothing", "nothing exists at"),
        ("a/b/../c@", "no hub id of the form"),
        ("*.nothing", "the pattern matches 0 paths"),
        ("empt*", "the pattern matches 1 paths"),
        ("empty", "neither adapter_config.json nor adapter_model.safetensors there"),
        ("nested", "there is one in its folder 'second', give"),
        ("file.txt", "give its directory, its adapter_config.json or its weights file"),
        ("loop", "a symbolic link that leads nowhere"),
        ("x\0y", "nothing exists at"),
        ("x" * 5000, "nothing exists at"),
    ],
)
def test_what_is_no_adapter_says_what_was_looked_for(tmp_path: Path, spec: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    adapter(tmp_path / "nested" / "second")
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match=words.replace("*", r"\*")):
        locate_adapters(spec, start=tmp_path)


def test_an_unreadable_folder_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(tmp_path / "x")

    def refuse(_: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UsageError, match="Permission denied"):
        locate_adapters("x", start=tmp_path)


def test_each_adapter_comes_once_under_a_name_of_its_own(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name in ("one/run/final", "two/run/final", "two/run/last"):
        adapter(tmp_path / name)
    (tmp_path / "link").symlink_to("one")
    specs = ["../one/run/final", "../link/run/final", "../two/run/*", "../one/run/final"]
    found = locate_all(specs, start=here)
    assert [location.name for location in found] == ["one/run/final", "two/run/final", "run/last"]


def test_names_fall_back_to_the_whole_path(tmp_path: Path) -> None:
    one = adapter(Path(tmp_path / "a" / "x" / "y"))
    locations = [AdapterLocation(one, None, "x/y"), AdapterLocation(one, one / "w", "x/y")]
    from pytest_lora.locate import _with_distinct_names

    assert len({location.name for location in _with_distinct_names(locations)}) == 2
    hub = AdapterLocation(one, None, "o/n", "o/n", "abc")
    assert [x.name for x in _with_distinct_names([hub, hub])] == ["o/n@abc"] * 2
    same = AdapterLocation(one, None, "x/y")
    assert [x.name for x in _with_distinct_names([same, AdapterLocation(one, None, "x/y")])] == (
        [one.as_posix()] * 2
    )


def test_a_known_place_needs_no_search(tmp_path: Path) -> None:
    assert AdapterLocation.at(tmp_path / "x", start=tmp_path).name == "x"
    assert AdapterLocation.at(adapter(tmp_path / "y"), start=tmp_path).path == tmp_path / "y"


# ---------------------------------------------------------------------------------------- hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with ``org/name`` in it, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fill(root)
    return root


def fill(root: Path, commit: str = COMMIT) -> Path:
    repo = root / "models--org--name"
    snapshot = adapter(repo / "snapshots" / commit)
    adapter(snapshot / "sub" / "folder")
    adapter(snapshot / "docs", "notes.json")
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "refs" / "v1.0").write_text(commit)
    return snapshot


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT])
@pytest.mark.parametrize("subfolder", ["", "/sub/folder"])
def test_a_hub_id_is_read_from_the_cache(
    cache: Path, tmp_path: Path, revision: str | None, subfolder: str
) -> None:
    spec = f"org/name{subfolder}" + (f"@{revision}" if revision else "")
    [found] = locate_adapters(spec, start=tmp_path)
    snapshot = cache / "models--org--name" / "snapshots" / COMMIT
    assert found.path == snapshot / subfolder.strip("/")
    assert found.source == f"org/name{subfolder}"
    assert (found.name, found.revision) == (spec, COMMIT)


def test_a_local_path_wins_over_the_hub(cache: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "org" / "name")
    [found] = locate_adapters("org/name", start=tmp_path)
    assert (found.path, found.source) == (folder, None)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("org/other", "to fill the cache: hf download org/other --include"),
        ("org/name@v9", "hf download org/name --revision v9"),
        ("org/other/sub", 'hf download org/other --include "sub/'),
        ("org/name/nowhere", "no adapter_config.json in"),
        ("org/name/docs", "no adapter_config.json in"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_what_the_cache_lacks_is_one_line_with_the_remedy(
    tmp_path: Path, spec: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        locate_adapters(spec, start=tmp_path)
    assert "\n" not in str(caught.value)


def test_without_the_hub_client_the_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"pip install 'pytest-lora\[hub\]'"):
        locate_adapters("org/name", start=tmp_path)


class Online(ModuleType):
    """A hub client that is online and keeps a record."""

    def __init__(self, root: Path, files: list[str]) -> None:
        super().__init__("huggingface_hub")
        self.constants = SimpleNamespace(HF_HUB_OFFLINE=False)
        self.root, self.files = root, files
        self.asked: dict[str, Any] = {}

    def list_repo_files(self, repo: str, revision: str | None) -> list[str]:
        return self.files

    def snapshot_download(self, repo: str, **options: Any) -> str:
        self.asked = options
        folder = self.root / COMMIT
        for name in options["allow_patterns"]:
            adapter((folder / name).parent, (folder / name).name)
        return str(folder)


def online(monkeypatch: pytest.MonkeyPatch, root: Path, *files: str) -> Online:
    hub = Online(root, list(files))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def test_only_what_is_needed_comes_down_and_the_rest_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = (
        "handler.py",
        "checkpoint-1/adapter_model.safetensors",
        "model.safetensors",
        PICKLE_NAME,
    )
    kept = (CONFIG_NAME, WEIGHTS_NAME, "tokenizer.json", "README.md")
    hub = online(monkeypatch, tmp_path, *kept, *rest)
    [found] = locate_adapters("org/name@v1", start=tmp_path)
    assert set(hub.asked["allow_patterns"]) == set(kept)
    assert (hub.asked["revision"], hub.asked["local_files_only"]) == ("v1", False)
    assert set(found.listed) == set(rest)


def test_a_repository_without_an_adapter_names_the_folder_that_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch, tmp_path, "README.md", f"lora/{CONFIG_NAME}", "model.safetensors")
    with pytest.raises(UsageError, match="the repository has one in lora"):
        locate_adapters("org/name", start=tmp_path)


def test_a_failing_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = online(monkeypatch, tmp_path)

    def fail(*_: object, **__: object) -> list[str]:
        raise OSError("429 Too Many Requests\nfor url ...")

    monkeypatch.setattr(hub, "list_repo_files", fail)
    with pytest.raises(UsageError, match=r"OSError: 429 Too Many Requests\); to fill the cache"):
        locate_adapters("org/name", start=tmp_path)


def test_the_environment_is_honoured_in_a_fresh_process(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    snapshot = fill(tmp_path / "home" / "hub")
    code = (
        "from pathlib import Path; from pytest_lora.locate import locate_adapters; "
        "print(locate_adapters('org/name', start=Path.cwd())[0].path)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(snapshot)
