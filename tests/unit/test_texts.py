"""Documents from files: what counts as one, what is refused, and that memory stays flat."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_lora.errors import UsageError
from pytest_lora.tasks import texts
from pytest_lora.tasks.texts import Texts, open_texts

STORIES = ["One hen.\nTwo hens.", "A dog — barks.", "  indented"]


def plain(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    lines = [json.dumps({"id": i, field: text}) for i, text in enumerate(documents)]
    return plain(path, "\n".join(lines) + "\n")


def parquet(path: Path, documents: list[str | None], field: str = "text") -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"id": list(range(len(documents))), field: documents})
    pq.write_table(table, path, row_group_size=2)
    return path


def dataset(path: Path, documents: list[str], field: str = "text", shards: int = 2) -> Path:
    """What ``Dataset.save_to_disk`` writes, without ``datasets``."""
    pa = pytest.importorskip("pyarrow")
    path.mkdir(parents=True)
    names = []
    for number in range(shards):
        table = pa.table({field: documents[number::shards]})
        names.append(f"data-{number:05}-of-{shards:05}.arrow")
        with (
            pa.OSFile(str(path / names[-1]), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names]}
    (path / "state.json").write_text(json.dumps(state))
    return path


def open_one(kind: str, folder: Path) -> Texts:
    if kind == "strings":
        return open_texts(STORIES)
    if kind == "txt":
        return open_texts(plain(folder / "a.txt", "\n\n\n".join(STORIES) + "\n"))
    if kind == "parquet":
        return open_texts(parquet(folder / "a.parquet", list(STORIES)))
    if kind == "dataset":
        return open_texts(dataset(folder / "a", STORIES, shards=1))
    return open_texts(jsonl(folder / "a.jsonl", STORIES))


@pytest.mark.parametrize("kind", ["strings", "txt", "jsonl", "parquet", "dataset"])
def test_every_format_gives_the_same_documents_and_the_same_digest(
    kind: str, tmp_path: Path
) -> None:
    found = open_one(kind, tmp_path)
    assert list(found) == STORIES
    assert [found[2], found[-3], found[1]] == [STORIES[2], STORIES[0], STORIES[1]]
    assert found[1:] == STORIES[1:]
    assert found.digest == open_texts(STORIES).digest
    with pytest.raises(IndexError):
        found[3]


def test_the_digest_is_that_of_the_documents_and_their_borders() -> None:
    digests = {open_texts(documents).digest for documents in (["ab"], ["a", "b"], ["b", "a"])}
    assert len(digests) == 3


def test_plain_text_is_cut_as_asked(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\r\n \r\nthree\r\n")
    assert list(open_texts(path)) == ["one\ntwo", "three"]
    assert list(open_texts(path, documents="lines")) == ["one", "two", "three"]
    assert list(open_texts(path, documents="file")) == ["one\ntwo\n\n \nthree\n"]
    found = open_texts(path, documents="lines")
    assert [found.label(i) for i in range(3)] == ["a.txt:1", "a.txt:2", "a.txt:5"]


def test_a_split_of_several_is_chosen_by_name(tmp_path: Path) -> None:
    for name in ("train", "test"):
        dataset(tmp_path / "both" / name, [f"a {name} text", "b"])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert list(open_texts(tmp_path / "both", split="test")) == ["a test text", "b"]
    with pytest.raises(UsageError, match=r"say which split .there: train, test"):
        open_texts(tmp_path / "both")
    with pytest.raises(UsageError, match=r"no split 'tset' .* .did you mean 'test'"):
        open_texts(tmp_path / "both", split="tset")


def test_what_datasets_itself_writes_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    written = datasets.Dataset.from_dict({"text": STORIES})
    written.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"only": written}).save_to_disk(str(tmp_path / "many"))
    assert list(open_texts(tmp_path / "one")) == list(open_texts(tmp_path / "many")) == STORIES


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (
        lambda d: (plain(d / "heldout.jsonl", "{}"), open_texts(d / "heldot.jsonl")),
        r"heldot.jsonl: there is no such file .did you mean 'heldout.jsonl'",
    ),
    "a suffix": (lambda d: open_texts(plain(d / "a.csv", "x")), r"a.csv: texts are read from .txt"),
    "empty": (lambda d: open_texts(plain(d / "a.jsonl", "\n\n")), r"a.jsonl: no document in it"),
    "empty text": (lambda d: open_texts(plain(d / "a.txt", " \n")), r"a.txt: no document in it"),
    "no strings": (lambda d: open_texts([]), r"texts: no document in it"),
    "not a string": (
        lambda d: open_texts(["a", 3]),  # type: ignore[list-item]
        r"texts\[1\] is of type int, where a string was expected",
    ),
    "bad JSON": (
        lambda d: open_texts(plain(d / "a.jsonl", '{"text": "a"}\n{"text": \n')),
        r"a.jsonl:2: not JSON: .* at column",
    ),
    "nested JSON": (
        lambda d: open_texts(plain(d / "a.jsonl", "[" * 200_000 + "\n")),
        r"a.jsonl:1: (JSON that cannot be read|not JSON)",
    ),
    "no object": (
        lambda d: open_texts(plain(d / "a.jsonl", "[1]\n")),
        r"a.jsonl:1: a JSON list where an object was expected",
    ),
    "no field": (
        lambda d: open_texts(plain(d / "a.jsonl", '\n{"texts": "a", "id": 1}\n')),
        r"a.jsonl:2: no field 'text' .there: id, texts. .did you mean 'texts'",
    ),
    "no text": (
        lambda d: open_texts(plain(d / "a.jsonl", '{"text": null}\n')),
        r"a.jsonl:1: 'text' is of type NoneType, not a string",
    ),
    "half a pair": (
        lambda d: open_texts(plain(d / "a.jsonl", '{"text": "\\ud800"}\n')),
        r"a.jsonl:1: half of a surrogate pair",
    ),
    "not UTF-8": (
        lambda d: open_texts(plain(d / "a.txt", b"good\nb\xe4d\n")),
        r"a.txt:2: not UTF-8 .byte 0xe4.; convert the file",
    ),
    "documents": (
        lambda d: open_texts(plain(d / "a.txt", "x"), documents="line"),
        r"documents='line' is none of paragraphs, lines, file",
    ),
    "a folder": (lambda d: open_texts(d), r"one written by save_to_disk, with a state.json"),
    "no column": (
        lambda d: open_texts(parquet(d / "a.parquet", ["a"], field="body")),
        r"a.parquet: no field 'text' .there: body, id",
    ),
    "a null": (
        lambda d: open_texts(parquet(d / "a.parquet", ["a", "b", None])),
        r"a.parquet, row 3: null where a string was expected",
    ),
    "no Parquet": (
        lambda d: (
            pytest.importorskip("pyarrow"),
            open_texts(plain(d / "a.parquet", b"PAR1 and no more PAR1")),
        ),
        r"a.parquet: no readable Parquet file",
    ),
    "no Arrow": (
        lambda d: (plain(dataset(d / "a", ["a"], shards=1) / ARROW, b"x"), open_texts(d / "a")),
        r"no readable Arrow file",
    ),
    "a file elsewhere": (
        lambda d: (
            plain(d / "secret.arrow", ""),
            dataset(d / "a", ["a"]),
            plain(d / "a/state.json", '{"_data_files": [{"filename": "../secret.arrow"}]}'),
            open_texts(d / "a"),
        ),
        r"state.json: the data file '../secret.arrow' is not beside it",
    ),
    "a broken state": (
        lambda d: (plain(dataset(d / "a", ["a"]) / "state.json", "{"), open_texts(d / "a")),
        r"state.json: not JSON",
    ),
}
ARROW = "data-00000-of-00001.arrow"


@pytest.mark.parametrize("case", BAD)
def test_one_line_says_what_is_wrong_and_where(case: str, tmp_path: Path) -> None:
    attempt, message = BAD[case]
    with pytest.raises(UsageError, match=message) as caught:
        attempt(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_pyarrow_one_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"takes pyarrow; install it, or give the texts as .jsonl"):
        open_texts(plain(tmp_path / "a.parquet", "x"))


@pytest.mark.parametrize("documents", ["lines", "paragraphs", "file"])
def test_a_document_too_large_for_memory_is_refused(
    documents: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "LARGEST_DOCUMENT", 1 << 20)
    line = "x" * 600_000 + ("" if documents == "lines" else "\n")
    path = plain(tmp_path / "a.txt", "short\n\n" + line + line)
    expected = r"a.txt:1" if documents == "file" else r"a.txt:3"
    with pytest.raises(UsageError, match=rf"{expected}: a document of more than 1 MiB; split it"):
        open_texts(path, documents=documents)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_large_file_is_not_read_into_memory(suffix: str, tmp_path: Path) -> None:
    """24 MiB of documents, of which at no time more than one is held."""
    path = tmp_path / f"a.{suffix}"
    document = "many words " * 200
    line = document if suffix == "txt" else json.dumps({"text": document})
    with path.open("w") as stream:
        stream.writelines(f"{line}\n" for _ in range(11_000))
    tracemalloc.start()
    found = open_texts(path, documents="lines")
    total = sum(len(text) for text in found)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 11_000 * len(document) > 24_000_000
    assert peak < 1_500_000


def test_collections_that_are_open_stay_as_they_are() -> None:
    found = open_texts(STORIES, name="stories")
    assert open_texts(found) is found
    assert found.name == "stories"
    assert found.label(2) == "stories[2]"
