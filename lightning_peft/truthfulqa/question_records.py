"""What a comparison keeps of each of the benchmark's cells: every choice's score, and side effects."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch

from lightning_peft.backbone.window import exceeding, lengths_of, loaded
from lightning_peft.callbacks import AdapterCallback
from lightning_peft.files.records import DamagedError
from lightning_peft.moved import resolve
from lightning_peft.moved.plans import IN_THE_FIRST_RELEASE
from lightning_peft.stack.adapter_files.folder import adapter_folders, check_finite, read_folder
from lightning_peft.tasks.cell import Cell
from lightning_peft.tasks.cell_records import CellRecords, Columns, Scores
from lightning_peft.tasks.unit_scores import UnitScores
from lightning_peft.truthfulqa.evaluate import Evaluate
from lightning_peft.truthfulqa.folds import assign_folds
from lightning_peft.truthfulqa.samples import FILES, TASKS, SampleWriter, read_samples, write_samples
from lightning_peft.truthfulqa.texts import check_texts, shape_of, text_caveats

if TYPE_CHECKING:
    from lightning_peft.truthfulqa.task import TruthfulQA

# arguments that callbacks had not in release 68ae323, and values at which they compute what they computed then: there
# its finished cells still count; not at `reads=None`, which is now another place
_LATER: dict[str, tuple[Any, ...]] = {
    "target_parameters": (None,),
    "sigma_texts": (None,),
    "tokenizer": (None,),
    "reads": ("output", "input"),
}
# callbacks that meant the whole model then, and had no `within`
_WITHOUT_PARTS = {"ActAdd", "HeadGains", "HeadOffsets", "LayerOffsets", "LoFiT", "MEMIT", "ROME"}
_BATCH_SIZE = 16  # that a row of that release had written


class QuestionRecords(CellRecords):
    """`samples`, one for each choice and draw; `effects`, what else was measured; `texts`, as the model read them.

    Args:
        task: the benchmark's.
    """

    kinds: ClassVar[Mapping[str, Any]] = {"samples": list, "effects": dict, "texts": dict}
    since_sums: ClassVar[tuple[str, ...]] = ("texts",)
    files: ClassVar[tuple[str, ...]] = tuple(FILES.values())
    category_measures: ClassVar[tuple[str, ...]] = TASKS
    category_note = "Below each mean: Wilson's 95% interval, which for MC2 is wider than need be."
    task: TruthfulQA

    def depends_on(self, rows: Sequence[Any], seed: int, fold: int) -> Any:
        task, rows = self.task, [_as_in_the_first_release(row) for row in rows]
        return [rows, task.model, task.dtype, seed, task.settings(), task.depends_on(), fold]

    def check_rows(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        shown = [name for name, options in rows.items() if options.get("few_shot") is not None]
        if shown and self.task.answers is not None and self.task.answers.preset != "qa":
            raise ValueError(
                f"Row {shown[0]!r} has few_shot, which goes with answers of the preset 'qa', not "
                f"{self.task.answers.preset!r}."
            )

    def check(self, rows: Sequence[Cell], missing: Sequence[Cell], cells: Sequence[Cell]) -> None:
        questions = self.task.questions()
        tested = Counter(assign_folds(questions, self.task.folds, self.task.seed))
        left = len(questions) - max(tested.values())
        for row in rows:
            if (row.options.get("few_shot") or 0) > left:
                raise ValueError(
                    f"Row {row.row!r} asks for {row.options['few_shot']} demonstrations, but a fold leaves {left} "
                    "questions to draw them from."
                )
        check_texts(self.task, missing, cells)

    def measure(self, cell: Cell, module: L.LightningModule) -> dict[str, Any]:
        # a prompt or another scoring leaves the model as it is, and the base is the same in every fold
        effects = self.task.side_effects if cell.adapts or (cell.kind == "base" and cell.fold == 0) else None
        samples: list[dict[str, Any]] = []
        shown, beyond, measured = [], None, {}
        for draw in range(cell.draws):
            scores, data = self.task.scores(), self.task.data(cell.split, **cell.options_of(draw))
            data.side_effects = effects if draw == 0 else None
            writer = SampleWriter(cell.folder if draw == 0 else None)
            trainer = cell.test(module, data, scores, writer, Evaluate(cell.scoring))
            shown += [data.demonstrations] if data.demonstrations else []
            batches = [batch for batch in loaded(trainer.test_dataloaders) if "document" not in batch]
            lengths = (n for batch in batches for n in lengths_of(batch))
            beyond = beyond or exceeding(getattr(module, "backbone"), lengths, "test texts")  # noqa: B009
            questions = {question.id: question for question in data.test_questions}
            for choice in scores.choices:
                question = questions[choice["question_id"]]
                sample = {"question_id": question.id, "draw": draw, "logprob": choice["logprob"]}
                sample |= {name: choice[name] for name in ("mc0", "mc1", "mc2")}
                sample |= {"method": cell.row, "fold": cell.fold, "question": question.text}
                sample |= {"category": question.category, "choice": question.choices[choice["index"]].text}
                samples.append(sample)
            if draw == 0:
                measured = {"documents": scores.documents, "capability": scores.capability}
        return {"samples": samples, "effects": measured, "texts": {"demonstrations": shown, "beyond": beyond}}

    def checked(self, scores: UnitScores) -> Columns:
        """Return the columns of a test: a question has scores by those metrics that it has choices for."""
        return scores.columns

    def value(self, name: str, columns: Columns) -> float:
        """Return the mean as the metric over a test gives it, in float32."""
        scores = torch.tensor(list(columns[name].values()), dtype=torch.float32)
        return float(scores.double().mean().to(torch.float32))

    def units(self, result: Mapping[str, Any]) -> set[int]:
        return {sample["question_id"] for sample in result["samples"]}

    def scores(self, cells: Sequence[Cell]) -> Scores:
        samples: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        for cell in cells:
            for sample in cell.result["samples"]:
                samples[sample["question_id"], sample["draw"]].append(sample)
        scores: Scores = {name: defaultdict(list) for name in self.task.measures}
        for (question, _), choices in samples.items():
            logprobs = torch.tensor([choice["logprob"] for choice in choices])
            columns = {name: torch.tensor([c[name] for c in choices]) for name in ("mc0", "mc1", "mc2")}
            for name, score in self.task.choice_scores(logprobs, columns).items():
                scores[name][question].append(score)
        return {name: values for name, values in scores.items() if values}

    def check_readable(self, folder: Path, result: Mapping[str, Any]) -> None:
        questions: dict[str, set[int]] = {}
        try:
            for name in TASKS:
                questions[name] = {sample["question_id"] for sample in result["samples"] if sample[name] >= 0}
        except (KeyError, TypeError) as error:
            raise DamagedError(f"{folder / 'result.json'} holds no samples as they were written") from error
        for name, file in FILES.items():
            path = folder / file
            try:
                logged = {sample["doc_id"] for sample in read_samples(path) if 0 <= sample["acc"] <= 1}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DamagedError(f"{path} cannot be read ({type(error).__name__})") from error
            if logged != questions[name]:
                raise DamagedError(f"{path} holds {len(logged)} questions where {len(questions[name])} were written")
        if result["adapter_bytes"]:
            _check_adapter(folder / "adapter", result["adapter_bytes"])

    def write(self, cells: Sequence[Cell], output: Path) -> None:
        """Write `samples.jsonl`, and each row's samples in the harness's form, of rows none of whose cells failed."""
        write_samples(output / "samples.jsonl", [sample for cell in cells for sample in cell.result["samples"]])
        rows: dict[str, list[Cell]] = defaultdict(list)
        for cell in cells:
            rows[cell.row].append(cell)
        for name, folds in rows.items():
            if any(cell.failed for cell in folds):
                continue
            for file in FILES.values():
                samples = [sample for cell in folds for sample in read_samples(cell.folder / file)]
                write_samples(output / "samples" / name / file, sorted(samples, key=lambda sample: sample["doc_id"]))

    def describe_data(self, units: int) -> dict[str, Any]:
        task, count = self.task, len(self.task.questions())
        label = "this package's own question set" if task.source == "package" else "TruthfulQA"
        data = {"source": task.source, "label": f"{label}, {count} questions", "questions": count}
        data |= {"hash": task.data_hash(), "folds": task.folds}
        if (text := task.side_effects.text()) is not None:
            described = {"documents": len(text.documents), "source": text.source, "sha256": text.sha256}
            data["text"] = described | {"tokens": task.side_effects.tokens}
        return data

    def describe_model(self) -> dict[str, Any]:
        from lightning_peft.backbone.fingerprint import fingerprint

        model: Any = shape_of(self.task.model)
        return {
            "pretrained": self.task.model,
            "fingerprint": fingerprint(model)["names"],
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": model.config.num_hidden_layers,
            "heads": model.config.num_attention_heads,
        }

    def categories(self, cells: Sequence[Cell]) -> dict[int, str]:
        return {sample["question_id"]: sample["category"] for cell in cells for sample in cell.result["samples"]}

    def caveats(self, units: int) -> list[str]:
        sentences = []
        if self.task.source == "package":
            sentences.append(
                "These are the package's own questions, not TruthfulQA: the numbers cannot be compared with published "
                "ones."
            )
        if (questions := len(self.task.questions())) < 400:
            sentences.append(f"With {questions} questions only large differences can be detected.")
        sentences.append(
            "Tuned rows choose learning rate and epochs on held-out training questions; edited rows choose heads, and "
            "a strength where several are given, on held-out training questions."
        )
        source = Path(self.task.model) / "source.txt"
        if source.is_file():
            sentences.append(f"Weights: {source.read_text(encoding='utf-8').strip()}")
        return sentences

    def cell_caveats(self, cells: Sequence[Cell]) -> list[str]:
        return list(text_caveats(cells))


def _check_adapter(folder: Path, written: int) -> None:
    """Raise `DamagedError` where a folder's adapters are not of so many bytes, or cannot be read."""
    size = 0
    try:
        for part in adapter_folders(folder):
            config, tensors, notes = read_folder(part)
            if config.peft_type is None or "fingerprint" not in notes:
                raise DamagedError(f"{part} lacks its adapter's kind or the base's fingerprint")
            check_finite(tensors, str(part))
            size += sum(tensor.nbytes for tensor in tensors.values())
    except ValueError as error:
        raise DamagedError(str(error).rstrip(".")) from error
    if size != written:
        raise DamagedError(f"{folder} holds {size:,} bytes of tensors where {written:,} were written")


def _as_in_the_first_release(settings: Any) -> Any:
    """Return a row's settings as the first release would have written them, so that its finished cells still count.

    Arguments that came later are left out where they change nothing; those that callbacks share, which are written
    now only where they are given, stood there always, as did the batch size.
    """
    if isinstance(settings, list):
        return [_as_in_the_first_release(value) for value in settings]
    if not isinstance(settings, Mapping):
        return settings
    values = {name: value for name, value in settings.items() if value not in _LATER.get(name, ())}
    if "batch_size" in values and "few_shot" in values and values["batch_size"] is None:
        values["batch_size"] = _BATCH_SIZE
    module, _, name = str(values.get("class_path")).rpartition(".")
    if module in IN_THE_FIRST_RELEASE:
        values["class_path"] = f"{IN_THE_FIRST_RELEASE[module]}.{name}"
    if "class_path" in values and issubclass(callback := resolve(values["class_path"]), AdapterCallback):
        shared = {"backbone": None, "name": callback.default_name}
        if not callback.computed:
            shared |= {"backbone_dropout": False, "gradient_checkpointing": False}
        values["init_args"] = shared | dict(values.get("init_args") or {})
        if values["init_args"].get("within", "") is None and callback.__name__ in _WITHOUT_PARTS:
            del values["init_args"]["within"]
    return {name: _as_in_the_first_release(value) for name, value in values.items()}
