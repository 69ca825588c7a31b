"""Leaves out copies (the same file) and near copies (the same picture), keeping the first of each.

Near copies are found as in SD3, App. E.2, Algorithm 1: embed every picture, divide the vectors into
clusters, and in each cluster drop whatever lies within a threshold of a picture that is kept. FAISS
does the range search where it is installed (pip install 'mmdit-jax[dedup]'), numpy does otherwise;
both find the same pairs. Two near copies in different clusters are not found: fewer clusters find
more and take longer.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.job import Job, complete
from data_pipelines.progress import Progress
from data_pipelines.samples import Dropped
from data_pipelines.stages.embeddings import Embedding
from data_pipelines.stages.pictures import Checked, Picture, Pictures
from data_pipelines.write import partial_path, write_json
from mmdit_jax.data.manifest import Bucket

BLOCK = 4096  # pictures in one note of embeddings
BATCH = 256  # pictures that an embedding function gets at once
QUERIES = 256  # rows that are compared with a whole cluster at once
PER_CLUSTER = 20_000  # vectors in a cluster if the number of clusters is not given
TRAINING = 40  # vectors per cluster that k-means learns from, as FAISS advises
ITERATIONS = 10
SLACK = 1e-4  # a similarity this close to the threshold is computed again, exactly


class Kept(NamedTuple):
    """The samples to keep, in their order, and the others."""

    items: list[Checked]
    dropped: list[Dropped]


def drop_copies(items: Sequence[Checked]) -> Kept:
    """Drops every file whose bytes an earlier one has."""
    first: dict[str, str] = {}
    kept = Kept([], [])
    for item in items:
        name = first.setdefault(item.sha256, item.sample.name)
        if name == item.sample.name:
            kept.items.append(item)
        else:
            kept.dropped.append(Dropped(item.sample.name, "duplicate", f"equals {name}"))
    return kept


def drop_near(stage: "Embed", clusters: int, job: Job) -> Kept:
    """Drops every picture that looks like an earlier one.

    Args:
      clusters: number of them; 0 is one for every 20,000 pictures.
      job: the processes that share the embedding; the first one compares.

    Raises:
      ValueError: the embedding returns something else than one vector a picture.
      PeerLost: another process did not do its part.
    """
    if not stage.result.exists():
        complete(stage, job)
    if job.first and not stage.result.exists():
        found_N = near_duplicates(stage.vectors(), stage.embedding.least, clusters)
        original = {str(n): int(found_N[n]) for n in np.flatnonzero(found_N >= 0)}
        write_json(stage.result, original, indent=None)
    job.wait("near duplicates", [0], lambda _: stage.result.exists())
    stage.forget()
    # Noted and not computed again: the last bits of a matrix product depend on the machine.
    original = json.loads(stage.result.read_text(encoding="utf-8"))
    kept = Kept([], [])
    for number, item in enumerate(stage.items):
        if str(number) in original:
            name = stage.items[original[str(number)]].sample.name
            kept.dropped.append(Dropped(item.sample.name, "near_duplicate", f"like {name}"))
        else:
            kept.items.append(item)
    return kept


class Embed:
    """The stage that embeds every picture, a block at a time (data_pipelines.job.Stage).

    Attributes:
      result: the note on what was found with the embeddings; they are not needed after it.
    """

    label = "embedding"

    def __init__(
        self, items: Sequence[Checked], pictures: Pictures, embedding: Embedding, notes: Path
    ):
        """`notes`: folder of the embeddings and of the result."""
        self.items, self.embedding, self._notes = items, embedding, notes
        self._pictures = pictures.at_size(Bucket(embedding.side, embedding.side))
        self.result = notes / "near_duplicates.json"
        self.sizes = [min(BLOCK, len(items) - start) for start in range(0, len(items), BLOCK)]

    def done(self, number: int) -> bool:
        """Whether the embeddings of a block are there, or no longer needed."""
        return self._path(number).exists() or self.result.exists()

    def make(self, numbers: Sequence[int], progress: Progress) -> None:
        """Embeds some blocks."""
        for number in numbers:
            self._embed(number, progress)

    def _embed(self, number: int, progress: Progress) -> None:
        """Notes the embeddings of a block: (N, V), NaN for a picture that can no longer be read."""
        part = self.items[number * BLOCK : (number + 1) * BLOCK]
        vectors_NV = _embed_block(part, self._pictures, self.embedding, progress)
        self._notes.mkdir(parents=True, exist_ok=True)
        with open(partial := partial_path(self._path(number)), "wb") as file:
            np.save(file, vectors_NV, allow_pickle=False)
        partial.replace(self._path(number))

    def vectors(self) -> np.ndarray:
        """The embedding of every picture, (N, V), when every block is done.

        Raises:
          ValueError: the function returns vectors of several lengths.
        """
        paths = map(self._path, range(len(self.sizes)))
        blocks = [np.load(path, allow_pickle=False) for path in paths]
        if len({block.shape[1:] for block in blocks}) > 1:
            raise ValueError(
                f"--embedding={self.embedding.name} returned vectors of several lengths "
                f"{sorted({block.shape[1] for block in blocks})}; return one length"
            )
        return np.concatenate(blocks)

    def forget(self) -> None:
        """Removes the embeddings, which nothing needs once there is a result."""
        for block in self._notes.glob("*.npy"):
            block.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._notes / f"{number:06d}.npy"


def _embed_block(
    items: Sequence[Checked], pictures: Pictures, embedding: Embedding, progress: Progress
) -> np.ndarray:
    vectors, readable_N = [], []
    prepared = pictures.prepared(items)
    while batch := list(itertools.islice(prepared, BATCH)):
        good = [each.pixels_HWC for each in batch if isinstance(each, Picture)]
        readable_N += [isinstance(each, Picture) for each in batch]
        if good:
            vectors_BV = np.asarray(embedding.function(np.stack(good)), np.float32)
            if vectors_BV.ndim != 2 or len(vectors_BV) != len(good):
                raise ValueError(
                    f"--embedding={embedding.name} returned shape {vectors_BV.shape} for "
                    f"{len(good)} pictures; return one vector each, ({len(good)}, V)"
                )
            vectors.append(vectors_BV)
        progress.advance(len(batch))
    width = vectors[0].shape[1] if vectors else 1
    all_NV = np.full((len(items), width), np.nan, np.float32)
    if vectors:
        all_NV[np.array(readable_N)] = np.concatenate(vectors)
    return all_NV


def near_duplicates(
    vectors_NV: np.ndarray, least: float, clusters: int = 0, *, use_faiss: bool | None = None
) -> np.ndarray:
    """For every vector the number of the kept one that it duplicates, -1 if it is kept.

    Args:
      vectors_NV: of any length; they are normalised here. One that is zero or not finite is kept.
      least: cosine similarity from which two are near copies.
      clusters: 0 is one for every 20,000 vectors.
      use_faiss: None is: if it is installed.
    """
    original_N = np.full(len(vectors_NV), -1, np.int64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        norms_N = np.linalg.norm(vectors_NV.astype(np.float64), axis=1)
        usable = np.flatnonzero(np.isfinite(norms_N) & (norms_N > 0))
        unit_NV = (vectors_NV[usable] / norms_N[usable, None]).astype(np.float32)
    search = _engine(use_faiss)
    count = clusters or max(1, round(len(usable) / PER_CLUSTER))
    label_N = _cluster(unit_NV, min(count, max(1, len(usable))))
    order_N = np.argsort(label_N, kind="stable")  # in each cluster the order of the source
    for members in np.split(order_N, np.flatnonzero(np.diff(label_N[order_N])) + 1):
        found = _first_of_each(unit_NV[members], least, search)
        copies = np.flatnonzero(found >= 0)
        original_N[usable[members[copies]]] = usable[members[found[copies]]]
    return original_N


Search = Callable[[np.ndarray, np.ndarray, float], tuple[np.ndarray, np.ndarray, np.ndarray]]


def _first_of_each(unit_NV: np.ndarray, least: float, search: Search) -> np.ndarray:
    """Algorithm 1 on one cluster, (N,): the kept vector that each duplicates, or -1."""
    original_N = np.full(len(unit_NV), -1, np.int64)
    for start in range(0, len(unit_NV), QUERIES):
        queries = np.arange(start, min(start + QUERIES, len(unit_NV)))
        queries = queries[original_N[queries] < 0]
        if not len(queries):
            continue
        # Whatever stands before a query and is near to it would have made it a copy already.
        rows, columns, similarity = search(unit_NV[queries], unit_NV[start:], least - SLACK)
        rows, columns = queries[rows], columns + start
        later = columns > rows
        rows, columns, similarity = rows[later], columns[later], similarity[later]
        close = np.flatnonzero(np.abs(similarity - least) <= SLACK)
        for part in np.split(close, range(QUERIES, len(close), QUERIES)):
            exact = unit_NV[rows[part]].astype(np.float64) * unit_NV[columns[part]]
            similarity[part] = np.where(exact.sum(1) >= least, 2.0, -2.0)
        near = similarity >= least
        for row, columns_of_row in _grouped(rows[near], columns[near]):
            if original_N[row] < 0:
                fresh = columns_of_row[original_N[columns_of_row] < 0]
                original_N[fresh] = row
    return original_N


def _grouped(rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    order = np.argsort(rows, kind="stable")
    rows, columns = rows[order], columns[order]
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    for number, start in enumerate(starts):
        end = starts[number + 1] if number + 1 < len(starts) else len(rows)
        yield int(rows[start]), columns[start:end]


def _engine(use_faiss: bool | None) -> Search:
    if use_faiss is not False:
        try:
            import faiss
        except ImportError:
            if use_faiss:
                raise
        else:
            return _with_faiss(faiss)
    return _with_numpy


def _with_numpy(
    queries_QV: np.ndarray, base_NV: np.ndarray, least: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and similarity of the pairs that are at least `least` similar."""
    similarity_QN = queries_QV @ base_NV.T
    rows, columns = np.nonzero(similarity_QN >= least)
    return rows, columns, similarity_QN[rows, columns]


def _with_faiss(faiss: Any) -> Search:
    def search(
        queries_QV: np.ndarray, base_NV: np.ndarray, least: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        index = faiss.IndexFlatIP(base_NV.shape[1])
        index.add(np.ascontiguousarray(base_NV))
        # FAISS wants strictly more; SLACK is what decides, not this.
        limits, similarity, columns = index.range_search(queries_QV, least)
        rows = np.repeat(np.arange(len(queries_QV)), np.diff(limits.astype(np.int64)))
        return rows, columns, similarity

    return search


def _cluster(unit_NV: np.ndarray, clusters: int) -> np.ndarray:
    """Spherical k-means from evenly spaced vectors: the cluster of each vector, (N,)."""
    if clusters == 1:
        return np.zeros(len(unit_NV), np.int64)
    step = max(1, len(unit_NV) // (TRAINING * clusters))
    sample_NV = unit_NV[::step]
    centres_CV = unit_NV[np.linspace(0, len(unit_NV) - 1, clusters).astype(np.int64)]
    for _ in range(ITERATIONS):
        sums_CV = np.zeros(centres_CV.shape, np.float64)
        np.add.at(sums_CV, _nearest(sample_NV, centres_CV), sample_NV)
        norms_C = np.linalg.norm(sums_CV, axis=1, keepdims=True)
        # A centre that nothing is near to stays where it is.
        safe_C = np.where(norms_C > 0, norms_C, 1)
        centres_CV = np.where(norms_C > 0, sums_CV / safe_C, centres_CV).astype(np.float32)
    return _nearest(unit_NV, centres_CV)


def _nearest(unit_NV: np.ndarray, centres_CV: np.ndarray) -> np.ndarray:
    parts = [
        np.argmax(unit_NV[start : start + BLOCK] @ centres_CV.T, axis=1)
        for start in range(0, len(unit_NV), BLOCK)
    ]
    return np.concatenate(parts)
