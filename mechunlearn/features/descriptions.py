"""What features stand for, in words: their top tokens and contexts, or a user's own file; and those of a topic."""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from mechunlearn.activations import read
from mechunlearn.features.dictionary import Dictionary
from mechunlearn.features.hook_points import place_of_hook
from mechunlearn.features.quality import check_fits
from mechunlearn.features.selection import NothingFound
from mechunlearn.features.statistics import batches_of_texts
from mechunlearn.models import Model
from mechunlearn.prompts import tokenizer_of

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


@torch.no_grad()
def describe_features(
    model: Model,
    dictionary: Dictionary,
    texts: Sequence[str],
    *,
    n_tops: int = 10,
    before: int = 8,
    after: int = 8,
    max_tokens: int = 256,
    batch_size: int = 32,
) -> dict[int, str]:
    """Feature -> the tokens at which it is highest, each with the words around it; of features that are ever on.

    Args:
        n_tops: highest activations of a feature, at most one a text.
        before, after: tokens around each.
    """
    check_fits(model, dictionary)
    place, tokenizer = place_of_hook(model, dictionary.hook_point), tokenizer_of(model)
    values = torch.zeros(n_tops, dictionary.d_sae, device=model.device)
    texts_of, places_of = (torch.zeros_like(values, dtype=torch.long) for _ in range(2))
    rows: dict[int, list[int]] = {}
    for numbers, ids, content in batches_of_texts(model, texts, max_tokens=max_tokens, batch_size=batch_size):
        peaks = (dictionary.encode(read(model, ids, place)) * content[..., None]).max(1)
        numbered = torch.tensor(numbers, device=model.device)[:, None].expand_as(peaks.values)
        values, order = torch.cat([values, peaks.values.to(values)]).topk(n_tops, dim=0)
        texts_of = torch.cat([texts_of, numbered]).gather(0, order)
        places_of = torch.cat([places_of, peaks.indices]).gather(0, order)
        ends = (content.long().cumsum(1) == content.sum(1, keepdim=True)).int().argmax(1) + 1
        rows |= {number: row[:end].tolist() for number, row, end in zip(numbers, ids, ends, strict=True)}
    found: dict[int, str] = {}
    for feature in torch.nonzero(values[0] > 0)[:, 0].tolist():
        said: list[str] = []
        for top in range(int((values[:, feature] > 0).sum())):
            row, at = rows[int(texts_of[top, feature])], int(places_of[top, feature])
            around = row[max(0, at - before) : at + 1 + after]
            token, context = (
                str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in ([row[at]], around)
            )
            said.append(f"{token} in {context}")
        found[feature] = "; ".join(dict.fromkeys(said))
    return found


def features_of_topic(descriptions: Mapping[int, str], topic: str, *, n: int) -> tuple[int, ...]:
    """The `n` features whose descriptions are most like a topic, best first; those without a common word are left out.

    Cosine of TF-IDF vectors, of words and pairs of words, over all descriptions.

    Raises:
        NothingFound: no description has a word of the topic.

    Source: Muhamed et al. 2025, arXiv:2504.08192, section 5 (zero-shot: by a search among Neuronpedia's descriptions).
    """
    features = sorted(descriptions)
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    try:
        matrix: Any = vectorizer.fit_transform([descriptions[feature] for feature in features])
    except ValueError:  # no words at all
        raise NothingFound(f"topic: none of {len(features)} descriptions has a word; give others") from None
    wanted: Any = vectorizer.transform([topic])
    scores = (matrix @ wanted.T).toarray().ravel()
    best = sorted(range(len(features)), key=lambda i: (-scores[i], features[i]))[:n]
    if not (chosen := tuple(features[i] for i in best if scores[i] > 0)):
        raise NothingFound(f"topic: no word of {topic!r} is in any of {len(features)} descriptions; say it otherwise")
    return chosen


def load_descriptions(path: str | Path) -> dict[int, str]:
    """Feature -> description, from what Neuronpedia exports or what a user wrote.

    One JSON object a line with `index` and `description`, or a JSON list of such, plain or gzipped; or a folder of such
    files (Neuronpedia's explanations/batch-0.jsonl.gz, ...). Several of one feature are joined. Or one JSON object,
    {"12": "names of hockey players"}.

    Raises:
        FileNotFoundError: no file, or a folder without one.
        ValueError: not such a file.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.name.endswith(SUFFIXES))
    if not files:
        raise FileNotFoundError(f"no descriptions at {path}; give a .json or .jsonl file, or a folder of such")
    found: dict[int, list[str]] = {}
    for file in files:
        try:
            data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            for index, said in _records(data.decode("utf-8")):
                found.setdefault(index, []).append(said)
        except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} holds no descriptions of features ({type(error).__name__}: {error}); give objects with "
                "'index' and 'description', as Neuronpedia exports them"
            ) from None
    return {feature: "; ".join(dict.fromkeys(said)) for feature, said in sorted(found.items())}


def _records(text: str) -> list[tuple[int, str]]:
    try:
        data = json.loads(text)
    except ValueError:  # one object a line
        data = [json.loads(line) for line in text.splitlines() if line.strip()]
        if not data:
            raise ValueError("an empty file") from None
    if isinstance(data, dict) and "index" not in data:
        return [(int(index), str(said)) for index, said in data.items()]
    items = data if isinstance(data, list) else [data]
    return [(int(item["index"]), str(item["description"])) for item in items if item["description"]]
