"""The tool `search`: the documents of a local corpus that fit a query best, by BM25.

The index is SQLite's FTS5, in memory. Its tokenizer splits documents and queries alike, at what is not a letter or a
digit, and ignores case and accents. With f the number of times that a word of the query occurs in title and text of a
document, D the words of both, A the mean of D, n the documents with the word and N all documents, the score is the sum
over the different words of

    max(log((N - n + 0.5) / (n + 0.5)), 1e-6) * 2.2 * f / (f + 1.2 * (0.25 + 0.75 * D / A))

Equal scores are in the order of the corpus.
"""

import dataclasses
import json
import pathlib
import sqlite3
import threading
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from elpo_jax.tools.base import State, Status, ToolResult

MAX_QUERY_CHARS = 1000
MAX_WORDS = 64  # different ones of a query
MAX_RESULTS = 20
SNIPPET_WORDS = 48
SNIPPET_CHARS = 400
TITLE_CHARS = 100


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One entry of a corpus.

    Attributes:
      id: Names it; unique.
      title: May be empty.
      text: Is not.
    """

    id: str
    title: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Hit:
    """A document that was found.

    Attributes:
      id: The document's.
      title: The document's.
      snippet: The part of its text with the most of the query, at most `SNIPPET_CHARS` long.
      score: BM25, not negative.
    """

    id: str
    title: str
    snippet: str
    score: float


class SearchError(ValueError):
    """A query is out of bounds; the message is for the model."""


def read_corpus(path: str | pathlib.Path) -> list[Document]:
    """Reads a corpus: a file of JSON lines in UTF-8, each an object with

        id     string or integer, unique
        title  string; may be missing
        text   string, not blank

    and whatever else, which is ignored. Blank lines are skipped.

    Raises:
      ValueError: If a line is something else (with its number), or there is none.
      OSError: If the file cannot be read.
    """
    documents: dict[str, Document] = {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                document = _document(json.loads(line.decode("utf-8")))
                if document.id in documents:
                    raise ValueError(f"the id {document.id!r} occurs twice")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            documents[document.id] = document
    if not documents:
        raise ValueError(f"{path} holds no document")
    return list(documents.values())


class Corpus:
    """An index of documents. Thread-safe; searches wait for each other.

    Raises:
      ValueError: If there is no document.
      RuntimeError: If this Python's SQLite has no FTS5.
    """

    def __init__(self, documents: Iterable[Document]):
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        try:
            self._database.execute("CREATE VIRTUAL TABLE documents USING fts5(id UNINDEXED, title, text)")
            # A query is indexed as well, to have it split as the documents were.
            self._database.execute("CREATE VIRTUAL TABLE queries USING fts5(text)")
            self._database.execute("CREATE VIRTUAL TABLE words USING fts5vocab(queries, instance)")
        except sqlite3.OperationalError as error:
            if "no such module" not in str(error):
                raise
            raise RuntimeError(
                f"SQLite {sqlite3.sqlite_version} of this Python was built without FTS5, which search needs: "
                "use a Python from python.org, conda or a Linux distribution"
            ) from None
        self._database.execute("BEGIN")
        rows = map(dataclasses.astuple, documents)
        self._database.executemany("INSERT INTO documents VALUES (?, ?, ?)", rows)
        self._database.execute("COMMIT")
        self._database.execute("INSERT INTO documents(documents) VALUES ('optimize')")
        if self._database.execute("SELECT count(*) FROM documents").fetchone() == (0,):
            raise ValueError("a corpus needs a document")

    def close(self) -> None:
        """Frees the index."""
        with self._lock:
            self._database.close()

    def search(self, query: str, top_k: int) -> list[Hit]:
        """The best documents with at least one word of the query, best first.

        Args:
          query: Words. Nothing in it is syntax.
          top_k: How many at most, in 1..`MAX_RESULTS`.

        Raises:
          SearchError: If the query is longer than `MAX_QUERY_CHARS` or has more than `MAX_WORDS` different words.
          ValueError: If `top_k` is out of bounds.
        """
        if not 1 <= top_k <= MAX_RESULTS:
            raise ValueError(f"top_k={top_k}: it must be between 1 and {MAX_RESULTS}")
        if len(query) > MAX_QUERY_CHARS:
            raise SearchError(f"the query is longer than {MAX_QUERY_CHARS} characters")
        with self._lock:
            words = self._words(query)
            if len(words) > MAX_WORDS:
                raise SearchError(f"the query has more than {MAX_WORDS} different words")
            if not words:
                return []
            match = " OR ".join('"' + word.replace('"', '""') + '"' for word in words)
            best = self._database.execute(
                "SELECT rowid, bm25(documents) AS cost FROM documents WHERE documents MATCH ? "
                "ORDER BY cost, rowid LIMIT ?",
                (match, top_k),
            ).fetchall()
            return [self._hit(match, rowid, -cost) for rowid, cost in best]

    def _words(self, query: str) -> list[str]:
        """The different words of a query, in its order, as the index has them."""
        # What is not valid Unicode is in no document. A null would end the text for SQLite.
        text = query.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")
        self._database.execute("INSERT INTO queries VALUES (?)", (text,))
        words = self._database.execute("SELECT term FROM words GROUP BY term ORDER BY min(offset)").fetchall()
        self._database.execute("DELETE FROM queries")
        return [word for (word,) in words]

    def _hit(self, match: str, rowid: int, score: float) -> Hit:
        name, title, snippet = self._database.execute(
            f"SELECT id, title, snippet(documents, 2, '', '', '...', {SNIPPET_WORDS}) "
            "FROM documents WHERE documents MATCH ? AND rowid = ?",
            (match, rowid),
        ).fetchone()
        return Hit(name, title, _line(snippet, SNIPPET_CHARS), score)


class Search:
    """The tool `search` (see `elpo_jax.tools.base.Tool`). It has no state.

    The answer has two lines per document: rank, title and id in brackets, and the part of the text that fits best. A
    query without words, or whose words are nowhere, is answered with status `empty`, one out of bounds with `error`.
    A call takes about a millisecond per thousand documents that have one of the words, in the thread that asks.

    Args:
      corpus: What to search.
      top_k: Results of a call that does not ask for a number.

    Raises:
      ValueError: If `top_k` is out of bounds.
    """

    name = "search"
    description = "Searches a collection of documents for words and returns the best matches, best first."
    in_process = True

    def __init__(self, corpus: Corpus, top_k: int = 5):
        if not 1 <= top_k <= MAX_RESULTS:
            raise ValueError(f"Search(top_k={top_k}): it must be between 1 and {MAX_RESULTS}")
        self._corpus = corpus
        self._top_k = top_k
        self.parameters: Mapping[str, Any] = MappingProxyType(
            {
                "type": "object",
                "properties": {
                    "query": {"type": "string"},
                    "top_k": {"type": "integer", "minimum": 1, "maximum": MAX_RESULTS},
                },
                "required": ["query"],
                "additionalProperties": False,
            }
        )

    def run(self, arguments: Mapping[str, Any], state: State | None) -> tuple[ToolResult, State | None]:
        try:
            hits = self._corpus.search(arguments["query"], int(arguments.get("top_k", self._top_k)))
        except SearchError as error:
            return ToolResult(Status.ERROR, f"Error: {error}", "query"), state
        if not hits:
            return ToolResult(Status.EMPTY, "(no results)"), state
        return ToolResult(Status.OK, "\n".join(_shown(rank, hit) for rank, hit in enumerate(hits, 1))), state


def _document(row: Any) -> Document:
    """A document from a row of a corpus; ValueError if it is none."""
    if not isinstance(row, dict):
        raise ValueError("it is not an object")
    name, title, text = row.get("id"), row.get("title", ""), row.get("text")
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise ValueError("id must be a string or an integer")
    if not isinstance(title, str):
        raise ValueError("title must be a string")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("text must be a string that is not blank")
    document = Document(str(name), title, text)
    "".join(dataclasses.astuple(document)).encode()  # a lone surrogate is a ValueError here
    return document


def _shown(rank: int, hit: Hit) -> str:
    return f"{rank}. {_line(hit.title, TITLE_CHARS)} [{_line(hit.id, TITLE_CHARS)}]\n{hit.snippet}"


def _line(text: str, length: int) -> str:
    """Text in one line, cut."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."
