"""Human preference (Sec. 5.3, App. of the paper's human study): a page that asks, and its votes.

The page shows two pictures of one prompt, which of the systems on which side being random, and asks
the paper's three questions. It needs no server: votes stay in the browser until they are downloaded
as JSON. From the votes come win rates with Wilson intervals and ratings: Bradley-Terry by maximum
likelihood, P(a beats b) = 1 / (1 + 10^((b - a) / 400)), on Elo's scale with mean 1000. A tie is
half a win for each. Intervals of ratings are bootstraps over prompts, as votes on one prompt are
not independent of each other; those of win rates take every vote as independent.
"""

import base64
import hashlib
import itertools
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from mmdit_jax import files, page, strict_json

QUESTIONS = {
    "prompt_following": "Which image looks more representative to the text shown above and "
    "faithfully follows it?",
    "aesthetics": "Given the prompt, which image is of higher-quality and aesthetically more "
    "pleasing?",
    "typography": "Which image more accurately shows/displays the text specified in the above "
    "description? More accurate spelling is preferred! Ignore other aspects.",
}
FORMAT = "mmdit_jax votes 1"
LEVEL = 0.95  # share of an interval
BOOTSTRAPS = 1000
MEAN_RATING = 1000.0
_SCALE = 400 / np.log(10)  # Elo points of one unit of log odds
_RIDGE = 1e-6  # votes; keeps the ratings of a resample finite in which a system only lost


def evaluate(
    evaluators: Sequence[str], samples: Sequence[str], votes: Sequence[str], output: str | None
) -> str:
    """The evaluator `human`: folders of pictures become a page, votes become results.

    Returns:
        What to tell the user.

    Raises:
        ValueError: other evaluators beside it, not one of the two inputs, or no output.
    """
    if list(evaluators) != ["human"]:
        raise ValueError(f"--evaluators={','.join(evaluators)}: human runs by itself, alone")
    if bool(samples) == bool(votes) or not output:
        raise ValueError(
            "human needs --output and one of --samples=FOLDER,FOLDER (it writes a page) and "
            "--votes=FILE,... (it counts them)"
        )
    if samples:
        path = write_page(samples, output)
        return f"{path}: open it in a browser; count the downloaded votes with --votes"
    metrics, settings = score(read_votes(votes))
    content = json.dumps({"human": metrics, "settings": {"human": settings}}, indent=2)
    files.write_whole(output, content + "\n")
    return f"{describe(metrics)}\nresults in {output}"


class Samples(NamedTuple):
    """A folder of `mmdit_jax.sample`."""

    name: str
    prompts: tuple[str, ...]
    pictures: tuple[bytes, ...]


def read_samples(folders: Sequence[str]) -> list[Samples]:
    """Reads two or more folders of pictures of the same prompts.

    Raises:
        ValueError: fewer than two, two of one name, other prompts, or a picture that is missing.
    """
    if len(folders) < 2:
        raise ValueError(
            f"--samples={','.join(folders)} is {len(folders)} folder: give two or more outputs of "
            "mmdit_jax.sample, separated by commas"
        )
    found = []
    for folder in folders:
        path = Path(folder)
        remedy = "give outputs of mmdit_jax.sample"
        if not (path / "settings.json").is_file():
            raise ValueError(f"--samples: {folder} has no settings.json; {remedy}")
        prompts = strict_json.read_object(path / "settings.json", remedy).get("prompts")
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"{path / 'settings.json'} holds no list of prompts; {remedy}")
        places = [path / f"{i:04d}.png" for i in range(len(prompts))]
        if missing := [place.name for place in places if not place.is_file()]:
            raise ValueError(f"{folder} has no {missing[0]}, of {len(prompts)} prompts; {remedy}")
        pictures = tuple(place.read_bytes() for place in places)
        found.append(Samples(path.resolve().name, tuple(prompts), pictures))
    names = [samples.name for samples in found]
    if len(set(names)) < len(names):
        raise ValueError(f"--samples: two folders have the name {max(names, key=names.count)}")
    for samples, folder in zip(found, folders, strict=True):
        if samples.prompts != found[0].prompts:
            pairs = itertools.zip_longest(found[0].prompts, samples.prompts)
            at, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            raise ValueError(
                f"prompt {at} of {folder} is {b!r}, of {folders[0]} {a!r}: sample the same prompts"
            )
    return found


def make_page(systems: Sequence[Samples], seed: int = 0) -> dict[str, Any]:
    """What the page shows, every pair of systems on every prompt once.

    Args:
        systems: two or more, on the same prompts.
        seed: of the order of the pairs and of the sides.

    Returns:
        `study` (of pictures, prompts, systems and seed), `questions`, `pictures` (addresses, in an
        order that tells nothing), `pairs` (prompt, left and right picture), and `key`: the systems,
        and of each pair its prompt's number and who is left and right, in base64. The page shows
        none of it, but who opens its source can read it.
    """
    order = random.Random(seed)
    prompts = systems[0].prompts
    pairs = [
        (prompt, *order.sample(two, 2))
        for prompt in range(len(prompts))
        for two in itertools.combinations(range(len(systems)), 2)
    ]
    order.shuffle(pairs)
    places = [(s, p) for s in range(len(systems)) for p in range(len(prompts))]
    order.shuffle(places)
    number = {place: i for i, place in enumerate(places)}
    pictures = [page.data_uri(systems[s].pictures[p]) for s, p in places]
    names = [samples.name for samples in systems]
    identity = json.dumps([names, prompts, pairs, pictures])
    return {
        "format": FORMAT,
        "study": hashlib.sha256(identity.encode()).hexdigest()[:16],
        "questions": QUESTIONS,
        "pictures": pictures,
        "pairs": [[prompts[p], number[left, p], number[right, p]] for p, left, right in pairs],
        "key": base64.b64encode(json.dumps([names, pairs]).encode()).decode(),
    }


def write_page(folders: Sequence[str], output: str, seed: int = 0) -> str:
    """Writes the page of some folders of pictures; returns its path.

    `output`: an HTML file, or a folder for index.html.

    Raises:
        ValueError: see `read_samples`; or the page cannot be written.
    """
    content = make_page(read_samples(folders), seed)
    path = output if output.endswith((".html", ".htm")) else os.path.join(output, "index.html")
    template = Path(__file__).with_name("preference.html").read_text(encoding="utf-8")
    # In a script element only "<" could end it, or begin what is none.
    data = json.dumps(content).replace("<", "\\u003c")
    files.write_whole(path, template.replace("CONTENT", data))
    return path


class Vote(NamedTuple):
    """What one person answered to one question about one pair."""

    voter: str
    prompt: int
    question: str
    left: str
    right: str
    winner: str  # a system, or "tie"


def read_votes(paths: Sequence[str]) -> list[Vote]:
    """The votes of downloaded files; of an answer that is there twice, the one saved last counts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not votes of this project, of two studies, or none.
    """
    remedy = "give files that the page downloaded"
    contents = []
    for path in paths:
        content = strict_json.read_object(path, remedy)
        if content.get("format") != FORMAT:
            raise ValueError(f"{path} has the format {content.get('format')!r}; {remedy}")
        if contents and content.get("study") != contents[0].get("study"):
            raise ValueError(
                f"{path} is of study {content.get('study')}, {paths[0]} of "
                f"{contents[0].get('study')}: count the votes of each study by itself"
            )
        contents.append(content)
    found: dict[tuple, Vote] = {}
    for path, content in sorted(
        zip(paths, contents, strict=True), key=lambda item: str(item[1].get("saved"))
    ):
        for row in content.get("votes") or ():
            try:
                vote = Vote(str(content["voter"]), *(row[name] for name in Vote._fields[1:]))
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path} holds a vote without {error}; {remedy}") from error
            if vote.winner not in (vote.left, vote.right, "tie"):
                raise ValueError(f"{path}: the winner {vote.winner!r} was not shown; {remedy}")
            pair = frozenset((vote.left, vote.right))
            found[vote.voter, vote.prompt, vote.question, pair] = vote
    if not found:
        raise ValueError(f"{', '.join(paths) or '--votes'} holds no votes; {remedy}")
    return list(found.values())


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Interval of a share (Wilson 1927); a tie counts half a success, which makes it wider."""
    z = scipy.stats.norm.ppf((1 + LEVEL) / 2)
    share, spread = successes / n, z**2 / n
    center = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * np.sqrt(share * (1 - share) / n + spread / (4 * n))
    return float(center - half), float(center + half)


def bradley_terry(wins_KK: np.ndarray) -> np.ndarray:
    """Ratings in Elo points, mean 1000, by maximum likelihood.

    Args:
        wins_KK: (..., K, K) how often the row beat the column, ties as halves.

    Returns:
        (..., K). They have no finite maximum where some systems never won against the others (see
        `has_ratings`): then those lie far apart, and how far means nothing.
    """
    games = wins_KK + np.swapaxes(wins_KK, -1, -2)
    systems = wins_KK.shape[-1]
    strength = np.zeros(wins_KK.shape[:-1])
    for _ in range(100):
        expected = games / (1 + np.exp(strength[..., None, :] - strength[..., :, None]))
        slope = (wins_KK - expected).sum(-1) - _RIDGE * strength
        weight = expected * (1 - expected / np.maximum(games, 1e-300))
        curvature = -weight
        diagonal = weight.sum(-1) + _RIDGE
        curvature = curvature + diagonal[..., None] * np.eye(systems)
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        step = np.clip(step, -1, 1)  # Newton's from far away would overshoot
        strength = strength + step
        if np.abs(step).max(initial=0) < 1e-6:  # less than 0.001 Elo points
            break
    return MEAN_RATING + _SCALE * (strength - strength.mean(-1, keepdims=True))


def has_ratings(wins_KK: np.ndarray) -> np.ndarray:
    """Whether the likelihood has a maximum: no split of the systems has wins one way only.

    Ford 1957. (..., K, K) -> (...).
    """
    systems = wins_KK.shape[-1]
    reach = ((wins_KK > 0) | np.eye(systems, dtype=bool)).astype(float)
    for _ in range(systems):
        reach = np.sign(reach @ reach)
    return reach.all(axis=(-2, -1))


def score(
    votes: Iterable[Vote], *, seed: int = 0, bootstraps: int = BOOTSTRAPS
) -> tuple[dict[str, float], dict[str, Any]]:
    """Win rates and ratings of every question.

    Args:
        votes: see `read_votes`.
        seed: of the bootstrap.
        bootstraps: resamples of the prompts.

    Returns:
        Metrics `QUESTION/win_rate/A/B` (the share of A against B) with `_low` and `_high`,
        `QUESTION/votes/A/B`, `QUESTION/elo/A` with `_low` and `_high`; and the settings, of which
        `left_out` says which ratings there are not, and why.
    """
    votes = list(votes)
    systems = sorted({name for vote in votes for name in (vote.left, vote.right)})
    index = {name: k for k, name in enumerate(systems)}
    prompts = sorted({vote.prompt for vote in votes})
    metrics: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for question in [q for q in QUESTIONS if any(vote.question == q for vote in votes)]:
        wins_PKK = np.zeros((len(prompts), len(systems), len(systems)))
        for vote in (vote for vote in votes if vote.question == question):
            a, b = index[vote.left], index[vote.right]
            share = 0.5 if vote.winner == "tie" else float(vote.winner == vote.left)
            wins_PKK[prompts.index(vote.prompt), a, b] += share
            wins_PKK[prompts.index(vote.prompt), b, a] += 1 - share
        wins_KK = wins_PKK.sum(axis=0)
        for (a, i), (b, j) in itertools.combinations(index.items(), 2):
            n = round(wins_KK[i, j] + wins_KK[j, i])
            if n:
                low, high = wilson(wins_KK[i, j], n)
                metrics[f"{question}/win_rate/{a}/{b}"] = float(wins_KK[i, j] / n)
                metrics[f"{question}/win_rate_low/{a}/{b}"] = low
                metrics[f"{question}/win_rate_high/{a}/{b}"] = high
                metrics[f"{question}/votes/{a}/{b}"] = n
        if not has_ratings(wins_KK):
            left_out[f"{question}/elo"] = "some systems never won against the others"
            continue
        for name, rating in zip(systems, bradley_terry(wins_KK), strict=True):
            metrics[f"{question}/elo/{name}"] = float(rating)
        draws = np.random.default_rng(seed).multinomial(
            len(prompts), np.full(len(prompts), 1 / len(prompts)), bootstraps
        )
        drawn = np.tensordot(draws.astype(float), wins_PKK, 1)
        unbounded = 1 - has_ratings(drawn).mean()
        if len(prompts) < 2 or unbounded > (1 - LEVEL) / 2:
            left_out[f"{question}/elo_low, elo_high"] = (
                f"{unbounded:.0%} of the resamples of {len(prompts)} prompts have no finite rating"
            )
            continue
        ends = np.quantile(bradley_terry(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        for side, values in zip(("low", "high"), ends, strict=True):
            for name, value in zip(systems, values, strict=True):
                metrics[f"{question}/elo_{side}/{name}"] = float(value)
    settings = {
        "systems": systems,
        "voters": len({vote.voter for vote in votes}),
        "prompts": len(prompts),
        "votes": len(votes),
        "ties": sum(vote.winner == "tie" for vote in votes),
        "win_rate": f"ties as half a win; Wilson intervals of {LEVEL:.0%}, votes independent",
        "elo": "Bradley-Terry by maximum likelihood, ties as half a win, mean 1000; intervals of "
        f"{LEVEL:.0%} from {bootstraps} bootstraps over prompts",
        "seed": seed,
        "left_out": left_out,
    }
    return metrics, settings


def describe(metrics: Mapping[str, float]) -> str:
    """Lines for a terminal."""
    lines = []
    for name, value in metrics.items():
        question, kind, who = name.split("/", 2)
        if kind not in ("win_rate", "elo"):
            continue
        low, high = (metrics.get(f"{question}/{kind}_{side}/{who}") for side in ("low", "high"))
        if kind == "win_rate":
            n = metrics[f"{question}/votes/{who}"]
            text = f"{value:.1%} ({low:.1%} to {high:.1%}) of {n:.0f} votes"
        else:
            ends = " to ".join("?" if end is None else f"{end:.0f}" for end in (low, high))
            text = f"Elo {value:.0f} ({ends})"
        lines.append(f"{question:18}{' against '.join(who.split('/')):40}{text}")
    return "\n".join(lines)
