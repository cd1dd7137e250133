"""The tool `search`: an independent BM25 decides the ranking; no query is syntax, and none is too much."""

import itertools
import json
import math
import re
import sqlite3
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_jax.tools.base import Status, ToolCall
from elpo_jax.tools.search import (
    MAX_QUERY_CHARS,
    MAX_RESULTS,
    MAX_WORDS,
    SNIPPET_CHARS,
    TITLE_CHARS,
    Corpus,
    Document,
    Search,
    SearchError,
    read_corpus,
)
from elpo_jax.tools.toolbox import Request, ToolBox


def documents(*texts):
    return [Document(f"d{index}", title, text) for index, (title, text) in enumerate(texts)]


FARM = documents(
    ("Cows", "The cow gives milk. A cow eats grass."),
    ("Goats", "Goats give milk, too; cheese is made of milk."),
    ("Sheep", "Wool comes from sheep."),
    ("", "A résumé is written in NAÏVE words, e.g. by Łukasz in 東京."),
    ("Twins", "apples and pears"),
    ("Twins", "pears and apples"),
    ("Twins", "apples and pears"),
)


def found(corpus, query, top_k=MAX_RESULTS):
    return [hit.id for hit in corpus.search(query, top_k)]


# --- ranking


def reference(corpus, query):
    """Ids and scores, best first, from the formula, for words of ASCII letters."""
    texts = [re.findall("[a-z]+", f"{document.title} {document.text}".lower()) for document in corpus]
    lengths = np.array([len(text) for text in texts], dtype=np.float64)
    scores, hit = np.zeros(len(texts)), np.zeros(len(texts), bool)
    for word in dict.fromkeys(re.findall("[a-z]+", query.lower())):
        f = np.array([text.count(word) for text in texts], dtype=np.float64)
        n = np.count_nonzero(f)
        idf = math.log((len(texts) - n + 0.5) / (n + 0.5))
        idf = idf if idf > 0 else 1e-6
        scores += idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * lengths / lengths.mean()))
        hit |= f > 0
    order = np.lexsort((np.arange(len(texts)), -scores))
    return [(corpus[i].id, scores[i]) for i in order if hit[i]]


WORDS = "ash bay cat dog elm fig gum hen ivy jay kid lip map nut oak pig rye sun tea urn van wax yew zoo"


def test_the_ranking_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    words = WORDS.split()
    weights = 1 / np.arange(1, len(words) + 1)

    def draw(most):
        return " ".join(rng.choice(words, rng.integers(1, most), p=weights / weights.sum()))

    corpus = documents(*((draw(4), draw(60)) for _ in range(300)))
    index = Corpus(corpus)
    compared = 0
    for _ in range(200):
        query = draw(8)
        wanted = reference(corpus, query)
        hits = index.search(query, MAX_RESULTS)
        assert len(hits) == min(MAX_RESULTS, len(wanted))
        scores = [hit.score for hit in hits]
        np.testing.assert_allclose(scores, [score for _, score in wanted[: len(hits)]], rtol=1e-9)
        known = dict(wanted)
        for hit in hits:
            assert math.isclose(hit.score, known[hit.id], rel_tol=1e-9)
        gaps = [abs(a[1] - b[1]) > 1e-9 for a, b in itertools.pairwise(wanted)]
        if all(gaps[: len(hits)]):  # else rounding may decide between two that are as good
            assert [hit.id for hit in hits] == [name for name, _ in wanted[: len(hits)]]
            compared += 1
    assert compared > 50


def test_equal_scores_are_in_the_order_of_the_corpus():
    corpus = Corpus(FARM)
    assert (
        found(corpus, "apples") == found(corpus, "pears") == found(corpus, "twins pears apples") == ["d4", "d5", "d6"]
    )
    assert found(corpus, "apples", 2) == ["d4", "d5"]
    many = documents(*[("same", "words here")] * 200)
    assert found(Corpus(many), "words") == [f"d{n}" for n in range(MAX_RESULTS)]
    assert found(Corpus(many[::-1]), "words") == [f"d{n}" for n in range(199, 199 - MAX_RESULTS, -1)]
    assert found(Corpus(many), "words here same words same") == found(Corpus(many), "here")


def test_rare_words_and_short_documents_come_first():
    corpus = Corpus(FARM)
    assert found(corpus, "cow milk") == ["d0", "d1"]
    assert found(corpus, "milk") == ["d1", "d0"]
    assert found(corpus, "cheese milk") == ["d1", "d0"]
    assert found(corpus, "Sheep") == ["d2"]  # in title and text
    assert all(hit.score > 0 for hit in corpus.search("and a is the milk", 20))


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("RÉSUMÉ", ["d3"]),
        ("resume", ["d3"]),
        ("re\u0301sume\u0301", ["d3"]),
        ("naive", ["d3"]),
        ("łukasz", ["d3"]),
        ("東京", ["d3"]),
        ("東", []),
        ("milk🎈grass", ["d0", "d1"]),
        ("e.g.", ["d3"]),
        ("\u202emilk\u200b", ["d1", "d0"]),
        ("ＭＩＬＫ", []),
        ("cow's", ["d0"]),
        ("grass-cheese_wool", ["d2", "d0", "d1"]),
    ],
)
def test_words_are_split_and_folded_as_in_the_documents(query, ids):
    assert sorted(found(Corpus(FARM), query)) == sorted(ids)


# --- hostile queries


@pytest.mark.parametrize(
    "query",
    [
        '"milk',
        'milk"',
        '""milk""',
        "'milk'; DROP TABLE documents; --",
        "NEAR(milk, 5)",
        "milk*",
        "^milk",
        "text:milk",
        "title : milk",
        "{title text} : milk",
        "-text:milk",
        "(milk",
        "milk)",
        "milk + milk",
        "AND milk OR",
        "NOT milk",
        "milk\0wool",
        "\0milk",
        "milk\ud800",
        "%milk_",
        "\\milk",
        "milk\nmilk\tmilk",
        "documents MATCH milk",
        "rank milk",
        "[milk] `milk` $milk @milk ?1 :milk",
    ],
)
def test_nothing_in_a_query_is_syntax(query):
    corpus = Corpus(FARM)
    assert found(corpus, query)[:1] in (["d1"], ["d2"])
    assert {"d0", "d1"} <= set(found(corpus, query))
    assert found(corpus, "milk") == ["d1", "d0"]  # and it is all still there


def test_operators_are_words():
    corpus = Corpus(documents(("", "near and not"), ("", "milk or wool"), ("", "other"), ("", "things")))
    assert found(corpus, "NOT") == found(corpus, "NEAR") == ["d0"]
    assert set(found(corpus, "milk NOT wool")) == {"d0", "d1"}
    assert found(corpus, "mil*") == found(corpus, "il") == []


@pytest.mark.parametrize(
    "query", ["", " \n\t", "🎈", "...", '"', "*", "()", "\0", "\ud800", "zebra", "milkk", "-", "NEAR()"]
)
def test_no_word_or_no_document_is_empty(query):
    result, state = Search(Corpus(FARM)).run({"query": query}, 5)
    assert (result.status, result.text, state) == (Status.EMPTY, "(no results)", 5)


def test_long_queries_are_refused_at_once():
    tool = Search(Corpus(FARM))
    words = " ".join(f"w{n}" for n in range(MAX_WORDS))
    for query in ("a" * (MAX_QUERY_CHARS + 1), "milk " * 200_000, "(" * 1_000_000, words + " one"):
        began = time.process_time()
        result, _ = tool.run({"query": query}, None)
        assert result.status is Status.ERROR and result.detail == "query" and len(result.text) < 100
        assert time.process_time() - began < 0.2
    for query in ("x " * (MAX_QUERY_CHARS // 2), words, "a" * MAX_QUERY_CHARS):
        assert tool.run({"query": query}, None)[0].status is Status.EMPTY
    assert found(Corpus(FARM), "milk " * (MAX_QUERY_CHARS // 5)) == ["d1", "d0"]
    with pytest.raises(SearchError):
        Corpus(FARM).search("a" * 9999, 1)


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=50) | st.text(alphabet='milk"*^:(){}+-NEAROT ,\0', max_size=50), st.integers(1, MAX_RESULTS))
def test_any_query_is_answered(query, top_k):
    result, _ = Search(CORPUS).run({"query": query, "top_k": top_k}, None)
    assert result.status in (Status.OK, Status.EMPTY) or (result.status is Status.ERROR and result.detail == "query")
    result.text.encode()


CORPUS = Corpus(FARM)


# --- the answer


def test_the_answer_has_rank_title_id_and_snippet():
    result, state = Search(Corpus(FARM)).run({"query": "milk cow", "top_k": 2}, None)
    assert state is None and result.status is Status.OK
    assert result.text == (
        "1. Cows [d0]\nThe cow gives milk. A cow eats grass.\n"
        "2. Goats [d1]\nGoats give milk, too; cheese is made of milk."
    )


def test_titles_and_snippets_are_cut_around_the_words():
    long = " ".join(f"word{n}" for n in range(5000))
    corpus = Corpus(
        documents(("T" * 500 + "\nx", f"{long} needle\n\n{long}"), ("", "x" * 100_000 + " needle"), ("other", "thing"))
    )
    result, _ = Search(corpus, top_k=20).run({"query": "needle"}, None)
    assert len(result.text) < 2 * (SNIPPET_CHARS + TITLE_CHARS + 20) and result.text.count("\n") == 3
    assert "word4999 needle word0" in result.text
    assert all(len(hit.snippet) <= SNIPPET_CHARS for hit in corpus.search("needle", 5))


def test_top_k_bounds():
    many = Corpus(documents(*[("", f"milk {n}") for n in range(50)]))
    tool = Search(many, top_k=3)
    for arguments, count in (({}, 3), ({"top_k": 1}, 1), ({"top_k": MAX_RESULTS}, MAX_RESULTS)):
        assert tool.run({"query": "milk", **arguments}, None)[0].text.count("milk") == count
    with ToolBox([tool]) as box:
        for wrong in (0, -1, MAX_RESULTS + 1, 10**30, 1.5, "3", True, None):
            call = ToolCall("search", {"query": "milk", "top_k": wrong})
            assert box.submit(Request(call)).result()[0].status is Status.MALFORMED, wrong
        whole = box.submit(Request(ToolCall("search", {"query": "milk", "top_k": 2.0}))).result()[0]
        assert whole.text.count("milk") == 2  # JSON schema counts 2.0 among the integers
    for wrong in (0, MAX_RESULTS + 1):
        with pytest.raises(ValueError, match="top_k"):
            Search(many, top_k=wrong)
        with pytest.raises(ValueError, match="top_k"):
            many.search("milk", wrong)


def test_many_threads_search_at_once():
    corpus = Corpus(documents(*[("", f"milk w{n % 17} x{n % 5}") for n in range(2000)]))
    queries = [f"w{n % 17} x{n % 5}" for n in range(85)]
    wanted = [corpus.search(query, 5) for query in queries]
    results = [None] * 8

    def work(place):
        results[place] = [corpus.search(query, 5) for query in queries]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [wanted] * 8


def test_a_closed_corpus_raises():
    corpus = Corpus(FARM)
    corpus.close()
    with pytest.raises(sqlite3.ProgrammingError):
        corpus.search("milk", 1)


# --- files


def test_a_corpus_is_read_from_json_lines(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [
        {"id": "a", "title": "Cows", "text": "milk\u2028and grass", "url": "ignored"},
        {"id": 7, "text": "no title: 東京"},
    ]
    path.write_bytes("\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + b"\n\n")
    corpus = read_corpus(path)
    assert corpus == [Document("a", "Cows", "milk\u2028and grass"), Document("7", "", "no title: 東京")]
    assert found(Corpus(corpus), "grass") == ["a"] and found(Corpus(corpus), "東京") == ["7"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "Expecting property name"),
        (b"not json", "Expecting value"),
        (b"[1]", "not an object"),
        (b'"text"', "not an object"),
        (b'{"text": "x"}', "id must be"),
        (b'{"id": "", "text": "x"}', "id must be"),
        (b'{"id": true, "text": "x"}', "id must be"),
        (b'{"id": 1.5, "text": "x"}', "id must be"),
        (b'{"id": "b"}', "text must be"),
        (b'{"id": "b", "text": " \\n"}', "text must be"),
        (b'{"id": "b", "text": 3}', "text must be"),
        (b'{"id": "b", "text": "x", "title": null}', "title must be"),
        (b'{"id": "a", "text": "x"}', "'a' occurs twice"),
        (b'{"id": "b", "text": "\\ud800"}', "surrogates not allowed"),
        (b'{"id": "b", "text": "\xff"}', "invalid start byte"),
        (b'{"id": "b", "text": ' + b"[" * 100_000, ""),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, message):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"id": "a", "text": "fine"}\n\n' + line + b'\n{"id": "z", "text": "fine"}\n')
    with pytest.raises(ValueError, match=f"corpus.jsonl, line 3: .*{message}"):
        read_corpus(path)


def test_a_corpus_needs_a_document(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no document"):
        read_corpus(path)
    with pytest.raises(ValueError, match="needs a document"):
        Corpus([])
    with pytest.raises(FileNotFoundError):
        read_corpus(tmp_path / "none.jsonl")


def test_without_fts5_it_says_so(monkeypatch):
    class Without(sqlite3.Connection):
        """A connection of a SQLite that was built without FTS5."""

        def execute(self, sql, *rest):
            return super().execute(sql.replace("USING fts5", "USING no_fts5"), *rest)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, factory=Without, **kwargs))
    with pytest.raises(RuntimeError, match="without FTS5"):
        Corpus(FARM)
