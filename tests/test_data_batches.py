"""Every source of batches: functions of the step, rows as slices of the whole, each token as often as it should be."""

import dataclasses
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfw.core.config import changed_fields
from jaxfw.core.errors import InputError
from jaxfw.data import Corpus, Document, Mixture, Packed, Procedural, RandomWindows, Recall, Repeated, Windows
from jaxfw.data.packing import best_fit

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=25)


def corpus(lengths, *, weights=None):
    """Documents in which every token is another: its place in the stream."""
    begins = np.cumsum([0, *lengths])
    arrays = [np.arange(a, b) for a, b in pairwise(begins)]
    return Corpus.of([Document(x, None if weights is None else weights[x]) for x in arrays])


MASKED = corpus([9, 3, 14, 2, 6, 11], weights=np.arange(45) % 3 != 0)
SOURCES = {
    "random windows": lambda batch=4, seed=0: RandomWindows(MASKED, batch, 8, seed),
    "windows": lambda batch=4, seed=0: Windows(MASKED, batch, 8, seed),
    "packed": lambda batch=4, seed=0: Packed(MASKED, batch, 8, seed),
    "a selection": lambda batch=4, seed=0: Windows(MASKED.split(3)[0], batch, 8, seed),
    "procedural": lambda batch=4, seed=0: Procedural(Repeated(50, (2, 5)), batch, 8, seed),
    "mixture": lambda batch=4, seed=0: Mixture(
        (Packed(MASKED, 3, 8, seed), Windows(MASKED, 5, 8, seed)), (0.3, 0.7), batch
    ),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_a_batch_is_a_function_of_the_step_and_rows_are_slices_of_it(make):
    source, wanted = make(), {}
    for step in range(1, 8):
        batch = wanted[step] = source(step)
        assert {x.shape for x in batch.values()} == {(4, 9)} == {(source.batch, source.length + 1)}
        dtypes = {"tokens": np.int32, "segment_ids": np.int32, "weights": np.float32}
        assert all(x.dtype == dtypes[name] for name, x in batch.items()) and "tokens" in batch
    again = make()
    for step in (6, 2, 7, 1, 7):  # in any order, and in pieces
        for rows in (range(0, 1), range(1, 4), range(0, 4), range(3, 4)):
            part = again(step, rows)
            assert part.keys() == wanted[step].keys()
            for name, x in part.items():
                np.testing.assert_array_equal(x, wanted[step][name][rows.start : rows.stop])
    other = make(seed=1)
    assert any((other(step)["tokens"] != wanted[step]["tokens"]).any() for step in wanted)


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_what_it_says_is_json_and_names_what_changed(make):
    said = make().describe()
    assert json.loads(json.dumps(said)) == said == make().describe()
    assert changed_fields(said, make(batch=8).describe())[0].startswith("batch")
    assert changed_fields(said, make(seed=3).describe())


def test_the_fingerprint_follows_the_content():
    def mark(lengths=(4, 5), weights=None):
        return corpus(lengths, weights=weights).fingerprint

    ones = np.ones(9, np.uint8)
    marks = [mark(), mark((5, 4)), mark((4, 4)), mark(weights=ones), mark(weights=ones - np.eye(9, dtype=np.uint8)[3])]
    whole = corpus((4, 5))
    marks += [whole.select([1, 0]).fingerprint, whole.select([0]).fingerprint, whole.cut(3).fingerprint]
    assert len(set(marks)) == len(marks) and mark() == marks[0]
    assert whole.select([0, 1]).fingerprint == whole.fingerprint


@given(LENGTHS, st.integers(1, 5), st.integers(1, 12), st.integers(0, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_windows_predict_each_token_once_an_epoch_up_to_a_rest(lengths, batch, length, seed, is_selected):
    source = corpus(lengths)
    source = source.select(np.arange(len(source))[::-1]) if is_selected else source
    stream = np.concatenate([source.document(i).tokens for i in range(len(source))])
    if source.size <= length:
        with pytest.raises(InputError, match="lower length"):
            Windows(source, batch, length, seed)
        return
    windows = Windows(source, batch, length, seed)
    place = {int(token): i for i, token in enumerate(stream)}
    rows = np.concatenate([windows(step)["tokens"] for step in range(1, 2 + 2 * windows.rows_per_epoch // batch)])
    for epoch in range(2):
        mine = rows[epoch * windows.rows_per_epoch : (epoch + 1) * windows.rows_per_epoch]
        for row in mine:
            np.testing.assert_array_equal(row, stream[place[int(row[0])] :][: length + 1])
        predicted = Counter(mine[:, 1:].ravel().tolist())
        assert set(predicted.values()) <= {1} and len(stream) - 1 - len(predicted) < length


def test_the_rest_of_an_epoch_falls_at_other_places():
    windows = Windows(np.arange(16), 1, 8)
    assert len({int(windows(step)["tokens"][0, 0]) for step in range(1, 40)}) == 8


def test_the_first_token_of_a_piece_is_nothing_to_train_on():
    source = corpus([3, 3], weights=np.array([1, 0, 0, 0, 0, 1]))
    assert Packed(source, 1, 9)(1)["tokens"][0].tolist() == [3, 4, 5, 0, 0, 0, 0, 0, 0, 0]


def predictions(row):
    """Pairs of tokens that the contract of a batch lets count."""
    segments, weights = row["segment_ids"], row.get("weights", np.ones(len(row["tokens"])))
    counts = (segments[1:] == segments[:-1]) & (segments[1:] > 0) & (weights[1:] > 0)
    return zip(row["tokens"][:-1][counts].tolist(), row["tokens"][1:][counts].tolist())


@given(LENGTHS, st.integers(1, 5), st.integers(1, 12), st.integers(0, 3), st.data())
@settings(max_examples=80, deadline=None)
def test_packing_predicts_each_token_of_each_document_once_an_epoch(lengths, batch, length, seed, data):
    total = sum(lengths)
    weights = data.draw(st.none() | st.lists(st.integers(0, 1), min_size=total, max_size=total))
    source = corpus(lengths, weights=None if weights is None else np.array(weights))
    begins = np.cumsum([0, *lengths])
    wanted = Counter(
        (token - 1, token)
        for a, b in pairwise(begins)
        for token in range(a + 1, b)
        if weights is None or weights[token]
    )
    if not wanted:
        with pytest.raises(InputError, match=r"none of the .* has a token to predict"):
            Packed(source, batch, length, seed)
        return
    packed = Packed(source, batch, length, seed)
    epochs, rows = 3, packed.rows_per_epoch
    steps = [packed(step) for step in range(1, 2 + epochs * rows // batch)]
    found = [{name: x[i] for name, x in step.items()} for step in steps for i in range(batch)]
    for epoch in range(epochs):  # whose borders lie inside batches
        mine = found[epoch * rows : (epoch + 1) * rows]
        assert Counter(pair for row in mine for pair in predictions(row)) == wanted
        empty = sum(int((row["segment_ids"] == 0).sum()) for row in mine)
        assert packed.padding == pytest.approx(empty / (rows * (length + 1)))
    for row in found:
        segments = row["segment_ids"]
        used = int((segments > 0).sum())
        assert (segments[used:] == 0).all() and (row["tokens"][used:] == 0).all(), "padding is at the end"
        assert segments[0] == 1 and set(np.diff(segments[:used]).tolist()) <= {0, 1}, "numbered from the left"
        for segment in range(1, segments.max() + 1):
            assert set(np.diff(row["tokens"][segments == segment]).tolist()) <= {1}, "a piece of one document"


@given(st.lists(st.integers(2, 12), min_size=1, max_size=60))
@settings(deadline=None)
def test_best_fit_chooses_the_fullest_row_that_has_room(sizes):
    sizes = sorted(sizes, reverse=True)
    used: list[int] = []
    for size, row in zip(sizes, best_fit(np.array(sizes), 12).tolist()):
        room = [12 - full for full in used if 12 - full >= size]
        if not room:
            assert row == len(used)
            used.append(0)
        else:
            assert 12 - used[row] == min(room)
        used[row] += size
    assert len(used) <= 11 / 9 * -(-sum(sizes) // 12) + 1 + sum(size * 2 > 12 for size in sizes)


def test_an_order_of_its_own_for_each_epoch():
    packed, windows = Packed(corpus([5] * 40), 8, 9), Windows(np.arange(400), 8, 9)
    for source in (packed, windows):
        epochs = [
            np.concatenate([source(1 + step)["tokens"] for step in range(epoch * 5, epoch * 5 + 2)]) for epoch in (0, 1)
        ]
        assert not np.array_equal(*epochs)
    partners = [{frozenset(row[[0, 5]].tolist()) for s in (1, 2) for row in packed(s + at)["tokens"]} for at in (0, 5)]
    assert len(partners[0] & partners[1]) < 8, "documents of a length change their neighbours"


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_a_mixture_keeps_its_shares_and_skips_nothing(shares):
    sources = tuple(Windows(np.arange(50) + 100 * i, 2, 3) for i in range(len(shares)))
    mixture = Mixture(sources, shares, 7)
    seen = [0] * len(shares)
    for number in range(120):
        which, row = mixture.place(number)
        assert row == seen[which]
        seen[which] += 1
        for count, share in zip(seen, shares):
            assert abs(count - (number + 1) * share / sum(shares)) < len(shares) + 0.1
    rows = np.concatenate([mixture(step)["tokens"] for step in (1, 2)])
    own = {i: [row for row in rows if row[0] // 100 == i] for i in range(len(shares))}
    for i, source in enumerate(sources):
        for number, row in enumerate(own[i]):
            np.testing.assert_array_equal(row, source(1 + number // 2)["tokens"][number % 2])


def test_a_mixture_gives_the_same_arrays_whoever_fills_it():
    mixture = Mixture((Packed(MASKED, 1, 8), Windows(np.arange(100, 199), 1, 8)), (1, 3), 1)
    batches = [mixture(step) for step in range(1, 9)]
    assert {tuple(batch) for batch in batches} == {("segment_ids", "tokens", "weights")}
    plain = [batch for batch in batches if batch["tokens"].min() >= 100]
    assert len(plain) == 6 and all((batch[name] == 1).all() for batch in plain for name in ("segment_ids", "weights"))


def test_repetitions_can_be_predicted_and_first_sayings_are_not_trained_on():
    batch = Procedural(Repeated(1000, (3, 7), times=3), 16, 40)(5)
    tokens, segments, weights = batch["tokens"], batch["segment_ids"], batch["weights"]
    for row, segment in ((r, s) for r in range(16) for s in range(1, segments[r].max() + 1)):
        said, trained = (x[row][segments[row] == segment] for x in (tokens, weights))
        period = int(trained.argmax()) if trained.any() else len(said)
        assert 3 <= period <= 7 or len(said) < 7, "cut at the row's end"
        np.testing.assert_array_equal(said[period:], said[: len(said) - period])
        assert trained[period:].all()


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 3), st.integers(0, 3), st.integers(1, 3))
def test_recalled_values_are_the_last_of_their_keys(seed, keys, prefix, gap, size):
    source = Recall(50, 60, keys=(keys, keys), prefix=(prefix,) * 2, gap=(gap,) * 2, value=(size,) * 2)
    tokens, weights = source(np.random.default_rng(seed))
    assert len(tokens) == len(weights) == 60
    held, step = {}, prefix + 1 + gap + size
    for begin in range(0, 60 - step + 1, step):
        said, trained = tokens[begin : begin + step].tolist(), weights[begin : begin + step]
        assert said[:prefix] == tokens[:prefix].tolist() and not trained[: step - size].any()
        key, value = said[prefix], said[-size:]
        assert not trained.any() or (trained[-size:].all() and held[key] == value)
        held[key] = value
    assert len(held) <= keys


def test_every_row_of_every_step_is_made_anew():
    source = Procedural(Repeated(1000), 8, 30)
    assert len({row.tobytes() for step in range(1, 6) for row in source(step)["tokens"]}) == 40


def test_a_changed_generator_is_noticed():
    def make(low):
        def generate(rng):
            return rng.integers(low, 9, 5), None

        return Procedural(generate, 2, 16).describe()

    assert changed_fields(make(0), make(1)) and not changed_fields(make(0), make(0))


@given(LENGTHS, st.integers(2, 9))
@settings(deadline=None)
def test_cut_keeps_every_token(lengths, longest):
    source = corpus(lengths)
    cut = source.cut(longest)
    assert cut.size == source.size and cut.lengths.max() <= longest + 1
    np.testing.assert_array_equal(cut.read(0, cut.size)[0], np.arange(source.size))
    assert set(source.ends.tolist()) <= set(cut.ends.tolist())
    assert cut.lengths.min() >= 2 or min(lengths) == 1


@given(LENGTHS, st.integers(0, 9), st.data())
@settings(deadline=None)
def test_read_is_the_stream(lengths, seed, data):
    rng = np.random.default_rng(seed)
    source = corpus(lengths, weights=rng.integers(0, 2, sum(lengths)))
    which = rng.permutation(len(source))[: max(1, len(source) // 2)]
    for some in (source, source.select(which)):
        first = data.draw(st.integers(0, some.size - 1))
        last = data.draw(st.integers(first + 1, some.size))
        tokens, weights = some.read(first, last)
        documents = [some.document(i) for i in range(len(some))]
        np.testing.assert_array_equal(tokens, np.concatenate([d.tokens for d in documents])[first:last])
        np.testing.assert_array_equal(weights, np.concatenate([d.weights for d in documents])[first:last])


def test_every_nth_document_is_held_out():
    trained, held_out = corpus([2] * 7).split(3)
    assert (held_out.starts // 2).tolist() == [2, 5] and (trained.starts // 2).tolist() == [0, 1, 3, 4, 6]


class Faulty:
    def __init__(self, made):
        self.made = made

    def __call__(self, rng):
        return self.made


WRONG = {
    "no documents": (lambda: Corpus.of([]), "corpus of no documents"),
    "an empty document": (lambda: Corpus.of([[1], []]), "document 1 is"),
    "no numbers": (lambda: Corpus.of([[0.5]]), "document 0 is"),
    "beyond the vocabulary": (lambda: Corpus.of([[1], [9]], vocab_size=9), "document 1 holds the token id 9"),
    "negative": (lambda: Corpus.of([[-1]]), "token id -1"),
    "weights of another length": (lambda: Corpus.of([Document([1, 2], [1])]), "0 or 1 for each of its 2 tokens"),
    "weights that are no mask": (lambda: Corpus.of([Document([1], [3])]), "must be 0 or 1"),
    "weights of some": (lambda: Corpus.of([Document([1]), Document([1], [1])]), "document 1 has weights"),
    "too few to hold out": (lambda: corpus([9]).split(5), "every 5-th of 1 document leaves none"),
    "cut to nothing": (lambda: corpus([9]).cut(1), "longest=1 must be at least 2"),
    "batch": (lambda: Packed(MASKED, 0, 8), "batch=0 must be a whole number of at least 1"),
    "length": (lambda: Windows(MASKED, 2, 0), "length=0"),
    "seed": (lambda: RandomWindows(MASKED, 2, 4, -1), "seed=-1"),
    "step": (lambda: Packed(MASKED, 2, 8)(0), "step=0: steps are numbered from 1"),
    "rows": (lambda: Packed(MASKED, 2, 8)(1, range(1, 3)), r"rows=range\(1, 3\) must be a range"),
    "shares": (lambda: Mixture((SOURCES["packed"](),), (1, 2), 2), "1 sources and 2 shares"),
    "a share of nothing": (lambda: Mixture((SOURCES["packed"](), SOURCES["windows"]()), (1, 0), 2), "must be positive"),
    "lengths": (lambda: Mixture((Packed(MASKED, 2, 8), Packed(MASKED, 2, 9)), (1, 1), 2), r"lengths \[8, 9\]"),
    "no pair": (lambda: Procedural(Faulty([1, 2]), 1, 4)(1), r"give \(tokens, weights\)"),
    "no tokens": (lambda: Procedural(Faulty(([], None)), 1, 4)(1), "at least one whole number"),
    "one weight": (lambda: Procedural(Faulty(([1, 2], [1.0])), 1, 4)(1), "one each"),
    "one token to repeat": (lambda: Repeated(1), "vocab_size=1"),
    "periods": (lambda: Repeated(9, (4, 2)), r"period=\(4, 2\)"),
    "too few different": (lambda: Repeated(9, least_distinct=1), "least_distinct=1 must be from 2 to vocab_size=9"),
    "no key": (lambda: Recall(9, 9, keys=(0, 2)), r"keys=\(0, 2\) must be .* 1 <= least"),
    "more keys than tokens": (lambda: Recall(9, 9, keys=(2, 12)), "vocab_size=9 must hold keys=12"),
    "nothing asked for": (lambda: Recall(90, 9, renewed=1.0), "renewed=1.0 must be from 0 to below 1"),
    "no length": (lambda: Recall(90, 0), "length=0 must be at least 1"),
    "said once": (lambda: Repeated(9, times=1), "times=1"),
}  # fmt: skip


@pytest.mark.parametrize("act, message", WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(act, message):
    with pytest.raises(InputError, match=message):
        act()


def test_sources_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SOURCES["packed"]().batch = 3
