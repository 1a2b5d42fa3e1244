"""Text out of bytes, against Python's own decoder and its ``str.find``, for every way to cut the bytes."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from tensortier.textstream import TextStream

SHORT = st.text(st.sampled_from("abcé€😀\n"), max_size=12)
STOPS = st.lists(st.text(st.sampled_from("abcé€😀\n"), min_size=1, max_size=4), max_size=3)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """``data`` in pieces of those sizes, and the rest."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(data[start : start + size])
        start += size
    return [*pieces, data[start:]]


def run(pieces: list[bytes], stops: list[str]) -> tuple[list[str], TextStream]:
    stream = TextStream(stops)
    texts = []
    for piece in pieces:
        texts.append(stream.feed(piece))
        if stream.stopped:
            break
    texts.append(stream.finish())
    return texts, stream


def expected(text: str, stops: list[str]) -> str:
    """Up to the stop string that is complete first, by growing the text one character at a time."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


@given(SHORT, STOPS, st.lists(st.integers(0, 5), max_size=12))
@example("aab", ["ab"], [1, 1])
@example("abc", ["c", "abc"], [])
@example("😀", ["a"], [1, 1, 1])
def test_all_cuts_give_the_same(text: str, stops: list[str], sizes: list[int]) -> None:
    texts, stream = run(cut(text.encode(), sizes), stops)
    assert "".join(texts) == expected(text, stops)
    assert stream.given == len(expected(text, stops))
    assert stream.stopped == any(stop in text for stop in stops)


@given(SHORT, STOPS, st.lists(st.integers(0, 5), max_size=12))
def test_nothing_of_a_stop_string_leaks(text: str, stops: list[str], sizes: list[int]) -> None:
    """At no moment is more given out than stays."""
    final = expected(text, stops)
    stream = TextStream(stops)
    given_out = ""
    for piece in cut(text.encode(), sizes):
        given_out += stream.feed(piece)
        assert final.startswith(given_out)
        # and no more is held back than a stop string could need
        if not stream.stopped:
            assert stream.seen - stream.given < max(map(len, stops), default=1)


@given(st.binary(max_size=20), st.lists(st.integers(0, 5), max_size=12))
def test_bytes_that_are_no_text_are_left_out(data: bytes, sizes: list[int]) -> None:
    texts, _ = run(cut(data, sizes), [])
    assert "".join(texts) == data.decode("utf-8", errors="ignore")


def test_an_empty_stop_string_stops_nothing() -> None:
    texts, _ = run([b"abc"], ["", "x"])
    assert "".join(texts) == "abc"
