"""Classification of texts, or of pairs of them, in anybody's file: a pretrained encoder with a new head."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_peft.files.kept import hashed
from lightning_peft.models import SequenceClassifier
from lightning_peft.tasks.cell_records import CellRecords
from lightning_peft.tasks.classification_data import ClassificationData
from lightning_peft.tasks.measure import Measure
from lightning_peft.tasks.split import Split
from lightning_peft.tasks.task import Task

_INSTALLED = "installed:"  # before the name of a Python package
_CLASSES = ("target", "prediction")


def matthews(target: NDArray[Any], prediction: NDArray[Any]) -> float:
    """Return Matthews' correlation of predicted and true classes, as scikit-learn's `matthews_corrcoef`.

    Example:
        >>> matthews(np.array([0, 1, 2, 2]), np.array([0, 1, 2, 2]))
        1.0
    """
    counts = _confusion(target, prediction)
    total, true, predicted = counts.sum(), counts.sum(1), counts.sum(0)
    covariance = total * counts.trace() - true @ predicted
    spread = np.sqrt((total**2 - true @ true) * (total**2 - predicted @ predicted))
    return float(covariance / spread) if spread else 0.0


def macro_f1(target: NDArray[Any], prediction: NDArray[Any]) -> float:
    """Return the mean of the classes' F1 scores, as scikit-learn's `f1_score` with `average="macro"`.

    Example:
        >>> macro_f1(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 0])).__round__(3)
        0.333
    """
    counts = _confusion(target, prediction)
    sums = counts.sum(0) + counts.sum(1)
    known = sums > 0
    return float((2 * counts.diagonal()[known] / sums[known]).mean())


def _confusion(target: NDArray[Any], prediction: NDArray[Any]) -> NDArray[np.float64]:
    """Return how often each class was taken for each, `[true, predicted]`.

    scikit-learn's functions take a hundred times as long, and a bootstrap calls them ten thousand times a row.
    """
    count = int(max(target.max(), prediction.max())) + 1
    pairs = np.bincount(target.astype(np.int64) * count + prediction.astype(np.int64), minlength=count * count)
    return pairs.reshape(count, count).astype(np.float64)


class Classification(Task):
    """Texts of a file in classes: `SequenceClassifier` on frozen weights, whose new head is drawn with a seed.

    Every row of the file is tested once, in one of `num_folds` folds; or, where a test set is named, its rows alone are
    tested, by modules that have learnt from all others, in one fold. Texts that are the same but for case and spaces
    stay on one side.

    Args:
        model: a model on the Hugging Face hub, a folder, or `"installed:NAME"`, the folder `model` of an installed
            Python package.
        path: what `read_rows` reads: a file, the name of a hub dataset, or `"package:NAME"`.
        text: the column of the text.
        text_pair: the column of a second text.
        label: the column of the class.
        classes: the names of the classes, in their order; default those of the file.
        test_path: the file of the test set, with the same columns.
        test_split: the test set as a column and its value, `{"split": "test"}`: rows of `path`, which are not learnt
            from.
        num_folds: without a test set, how many folds the rows are divided into.
        val_fraction: share of the rows to learn from that hyperparameters are chosen on.
        size: learn from so many rows only; default all.
        seed: of folds and of the rows that are held out.
        limit: take only so many rows, without a test set of their own.
        max_length: tokens of a text; a longer one is cut at its end.
        head_learning_rate: of the new head where something is trained in the backbone beside it; default the row's.
        dtype: the torch dtype the weights are loaded in.

    Example:
        >>> task = Classification("bert-base-uncased", "package:notices", test_split={"split": "test"})
        >>> task.folds, list(task.measures)
        (1, ['accuracy', 'nll', 'mcc', 'f1'])
    """

    measures: ClassVar[Mapping[str, Measure]] = {
        "accuracy": Measure("Accuracy", "share of texts told right", range=(0, 1)),
        "nll": Measure("NLL", "nats a text", better=-1, range=(0, None)),
        "mcc": Measure("MCC", "Matthews' correlation", range=(-1, 1), columns=_CLASSES, function=matthews),
        "f1": Measure("F1", "mean of the classes' F1 scores", range=(0, 1), columns=_CLASSES, function=macro_f1),
    }
    unit = "text"

    def __init__(
        self,
        model: str,
        path: str,
        text: str = "text",
        text_pair: str | None = None,
        label: str = "label",
        classes: list[str] | None = None,
        test_path: str | None = None,
        test_split: dict[str, str] | None = None,
        num_folds: int = 2,
        val_fraction: float = 0.2,
        size: int | None = None,
        seed: int = 0,
        limit: int | None = None,
        max_length: int | None = None,
        head_learning_rate: float | None = None,
        dtype: str = "float32",
    ) -> None:
        if test_path is not None and test_split is not None:
            raise ValueError("The test set is test_path or test_split, not both.")
        if test_split is not None and len(test_split) != 1:
            raise ValueError(f"test_split is one column with its value, such as split: test, got {test_split}.")
        self.own_test_set = test_path is not None or test_split is not None
        if self.own_test_set and limit is not None:
            raise ValueError("limit draws from all rows: with a test set of its own give size, the rows to learn from.")
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(f"val_fraction must be above 0 and below 1, got {val_fraction}.")
        self.model, self.path, self.text, self.text_pair, self.label = model, path, text, text_pair, label
        self.classes, self.test_path, self.test_split = classes, test_path, test_split
        self.folds = 1 if self.own_test_set else num_folds
        self.val_fraction, self.size, self.seed, self.limit = val_fraction, size, seed, limit
        self.max_length, self.head_learning_rate, self.dtype = max_length, head_learning_rate, dtype
        self._read: ClassificationData | None = None

    def module(self, seed: int = 0) -> SequenceClassifier:
        """Return the pretrained backbone, frozen, with the head of a seed."""
        count = len(self._rows().class_names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = SequenceClassifier(
                folder_of(self.model), count, dtype=self.dtype, head_learning_rate=self.head_learning_rate
            )
            torch.manual_seed(seed)  # again, whatever was drawn while the backbone was loaded
            module.head.reset_parameters()
        module.backbone.requires_grad_(False)
        return module

    def data(self, split: Split, *, batch_size: int = 16, seed: int = 0) -> ClassificationData:
        """Return the texts of a split.

        Args:
            split: of the rows.
            batch_size: texts of a batch.
            seed: of the order of training batches, and of which rows `size` takes.
        """
        data = self._data(batch_size)
        data.size, data.order_seed = self.size if split.size is None else split.size, seed
        return data.use_split(replace(split, size=None))  # which is drawn with the seed

    def depends_on(self) -> str:
        """Return a hash of the rows."""
        return hashed(self._rows().contents())

    def check(self) -> None:
        """Read the rows."""
        self._rows()

    @property
    def records(self) -> ClassificationRecords:
        """The columns of each text."""
        return ClassificationRecords(self)

    def _rows(self) -> ClassificationData:
        if self._read is None:
            data = self._data(16)
            data.prepare_data()
            self._read = data
        return self._read

    def _data(self, batch_size: int) -> ClassificationData:
        return ClassificationData(
            self.path,
            test_path=self.test_path,
            test_split=self.test_split,
            text=self.text,
            text_pair=self.text_pair,
            label=self.label,
            classes=self.classes,
            batch_size=batch_size,
            val_fraction=self.val_fraction,
            seed=self.seed,
            limit=self.limit,
            max_length=self.max_length,
        )


class ClassificationRecords(CellRecords):
    """The columns of each text; the report names the file and the model.

    Args:
        task: the task.
    """

    task: Classification

    def describe_data(self, units: int) -> dict[str, Any]:
        return {"label": self.task.path, "units": units, "folds": self.task.folds}

    def describe_model(self) -> dict[str, Any]:
        return super().describe_model() | {"pretrained": self.task.model.removeprefix(_INSTALLED)}


def folder_of(model: str) -> str:
    """Return the name or folder of a pretrained model; of `"installed:NAME"` the folder `model` of a Python package.

    The package is found, not imported.

    Raises:
        ValueError: no such package is installed, or it holds no model.

    Example:
        >>> folder_of("bert-base-uncased")
        'bert-base-uncased'
    """
    if not model.startswith(_INSTALLED):
        return model
    name = model.removeprefix(_INSTALLED)
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin:
        raise ValueError(f"The model {model} is that of a Python package that is not installed: pip install {name}.")
    folder = Path(spec.origin).parent / "model"
    if not folder.is_dir():
        raise ValueError(f"The model {model} should be in {folder}, which is no folder: name a model of the hub.")
    return str(folder)
