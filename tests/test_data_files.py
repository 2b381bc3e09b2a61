"""From files to tokens: documents, token files, the command; what is damaged, missing or foreign is named."""

import gzip
import hashlib
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from jaxfw.core.errors import InputError, RunError
from jaxfw.data import (
    Corpus,
    Document,
    Packed,
    encode_documents,
    find_documents,
    open_tokens,
    prepare,
    read_corpus,
    save_tokenizer,
    stdlib_docstrings,
    train_bpe,
    vocabulary_fingerprint,
    write_tokens,
)
from jaxfw.data.__main__ import FAILED, OK, UNUSABLE, main

TEXTS = stdlib_docstrings(most=60)
TOKENIZER = train_bpe(TEXTS, vocab_size=400)
DOCUMENTS = [Document([5, 6, 7], [0, 1, 1]), Document([70_000], [1]), Document([8, 9], [0, 0])]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same texts in every kind of file, a conversation, and a tokenizer."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("files")
    lines = "".join(json.dumps({"text": text, "number": i}) + "\n" for i, text in enumerate(TEXTS))
    (folder / "lines.jsonl").write_text(lines)
    (folder / "list.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = datasets.Dataset.from_dict({"text": TEXTS})
    table.to_parquet(folder / "table.parquet")
    table.to_csv(folder / "table.csv")
    (folder / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / "texts" / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    (folder / "texts" / ".hidden.txt").write_text("not this")
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairwise(TEXTS)]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    save_tokenizer(folder / "tokenizer", TOKENIZER)
    return folder


@pytest.mark.parametrize(
    "name", ["lines.jsonl", "list.json", "packed.jsonl.gz", "table.parquet", "table.csv", "texts", "texts/*.txt"]
)
def test_every_kind_of_file_gives_the_same_documents(files, name):
    found = find_documents(files / name)
    assert list(found) == TEXTS and list(found) == TEXTS, "and again from the start"


def test_several_files_come_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}1"}}\n{{"text": "{name}2"}}\n')
    assert list(find_documents(tmp_path)) == ["a1", "a2", "b1", "b2", "c1", "c2"]


def test_a_text_gets_what_the_tokenizer_puts_around_it_and_its_end():
    (document,) = encode_documents(["hello"], TOKENIZER)
    assert list(document.tokens) == [
        TOKENIZER.bos_id,
        *TOKENIZER.encode("hello", add_special_tokens=False),
        TOKENIZER.eos_id,
    ]
    no_end = train_bpe(TEXTS, vocab_size=400, special_tokens={"bos_token": "<s>"})
    (document,) = encode_documents(["hello"], no_end)
    assert list(document.tokens) == no_end.encode("hello")


@pytest.mark.parametrize("is_weighted", [True, False])
def test_a_folder_of_tokens_is_the_corpus_in_memory(tmp_path, is_weighted):
    documents = DOCUMENTS if is_weighted else [Document(document.tokens) for document in DOCUMENTS]
    held = Corpus.of(documents, vocab_size=70_001, tokenizer="mark")
    mapped = open_tokens(write_tokens(tmp_path / "tokens", iter(documents), vocab_size=70_001, tokenizer="mark"))
    assert isinstance(mapped.tokens, np.memmap) and mapped.tokens.dtype == np.uint32
    for name in ("tokens", "starts", "ends", "weights"):
        np.testing.assert_array_equal(getattr(mapped, name), getattr(held, name))
    assert (mapped.vocab_size, mapped.tokenizer) == (70_001, "mark")
    assert mapped.fingerprint == held.fingerprint
    assert Packed(mapped, 2, 4).describe() == Packed(held, 2, 4).describe()


def test_its_layout_is_what_the_page_says(tmp_path):
    folder = write_tokens(tmp_path / "t", [Document([1, 2, 3], [0, 1, 1]), Document([4], [1])], vocab_size=65_536)
    assert {path.name for path in folder.iterdir()} == {"tokens.bin", "ends.npy", "weights.bin", "meta.json"}
    assert np.fromfile(folder / "tokens.bin", "<u2").tolist() == [1, 2, 3, 4]
    assert np.load(folder / "ends.npy").tolist() == [3, 4]
    assert (folder / "weights.bin").read_bytes() == b"\0\1\1\1"
    for name, found in json.loads((folder / "meta.json").read_text())["sha256"].items():
        assert found == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_many_documents_are_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxfw.data.token_file.AT_ONCE", 7)
    documents = [np.arange(1 + i % 5) for i in range(40)]
    mapped = open_tokens(write_tokens(tmp_path / "t", map(Document, documents), vocab_size=9))
    np.testing.assert_array_equal(mapped.tokens, np.concatenate(documents))
    assert main(["verify", str(tmp_path / "t")]) == OK


def test_nothing_is_left_of_a_folder_that_failed(tmp_path):
    def documents():
        yield Document([1])
        raise InputError("row 1")

    with pytest.raises(InputError, match="row 1"):
        write_tokens(tmp_path / "t", documents(), vocab_size=9)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxfw.data.token_file.os.fsync", full)
    with pytest.raises(RunError, match=r"cannot be written .*No space left"):
        write_tokens(tmp_path / "t", [Document([1])], vocab_size=9)
    assert not list(tmp_path.iterdir())


def damage(folder: Path, name: str, act) -> None:
    if act is None:
        (folder / name).unlink()
    elif callable(act):
        (folder / name).write_bytes(act((folder / name).read_bytes()))
    else:
        meta = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(meta | act))


DAMAGE = {
    "truncated": ("tokens.bin", lambda x: x[:-1], "tokens.bin has 23 bytes, not 24 as meta.json says: it is truncated"),
    "too long": ("weights.bin", lambda x: x + b"1", "not of this set"),
    "no tokens": ("tokens.bin", None, "tokens.bin is missing"),
    "no weights": ("weights.bin", None, "weights.bin is missing"),
    "other ends": ("ends.npy", lambda x: x[:-1] + b"1", "ends.npy is not what meta.json describes"),
    "no meta": ("meta.json", None, "holds no meta.json"),
    "no JSON": ("meta.json", lambda x: x[:-9], "does not describe a folder of tokens"),
    "foreign": ("meta.json", lambda x: b'{"name": "x"}', "does not describe a folder of tokens"),
    "newer": ("meta.json", {"version": 2}, "version 2; known: 'jaxfw tokens' version 1"),
    "a dtype": ("meta.json", {"dtype": "float64"}, "dtype is missing or out of range"),
    "a count": ("meta.json", {"tokens": -1}, "tokens is missing or out of range"),
    "counts that disagree": ("meta.json", {"documents": 2}, "disagree about the documents"),
}


@pytest.mark.parametrize("name, act, message", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused_by_name(tmp_path, name, act, message):
    folder = write_tokens(tmp_path / "t", DOCUMENTS, vocab_size=70_001)
    damage(folder, name, act)
    with pytest.raises(InputError, match=message):
        open_tokens(folder)


def test_verify_finds_one_changed_byte(tmp_path, capsys):
    folder = write_tokens(tmp_path / "t", DOCUMENTS, vocab_size=70_001)
    assert main(["verify", str(folder)]) == OK
    damage(folder, "tokens.bin", lambda x: b"\1" + x[1:])
    open_tokens(folder)
    assert main(["verify", str(folder)]) == FAILED
    assert "FAILED tokens.bin: its sha256 is" in capsys.readouterr().out


def test_prepared_files_are_read_as_the_documents_are(files, tmp_path, capsys):
    assert main(["prepare", f"--input={files / 'lines.jsonl'}", f"--tokenizer={files / 'tokenizer'}",
                 f"--output={tmp_path / 't'}"]) == OK  # fmt: skip
    assert "60 documents" in (said := capsys.readouterr().out) and "each document ends with <|end_of_text|>" in said
    mapped, held = (read_corpus(source, TOKENIZER) for source in (tmp_path / "t", files / "texts"))
    assert mapped.fingerprint == held.fingerprint and mapped.tokenizer == vocabulary_fingerprint(TOKENIZER)
    text = TOKENIZER.decode(mapped.document(7).tokens)
    assert text == TEXTS[7]
    assert main(["inspect", str(tmp_path / "t")]) == OK
    assert "padding" in (said := capsys.readouterr().out) and "60" in said and "lines.jsonl" in said


def test_prepared_conversations_have_weights(files, tmp_path, capsys):
    assert main(["prepare", f"--input={files / 'chat.jsonl'}", f"--tokenizer={files / 'tokenizer'}",
                 f"--output={tmp_path / 't'}", "--chat"]) == OK  # fmt: skip
    corpus = read_corpus(tmp_path / "t", TOKENIZER, chat=True)
    tokens, weights = corpus.document(3)
    assert TOKENIZER.decode(tokens[weights == 1], skip_special_tokens=False) == TEXTS[4].strip() + "<|end_of_text|>"
    assert main(["inspect", str(tmp_path / "t")]) == OK
    assert "trained on" in capsys.readouterr().out


def test_what_is_empty_or_silent_is_left_out_and_counted(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": null}\n{"text": "b"}\n')
    assert str(prepare(tmp_path / "a.jsonl", TOKENIZER, tmp_path / "t")) == "2 empty"
    turn = {"role": "user", "content": "Hi"}
    rows = [[turn], [turn, {"role": "assistant", "content": "Yes?"}]]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"chat": row}) + "\n" for row in rows))
    left_out = prepare(tmp_path / "c.jsonl", TOKENIZER, tmp_path / "u", column="chat", chat=True)
    assert str(left_out) == "1 without an assistant's turn"
    assert len(open_tokens(tmp_path / "u")) == 1


def write(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name


WRONG = {
    "not there": (lambda at: "nothing.jsonl", {}, "'nothing.jsonl' is not there"),
    "no match": (lambda at: str(at / "*.jsonl"), {}, "matches no file"),
    "an empty folder": (lambda at: at, {}, "holds no file that is known"),
    "a folder of others": (lambda at: write(at, "a.pdf", b"").parent, {}, "it has a.pdf"),
    "another kind": (lambda at: write(at, "a.pdf", b""), {}, "files of this kind are not read"),
    "several kinds": (
        lambda at: (write(at, "a.txt", b"x"), write(at, "b.jsonl", b"{}"))[0].parent, {}, "files of several kinds",
    ),
    "not UTF-8": (lambda at: write(at, "a.txt", b"ab\xff"), {}, r"not UTF-8 \(byte 2\)"),
    "no JSON": (lambda at: write(at, "a.jsonl", b'{"text": "a"}\n{"text'), {}, "cannot be read: .*JSON"),
    "no parquet": (lambda at: write(at, "a.parquet", b"hello"), {}, "cannot be read: .*Parquet"),
    "a column": (
        lambda at: write(at, "a.jsonl", b'{"text": "a", "id": 1}'), {"column": "txt"},
        "column='txt' is unknown. Known: text, id. Did you mean 'text'",
    ),
    "no text": (lambda at: write(at, "a.jsonl", b'{"text": 3}'), {}, "document 0 is 3, not a text"),
    "a conversation as text": (
        lambda at: write(at, "a.jsonl", b'{"text": [{"role": "user", "content": "a"}]}'), {}, "read with chat",
    ),
    "a text as conversation": (
        lambda at: write(at, "a.jsonl", b'{"text": "a"}'), {"chat": True},
        "conversation 0: messages='a' must be a list",
    ),
    "the Hub without a network": (lambda at: "owner/stories", {}, "is no file or folder here, and as a data set"),
    "nothing but empty": (lambda at: write(at, "a.txt", b""), {}, "no documents"),
    "another vocabulary": (
        lambda at: write_tokens(at / "t", [Document([1])], vocab_size=9, tokenizer="x"), {}, "another vocabulary",
    ),
    "tokens without weights": (
        lambda at: write_tokens(at / "t", [Document([1])], vocab_size=9), {"chat": True},
        "prepare it again with --chat",
    ),
}  # fmt: skip


@pytest.mark.parametrize("source, options, message", WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(tmp_path, monkeypatch, source, options, message):
    pytest.importorskip("datasets")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.invalid")
    monkeypatch.setattr("jaxfw.data.documents.getproxies", dict)
    with pytest.raises(InputError, match=message):
        read_corpus(source(tmp_path), TOKENIZER, **options)


def test_without_the_library_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[data\]'"):
        list(find_documents(write(tmp_path, "a.jsonl", b"{}")))
    assert list(find_documents(write(tmp_path, "a.txt", b"text"))) == ["text"]


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    save_tokenizer(tmp_path / "tokenizer", TOKENIZER)
    write(tmp_path, "a.txt", b"text")
    given = [f"--input={tmp_path / 'a.txt'}", f"--tokenizer={tmp_path / 'tokenizer'}", f"--output={tmp_path / 'used'}"]
    for argv, message in (
        (["prepare", *given], "used exists and is not empty"),
        (["prepare", *given[:2]], "--output. See --help"),
        (["prepare", *given, "--colum=x"], "--colum=x. See --help"),
        (["inspect", str(tmp_path / "used")], "holds no meta.json"),
        (["pack"], "invalid choice: 'pack'"),
    ):
        assert main(argv) == UNUSABLE
        assert message in capsys.readouterr().err
    assert main(["--help"]) == OK and main([]) == UNUSABLE


def test_the_module_runs(tmp_path):
    folder = write_tokens(tmp_path / "t", DOCUMENTS, vocab_size=70_001)
    done = subprocess.run(
        [sys.executable, "-m", "jaxfw.data", "inspect", folder], capture_output=True, text=True, check=True
    )
    assert "70,001 tokens" in done.stdout
